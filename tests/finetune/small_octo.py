# Copyright (c) the torchrl_rpd authors.
#
# This source code is licensed under the MIT license found in the
# LICENSE file in the root directory of this source tree.
"""An Octo of 64-pixel images: the stems of the real one are slow on a CPU."""

from __future__ import annotations

import dataclasses
import json
from pathlib import Path

from torchrl_rpd.teachers.octo._msgpack import write_arrays
from torchrl_rpd.teachers.octo._weights import array_shapes
from torchrl_rpd.teachers.octo.random_checkpoint import (
    _let_denoise,
    _random,
    _tokenizer,
    published_config,
    random_config,
)

STEP = 1000


def write_small_octo(folder: Path) -> Path:
    """Random weights in the published layout; only the main camera."""
    folder.mkdir(parents=True, exist_ok=True)
    config = published_config("tiny")
    del config["model"]["observation_tokenizers"]["wrist"]
    (folder / "config.json").write_text(json.dumps(config))
    statistics = {"mean": [0.0] * 7, "std": [1.0] * 7, "mask": [True] * 6 + [False]}
    (folder / "dataset_statistics.json").write_text(json.dumps({"action": statistics}))
    _tokenizer().save(str(folder / "tokenizer.json"))
    small = dataclasses.replace(
        random_config("tiny"),
        image_size={"primary": 64},
        goal_stacked={"primary": True},
    )
    arrays = {name: _random(name, s, 0) for name, s in array_shapes(small).items()}
    _let_denoise(arrays)
    write_arrays(folder / str(STEP) / "default" / "checkpoint", arrays)
    (folder / "example_batch.msgpack").write_bytes(b"not read here")
    return folder
