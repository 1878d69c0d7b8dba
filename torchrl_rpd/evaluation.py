# Copyright (c) the torchrl_rpd authors.
#
# This source code is licensed under the MIT license found in the
# LICENSE file in the root directory of this source tree.
"""The evaluation protocol: whole episodes, a fixed quota per environment."""

from __future__ import annotations

import math
import time
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any

import torch
from tensordict import NestedKey, TensorDictBase
from torchrl.data.vla import ACTION_CHUNK_KEY
from torchrl.envs import EnvBase, TransformedEnv
from torchrl.envs.utils import ExplorationType, set_exploration_type

from torchrl_rpd.transforms import TeacherActionTransform

# Two-sided 95 % of the normal distribution.
_Z = 1.959963984540054


@dataclass(frozen=True)
class Estimate:
    """A mean over episodes with its 95 % interval.

    Examples:
        >>> from torchrl_rpd.evaluation import Estimate
        >>> print(Estimate.of_share(45, 50))
        0.900 [0.786, 0.957] (n=50)
    """

    mean: float
    low: float
    high: float
    n: int

    @staticmethod
    def of_share(hits: int, n: int) -> Estimate:
        """Wilson's score interval of ``hits`` successes in ``n`` episodes."""
        if not 0 <= hits <= n or n < 1:
            raise ValueError(f"Expected 0 <= hits <= n and n >= 1, got {hits} of {n}.")
        share = hits / n
        centre = (share + _Z**2 / (2 * n)) / (1 + _Z**2 / n)
        half = (
            _Z
            / (1 + _Z**2 / n)
            * math.sqrt(share * (1 - share) / n + _Z**2 / (4 * n**2))
        )
        return Estimate(share, max(0.0, centre - half), min(1.0, centre + half), n)

    @staticmethod
    def of_mean(values: torch.Tensor) -> Estimate:
        """Mean of ``[n]`` values, and the normal interval of the mean."""
        values = values.double()
        n = values.numel()
        mean = values.mean().item()
        half = _Z * values.std().item() / math.sqrt(n) if n > 1 else math.inf
        return Estimate(mean, mean - half, mean + half, n)

    def __str__(self) -> str:
        return f"{self.mean:.3f} [{self.low:.3f}, {self.high:.3f}] (n={self.n})"


@dataclass(frozen=True)
class EvaluationResult:
    """What :func:`evaluate` measured; the tensors hold one row per episode.

    Attributes:
        success_once: share of episodes with success at any step.
        success_at_end: share of episodes with success at their last step.
        episode_return: sum of the rewards, undiscounted.
        length: control steps per episode.
        episodes: per-episode tensors ``success_once``, ``success_at_end`` (bool),
            ``episode_return`` (float64), ``length`` (int64), ``env`` (int64, which
            environment played it) and, where the environment reports it,
            ``episode_seed`` (int64): all of shape ``[n]``.
        seeds: the seed that the environment was given.
        seconds: wall-clock time.

    Examples:
        >>> from torchrl_rpd.envs import ManiSkillEnv
        >>> from torchrl_rpd.evaluation import evaluate
        >>> env = ManiSkillEnv("PushCube-v1", num_envs=2, max_episode_steps=3)
        >>> idle = lambda td: env.full_action_spec["action"].zero()
        >>> result = evaluate(env, idle, episodes=4, seeds=7)
        >>> result.length.mean, result.success_once.n
        (3.0, 4)
        >>> result.episodes["episode_seed"][0]  # environment 0 starts with the seed
        tensor(7)
    """

    success_once: Estimate
    success_at_end: Estimate
    episode_return: Estimate
    length: Estimate
    episodes: dict[str, torch.Tensor] = field(repr=False)
    seeds: int | None
    seconds: float

    @staticmethod
    def from_dict(values: Mapping[str, Any]) -> EvaluationResult:
        """The inverse of :func:`dataclasses.asdict`, for checkpoints."""
        given: dict[str, Any] = {
            name: Estimate(**value) if isinstance(value, Mapping) else value
            for name, value in values.items()
            if name != "episodes"
        }
        return EvaluationResult(**{**given, "episodes": dict(values["episodes"])})

    def __str__(self) -> str:
        return (
            f"success_once {self.success_once}, success_at_end {self.success_at_end}, "
            f"return {self.episode_return}, length {self.length}"
        )


def quotas(episodes: int, num_envs: int) -> torch.Tensor:
    """How many episodes each environment plays: fixed before the first step.

    Examples:
        >>> from torchrl_rpd.evaluation import quotas
        >>> quotas(10, 4)
        tensor([3, 3, 2, 2])
    """
    quota = torch.full((num_envs,), episodes // num_envs, dtype=torch.int64)
    quota[: episodes % num_envs] += 1
    return quota


@contextmanager
def _teachers_off(env: EnvBase) -> Iterator[None]:
    """Switches the teacher transforms of ``env`` off: an evaluation asks no teacher."""
    found = []
    layer: Any = env
    while isinstance(layer, TransformedEnv):
        transform = layer.transform
        parts = [transform] if not hasattr(transform, "transforms") else transform
        found += [t for t in parts if isinstance(t, TeacherActionTransform)]
        layer = layer.base_env
    before = [t.enabled for t in found]
    for t in found:
        t.enabled = False
    try:
        yield
    finally:
        for t, enabled in zip(found, before, strict=True):
            t.enabled = enabled


def _act(
    policy: Callable[[TensorDictBase], Any],
    td: TensorDictBase,
    action_key: NestedKey,
    action_transform: Callable[[torch.Tensor], torch.Tensor] | None,
) -> TensorDictBase:
    # The last action is still there: without it, what is found is what was written.
    td = td.exclude(action_key, ACTION_CHUNK_KEY)
    out = policy(td)
    if isinstance(out, torch.Tensor):
        action = out
    else:
        td = td if out is None else out
        action = td.get(action_key, None)
        if action is None:
            chunk = td.get(ACTION_CHUNK_KEY, None)
            if chunk is None:
                raise KeyError(
                    f"The policy wrote neither {action_key!r} nor {ACTION_CHUNK_KEY!r}; "
                    f"the tensordict holds {sorted(map(str, td.keys(True, True)))}."
                )
            action = chunk[..., 0, :]
    if action_transform is not None:
        action = action_transform(action)
    return td.set(action_key, action)


@torch.no_grad()
def evaluate(
    env: EnvBase,
    policy: Callable[[TensorDictBase], Any],
    *,
    episodes: int = 200,
    seeds: int | None = 0,
    success_key: NestedKey = "success",
    max_steps: int = 100_000,
    action_transform: Callable[[torch.Tensor], torch.Tensor] | None = None,
) -> EvaluationResult:
    """Plays whole episodes with a deterministic policy and counts.

    Each environment of the batch plays a number of episodes that is fixed beforehand.
    Keeping the first episodes to finish instead would over-count the short ones, which
    are the successes: with a true rate of 0.50 that has been seen to report 0.81.

    The policy acts with ``ExplorationType.DETERMINISTIC``. A teacher that the environment
    carries in a :class:`~torchrl_rpd.transforms.TeacherActionTransform` is switched off
    for the time of the evaluation.

    Args:
        env (EnvBase): a batched environment of any batch size; it is left in the middle
            of an episode, so keep one of its own for evaluations.
        policy: a TensorDict module that writes the action, a teacher that writes
            ``("vla_action", "chunk")`` (its first action is taken), or a callable
            ``tensordict -> action``.

    Keyword Args:
        episodes (int): how many in all. Default: ``200``.
        seeds (int, optional): given to ``env.set_seed``, so that the same environment
            and number play the same episodes again. ``None`` leaves the streams where
            they are. Default: ``0``.
        success_key (NestedKey): where the environment reports success, bool
            ``[*B, 1]``. Default: ``"success"``.
        max_steps (int): bound of the steps of the whole evaluation. Default: ``100_000``.
        action_transform (callable, optional): maps the policy's actions ``[*B, A]`` to
            the environment's, as in
            :class:`~torchrl_rpd.transforms.TeacherActionTransform`. Default: none.

    Returns:
        an :class:`EvaluationResult`.

    Raises:
        KeyError: if the environment writes no ``success_key``.
        RuntimeError: if the episodes do not end within ``max_steps``.

    Examples:
        >>> from torchrl_rpd.envs import ManiSkillEnv
        >>> from torchrl_rpd.evaluation import evaluate
        >>> from torchrl_rpd.teachers import ScriptedTeacher
        >>> env = ManiSkillEnv("PushCube-v1", num_envs=2, fast_controller=True)
        >>> result = evaluate(env, ScriptedTeacher("PushCube-v1"), episodes=4)
        >>> result.success_once.mean
        1.0
    """
    if episodes < 1:
        raise ValueError(f"episodes must be at least 1, got {episodes}.")
    start = time.perf_counter()
    num_envs = max(1, env.batch_size.numel())
    todo = quotas(episodes, num_envs)
    played = torch.zeros_like(todo)
    total = torch.zeros(num_envs, dtype=torch.float64)
    length = torch.zeros(num_envs, dtype=torch.int64)
    once = torch.zeros(num_envs, dtype=torch.bool)
    records: list[dict[str, torch.Tensor]] = []
    with _teachers_off(env), set_exploration_type(ExplorationType.DETERMINISTIC):
        if seeds is not None:
            env.set_seed(seeds)
        td = env.reset()
        for _ in range(max_steps):
            td = _act(policy, td, env.action_key, action_transform)
            td, following = env.step_and_maybe_reset(td)
            after = td.get("next")
            success = after.get(success_key, None)
            if success is None:
                raise KeyError(
                    f"The environment writes no {success_key!r}. Name the key that "
                    "reports success with success_key=..."
                )
            success = success.reshape(-1).cpu()
            total += after.get(env.reward_key).reshape(-1).double().cpu()
            length += 1
            once |= success
            done = after.get("done").reshape(-1).cpu()
            counted = done & (played < todo)
            if counted.any():
                record = {
                    "success_once": once[counted],
                    "success_at_end": success[counted],
                    "episode_return": total[counted],
                    "length": length[counted],
                    "env": counted.nonzero().squeeze(-1),
                }
                seed = after.get("episode_seed", None)
                if seed is not None:
                    record["episode_seed"] = seed.reshape(-1).cpu()[counted]
                records.append(record)
                played += counted
            total[done], length[done], once[done] = 0, 0, False
            td = following
            if (played >= todo).all():
                break
        else:
            raise RuntimeError(
                f"{int(played.sum())} of {episodes} episodes ended within {max_steps} "
                "steps. Does the environment have a time limit (StepCounter)?"
            )
    rows = {key: torch.cat([r[key] for r in records]) for key in records[0]}
    return EvaluationResult(
        success_once=Estimate.of_share(int(rows["success_once"].sum()), episodes),
        success_at_end=Estimate.of_share(int(rows["success_at_end"].sum()), episodes),
        episode_return=Estimate.of_mean(rows["episode_return"]),
        length=Estimate.of_mean(rows["length"]),
        episodes=rows,
        seeds=seeds,
        seconds=time.perf_counter() - start,
    )
