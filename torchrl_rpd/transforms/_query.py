# Copyright (c) the torchrl_rpd authors.
#
# This source code is licensed under the MIT license found in the
# LICENSE file in the root directory of this source tree.
"""One question to a teacher: about which rows, from which entries, in which batches."""

from __future__ import annotations

import time
from collections.abc import Sequence

import torch
from tensordict import TensorDictBase, unravel_key
from tensordict.utils import NestedKey

from torchrl_rpd.transforms._handle import TeacherHandle
from torchrl_rpd.transforms._history import PAD_MASK_KEY, HistoryWindow
from torchrl_rpd.transforms._stats import QueryStats

# Root entries that are no observation. A teacher that does not say what it reads gets
# everything else.
_NOT_OBSERVED: tuple[str, ...] = (
    "action",
    "collector",
    "done",
    "next",
    "reward",
    "terminated",
    "truncated",
    "_reset",
    "_step",
)


class TeacherQuery:
    """Asks about rows of a tensordict of any batch shape.

    Args:
        handle (TeacherHandle): the teacher.

    Keyword Args:
        in_keys (sequence of NestedKey, optional): what it is given; None for the
            teacher's own ``in_keys`` and, where it has none, the whole observation.
        not_in_keys (sequence of NestedKey): what is left out of a whole observation.
        max_batch_size (int, optional): the most rows in one call.

    Examples:
        >>> import torch
        >>> from tensordict import TensorDict
        >>> teacher = TeacherHandle(lambda td: 2 * td["observation"])
        >>> ask = TeacherQuery(teacher, max_batch_size=2)
        >>> frames = TensorDict({"observation": torch.arange(4.0).view(2, 2, 1)}, [2, 2])
        >>> stats = QueryStats()
        >>> ask(frames, torch.tensor([0, 1, 3]), stats)[0].flatten()
        tensor([0., 2., 6.])
        >>> stats.queries, stats.calls
        (3, 2)
    """

    def __init__(
        self,
        handle: TeacherHandle,
        *,
        in_keys: Sequence[NestedKey] | None = None,
        not_in_keys: Sequence[NestedKey] = (),
        max_batch_size: int | None = None,
    ) -> None:
        if max_batch_size is not None and max_batch_size < 1:
            raise ValueError(
                f"max_batch_size must be at least 1, got {max_batch_size}."
            )
        self.handle = handle
        self.max_batch_size = max_batch_size
        self._in_keys = None if in_keys is None else [unravel_key(k) for k in in_keys]
        self._not_in_keys = (*_NOT_OBSERVED, *not_in_keys)

    def __call__(
        self,
        tensordict: TensorDictBase,
        rows: torch.Tensor,
        stats: QueryStats,
        history: HistoryWindow | None = None,
    ) -> tuple[torch.Tensor, torch.Tensor | None]:
        """Returns chunks ``[n, H, A]`` and, from a teacher with a spread, ``[n, A]``.

        Args:
            tensordict (TensorDictBase): ``[*B]``; left as it is.
            rows (torch.Tensor): flat indices into it, int64 ``[n]`` on the CPU.
            stats (QueryStats): where the question is counted.
            history (HistoryWindow, optional): what replaces its entries.

        Raises:
            KeyError: if an entry is not there.
        """
        observed = self.observed(tensordict, () if history is None else history.keys)
        if observed.ndim != 1:
            observed = observed.reshape(-1)
        limit = self.max_batch_size or rows.numel()
        start = time.perf_counter()
        answers = []
        for part in rows.split(limit):
            scratch = self._take(observed, part)
            if history is not None:
                scratch = history.show(scratch, part)
            answers.append(self.handle(scratch))
        stats.seconds += time.perf_counter() - start
        stats.calls += len(answers)
        stats.queries += rows.numel()
        if len(answers) == 1:
            return answers[0]
        stds = [std for _, std in answers if std is not None]
        return torch.cat([a for a, _ in answers]), torch.cat(stds) if stds else None

    @staticmethod
    def _take(observed: TensorDictBase, rows: torch.Tensor) -> TensorDictBase:
        first, last = int(rows[0]), int(rows[-1])
        if last - first + 1 == rows.numel():  # rows ascend: no copy of the images
            return observed[first : last + 1].copy()
        device = observed.device
        return observed[rows if device is None else rows.to(device)]

    def observed(
        self, tensordict: TensorDictBase, also: Sequence[NestedKey] = ()
    ) -> TensorDictBase:
        """What the teacher is given of a tensordict, and the entries ``also``."""
        keys = self._in_keys if self._in_keys is not None else self.handle.in_keys
        if keys is None:
            return tensordict.exclude(*self._not_in_keys)
        there = tensordict.keys(include_nested=True)
        # The mask of the history belongs to the question, not to the frames.
        keys = list(dict.fromkeys([k for k in keys if k != PAD_MASK_KEY] + [*also]))
        missing = [key for key in keys if key not in there]
        if missing:
            raise KeyError(
                f"The teacher ({self.handle.name}) reads {missing}, which is not "
                f"there; found {sorted(there, key=str)}. Name the right entries with "
                "in_keys=, or have the env (or the collector) keep them."
            )
        return tensordict.select(*keys)
