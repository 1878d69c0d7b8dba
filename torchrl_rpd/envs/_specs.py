# Copyright (c) the torchrl_rpd authors.
#
# This source code is licensed under the MIT license found in the
# LICENSE file in the root directory of this source tree.
"""The specs of what the adapter writes and reads."""

from __future__ import annotations

from typing import Any

import torch
from torchrl.data import Bounded, Categorical, Composite, NonTensor, Unbounded

from torchrl_rpd.envs._observer import Entries


def _flag(shape: torch.Size, device: torch.device) -> Categorical:
    return Categorical(n=2, shape=shape, dtype=torch.bool, device=device)


def observation_spec(
    entries: Entries, batch: torch.Size, instruction: str | None, device: torch.device
) -> Composite:
    """The spec of observations like these; flags are flags, the rest is unbounded."""
    spec = Composite(shape=batch, device=device)
    for key, value in entries.items():
        spec[key] = (
            _flag(value.shape, device)
            if value.dtype is torch.bool
            else Unbounded(shape=value.shape, dtype=value.dtype, device=device)
        )
    if instruction is not None:
        spec["language_instruction"] = NonTensor(
            shape=batch, example_data=instruction, device=device
        )
    return spec


def action_spec(space: Any, batch: torch.Size, device: torch.device) -> Bounded:
    """The spec of a batch of actions of a gymnasium box."""
    shape = torch.Size((*batch, *space.shape))
    return Bounded(
        low=torch.as_tensor(space.low).expand(shape),
        high=torch.as_tensor(space.high).expand(shape),
        shape=shape,
        dtype=torch.float32,
        device=device,
    )


def reward_spec(batch: torch.Size, device: torch.device) -> Unbounded:
    """One number per environment."""
    return Unbounded(shape=(*batch, 1), dtype=torch.float32, device=device)


def done_spec(batch: torch.Size, device: torch.device) -> Composite:
    """One flag per environment, of each kind."""
    names = ("done", "terminated", "truncated")
    flags = {name: _flag(torch.Size((*batch, 1)), device) for name in names}
    return Composite(flags, shape=batch, device=device)
