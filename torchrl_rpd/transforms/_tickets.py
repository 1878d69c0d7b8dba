# Copyright (c) the torchrl_rpd authors.
#
# This source code is licensed under the MIT license found in the
# LICENSE file in the root directory of this source tree.
"""What stands beside frames whose labels are still being made."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from tensordict import TensorDictBase, unravel_key
from tensordict.utils import NestedKey

from torchrl_rpd.transforms._deferred import LabelQueue


def write_tickets(
    tensordict: TensorDictBase,
    key: NestedKey,
    tickets: torch.Tensor | None,
    device: torch.device,
) -> TensorDictBase:
    """Writes tickets ``[n]`` of the rows of ``tensordict``, or 0: nothing to wait for."""
    batch_size = tensordict.batch_size
    if tickets is None:
        tickets = torch.zeros(batch_size.numel(), dtype=torch.int64)
    return tensordict.set(key, tickets.to(device).reshape(*batch_size, 1))


def redeem_tickets(
    tensordict: TensorDictBase,
    key: NestedKey,
    label_keys: Sequence[NestedKey],
    queue: LabelQueue,
) -> TensorDictBase:
    """Replaces the tickets of frames by their labels.

    Args:
        tensordict (TensorDictBase): frames of any shape; written into.
        key (NestedKey): of the tickets.
        label_keys (sequence of NestedKey): what to write.
        queue (LabelQueue): who gave the tickets.

    Raises:
        RuntimeError: see :meth:`LabelQueue.fetch`.
    """
    tickets = tensordict.pop(key)
    # What comes next is labelled where it is a root.
    tensordict.pop(unravel_key(("next", key)), None)
    flat = tickets.reshape(-1).cpu()
    waiting = flat.nonzero().squeeze(-1)  # the others: nobody was asked, or padding
    if not waiting.numel():
        return tensordict
    labels = queue.fetch(flat[waiting])
    for label_key in label_keys:
        values = labels.get(label_key)
        full = values.new_zeros(flat.numel(), values.shape[-1])
        full[waiting] = values
        full = full.reshape(*tensordict.batch_size, values.shape[-1])
        tensordict.set(label_key, full.to(tickets.device))
    return tensordict
