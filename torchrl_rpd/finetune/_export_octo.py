# Copyright (c) the torchrl_rpd authors.
#
# This source code is licensed under the MIT license found in the
# LICENSE file in the root directory of this source tree.
"""Writes a fine-tuned Octo in the published layout."""

from __future__ import annotations

import json
import os
import shutil
from collections.abc import Mapping
from pathlib import Path
from typing import Any, Literal, get_args

import torch
from torch import Tensor

from torchrl_rpd.finetune._files import new_folder
from torchrl_rpd.finetune._octo import is_standardised
from torchrl_rpd.teachers.octo import OctoTeacher
from torchrl_rpd.teachers.octo._checkpoint import find_checkpoint, save_copy
from torchrl_rpd.teachers.octo._model import OctoModel
from torchrl_rpd.teachers.octo._msgpack import write_arrays
from torchrl_rpd.teachers.octo._weights import Rule, _to_oihw, rules, to_state_dict

Layout = Literal["msgpack", "safetensors"]


def export_octo(
    teacher: OctoTeacher,
    folder: str | os.PathLike[str],
    *,
    base: str | os.PathLike[str],
    statistics: Mapping[str, Any],
    step: int,
    unnorm_key: str | None = None,
    layout: Layout = "msgpack",
    **hub: Any,
) -> Path:
    """Writes a fine-tuned Octo as the original saves its own.

    ``<step>/default/checkpoint`` holds the arrays in the original's names and shapes,
    image kernels before their standardisation; ``config.json`` is the base's with
    ``window_size`` 1, which it was trained with (the original's ``finetune.py`` does
    the same). ``example_batch.msgpack``, ``_METADATA`` and ``tokenizer.json`` are copied
    where the base has them. Written beside and moved: an interrupted export leaves no
    half checkpoint.

    Args:
        teacher (OctoTeacher): from :func:`load_octo`, trained.
        folder (str or path): must not exist, or be empty.

    Keyword Args:
        base (str or path): the checkpoint that it was loaded from.
        statistics (mapping): that it was trained with.
        step (int): the folder's name: steps that it was trained for.
        unnorm_key (str, optional): the statistics' name. Defaults to ``None``: they
            have none, as those of the original's fine-tuned checkpoints, and
            ``from_pretrained`` needs none.
        layout ("msgpack" or "safetensors"): as the original saves it, or as
            ``python -m torchrl_rpd.teachers.octo.convert`` does. Defaults to
            ``"msgpack"``.
        **hub: ``revision``, ``cache_dir`` and ``local_files_only`` of the base.

    Returns:
        the folder.

    Raises:
        FileExistsError: if there is something in the folder.
        ValueError: for an unknown layout or a negative step.

    Examples:
        >>> import tempfile
        >>> from pathlib import Path
        >>> import torch
        >>> from torchrl_rpd.finetune import action_statistics, export_octo, load_octo
        >>> from torchrl_rpd.teachers.octo import OctoTeacher, write_random_checkpoint
        >>> base = write_random_checkpoint(tempfile.mkdtemp())
        >>> statistics = action_statistics(2 * torch.rand(50, 7) - 1)
        >>> tuned = export_octo(
        ...     load_octo(base, statistics),
        ...     Path(tempfile.mkdtemp()) / "tuned",
        ...     base=base,
        ...     statistics=statistics,
        ...     step=100,
        ...     unnorm_key="my_demos",
        ... )
        >>> OctoTeacher.from_pretrained(tuned, unnorm_key="my_demos").chunk_size
        4
    """
    if layout not in get_args(Layout):
        raise ValueError(f"layout must be one of {get_args(Layout)}, got {layout!r}.")
    if step < 0:
        raise ValueError(f"step must be at least 0, got {step}.")
    source = find_checkpoint(base, **hub)
    entry = {
        name: _in_octos_words(value) if isinstance(value, Mapping) else value
        for name, value in statistics.items()
    }
    config = json.loads((source / "config.json").read_text())
    files = {
        "config.json": {**config, "window_size": 1},
        "dataset_statistics.json": entry if unnorm_key is None else {unnorm_key: entry},
    }
    arrays = to_arrays(teacher.model)
    with new_folder(folder) as partial:
        for name, content in files.items():
            (partial / name).write_text(json.dumps(content))
        for name in ("example_batch.msgpack", "tokenizer.json"):
            if (source / name).is_file():
                shutil.copyfile(source / name, partial / name)
        if layout == "safetensors":
            state = to_state_dict(arrays, teacher.model.config)
            save_copy(partial, teacher.model.config, state, step)
        else:
            target = partial / str(step) / "default"
            write_arrays(target / "checkpoint", arrays)
            for metadata in sorted(source.glob("*/default/_METADATA"))[-1:]:
                shutil.copyfile(metadata, target / metadata.name)
    return Path(folder)


def _in_octos_words(numbers: Mapping[str, Any]) -> dict[str, Any]:
    names = {"q01": "p01", "q99": "p99"}
    return {names.get(name, name): value for name, value in numbers.items()}


def to_arrays(model: OctoModel) -> dict[str, Tensor]:
    """The checkpoint's arrays, by their path in the tree.

    The inverse of :func:`~torchrl_rpd.teachers.octo._weights.to_state_dict`, for a model
    of :func:`load_octo`.
    """
    state = model.state_dict()
    arrays: dict[str, Tensor] = {}
    for rule in rules(model.config):
        arrays.update(_undo(rule, state[rule.target].detach().cpu()))
    return arrays


def _undo(rule: Rule, tensor: Tensor) -> dict[str, Tensor]:
    """A rule only moves numbers: sent through it, their places tell where to."""
    # (Kernels are trained as they were before they are standardised.)
    convert = _to_oihw if is_standardised(rule.sources) else rule.convert
    places, start = [], 0
    for shape in rule.sources.values():
        size = torch.Size(shape).numel()
        places.append(torch.arange(start, start + size).reshape(shape))
        start += size
    flat = torch.empty(start, dtype=tensor.dtype)
    flat[convert(*places).flatten()] = tensor.flatten()
    sizes = [place.numel() for place in places]
    return {
        name: part.reshape(shape)
        for (name, shape), part in zip(
            rule.sources.items(), flat.split(sizes), strict=True
        )
    }
