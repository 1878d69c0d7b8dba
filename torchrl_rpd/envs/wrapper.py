# Copyright (c) the torchrl_rpd authors.
#
# This source code is licensed under the MIT license found in the
# LICENSE file in the root directory of this source tree.
"""TorchRL adapter for ManiSkill3 environments that were built before."""

from __future__ import annotations

import importlib
from collections import OrderedDict
from collections.abc import Mapping
from contextlib import nullcontext
from typing import Any

import torch
from tensordict import NonTensorData, TensorDict, TensorDictBase
from torchrl.envs.common import _EnvWrapper
from torchrl.envs.utils import _classproperty

from torchrl_rpd.envs import _specs
from torchrl_rpd.envs._build import registered_tasks
from torchrl_rpd.envs._garbage import one_collection
from torchrl_rpd.envs._observer import Entries, gather, observer_of
from torchrl_rpd.envs._seeds import EpisodeSeeds
from torchrl_rpd.envs._unwrap import (
    has_mani_skill,
    require_mani_skill,
    unwrap_batch,
)
from torchrl_rpd.envs._views import CameraArgument, ObsMode


class ManiSkillWrapper(_EnvWrapper):
    """TorchRL adapter for ManiSkill3 environments that were built before.

    On CPU a ManiSkill environment simulates one scene (``num_envs=1``); a batch of ``N``
    is made of ``N`` of them that are stepped in this process. On a GPU one ManiSkill
    environment simulates ``N`` scenes (*not run here*: tested on a stand-in). The batch
    size is always ``[N]``, also for one environment.

    What it writes, by observation mode:

    - ``"state"``: ``observation`` ``[N, D]`` float32, ManiSkill's flat state.
    - ``"state_dict"``: the same as ManiSkill's dictionary under ``observation``, e.g.
      ``("observation", "agent", "qpos")``; numbers per environment get shape ``[N, 1]``.
    - ``"rgb"``: ``("observation", "image")``, the main camera's picture, ``[N, 3, H, W]``
      uint8; ``("observation", "wrist_image")`` the hand camera's and
      ``("observation", "<name>_image")`` any other's.
    - ``"depth"``: ``("observation", "depth")``, ``"wrist_depth"``, ``"<name>_depth"``,
      ``[N, 1, H, W]`` int16 in millimetres, 0 where there is nothing. ``"rgbd"`` is
      ``"rgb+depth"``.
    - ``"rgb+state"`` (or depth, rgbd): also ``("observation", "state")`` ``[N, D]``.

    And always:

    - ``reward`` ``[N, 1]`` float32; ``terminated`` (success or failure), ``truncated``
      (time limit) and ``done`` ``[N, 1]`` bool.
    - ``success`` and, where the task has it, ``fail`` ``[N, 1]`` bool.
    - ``episode_seed`` ``[N, 1]`` int64: ``reset(seed=this)`` of plain ManiSkill gives
      this episode again. An environment that plays the same episodes with the same
      actions agrees bit for bit; PhysX keeps a trace of earlier contacts, so that a
      *fresh* environment may differ by rounding from the first contact on.

    Resets follow TorchRL's ``"_reset"`` mask; the terminal observation of an episode
    stays in ``("next", "observation")``. Every reset passes an explicit seed, drawn from
    one stream per environment. :meth:`set_seed` restarts the streams (environment 0 gets
    the seed itself, the others what ManiSkill derives from it); the new streams are used
    from each environment's next reset on. Torch's global random number generator is
    neither read nor moved.

    Pictures are copies: the simulator draws the next one into the same memory.

    .. note::
        On a GPU, ManiSkill draws the object poses of all scenes that are reset together
        from one generator, seeded with the first of their seeds. An episode is then a
        function of the seeds *and* of which scenes were reset with it; after a full reset
        ``reset(seed=episode_seed)`` with all seeds gives all episodes again. A partial
        reset also re-bases the targets of controllers with a virtual target
        (``use_target=True``) in the other scenes. Nothing is copied from one device to
        another, and no step waits for the GPU: use the collectors' ``no_cuda_sync=True``.

    Args:
        env: what ``gym.make(task_id, ...)`` returned, or a sequence of ``N`` such CPU
            environments of the same task.

    Keyword Args:
        obs_mode (str, optional): what is observed. Defaults to what the environment was
            built for. The human camera needs no pictures of ManiSkill's, so that for it
            ``"rgb"`` goes with an environment built for ``"none"``, and ``"rgb+state"``
            with one built for ``"state"``.
        camera (str or sequence of str, optional): the cameras observed: ``"main"`` (the
            task's first camera), ``"hand"`` (the robot's), ``"human"`` (ManiSkill's
            camera for people, the view of the paper: it shows PickCube's goal, which is
            hidden from the sensors) or ManiSkill's names. The human camera writes
            ``("observation", "image")``, or ``"human_image"`` beside the main camera; a
            changed human view (``"human_moved"``, see
            :data:`~torchrl_rpd.envs.CAMERA_VIEWS`) likewise, or ``"human_moved_image"``
            beside one of the two. Defaults to all sensor cameras.
        teacher_camera (str, optional): one camera whose picture is written to
            ``teacher_image`` ``[N, 3, H, W]`` uint8, for an image teacher beside a
            student with other observations.
        from_pixels (bool): if ``True``, writes the human camera's picture to ``pixels``
            ``[N, H, W, 3]`` uint8, where :class:`~torchrl.record.VideoRecorder` looks.
            Default: ``False``.
        language_instruction (str, optional): a text to write to
            ``language_instruction`` at every step.
        ignore_terminations (bool): if ``True``, success and failure are reported but end
            no episode: all end at the time limit. Default: ``False``.
        max_episode_steps (int, optional): time limit in control steps. Defaults to the
            one of the environment's gymnasium registration.

    Raises:
        TypeError: if ``env`` is no ManiSkill environment.
        ValueError: if ``env`` resets itself (``ManiSkillVectorEnv``), if another wrapper
            would be bypassed, if the environments of a batch differ, or if what is to be
            observed is not there.
        RuntimeError: at a step whose action lies on another device.

    ManiSkill3: Tao et al., `arXiv:2410.00425 <https://arxiv.org/abs/2410.00425>`_.

    Examples:
        >>> import gymnasium as gym
        >>> import mani_skill.envs
        >>> from torchrl_rpd.envs import ManiSkillEnv, ManiSkillWrapper
        >>> env = ManiSkillEnv("PushCube-v1", num_envs=2)  # builds and wraps
        >>> base = gym.make("PushCube-v1", obs_mode="state", render_backend="none")
        >>> env = ManiSkillWrapper(base)
        >>> env.rollout(3)["observation"].shape
        torch.Size([1, 3, 35])
    """

    git_url = "https://github.com/haosulab/ManiSkill"
    libname = "mani_skill"
    is_closed: bool

    @_classproperty
    def lib(cls) -> Any:
        """The ``mani_skill`` package."""
        require_mani_skill()
        return importlib.import_module("mani_skill")

    @_classproperty
    def available_envs(cls) -> list[str]:
        """The ids of the registered ManiSkill tasks."""
        return sorted(registered_tasks()) if has_mani_skill else []

    def __init__(
        self,
        env: Any = None,
        *,
        obs_mode: str | None = None,
        camera: CameraArgument = None,
        teacher_camera: str | None = None,
        from_pixels: bool = False,
        language_instruction: str | None = None,
        ignore_terminations: bool = False,
        max_episode_steps: int | None = None,
        **kwargs: Any,
    ) -> None:
        envs, limit = unwrap_batch(env)
        self._max_episode_steps = (
            max_episode_steps if max_episode_steps is not None else limit
        )
        self._ignore_terminations = ignore_terminations
        self._instruction = language_instruction
        num_envs = sum(e.num_envs for e in envs)
        self._seeds = EpisodeSeeds(num_envs)
        self._to_rebuild: set[int] = set()
        device = envs[0].elapsed_steps.device
        self._observer = observer_of(
            envs[0],
            ObsMode.parse(envs[0].obs_mode if obs_mode is None else obs_mode),
            device=device,
            camera=camera,
            teacher_camera=teacher_camera,
            from_pixels=from_pixels,
        )
        super().__init__(
            env=envs,
            device=device,
            batch_size=torch.Size([num_envs]),
            **kwargs,
        )

    def _check_kwargs(self, kwargs: dict[str, Any]) -> None:
        unknown = set(kwargs) - {"env"}
        if unknown:
            raise TypeError(f"Unexpected arguments: {sorted(unknown)}.")

    def _build_env(self, env: list[Any]) -> list[Any]:
        return env

    def _init_env(self) -> int | None:
        return None

    def __getattr__(self, attr: str) -> Any:
        # _EnvWrapper forwards to self._env, which is a list here: forward to the first
        # environment instead, since all are of one kind.
        if attr.startswith("__") or "_env" not in self.__dict__:
            raise AttributeError(attr)
        return getattr(self._env[0], attr)

    @property
    def render_backend(self) -> str:
        """Who draws: ``"sapien_cuda"``, ``"sapien_cpu"``, or ``"none"``."""
        return self._env[0].backend.render_backend or "none"

    def _make_specs(self, env: list[Any]) -> None:
        shape = self.batch_size
        info = env[0].get_info()
        self._flags = tuple(key for key in ("success", "fail") if key in info)
        # What the environments show now; a partial reset returns all rows.
        parts = [self._observer.read(e, e._last_obs) for e in env]
        kinds = {str({key: value.shape for key, value in p.items()}) for p in parts}
        if len(kinds) > 1:
            raise ValueError(
                "All environments of a batch must observe the same, got "
                f"{sorted(kinds)}."
            )
        self._current: Entries = gather(parts)
        zeros = torch.zeros(*shape, 1, dtype=torch.bool, device=self.device)
        self._current["episode_seed"] = zeros.long()
        for key in self._flags:
            self._current[key] = zeros
        self._played = [0] * shape.numel()
        device = self.device
        self.observation_spec = _specs.observation_spec(
            self._current, shape, self._instruction, device
        )
        self.action_spec = _specs.action_spec(env[0].single_action_space, shape, device)
        self.reward_spec = _specs.reward_spec(shape, device)
        self.done_spec = _specs.done_spec(shape, device)

    def _reset(
        self, tensordict: TensorDictBase | None = None, **kwargs: Any
    ) -> TensorDictBase:
        if kwargs:
            raise TypeError(
                f"Unexpected reset arguments: {sorted(kwargs)}. Seeds are set with "
                "env.set_seed(seed)."
            )
        mask = None if tensordict is None else tensordict.get("_reset", None)
        rows = list(range(len(self._played)))
        if mask is not None:
            rows = mask.reshape(-1).nonzero().squeeze(-1).tolist()
        current = {key: value.clone() for key, value in self._current.items()}
        # One environment of many scenes, or many of one.
        groups = [(0, rows)] if len(self._env) == 1 else [(r, [r]) for r in rows]
        with one_collection() if self._to_rebuild else nullcontext():
            for index, group in groups:
                if group:
                    self._reset_rows(self._env[index], group, current)
        self._current = current
        return self._with_instruction(TensorDict(current, batch_size=self.batch_size))

    def _reset_rows(self, env: Any, rows: list[int], current: Entries) -> None:
        """Resets these rows of the batch, all of which ``env`` simulates."""
        for row in rows:
            self._played[row] = self._seeds.draw(row)
        seeds = [self._played[row] for row in rows]
        if env.num_envs == 1:
            obs, info = env.reset(seed=seeds[0], options=self._options(env))
            where, there = torch.tensor(rows), torch.tensor([0])
        else:
            where = there = torch.tensor(rows, device=self.device)
            obs, info = self._reset_scenes(env, rows, seeds, where)
        for key, value in self._observer.read(env, obs).items():
            current[key][where] = value[there]
        for key in self._flags:
            current[key][where] = info[key].reshape(-1, 1)[there]
        current["episode_seed"][where, 0] = torch.tensor(seeds, device=self.device)

    def _reset_scenes(
        self, env: Any, rows: list[int], seeds: list[int], where: torch.Tensor
    ) -> tuple[Any, dict[str, Any]]:
        """Resets some or all scenes of one environment."""
        if len(rows) == env.num_envs:
            return env.reset(seed=seeds, options=self._options(env))
        if env.reconfiguration_freq:
            raise RuntimeError(
                "ManiSkill cannot rebuild its scenes (reconfiguration_freq) when only "
                "some of them are reset. Use reconfiguration_freq=0, or "
                "ignore_terminations=True, with which all episodes end together."
            )
        # ManiSkill wants the seeds of all scenes, and draws the poses of those that are
        # reset from a generator seeded with the first: with the seed of a scene that goes
        # on, every new episode would start alike.
        every = list(self._played)
        every[0] = seeds[0]
        return env.reset(seed=every, options={"env_idx": where})

    def _options(self, env: Any) -> dict[str, Any]:
        """Has ManiSkill rebuild the simulation, once, where a state was loaded."""
        rebuild = id(env) in self._to_rebuild
        self._to_rebuild.discard(id(env))
        return {"reconfigure": True} if rebuild else {}

    def _step(self, tensordict: TensorDictBase) -> TensorDictBase:
        action = tensordict.get(self.action_key)
        if action.device != self.device:
            raise RuntimeError(
                f"The action is on {action.device}, the simulation on {self.device}, and "
                "nothing is copied behind your back: put the policy on the same device, "
                "or use torchrl.envs.DeviceCastTransform."
            )
        # A GPU environment takes the whole batch, the CPU environments a row each.
        actions = [action] if len(self._env) == 1 else action.split(1)
        parts, reward, elapsed = [], [], []
        flags: dict[str, list[torch.Tensor]] = {key: [] for key in self._flags}
        for env, act in zip(self._env, actions, strict=True):
            # ManiSkill's terminated is success | fail, read from info below; its own
            # truncated is always False without gymnasium's time limit.
            o, r, _, _, info = env.step(act)
            parts.append(self._observer.read(env, o))
            reward.append(r)
            elapsed.append(env.elapsed_steps)
            for key in self._flags:
                flags[key].append(info[key])
        self._current = {
            **gather(parts),
            "episode_seed": self._current["episode_seed"],
            **{key: torch.cat(f).reshape(-1, 1) for key, f in flags.items()},
        }
        # The sparse reward is a bool in ManiSkill.
        rewards = torch.cat(reward).reshape(-1, 1).float()
        terminated = torch.zeros_like(rewards, dtype=torch.bool)
        if not self._ignore_terminations:
            for key in self._flags:
                terminated = terminated | self._current[key]
        truncated = torch.zeros_like(terminated)
        if self._max_episode_steps is not None:
            truncated = (torch.cat(elapsed) >= self._max_episode_steps).reshape(-1, 1)
        return self._with_instruction(
            TensorDict(
                {
                    **self._current,
                    "reward": rewards,
                    "terminated": terminated,
                    "truncated": truncated,
                    "done": terminated | truncated,
                },
                batch_size=self.batch_size,
            )
        )

    def _with_instruction(self, tensordict: TensorDict) -> TensorDict:
        if self._instruction is not None:
            text = NonTensorData(self._instruction, batch_size=self.batch_size)
            tensordict.set("language_instruction", text)
        return tensordict

    def _set_seed(self, seed: int | None) -> None:
        if seed is not None:
            self._seeds.restart(seed)

    def state_dict(self, *args: Any, **kwargs: Any) -> OrderedDict[str, Any]:
        """The state of the seed streams; episodes under way are not part of it."""
        return OrderedDict(episode_seeds=self._seeds.state_dict())

    def load_state_dict(self, state_dict: Mapping[str, Any], **kwargs: Any) -> None:
        """Restores the seed streams; they are used from the next reset on.

        Each environment's simulation is rebuilt at that reset (on a GPU: at the next
        reset of all scenes), so that its episodes are those of a fresh environment bit
        for bit: PhysX keeps a trace of earlier contacts. An empty state, which is all
        that a collector keeps of an environment without transforms, changes nothing.
        """
        if not state_dict:
            return
        self._seeds.load_state_dict(state_dict["episode_seeds"])
        self._to_rebuild = {id(env) for env in self._env}

    def close(self, *, raise_if_closed: bool = True) -> None:
        """Closes all environments. A closed environment cannot be used again."""
        if self.is_closed:
            if raise_if_closed:
                raise RuntimeError("The environment is closed already.")
            return
        self.is_closed = True
        with one_collection():
            for env in self._env:
                env.close()

    def __repr__(self) -> str:
        env = self._env[0]
        task = env.spec.id if env.spec is not None else type(env).__name__
        return (
            f"{type(self).__name__}({task}, num_envs={len(self._played)}, "
            f"control_mode={env.control_mode}, reward_mode={env.reward_mode})"
        )
