# Copyright (c) the torchrl_rpd authors.
#
# This source code is licensed under the MIT license found in the
# LICENSE file in the root directory of this source tree.
"""What OpenVLA's own code computed on a tiny checkpoint, and that checkpoint."""

from __future__ import annotations

import functools
import json
import re
import shutil
import warnings
import zlib
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

DATA = Path(__file__).parents[1] / "data" / "openvla_tiny"
INSTRUCTIONS = json.loads((DATA / "expected.json").read_text())["instructions"]
PROMPT_IDS = json.loads((DATA / "expected.json").read_text())["prompt_ids"]
CHECKPOINT_FILES = (
    "config.json",
    "dataset_statistics.json",
    "preprocessor_config.json",
    "tokenizer.json",
)


def draw(name: str, shape: list[int], rule: str, seed: int) -> np.ndarray:
    """One tensor of the recipe: ``[shift+]scale*z[; rows a:b *= factor]``."""
    bits = [seed, zlib.crc32(name.encode())]
    z = np.random.default_rng(bits).standard_normal(shape)
    match = re.fullmatch(
        r"(?:([\d.]+)\+)?([\d.]+)\*z(?:; rows (\d+):(\d+) \*= (\d+))?", rule
    )
    assert match is not None, rule
    shift, scale, first, last, factor = match.groups()
    values = float(shift or 0) + float(scale) * z
    if factor is not None:
        values[int(first) : int(last)] *= int(factor)
    return values.astype(np.float32)


@functools.cache
def weights() -> dict[str, torch.Tensor]:
    """Every tensor of the recorded checkpoint."""
    recipe = json.loads((DATA / "weights_recipe.json").read_text())
    return {
        name: torch.from_numpy(draw(name, **entry, seed=recipe["seed"]))
        for name, entry in recipe["parameters"].items()
    }


def write_checkpoint(folder: Path, **config: Any) -> Path:
    """The recorded checkpoint, with entries of its config.json replaced."""
    from safetensors.torch import save_file

    folder.mkdir(parents=True, exist_ok=True)
    for name in CHECKPOINT_FILES:
        shutil.copyfile(DATA / name, folder / name)
    if config:
        edit(folder / "config.json", **config)
    save_file(weights(), folder / "model.safetensors")
    return folder


def edit(file: Path, **entries: Any) -> None:
    """Replaces entries of a JSON file; None takes one out."""
    content = {**json.loads(file.read_text()), **entries}
    content = {key: value for key, value in content.items() if value is not None}
    file.write_text(json.dumps(content))


@functools.cache
def images(kind: str = "images") -> torch.Tensor:
    """``[6, 3, H, W]`` uint8."""
    image = pytest.importorskip("PIL.Image")
    arrays = [np.array(image.open(DATA / f"{kind}_{i}.png")) for i in range(6)]
    return torch.from_numpy(np.stack(arrays)).permute(0, 3, 1, 2).contiguous()


@functools.cache
def expected() -> dict[str, torch.Tensor]:
    """Tokens, actions and logits of the original code."""
    with np.load(DATA / "expected.npz") as file:
        return {name: torch.from_numpy(file[name]) for name in file}


def load(folder: Path, **kwargs: Any) -> Any:
    """A teacher, without the warning about this checkpoint's gripper."""
    from torchrl_rpd.teachers.openvla import OpenVLATeacher

    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", message=".*gripper.*")
        return OpenVLATeacher.from_pretrained(folder, **kwargs)
