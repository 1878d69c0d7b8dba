# Copyright (c) the torchrl_rpd authors.
#
# This source code is licensed under the MIT license found in the
# LICENSE file in the root directory of this source tree.
"""Checkpoints on disk: Octo's own layout, and the converted copy."""

from __future__ import annotations

import dataclasses
import json
import os
from collections.abc import Mapping
from pathlib import Path
from typing import Any, NamedTuple

import torch
from torch import Tensor

from torchrl_rpd._safetensors import written_whole
from torchrl_rpd.teachers._hub import resolve_checkpoint
from torchrl_rpd.teachers.octo._config import OctoConfig, T5Config
from torchrl_rpd.teachers.octo._msgpack import read_arrays
from torchrl_rpd.teachers.octo._weights import fit, to_state_dict

FORMAT = "torchrl_rpd.octo/1"
WEIGHTS = "model.safetensors"


class Checkpoint(NamedTuple):
    """What a checkpoint holds."""

    config: OctoConfig
    state: dict[str, Tensor]
    statistics: dict[str, Any]
    step: int
    folder: Path


def find_checkpoint(
    path_or_repo: str | os.PathLike[str],
    *,
    step: int | None = None,
    **hub: Any,
) -> Path:
    """The folder of a checkpoint, downloaded where needed (without what is not read)."""
    # Not example_batch.msgpack: all that it tells is in config.json and the arrays.
    steps = "*/default/*" if step is None else f"{step}/default/*"
    patterns = ["*.json", WEIGHTS, steps]
    return resolve_checkpoint(
        path_or_repo, allow_patterns=patterns, extra="octo", **hub
    )


def load_checkpoint(folder: Path, step: int | None = None) -> Checkpoint:
    """Reads configuration, weights and statistics.

    Args:
        folder (Path): a folder as :meth:`octo.model.OctoModel.save_pretrained` writes
            it, or a converted copy.
        step (int, optional): which of the saved steps. Defaults to the last one.

    Raises:
        FileNotFoundError: if a file, or the step, is not there.
        ValueError: if the checkpoint is not one that is supported.
    """
    config = OctoConfig.from_json(_read_json(folder / "config.json"))
    statistics = _read_json(folder / "dataset_statistics.json")
    if (folder / WEIGHTS).exists():
        config, state, step = _load_copy(folder / WEIGHTS, config, step)
    else:
        step = _choose_step(folder, step)
        arrays = read_arrays(_array_file(folder, step))
        config = fit(config, {name: tuple(a.shape) for name, a in arrays.items()})
        state = to_state_dict(arrays, config)
    return Checkpoint(config, state, statistics, step, folder)


def save_copy(
    folder: Path, config: OctoConfig, state: Mapping[str, Tensor], step: int
) -> None:
    """Writes the weights that :func:`load_checkpoint` reads without msgpack."""
    from safetensors.torch import save_file

    header = {
        "format": FORMAT,
        "step": str(step),
        "image_size": json.dumps(dict(config.image_size)),
        "text": json.dumps(dataclasses.asdict(config.text)),
    }
    with written_whole(folder / WEIGHTS) as partial:
        save_file(dict(state), partial, metadata=header)


def _load_copy(
    file: Path, config: OctoConfig, step: int | None
) -> tuple[OctoConfig, dict[str, Tensor], int]:
    from safetensors import safe_open

    with safe_open(str(file), framework="pt") as content:
        header = content.metadata() or {}
        if header.get("format") != FORMAT:
            raise ValueError(
                f"{file} is no copy that torchrl_rpd.teachers.octo.convert wrote (format "
                f"{header.get('format')!r}, expected {FORMAT!r})."
            )
        saved = int(header["step"])
        if step not in (None, saved):
            raise FileNotFoundError(f"{file} holds step {saved}, not step {step}.")
        state = {name: content.get_tensor(name) for name in content.keys()}
    config = dataclasses.replace(
        config,
        image_size=json.loads(header["image_size"]),
        text=T5Config(**json.loads(header["text"])),
    )
    return config, state, saved


def _choose_step(folder: Path, step: int | None) -> int:
    saved = sorted(
        int(entry.name)
        for entry in folder.iterdir()
        if entry.is_dir() and entry.name.isdecimal()
    )
    if not saved:
        raise FileNotFoundError(
            f"{folder} holds no saved step (a folder with a number for a name) and no "
            f"{WEIGHTS}; is it an Octo checkpoint?"
        )
    if step is None:
        return saved[-1]
    if step not in saved:
        raise FileNotFoundError(f"{folder} holds the steps {saved}, not step {step}.")
    return step


def _array_file(folder: Path, step: int) -> Path:
    default = folder / str(step) / "default"
    file = default / "checkpoint"
    if not file.is_file():
        found = sorted(p.name for p in default.iterdir()) if default.is_dir() else []
        raise FileNotFoundError(
            f"There is no file {file} (found: {found[:4]}). Checkpoints whose arrays "
            "lie in files of their own (OCDBT, zarr) are not supported: load one with "
            "the original and save it by OctoModel.save_pretrained on one host."
        )
    return file


def _read_json(file: Path) -> dict[str, Any]:
    if not file.is_file():
        raise FileNotFoundError(f"There is no {file.name} in {file.parent}.")
    return json.loads(file.read_text())


def choose_statistics(
    statistics: Mapping[str, Any], unnorm_key: str | None
) -> dict[str, Any]:
    """The action statistics, from a flat dataset_statistics.json or a keyed one.

    Raises:
        ValueError: if the key is missing, unknown or of no use.
    """
    if "action" in statistics and "mean" in statistics["action"]:
        if unnorm_key is not None:
            raise ValueError(
                f"unnorm_key={unnorm_key!r}: the statistics of this checkpoint are of "
                "one data set (fine-tuned) and have no keys; leave unnorm_key out."
            )
        return statistics["action"]
    keys = sorted(statistics)
    if unnorm_key is None and len(keys) == 1:
        unnorm_key = keys[0]
    if unnorm_key is None or unnorm_key not in statistics:
        raise ValueError(
            f"unnorm_key={unnorm_key!r}: this checkpoint has the statistics of several "
            f"data sets; choose one of {keys}."
        )
    return statistics[unnorm_key]["action"]


class Normalisation(torch.nn.Module):
    """Undoes the normalisation of actions: ``a * std + mean`` where the mask is True.

    Args:
        statistics (mapping): ``mean`` and ``std`` of each action dimension and, if some
            were not normalised, ``mask``.

    Examples:
        >>> import torch
        >>> statistics = {"mean": [1.0, 1.0], "std": [2.0, 2.0], "mask": [True, False]}
        >>> Normalisation(statistics)(torch.tensor([[0.5, 0.5]]))
        tensor([[2.0000, 0.5000]])
    """

    mean: Tensor
    std: Tensor
    mask: Tensor

    def __init__(self, statistics: Mapping[str, Any]) -> None:
        super().__init__()
        mean = torch.tensor(statistics["mean"], dtype=torch.float32)
        mask = statistics.get("mask", [True] * len(mean))
        self.register_buffer("mean", mean)
        self.register_buffer("std", torch.tensor(statistics["std"]).to(mean))
        self.register_buffer("mask", torch.tensor(mask, dtype=torch.bool))

    def forward(self, action: Tensor) -> Tensor:
        """Maps normalised actions ``[..., A]`` to the data set's own units."""
        return torch.where(self.mask, action * self.std + self.mean, action)
