# Copyright (c) the torchrl_rpd authors.
#
# This source code is licensed under the MIT license found in the
# LICENSE file in the root directory of this source tree.
"""Small trajectory files as ManiSkill writes them, made of numbers that can be guessed."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest

h5py = pytest.importorskip(
    "h5py", reason="needs h5py: pip install 'torchrl_rpd[maniskill]'"
)


def actions(episode: int, length: int) -> np.ndarray:
    """Action ``t`` of an episode is ``episode / 10 + t / 100`` in every dimension."""
    steps = np.arange(length, dtype=np.float32)[:, None] / 100 + episode / 10
    return np.tile(steps, (1, 7)).astype(np.float32)


def pictures(episode: int, length: int, size: int = 4) -> np.ndarray:
    """``[T + 1, H, W, 3]``: pixel (0, 0) of frame ``t`` is (episode, t, 7)."""
    out = np.zeros((length + 1, size, size + 2, 3), np.uint8)
    out[:, 0, 0] = [[episode, t, 7] for t in range(length + 1)]
    return out


def rgb_observation(episode: int, length: int, cameras: list[str]) -> dict[str, Any]:
    """Nested observations of ``obs_mode="rgb"``."""
    qpos = np.full((length + 1, 9), episode, np.float32)
    qpos[:, 0] = np.arange(length + 1)
    return {
        "agent": {"qpos": qpos, "qvel": -qpos},
        "extra": {"tcp_pose": np.full((length + 1, 7), 0.5, np.float32)},
        "sensor_param": {"base_camera": {"cam2world_gl": np.zeros((length + 1, 4, 4))}},
        "sensor_data": {c: {"rgb": pictures(episode, length)} for c in cameras},
    }


def put(group: Any, tree: dict[str, Any]) -> None:
    for name, value in tree.items():
        if isinstance(value, dict):
            put(group.create_group(name), value)
        else:
            packed = {"compression": "gzip"} if name == "rgb" else {}
            group.create_dataset(name, data=value, **packed)


def write(
    path: Path,
    lengths: tuple[int, ...] = (3, 5),
    *,
    task_id: str = "PushCube-v1",
    cameras: list[str] | None = None,
    obs_mode: str = "rgb",
    control_mode: str = "pd_ee_delta_pose",
    success: tuple[bool, ...] | None = None,
    instruction: str | None = None,
    rewards: bool = False,
    first_seed: int = 100,
) -> Path:
    """Writes ``path`` and its JSON."""
    entries = []
    with h5py.File(path, "w") as file:
        for i, length in enumerate(lengths):
            good = success is None or success[i]
            flags = np.zeros(length, bool)
            flags[-1] = good
            tree: dict[str, Any] = {
                "actions": actions(i, length),
                "terminated": flags,
                "truncated": np.zeros(length, bool),
                "success": flags,
            }
            if rewards:
                tree["rewards"] = np.arange(length, dtype=np.float32)
            if obs_mode == "rgb":
                tree["obs"] = rgb_observation(i, length, cameras or ["base_camera"])
            elif obs_mode == "state":
                tree["obs"] = np.full((length + 1, 35), i, np.float32)
            put(file.create_group(f"traj_{i}"), tree)
            entry = {
                "episode_id": i,
                "episode_seed": first_seed + i,
                "reset_kwargs": {"seed": first_seed + i, "options": None},
                "control_mode": control_mode,
                "elapsed_steps": length,
                "success": good,
            }
            if instruction is not None:
                entry["instruction"] = instruction
            entries.append(entry)
    described = {
        "env_info": {
            "env_id": task_id,
            "env_kwargs": {"obs_mode": obs_mode, "control_mode": control_mode},
            "max_episode_steps": 50,
        },
        "episodes": entries,
    }
    path.with_suffix(".json").write_text(json.dumps(described))
    return path


def edit_json(path: Path, change: Any) -> None:
    """Applies ``change`` to the JSON beside ``path``."""
    file = path.with_suffix(".json")
    described = json.loads(file.read_text())
    change(described)
    file.write_text(json.dumps(described))
