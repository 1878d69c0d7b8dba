# Copyright (c) the torchrl_rpd authors.
#
# This source code is licensed under the MIT license found in the
# LICENSE file in the root directory of this source tree.
"""Reads the tensors of a checkpoint straight to where they are used."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from pathlib import Path

import torch
from torch import nn

from torchrl_rpd.teachers._hub import require
from torchrl_rpd.teachers.openvla._config import read_json

_INDEX = "model.safetensors.index.json"
_SINGLE = "model.safetensors"


def load_weights(
    model: nn.Module,
    folder: Path,
    *,
    device: torch.device,
    dtype: torch.dtype,
    unused: Sequence[str] = (),
) -> None:
    """Fills a model that was built on the meta device.

    One shard is open at a time and one tensor of it is read at a time, onto ``device``
    and in ``dtype``; host memory never holds the model twice.

    Args:
        model (nn.Module): with parameters on the meta device, replaced in place.
        folder (path): with ``model.safetensors``, or shards and their index.

    Keyword Args:
        device (torch.device): where to.
        dtype (torch.dtype): as what.
        unused (sequence of str): prefixes of tensors that are skipped unread.

    Raises:
        FileNotFoundError: if the weights, or one of their shards, are missing.
        ValueError: if names or shapes are not those of the model.
    """
    safe_open = require("safetensors").safe_open
    shards = _shards(folder, safe_open)
    wanted = {name: tensor.shape for name, tensor in model.state_dict().items()}
    skipped = tuple(unused)
    found = {
        name
        for names in shards.values()
        for name in names
        if not name.startswith(skipped)
    }
    _compare(folder, wanted.keys(), found)
    for file, names in shards.items():
        with safe_open(str(file), framework="pt", device=str(device)) as shard:
            for name in sorted(found.intersection(names)):
                shape = torch.Size(shard.get_slice(name).get_shape())
                if shape != wanted[name]:
                    raise ValueError(
                        f"{file} has {name} of shape {list(shape)}; the model has "
                        f"{list(wanted[name])}."
                    )
                tensor = shard.get_tensor(name)
                # On a CPU the tensor is a window to the file: a copy lets go of it.
                copy = tensor.device.type == "cpu"
                _assign(model, name, tensor.to(dtype=dtype, copy=copy))


def _shards(folder: Path, safe_open: type) -> dict[Path, list[str]]:
    """The files and the tensors that each holds."""
    if (folder / _INDEX).is_file():
        listed = read_json(folder / _INDEX)["weight_map"]
        files = {name: folder / file for name, file in listed.items()}
    elif (folder / _SINGLE).is_file():
        with safe_open(str(folder / _SINGLE), framework="pt") as shard:
            files = dict.fromkeys(shard.keys(), folder / _SINGLE)
    else:
        there = sorted(path.name for path in folder.iterdir())
        raise FileNotFoundError(
            f"{folder} holds neither {_INDEX} nor {_SINGLE}, only {there}. Weights are "
            "read from safetensors alone (pickled ones can run code)."
        )
    shards: dict[Path, list[str]] = {}
    for name, file in files.items():
        shards.setdefault(file, []).append(name)
    missing = sorted(file.name for file in shards if not file.is_file())
    if missing:
        raise FileNotFoundError(
            f"{folder} lacks {missing}, which its index names: the download is not "
            "complete."
        )
    return shards


def _compare(folder: Path, wanted: Iterable[str], found: Iterable[str]) -> None:
    missing = sorted(set(wanted) - set(found))
    unknown = sorted(set(found) - set(wanted))
    if missing or unknown:
        raise ValueError(
            f"The weights in {folder} are not those of this model: {len(missing)} "
            f"missing ({missing[:3]}), {len(unknown)} unknown ({unknown[:3]})."
        )


def _assign(model: nn.Module, name: str, tensor: torch.Tensor) -> None:
    path, _, leaf = name.rpartition(".")
    setattr(model.get_submodule(path), leaf, nn.Parameter(tensor, requires_grad=False))
