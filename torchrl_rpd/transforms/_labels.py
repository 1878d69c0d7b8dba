# Copyright (c) the torchrl_rpd authors.
#
# This source code is licensed under the MIT license found in the
# LICENSE file in the root directory of this source tree.
"""Turns what a teacher answered into labels that a loss can use."""

from __future__ import annotations

from collections.abc import Callable
from typing import Literal, NamedTuple

import torch

from torchrl_rpd.transforms._box import ActionBox


class Labels(NamedTuple):
    """Labels of ``n`` rows; rows that are not usable hold zeros.

    Attributes:
        action (torch.Tensor): float32 ``[n, A]``.
        usable (torch.Tensor): bool ``[n]``.
        std (torch.Tensor, optional): float32 ``[n, A]``.
        clipped (torch.Tensor, optional): bool ``[n]``, usable rows of which an entry
            was clipped.
        no_op (torch.Tensor, optional): bool ``[n]``, rows left out as no-ops.
    """

    action: torch.Tensor
    usable: torch.Tensor
    std: torch.Tensor | None
    clipped: torch.Tensor | None
    no_op: torch.Tensor | None


class LabelRules:
    """Convention, box and sanity of labels, in this order.

    Args:
        action_transform (callable, optional): raw actions ``[n, A']`` -> ``[n, A]`` in
            the env's convention.
        clip (bool): whether to clip to the box.
        on_non_finite ("mask" or "raise"): what to do with rows that hold NaN or an
            infinity, before or after ``action_transform``.
        no_op_norm (float, optional): rows of which all entries but the last have a
            smaller norm are left out.

    Examples:
        >>> rules = LabelRules(lambda raw: 2 * raw - 1, clip=True, on_non_finite="mask")
        >>> raw = torch.tensor([[1.0], [0.75], [1.5], [float("nan")]])
        >>> labels = rules(raw, None, ActionBox(1, -1.0, 1.0), name="mine")
        >>> labels.action.squeeze(-1)
        tensor([1.0000, 0.5000, 1.0000, 0.0000])
        >>> labels.usable.tolist(), labels.clipped.tolist()
        ([True, True, True, False], [False, False, True, False])
    """

    def __init__(
        self,
        action_transform: Callable[[torch.Tensor], torch.Tensor] | None,
        *,
        clip: bool,
        on_non_finite: Literal["mask", "raise"],
        no_op_norm: float | None = None,
    ) -> None:
        if on_non_finite not in ("mask", "raise"):
            raise ValueError(
                f"on_non_finite must be 'mask' or 'raise', got {on_non_finite!r}."
            )
        if no_op_norm is not None and no_op_norm <= 0:
            raise ValueError(f"no_op_norm must be positive, got {no_op_norm}.")
        self.no_op_norm = no_op_norm
        self.action_transform = action_transform
        self.clip = clip
        self.on_non_finite = on_non_finite

    def __call__(
        self, raw: torch.Tensor, std: torch.Tensor | None, box: ActionBox, *, name: str
    ) -> Labels:
        """Applies the rules.

        Args:
            raw (torch.Tensor): the teacher's actions, ``[n, A']`` with ``n >= 1``.
            std (torch.Tensor, optional): their standard deviations, ``[n, A]``.
            box (ActionBox): the width, and the limits to clip to.

        Keyword Args:
            name (str): what to call the teacher in an error.

        Raises:
            ValueError: if the labels have a wrong shape, or are not finite and
                ``on_non_finite`` is ``"raise"``.
        """
        # Looked at before the transform as well: a comparison in it (gripper > 0.5)
        # would turn NaN into a number.
        usable = raw.isfinite().all(-1)
        action = raw if self.action_transform is None else self._convert(raw)
        if box.width not in (None, action.shape[-1]):
            raise ValueError(
                f"{name} gives actions of {action.shape[-1]} entries; expected "
                f"{box.width}, as the env's action has."
            )
        action = action.to(torch.float32)
        usable = usable & action.isfinite().all(-1)
        if std is not None:
            if std.shape != action.shape:
                raise ValueError(
                    f"{name} gives standard deviations of shape {list(std.shape)} for "
                    f"labels of shape {list(action.shape)}."
                )
            std = std.to(action)
            usable = usable & std.isfinite().all(-1)
        if self.on_non_finite == "raise" and not bool(usable.all()):
            raise ValueError(
                f"{name} gave labels that are not finite in {int((~usable).sum())} of "
                f"{usable.numel()} rows. Use on_non_finite='mask' to leave such rows "
                "out and count them."
            )
        no_op = None
        if self.no_op_norm is not None:
            if action.shape[-1] < 2:
                raise ValueError(
                    f"{name} gives actions of one entry, the gripper's for no_op_norm: "
                    "every label would be a no-op. Use no_op_norm=None."
                )
            no_op = (action[:, :-1].norm(dim=-1) < self.no_op_norm) & usable
            usable = usable & ~no_op
        clipped = None
        if self.clip:
            inside = box.clip(action)
            clipped = (inside != action).any(-1) & usable
            action = inside
        keep = usable.unsqueeze(-1)
        if std is not None:
            std = torch.where(keep, std, 0.0)
        return Labels(torch.where(keep, action, 0.0), usable, std, clipped, no_op)

    def _convert(self, raw: torch.Tensor) -> torch.Tensor:
        assert self.action_transform is not None
        action = self.action_transform(raw)
        if action.ndim != 2 or action.shape[0] != raw.shape[0]:
            raise ValueError(
                f"action_transform made {list(action.shape)} out of {list(raw.shape)}; "
                f"expected [{raw.shape[0]}, A]."
            )
        return action
