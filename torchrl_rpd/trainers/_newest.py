# Copyright (c) the torchrl_rpd authors.
#
# This source code is licensed under the MIT license found in the
# LICENSE file in the root directory of this source tree.
"""The newest checkpoint that can be read, and an honest word about the others."""

from __future__ import annotations

import shutil
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path

from torchrl._utils import logger as torchrl_logger
from torchrl.checkpoint import CheckpointError, CheckpointRotation


def load_newest(
    rotation: CheckpointRotation, load: Callable[[Path], None]
) -> Path | None:
    """Calls ``load`` with the newest checkpoint; with the one before if that is broken.

    A disk that was full, a copy that was cut off or somebody's hand can leave a
    checkpoint that nobody can read. The one before it is as good a place to go on from;
    each one that is passed over is named in a warning.

    Args:
        rotation (CheckpointRotation): whose directory it is.
        load (callable): reads everything that a checkpoint holds.

    Returns:
        the checkpoint that was loaded, None if there is none.

    Raises:
        CheckpointError: if there are checkpoints and none can be read. A run that
            starts anew in silence would soon write over them.

    Examples:
        >>> import tempfile
        >>> from torchrl.checkpoint import Checkpoint, CheckpointRotation
        >>> rotation = CheckpointRotation(tempfile.mkdtemp(), keep_last=2)
        >>> print(load_newest(rotation, print))
        None
        >>> _ = rotation.save(Checkpoint(value=1), step=7)
        >>> load_newest(rotation, lambda path: None).name
        'checkpoint-000000000007'
    """
    known = rotation.checkpoints()
    broken = {
        path: "its manifest.json cannot be read"
        for path in _candidates(rotation)
        if path not in known
    }
    loaded = None
    for path in reversed(known):
        try:
            load(path)
        except CheckpointError as error:
            broken[path] = str(error).split("\n")[0]
        else:
            loaded = path
            break
    if not broken:
        return loaded
    lines = "\n  ".join(f"{path}: {why}" for path, why in sorted(broken.items()))
    if loaded is None:
        raise CheckpointError(
            f"No checkpoint in {rotation.directory} can be read:\n  {lines}\nBring back "
            "a copy, or delete them to start from the beginning."
        )
    torchrl_logger.warning(
        "Checkpoints that cannot be read are passed over (delete them):\n  %s\n"
        "Going on from %s.",
        lines,
        loaded,
    )
    return loaded


@contextmanager
def explained(rotation: CheckpointRotation, step: int) -> Iterator[None]:
    """Says in words what it means that a checkpoint could not be written.

    Args:
        rotation (CheckpointRotation): which writes it.
        step (int): its number.

    Raises:
        OSError: in place of whatever was raised inside; ``torch.save`` does not say
            that a disk is full.
    """
    try:
        yield
    except (OSError, RuntimeError) as error:
        whole = rotation.directory.absolute()
        there = next(path for path in (whole, *whole.parents) if path.exists())
        free = shutil.disk_usage(there).free / 1e6
        last = rotation.latest()
        raise OSError(
            f"The checkpoint at {step} could not be written to {rotation.directory} "
            f"({str(error).splitlines()[0]}), where {free:.0f} MB are free. "
            + (
                "There is none before it."
                if last is None
                else f"Make room and start the same command again: it goes on from {last}."
            )
        ) from error


def remove_leftovers(rotation: CheckpointRotation) -> None:
    """Removes what a write that was interrupted has left behind."""
    for kind in ("stage", "backup", "delete"):
        for path in rotation.directory.glob(f".{rotation.prefix}-*.{kind}-*"):
            shutil.rmtree(path, ignore_errors=True)


def _candidates(rotation: CheckpointRotation) -> list[Path]:
    """What has the name of a checkpoint."""
    prefix = f"{rotation.prefix}-"
    return [
        path
        for path in rotation.directory.glob(f"{prefix}*")
        if path.name[len(prefix) :].isdigit()
    ]
