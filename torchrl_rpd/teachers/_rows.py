# Copyright (c) the torchrl_rpd authors.
#
# This source code is licensed under the MIT license found in the
# LICENSE file in the root directory of this source tree.
"""Observations to ask a teacher about, and versions of them that it should notice."""

from __future__ import annotations

from collections.abc import Iterator

import torch
from tensordict import NonTensorData, NonTensorStack, TensorDictBase
from tensordict.utils import NestedKey
from torch import Tensor
from torchrl.data import TensorSpec
from torchrl.envs import EnvBase

from torchrl_rpd.teachers._questioner import PAD_MASK_KEY, Questioner

__all__ = [
    "follow",
    "image_keys",
    "limits",
    "pick",
    "say",
    "shake",
    "state_keys",
    "text_keys",
    "windowed",
]

# How many environments follow the teacher; the others act at random. It is asked about
# each of these at each step, which a large teacher makes expensive.
_FOLLOWERS = 4


def pick(frames: TensorDictBase, rows: int) -> TensorDictBase:
    """At most ``rows`` of the frames, evenly spread."""
    frames = frames.reshape(-1)
    count = frames.batch_size[0]
    if count <= rows:
        return frames
    return frames[torch.linspace(0, count - 1, rows).round().long()]


def follow(
    env: EnvBase,
    ask: Questioner,
    spec: TensorSpec,
    action_key: NestedKey,
    *,
    steps: int,
    rows: int,
    generator: torch.Generator,
) -> tuple[TensorDictBase, Tensor]:
    """Plays on: some environments as the teacher says, the others at random.

    Returns:
        the frames ``[n]``, and the actions of the teacher on the way ``[m, A]``.
    """
    low, high = limits(spec)
    td = env.reset()
    frames, answers = [], []
    for step in range(steps + 1):
        seen = ask.observed(td).reshape(-1)
        # (images of many environments and steps would fill the memory)
        frames.append(pick(seen, rows).clone())
        asked = windowed(seen[:_FOLLOWERS], ask)
        answers.append(ask(asked, rewind=step == 0)[:, 0])
        if step == steps:
            break
        width = answers[-1].shape[-1]
        if width != spec.shape[-1]:  # reported by the check of the range
            break
        action = low + (high - low) * torch.rand(
            seen.batch_size[0], width, generator=generator
        )
        action[:_FOLLOWERS] = answers[-1].nan_to_num().clamp(low, high)
        td.set(action_key, action.reshape(spec.shape).to(spec.device, spec.dtype))
        _, td = env.step_and_maybe_reset(td)
    return torch.cat(frames), torch.cat(answers)


def limits(spec: TensorSpec) -> tuple[Tensor, Tensor]:
    """Lower and upper ends of an action box ``[A]``; -1 and 1 where it has none."""
    ends = []
    for name, default in (("low", -1.0), ("high", 1.0)):
        bound = getattr(spec.space, name, None)
        if bound is None:
            bound = torch.full(spec.shape, default)
        row = bound.reshape(-1, spec.shape[-1])[0].to("cpu", torch.float32)
        ends.append(torch.where(row.abs() < 1e6, row, default))
    return ends[0], ends[1]


def windowed(rows: TensorDictBase, ask: Questioner) -> TensorDictBase:
    """Rows ``[n]`` as a teacher with a history sees them at the start of an episode."""
    if ask.window == 1 or PAD_MASK_KEY in rows.keys():
        return rows
    rows = rows.copy()
    for key in ask.history_keys:
        value = rows.get(key)
        times = value.unsqueeze(1).expand(-1, ask.window, *value.shape[1:])
        rows.set(key, times.contiguous())
    mask = torch.zeros(rows.batch_size[0], ask.window, dtype=torch.bool)
    mask[:, -1] = True
    return rows.set(PAD_MASK_KEY, mask.to(rows.device) if rows.device else mask)


def _leaves(rows: TensorDictBase) -> Iterator[tuple[NestedKey, Tensor]]:
    for key, value in rows.items(True, True):
        if isinstance(value, Tensor):
            yield key, value


def image_keys(rows: TensorDictBase, windowed_keys: list[NestedKey]) -> list[NestedKey]:
    """Entries that are pictures: uint8, or three dimensions with 1, 3 or 4 colours."""
    found = []
    for key, value in _leaves(rows):
        ndim = value.ndim - 1 - (key in windowed_keys)
        if ndim < 3 or key == PAD_MASK_KEY:
            continue
        colours = {value.shape[-3], value.shape[-1]} & {1, 3, 4}
        if value.dtype == torch.uint8 or (value.is_floating_point() and colours):
            found.append(key)
    return found


def state_keys(rows: TensorDictBase, images: list[NestedKey]) -> list[NestedKey]:
    """Entries of real numbers that are no pictures."""
    return [
        key
        for key, value in _leaves(rows)
        if value.is_floating_point() and key not in images
    ]


def text_keys(rows: TensorDictBase) -> list[NestedKey]:
    """Entries that hold text, one for all rows or one for each."""
    found = []
    for key in rows.keys(True, True, is_leaf=_any_leaf):
        value = rows.get(key)
        if isinstance(value, NonTensorData | NonTensorStack):
            value = value.tolist()
        while isinstance(value, list) and value:
            value = value[0]
        if isinstance(value, str):
            found.append(key)
    return found


def _any_leaf(cls: type) -> bool:
    return issubclass(cls, Tensor | NonTensorData | NonTensorStack)


def shake(value: Tensor, generator: torch.Generator) -> Tensor:
    """Real numbers moved by as much as the rows differ, and by 0.1 at least."""
    size = value.to("cpu", torch.float32)
    spread = size.std(0, correction=0).clamp_min(0.1)
    noise = torch.randn(size.shape, generator=generator) * spread
    return (size + noise).to(value)


def say(rows: TensorDictBase, key: NestedKey, text: str) -> TensorDictBase:
    """The rows with another text."""
    return rows.copy().set(key, NonTensorData(text, batch_size=rows.batch_size))
