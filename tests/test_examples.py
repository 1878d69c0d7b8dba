# Copyright (c) the torchrl_rpd authors.
#
# This source code is licensed under the MIT license found in the
# LICENSE file in the root directory of this source tree.
"""The examples and benchmarks run from the command line, at a small size."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]

pytestmark = pytest.mark.maniskill


def run(*args: object) -> str:
    done = subprocess.run(
        [sys.executable, "-W", "ignore", *map(str, args)],
        cwd=ROOT,
        capture_output=True,
        text=True,
        timeout=600,
    )
    assert done.returncode == 0, done.stderr[-3000:]
    return done.stdout


def test_demo_writes_everything_and_its_student_can_be_evaluated(tmp_path):
    pytest.importorskip("matplotlib")
    out = run(
        "examples/demo.py",
        *("--frames", 1600, "--episodes", 16, "--workers", 2, "--out", tmp_path),
    )
    assert "teacher" in out
    names = {"student.safetensors", "table.txt", "curve.png", "result.json"}
    assert {file.name for file in tmp_path.iterdir()} == names
    table = (tmp_path / "table.txt").read_text()
    assert table in out
    result = json.loads((tmp_path / "result.json").read_text())
    assert result["frames"] == 1600
    # One query per stored frame, and those that the last rollout ends with.
    assert result["teacher_stats"]["queries"] == 1600 + 16
    assert (tmp_path / "curve.png").read_bytes()[:4] == b"\x89PNG"
    again = run("examples/evaluate.py", tmp_path, "--episodes", 2, "--envs", 2)
    assert "success_once" in again
    assert "PickCube-v1" in again


def test_evaluate_names_what_is_missing(tmp_path):
    done = subprocess.run(
        [sys.executable, "examples/evaluate.py", str(tmp_path)],
        cwd=ROOT,
        capture_output=True,
        text=True,
    )
    assert done.returncode == 2
    assert "make demo" in done.stderr


def test_loop():
    out = run("examples/rpd_loop.py", "--frames", 4000, "--episodes", 4)
    assert "teacher queries 4016" in out
    assert "success_once" in out


def test_trainer(tmp_path):
    out = run(
        "examples/rpd_trainer.py",
        *("--frames", 1600, "--episodes", 4, "--out", tmp_path / "log"),
    )
    # The cosine reaches 0 with the last batch.
    assert "'queries': 1616" in out
    scalars = {file.stem for file in (tmp_path / "log").rglob("*.csv")}
    assert {"loss_distill", "kl_k3", "ppo_active"} <= scalars


def test_benchmark_of_memory():
    out = run("-m", "benchmarks.reset_memory", "--resets", 20, "--tasks", "PushCube-v1")
    assert "MiB per 100 resets" in out


def test_benchmark_of_scripted_teachers():
    out = run(
        *("-m", "benchmarks.scripted_success", "--tasks", "PushCube-v1"),
        *("--episodes", 2, "--envs", 2),
    )
    assert "| PushCube-v1 |" in out


@pytest.mark.slow
def test_remote_benchmark():
    pytest.importorskip("websockets")
    out = run(
        *("-m", "benchmarks.remote_teacher", "--rows", 2, "--rounds", 1, "--calls", 1)
    )
    assert "| 2 | websocket |" in out


if __name__ == "__main__":
    pytest.main([__file__])
