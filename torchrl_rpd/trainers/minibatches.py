# Copyright (c) the torchrl_rpd authors.
#
# This source code is licensed under the MIT license found in the
# LICENSE file in the root directory of this source tree.
"""GAE once per batch, and the minibatches of its epochs."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence

from tensordict import NestedKey, TensorDictBase
from torchrl.data import (
    SamplerWithoutReplacement,
    TensorDictReplayBuffer,
    TensorStorage,
)
from torchrl.trainers import Trainer

from torchrl_rpd.trainers._stateless import StatelessHook
from torchrl_rpd.trainers.target_kl import TargetKLStepper


class OnPolicyMinibatches(StatelessHook):
    """Prepares each collected batch for its epochs.

    The advantages are computed once per batch, with the critic that saw the rollout; the
    stock trainer does it again in every epoch, and copies the batch to the CPU each time.
    Here the minibatches are drawn from the batch itself, where it lies: nothing but a
    minibatch is copied. Each epoch is one permutation of the whole batch.

    Args:
        gae: writes the advantage, e.g. :class:`~torchrl_rpd.objectives.FiniteHorizonGAE`.
        minibatch_size (int): rows per minibatch; the last one of an epoch holds the rest.

    Keyword Args:
        drop_keys (sequence of NestedKey): entries that the loss does not read, left out
            of the minibatches, e.g. the ``"next"`` images.
            Default: ``()``.
        stepper (TargetKLStepper, optional): when it has stopped, the epochs end.

    Examples:
        >>> import torch
        >>> from tensordict import TensorDict
        >>> from torchrl_rpd.trainers import OnPolicyMinibatches
        >>> data = OnPolicyMinibatches(lambda td: td, 4)
        >>> frames = TensorDict(x=torch.arange(10).reshape(2, 5), batch_size=[2, 5])
        >>> batch = data.prepare(frames)
        >>> [data.sample(batch).numel() for _ in range(3)]
        [4, 4, 2]
    """

    def __init__(
        self,
        gae: Callable[[TensorDictBase], TensorDictBase],
        minibatch_size: int,
        *,
        drop_keys: Sequence[NestedKey] = (),
        stepper: TargetKLStepper | None = None,
    ) -> None:
        if minibatch_size < 1:
            raise ValueError(f"minibatch_size is at least 1, got {minibatch_size}.")
        self.gae = gae
        self.minibatch_size = minibatch_size
        self.drop_keys = tuple(drop_keys)
        self.stepper = stepper
        self.replay_buffer: TensorDictReplayBuffer | None = None
        self._epoch: Iterator[TensorDictBase] | None = None

    def prepare(self, batch: TensorDictBase) -> TensorDictBase:
        """Computes the advantages of ``[*B, T]``, from which minibatches are drawn."""
        # A copy of the structure: the collector re-uses its batch.
        batch = self.gae(batch.copy())
        rows = batch.exclude(*self.drop_keys).reshape(-1)
        self.replay_buffer = TensorDictReplayBuffer(
            storage=TensorStorage(rows, device="auto"),
            sampler=SamplerWithoutReplacement(drop_last=False),
            batch_size=self.minibatch_size,
        )
        self._epoch = None
        if self.stepper is not None:
            self.stepper.begin()
        return batch

    def sample(self, batch: TensorDictBase) -> TensorDictBase:
        """The next minibatch; StopIteration at the end of an epoch."""
        if self.replay_buffer is None:
            raise RuntimeError("Call prepare(batch) before sample(batch).")
        if self.stepper is not None and self.stepper.stopped:
            raise StopIteration
        if self._epoch is None:
            self._epoch = iter(self.replay_buffer)
        try:
            return next(self._epoch)
        except StopIteration:
            self._epoch = None
            raise

    def num_minibatches(self, rows: int) -> int:
        """Minibatches per epoch for ``rows`` collected frames."""
        return -(-rows // self.minibatch_size)

    def register(self, trainer: Trainer, name: str = "on_policy_minibatches") -> None:
        """Registers at ``batch_process`` and ``process_optim_batch``."""
        trainer.register_op("batch_process", self.prepare)
        trainer.register_op("process_optim_batch", self.sample)
        trainer.register_module(name, self)
