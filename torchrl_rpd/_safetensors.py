# Copyright (c) the torchrl_rpd authors.
#
# This source code is licensed under the MIT license found in the
# LICENSE file in the root directory of this source tree.
"""What all safetensors files of this package have in common."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path


@contextmanager
def written_whole(path: Path) -> Iterator[str]:
    """Gives a name beside ``path`` to write to, and moves that file in place.

    Whoever is killed while writing leaves the old file whole.
    """
    partial = path.with_name(path.name + ".part")
    yield str(partial)
    partial.replace(path)


def read_header(path: str | Path) -> dict[str, str]:
    """The texts that stand beside the tensors.

    Raises:
        FileNotFoundError: if there is no such file.
        ValueError: if it is another kind of file.
    """
    from safetensors import SafetensorError, safe_open

    try:
        with safe_open(str(path), framework="pt") as file:
            return file.metadata() or {}
    except SafetensorError as error:
        raise ValueError(f"{path} is no safetensors file: {error}.") from None
