# Copyright (c) the torchrl_rpd authors.
#
# This source code is licensed under the MIT license found in the
# LICENSE file in the root directory of this source tree.
"""Plays episodes and records them as demonstrations."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

import numpy as np
import torch
from tensordict import TensorDictBase
from torchrl._utils import logger
from torchrl.envs import EnvBase, TransformedEnv

from torchrl_rpd.data.writer import DemoWriter
from torchrl_rpd.envs import ManiSkillWrapper
from torchrl_rpd.envs.tasks import TASKS
from torchrl_rpd.evaluation import _act

Keep = Literal["success", "all"]
_NAMES = {"image": "base_camera", "wrist_image": "hand_camera"}


def flat_state(tensordict: TensorDictBase) -> torch.Tensor:
    """ManiSkill's flat state, from its parts.

    A recording keeps the parts (``obs_mode="rgb+state_dict"``), as ManiSkill's files do;
    a teacher from privileged state reads them joined.

    Args:
        tensordict (TensorDictBase): ``[*B]`` with ``("observation", "agent")`` and
            ``("observation", "extra")``.

    Returns:
        ``[*B, D]`` float32, what ``obs_mode="state"`` observes.

    Examples:
        >>> import torch
        >>> from tensordict import TensorDict
        >>> from torchrl_rpd.data import flat_state
        >>> parts = {
        ...     "agent": {"qpos": torch.zeros(2, 9), "qvel": torch.zeros(2, 9)},
        ...     "extra": {"is_grasped": torch.ones(2, 1, dtype=torch.bool)},
        ... }
        >>> flat_state(TensorDict({"observation": parts}, [2])).shape
        torch.Size([2, 19])
    """
    observation = tensordict["observation"]
    return torch.cat(
        [
            value.float()
            for part in ("agent", "extra")
            for value in observation[part].values(True, True)
        ],
        -1,
    )


@dataclass(frozen=True)
class Recording:
    """What a recording has led to.

    Args:
        path (Path): the HDF5 file; the JSON lies beside it.
        episodes (int): episodes in the files.
        dropped (int): episodes that were played and not kept.
        steps (int): actions in the files.

    Examples:
        >>> from pathlib import Path
        >>> from torchrl_rpd.data import Recording
        >>> Recording(Path("push.h5"), episodes=19, dropped=1, steps=210).success
        0.95
    """

    path: Path
    episodes: int
    dropped: int
    steps: int

    @property
    def success(self) -> float:
        """The share of the episodes played that was kept."""
        return self.episodes / max(1, self.episodes + self.dropped)


@torch.no_grad()
def record_demos(
    env: EnvBase,
    policy: Callable[[TensorDictBase], Any],
    path: str | Path,
    *,
    task_id: str,
    episodes: int,
    seed: int = 0,
    keep: Keep = "success",
    noise: float = 0.0,
    instruction: str | None = None,
    cameras: Mapping[str, str] | None = None,
    env_kwargs: Mapping[str, Any] | None = None,
    settings: Mapping[str, Any] | None = None,
    max_attempts: int | None = None,
    source_type: str | None = None,
    source_desc: str | None = None,
) -> Recording:
    """Plays episodes and records them in ManiSkill's trajectory files.

    Goes in rounds: in round ``r`` the environment gets the seed ``seed + r``, and each
    of its scenes plays one episode to its end. Complete rounds survive a kill at any
    moment; called again with the same arguments, the recording goes on with the next
    one. With more ``episodes``, it goes on where it ended. See :class:`DemoWriter`.

    Recorded are all observations, the last one of an episode included, as ManiSkill
    keeps them: a flat state as ``obs``, else ``obs/agent/...``, ``obs/extra/...``,
    ``obs/state`` and ``obs/sensor_data/<camera>/rgb`` (pictures channels last).

    Args:
        env (EnvBase): a :class:`~torchrl_rpd.envs.ManiSkillEnv` of any batch size, or
            one like it.
        policy: a module that writes ``action`` or ``("vla_action", "chunk")`` (its
            first action is taken), or a callable tensordict -> actions.
        path (path): the HDF5 file to write, ``*.h5``.

    Keyword Args:
        task_id (str): the simulator's id of the task.
        episodes (int): how many episodes the files shall hold.
        seed (int): seed of the first round. Default: ``0``.
        keep (str): ``"success"`` keeps episodes that end in success, ``"all"`` all.
            Default: ``"success"``.
        noise (float): disturbs what is executed and keeps what was intended (DART,
            https://arxiv.org/abs/1703.09327), so that the files show the way back from
            places to which a learner will stray. Gaussian, added to all dimensions but
            the last one (the gripper), of a standard deviation that each episode draws
            in [0, ``noise``]; in units of the action. ``actions`` are then what was
            executed, ``intended_actions`` what the policy answered. Default: ``0.0``.
        instruction (str, optional): what is done. Defaults to the task table's.
        cameras (mapping, optional): the name in the file for entries of the observation
            with pictures, e.g. ``{"image": "human"}``. Defaults to ``"base_camera"``
            for ``image``, ``"hand_camera"`` for ``wrist_image`` and the name itself for
            ``<name>_image``.
        env_kwargs (mapping, optional): ManiSkill's arguments that make the environment
            again; plain JSON. Its control mode defaults to ``"pd_ee_delta_pose"``.
        settings (mapping, optional): what else must be the same to go on, e.g. the
            policy's name; plain JSON.
        max_attempts (int, optional): gives up after so many episodes were played.
            Defaults to 20 for each one asked for.
        source_type (str, optional): ManiSkill's word for the origin of the data.
        source_desc (str, optional): a sentence about it.

    Returns:
        Recording: how many episodes there are now, and how many were dropped.

    Raises:
        RuntimeError: if ``max_attempts`` were not enough; what was kept is in the files.
        ValueError: if the files that are there were recorded otherwise, or there is
            neither an instruction nor one in the task table.

    Examples:
        >>> import tempfile
        >>> from torchrl_rpd.data import record_demos
        >>> from torchrl_rpd.envs import ManiSkillEnv
        >>> from torchrl_rpd.teachers import ScriptedTeacher
        >>> env = ManiSkillEnv("PushCube-v1", reward_mode="sparse")
        >>> teacher = ScriptedTeacher("PushCube-v1")
        >>> path = tempfile.mkdtemp() + "/push.h5"
        >>> done = record_demos(
        ...     env, teacher, path, task_id="PushCube-v1", episodes=1
        ... )
        >>> done.episodes
        1
    """
    if episodes < 1:
        raise ValueError(f"episodes must be at least 1, got {episodes}.")
    if not noise >= 0:
        raise ValueError(f"noise must not be negative, got {noise}.")
    if instruction is None:
        if task_id not in TASKS:
            raise ValueError(
                f"The task table has no instruction for {task_id}: pass instruction=..."
            )
        instruction = TASKS[task_id].instruction
    attempts = 20 * episodes if max_attempts is None else max_attempts
    limit = TASKS[task_id].max_episode_steps if task_id in TASKS else None
    made_with = {"control_mode": "pd_ee_delta_pose", **(env_kwargs or {})}
    writer = DemoWriter(
        path,
        env_info={
            "env_id": task_id,
            "env_kwargs": made_with,
            "max_episode_steps": made_with.get("max_episode_steps", limit),
        },
        settings={
            "seed": seed,
            "batch": list(env.batch_size),
            "keep": keep,
            "instruction": instruction,
            **({"noise": noise} if noise else {}),
            **(settings or {}),
        },
        source_type=source_type,
        source_desc=source_desc,
    )
    if writer.episodes or writer.dropped:
        logger.info(
            f"{writer.path.name}: goes on behind {len(writer.episodes)} episodes."
        )
    seeds = {entry["episode_seed"] for entry in writer.episodes}
    with writer:
        while len(writer.episodes) < episodes:
            played = len(writer.episodes) + writer.dropped
            if played >= attempts:
                raise RuntimeError(
                    f"{played} episodes were played, and {len(writer.episodes)} of "
                    f"{episodes} are good. A better policy, keep='all' or more "
                    "max_attempts would help."
                )
            env.set_seed(seed + writer.rounds)
            disturb = _Disturbance(noise, env, seed + writer.rounds) if noise else None
            good: list[tuple[dict[str, Any], dict[str, Any]]] = []
            bad = 0
            for arrays, info in _round(env, policy, cameras, disturb):
                # Two rounds may draw the same seed for different scenes.
                known = info["episode_seed"] in seeds
                if known or (keep == "success" and not info.get("success")):
                    bad += 1
                    continue
                if len(writer.episodes) + len(good) < episodes:
                    told = {
                        **info,
                        "control_mode": made_with["control_mode"],
                        "instruction": instruction,
                    }
                    good.append((arrays, told))
                    seeds.add(info["episode_seed"])
            writer.add_round(good, dropped=bad)
    return Recording(
        path=writer.path,
        episodes=len(writer.episodes),
        dropped=writer.dropped,
        steps=sum(entry["elapsed_steps"] for entry in writer.episodes),
    )


def _round(
    env: EnvBase,
    policy: Callable[[TensorDictBase], Any],
    cameras: Mapping[str, str] | None,
    disturb: _Disturbance | None,
) -> list[tuple[dict[str, Any], dict[str, Any]]]:
    """One episode of each scene: arrays, and what the JSON says of them."""
    dims = env.batch_dims
    td = env.reset()
    observations = [_observed(td, dims)]
    states = [_env_states(env)]
    steps: list[dict[str, np.ndarray]] = []
    length = [0] * env.batch_size.numel()
    while not all(length):
        td = _act(policy, td, env.action_key, None)
        step = {}
        if disturb is not None:
            step["intended_actions"] = _flat(td[env.action_key], dims)
            td[env.action_key] = disturb(td[env.action_key])
        td = env.step(td)
        following = td["next"]
        step["actions"] = _flat(td[env.action_key], dims)
        for name, key in _STEP_KEYS.items():
            value = following.get(key, None)
            if value is not None:
                step[name] = _flat(value, dims)[:, 0]
        steps.append(step)
        observations.append(_observed(following, dims))
        states.append(_env_states(env))
        over = _flat(following["done"], dims)[:, 0]
        # A scene whose episode has ended moves on unrecorded until all have.
        length = [n or (len(steps) if over[i] else 0) for i, n in enumerate(length)]
        td = env.step_mdp(td)
    seeds = _flat(td["episode_seed"], dims)[:, 0]
    return [
        _episode(i, n, int(seeds[i]), observations, states, steps, cameras)
        for i, n in enumerate(length)
    ]


class _Disturbance:
    """Noise on executed actions, the same again for the same seed."""

    def __init__(self, noise: float, env: EnvBase, seed: int) -> None:
        self._generator = torch.Generator().manual_seed(seed)
        self._spec = env.action_spec
        scales = torch.rand(*env.batch_size, 1, generator=self._generator)
        self._scales = noise * scales

    def __call__(self, action: torch.Tensor) -> torch.Tensor:
        disturbance = torch.randn(action.shape, generator=self._generator)
        disturbance[..., -1] = 0.0
        disturbed = action + (self._scales * disturbance).to(action)
        projected: torch.Tensor = self._spec.project(disturbed)
        return projected


_STEP_KEYS = {
    "terminated": "terminated",
    "truncated": "truncated",
    "success": "success",
    "fail": "fail",
    "rewards": "reward",
}


def _episode(
    row: int,
    length: int,
    seed: int,
    observations: Sequence[Mapping[Any, np.ndarray]],
    states: Sequence[Sequence[Mapping[str, Any]] | None],
    steps: Sequence[Mapping[str, np.ndarray]],
    cameras: Mapping[str, str] | None,
) -> tuple[dict[str, Any], dict[str, Any]]:
    arrays: dict[str, Any] = {}
    for key in observations[0]:
        values = np.stack([obs[key][row] for obs in observations[: length + 1]])
        path, values = _place(key, values, cameras)
        _put(arrays, path, values)
    for name in steps[0]:
        arrays[name] = np.stack([step[name][row] for step in steps[:length]])
    if states[0] is not None:
        trees = [state[row] for state in states[: length + 1] if state is not None]
        arrays["env_states"] = _stack(trees)
    info: dict[str, Any] = {
        "episode_seed": seed,
        "reset_kwargs": {"seed": seed, "options": {}},
    }
    for name in ("success", "fail"):
        if name in arrays:
            info[name] = bool(arrays[name][-1])
    return arrays, info


def _observed(td: TensorDictBase, dims: int) -> dict[Any, np.ndarray]:
    found = td.get("observation")
    if isinstance(found, torch.Tensor):
        return {(): _flat(found, dims)}
    return {
        key if isinstance(key, tuple) else (key,): _flat(value, dims)
        for key, value in found.items(True, True)
    }


def _place(
    key: tuple[str, ...], values: np.ndarray, cameras: Mapping[str, str] | None
) -> tuple[tuple[str, ...], np.ndarray]:
    """Where ManiSkill keeps an entry of the observation."""
    if not key:
        return ("obs",), values
    for texture, ending in (("rgb", "image"), ("depth", "depth")):
        if len(key) == 1 and key[0].endswith(ending):
            entry = key[0].removesuffix(ending) + "image"
            camera = (cameras or {}).get(entry) or _NAMES.get(
                entry, entry.removesuffix("_image")
            )
            path = ("obs", "sensor_data", camera, texture)
            return path, np.ascontiguousarray(values.transpose(0, 2, 3, 1))
    return ("obs", *key), values


def _put(tree: dict[str, Any], path: Sequence[str], values: np.ndarray) -> None:
    for name in path[:-1]:
        tree = tree.setdefault(name, {})
    tree[path[-1]] = values


def _flat(value: torch.Tensor, dims: int) -> np.ndarray:
    """A copy with one batch dimension: simulators write into the same memory again."""
    array: np.ndarray = value.flatten(0, dims - 1).cpu().numpy().copy()
    return array


def _env_states(env: EnvBase) -> list[dict[str, Any]] | None:
    """The simulator's states by scene, where it runs in this process on the CPU."""
    while isinstance(env, TransformedEnv):
        env = env.base_env
    if not isinstance(env, ManiSkillWrapper):
        return None
    scenes = env._env
    if any(scene.num_envs > 1 for scene in scenes):
        return None
    return [scene.get_state_dict() for scene in scenes]


def _stack(trees: Sequence[Mapping[str, Any]]) -> dict[str, Any]:
    return {
        name: _stack([tree[name] for tree in trees])
        if isinstance(value, Mapping)
        else np.concatenate([np.asarray(tree[name]) for tree in trees])
        for name, value in trees[0].items()
    }
