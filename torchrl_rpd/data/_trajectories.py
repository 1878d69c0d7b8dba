# Copyright (c) the torchrl_rpd authors.
#
# This source code is licensed under the MIT license found in the
# LICENSE file in the root directory of this source tree.
"""One trajectory file of ManiSkill's: HDF5 and JSON side by side."""

from __future__ import annotations

import json
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from tensordict import TensorDictBase

from torchrl_rpd.data._buffer import DemoInfo, Item, episode_rows, skipped
from torchrl_rpd.data._hdf5 import BrokenEpisode, child, find, leaves, open_hdf5, read
from torchrl_rpd.envs.tasks import TASKS

CameraChoice = str | Sequence[str] | Mapping[str, str] | None
_HAND_CAMERA = "hand_camera"


@dataclass(frozen=True)
class Selection:
    """What is read of each episode.

    Args:
        cameras: entries of the observation, each with the camera that fills it.
        state: paths under ``obs`` that are joined to the state; ``""`` is ``obs``.
        instruction: overrides what the file says.
        success_only: leaves out what did not succeed.
        outcomes: which of ``"rewards"`` and ``"success"`` are read.
        intended: reads ``intended_actions`` where there are some.
    """

    cameras: dict[str, str]
    state: tuple[str, ...]
    instruction: str | Mapping[str, str] | None
    success_only: bool
    outcomes: frozenset[str]
    intended: bool


class TrajectoryFile:
    """An open trajectory file.

    Args:
        path (Path): the HDF5 file; its JSON lies beside it under the same name.
    """

    def __init__(self, path: Path) -> None:
        self.path = path
        self.json_path = path.with_suffix(".json")
        described = _load_json(self.json_path)
        self.entries: list[dict[str, Any]] = described["episodes"]
        self.env_info: dict[str, Any] = described.get("env_info") or {}
        self.file = open_hdf5(path)

    def close(self) -> None:
        """Closes the HDF5 file."""
        self.file.close()

    @property
    def task_id(self) -> str | None:
        """The task, where the file tells it."""
        return self.env_info.get("env_id")

    @property
    def env_kwargs(self) -> dict[str, Any]:
        """The arguments that the environment was made with."""
        return self.env_info.get("env_kwargs") or {}

    def control_modes(self) -> set[str]:
        """The control modes of the episodes, without those that do not tell."""
        default = self.env_kwargs.get("control_mode")
        modes = {entry.get("control_mode", default) for entry in self.entries}
        return {mode for mode in modes if mode is not None}

    def steps(self) -> int:
        """At least as many rows as can be read."""
        total = 0
        for entry in self.entries:
            try:
                actions = find(self.file, f"{_name(entry)}/actions")
            except BrokenEpisode:
                continue
            total += actions.shape[0] if getattr(actions, "shape", ()) else 0
        return total

    def outcomes(self) -> frozenset[str]:
        """Which of rewards and success are recorded, from the first group."""
        for entry in self.entries:
            try:
                group = child(self.file, _name(entry))
            except BrokenEpisode:
                continue
            if group is not None:
                return frozenset(group) & {"rewards", "success"}
        return frozenset()

    def observed(self) -> tuple[list[str], list[str]]:
        """The cameras with colours, and the paths of numbers, of the first whole group.

        A path is relative to ``obs``; a flat state is ``""``.
        """
        for entry in self.entries:
            try:
                obs = find(self.file, f"{_name(entry)}/obs")
                if obs is None:
                    continue
                if hasattr(obs, "shape"):
                    return [], [""]
                paths = list(leaves(obs))
            except BrokenEpisode:
                continue
            cameras = [
                parts[1]
                for path in paths
                if (parts := path.split("/"))[0] == "sensor_data" and parts[-1] == "rgb"
            ]
            numbers = [p for p in paths if not p.startswith(("sensor_", "image/"))]
            return cameras, numbers
        return [], []

    def iterate(self, selection: Selection) -> Iterator[Item]:
        """The episodes one after the other: rows, or why there are none."""
        known = set()
        for entry in self.entries:
            name = _name(entry)
            known.add(name)
            source = f"{self.path.name}:{name}"
            try:
                yield self._episode(entry, source, selection)
            except BrokenEpisode as error:
                yield skipped(source, error)
        for name in self.file:
            if name.startswith("traj_") and name not in known:
                unknown = BrokenEpisode("not in the JSON", self.json_path.name)
                yield skipped(f"{self.path.name}:{name}", unknown)

    def _episode(
        self, entry: dict[str, Any], source: str, selection: Selection
    ) -> tuple[DemoInfo, TensorDictBase]:
        group = child(self.file, _name(entry))
        if group is None or hasattr(group, "shape"):
            raise BrokenEpisode("no such group", self.path.name)
        disturbed = selection.intended and "intended_actions" in group
        action = read(group, "intended_actions" if disturbed else "actions")
        length = action.shape[0]
        if action.ndim != 2 or length == 0:
            raise BrokenEpisode("wrong length", f"actions have shape {action.shape}")
        if action.dtype.kind != "f" or not np.isfinite(action).all():
            raise BrokenEpisode(
                "NaN in actions", f"{int((~np.isfinite(action)).sum())} values"
            )
        told = entry.get("elapsed_steps", length)
        if told != length:
            raise BrokenEpisode(
                "wrong length", f"{length} actions, the JSON says {told} steps"
            )
        success = _flags(group, "success", length)
        succeeded = entry.get("success")
        if succeeded is None and success is not None:
            succeeded = bool(success[-1])
        if selection.success_only and not succeeded:
            told = "not told" if succeeded is None else "failed"
            raise BrokenEpisode("no success", told)
        terminated = _flags(group, "terminated", length)
        reward = None
        if "rewards" in selection.outcomes:
            reward = torch.from_numpy(read(group, "rewards", length))
        flags = None
        if "success" in selection.outcomes:
            flags = torch.from_numpy(read(group, "success", length))
        rows = episode_rows(
            observation=_observation(group, length, selection),
            action=torch.from_numpy(action.astype(np.float32)),
            # Recorded without ending the episode, success may come and go: the last
            # step alone tells how it ended.
            terminated=bool(succeeded) if terminated is None else bool(terminated[-1]),
            reward=reward,
            success=flags,
        )
        info = DemoInfo(
            source=source,
            instruction=self._instruction(entry, selection.instruction),
            length=length,
            seed=_seed(entry),
            success=None if succeeded is None else bool(succeeded),
            task_id=self.task_id,
        )
        return info, rows

    def _instruction(
        self, entry: dict[str, Any], wanted: str | Mapping[str, str] | None
    ) -> str:
        if isinstance(wanted, str):
            return wanted
        task = self.task_id
        if wanted is not None and task is not None and task in wanted:
            return wanted[task]
        text = entry.get("instruction")
        if text is None and task in TASKS:
            text = TASKS[task].instruction
        if not isinstance(text, str) or not text.strip():
            raise ValueError(
                f"{self.json_path.name} holds no instruction, and the task table has "
                f"none for {self.task_id}: pass instruction='...'."
            )
        return text


def _observation(
    group: Any, length: int, selection: Selection
) -> dict[str, torch.Tensor]:
    """Pictures channels first, and the state; the last observation is not used."""
    out: dict[str, torch.Tensor] = {}
    for entry, camera in selection.cameras.items():
        path = f"obs/sensor_data/{camera}/rgb"
        pictures = read(group, path, length + 1)
        if pictures.dtype != np.uint8 or pictures.ndim != 4 or pictures.shape[-1] != 3:
            raise BrokenEpisode(
                "no RGB pictures", f"{path} is {pictures.dtype} {pictures.shape}"
            )
        # Copied, so that the storage gets each row in one piece.
        out[entry] = torch.from_numpy(
            np.ascontiguousarray(pictures[:-1].transpose(0, 3, 1, 2))
        )
    parts = []
    for path in selection.state:
        values = read(group, f"obs/{path}" if path else "obs", length + 1)[:-1]
        values = values.reshape(length, -1).astype(np.float32)
        if not np.isfinite(values).all():
            raise BrokenEpisode("NaN in the state", path or "obs")
        parts.append(values)
    if parts:
        out["state"] = torch.from_numpy(np.concatenate(parts, 1))
    return out


def _name(entry: dict[str, Any]) -> str:
    return f"traj_{entry.get('episode_id')}"


def _flags(group: Any, name: str, length: int) -> np.ndarray | None:
    if name not in group:
        return None
    # [T], or [T, 1] in files of older versions
    return read(group, name, length).reshape(length, -1)[:, 0].astype(bool)


def _seed(entry: dict[str, Any]) -> int | None:
    seed = entry.get("episode_seed", (entry.get("reset_kwargs") or {}).get("seed"))
    if isinstance(seed, list) and len(seed) == 1:
        seed = seed[0]
    return seed if isinstance(seed, int) else None


def _load_json(path: Path) -> dict[str, Any]:
    if not path.is_file():
        raise FileNotFoundError(
            f"There is no {path}: ManiSkill's trajectories are two files, the HDF5 and "
            "a JSON of the same name that tells which episodes it holds."
        )
    try:
        described = json.loads(path.read_text())
    except (ValueError, OSError) as error:
        raise ValueError(f"{path} cannot be read as JSON: {error}") from error
    episodes = described.get("episodes") if isinstance(described, dict) else None
    if not isinstance(episodes, list) or not all(isinstance(e, dict) for e in episodes):
        raise ValueError(f"{path} has no list of episodes: is it a trajectory's JSON?")
    return described


def entries_of(available: Sequence[str], wanted: CameraChoice) -> dict[str, str]:
    """Which camera fills which entry of the observation, named as the adapter does.

    The hand camera is the ``wrist_image``, the first other one the ``image``, the rest
    ``<name>_image``.
    """
    if isinstance(wanted, Mapping):
        names = dict(wanted)
    else:
        chosen = available if wanted is None else wanted
        chosen = [chosen] if isinstance(chosen, str) else list(chosen)
        main = next((c for c in chosen if c != _HAND_CAMERA), None)
        names = {
            "image"
            if camera == main
            else "wrist_image"
            if camera == _HAND_CAMERA
            else f"{camera}_image": camera
            for camera in chosen
        }
    if unknown := sorted(set(names.values()) - set(available)):
        raise ValueError(
            f"There are no pictures of {unknown}. The cameras in the file: "
            f"{list(available) or 'none'}."
        )
    return names
