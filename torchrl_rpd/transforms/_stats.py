# Copyright (c) the torchrl_rpd authors.
#
# This source code is licensed under the MIT license found in the
# LICENSE file in the root directory of this source tree.
"""What a teacher was asked and what became of its answers."""

from __future__ import annotations

from typing import TypedDict

import torch


class TeacherStats(TypedDict):
    """Counts since the start or the last reset of the counters."""

    frames: int
    queries: int
    calls: int
    labelled: int
    clipped: int
    non_finite: int
    no_ops: int
    incomplete: int
    seconds: float


class QueryStats:
    """Counters of a :class:`~torchrl_rpd.transforms.TeacherActionTransform`.

    Counts that depend on the data (frames, labels clipped or not finite) are summed up
    on the data's device and read only by :meth:`read`, so that counting costs no
    synchronisation with an accelerator in the steps between.

    Examples:
        >>> stats = QueryStats()
        >>> usable = torch.tensor([True, True, False])
        >>> stats.emit(usable, clipped=torch.tensor([True, False, False]))
        >>> stats.read()["labelled"], stats.read()["clipped"]
        (2, 1)
    """

    def __init__(self) -> None:
        self.reset()

    def reset(self) -> None:
        """Sets every counter to zero."""
        self.queries = 0
        self.calls = 0
        self.incomplete = 0
        self.seconds = 0.0
        self._frames: int | torch.Tensor = 0
        self._emitted = 0
        self._usable: int | torch.Tensor = 0
        self._clipped: int | torch.Tensor = 0
        self._no_ops: int | torch.Tensor = 0

    def see(self, candidates: torch.Tensor) -> None:
        """Counts the rows, True in ``candidates``, that could be labelled."""
        self._frames = self._frames + candidates.sum()

    def emit(
        self,
        usable: torch.Tensor,
        clipped: torch.Tensor | None,
        no_op: torch.Tensor | None = None,
    ) -> None:
        """Counts labels that were written.

        Args:
            usable (torch.Tensor): bool ``[n]``, the rows whose label is usable.
            clipped (torch.Tensor, optional): bool ``[n]``, the usable rows of which an
                entry was clipped.
            no_op (torch.Tensor, optional): bool ``[n]``, the rows left out as no-ops.
        """
        self._emitted += usable.numel()
        self._usable = self._usable + usable.sum()
        if no_op is not None:
            self._no_ops = self._no_ops + no_op.sum()
        if clipped is not None:
            self._clipped = self._clipped + clipped.sum()

    def read(self) -> TeacherStats:
        """The counters as plain numbers."""
        labelled, no_ops = int(self._usable), int(self._no_ops)
        return TeacherStats(
            frames=int(self._frames),
            queries=self.queries,
            calls=self.calls,
            labelled=labelled,
            clipped=int(self._clipped),
            non_finite=self._emitted - labelled - no_ops,
            no_ops=no_ops,
            incomplete=self.incomplete,
            seconds=self.seconds,
        )

    def load(self, stats: TeacherStats) -> None:
        """Continues from what :meth:`read` returned earlier."""
        # Multi-process collectors make tensors of the numbers in a state_dict.
        self.queries = int(stats["queries"])
        self.calls = int(stats["calls"])
        self.incomplete = int(stats["incomplete"])
        self.seconds = float(stats["seconds"])
        self._frames = int(stats["frames"])
        self._usable = int(stats["labelled"])
        self._clipped = int(stats["clipped"])
        self._no_ops = int(stats["no_ops"])
        self._emitted = self._usable + self._no_ops + int(stats["non_finite"])
