# Copyright (c) the torchrl_rpd authors.
#
# This source code is licensed under the MIT license found in the
# LICENSE file in the root directory of this source tree.
"""Stops a run at the first number that is none, with what led to it on disk."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, Literal

import torch
from tensordict import NestedKey, TensorDictBase, unravel_key
from torch import Tensor, nn
from torchrl._utils import logger
from torchrl.trainers import Trainer

from torchrl_rpd.trainers._stateless import StatelessHook

_KEYS: tuple[NestedKey, ...] = (
    "action",
    "action_log_prob",
    ("next", "reward"),
    "teacher_action",
    "advantage",
    "value_target",
)


class NonFiniteError(RuntimeError):
    """NaN or an infinity where a run cannot go on.

    Attributes:
        path (Path): where the frames are; ``TensorDict.load_memmap(path)`` reads them.
        frames (int): how many frames the trainer had collected.

    Examples:
        >>> from pathlib import Path
        >>> from torchrl_rpd.trainers import NonFiniteError
        >>> NonFiniteError("NaN in action.", path=Path("guard"), frames=800).frames
        800
    """

    def __init__(self, message: str, *, path: Path, frames: int) -> None:
        super().__init__(message)
        self.path = path
        self.frames = frames


class NumericalGuard(StatelessHook):
    """Looks for NaN and infinities in batches and losses, and for a policy that jumps.

    A batch is looked at when it is collected and its advantages are there, before any
    update; a loss after each minibatch, before its step. At the first non-finite number
    the frames go to ``directory`` as memory-mapped tensors (no pickle) and the run stops
    with a :class:`NonFiniteError` that names entry, rows and frames: the weights are
    still those of the last good step, and so is the last checkpoint. Labels count where
    ``teacher_mask`` is True only: :class:`~torchrl_rpd.transforms.TeacherActionTransform`
    masks and counts non-finite ones itself, or raises, by its ``on_non_finite``.

    With ``on_non_finite="mask"`` a batch does not stop the run: rows in which one of the
    entries is not finite are left out of every minibatch and counted
    (``guard/masked_rows``), and the frames of the first such batch are written to
    ``directory``. A reward of NaN costs the rows of its trajectory up to there, whose
    advantages it has spoilt. A loss that is not finite without such a row is one of the
    student's own, and stops the run in any case; so does a minibatch of which no row is
    left.

    A collapse does not stop the run. It is logged (``guard/collapse``), and told as a
    warning at the first such batch in a row, when the policy has moved further from the
    rollout's than ``max_kl`` or the effective sample size is a smaller share of the
    minibatch than ``min_ess`` (means over the batch's minibatches): most of the batch then
    says nothing to PPO about this policy. Imitation does not mind.

    One look waits for the device: on a GPU it costs one synchronisation per minibatch,
    which :class:`~torchrl_rpd.trainers.TargetKLStepper` with a target has anyway.

    Args:
        directory (path): where frames are written to; made when needed.

    Keyword Args:
        keys (sequence of NestedKey, optional): float entries of the batch to look at;
            those that are not there are left out. Defaults to ``"action"``,
            ``"action_log_prob"``, ``("next", "reward")``, ``"teacher_action"``,
            ``"advantage"`` and ``"value_target"``.
        teacher_action_key (NestedKey): the label. Default: ``"teacher_action"``.
        teacher_mask_key (NestedKey): where there is one. Default: ``"teacher_mask"``.
        on_non_finite ("stop" or "mask"): what to do with a batch. Default: ``"stop"``.
        max_kl (float, optional): in nats, of the logged ``kl_k3``. Default: ``2.0``.
        min_ess (float, optional): in [0, 1], of the logged ``ESS``. Default: ``0.1``.

    Raises:
        ValueError: for limits out of range, and another ``on_non_finite``.

    Examples:
        >>> import tempfile
        >>> import torch
        >>> from tensordict import TensorDict
        >>> from torchrl_rpd.trainers import NonFiniteError, NumericalGuard
        >>> guard = NumericalGuard(tempfile.mkdtemp())
        >>> frames = TensorDict(action=torch.tensor([[1.0], [torch.nan]]), batch_size=[2])
        >>> try:
        ...     guard.check(frames, frames=800)
        ... except NonFiniteError as error:
        ...     print(str(error).split(" Its frames")[0])
        Non-finite numbers after 800 frames: action in 1 of 2 rows.
    """

    def __init__(
        self,
        directory: str | Path,
        *,
        keys: Sequence[NestedKey] | None = None,
        teacher_action_key: NestedKey = "teacher_action",
        teacher_mask_key: NestedKey = "teacher_mask",
        on_non_finite: Literal["stop", "mask"] = "stop",
        max_kl: float | None = 2.0,
        min_ess: float | None = 0.1,
    ) -> None:
        if on_non_finite not in ("stop", "mask"):
            raise ValueError(
                f"on_non_finite must be 'stop' or 'mask', got {on_non_finite!r}."
            )
        if max_kl is not None and not max_kl > 0:
            raise ValueError(f"max_kl must be positive, got {max_kl}.")
        if min_ess is not None and not 0 <= min_ess <= 1:
            raise ValueError(f"min_ess must lie in [0, 1], got {min_ess}.")
        self.directory = Path(directory)
        self.keys = [unravel_key(key) for key in (_KEYS if keys is None else keys)]
        self.teacher_action_key = unravel_key(teacher_action_key)
        self.teacher_mask_key = unravel_key(teacher_mask_key)
        self.on_non_finite = on_non_finite
        self.max_kl = max_kl
        self.min_ess = min_ess
        # Rows of the batch under way that are left out, and whether any were before.
        self._masked = 0
        self._told = False
        self._in_collapse = False

    def _bad_rows(self, batch: TensorDictBase) -> dict[NestedKey, Tensor]:
        """Which rows are not finite, bool ``[*B]`` of each entry that is there."""
        bad = {}
        for key in self.keys:
            value = batch.get(key, None)
            if not isinstance(value, Tensor) or not value.is_floating_point():
                continue
            rows = ~value.isfinite().reshape(*batch.batch_size, -1).all(-1)
            if key == self.teacher_action_key:
                mask = batch.get(self.teacher_mask_key, None)
                if mask is not None:
                    rows &= mask.reshape(batch.batch_size)
            bad[key] = rows
        return bad

    def check(self, batch: TensorDictBase, *, frames: int) -> None:
        """Looks at frames ``[*B]``.

        Raises:
            NonFiniteError: if one of the entries is not finite.
        """
        if sentence := self._found(self._bad_rows(batch), batch):
            self._stop(sentence, batch, frames)

    def _found(
        self, bad: Mapping[NestedKey, Tensor], batch: TensorDictBase
    ) -> str | None:
        """Which entries are not finite in how many rows; None if all are."""
        # One look for all of them.
        counts = torch.stack([r.sum() for r in bad.values()]).tolist() if bad else []
        found = {key: int(n) for key, n in zip(bad, counts, strict=True) if n}
        if not found:
            return None
        names = ", ".join(f"{_name(key)} in {n}" for key, n in found.items())
        return f"{names} of {batch.batch_size.numel()} rows"

    def check_losses(
        self, losses: Mapping[str, Any], minibatch: TensorDictBase, *, frames: int
    ) -> None:
        """Looks at the ``loss_*`` entries of one minibatch ``[n]``.

        Raises:
            NonFiniteError: if one of them is not finite.
        """
        named = {k: v for k, v in losses.items() if str(k).startswith("loss_")}
        finite = torch.stack([v.detach().isfinite().all() for v in named.values()])
        bad = [
            key for key, fine in zip(named, finite.tolist(), strict=True) if not fine
        ]
        if bad:
            self._stop(
                f"{', '.join(map(_name, bad))} of a minibatch", minibatch, frames
            )

    def _save(self, batch: TensorDictBase, frames: int) -> Path:
        path = self.directory / f"frames-{frames}"
        path.parent.mkdir(parents=True, exist_ok=True)
        batch.detach().cpu().memmap(str(path), copy_existing=True)
        return path

    def _stop(self, what: str, batch: TensorDictBase, frames: int) -> None:
        path = self._save(batch, frames)
        raise NonFiniteError(
            f"Non-finite numbers after {frames} frames: {what}. Its frames are in {path} "
            "(TensorDict.load_memmap); nothing was updated with them. Look for a reward, "
            "an observation or a label that is not finite, or lower the learning rate.",
            path=path,
            frames=frames,
        )

    # ------------------------------------------------------------------ in a trainer
    def _batch(self, batch: TensorDictBase) -> None:
        # The trainer counts this batch a little later.
        frames = self._trainer.collected_frames + batch.batch_size.numel()
        self._masked = 0
        bad = self._bad_rows(batch)
        sentence = self._found(bad, batch)
        if sentence is None:
            return
        if self.on_non_finite == "stop":
            self._stop(sentence, batch, frames)
        self._masked = int(torch.stack([*bad.values()]).any(0).sum())
        if not self._told:
            self._told = True
            logger.warning(
                f"Non-finite numbers after {frames} frames: {sentence}. Such rows are "
                "left out and counted (guard/masked_rows); these frames are in "
                f"{self._save(batch, frames)}."
            )

    def _leave_out(
        self, module: nn.Module, args: tuple[Any, ...]
    ) -> tuple[Any, ...] | None:
        if not self._masked:
            return None
        minibatch = args[0]
        bad = torch.stack([*self._bad_rows(minibatch).values()]).any(0)
        if bool(bad.all()):
            self._stop(
                "every row of a minibatch", minibatch, self._trainer.collected_frames
            )
        return (minibatch[~bad], *args[1:])

    def _loss(self, module: nn.Module, args: tuple[Any, ...], losses: Any) -> None:
        self.check_losses(losses, args[0], frames=self._trainer.collected_frames)

    def _log(self, batch: TensorDictBase) -> dict[str, float] | None:
        out = {"guard/collapse": 1.0} if self._collapsed() else {}
        if self._masked:
            out["guard/masked_rows"] = float(self._masked)
        return out or None

    def _collapsed(self) -> bool:
        log = self._trainer._log_dict
        kl = log["kl_k3"][-1] if log.get("kl_k3") else None
        ess = log["ESS"][-1] if log.get("ESS") else None
        signs = []
        if self.max_kl is not None and kl is not None and not kl <= self.max_kl:
            signs.append(f"KL {kl:.3g}, more than {self.max_kl:g} nats")
        if self.min_ess is not None and ess is not None and not ess >= self.min_ess:
            signs.append(
                f"effective sample size {ess:.1%}, less than {self.min_ess:.0%}"
            )
        before, self._in_collapse = self._in_collapse, bool(signs)
        if signs and not before:
            frames = self._trainer.collected_frames
            logger.warning(
                f"The policy collapsed onto few samples after {frames} frames: "
                f"{'; '.join(signs)}. That is fine as long as a high coefficient has the "
                "student imitate, and guard/collapse tells how long it lasts; after that, "
                "lower the learning rate, num_epochs or the coefficient, or use a target "
                "KL."
            )
        return bool(signs)

    def register(self, trainer: Trainer, name: str = "numerical_guard") -> None:
        """Registers at ``batch_process``, ``post_steps_log`` and the loss's forward."""
        self._trainer = trainer
        trainer.register_op("batch_process", self._batch)
        trainer.loss_module.register_forward_pre_hook(self._leave_out)
        trainer.loss_module.register_forward_hook(self._loss)
        trainer.register_op("post_steps_log", self._log)
        trainer.register_module(name, self)


def _name(key: NestedKey) -> str:
    return key if isinstance(key, str) else "/".join(key)
