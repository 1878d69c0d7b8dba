# Copyright (c) the torchrl_rpd authors.
#
# This source code is licensed under the MIT license found in the
# LICENSE file in the root directory of this source tree.
"""Reads requests: whatever arrives is a well-formed question or a clear refusal."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Collection
from typing import Any

import numpy as np
import torch
from tensordict.utils import NestedKey
from torch import Tensor

from torchrl_rpd.teachers._questioner import PAD_MASK_KEY
from torchrl_rpd.teachers.remote._info import PROMPT, TeacherInfo, key_of, wire_name
from torchrl_rpd.teachers.remote._messages import MessageError, unpack

__all__ = ["BadRequest", "Question", "QuestionReader"]

# Entries that are about the request and are not shown to the teacher.
_ABOUT = ("image_layout", "batch", "request_id")
_MAX_PROMPT = 4_096  # characters
_MAX_PARTS = 8  # of a nested key
# Python keeps some short bytes objects for ever; views of those must not be written to.
_COPY_BELOW = 4_096


class BadRequest(ValueError):
    """A message that is no request, or not one to this teacher."""


@dataclasses.dataclass(frozen=True)
class Question:
    """One request.

    Attributes:
        entries: what the teacher is to be shown, rows first.
        rows: how many.
        batched: whether the answer has a batch dimension as well.
        request_id: to echo.
    """

    entries: dict[NestedKey, Tensor | list[str]]
    rows: int
    batched: bool
    request_id: int | None


@dataclasses.dataclass(frozen=True)
class _Kind:
    """What is known of an entry: its dtype and the dimensions of a row."""

    dtype: str
    row: tuple[int | str, ...]
    fits: Callable[[np.dtype], bool]

    def expected(self, batched: bool) -> str:
        row = ", ".join(map(str, (["B", *self.row] if batched else self.row)))
        return f"{self.dtype} [{row}]"


class QuestionReader:
    """Checks requests against what a teacher reads.

    Args:
        info (TeacherInfo): what the server says of it.

    Keyword Args:
        max_rows (int): the most rows of one request.
        image_names (collection of str): wire names of images beside ``"image"`` and
            ``"..._image"``.

    Examples:
        >>> from torchrl_rpd.teachers.remote import pack
        >>> reader = QuestionReader(
        ...     TeacherInfo(request_keys=("observation",)), max_rows=8
        ... )
        >>> question = reader.read(pack({"observation": np.ones((2, 3), np.float32)}))
        >>> question.rows, question.batched
        (2, True)
    """

    def __init__(
        self, info: TeacherInfo, *, max_rows: int, image_names: Collection[str] = ()
    ) -> None:
        self._info = info
        self._max_rows = max_rows
        self._image_names = frozenset(image_names)

    def read(self, message: bytes | str) -> Question:
        """What is asked.

        Raises:
            BadRequest: saying what to send instead.
        """
        if isinstance(message, str):
            raise BadRequest("requests are binary frames of msgpack; this one is text.")
        try:
            request = unpack(message)
        except MessageError as error:
            raise BadRequest(str(error)) from error
        if not isinstance(request, dict) or not all(
            isinstance(k, str) for k in request
        ):
            raise BadRequest("a request is a map with names (text) as its keys.")
        request_id = request.get("request_id")
        if request_id is not None and type(request_id) is not int:
            raise BadRequest("request_id: expected a whole number.")
        layout = request.get("image_layout", "HWC")
        if layout not in self._info.image_layouts:
            raise BadRequest(
                f"image_layout: expected one of {list(self._info.image_layouts)}, got "
                f"{_short(layout)}."
            )
        wanted = self._wanted(request)
        arrays = {name: request[name] for name in wanted if name != PROMPT}
        for name, array in arrays.items():
            if not isinstance(array, np.ndarray):
                kind = self._kind(name, layout)
                expected = "an array" if kind is None else kind.expected(True)
                raise BadRequest(f"{name}: expected {expected}, got {_short(array)}.")
        prompt = request[PROMPT] if PROMPT in wanted else None
        rows, batched = self._rows(arrays, prompt, request.get("batch"), layout)
        entries: dict[NestedKey, Tensor | list[str]] = {
            key_of(name): self._tensor(name, array, batched, layout)
            for name, array in arrays.items()
        }
        if PROMPT in wanted:
            entries[key_of(PROMPT)] = _texts(prompt, rows)
        return Question(entries, rows, batched, request_id)

    def _wanted(self, request: dict[str, Any]) -> list[str]:
        """The names that are shown to the teacher; others are passed over."""
        required = self._info.request_keys
        if required is not None:
            missing = [name for name in required if name not in request]
            if missing:
                raise BadRequest(
                    f"the request lacks {missing}: this teacher reads "
                    f"{list(required)}, the request holds {_names(request)}."
                )
            return list(required)
        # The teacher does not say what it reads: everything.
        names = [name for name in request if name not in _ABOUT]
        if not names:
            raise BadRequest("the request holds nothing to show the teacher.")
        for name in names:
            parts = name.split("/", _MAX_PARTS)
            if len(parts) > _MAX_PARTS or not all(parts):
                raise BadRequest(f"{_short(name)} is no entry's name.")
        return names

    def _kind(self, name: str, layout: str) -> _Kind | None:
        last = name.rsplit("/", 1)[-1]
        window: tuple[int, ...] = ()
        if self._info.history_window > 1 and name in self._info.history_keys:
            window = (self._info.history_window,)
        if last == "image" or last.endswith("_image") or name in self._image_names:
            height, width = self._info.image_size or ("H", "W")
            size = (3, height, width) if layout == "CHW" else (height, width, 3)
            return _Kind("uint8", (*window, *size), lambda dtype: dtype == np.uint8)
        if name == "observation" or last == "state":
            return _Kind("float32", (*window, "D"), lambda dtype: dtype.kind == "f")
        if name == wire_name(PAD_MASK_KEY):
            mask = (self._info.history_window,)
            return _Kind("bool", mask, lambda dtype: dtype == np.bool_)
        return None

    def _rows(
        self, arrays: dict[str, np.ndarray], prompt: Any, batch: Any, layout: str
    ) -> tuple[int, bool]:
        """How many rows there are, and whether they were sent as a batch."""
        kinds = {name: self._kind(name, layout) for name in arrays}
        known = [(arrays[name], kind) for name, kind in kinds.items() if kind]
        if batch is not None:
            if type(batch) is not int:
                raise BadRequest("batch: expected the number of rows.")
            rows, batched = batch, True
        elif known:
            array, kind = known[0]
            batched = array.ndim != len(kind.row)
            rows = array.shape[0] if batched and array.ndim else 1
        elif arrays:
            raise BadRequest("say how many rows these are, with an entry 'batch'.")
        else:
            batched = isinstance(prompt, list)
            rows = len(prompt) if batched else 1
        for name, array in arrays.items():
            _check(name, array, rows, batched, kinds[name])
        if not 1 <= rows <= self._max_rows:
            raise BadRequest(
                f"the request holds {rows} rows; expected 1 to {self._max_rows}: send "
                "them in several requests."
            )
        return rows, batched

    def _tensor(
        self, name: str, array: np.ndarray, batched: bool, layout: str
    ) -> Tensor:
        if array.nbytes < _COPY_BELOW:
            array = array.copy()
        value = torch.from_numpy(_writable(array if batched else array[None]))
        windowed = self._info.history_window > 1 and name in self._info.history_keys
        if value.dtype == torch.uint8 and value.ndim == 4 + windowed:
            return value if layout == "CHW" else value.movedim(-1, -3)
        kind = self._kind(name, layout)
        floats = kind is not None and kind.dtype == "float32"
        return value.to(torch.float32) if floats else value


def _check(
    name: str, array: np.ndarray, rows: int, batched: bool, kind: _Kind | None
) -> None:
    shape = array.shape if batched else (1, *array.shape)
    fits = bool(shape) and shape[0] == rows and 0 not in shape
    if kind is not None:
        fits = fits and kind.fits(array.dtype) and len(shape) == 1 + len(kind.row)
        fits = fits and all(
            isinstance(wanted, str) or wanted == size
            for wanted, size in zip(kind.row, shape[1:], strict=False)
        )
    if not fits:
        expected = "[B, ...]" if kind is None else kind.expected(batched)
        in_batch = f" with B = {rows}" if batched and array.ndim else ""
        empty = ", which is empty" if 0 in array.shape else ""
        raise BadRequest(
            f"{name}: expected {expected}{in_batch}, got {array.dtype} "
            f"{list(array.shape)}{empty}."
        )


def _texts(prompt: Any, rows: int) -> list[str]:
    texts = [prompt] * rows if isinstance(prompt, str) else prompt
    if (
        not isinstance(texts, list)
        or len(texts) != rows
        or not all(isinstance(text, str) for text in texts)
    ):
        raise BadRequest(
            f"{PROMPT}: expected one text, or a list of {rows}, one for each row; got "
            f"{_short(prompt)}."
        )
    longest = max(map(len, texts))
    if longest > _MAX_PROMPT:
        raise BadRequest(
            f"{PROMPT}: {longest} characters; expected at most {_MAX_PROMPT}."
        )
    return texts


class _Memory:
    """Bytes of a message as memory that may be written to: nobody else reads them."""

    def __init__(self, array: np.ndarray) -> None:
        self._array = array  # keeps the bytes
        self.__array_interface__ = {
            **array.__array_interface__,
            "data": (array.__array_interface__["data"][0], False),
        }


def _writable(array: np.ndarray) -> np.ndarray:
    """The same memory: PyTorch has no read-only tensors, and warns of such arrays."""
    return array if array.flags.writeable else np.asarray(_Memory(array))


def _short(value: Any) -> str:
    """What a value is, in few words, however large it is."""
    name = type(value).__name__
    if isinstance(value, list | dict):
        return f"a {name} of {len(value)} entries"
    if isinstance(value, str | bytes):
        return repr(value[:60])
    return f"{name} {repr(value)[:60]}"


def _names(request: dict[str, Any]) -> str:
    names = ", ".join(_short(name) for name in sorted(request)[:10])
    return f"{names}, ..." if len(request) > 10 else names or "nothing"
