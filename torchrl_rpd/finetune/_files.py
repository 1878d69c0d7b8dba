# Copyright (c) the torchrl_rpd authors.
#
# This source code is licensed under the MIT license found in the
# LICENSE file in the root directory of this source tree.
"""Folders that are there whole, or not at all."""

from __future__ import annotations

import os
import shutil
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path


@contextmanager
def new_folder(folder: str | os.PathLike[str]) -> Iterator[Path]:
    """A folder to write into, that gets its name when all is written.

    Args:
        folder (str or path): must not exist, or be empty.

    Raises:
        FileExistsError: if there is something in it.

    Examples:
        >>> import tempfile
        >>> target = Path(tempfile.mkdtemp()) / "export"
        >>> with new_folder(target) as partial:
        ...     _ = (partial / "a.txt").write_text("a")
        >>> (target / "a.txt").read_text()
        'a'
    """
    target = Path(folder)
    if target.exists() and (not target.is_dir() or any(target.iterdir())):
        raise FileExistsError(
            f"{target} exists and is not empty; an export goes to a folder of its own."
        )
    partial = target.with_name(f"{target.name}.part")
    shutil.rmtree(partial, ignore_errors=True)  # of an interrupted export
    partial.mkdir(parents=True)
    try:
        yield partial
        if target.exists():
            target.rmdir()
        partial.rename(target)
    except BaseException:
        shutil.rmtree(partial, ignore_errors=True)
        raise
