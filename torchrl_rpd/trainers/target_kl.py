# Copyright (c) the torchrl_rpd authors.
#
# This source code is licensed under the MIT license found in the
# LICENSE file in the root directory of this source tree.
"""Target KL: what happens to a minibatch when the policy has moved far enough."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Iterator, Sequence
from typing import Any, Literal

import torch
from tensordict import TensorDict, TensorDictBase
from torchrl.trainers import DefaultOptimizationStepper, Trainer

KLRule = Literal["stop", "distill_only", "adaptive_lr"]

_PPO_TERMS = ("loss_objective", "loss_entropy")


class TargetKLStepper(DefaultOptimizationStepper):
    """Optimisation step that watches the KL between rollout policy and current policy.

    The loss reports ``kl_k3``, the estimate ``mean((r - 1) - log r)`` over the minibatch
    that the released code compares with its ``target_kl``. In RPD the distillation term
    moves the policy by itself, so the rule decides how much of PPO is left:

    - ``"stop"`` (the released code): a minibatch over the target ends the updates of
      this batch, before its own step. Early in training distillation takes the policy
      over the target within a few minibatches, and most updates are not made.
    - ``"distill_only"``: over the target, the policy term and the entropy are left out
      of that minibatch; distillation and critic go on. Early on, the student is then an
      imitator.
    - ``"adaptive_lr"``: both terms stay in every minibatch, and the learning rate keeps
      the KL near the target instead: divided by 1.5 when the KL is over twice the
      target, multiplied by 1.5 (never over where it started) when it is under half of it.
      This is the schedule of rsl_rl's PPO, per minibatch.

    Logged after each batch: means over **all** minibatches of the loss's scalars
    (TorchRL's trainer logs the last epoch's only), ``ppo_active`` and ``distill_active``
    (shares of the planned minibatches in which a term took part), ``optim_steps`` and
    ``lr``.

    Args:
        target_kl (float, optional): in nats. ``None`` never interferes.

    Keyword Args:
        rule (str): one of the above. Default: ``"stop"``.
        min_lr (float): lower bound for ``"adaptive_lr"``. Default: ``1e-5``.
        anneal_from (float, optional): share of the trainer's ``total_frames``, in
            [0, 1), from which the upper bound of the learning rate falls linearly, to 0
            at the end: the last updates settle instead of moving the student about.
            Default: never.
        loss_components (sequence of str, optional): the loss entries that count.
            ``["loss_distill"]`` is imitation alone. Default: all ``"loss_*"``.

    Examples:
        >>> from torchrl_rpd.trainers import TargetKLStepper
        >>> TargetKLStepper(0.2, rule="distill_only").rule
        'distill_only'
        >>> TargetKLStepper(0.2, rule="never")
        Traceback (most recent call last):
            ...
        ValueError: rule is 'stop', 'distill_only' or 'adaptive_lr', got 'never'.
    """

    def __init__(
        self,
        target_kl: float | None,
        *,
        rule: KLRule = "stop",
        min_lr: float = 1e-5,
        anneal_from: float | None = None,
        loss_components: Sequence[str] | None = None,
    ) -> None:
        super().__init__(loss_components)
        if rule not in ("stop", "distill_only", "adaptive_lr"):
            raise ValueError(
                f"rule is 'stop', 'distill_only' or 'adaptive_lr', got {rule!r}."
            )
        if target_kl is not None and target_kl <= 0:
            raise ValueError(f"target_kl is positive, got {target_kl}.")
        if anneal_from is not None and not 0 <= anneal_from < 1:
            raise ValueError(f"anneal_from lies in [0, 1), got {anneal_from}.")
        self.target_kl = target_kl
        self.anneal_from = anneal_from
        self.rule = rule
        self.min_lr = min_lr
        self.stopped = False
        self._max_lrs: list[float] | None = None
        self._clear()

    def _clear(self) -> None:
        self._sums: dict[str, Any] = defaultdict(float)
        self._seen = self._steps = self._ppo = 0

    def begin(self) -> None:
        """Starts a new batch."""
        self.stopped = False
        self._clear()

    def step(self, trainer: Trainer, sub_batch: TensorDictBase) -> TensorDictBase:
        """One minibatch: loss, rule, backward, clipping, optimiser."""
        losses = trainer.compute_loss(sub_batch)
        self._seen += 1
        for key, value in losses.items():
            if value.numel() == 1:
                self._sums[key] = self._sums[key] + value.detach()
        ppo = self._counts("loss_objective")
        if self.target_kl is not None:
            kl = float(losses["kl_k3"])
            over = kl > self.target_kl
            if over and self.rule == "stop":
                self.stopped = True
                return TensorDict({}, [])
            ppo = ppo and not (over and self.rule == "distill_only")
            if self.rule == "adaptive_lr":
                self._adapt(trainer.optimizer, kl)
        if self.anneal_from is not None:
            self._anneal(
                trainer.optimizer, trainer.collected_frames / trainer.total_frames
            )
        loss = sum(
            value
            for key, value in losses.items()
            if self._counts(key) and (ppo or key not in _PPO_TERMS)
        )
        loss.backward()
        grad_norm = self._compute_and_clip_grad_norm(
            trainer.optimizer, trainer.clip_grad_norm, trainer.clip_norm
        )
        trainer.optimizer.step()
        trainer.optimizer.zero_grad()
        self._sums["grad_norm"] = self._sums["grad_norm"] + grad_norm
        self._steps += 1
        self._ppo += ppo
        return losses.detach()

    def _counts(self, key: str) -> bool:
        if self.loss_components is not None:
            return key in self.loss_components
        return key.startswith("loss_")

    def _bounds(
        self, optimizer: torch.optim.Optimizer
    ) -> Iterator[tuple[dict[str, Any], float]]:
        groups = optimizer.param_groups
        if self._max_lrs is None:
            self._max_lrs = [group["lr"] for group in groups]
        return zip(groups, self._max_lrs, strict=True)

    def _anneal(self, optimizer: torch.optim.Optimizer, progress: float) -> None:
        assert self.anneal_from is not None
        left = min(1.0, max(0.0, (1 - progress) / (1 - self.anneal_from)))
        for group, max_lr in self._bounds(optimizer):
            bound = left * max_lr
            adapts = self.target_kl is not None and self.rule == "adaptive_lr"
            group["lr"] = min(group["lr"], bound) if adapts else bound

    def _adapt(self, optimizer: torch.optim.Optimizer, kl: float) -> None:
        assert self.target_kl is not None
        for group, max_lr in self._bounds(optimizer):
            if kl > 2 * self.target_kl:
                group["lr"] = max(group["lr"] / 1.5, self.min_lr)
            elif kl < self.target_kl / 2:
                group["lr"] = min(group["lr"] * 1.5, max_lr)

    def summary(self, planned: int) -> dict[str, float]:
        """What happened in this batch, out of ``planned`` minibatches."""
        if not self._seen:
            return {}
        out = {key: float(value) / self._seen for key, value in self._sums.items()}
        out["ppo_active"] = self._ppo / planned
        out["distill_active"] = self._steps / planned
        out["optim_steps"] = float(self._steps)
        return out

    def state_dict(self) -> dict[str, Any]:
        """The learning rates at the start, which bound the later ones."""
        return {"max_lrs": self._max_lrs}

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Restores :meth:`state_dict`."""
        self._max_lrs = state_dict["max_lrs"]
