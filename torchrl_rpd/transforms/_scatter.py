# Copyright (c) the torchrl_rpd authors.
#
# This source code is licensed under the MIT license found in the
# LICENSE file in the root directory of this source tree.
"""Writes labels beside the observation they belong to."""

from __future__ import annotations

from typing import NamedTuple

import torch
from tensordict import TensorDictBase
from tensordict.utils import NestedKey

from torchrl_rpd.transforms._box import ActionBox
from torchrl_rpd.transforms._labels import Labels


class LabelKeys(NamedTuple):
    """Where labels are written.

    ``std`` is None where no spread is stored, ``ticket`` where nothing is deferred.
    """

    action: NestedKey
    mask: NestedKey
    std: NestedKey | None
    ticket: NestedKey | None

    @property
    def of_labels(self) -> list[NestedKey]:
        """Those that say what the teacher would do."""
        return [key for key in (self.action, self.mask, self.std) if key is not None]


def scatter_labels(
    tensordict: TensorDictBase, keys: LabelKeys, rows: torch.Tensor, labels: Labels
) -> TensorDictBase:
    """Writes the labels of some rows among zeros, ``[*B, F]``.

    Args:
        tensordict (TensorDictBase): ``[*B]``; written into.
        keys (LabelKeys): where.
        rows (torch.Tensor): the flat indices that ``labels`` speak of, int64 ``[n]``, on
            the CPU.
        labels (Labels): of these rows.
    """
    batch_size = tensordict.batch_size
    written = [
        (keys.action, labels.action),
        (keys.mask, labels.usable.unsqueeze(-1)),
    ]
    if keys.std is not None and labels.std is not None:
        written.append((keys.std, labels.std))
    for key, values in written:
        if rows.numel() < batch_size.numel():
            full = values.new_zeros(batch_size.numel(), values.shape[-1])
            full[rows.to(values.device)] = values
            values = full
        tensordict.set(key, values.reshape(*batch_size, values.shape[-1]))
    return tensordict


def write_nothing(
    tensordict: TensorDictBase, keys: LabelKeys, like: torch.Tensor, box: ActionBox
) -> TensorDictBase:
    """Writes that no row has a label.

    Args:
        tensordict (TensorDictBase): ``[*B]``; written into.
        keys (LabelKeys): where.
        like (torch.Tensor): bool ``[*B]``, whose device is taken.
        box (ActionBox): tells the width.

    Raises:
        RuntimeError: if it does not.
    """
    if box.width is None:
        raise RuntimeError(
            "No frame is to be labelled, and nothing tells the width of the labels that "
            "are to be zero: the frames hold no action. Name it with action_key=, or "
            "give low= or high= with one entry per action dimension."
        )
    zeros = torch.zeros(*like.shape, box.width, device=like.device)
    tensordict.set(keys.action, zeros)
    tensordict.set(keys.mask, torch.zeros_like(like).unsqueeze(-1))
    if keys.std is not None:
        tensordict.set(keys.std, zeros.clone())
    return tensordict
