# Copyright (c) the torchrl_rpd authors.
#
# This source code is licensed under the MIT license found in the
# LICENSE file in the root directory of this source tree.
"""Fine-tuning that goes on after a crash exactly as if it had never stopped."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from torch.optim import Optimizer
from torch.optim.lr_scheduler import LRScheduler
from torchrl.checkpoint import Checkpoint, CheckpointRotation, GlobalRNGState
from torchrl.data import ReplayBuffer

from torchrl_rpd.trainers._fingerprint import differences, fingerprint
from torchrl_rpd.trainers._newest import explained, load_newest, remove_leftovers
from torchrl_rpd.trainers.checkpointing import _WeightsOnly


class FinetuneCheckpoints:
    """Saves what a fine-tuning run needs to go on, and goes on from there.

    Saved are the trained parameters (with adapters: they alone; the base checkpoint is
    read anew), the optimiser's moments, the schedule, where the sampler of the replay
    buffer stands, and all global random number generators. On a CPU a run that was
    killed and started again gives the same weights **bit for bit**.

    TorchRL's :class:`~torchrl.checkpoint.Checkpoint` and ``CheckpointRotation`` write
    tensors and plain values, under another name first, and read them with
    ``torch.load(weights_only=True)``. These files are for the run itself;
    :func:`export_openvla` and :func:`export_octo` write for others.

    Args:
        directory (path): of this run alone.

    Keyword Args:
        config (mapping): what the run depends on: numbers, strings, lists and
            dictionaries of them. A checkpoint of another configuration is refused.
        module (nn.Module): whose parameters that require a gradient are trained.
        optimizer (Optimizer): of these parameters.
        scheduler (LRScheduler): of its learning rate.
        buffer (ReplayBuffer): that is sampled from; its content is not saved.
        keep_last (int): how many checkpoints are kept. Defaults to ``2``.

    Raises:
        ValueError: for a buffer with ``prefetch`` or a generator of its own, whose draws
            cannot be repeated.

    Examples:
        >>> import tempfile
        >>> import torch
        >>> from torchrl.data import LazyTensorStorage, ReplayBuffer
        >>> from torchrl_rpd.finetune import FinetuneCheckpoints, rate_factor
        >>> layer = torch.nn.Linear(2, 2)
        >>> adam = torch.optim.AdamW(layer.parameters())
        >>> checkpoints = FinetuneCheckpoints(
        ...     tempfile.mkdtemp(),
        ...     config={"lr": 1e-3},
        ...     module=layer,
        ...     optimizer=adam,
        ...     scheduler=torch.optim.lr_scheduler.LambdaLR(
        ...         adam, rate_factor(total_steps=10)
        ...     ),
        ...     buffer=ReplayBuffer(storage=LazyTensorStorage(4), batch_size=2),
        ... )
        >>> checkpoints.resume()  # nothing was saved so far
        0
        >>> checkpoints.save(5).name, checkpoints.resume()
        ('checkpoint-000000000005', 5)
    """

    def __init__(
        self,
        directory: str | Path,
        *,
        config: Mapping[str, Any],
        module: nn.Module,
        optimizer: Optimizer,
        scheduler: LRScheduler,
        buffer: ReplayBuffer,
        keep_last: int = 2,
    ) -> None:
        if buffer._prefetch or buffer._rng is not None:
            raise ValueError(
                "The replay buffer draws ahead (prefetch) or from a generator of its own, "
                "which cannot be repeated after a crash; build it without."
            )
        self.config = fingerprint(config)
        self._rotation = CheckpointRotation(directory, keep_last=keep_last)
        self._rng = GlobalRNGState()
        self._checkpoint = Checkpoint().register_adapter(object, _WeightsOnly())
        self._checkpoint.register("weights", _Trained(module))
        self._checkpoint.register("optimizer", optimizer)
        self._checkpoint.register("scheduler", scheduler)
        self._checkpoint.register("sampler", buffer.sampler)
        self._checkpoint.register("rng", self._rng)

    def save(self, step: int) -> Path:
        """Writes a checkpoint after ``step`` steps."""
        with explained(self._rotation, step):
            path: Path = self._rotation.save(
                self._checkpoint,
                step=step,
                metadata={"config": self.config, "step": step},
            )
        return path

    def resume(self) -> int:
        """Goes on from the newest checkpoint; returns the steps done, 0 without one.

        Raises:
            ValueError: if the checkpoint is of another configuration.
            CheckpointError: if there are checkpoints and none can be read.
        """
        remove_leftovers(self._rotation)
        path = load_newest(self._rotation, self._load)
        if path is None:
            return 0
        return int(Checkpoint.manifest(path)["metadata"]["step"])

    def _load(self, path: Path) -> None:
        metadata = Checkpoint.manifest(path)["metadata"]
        lines = differences(metadata.get("config", {}), self.config)
        if lines:
            raise ValueError(
                f"{path} was saved by another configuration (checkpoint -> this run):\n  "
                + "\n  ".join(lines)
                + "\nGo on with the old settings, or start anew in another directory."
            )
        # To the CPU first: optimisers move their state to where their parameters are.
        self._checkpoint.load(path, map_location="cpu")


class _Trained:
    """The part of a module's state that changes."""

    def __init__(self, module: nn.Module) -> None:
        self._module = module

    def _parameters(self) -> dict[str, Tensor]:
        return {
            name: parameter
            for name, parameter in self._module.named_parameters()
            if parameter.requires_grad
        }

    def state_dict(self) -> dict[str, Tensor]:
        return {name: p.detach() for name, p in self._parameters().items()}

    @torch.no_grad()
    def load_state_dict(self, state_dict: Mapping[str, Tensor]) -> None:
        own = self._parameters()
        if own.keys() != state_dict.keys():
            other = sorted(own.keys() ^ state_dict.keys())
            raise ValueError(
                f"The checkpoint holds other parameters than are trained: {other[:3]}."
            )
        for name, parameter in own.items():
            parameter.copy_(state_dict[name])
