# Copyright (c) the torchrl_rpd authors.
#
# This source code is licensed under the MIT license found in the
# LICENSE file in the root directory of this source tree.
"""What the tests of the Octo teacher share: the original's tiny checkpoint and answers.

The checkpoint was saved by Octo's own code. It is not carried: every array is drawn again
from weights_recipe.json (the README of tests/data says how it was recorded), and the file
made of them has the hash of the recorded one.
"""

from __future__ import annotations

import json
import shutil
import zlib
from functools import cache
from pathlib import Path

import numpy as np
import torch

from torchrl_rpd.teachers.octo._msgpack import write_arrays

DATA = Path(__file__).parents[1] / "data" / "octo_tiny"
STEP = 1000
# Of 1000/default/checkpoint as flax wrote it.
SHA256 = "4d9f98e5245d0ecce5470d5acd849d15d0211a8cb536d439c46a5952e22d250a"


@cache
def recipe_arrays() -> dict[str, torch.Tensor]:
    """Every array of the checkpoint, by its path in the tree; do not change them."""
    recipe = json.loads((DATA / "weights_recipe.json").read_text())
    arrays = {}
    for name, entry in recipe["parameters"].items():
        seed = [recipe["seed"], zlib.crc32(name.encode())]
        z = np.random.default_rng(seed).standard_normal(entry["shape"])
        # Rules read "0.1*z" or "1.0+0.1*z".
        offset, factor = 0.0, entry["rule"].removesuffix("*z")
        if "+" in factor:
            offset, factor = (float(part) for part in factor.split("+"))
        arrays[name] = torch.from_numpy((offset + float(factor) * z).astype(np.float32))
    return arrays


def write_checkpoint(folder: Path) -> Path:
    """The checkpoint in the published layout.

    Without example_batch.msgpack (0.7 MB of black images), which the teacher never opens.
    """
    folder.mkdir(parents=True, exist_ok=True)
    for name in ("config.json", "dataset_statistics.json"):
        shutil.copyfile(DATA / name, folder / name)
    write_arrays(folder / str(STEP) / "default" / "checkpoint", recipe_arrays())
    return folder


@cache
def expected() -> dict[str, torch.Tensor]:
    """What the original computed, and from what; images at their full size."""
    with np.load(DATA / "expected.npz") as content:
        out = {name: torch.from_numpy(content[name]) for name in content.files}
    # Each stored pixel is a block of 16x16.
    out["images"] = out["images"].repeat_interleave(16, 2).repeat_interleave(16, 3)
    return out
