# Copyright (c) the torchrl_rpd authors.
#
# This source code is licensed under the MIT license found in the
# LICENSE file in the root directory of this source tree.
"""The last observations of every environment, for teachers that look back."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from tensordict import TensorDictBase, unravel_key
from tensordict.utils import NestedKey

PAD_MASK_KEY = "timestep_pad_mask"


class HistoryWindow:
    """The last ``window`` values of some entries, for every environment of a batch.

    What a teacher is shown is a window, oldest first, and a mask that is False where
    the window reaches back beyond the start of the episode; the first observation of
    the episode stands there. Environments move on their own: episodes may end and
    start anew in any pattern.

    An environment whose observations were missed (see :meth:`forget`) is not
    :meth:`complete` before it starts an episode or ``window`` more observations were
    recorded: a window is exact or there is none.

    Args:
        window (int): how many observations a teacher is shown, at least 2.
        keys (sequence of NestedKey): the entries to keep; tensors ``[*B, ...]``.

    Examples:
        >>> import torch
        >>> from tensordict import TensorDict
        >>> history = HistoryWindow(2, ["observation"])
        >>> rows = torch.arange(2)
        >>> for step in (1.0, 2.0, 3.0):  # env 1 starts an episode at the last one
        ...     frame = TensorDict({"observation": torch.full((2, 1), step)}, [2])
        ...     history.record(frame, rows, fresh=step == 1)
        >>> history.record(frame, rows[1:], fresh=True)
        >>> shown = history.show(frame.copy(), rows)
        >>> shown["observation"].squeeze(-1)
        tensor([[2., 3.],
                [3., 3.]])
        >>> shown["timestep_pad_mask"]
        tensor([[ True,  True],
                [False,  True]])
    """

    def __init__(self, window: int, keys: Sequence[NestedKey]) -> None:
        self.window = window
        self.keys: list[NestedKey] = [unravel_key(key) for key in keys]
        # Observation t of an episode is kept in slot t % window: [N, window, ...].
        self._values: dict[NestedKey, torch.Tensor] = {}
        # Bookkeeping stays on the CPU: it decides which rows are asked about.
        self._count: torch.Tensor | None = None  # [N], recorded without a gap
        self._from_start: torch.Tensor | None = None  # [N], since an episode's start

    def forget(self) -> None:
        """Declares that observations were missed, in every environment."""
        if self._count is not None and self._from_start is not None:
            self._count.zero_()
            self._from_start.fill_(False)

    def record(
        self, tensordict: TensorDictBase, rows: torch.Tensor, *, fresh: bool
    ) -> None:
        """Takes up the observations of some environments.

        Args:
            tensordict (TensorDictBase): observations of all environments, ``[*B]``.
            rows (torch.Tensor): the flat indices of those to record, int64 ``[n]``.

        Keyword Args:
            fresh (bool): whether these are the first observations of their episodes.

        Raises:
            KeyError: if an entry is not there.
            TypeError: if it is no tensor.
        """
        num_envs = tensordict.batch_size.numel()
        if self._count is None or self._from_start is None:
            self._count = torch.zeros(num_envs, dtype=torch.int64)
            self._from_start = torch.zeros(num_envs, dtype=torch.bool)
        if fresh:
            self._count[rows] = 0
            self._from_start[rows] = True
        slots = self._count[rows] % self.window
        self._count[rows] += 1
        for key in self.keys:
            value = self._read(tensordict, key)
            value = value.reshape(num_envs, *value.shape[tensordict.ndim :])
            kept = self._values.get(key)
            if kept is None:
                kept = value.new_zeros(num_envs, self.window, *value.shape[1:])
            self._values[key] = kept = kept.to(value.device)
            at = rows.to(value.device)
            kept[at, slots.to(value.device)] = value[at]

    def complete(self, rows: torch.Tensor) -> torch.Tensor:
        """Whether the window of each of ``rows`` is known: bool ``[n]``."""
        assert self._count is not None and self._from_start is not None
        return self._from_start[rows] | (self._count[rows] >= self.window)

    def show(self, scratch: TensorDictBase, rows: torch.Tensor) -> TensorDictBase:
        """Replaces the entries of ``scratch`` by windows and adds the mask.

        Args:
            scratch (TensorDictBase): batch ``[n]``, what the teacher is to be shown.
            rows (torch.Tensor): the environments it is about, int64 ``[n]``.
        """
        assert self._count is not None
        # Which observation of its episode each place of the window holds.
        steps = self._count[rows, None] - self.window + torch.arange(self.window)
        slots = steps.clamp(min=0) % self.window
        for key in self.keys:
            kept = self._values[key]
            at = rows.to(kept.device)[:, None]
            scratch.set(key, kept[at, slots.to(kept.device)])
        inside = steps >= 0
        if scratch.device is None:
            inside = inside.to(kept.device)
        return scratch.set(PAD_MASK_KEY, inside)

    def _read(self, tensordict: TensorDictBase, key: NestedKey) -> torch.Tensor:
        value = tensordict.get(key, None)
        if value is None:
            found = sorted(tensordict.keys(True, True), key=str)
            raise KeyError(
                f"The teacher is to be shown the history of {key!r}, which is not "
                f"there; found {found}. Name the right entries with history_keys=."
            )
        if not isinstance(value, torch.Tensor):
            raise TypeError(
                f"History is kept of tensors; {key!r} is {type(value).__name__}. Leave "
                "it out of history_keys=: the teacher is given its present value."
            )
        return value

    def state(self) -> dict[str, Any]:
        """The content, for a ``state_dict``."""
        if self._count is None or self._from_start is None:
            return {}
        return {
            "count": self._count.clone(),
            "from_start": self._from_start.clone(),
            "values": {_name(k): v.clone() for k, v in self._values.items()},
        }

    def load(self, state: dict[str, Any]) -> None:
        """Takes over what :meth:`state` returned.

        What another window or other entries left behind is of no use and passed over.
        """
        values = state.get("values", {})
        same = all(value.shape[1] == self.window for value in values.values())
        if values and same and set(values) == {_name(key) for key in self.keys}:
            self._count = state["count"].clone().cpu()
            self._from_start = state["from_start"].clone().cpu()
            self._values = {key: values[_name(key)].clone() for key in self.keys}


def _name(key: NestedKey) -> str:
    """A name for a ``state_dict``; collectors turn tuples there into nested entries."""
    return key if isinstance(key, str) else ".".join(key)
