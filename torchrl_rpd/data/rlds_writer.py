# Copyright (c) the torchrl_rpd authors.
#
# This source code is licensed under the MIT license found in the
# LICENSE file in the root directory of this source tree.
"""Demonstrations as an RLDS data set, for the fine-tuning of OpenVLA and Octo."""

from __future__ import annotations

import io
import json
import os
import re
from pathlib import Path
from typing import Any

import numpy as np
import torch
from tensordict import TensorDictBase

from torchrl_rpd.data._buffer import DemoInfo, Demos
from torchrl_rpd.data._tfrecord import Values, encode_example, require, write_record

_CORE = "tensorflow_datasets.core.features."


def write_rlds(
    demos: Demos,
    folder: str | Path,
    *,
    name: str = "maniskill_demos",
    version: str = "1.0.0",
    split: str = "train",
    episodes_per_shard: int = 100,
    description: str = "",
) -> Path:
    """Writes demonstrations as an RLDS data set, without TensorFlow.

    What TensorFlow Datasets would write for a builder of this name: the layout that
    OpenVLA's and Octo's training reads from ``folder`` (their ``data_root_dir``) under
    this name. Each step has ``observation`` (every picture as PNG, and ``state`` where
    there is one), ``action``, ``language_instruction``, ``reward``, ``discount``,
    ``is_first``, ``is_last`` and ``is_terminal``; each episode says where it comes from
    in ``episode_metadata``. Actions are written as they are: ManiSkill's gripper is 1
    open and -1 closed. Needs the extra ``rlds``.

    Args:
        demos (ManiSkillDemos or RLDSDemos): the demonstrations.
        folder (path): where data sets are kept.

    Keyword Args:
        name (str): name of the data set: lower case letters, digits and ``_``.
            Default: ``"maniskill_demos"``.
        version (str): three numbers. Default: ``"1.0.0"``.
        split (str): name of the split. Default: ``"train"``.
        episodes_per_shard (int): episodes in each file. Default: ``100``.
        description (str): a text about the data.

    Returns:
        Path: the folder of this version, ``<folder>/<name>/<version>``.

    Raises:
        FileExistsError: if that version is there.
        ValueError: for a name or version that TensorFlow Datasets would refuse.
        ImportError: if the extra ``rlds`` is missing.

    Examples:
        >>> from torchrl_rpd.data import write_rlds
        >>> try:
        ...     write_rlds(None, "data", name="My Demos")
        ... except ValueError as error:
        ...     print(error)
        name must be lower case letters, digits and _, got 'My Demos'.
    """
    if not re.fullmatch(r"[a-z][a-z0-9_]*", name):
        raise ValueError(
            f"name must be lower case letters, digits and _, got {name!r}."
        )
    if not re.fullmatch(r"\d+\.\d+\.\d+", version):
        raise ValueError(f"version must be three numbers like 1.0.0, got {version!r}.")
    if episodes_per_shard < 1:
        raise ValueError(
            f"episodes_per_shard must be at least 1: {episodes_per_shard}."
        )
    target = Path(folder) / name / version
    if (target / "dataset_info.json").exists():
        raise FileExistsError(f"{target} holds a data set; choose another version.")
    target.mkdir(parents=True, exist_ok=True)
    count = len(demos.episodes)
    shards = [
        range(i, min(count, i + episodes_per_shard))
        for i in range(0, count, episodes_per_shard)
    ]
    size = 0
    for number, episodes in enumerate(shards):
        file_name = f"{name}-{split}.tfrecord-{number:05d}-of-{len(shards):05d}"
        with open(target / file_name, "wb") as file:
            for i in episodes:
                data = encode_example(_example(demos.episode(i), demos.episodes[i]))
                write_record(file, data)
                size += len(data)
    _dump(target / "features.json", _features(demos.episode(0)))
    info = {
        "description": description,
        "fileFormat": "tfrecord",
        "name": name,
        "splits": [
            {
                "filepathTemplate": "{DATASET}-{SPLIT}.{FILEFORMAT}-{SHARD_X_OF_Y}",
                "name": split,
                "numBytes": str(size),
                "shardLengths": [str(len(shard)) for shard in shards],
            }
        ],
        "version": version,
    }
    # Last: a data set that was not written to its end is none.
    _dump(target / "dataset_info.json", info)
    return target


def _example(rows: TensorDictBase, info: DemoInfo) -> dict[str, Values]:
    length = info.length
    values: dict[str, Values] = {}
    for name, value in rows["observation"].items():
        values[f"steps/observation/{name}"] = (
            [_png(picture) for picture in value]
            if _is_picture(value)
            else value.numpy()
        )
    values["steps/action"] = rows["action"].numpy()
    values["steps/language_instruction"] = [info.instruction.encode()] * length
    reward = rows.get(("next", "reward"), None)
    values["steps/reward"] = (
        np.zeros(length, np.float32) if reward is None else reward.flatten().numpy()
    )
    values["steps/discount"] = np.ones(length, np.float32)
    first, last = np.zeros(length, bool), np.zeros(length, bool)
    first[0] = last[-1] = True
    values["steps/is_first"], values["steps/is_last"] = first, last
    values["steps/is_terminal"] = rows["next", "terminated"].flatten().numpy()
    values["episode_metadata/file_path"] = [info.source.encode()]
    seed = -1 if info.seed is None else info.seed
    values["episode_metadata/episode_seed"] = np.array([seed])
    return values


def _is_picture(value: torch.Tensor) -> bool:
    return value.dtype == torch.uint8 and value.ndim == 4


def _png(picture: torch.Tensor) -> bytes:
    file = io.BytesIO()
    pixels = picture.permute(1, 2, 0).contiguous().numpy()
    require("PIL.Image").fromarray(pixels).save(file, "PNG")
    return file.getvalue()


def _features(rows: TensorDictBase) -> dict[str, Any]:
    """What ``features.json`` says: the types, as TensorFlow Datasets 4.9 writes them."""
    observation = {
        name: _image(value) if _is_picture(value) else _tensor(value)
        for name, value in rows["observation"].items()
    }
    flags = {n: _scalar("bool") for n in ("is_first", "is_last", "is_terminal")}
    step = {
        "observation": _dict(observation),
        "action": _tensor(rows["action"]),
        "language_instruction": _text(),
        "reward": _scalar("float32"),
        "discount": _scalar("float32"),
        **flags,
    }
    metadata = {"file_path": _text(), "episode_seed": _scalar("int64")}
    steps = {
        "pythonClassName": f"{_CORE}dataset_feature.Dataset",
        "sequence": {"feature": _dict(step), "length": "-1"},
    }
    return _dict({"steps": steps, "episode_metadata": _dict(metadata)})


def _dict(features: dict[str, Any]) -> dict[str, Any]:
    return {
        "pythonClassName": f"{_CORE}features_dict.FeaturesDict",
        "featuresDict": {"features": features},
    }


def _image(value: torch.Tensor) -> dict[str, Any]:
    _, channels, height, width = value.shape
    shape = {"dimensions": [str(height), str(width), str(channels)]}
    return {
        "pythonClassName": f"{_CORE}image_feature.Image",
        "image": {"dtype": "uint8", "encodingFormat": "png", "shape": shape},
    }


def _tensor(value: torch.Tensor) -> dict[str, Any]:
    shape = {"dimensions": [str(n) for n in value.shape[1:]]}
    return {
        "pythonClassName": f"{_CORE}tensor_feature.Tensor",
        "tensor": {"dtype": "float32", "encoding": "none", "shape": shape},
    }


def _scalar(dtype: str) -> dict[str, Any]:
    return {
        "pythonClassName": f"{_CORE}scalar.Scalar",
        "tensor": {"dtype": dtype, "encoding": "none", "shape": {}},
    }


def _text() -> dict[str, Any]:
    return {"pythonClassName": f"{_CORE}text_feature.Text", "text": {}}


def _dump(path: Path, content: dict[str, Any]) -> None:
    unfinished = path.with_suffix(".tmp")
    unfinished.write_text(json.dumps(content, indent=2, sort_keys=True))
    os.replace(unfinished, path)
