# Copyright (c) the torchrl_rpd authors.
#
# This source code is licensed under the MIT license found in the
# LICENSE file in the root directory of this source tree.
"""Writes ManiSkill's trajectory files so that a killed recording goes on."""

from __future__ import annotations

import json
import os
import shutil
from collections.abc import Mapping, Sequence
from pathlib import Path
from types import TracebackType
from typing import Any

import numpy as np

from torchrl_rpd.data._hdf5 import require_h5py

Tree = Mapping[str, Any]
_PICTURES = ("rgb", "depth", "seg")
_ATTRIBUTE = "round"


class DemoWriter:
    """Writes ManiSkill's trajectory files so that a killed recording goes on.

    HDF5 does not survive being killed while it writes. So each round of episodes goes
    to a file of its own (``<name>.parts/``), which gets its name when it is complete;
    :meth:`close` joins them to ``<name>.h5`` and ``<name>.json``. Killed at any moment,
    also while joining, a new writer of the same path goes on behind the last complete
    round: :attr:`rounds` says which is next. What was interrupted is played again, so
    that no episode is lost and none is there twice.

    The layout is ManiSkill's (``RecordEpisode``, version 3.0): groups ``traj_<id>`` with
    ``obs``, ``actions``, ``terminated``, ``truncated``, and where given ``success``,
    ``fail``, ``rewards`` and ``env_states``; pictures are compressed. The JSON has
    ``env_info`` and ``episodes``; beside ManiSkill's entries each episode may have an
    ``instruction``, and ``recording`` says how the files came to be.

    Args:
        path (path): the HDF5 file to write, ``*.h5``. Folders are made.

    Keyword Args:
        env_info (mapping): ``env_id``, ``env_kwargs`` and ``max_episode_steps``, with
            which ManiSkill makes the environment again.
        settings (mapping, optional): whatever else a recording must go on with
            unchanged, as plain JSON.
        source_type (str, optional): ManiSkill's word for the origin, e.g.
            ``"motionplanning"``.
        source_desc (str, optional): a sentence about it.

    Raises:
        ValueError: if the path has another ending, or the files that are there were
            recorded with other settings.

    Examples:
        >>> import tempfile
        >>> from pathlib import Path
        >>> import numpy as np
        >>> from torchrl_rpd.data import DemoWriter  # h5py comes with mani_skill
        >>> path = Path(tempfile.mkdtemp()) / "push.h5"
        >>> info = {"env_id": "PushCube-v1", "env_kwargs": {}, "max_episode_steps": 50}
        >>> arrays = {
        ...     "obs": np.zeros((3, 35), np.float32),
        ...     "actions": np.zeros((2, 7), np.float32),
        ...     "terminated": np.array([False, True]),
        ...     "truncated": np.array([False, False]),
        ... }
        >>> with DemoWriter(path, env_info=info) as writer:
        ...     writer.add_round([(arrays, {"episode_seed": 5})])
        >>> writer = DemoWriter(path, env_info=info)  # goes on
        >>> writer.rounds, [e["episode_seed"] for e in writer.episodes]
        (1, [5])
    """

    def __init__(
        self,
        path: str | Path,
        *,
        env_info: Mapping[str, Any],
        settings: Mapping[str, Any] | None = None,
        source_type: str | None = None,
        source_desc: str | None = None,
    ) -> None:
        require_h5py()
        self.path = Path(path)
        if self.path.suffix != ".h5":
            raise ValueError(f"Trajectory files end in .h5, got {self.path}.")
        self.json_path = self.path.with_suffix(".json")
        self.parts = self.path.with_suffix(".parts")
        self._fixed = json.loads(
            json.dumps({"env_info": dict(env_info), "settings": dict(settings or {})})
        )
        self._described: dict[str, Any] = {"env_info": self._fixed["env_info"]}
        if source_type is not None:
            self._described["source_type"] = source_type
        if source_desc is not None:
            self._described["source_desc"] = source_desc
        self._merged: list[dict[str, Any]] = []
        #: Number of complete rounds: the next one to be played.
        self.rounds = 0
        #: Number of episodes that were played and not kept.
        self.dropped = 0
        #: What the JSON says of the episodes that are kept, in their order.
        self.episodes: list[dict[str, Any]] = []
        self._read_merged()
        self._read_parts()

    def __enter__(self) -> DemoWriter:
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        self.close()

    def add_round(
        self, episodes: Sequence[tuple[Tree, Mapping[str, Any]]], *, dropped: int = 0
    ) -> None:
        """Adds the episodes of one round; after this call they are safe.

        Args:
            episodes: arrays (nested mappings of NumPy arrays), and what the JSON is to
                say of the episode; ``episode_id`` and ``elapsed_steps`` are added.

        Keyword Args:
            dropped (int): how many episodes of the round are not kept. Default: ``0``.
        """
        h5py = require_h5py()
        self.parts.mkdir(parents=True, exist_ok=True)
        infos = []
        final = self.parts / f"round_{self.rounds:08d}.h5"
        unfinished = final.with_suffix(".tmp")
        with h5py.File(unfinished, "w") as file:
            for i, (arrays, info) in enumerate(episodes):
                _write(file.create_group(f"traj_{i}", track_order=True), arrays)
                steps = len(arrays["actions"])
                infos.append({**_plain(info), "elapsed_steps": steps})
            told = {**self._fixed, "episodes": infos, "dropped": dropped}
            file.attrs[_ATTRIBUTE] = json.dumps(told)
        _rename(unfinished, final)
        self._count(infos, dropped)

    def close(self) -> None:
        """Joins all rounds to the two files."""
        h5py = require_h5py()
        parts = self._complete_parts()
        if parts or not self.json_path.exists():
            unfinished = self.path.with_suffix(".h5.tmp")
            self.path.parent.mkdir(parents=True, exist_ok=True)
            with h5py.File(unfinished, "w") as file:
                if self._merged:
                    with h5py.File(self.path, "r") as old:
                        for entry in self._merged:
                            name = f"traj_{entry['episode_id']}"
                            old.copy(name, file, name)
                number = len(self._merged)
                for part in parts:
                    with h5py.File(part, "r") as new:
                        for name in sorted(new, key=lambda n: int(n[5:])):
                            new.copy(name, file, f"traj_{number}")
                            number += 1
            # The arrays first: until the JSON is there, the parts are joined again.
            _rename(unfinished, self.path)
            entries = [{"episode_id": i, **e} for i, e in enumerate(self.episodes)]
            recording = {
                "rounds": self.rounds,
                "dropped": self.dropped,
                "settings": self._fixed["settings"],
            }
            described = {**self._described, "episodes": entries, "recording": recording}
            text = self.json_path.with_suffix(".json.tmp")
            text.write_text(json.dumps(described, indent=2))
            _rename(text, self.json_path)
            self._merged = entries
        shutil.rmtree(self.parts, ignore_errors=True)

    def _read_merged(self) -> None:
        if not self.json_path.exists():
            return
        described = json.loads(self.json_path.read_text())
        recording = described.get("recording")
        if recording is None:
            raise ValueError(
                f"{self.json_path} is there, and was not recorded by this writer. "
                "Choose another path, or move it away."
            )
        there = {
            "env_info": described["env_info"],
            "settings": recording["settings"],
        }
        self._must_be_same(there, self.json_path)
        self._merged = described["episodes"]
        self.rounds, self.dropped = recording["rounds"], recording["dropped"]
        self.episodes = [
            {k: v for k, v in entry.items() if k != "episode_id"}
            for entry in self._merged
        ]

    def _read_parts(self) -> None:
        h5py = require_h5py()
        for part in self._complete_parts():
            with h5py.File(part, "r") as file:
                told = json.loads(file.attrs[_ATTRIBUTE])
            self._must_be_same(
                {"env_info": told["env_info"], "settings": told["settings"]}, part
            )
            self._count(told["episodes"], told["dropped"])

    def _complete_parts(self) -> list[Path]:
        """The rounds that are complete and not joined yet, in their order."""
        merged = 0
        if self.json_path.exists():
            merged = json.loads(self.json_path.read_text())["recording"]["rounds"]
        return [
            part
            for part in sorted(self.parts.glob("round_*.h5"))
            # Killed after joining, before the folder was removed.
            if int(part.stem.removeprefix("round_")) >= merged
        ]

    def _count(self, infos: list[dict[str, Any]], dropped: int) -> None:
        self.rounds += 1
        self.dropped += dropped
        self.episodes += infos

    def _must_be_same(self, there: dict[str, Any], where: Path) -> None:
        if there == self._fixed:
            return
        differences = [
            f"{key}: {old.get(key)!r} there, {new.get(key)!r} asked for"
            for group in ("env_info", "settings")
            for old, new in [(there[group], self._fixed[group])]
            for key in dict.fromkeys([*old, *new])
            if old.get(key) != new.get(key)
        ]
        raise ValueError(
            f"{where} was recorded with other settings ({'; '.join(differences)}). "
            "Record to another path, or go on with the old settings."
        )


def _write(group: Any, tree: Tree) -> None:
    for name, value in tree.items():
        if isinstance(value, Mapping):
            _write(group.create_group(name, track_order=True), value)
            continue
        value = np.asarray(value)
        if value.dtype.hasobject:
            raise TypeError(
                f"{group.name}/{name} holds objects; only numbers are kept."
            )
        packed = {"compression": "gzip", "compression_opts": 5}
        pictures = name in _PICTURES and value.size > 0
        group.create_dataset(name, data=value, **(packed if pictures else {}))


def _plain(info: Mapping[str, Any]) -> dict[str, Any]:
    """As it will be read back from JSON, so that a resumed writer has the same."""
    plain: dict[str, Any] = json.loads(json.dumps(dict(info)))
    return plain


def _rename(unfinished: Path, final: Path) -> None:
    """Gives a file its name once its content is on the disk."""
    with open(unfinished, "rb") as file:
        os.fsync(file.fileno())
    os.replace(unfinished, final)
