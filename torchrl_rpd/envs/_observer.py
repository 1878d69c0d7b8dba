# Copyright (c) the torchrl_rpd authors.
#
# This source code is licensed under the MIT license found in the
# LICENSE file in the root directory of this source tree.
"""From what ManiSkill observes to the keys, shapes and dtypes of the adapter."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from typing import Any

import torch
from tensordict.utils import NestedKey

from torchrl_rpd.envs._views import CameraArgument, Cameras, ObsMode, View

Entries = dict[NestedKey, torch.Tensor]


class Observer:
    """Reads the observation of one ManiSkill environment.

    Args:
        mode (ObsMode): what is observed.
        views: the pictures among the observations.

    Keyword Args:
        teacher (View, optional): a picture beside the observations.
        pixels (str, optional): the human render camera whose picture is written to
            ``pixels``, channels last.
        device (torch.device): where the simulation's tensors are.
    """

    def __init__(
        self,
        mode: ObsMode,
        views: Sequence[View],
        *,
        teacher: View | None = None,
        pixels: str | None = None,
        device: torch.device,
    ) -> None:
        self.mode = mode
        self.views = [*views, *([teacher] if teacher is not None else [])]
        self.pixels = pixels
        self.device = device
        self._human: dict[str, set[str]] = {}
        for view in self.views:
            if view.human:
                wanted = self._human.setdefault(view.camera, set())
                wanted.update(texture for texture, _ in view.keys)
        if pixels is not None:
            self._human.setdefault(pixels, set()).add("rgb")

    def read(self, env: Any, obs: Any) -> Entries:
        """What is observed, in tensors that nobody else writes to.

        Args:
            env: the unwrapped ManiSkill environment.
            obs: what its ``reset`` or ``step`` has just returned.
        """
        entries: Entries = dict(self._state(obs))
        # Each human camera is drawn once, whoever looks at it.
        human = {name: draw(env, name, wanted) for name, wanted in self._human.items()}
        for view in self.views:
            pictures = human[view.camera] if view.human else _sensor(obs, view.camera)
            for texture, key in view.keys:
                entries[key] = self._own(pictures[texture].permute(0, 3, 1, 2))
        if self.pixels is not None:
            entries["pixels"] = self._own(human[self.pixels]["rgb"])
        for key, value in entries.items():
            if value.device != self.device:
                raise RuntimeError(
                    f"{key} is on {value.device}, the simulation on {self.device}. Draw "
                    "on the device that simulates: render_backend='gpu'."
                )
        return entries

    def _own(self, picture: torch.Tensor) -> torch.Tensor:
        """A copy: the simulator draws the next picture into the same memory."""
        if picture.device != self.device and self.device.type == "cpu":
            # A GPU may draw what the CPU simulates; its pictures have to come here.
            picture = picture.cpu()
        return picture.clone(memory_format=torch.contiguous_format)

    def _state(self, obs: Any) -> Iterator[tuple[NestedKey, torch.Tensor]]:
        if self.mode.state == "state":
            if isinstance(obs, Mapping):
                obs = obs["state"]
            key = ("observation", "state") if self.mode.textures else "observation"
            yield key, obs.float().clone()
        elif self.mode.state == "state_dict":
            yield from _leaves({k: obs[k] for k in ("agent", "extra")}, "observation")


def _leaves(
    tree: Mapping[str, Any], *path: str
) -> Iterator[tuple[NestedKey, torch.Tensor]]:
    for name, value in tree.items():
        if isinstance(value, Mapping):
            yield from _leaves(value, *path, name)
        else:
            value = value.clone()
            # One number per environment comes without a last dimension.
            yield (*path, name), value if value.ndim > 1 else value.unsqueeze(-1)


def _sensor(obs: Any, camera: str) -> Mapping[str, torch.Tensor]:
    return obs["sensor_data"][camera]


def draw(env: Any, camera: str, textures: set[str]) -> Mapping[str, torch.Tensor]:
    """The picture of a human render camera, with what sensors do not see.

    What ``env.render_rgb_array(camera)`` draws, and depth where it is asked for.
    """
    for hidden in env._hidden_objects:
        hidden.show_visual()
    env.scene.update_render(update_sensors=False, update_human_render_cameras=True)
    view = env.scene.human_render_cameras[camera]
    view.capture()
    return view.get_obs(
        rgb="rgb" in textures,
        depth="depth" in textures,
        position=False,
        segmentation=False,
    )


def gather(parts: Sequence[Entries]) -> Entries:
    """One batch of the observations of several environments."""
    if len(parts) == 1:
        return parts[0]
    return {key: torch.cat([part[key] for part in parts]) for key in parts[0]}


def observer_of(
    env: Any,
    mode: ObsMode,
    *,
    device: torch.device,
    camera: CameraArgument,
    teacher_camera: str | None,
    from_pixels: bool,
) -> Observer:
    """What reads the observations of ``env``, if all that is asked for is there."""
    cameras = Cameras.of(env)
    if camera is not None and not mode.textures:
        raise ValueError(
            f"camera={camera!r} goes with pictures: use an obs_mode with 'rgb' or "
            "'depth', or teacher_camera for a picture beside the state."
        )
    views = cameras.views(camera, mode.textures) if mode.textures else []
    teacher = None
    if teacher_camera is not None:
        uid = cameras.find(teacher_camera)
        teacher = View(uid, uid in cameras.humans, (("rgb", "teacher_image"),))
    pixels = cameras.find("human") if from_pixels else None
    drawn = {t for v in [*views, teacher] if v and not v.human for t, _ in v.keys}
    visual = env.obs_mode_struct.visual
    missing = [texture for texture in sorted(drawn) if not getattr(visual, texture)]
    if mode.state is not None and not getattr(env.obs_mode_struct, mode.state):
        missing.append(mode.state)
    if missing:
        raise ValueError(
            f"Observing {missing} needs an environment that was built for it, and this "
            f"one has obs_mode={env.obs_mode!r}."
        )
    return Observer(mode, views, teacher=teacher, pixels=pixels, device=device)
