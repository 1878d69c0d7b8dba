# Copyright (c) the torchrl_rpd authors.
#
# This source code is licensed under the MIT license found in the
# LICENSE file in the root directory of this source tree.
"""ManiSkill3 environments for TorchRL."""

from __future__ import annotations

import importlib
import importlib.util
import warnings
from collections import OrderedDict
from collections.abc import Mapping, Sequence
from functools import partial
from typing import Any, Literal

import torch
from tensordict import TensorDict, TensorDictBase
from torchrl.data import Bounded, Categorical, Composite, Unbounded
from torchrl.envs import ParallelEnv
from torchrl.envs.common import _EnvPostInit, _EnvWrapper
from torchrl.envs.utils import _classproperty

from torchrl_rpd._threads import available_cpus
from torchrl_rpd.envs._seeds import EpisodeSeeds

_has_mani_skill = importlib.util.find_spec("mani_skill") is not None

# gymnasium wrappers that change nothing that the adapter reads: it talks to the
# unwrapped environment and counts the steps itself.
_TRANSPARENT_WRAPPERS = ("TimeLimitWrapper", "OrderEnforcing", "PassiveEnvChecker")

RewardMode = Literal["normalized_dense", "dense", "sparse", "none"]


def _require_mani_skill() -> None:
    if not _has_mani_skill:
        raise ImportError(
            "ManiSkill was not found. Install it with: "
            "pip install 'torchrl_rpd[maniskill]'"
        )


def _unwrap(env: Any) -> tuple[Any, int | None]:
    """Returns the ManiSkill environment in ``env`` and its time limit."""
    _require_mani_skill()
    from mani_skill.envs.sapien_env import BaseEnv

    limit = None
    layer = env
    while not isinstance(layer, BaseEnv):
        name = type(layer).__name__
        if name == "ManiSkillVectorEnv":
            raise ValueError(
                "ManiSkillVectorEnv resets finished environments by itself, which loses "
                "their terminal observations. TorchRL drives the resets: pass what "
                "gym.make(...) returned, without ManiSkillVectorEnv."
            )
        if not hasattr(layer, "env"):
            raise TypeError(
                f"Expected a ManiSkill environment made by gym.make(...), got "
                f"{type(env).__name__}, which holds none. For other gym environments use "
                "torchrl.envs.GymWrapper."
            )
        if name not in _TRANSPARENT_WRAPPERS:
            raise ValueError(
                f"The gymnasium wrapper {name} would be bypassed: ManiSkillWrapper talks "
                "to the ManiSkill environment itself. Pass the environment without it "
                "and use a TorchRL transform instead."
            )
        if limit is None:
            limit = getattr(layer, "_max_episode_steps", None)
        layer = layer.env
    if limit is None and layer.spec is not None:
        limit = layer.spec.max_episode_steps
    return layer, limit


class ManiSkillWrapper(_EnvWrapper):
    """TorchRL adapter for ManiSkill3 environments that were built before.

    On CPU a ManiSkill environment simulates one scene (``num_envs=1``); a batch of ``N``
    is made of ``N`` of them that are stepped in this process. The batch size is always
    ``[N]``, also for one environment.

    What it writes:

    - ``observation`` ``[N, D]`` float32: ManiSkill's flat state.
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

    Args:
        env: what ``gym.make(task_id, num_envs=1, ...)`` returned, or a sequence of ``N``
            such environments of the same task.

    Keyword Args:
        max_episode_steps (int, optional): time limit in control steps. Defaults to the
            one of the environment's gymnasium registration.

    Raises:
        TypeError: if ``env`` is no ManiSkill environment.
        ValueError: if ``env`` resets itself (``ManiSkillVectorEnv``), if another wrapper
            would be bypassed, or if the environments of a batch differ.

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
        _require_mani_skill()
        return importlib.import_module("mani_skill")

    @_classproperty
    def available_envs(cls) -> list[str]:
        """The ids of the registered ManiSkill tasks."""
        if not _has_mani_skill:
            return []
        importlib.import_module("mani_skill.envs")
        registration = importlib.import_module("mani_skill.utils.registration")
        return sorted(registration.REGISTERED_ENVS)

    def __init__(
        self,
        env: Any = None,
        *,
        max_episode_steps: int | None = None,
        **kwargs: Any,
    ) -> None:
        if env is None:
            raise TypeError("ManiSkillWrapper needs a ManiSkill environment.")
        envs = list(env) if isinstance(env, Sequence) else [env]
        if not envs:
            raise ValueError("ManiSkillWrapper needs at least one environment.")
        unwrapped, limits = zip(*(_unwrap(e) for e in envs), strict=True)
        self._check_batch(unwrapped)
        self._max_episode_steps = (
            max_episode_steps if max_episode_steps is not None else limits[0]
        )
        self._seeds = EpisodeSeeds(len(envs))
        super().__init__(
            env=list(unwrapped),
            device=torch.device("cpu"),
            batch_size=torch.Size([len(envs)]),
            **kwargs,
        )

    @staticmethod
    def _check_batch(envs: Sequence[Any]) -> None:
        if len({id(e) for e in envs}) != len(envs):
            raise ValueError("The same environment was passed twice.")
        for e in envs:
            if e.num_envs != 1 or e.device.type != "cpu":
                raise ValueError(
                    "This version steps CPU environments with num_envs=1: pass a list "
                    f"of them. Got num_envs={e.num_envs} on {e.device}."
                )
            if e.obs_mode != "state":
                raise ValueError(
                    "This version reads obs_mode='state' (a flat vector), got "
                    f"{e.obs_mode!r}. Build the environment with obs_mode='state'."
                )
        kinds = {
            (type(e).__name__, e.control_mode, e.reward_mode, e._init_raw_obs.shape)
            for e in envs
        }
        if len(kinds) > 1:
            raise ValueError(
                "All environments of a batch must have the same task, control mode and "
                f"reward mode, got {sorted(map(str, kinds))}."
            )

    def _check_kwargs(self, kwargs: dict) -> None:
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

    def _make_specs(self, env: list[Any]) -> None:
        shape = self.batch_size
        flag = Categorical(n=2, shape=(*shape, 1), dtype=torch.bool)
        info = env[0].get_info()
        self._flags = tuple(key for key in ("success", "fail") if key in info)
        obs = env[0]._init_raw_obs
        self.observation_spec = Composite(
            observation=Unbounded(shape=(*shape, obs.shape[-1]), dtype=torch.float32),
            episode_seed=Unbounded(shape=(*shape, 1), dtype=torch.int64),
            **{key: flag.clone() for key in self._flags},
            shape=shape,
        )
        space = env[0].single_action_space
        self.action_spec = Bounded(
            low=torch.as_tensor(space.low).expand(*shape, *space.shape),
            high=torch.as_tensor(space.high).expand(*shape, *space.shape),
            shape=(*shape, *space.shape),
            dtype=torch.float32,
        )
        self.reward_spec = Unbounded(shape=(*shape, 1), dtype=torch.float32)
        self.done_spec = Composite(
            done=flag.clone(),
            terminated=flag.clone(),
            truncated=flag.clone(),
            shape=shape,
        )
        zeros = torch.zeros(*shape, 1, dtype=torch.bool)
        # What the environments show now; a partial reset returns all rows.
        self._current: dict[str, torch.Tensor] = {
            "observation": torch.cat([e._init_raw_obs for e in env]).float(),
            "episode_seed": torch.zeros(*shape, 1, dtype=torch.int64),
            **dict.fromkeys(self._flags, zeros),
        }

    def _reset(
        self, tensordict: TensorDictBase | None = None, **kwargs: Any
    ) -> TensorDictBase:
        if kwargs:
            raise TypeError(
                f"Unexpected reset arguments: {sorted(kwargs)}. Seeds are set with "
                "env.set_seed(seed)."
            )
        mask = None if tensordict is None else tensordict.get("_reset", None)
        rows = range(len(self._env))
        if mask is not None:
            rows = mask.reshape(-1).nonzero().squeeze(-1).tolist()
        current = {key: value.clone() for key, value in self._current.items()}
        for i in rows:
            seed = self._seeds.draw(i)
            obs, info = self._env[i].reset(seed=seed)
            current["observation"][i] = obs[0]
            current["episode_seed"][i] = seed
            for key in self._flags:
                current[key][i] = info[key]
        self._current = current
        return TensorDict(current, batch_size=self.batch_size)

    def _step(self, tensordict: TensorDictBase) -> TensorDictBase:
        action = tensordict.get(self.action_key)
        obs, reward, elapsed = [], [], []
        flags: dict[str, list[torch.Tensor]] = {key: [] for key in self._flags}
        for env, act in zip(self._env, action.split(1), strict=True):
            # ManiSkill's terminated is success | fail, read from info below; its own
            # truncated is always False without gymnasium's time limit.
            o, r, _, _, info = env.step(act)
            obs.append(o)
            reward.append(r)
            elapsed.append(env.elapsed_steps)
            for key in self._flags:
                flags[key].append(info[key])
        self._current = {
            "observation": torch.cat(obs),
            "episode_seed": self._current["episode_seed"],
            **{key: torch.cat(f).reshape(-1, 1) for key, f in flags.items()},
        }
        terminated = torch.zeros(len(obs), 1, dtype=torch.bool)
        for key in self._flags:
            terminated = terminated | self._current[key]
        truncated = torch.zeros_like(terminated)
        if self._max_episode_steps is not None:
            truncated = (torch.cat(elapsed) >= self._max_episode_steps).reshape(-1, 1)
        # The sparse reward is a bool in ManiSkill.
        return TensorDict(
            {
                **self._current,
                "reward": torch.cat(reward).reshape(-1, 1).float(),
                "terminated": terminated,
                "truncated": truncated,
                "done": terminated | truncated,
            },
            batch_size=self.batch_size,
        )

    def _set_seed(self, seed: int | None) -> None:
        if seed is not None:
            self._seeds.restart(seed)

    def state_dict(self, *args: Any, **kwargs: Any) -> OrderedDict:
        """The state of the seed streams; episodes under way are not part of it."""
        return OrderedDict(episode_seeds=self._seeds.state_dict())

    def load_state_dict(self, state_dict: Mapping[str, Any], **kwargs: Any) -> None:
        """Restores the seed streams; they are used from the next reset on."""
        self._seeds.load_state_dict(state_dict["episode_seeds"])

    def close(self, *, raise_if_closed: bool = True) -> None:
        """Closes all environments. A closed environment cannot be used again."""
        if self.is_closed:
            if raise_if_closed:
                raise RuntimeError("The environment is closed already.")
            return
        self.is_closed = True
        for env in self._env:
            env.close()

    def __repr__(self) -> str:
        env = self._env[0]
        task = env.spec.id if env.spec is not None else type(env).__name__
        return (
            f"{type(self).__name__}({task}, num_envs={len(self._env)}, "
            f"control_mode={env.control_mode}, reward_mode={env.reward_mode})"
        )


class _ManiSkillEnvMeta(_EnvPostInit):
    """Returns a ParallelEnv when ``num_workers > 1``."""

    def __call__(cls, *args: Any, num_workers: int = 1, **kwargs: Any) -> Any:
        if num_workers < 1:
            raise ValueError(f"num_workers must be at least 1, got {num_workers}.")
        if num_workers == 1:
            return super().__call__(*args, **kwargs)
        _require_mani_skill()
        # use_buffers=False: with buffers, ParallelEnv's parent spin-polls a whole core
        # while it waits for the simulators.
        return ParallelEnv(
            num_workers,
            partial(cls, *args, **kwargs),
            use_buffers=False,
            metadata_from_workers=True,
            num_threads=max(1, available_cpus() - num_workers),
            num_sub_threads=1,
        )


class ManiSkillEnv(ManiSkillWrapper, metaclass=_ManiSkillEnvMeta):
    """Builds ManiSkill3 environments and wraps them for TorchRL.

    Needs no graphics driver: where no Vulkan device is found, what the task builders ask
    of the renderer is left out, and state observations stay the same.

    Args:
        task_id (str): id of a registered ManiSkill task, e.g. ``"PickCube-v1"``.

    Keyword Args:
        num_envs (int): number of environments stepped in one process. Default: ``1``.
        num_workers (int): number of processes, each with ``num_envs`` environments. For
            more than one the result is a :class:`~torchrl.envs.ParallelEnv` of batch size
            ``[num_workers, num_envs]``; guard the script with
            ``if __name__ == "__main__":``. Default: ``1``.
        obs_mode (str): ``"state"``.
        control_mode (str): the controller and with it the meaning of the actions, all in
            [-1, 1]. Default: ``"pd_ee_delta_pose"``: 3 translations of at most 0.1 m and
            3 rotations of at most 0.1 rad per step, and the gripper (1 open, -1 closed).
        reward_mode (str): ``"normalized_dense"`` (at most 1), ``"dense"``, ``"sparse"``
            (1 at success) or ``"none"``. Default: ``"normalized_dense"``.
        sim_backend (str): ``"auto"`` or ``"physx_cpu"``: both step on the CPU.
        fast_controller (bool): if ``True``, computes the targets of the end-effector
            controller without its 150 small tensor operations, and grasp queries only
            where both fingers touch the object: about twice the steps per second, equal
            up to rounding (1e-6) until contacts amplify it. Default: ``False``: bit for
            bit ManiSkill.
        max_episode_steps (int, optional): time limit. Defaults to the task's own.
        **kwargs: passed to ``gym.make``, e.g. ``robot_uids`` or ``sim_config``.

    Raises:
        ImportError: if ManiSkill is missing.
        ValueError: if the task is unknown or does not have the reward mode.

    Examples:
        >>> from torchrl_rpd.envs import ManiSkillEnv
        >>> env = ManiSkillEnv("PickCube-v1", num_envs=2, reward_mode="sparse")
        >>> _ = env.set_seed(0)
        >>> rollout = env.rollout(5)
        >>> rollout["observation"].shape, rollout["action"].shape
        (torch.Size([2, 5, 42]), torch.Size([2, 5, 7]))
        >>> rollout["episode_seed"][0, 0]  # reset(seed=0) gives this episode again
        tensor([0])
    """

    def __init__(
        self,
        task_id: str,
        *,
        num_envs: int = 1,
        obs_mode: str = "state",
        control_mode: str = "pd_ee_delta_pose",
        reward_mode: RewardMode = "normalized_dense",
        sim_backend: str = "auto",
        fast_controller: bool = False,
        max_episode_steps: int | None = None,
        **kwargs: Any,
    ) -> None:
        _require_mani_skill()
        if num_envs < 1:
            raise ValueError(f"num_envs must be at least 1, got {num_envs}.")
        if sim_backend not in ("auto", "physx_cpu", "cpu"):
            raise ValueError(
                f"sim_backend={sim_backend!r} is not covered by this version: use 'auto' "
                "or 'physx_cpu', which step on the CPU."
            )
        if obs_mode != "state":
            raise ValueError(
                f"obs_mode={obs_mode!r} is not covered by this version: use 'state'."
            )
        self._check_task(task_id, reward_mode)
        make = partial(
            _make,
            task_id,
            obs_mode=obs_mode,
            control_mode=control_mode,
            reward_mode=reward_mode,
            sim_backend="physx_cpu",
            **kwargs,
        )
        envs = [make() for _ in range(num_envs)]
        if fast_controller:
            from torchrl_rpd.envs._fast_controller import use_fast_controller
            from torchrl_rpd.envs._fast_grasp import use_fast_grasp

            for env in envs:
                use_fast_controller(env.unwrapped)
                use_fast_grasp(env.unwrapped)
        super().__init__(envs, max_episode_steps=max_episode_steps)

    @staticmethod
    def _check_task(task_id: str, reward_mode: str) -> None:
        importlib.import_module("mani_skill.envs")
        registration = importlib.import_module("mani_skill.utils.registration")
        spec = registration.REGISTERED_ENVS.get(task_id)
        if spec is None:
            close = [t for t in registration.REGISTERED_ENVS if t[:4] == task_id[:4]]
            raise ValueError(
                f"ManiSkill has no task {task_id!r}. Similar names: {sorted(close)}; "
                "all of them: ManiSkillEnv.available_envs."
            )
        supported = spec.cls.SUPPORTED_REWARD_MODES
        if reward_mode not in supported:
            raise ValueError(
                f"{task_id} has no reward_mode={reward_mode!r}. Choose one of "
                f"{sorted(supported)}."
            )


def _make(task_id: str, **kwargs: Any) -> Any:
    """Builds one ManiSkill environment, with or without a Vulkan device."""
    import gymnasium as gym

    from torchrl_rpd.envs import _vulkan

    if not _vulkan.has_render_device():
        _vulkan.use_without_vulkan()
    else:
        _vulkan.allow_push_t_without_rendering()
    with warnings.catch_warnings():
        # gymnasium warns of ManiSkill's batched spaces; the adapter reads the tensors.
        warnings.simplefilter("ignore", UserWarning)
        return gym.make(task_id, num_envs=1, render_backend="none", **kwargs)
