# Copyright (c) the torchrl_rpd authors.
#
# This source code is licensed under the MIT license found in the
# LICENSE file in the root directory of this source tree.
"""What came back: whether it is an answer to the request, and what it says."""

from __future__ import annotations

from typing import Any

import numpy as np
from torch import Tensor, from_numpy

from torchrl_rpd.teachers.remote._errors import TeacherError
from torchrl_rpd.teachers.remote._messages import MessageError, unpack
from torchrl_rpd.teachers.remote._requests import Request

__all__ = ["BadRequest", "InvalidAnswer", "read_answer"]

_LONGEST_TEXT = 2_000


class BadRequest(TeacherError):
    """The server does not understand what it is asked: it never will."""


class InvalidAnswer(TeacherError):
    """What came back is no answer to what was asked."""


def read_answer(
    answer: bytes | str,
    request: Request,
    *,
    action_dim: int | None,
    chunk_size: int | None,
) -> tuple[Tensor, Tensor | None]:
    """The chunks of one request.

    Args:
        answer (bytes or str): as it came.
        request (Request): what it answers.

    Keyword Args:
        action_dim (int, optional): entries of an action, where known.
        chunk_size (int, optional): actions of a chunk, where known.

    Returns:
        float32 ``[n, H, A]``, and the standard deviation of the first actions
        ``[n, A]``, where there is one. Whether they are finite is not looked at.

    Raises:
        BadRequest: if the server does not understand the request.
        InvalidAnswer: if this is no answer to it.
        TeacherError: if the server answered with another error.
    """
    if isinstance(answer, str):
        text = answer.strip()
        # A plain OpenPI server sends a traceback, whose end says what happened.
        text = text if len(text) <= _LONGEST_TEXT else "... " + text[-_LONGEST_TEXT:]
        if text.startswith("BadRequest:"):
            raise BadRequest(f"The teacher's server does not take this request: {text}")
        raise TeacherError(f"The teacher's server answered with an error: {text}")
    try:
        content = unpack(answer)
    except MessageError as error:
        raise InvalidAnswer(f"What the server sent is no answer: {error}") from error
    if not isinstance(content, dict) or "actions" not in content:
        found = (
            sorted(map(str, content)) if isinstance(content, dict) else type(content)
        )
        raise InvalidAnswer(f"An answer holds 'actions'; the server sent {found}.")
    if request.request_id is not None:
        echoed = content.get("request_id")
        if echoed != request.request_id:
            raise InvalidAnswer(
                f"The answer to request {request.request_id} says that it belongs to "
                f"{echoed!r}."
            )
    rows = request.stop - request.start
    lead = [rows] if request.batched else []
    chunk = _read(content["actions"], "actions")
    shape = list(chunk.shape)
    wanted = [*lead, chunk_size or "H", action_dim or "A"]
    if not _fits(shape, wanted):
        raise InvalidAnswer(
            f"The server sent 'actions' of shape {shape}; expected {wanted}."
        )
    std = content.get("std")
    if std is not None:
        std = _read(std, "std")
        if list(std.shape) == shape:  # of every action of the chunk
            std = std[..., 0, :]
        if list(std.shape) != [*lead, shape[-1]]:
            raise InvalidAnswer(
                f"The server sent 'std' of shape {list(std.shape)} with 'actions' of "
                f"shape {shape}; expected {[*lead, shape[-1]]}."
            )
        std = _tensor(std.reshape(rows, -1))
    return _tensor(chunk.reshape(rows, *shape[-2:])), std


def _read(value: Any, name: str) -> np.ndarray:
    if not isinstance(value, np.ndarray) or value.dtype.kind != "f":
        kind = value.dtype if isinstance(value, np.ndarray) else type(value).__name__
        raise InvalidAnswer(
            f"The server sent {name!r} as {kind}; expected an array of floats."
        )
    return value


def _fits(shape: list[int], wanted: list[Any]) -> bool:
    return len(shape) == len(wanted) and all(
        size == want if isinstance(want, int) else size > 0
        for size, want in zip(shape, wanted, strict=True)
    )


def _tensor(array: np.ndarray) -> Tensor:
    # A copy: arrays of a message are read-only, and float32 is what is promised.
    return from_numpy(array.astype(np.float32))
