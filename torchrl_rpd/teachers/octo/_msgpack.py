# Copyright (c) the torchrl_rpd authors.
#
# This source code is licensed under the MIT license found in the
# LICENSE file in the root directory of this source tree.
"""Reads and writes flax's msgpack files, without JAX.

Octo's checkpoints are saved by orbax, which puts all arrays that are not sharded into
one file of flax's format: nested maps, and arrays as msgpack extension 1, itself a
msgpack tuple (shape, dtype name, bytes). Arrays above 1 GiB come in pieces.
"""

from __future__ import annotations

import math
import mmap
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

import torch

from torchrl_rpd.teachers._hub import require

_NDARRAY = 1
_CHUNKED = "__msgpack_chunked_array__"
_MAX_CHUNK_BYTES = 2**30

# Only what is a plain tensor: nothing in these files is ever executed.
_DTYPES = {
    str(dtype).removeprefix("torch."): dtype
    for dtype in (
        *(torch.float64, torch.float32, torch.float16, torch.bfloat16),
        *(torch.int64, torch.int32, torch.int16, torch.int8, torch.uint8, torch.bool),
    )
}


def read_arrays(file: Path) -> dict[str, torch.Tensor]:
    """All arrays of a file, by their path in the tree, e.g. ``"a/b/kernel"``.

    Args:
        file (Path): a flax msgpack file.

    Raises:
        ImportError: if msgpack is not installed.
        ValueError: if the file is not one, or holds anything but arrays.
    """
    msgpack = require("msgpack", extra="octo")

    def decode(code: int, data: bytes) -> torch.Tensor:
        if code != _NDARRAY:
            raise ValueError(f"msgpack extension {code} is not an array")
        shape, dtype, buffer = msgpack.unpackb(data, raw=False)
        return _tensor(shape, dtype, buffer)

    try:
        # Mapped: the file itself need not fit in memory beside its content.
        with (
            file.open("rb") as handle,
            mmap.mmap(handle.fileno(), 0, access=mmap.ACCESS_READ) as content,
        ):
            tree = msgpack.unpackb(content, ext_hook=decode, raw=False)
    except (ValueError, TypeError, msgpack.exceptions.UnpackException) as error:
        raise ValueError(
            f"{file} is no flax msgpack checkpoint ({type(error).__name__}: {error}). "
            "If orbax saved sharded arrays (folders or an OCDBT store), save it again "
            "with OctoModel.save_pretrained on one host."
        ) from error
    return dict(_leaves(tree, ()))


def write_arrays(
    file: Path,
    arrays: Mapping[str, torch.Tensor],
    *,
    max_chunk_bytes: int = _MAX_CHUNK_BYTES,
) -> None:
    """Writes arrays as orbax and flax do; the inverse of :func:`read_arrays`."""
    msgpack = require("msgpack", extra="octo")

    def encode(array: torch.Tensor) -> Any:
        array = array.contiguous()
        dtype = str(array.dtype).removeprefix("torch.")
        buffer = array.reshape(-1).view(torch.uint8).numpy().tobytes()
        content = msgpack.packb((tuple(array.shape), dtype, buffer), use_bin_type=True)
        return msgpack.ExtType(_NDARRAY, content)

    tree: dict[str, Any] = {}
    for name in sorted(arrays):
        *parents, leaf = name.split("/")
        node = tree
        for parent in parents:
            node = node.setdefault(parent, {})
        array = arrays[name]
        if array.nbytes <= max_chunk_bytes:
            node[leaf] = encode(array)
            continue
        pieces = array.reshape(-1).split(max_chunk_bytes // array.element_size())
        node[leaf] = {
            _CHUNKED: True,
            "shape": {str(i): size for i, size in enumerate(array.shape)},
            "chunks": {str(i): encode(piece) for i, piece in enumerate(pieces)},
        }
    file.parent.mkdir(parents=True, exist_ok=True)
    file.write_bytes(msgpack.packb(tree, strict_types=True))


def _tensor(shape: list[int], dtype: str, buffer: bytes) -> torch.Tensor:
    if dtype not in _DTYPES:
        raise ValueError(f"arrays of dtype {dtype!r} are not supported")
    kind = _DTYPES[dtype]
    if len(buffer) != math.prod(shape) * kind.itemsize:
        raise ValueError(f"{len(buffer)} bytes for an array {shape} of {dtype}")
    if not buffer:
        return torch.zeros(shape, dtype=kind)
    return torch.frombuffer(bytearray(buffer), dtype=kind).reshape(shape)


def _leaves(tree: Any, path: tuple[str, ...]) -> Iterator[tuple[str, torch.Tensor]]:
    if isinstance(tree, torch.Tensor):
        yield "/".join(path), tree
    elif isinstance(tree, dict) and _CHUNKED in tree:
        shape = [tree["shape"][str(i)] for i in range(len(tree["shape"]))]
        pieces = [tree["chunks"][str(i)] for i in range(len(tree["chunks"]))]
        yield "/".join(path), torch.cat(pieces).reshape(shape)
    elif isinstance(tree, dict):
        for key, value in tree.items():
            yield from _leaves(value, (*path, str(key)))
    else:
        # orbax leaves a placeholder text where an array lies in files of its own.
        raise ValueError(
            f"The checkpoint holds {tree!r} instead of an array at {'/'.join(path)!r}: "
            "orbax saved it elsewhere (a sharded checkpoint, which is not supported). "
            "Save it again with OctoModel.save_pretrained on one host."
        )
