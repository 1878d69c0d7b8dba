# Copyright (c) the torchrl_rpd authors.
#
# This source code is licensed under the MIT license found in the
# LICENSE file in the root directory of this source tree.
"""What is sent: rows of a tensordict as messages, without copies where possible."""

from __future__ import annotations

import dataclasses
from collections.abc import Iterator, Mapping
from typing import Any

import numpy as np
import torch
from torch import Tensor

from torchrl_rpd.teachers.remote._connection import Message
from torchrl_rpd.teachers.remote._errors import TeacherMismatch
from torchrl_rpd.teachers.remote._info import PROMPT, TeacherInfo
from torchrl_rpd.teachers.remote._messages import pack_parts

__all__ = ["Request", "arrange", "requests"]

# Names, shapes and the like of a message.
_OVERHEAD = 4_096


@dataclasses.dataclass(frozen=True)
class Request:
    """One message and the rows that it is about.

    Attributes:
        start: the first row.
        stop: behind the last one.
        batched: whether it has a leading dimension.
        request_id: which the answer repeats; None for a server that does not.
        message: in pieces.
    """

    start: int
    stop: int
    batched: bool
    request_id: int | None
    message: Message


def arrange(
    tensors: Mapping[str, Tensor], images: set[str], layouts: tuple[str, ...]
) -> tuple[dict[str, np.ndarray], str]:
    """Arrays of the tensors, and which layout their pictures have.

    Args:
        tensors (mapping): ``[n, ...]`` by wire name, pictures channels first.
        images (set of str): which of them are pictures, ``[n, ..., 3, H, W]``.
        layouts (tuple of str): what the server takes, in order of preference.

    Returns:
        contiguous arrays that share the tensors' memory where one of the layouts
        allows it, and that layout.

    Examples:
        >>> picture = torch.zeros(2, 8, 9, 3, dtype=torch.uint8).movedim(-1, -3)
        >>> arrays, layout = arrange({"image": picture}, {"image"}, ("HWC", "CHW"))
        >>> layout, arrays["image"].shape
        ('HWC', (2, 8, 9, 3))
        >>> arrange({"image": picture.contiguous()}, {"image"}, ("HWC", "CHW"))[1]
        'CHW'
    """
    on_cpu = {name: value.detach().to("cpu") for name, value in tensors.items()}

    def laid_out(layout: str) -> dict[str, Tensor]:
        if layout == "CHW":
            return on_cpu
        return {
            name: value.movedim(-3, -1) if name in images else value
            for name, value in on_cpu.items()
        }

    def copied(layout: str) -> int:
        values = laid_out(layout).values()
        return sum(v.numel() for v in values if not v.is_contiguous())

    layout = min(layouts, key=copied)
    return {
        name: _plain(value).contiguous().numpy()
        for name, value in laid_out(layout).items()
    }, layout


def _plain(value: Tensor) -> Tensor:
    return value.float() if value.dtype == torch.bfloat16 else value


def requests(
    arrays: Mapping[str, np.ndarray],
    texts: list[str] | None,
    layout: str,
    info: TeacherInfo,
    *,
    rows: int,
    first_id: int,
) -> Iterator[Request]:
    """The messages of ``rows`` rows: as few as the server takes.

    Args:
        arrays (mapping): ``[rows, ...]`` by wire name.
        texts (list of str, optional): the instruction of each row.
        layout (str): of the pictures.
        info (TeacherInfo): what the server takes.

    Keyword Args:
        rows (int): how many there are.
        first_id (int): of the first message.

    Raises:
        TeacherMismatch: if not even one row fits into a message.
    """
    size = _rows_per_message(arrays, texts, info, rows) if info.batch else 1
    for number, start in enumerate(range(0, rows, size)):
        stop = min(start + size, rows)
        part = slice(start, stop) if info.batch else start
        content: dict[str, Any] = {name: value[part] for name, value in arrays.items()}
        if texts is not None:
            told = texts[start:stop]
            alike = not info.batch or len(set(told)) == 1
            content[PROMPT] = told[0] if alike else told
        request_id = None
        if info.protocol is not None:
            # Our server's, which a plain one would take for observations.
            request_id = first_id + number
            content["request_id"] = request_id
            if info.batch:
                content["batch"] = stop - start
            if layout != "HWC":
                content["image_layout"] = layout
        message = pack_parts(content)
        yield Request(start, stop, info.batch, request_id, message)


def _rows_per_message(
    arrays: Mapping[str, np.ndarray],
    texts: list[str] | None,
    info: TeacherInfo,
    rows: int,
) -> int:
    size = min(rows, info.max_batch or rows)
    if info.max_message_bytes is None:
        return size
    longest = max((len(text.encode()) for text in texts or ()), default=0) + 5
    one = sum(value.nbytes // rows for value in arrays.values()) + longest
    fit = (info.max_message_bytes - _OVERHEAD) // one
    if fit < 1:
        raise TeacherMismatch(
            f"One row is a message of {one + _OVERHEAD} bytes; the server takes "
            f"{info.max_message_bytes}. Start it with a higher limit."
        )
    return min(size, fit)
