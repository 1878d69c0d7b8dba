# Copyright (c) the torchrl_rpd authors.
#
# This source code is licensed under the MIT license found in the
# LICENSE file in the root directory of this source tree.
"""Reads HDF5 that somebody else wrote: numbers only, and nothing outside the file."""

from __future__ import annotations

import importlib
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np

# Deflate cannot compress more: what claims to has never been written.
_HIGHEST_RATIO = 1100


class BrokenEpisode(Exception):
    """An episode that cannot be used: why in a few words, and what exactly.

    Args:
        reason (str): by which such episodes are counted.
        detail (str): what was found.
    """

    def __init__(self, reason: str, detail: str = "") -> None:
        super().__init__(f"{reason}: {detail}" if detail else reason)
        self.reason = reason


def require_h5py() -> Any:
    """h5py, or an error that says how to install it."""
    try:
        return importlib.import_module("h5py")
    except ImportError:
        raise ImportError(
            "Demonstrations are HDF5 files, and h5py was not found. It comes with "
            "ManiSkill: pip install 'torchrl_rpd[maniskill]'; or pip install h5py"
        ) from None


def open_hdf5(path: Path) -> Any:
    """Opens a file for reading, or says in one sentence why not."""
    h5py = require_h5py()
    if not path.is_file():
        raise FileNotFoundError(f"There is no file {path}.")
    try:
        return h5py.File(path, "r")
    except OSError as error:
        raise ValueError(
            f"{path} cannot be opened as HDF5 (an interrupted download or copy?): {error}"
        ) from error


def child(group: Any, name: str) -> Any:
    """What a group holds under ``name``, None if nothing; links are refused.

    A link may lead to any file of this machine, and a demonstration has no need of one.
    """
    h5py = require_h5py()
    try:
        link = group.get(name, getlink=True)
        if link is None:
            return None
        if not isinstance(link, h5py.HardLink):
            raise BrokenEpisode("link to elsewhere", f"{group.name}/{name}")
        return group[name]
    except (OSError, RuntimeError, KeyError) as error:
        raise BrokenEpisode(
            "unreadable data", f"{group.name}/{name}: {error}"
        ) from None


def find(group: Any, path: str) -> Any:
    """What is at a path such as ``"obs/agent/qpos"``, None if nothing."""
    h5py = require_h5py()
    node = group
    for name in path.split("/"):
        if not isinstance(node, h5py.Group):
            return None
        node = child(node, name)
    return node


def leaves(group: Any, prefix: str = "") -> Iterator[str]:
    """The paths of all data in a group."""
    h5py = require_h5py()
    for name in group:
        node = child(group, name)
        if isinstance(node, h5py.Group):
            yield from leaves(node, f"{prefix}{name}/")
        else:
            yield f"{prefix}{name}"


def read(group: Any, path: str, length: int | None = None) -> np.ndarray:
    """The numbers at ``path``, a copy.

    Args:
        group: an open group.
        path (str): where in it.
        length (int, optional): how many rows there must be.

    Raises:
        BrokenEpisode: if they are missing, of another length, not plain numbers, kept
            outside the file, or unreadable.
    """
    h5py = require_h5py()
    data = find(group, path)
    if not isinstance(data, h5py.Dataset):
        raise BrokenEpisode("missing data", path)
    if data.dtype.kind not in "biuf" or data.dtype.hasobject:
        # Objects and strings of variable length are never needed here.
        raise BrokenEpisode("no plain numbers", f"{path} has dtype {data.dtype}")
    if data.is_virtual or data.external:
        raise BrokenEpisode("link to elsewhere", path)
    if not data.shape or (length is not None and data.shape[0] != length):
        raise BrokenEpisode(
            "wrong length", f"{path} has shape {data.shape}, expected {length} rows"
        )
    if data.nbytes > _HIGHEST_RATIO * data.id.get_storage_size():
        raise BrokenEpisode("truncated data", f"{path} was never written")
    try:
        values: np.ndarray = data[()]
    except (OSError, RuntimeError, ValueError) as error:
        raise BrokenEpisode("unreadable data", f"{path}: {error}") from None
    return values
