# Copyright (c) the torchrl_rpd authors.
#
# This source code is licensed under the MIT license found in the
# LICENSE file in the root directory of this source tree.
r"""Writes a copy of an Octo checkpoint that loads without msgpack, and faster.

    python -m torchrl_rpd.teachers.octo.convert SRC DST
    python -m torchrl_rpd.teachers.octo.convert rail-berkeley/octo-base-1.5 octo-base \
        --tokenizer t5-base

The copy holds the weights in the layout of our modules as safetensors, beside config.json
and dataset_statistics.json (and, if asked for, the tokenizer: then nothing is missing
without a network). ``OctoTeacher.from_pretrained(DST)`` gives the same labels bit for bit.
"""

from __future__ import annotations

import argparse
import os
import shutil
from collections.abc import Sequence
from pathlib import Path

from torchrl._utils import logger

from torchrl_rpd.teachers.octo._checkpoint import (
    WEIGHTS,
    find_checkpoint,
    load_checkpoint,
    save_copy,
)
from torchrl_rpd.teachers.octo._language import find_tokenizer


def convert(
    source: str | os.PathLike[str],
    destination: str | os.PathLike[str],
    *,
    step: int | None = None,
    revision: str | None = None,
    tokenizer: str | os.PathLike[str] | None = None,
) -> Path:
    """Writes the copy.

    Args:
        source (str or path): folder or Hub id of a checkpoint of Octo.
        destination (str or path): folder to write; made where it is missing.

    Keyword Args:
        step (int, optional): which saved step. Defaults to the last one.
        revision (str, optional): of a Hub repository.
        tokenizer (str or path, optional): a ``tokenizer.json``, a folder that holds one
            or a Hub id, to keep with the copy. Defaults to the one beside the
            checkpoint, if there is one.

    Returns:
        the destination.

    Raises:
        FileExistsError: if the destination holds weights already.

    Examples:
        >>> import tempfile
        >>> from torchrl_rpd.teachers.octo import write_random_checkpoint
        >>> from torchrl_rpd.teachers.octo.convert import convert
        >>> source = write_random_checkpoint(tempfile.mkdtemp(), layout="msgpack")
        >>> copy = convert(source, tempfile.mkdtemp())
        >>> sorted(file.name for file in copy.iterdir())[-2:]
        ['model.safetensors', 'tokenizer.json']
    """
    folder = find_checkpoint(source, step=step, revision=revision)
    destination = Path(destination)
    if (destination / WEIGHTS).exists():
        raise FileExistsError(f"{destination} holds a {WEIGHTS} already.")
    checkpoint = load_checkpoint(folder, step)
    destination.mkdir(parents=True, exist_ok=True)
    for name in ("config.json", "dataset_statistics.json"):
        shutil.copyfile(folder / name, destination / name)
    if tokenizer is None and (folder / "tokenizer.json").exists():
        tokenizer = folder
    if tokenizer is not None:
        shutil.copyfile(find_tokenizer(tokenizer), destination / "tokenizer.json")
    save_copy(destination, checkpoint.config, checkpoint.state, checkpoint.step)
    return destination


def main(arguments: Sequence[str] | None = None) -> None:
    """The command line."""
    parser = argparse.ArgumentParser(
        prog="python -m torchrl_rpd.teachers.octo.convert",
        description=(__doc__ or "").split("\n")[0],
    )
    parser.add_argument("source", help="folder or Hub id of Octo's checkpoint")
    parser.add_argument("destination", type=Path, help="folder to write")
    parser.add_argument("--step", type=int, help="which saved step; the last one")
    parser.add_argument("--revision", help="of the Hub repository")
    parser.add_argument("--tokenizer", help="a tokenizer to keep with it, e.g. t5-base")
    args = parser.parse_args(arguments)
    copy = convert(
        args.source,
        args.destination,
        step=args.step,
        revision=args.revision,
        tokenizer=args.tokenizer,
    )
    megabytes = (copy / WEIGHTS).stat().st_size / 1e6
    logger.info(f"{copy / WEIGHTS}: {megabytes:.0f} MB")


if __name__ == "__main__":
    main()
