# Copyright (c) the torchrl_rpd authors.
#
# This source code is licensed under the MIT license found in the
# LICENSE file in the root directory of this source tree.
"""What is observed: the parts of an observation mode, and which cameras it draws."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, Literal

from tensordict.utils import NestedKey

from torchrl_rpd.envs.cameras import CAMERA_VIEWS

CameraArgument = str | Sequence[str] | None

# A robot that carries several cameras has one of this name for its hand.
_HAND_CAMERA = "hand_camera"


@dataclass(frozen=True)
class ObsMode:
    """The parts of an observation mode such as ``"rgb+state"``."""

    state: Literal["state", "state_dict"] | None
    textures: tuple[str, ...]

    @classmethod
    def parse(cls, obs_mode: str) -> ObsMode:
        """Reads ManiSkill's notation: parts joined by ``"+"``; rgbd is rgb + depth."""
        parts = obs_mode.replace("rgbd", "rgb+depth").split("+")
        unknown = sorted(set(parts) - {"rgb", "depth", "state", "state_dict"})
        if unknown or {"state", "state_dict"} <= set(parts):
            raise ValueError(
                f"obs_mode={obs_mode!r} cannot be read. Use 'state', 'state_dict', "
                "'rgb', 'depth', 'rgbd', or pictures and state joined by '+', e.g. "
                "'rgb+state'."
            )
        return cls(
            state=next((p for p in ("state_dict", "state") if p in parts), None),
            textures=tuple(p for p in ("rgb", "depth") if p in parts),
        )

    def of_mani_skill(self, sensor_textures: Sequence[str]) -> str:
        """The mode in which ManiSkill has to run.

        Without pictures of its sensors it draws nothing: the human camera is drawn by
        the adapter.
        """
        parts = [*sensor_textures, *([self.state] if self.state else [])]
        return "+".join(parts) or "none"


@dataclass(frozen=True)
class View:
    """A camera and the keys that its pictures are written to.

    Args:
        camera (str): ManiSkill's name of the camera.
        human (bool): whether it is a human render camera, which sees what is hidden
            from the sensors (PickCube's goal).
        keys: the texture (``"rgb"`` or ``"depth"``) and the key of each picture.
    """

    camera: str
    human: bool
    keys: tuple[tuple[str, NestedKey], ...]


def camera_names(camera: CameraArgument) -> tuple[str, ...] | None:
    """The cameras asked for, each once; None for all sensor cameras."""
    if camera is None:
        return None
    names = (camera,) if isinstance(camera, str) else tuple(camera)
    if not names or len(set(names)) != len(names):
        raise ValueError(
            f"camera={camera!r}: name one camera, or several different ones."
        )
    return names


@dataclass(frozen=True)
class Cameras:
    """The cameras of an environment, by ManiSkill's names.

    Args:
        sensors: the sensor cameras.
        mounted: those of them that the robot carries.
        humans: the human render cameras; the first is the task's view.
    """

    sensors: tuple[str, ...]
    mounted: tuple[str, ...]
    humans: tuple[str, ...]

    @classmethod
    def of(cls, env: Any) -> Cameras:
        """The cameras of a ManiSkill environment; none where nothing can be drawn."""
        sensors = tuple(env._sensors)
        mounted = getattr(env, "_agent_sensor_configs", {})
        return cls(
            sensors,
            tuple(name for name in sensors if name in mounted),
            tuple(env._human_render_cameras),
        )

    @property
    def human(self) -> str | None:
        """The human render camera that shows the task."""
        return next(iter(self.humans), None)

    @property
    def main(self) -> str | None:
        """The first camera that stands in the scene."""
        return next((name for name in self.sensors if name not in self.mounted), None)

    @property
    def hand(self) -> str | None:
        """The camera that the robot carries at its hand."""
        if _HAND_CAMERA in self.mounted:
            return _HAND_CAMERA
        return next(iter(self.mounted), None)

    @property
    def names(self) -> tuple[str, ...]:
        """All cameras."""
        return (*self.sensors, *self.humans)

    def find(self, name: str) -> str:
        """ManiSkill's name of the camera called ``name``, which may be its role."""
        roles = {"main": self.main, "hand": self.hand, "human": self.human}
        found = roles.get(name, name if name in self.names else None)
        if found is None:
            known = [role for role, uid in roles.items() if uid is not None]
            raise ValueError(
                f"There is no camera {name!r} here. Choose from "
                f"{[*known, *self.names]}, or add one with extra_cameras. ManiSkillEnv "
                f"adds the changed views itself: {[*CAMERA_VIEWS][1:]}."
            )
        return found

    def views(self, camera: CameraArgument, textures: Sequence[str]) -> list[View]:
        """The pictures to be written under ``"observation"``.

        Args:
            camera: the cameras asked for (None: all sensor cameras).
            textures: ``"rgb"`` and / or ``"depth"``.
        """
        names = camera_names(camera)
        if names is None:
            names = self.sensors
            if not names:
                raise ValueError(
                    "This environment has no sensor camera: use camera='human', or add "
                    "one with extra_cameras."
                )
        uids = [self.find(name) for name in names]
        if len(set(uids)) != len(uids):
            raise ValueError(f"camera={camera!r} names the same camera twice.")
        stems = {uid: f"{uid}_" for uid in uids}
        if self.hand in stems:
            stems[self.hand] = "wrist_"
        # The view of the task: the main camera, or else the human camera, or else the
        # first of its changed views.
        if self.human in stems:
            stems[self.human] = "human_"
        changed = [uid for uid in uids if uid in CAMERA_VIEWS]
        view = next((u for u in (self.main, self.human, *changed) if u in stems), None)
        if view is not None:
            stems[view] = ""
        return [
            View(uid, uid in self.humans, _keys(stem, textures))
            for uid, stem in stems.items()
        ]


def _keys(stem: str, textures: Sequence[str]) -> tuple[tuple[str, NestedKey], ...]:
    names = {"rgb": f"{stem}image", "depth": f"{stem}depth"}
    return tuple((texture, ("observation", names[texture])) for texture in textures)
