# Copyright (c) the torchrl_rpd authors.
#
# This source code is licensed under the MIT license found in the
# LICENSE file in the root directory of this source tree.
"""No labels where the teacher cannot do the task."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
import torch.nn.functional as F
from tensordict import NestedKey, TensorDictBase, unravel_key
from torch import Tensor, nn
from torchrl.modules import MLP, ConvNet
from torchrl.trainers import Trainer, TrainerHookBase

# Chosen so that 256 episodes whose success depends on a half-plane of the table keep 94 %
# of the labels on the right side of it and 21 % on the other, while 91 % are kept if
# success depends on nothing that is seen (PickCube-v1, scripted teachers).
_STEPS, _ROWS, _LR, _DECAY = 400, 64, 3e-3, 0.1


class CompetenceMask(TrainerHookBase):
    """Masks labels in episodes that the teacher would hardly finish.

    A teacher may be blind for a part of the scenes. There its labels hold the student
    back for as long as the distillation term lasts, although what it has learned
    elsewhere would carry over. Where the teacher is competent is learned from episodes
    that it has done alone, the first ones of a run
    (:class:`~torchrl_rpd.transforms.JumpStartTransform` with ``whole_episodes``): once
    they are over, a small network is fitted to predict from an episode's first
    observation whether the teacher succeeds. From then on ``teacher_mask`` is cleared in
    the learner's copy of every episode for which it predicts less than ``min_ratio``
    times the teacher's mean success. Errors that are drawn anew in each episode or step
    cannot be predicted, so that almost all labels of such a teacher are kept.

    It wraps the advantage estimator, which sees each batch once before its updates, and
    belongs outside of :class:`~torchrl_rpd.trainers.OwnStepsAdvantage`, which has to
    know where the teacher acted. What is masked here was asked for, and counts as a
    query. The paper has nothing of the kind.

    Args:
        gae: writes the advantages, or an ``OwnStepsAdvantage``.

    Keyword Args:
        min_ratio (float): over 0, at most 1. Default: ``0.5``.
        network (nn.Module, optional): maps first observations ``[n, ...]`` to logits
            ``[n, 1]``; it is fitted by 400 steps of AdamW. Default: an MLP with 32 cells
            over standardised vectors, a small ConvNet over ``uint8`` pictures.
        observation_key (NestedKey): Default: ``"observation"``.
        success_key (NestedKey): bool ``[*B, T, 1]`` in ``"next"``; an episode succeeds if
            it is True at any step. Default: ``"success"``.
        done_key (NestedKey): likewise, True at an episode's end. Default: ``"done"``.
        step_count_key (NestedKey): of a :class:`~torchrl.envs.StepCounter`, 0 at an
            episode's beginning. Default: ``"step_count"``.
        teacher_episode_key (NestedKey): bool ``[*B, T, 1]``, True in the teacher's own
            episodes. Default: ``"teacher_episode"``.
        teacher_mask_key (NestedKey): bool ``[*B, T, 1]``, is cleared.
            Default: ``"teacher_mask"``.
        seed (int): of the network's weights and its minibatches; torch's global generator
            is left alone. Default: ``0``.

    Raises:
        ValueError: for a ``min_ratio`` out of range.
        KeyError: for frames without one of the entries.

    Examples:
        >>> import torch
        >>> from tensordict import TensorDict
        >>> from torchrl_rpd.trainers import CompetenceMask
        >>> # Episodes of one step. The teacher succeeds where x is positive.
        >>> x = torch.linspace(-1, 1, 64).reshape(1, 64, 1)
        >>> def frames(teachers):
        ...     flags = torch.ones(1, 64, 1, dtype=torch.bool)
        ...     return TensorDict(
        ...         observation=x,
        ...         step_count=torch.zeros(1, 64, 1, dtype=torch.int64),
        ...         teacher_episode=flags & teachers,
        ...         teacher_mask=flags.clone(),
        ...         next=TensorDict(success=x > 0, done=flags, batch_size=[1, 64]),
        ...         batch_size=[1, 64],
        ...     )
        >>> mask = CompetenceMask(lambda td: td)  # advantages play no role here
        >>> mask(frames(teachers=True))["teacher_mask"].all()  # it looks on
        tensor(True)
        >>> kept = mask(frames(teachers=False))["teacher_mask"].flatten()
        >>> kept[:16].any(), kept[-16:].all()
        (tensor(False), tensor(True))
    """

    def __init__(
        self,
        gae: Callable[[TensorDictBase], TensorDictBase],
        *,
        min_ratio: float = 0.5,
        network: nn.Module | None = None,
        observation_key: NestedKey = "observation",
        success_key: NestedKey = "success",
        done_key: NestedKey = "done",
        step_count_key: NestedKey = "step_count",
        teacher_episode_key: NestedKey = "teacher_episode",
        teacher_mask_key: NestedKey = "teacher_mask",
        seed: int = 0,
    ) -> None:
        if not 0 < min_ratio <= 1:
            raise ValueError(f"min_ratio must lie in (0, 1], got {min_ratio}.")
        self.gae = gae
        self.min_ratio = min_ratio
        self.network = network
        self.observation_key = unravel_key(observation_key)
        self.success_key = unravel_key(("next", success_key))
        self.done_key = unravel_key(("next", done_key))
        self.step_count_key = unravel_key(step_count_key)
        self.teacher_episode_key = unravel_key(teacher_episode_key)
        self.teacher_mask_key = unravel_key(teacher_mask_key)
        self.seed = seed
        #: Mean success of the teacher's own episodes; None until they are over.
        self.teacher_success: float | None = None
        # Of the rows' running episodes, and of the teacher's episodes that are over.
        self._running: dict[str, Tensor] = {}
        self._first: list[Tensor] = []
        self._succeeded: list[bool] = []
        # Two of the observations that the network was fitted to: their shape and type.
        self._like: Tensor | None = None
        self._share = 1.0

    def __call__(self, tensordict: TensorDictBase) -> TensorDictBase:
        """Writes the advantages of ``[*B, T]`` frames and masks labels."""
        tensordict = self.gae(tensordict)
        keys = (
            self.observation_key,
            self.step_count_key,
            self.teacher_episode_key,
            self.teacher_mask_key,
            self.success_key,
            self.done_key,
        )
        found = [tensordict.get(key, None) for key in keys]
        missing = [key for key, value in zip(keys, found, strict=True) if value is None]
        if missing:
            raise KeyError(
                f"CompetenceMask finds no {missing} in the frames: have a StepCounter, a "
                "JumpStartTransform and a TeacherActionTransform in the collector's env."
            )
        steps = tensordict.batch_size[-1]
        observation = found[0].reshape(-1, steps, *found[0].shape[tensordict.ndim :])
        begins, teachers, mask, success, done = (
            value.reshape(-1, steps) for value in (found[1] == 0, *found[2:])
        )
        if self.teacher_success is None:
            self._look_on(observation, begins, teachers, success, done)
            if self._first and not bool(teachers.any()):
                self._fit()
        keep = self._kept(observation, begins)
        mask = (mask & keep).reshape(found[3].shape)
        self._share = float(keep.to(torch.float32).mean())
        return tensordict.set(self.teacher_mask_key, mask)

    # ------------------------------------------------------------------ learning
    def _look_on(
        self,
        observation: Tensor,
        begins: Tensor,
        teachers: Tensor,
        success: Tensor,
        done: Tensor,
    ) -> None:
        """Takes first observation and outcome of the teacher's episodes that end here."""
        if not self._running:
            self._running = {
                "first": torch.zeros_like(observation[:, 0]),
                "succeeded": torch.zeros_like(done[:, 0]),
            }
        first, succeeded = self._running["first"], self._running["succeeded"]
        for step in range(done.shape[1]):
            new = begins[:, step]
            first[new] = observation[new, step]
            succeeded = (succeeded & ~new) | success[:, step]
            for row in (done[:, step] & teachers[:, step]).nonzero().flatten().tolist():
                self._first.append(first[row].cpu().clone())
                self._succeeded.append(bool(succeeded[row]))
        self._running = {"first": first, "succeeded": succeeded}

    def _fit(self) -> None:
        """Learns which of the teacher's episodes succeeded."""
        first = torch.stack(self._first)
        succeeded = torch.tensor(self._succeeded, dtype=torch.float32)
        self.teacher_success = float(succeeded.mean())
        self._like = first[:2]
        with torch.random.fork_rng(devices=[]), torch.enable_grad():
            torch.manual_seed(self.seed)
            network = self._fitted(first)
            adam = torch.optim.AdamW(network.parameters(), lr=_LR, weight_decay=_DECAY)
            for _ in range(_STEPS):
                rows = torch.randint(len(first), (_ROWS,))
                loss = F.binary_cross_entropy_with_logits(
                    network(first[rows]).squeeze(-1), succeeded[rows]
                )
                adam.zero_grad()
                loss.backward()
                adam.step()
        self._first, self._succeeded = [], []

    def _fitted(self, first: Tensor | None = None) -> nn.Module:
        """The network; built for such observations if there is none."""
        if self.network is None:
            rows = self._like if first is None else first
            assert rows is not None
            self.network = _default_network(rows)
        return self.network

    # ------------------------------------------------------------------ masking
    def _kept(self, observation: Tensor, begins: Tensor) -> Tensor:
        """Bool ``[n, T]``: does the frame belong to an episode that keeps its labels?"""
        rows, steps = begins.shape
        keep = torch.ones_like(begins)
        if self.teacher_success is None:
            return keep
        running = self._running.get("keep", keep[:, 0])
        where = begins.nonzero()
        if len(where):
            first = observation[where[:, 0], where[:, 1]].cpu()
            with torch.no_grad():
                chance = self._fitted()(first).squeeze(-1).sigmoid()
            competent = chance >= self.min_ratio * self.teacher_success
            keep[where[:, 0], where[:, 1]] = competent.to(keep.device)
        # Each frame's episode began at the last beginning up to it, or before the batch.
        index = torch.arange(steps, device=begins.device).expand(rows, steps)
        last = torch.where(begins, index, -1).cummax(-1).values
        keep = torch.where(
            last < 0, running.unsqueeze(-1), keep.gather(-1, last.clamp_min(0))
        )
        self._running = {"keep": keep[:, -1].clone()}
        return keep

    # ------------------------------------------------------------------ in a trainer
    def log(self, batch: TensorDictBase) -> dict[str, float]:
        """The share of the last batch's frames that keep their labels."""
        return {"train/competent": self._share}

    def register(self, trainer: Trainer, name: str = "competence_mask") -> None:
        """Registers the metric, and what it has learned for checkpoints."""
        trainer.register_op("pre_steps_log", self.log)
        trainer.register_module(name, self)

    def state_dict(self) -> dict[str, Any]:
        """The teacher's episodes so far, then the fitted network."""
        return {
            "teacher_success": self.teacher_success,
            "network": None if self._like is None else self._fitted().state_dict(),
            "like": self._like,
            "running": dict(self._running),
            "first": list(self._first),
            "succeeded": list(self._succeeded),
        }

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Takes over what :meth:`state_dict` returned."""
        self.teacher_success = state_dict["teacher_success"]
        self._like = state_dict["like"]
        if self._like is not None:
            with torch.random.fork_rng(devices=[]):
                self._fitted().load_state_dict(state_dict["network"])
        self._running = dict(state_dict["running"])
        self._first = list(state_dict["first"])
        self._succeeded = list(state_dict["succeeded"])


def _default_network(first: Tensor) -> nn.Module:
    if first.ndim == 2:
        return nn.Sequential(
            _Standardise(first),
            MLP(first.shape[-1], 1, num_cells=[32], activation_class=nn.Tanh),
        )
    if first.ndim == 4 and first.dtype == torch.uint8:
        convolutions = ConvNet(
            first.shape[1],
            num_cells=[16, 32, 32],
            kernel_sizes=[8, 4, 3],
            strides=[4, 2, 1],
        )
        features = convolutions(torch.zeros(1, *first.shape[1:])).shape[-1]
        return nn.Sequential(_Scale(), convolutions, nn.Linear(features, 1))
    raise ValueError(
        f"CompetenceMask has no network for observations of {tuple(first.shape[1:])}, "
        f"{first.dtype}: pass network=."
    )


class _Standardise(nn.Module):
    """Mean 0 and standard deviation 1; what hardly varies at all stays small."""

    mean: Tensor
    scale: Tensor

    def __init__(self, rows: Tensor) -> None:
        super().__init__()
        self.register_buffer("mean", rows.mean(0))
        self.register_buffer("scale", rows.std(0) + 1e-2)

    def forward(self, x: Tensor) -> Tensor:
        return ((x - self.mean) / self.scale).clamp(-5, 5)


class _Scale(nn.Module):
    """Bytes to numbers in [0, 1]."""

    def forward(self, x: Tensor) -> Tensor:
        return x.to(torch.float32) / 255
