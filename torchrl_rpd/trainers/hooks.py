# Copyright (c) the torchrl_rpd authors.
#
# This source code is licensed under the MIT license found in the
# LICENSE file in the root directory of this source tree.
"""Hooks that log, evaluate and keep the student's observation statistics."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import asdict
from typing import Any

from tensordict import NestedKey, TensorDict, TensorDictBase
from torchrl.envs import EnvBase
from torchrl.trainers import Trainer, TrainerHookBase

from torchrl_rpd.evaluation import EvaluationResult, evaluate
from torchrl_rpd.students import RunningObservationNorm
from torchrl_rpd.trainers._stateless import StatelessHook
from torchrl_rpd.transforms import TeacherActionTransform


class LogEpisodes(StatelessHook):
    """Logs the success rate and length of the episodes that end in each batch.

    Writes ``train/success_rate`` and ``train/episodes``, and ``train/episode_length``
    where the environment counts steps (:class:`~torchrl.envs.StepCounter`). The actions
    are sampled: a deterministic policy is measured by :class:`EvaluationHook`.

    Keyword Args:
        success_key (NestedKey): bool ``[*B, T, 1]`` under ``"next"``. Default:
            ``"success"``.
        length_key (NestedKey): step count under ``"next"``. Default: ``"step_count"``.

    Examples:
        >>> import torch
        >>> from tensordict import TensorDict
        >>> from torchrl_rpd.trainers import LogEpisodes
        >>> after = {"done": torch.tensor([[[0], [1], [1]]]).bool(),
        ...          "success": torch.tensor([[[0], [1], [0]]]).bool()}
        >>> batch = TensorDict({"next": after}, batch_size=[1, 3])
        >>> LogEpisodes().success_rate(batch)["train/success_rate"]
        0.5
        >>> LogEpisodes()(batch)
        {'train/episodes': 2}
    """

    def __init__(
        self,
        *,
        success_key: NestedKey = "success",
        length_key: NestedKey = "step_count",
    ) -> None:
        self.success_key = success_key
        self.length_key = length_key

    def __call__(self, batch: TensorDictBase) -> dict[str, Any]:
        """Counts the episodes that end in ``[*B, T]`` frames, and their mean length."""
        after = batch.get("next")
        done = after.get("done")
        out: dict[str, Any] = {"train/episodes": int(done.sum())}
        length = after.get(self.length_key, None)
        if out["train/episodes"] and length is not None:
            out["train/episode_length"] = length[done].double().mean().item()
        return out

    def success_rate(self, batch: TensorDictBase) -> dict[str, Any] | None:
        """Share of successes among the episodes that end in ``[*B, T]`` frames."""
        after = batch.get("next")
        done = after.get("done")
        if not done.any():
            return None
        success = after.get(self.success_key)[done].double().mean().item()
        return {"train/success_rate": success, "log_pbar": True}

    def register(self, trainer: Trainer, name: str = "log_episodes") -> None:
        """Registers at ``pre_steps_log``; the progress bar shows the success rate."""
        # Two operations, since what one returns is shown on the bar as a whole.
        trainer.register_op("pre_steps_log", self)
        trainer.register_op("pre_steps_log", self.success_rate)
        trainer.register_module(name, self)


class LogTeacher(StatelessHook):
    """Logs the teacher's work so far: ``teacher/<counter>`` of the transform's stats.

    Args:
        transform (TeacherActionTransform): whose counters are read.

    Examples:
        >>> import torch
        >>> from torchrl_rpd.trainers import LogTeacher
        >>> from torchrl_rpd.transforms import TeacherActionTransform
        >>> transform = TeacherActionTransform(lambda td: torch.zeros(td.numel(), 7))
        >>> LogTeacher(transform)(None)["teacher/queries"]
        0
    """

    def __init__(self, transform: TeacherActionTransform) -> None:
        self.transform = transform

    def __call__(self, batch: TensorDictBase | None) -> dict[str, Any]:
        """Reads the counters; the batch is not used."""
        return {f"teacher/{k}": v for k, v in self.transform.stats().items()}

    def register(self, trainer: Trainer, name: str = "log_teacher") -> None:
        """Registers at ``pre_steps_log``."""
        trainer.register_op("pre_steps_log", self)
        trainer.register_module(name, self)


class EvaluationHook(TrainerHookBase):
    """Evaluates the student every ``interval`` frames, by :func:`evaluate`.

    The stock ``LogValidationReward`` closes its environment after the first evaluation
    and samples the actions; this hook does neither. Logs ``eval/success_once``,
    ``eval/success_at_end``, ``eval/return`` and ``eval/length``.

    Args:
        env (EnvBase): an environment of its own, not the collector's.
        policy: what is evaluated.

    Keyword Args:
        interval (int): frames between two evaluations; at least one batch.
        episodes (int): per evaluation. Default: ``50``.
        seeds (int): of every evaluation: all see the same episodes. Default: ``0``.

    Attributes:
        history: ``(frames, EvaluationResult)`` of each evaluation.

    Examples:
        >>> from torchrl_rpd.envs import ManiSkillEnv
        >>> from torchrl_rpd.students import mlp_actor_critic
        >>> from torchrl_rpd.trainers import EvaluationHook
        >>> env = ManiSkillEnv("PushCube-v1", max_episode_steps=3)
        >>> hook = EvaluationHook(
        ...     env, mlp_actor_critic(35, 7).actor, interval=10_000, episodes=1
        ... )
        >>> hook.run(frames=0).length.mean
        3.0
    """

    def __init__(
        self,
        env: EnvBase,
        policy: Callable[[TensorDictBase], Any],
        *,
        interval: int,
        episodes: int = 50,
        seeds: int = 0,
    ) -> None:
        if interval < 1:
            raise ValueError(f"interval is at least 1 frame, got {interval}.")
        self.env = env
        self.policy = policy
        self.interval = interval
        self.episodes = episodes
        self.seeds = seeds
        self.history: list[tuple[int, EvaluationResult]] = []
        self._next = interval

    def run(self, frames: int) -> EvaluationResult:
        """Evaluates now and keeps the result in :attr:`history`."""
        result = evaluate(
            self.env, self.policy, episodes=self.episodes, seeds=self.seeds
        )
        self.history.append((frames, result))
        return result

    def __call__(self, batch: TensorDictBase) -> dict[str, Any] | None:
        """Evaluates when it is due."""
        frames = self._trainer.collected_frames
        if frames < self._next:
            return None
        self._next = (frames // self.interval + 1) * self.interval
        success = self.run(frames).success_once.mean
        return {"eval/success_once": success, "log_pbar": True}

    def _details(self, batch: TensorDictBase) -> dict[str, Any] | None:
        """What the progress bar does not show of the evaluation that was just made."""
        if not self.history or self.history[-1][0] != self._trainer.collected_frames:
            return None
        result = self.history[-1][1]
        return {
            "eval/success_at_end": result.success_at_end.mean,
            "eval/return": result.episode_return.mean,
            "eval/length": result.length.mean,
        }

    def register(self, trainer: Trainer, name: str = "evaluation") -> None:
        """Registers at ``post_steps_log``."""
        self._trainer = trainer
        trainer.register_op("post_steps_log", self)
        trainer.register_op("post_steps_log", self._details)
        trainer.register_module(name, self)

    def state_dict(self) -> dict[str, Any]:
        """When the next evaluation is due, those so far, and the environment's state."""
        return {
            "next": self._next,
            "history": [(frames, asdict(result)) for frames, result in self.history],
            "env": dict(self.env.state_dict()),
        }

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Restores :meth:`state_dict`."""
        self._next = state_dict["next"]
        self.history = [
            (frames, EvaluationResult.from_dict(result))
            for frames, result in state_dict["history"]
        ]
        # ManiSkill's simulations are rebuilt: the evaluation of a resumed run is that of
        # one that was never interrupted.
        self.env.load_state_dict(state_dict["env"])


class ObservationNormUpdate(StatelessHook):
    """Adds each batch to the student's observation statistics, after its updates.

    Not before: the log-probabilities of the batch were taken with the statistics of its
    collection, and the updates must see the same network input.

    Args:
        norm (RunningObservationNorm): the student's statistics.

    Keyword Args:
        observation_key (NestedKey): Default: ``"observation"``.

    Examples:
        >>> import torch
        >>> from tensordict import TensorDict
        >>> from torchrl_rpd.students import RunningObservationNorm
        >>> from torchrl_rpd.trainers import ObservationNormUpdate
        >>> norm = RunningObservationNorm(2)
        >>> ObservationNormUpdate(norm)(
        ...     TensorDict(observation=torch.ones(4, 2), batch_size=[4])
        ... )
        >>> norm.mean
        tensor([1., 1.])
    """

    def __init__(
        self,
        norm: RunningObservationNorm,
        *,
        observation_key: NestedKey = "observation",
    ) -> None:
        self.norm = norm
        self.observation_key = observation_key
        self._trainer: Trainer | None = None

    def __call__(self, batch: TensorDictBase) -> None:
        """Adds the frames of the batch."""
        self.norm.update(batch.get(self.observation_key))
        if self._trainer is not None:
            # The trainer has sent the weights to the collector before this hook runs.
            self._trainer.collector.update_policy_weights_(
                TensorDict.from_module(self._trainer.loss_module.actor_network)
            )

    def register(self, trainer: Trainer, name: str = "observation_norm") -> None:
        """Registers at ``post_steps_log``, which runs after the updates."""
        self._trainer = trainer
        trainer.register_op("post_steps_log", self)
        trainer.register_module(name, self)
