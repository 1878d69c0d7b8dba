# Copyright (c) the torchrl_rpd authors.
#
# This source code is licensed under the MIT license found in the
# LICENSE file in the root directory of this source tree.
"""The space that labels live in: how wide it is, and between which limits."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from tensordict.utils import NestedKey
from torchrl.data.tensor_specs import Composite

Bound = float | Sequence[float] | torch.Tensor


class ActionBox:
    """Width and limits of an action vector.

    Args:
        width (int, optional): the number of entries; None where nobody knows.
        low (float or sequence of float, optional): lower limits, for all entries or one
            by one; None for no limit.
        high (float or sequence of float, optional): upper limits, likewise.

    Raises:
        ValueError: if limits cross, or their number is not ``width``.

    Examples:
        >>> box = ActionBox(None, low=[-1.0, 0.0], high=1.0)
        >>> box.width
        2
        >>> box.clip(torch.tensor([[-3.0, 0.5]]))
        tensor([[-1.0000,  0.5000]])
    """

    def __init__(
        self, width: int | None, low: Bound | None = None, high: Bound | None = None
    ) -> None:
        self.low = None if low is None else torch.as_tensor(low, dtype=torch.float32)
        self.high = None if high is None else torch.as_tensor(high, dtype=torch.float32)
        for name, bound in (("low", self.low), ("high", self.high)):
            if bound is None or bound.ndim == 0:
                continue
            if bound.ndim > 1 or width not in (None, bound.shape[0]):
                raise ValueError(
                    f"{name} is of shape {list(bound.shape)}; expected a number or one "
                    f"per entry of the action ({'any' if width is None else width})."
                )
            width = bound.shape[0]
        self.width = width
        if self.low is None or self.high is None:
            return
        if bool((self.low > self.high).any()):
            raise ValueError(f"low must not be above high, got {low} and {high}.")

    @classmethod
    def from_spec(
        cls,
        specs: Composite,
        key: NestedKey,
        low: Bound | None = None,
        high: Bound | None = None,
    ) -> ActionBox:
        """The box of one action of an env; ``low`` and ``high`` replace its limits.

        Args:
            specs (Composite): the env's ``full_action_spec``.
            key (NestedKey): which action.
            low (float or sequence of float, optional): as in the constructor.
            high (float or sequence of float, optional): as in the constructor.

        Raises:
            KeyError: if there is no such action.
            TypeError: if it is not a vector of floating-point numbers.
            ValueError: if the envs of a batch have different boxes.
        """
        spec = specs.get(key, None)
        if spec is None:
            found = sorted(specs.keys(True, True), key=str)
            raise KeyError(
                f"The env has no action {key!r}; found {found}. Name it with "
                "action_key=."
            )
        if not spec.dtype.is_floating_point or spec.ndim != specs.ndim + 1:
            raise TypeError(
                "A teacher labels continuous action vectors; the env's "
                f"{key!r} is of shape {list(spec.shape)} and dtype {spec.dtype}."
            )
        if low is None:
            low = _one_row(getattr(spec.space, "low", None), key)
        if high is None:
            high = _one_row(getattr(spec.space, "high", None), key)
        return cls(spec.shape[-1], low, high)

    def clip(self, actions: torch.Tensor) -> torch.Tensor:
        """Actions ``[n, A]`` moved into the box."""
        if self.low is None and self.high is None:
            return actions
        return torch.clamp(actions, self.low, self.high)

    def to(self, device: torch.device) -> ActionBox:
        """Moves the limits, in place."""
        self.low = None if self.low is None else self.low.to(device)
        self.high = None if self.high is None else self.high.to(device)
        return self


def _one_row(bound: torch.Tensor | None, key: NestedKey) -> torch.Tensor | None:
    if bound is None:
        return None
    rows = bound.reshape(-1, bound.shape[-1])
    if not bool((rows == rows[0]).all()):
        raise ValueError(
            f"The envs of the batch have different boxes for {key!r}; give low= and "
            "high= that hold for all of them."
        )
    return rows[0]
