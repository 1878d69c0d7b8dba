# Copyright (c) the torchrl_rpd authors.
#
# This source code is licensed under the MIT license found in the
# LICENSE file in the root directory of this source tree.
"""RLDS data sets as a replay buffer."""

from __future__ import annotations

import io
import json
from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
from tensordict import TensorDictBase

from torchrl_rpd.data._buffer import DemoInfo, Demos, Item, episode_rows, skipped
from torchrl_rpd.data._hdf5 import BrokenEpisode
from torchrl_rpd.data._tfrecord import Values, decode_example, read_records, require
from torchrl_rpd.data._trajectories import CameraChoice

_TEXTS = ("language_instruction", "observation/natural_language_instruction")
_STATES = ("state", "proprio")


class RLDSDemos(Demos):
    """A replay buffer of an RLDS data set, read without TensorFlow.

    Reads what TensorFlow Datasets keeps on disk for robot episodes (``dataset_info.json``,
    ``features.json`` and TFRecord shards), the format of Open X-Embodiment, of what
    OpenVLA and Octo are trained on, and of the demonstrations that the authors of Refined
    Policy Distillation published: ``steps`` with ``observation`` (pictures, perhaps a
    state), ``action`` (7 numbers) and ``language_instruction``. The rows are those of
    :class:`ManiSkillDemos`. Every step counts, the last one too, as in OpenVLA's and
    Octo's own reading; what RLDS does not tell (success, seeds) is left out. The actions
    are passed on as they are: whether the gripper lies in [0, 1] or [-1, 1] is the data
    set's affair, and ``metadata.action_low`` and ``action_high`` show it.

    Damaged and truncated shards lose the episodes they have lost, no others: they are
    counted in ``skipped_by_reason`` as ``"truncated shard"``, ``"damaged shard"``,
    ``"damaged record"``, ``"missing shard"``, ``"no Example"``, ``"missing data"``,
    ``"wrong length"``, ``"unreadable picture"``, ``"NaN in actions"`` or
    ``"NaN in the state"``. Needs the extra ``rlds``.

    Args:
        path (path): the folder with ``dataset_info.json``, or one above it that holds a
            single data set in a single version.

    Keyword Args:
        split (str): the split. Default: ``"train"``.
        cameras (str, sequence of str or mapping, optional): which pictures to read, by
            their names in ``features.json``, or which fills which entry
            (``{"image": "exterior_1"}``). Defaults to all: the only one, or the one
            called ``image``, becomes ``("observation", "image")``; others keep their
            names, with ``_image`` added where they do not end so.
        state (str or sequence of str, optional): observations that are joined to the
            state. ``"auto"`` is ``"state"`` or ``"proprio"`` where there is one; ``None``
            is no state. Default: ``"auto"``.
        instruction (str, optional): overrides what the episodes say.
        chunk_size (int, optional): length of the action chunks. Defaults to none.
        batch_size (int, optional): rows of a sample.
        scratch_dir (path, optional): keeps the rows in memory-mapped files there.
            Defaults to main memory.
        transform (Transform, optional): applied to each sampled batch.
        **kwargs: passed to :class:`~torchrl.data.TensorDictReplayBuffer`.

    Attributes:
        episodes (list of DemoInfo): source, instruction and length of each.
        skipped (list of SkippedDemo): what was left out, and why.
        instructions (list of str): the different instructions.
        metadata (RobotDatasetMetadata): action statistics, cameras.

    Raises:
        FileNotFoundError: if there is no data set.
        ValueError: if it is in another format than TFRecord, lacks a split, a camera or
            an action of plain numbers, or no episode is left.
        ImportError: if the extra ``rlds`` is missing.

    RLDS: Ramos et al., `arXiv:2111.02767 <https://arxiv.org/abs/2111.02767>`_.

    Examples:
        >>> from torchrl_rpd.data import RLDSDemos
        >>> try:
        ...     demos = RLDSDemos("no/such/folder")
        ... except FileNotFoundError as error:
        ...     print(error)
        There is no dataset_info.json in no/such/folder, nor in a folder in it.
    """

    def __init__(
        self,
        path: str | Path,
        *,
        split: str = "train",
        cameras: CameraChoice = None,
        state: str | Sequence[str] | None = "auto",
        instruction: str | None = None,
        chunk_size: int | None = None,
        batch_size: int | None = None,
        scratch_dir: str | Path | None = None,
        transform: Callable[[TensorDictBase], TensorDictBase] | None = None,
        **kwargs: Any,
    ) -> None:
        reader = _Reader(
            _folder(Path(path)), split, cameras, state, instruction=instruction
        )
        super().__init__(
            reader.items(),
            capacity=reader.steps(),
            metadata={
                "dataset_id": reader.name,
                "camera_keys": tuple(("observation", e) for e in reader.cameras),
            },
            chunk_size=chunk_size,
            scratch_dir=scratch_dir,
            transform=transform,
            batch_size=batch_size,
            **kwargs,
        )


class _Reader:
    """The episodes of one split."""

    def __init__(
        self,
        folder: Path,
        split: str,
        cameras: CameraChoice,
        state: str | Sequence[str] | None,
        *,
        instruction: str | None,
    ) -> None:
        info = _load(folder / "dataset_info.json")
        self.folder, self.name = folder, info["name"]
        self.instruction = instruction
        kind = info.get("fileFormat", "tfrecord")
        if kind != "tfrecord":
            raise ValueError(
                f"{folder} keeps its episodes as {kind}; only TFRecord can be read. "
                "Convert it with TensorFlow Datasets."
            )
        splits = {s["name"]: s.get("shardLengths", []) for s in info.get("splits", [])}
        if split not in splits:
            raise ValueError(f"{folder} has no split {split!r}, but {sorted(splits)}.")
        self.split = split
        self.shard_lengths = [int(n) for n in splits[split]]
        steps = _features(_load(folder / "features.json"))["steps"]
        steps = _features(steps["sequence"]["feature"])
        observation = _features(steps["observation"])
        pictures = [n for n, feature in observation.items() if "image" in feature]
        self.cameras = _entries(pictures, cameras)
        self.state = _state(observation, state)
        action = steps.get("action", {}).get("tensor")
        if action is None or len(_shape(action)) != 1:
            raise ValueError(
                f"{folder}: the actions are no vectors of plain numbers; "
                "features.json describes them as "
                f"{sorted(steps.get('action', {'nothing': 0}))}."
            )
        self.action_dim = _shape(action)[0]
        self.text = next((t for t in _TEXTS if _has(steps, t)), None)
        if self.text is None and instruction is None:
            raise ValueError(
                f"{folder} holds no instruction: pass instruction='...'. The steps have "
                f"{sorted(steps)}."
            )

    def records(self) -> Iterator[tuple[str, dict[str, Values] | BrokenEpisode]]:
        """Every episode that there should be, by its source."""
        count = len(self.shard_lengths)
        for shard, expected in enumerate(self.shard_lengths):
            file = f"{self.name}-{self.split}.tfrecord-{shard:05d}-of-{count:05d}"
            lost = BrokenEpisode("missing shard", file)
            number = 0
            if (self.folder / file).is_file():
                for data in read_records(self.folder / file):
                    if isinstance(data, BrokenEpisode) and data.reason.endswith(
                        "shard"
                    ):
                        lost = data
                        break
                    yield f"{file}:{number}", _decoded(data)
                    number += 1
                else:
                    lost = BrokenEpisode("truncated shard", file)
            for missing in range(number, expected):
                yield f"{file}:{missing}", lost

    def steps(self) -> int:
        """At least as many rows as can be read."""
        total = 0
        for _, values in self.records():
            if not isinstance(values, BrokenEpisode):
                total += len(values.get("steps/action", ())) // self.action_dim
        return total

    def items(self) -> Iterator[Item]:
        """The episodes: rows, or why there are none."""
        for source, values in self.records():
            try:
                if isinstance(values, BrokenEpisode):
                    raise values
                yield self._episode(source, values)
            except BrokenEpisode as error:
                yield skipped(source, error)

    def _episode(
        self, source: str, values: dict[str, Values]
    ) -> tuple[DemoInfo, TensorDictBase]:
        flat = _numbers(values, "steps/action")
        length = len(flat) // self.action_dim
        action = _rows(flat, length, "action")
        if action.shape[1] != self.action_dim:
            raise BrokenEpisode("wrong length", f"action {len(flat)} numbers")
        if not np.isfinite(action).all():
            raise BrokenEpisode("NaN in actions", "")
        observation = {
            entry: _pictures(values, f"steps/observation/{name}", length)
            for entry, name in self.cameras.items()
        }
        if self.state:
            parts = [
                _rows(_numbers(values, f"steps/observation/{name}"), length, name)
                for name in self.state
            ]
            state = np.concatenate(parts, 1).astype(np.float32)
            if not np.isfinite(state).all():
                raise BrokenEpisode("NaN in the state", "")
            observation["state"] = torch.from_numpy(state)
        terminal = values.get("steps/is_terminal")
        reward = None
        if isinstance(found := values.get("steps/reward"), np.ndarray):
            reward = torch.from_numpy(_rows(found, length, "reward"))
        rows = episode_rows(
            observation=observation,
            action=torch.from_numpy(action.astype(np.float32)),
            terminated=isinstance(terminal, np.ndarray) and bool(terminal[-1:].any()),
            reward=reward,
            success=None,
        )
        return DemoInfo(source, self._instruction(values), length), rows

    def _instruction(self, values: dict[str, Values]) -> str:
        if self.instruction is not None:
            return self.instruction
        texts = values.get(f"steps/{self.text}")
        if not isinstance(texts, list) or not texts:
            raise BrokenEpisode("missing data", str(self.text))
        return texts[0].decode("utf-8", "replace")


def _decoded(data: bytes | BrokenEpisode) -> dict[str, Values] | BrokenEpisode:
    if isinstance(data, BrokenEpisode):
        return data
    try:
        return decode_example(data)
    except BrokenEpisode as error:
        return error


def _numbers(values: dict[str, Values], name: str) -> np.ndarray:
    found = values.get(name)
    if not isinstance(found, np.ndarray) or not len(found):
        raise BrokenEpisode("missing data", name)
    return found


def _rows(values: np.ndarray, length: int, name: str) -> np.ndarray:
    if length == 0 or len(values) % length:
        raise BrokenEpisode("wrong length", f"{name}: {len(values)} in {length} steps")
    return values.reshape(length, -1)


def _pictures(values: dict[str, Values], name: str, length: int) -> torch.Tensor:
    """``[T, 3, H, W]`` uint8 from PNG or JPEG files."""
    image = require("PIL.Image")
    files = values.get(name)
    if not isinstance(files, list):
        raise BrokenEpisode("missing data", name)
    if len(files) != length:
        raise BrokenEpisode("wrong length", f"{name}: {len(files)} in {length} steps")
    pictures, size = [], None
    for data in files:
        try:
            # Two formats, not every parser that Pillow has.
            with image.open(io.BytesIO(data), formats=("PNG", "JPEG")) as picture:
                size = picture.size if size is None else size
                if picture.size != size:
                    raise BrokenEpisode("unreadable picture", f"{name}: sizes differ")
                pictures.append(np.asarray(picture.convert("RGB")))
        except (OSError, ValueError, image.DecompressionBombError) as error:
            raise BrokenEpisode("unreadable picture", f"{name}: {error}") from None
    stacked = np.stack(pictures).transpose(0, 3, 1, 2)
    return torch.from_numpy(np.ascontiguousarray(stacked))


def _folder(path: Path) -> Path:
    if (path / "dataset_info.json").is_file():
        return path
    found = sorted(
        file.parent
        for depth in ("*", "*/*")
        for file in path.glob(f"{depth}/dataset_info.json")
    )
    if not found:
        raise FileNotFoundError(
            f"There is no dataset_info.json in {path}, nor in a folder in it."
        )
    if len(found) > 1:
        raise ValueError(
            f"There are several data sets in {path}; name one: {[*map(str, found)]}."
        )
    return found[0]


def _load(path: Path) -> dict[str, Any]:
    try:
        loaded: dict[str, Any] = json.loads(path.read_text())
    except FileNotFoundError:
        raise FileNotFoundError(f"There is no {path}.") from None
    except ValueError as error:
        raise ValueError(f"{path} cannot be read as JSON: {error}") from error
    return loaded


def _features(feature: dict[str, Any]) -> dict[str, Any]:
    found: dict[str, Any] = feature.get("featuresDict", {}).get("features", {})
    return found


def _has(steps: dict[str, Any], path: str) -> bool:
    *parents, name = path.split("/")
    for parent in parents:
        steps = _features(steps.get(parent, {}))
    return name in steps


def _shape(tensor: dict[str, Any]) -> list[int]:
    return [int(n) for n in tensor.get("shape", {}).get("dimensions", [])]


def _entries(pictures: Sequence[str], wanted: CameraChoice) -> dict[str, str]:
    """The entries of the observation that pictures are written to."""
    if isinstance(wanted, Mapping):
        names = dict(wanted)
    else:
        chosen = pictures if wanted is None else wanted
        chosen = [chosen] if isinstance(chosen, str) else list(chosen)
        names = {n if n.endswith("image") else f"{n}_image": n for n in chosen}
        if len(names) == 1:
            names = {"image": next(iter(names.values()))}
    if unknown := sorted(set(names.values()) - set(pictures)):
        raise ValueError(
            f"There are no pictures {unknown}. features.json has {list(pictures)}."
        )
    return names


def _state(
    observation: dict[str, Any], wanted: str | Sequence[str] | None
) -> tuple[str, ...]:
    tensors = [n for n, feature in observation.items() if "tensor" in feature]
    if wanted is None:
        return ()
    if wanted == "auto":
        return tuple(n for n in _STATES if n in tensors)[:1]
    names = (wanted,) if isinstance(wanted, str) else tuple(wanted)
    if unknown := sorted(set(names) - set(tensors)):
        raise ValueError(
            f"There are no observations {unknown}. features.json has {tensors}."
        )
    return names
