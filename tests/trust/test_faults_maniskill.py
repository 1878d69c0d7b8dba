# Copyright (c) the torchrl_rpd authors.
#
# This source code is licensed under the MIT license found in the
# LICENSE file in the root directory of this source tree.
"""The faults of tests/trust/test_faults.py that need ManiSkill."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import uuid
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import pytest
from faulty_parts import ROOT, processes_with, wait_for
from hydra import compose, initialize_config_dir

from torchrl_rpd.envs import _rendering

pytestmark = pytest.mark.maniskill

SHORT = [
    *("task=push_cube", "frames=1600", "episodes=2", "check_teacher=false"),
    *("env.num_envs=2", "evaluation.episodes=2", "checkpoint.every=200"),
    *("trainer.progress_bar=false", "trainer.num_epochs=1"),
]


def sentence(rpd, folder: Path, *words: str) -> str:
    """What a run that cannot start says."""
    place = [f"runs={folder.parent}", f"name={folder.name}"]
    with initialize_config_dir(str(ROOT / "examples" / "conf"), version_base="1.3"):
        cfg = compose("config", overrides=[*SHORT, "env.num_workers=1", *words, *place])
    with pytest.raises(SystemExit) as ended:
        rpd.main(cfg)
    assert "Traceback" not in ended.value.code
    return ended.value.code.split("\n")[0]


def test_missing_renderer(rpd, tmp_path, monkeypatch):
    monkeypatch.setattr(_rendering, "can_draw", lambda device: False)
    said = sentence(rpd, tmp_path / "run", "student=rgb")
    assert said.startswith("rpd.py: RuntimeError: obs_mode='rgb+state' draws pictures")
    assert "mesa-vulkan-drivers" in said


@pytest.mark.render
def test_wrong_camera(rpd, tmp_path):
    words = ("student=rgb", "env.camera=ceiling", "env.image_size=32")
    said = sentence(rpd, tmp_path / "run", *words)
    assert "There is no camera 'ceiling' here. Choose from" in said


def test_unknown_task(rpd, tmp_path):
    said = sentence(rpd, tmp_path / "run", "env.task_id=PushCub-v1", "algo=ppo")
    assert "ManiSkill has no task 'PushCub-v1'. Similar names: ['PushCube-v1'" in said


@contextmanager
def command(folder: Path) -> Iterator[tuple[subprocess.Popen, str]]:
    """rpd.py with simulators in two worker processes, once it has a checkpoint."""
    mark = f"RPD_TEST={uuid.uuid4()}"
    name, _, value = mark.partition("=")
    process = subprocess.Popen(
        [
            *(sys.executable, "-W", "ignore", ROOT / "examples" / "rpd.py", *SHORT),
            *("env.num_workers=2", f"runs={folder.parent}", f"name={folder.name}"),
        ],
        env={**os.environ, "PYTHONPATH": str(ROOT), name: value},
        cwd=folder.parent,
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
        start_new_session=True,
    )
    try:
        assert wait_for(lambda: any(folder.glob("checkpoints/checkpoint-*")), 600)
        yield process, mark
    finally:
        process.kill()
        process.wait()


@pytest.mark.slow
def test_a_simulators_process_is_killed(tmp_path):
    with command(tmp_path / "run") as (process, mark):
        # Those of the training and of the learning curve; it asks one of them soon.
        workers = [
            p for p, line in processes_with(mark).items() if "spawn_main" in line
        ]
        assert len(workers) == 4
        for worker in workers:
            os.kill(worker, signal.SIGKILL)
        said = process.communicate(timeout=600)[1]
    assert process.returncode == 1
    assert "rpd.py: A worker process of the environments died" in said
    assert "The same command goes on from" in said
    assert "Traceback" not in said
    assert wait_for(lambda: not processes_with(mark))


@pytest.mark.slow
def test_ctrl_c(tmp_path):
    with command(tmp_path / "run") as (process, mark):
        os.killpg(process.pid, signal.SIGINT)  # to the workers as well
        out, said = process.communicate(timeout=600)
    assert process.returncode == 130, said[-3000:]
    assert "SIGINT: the same command goes on from here" in out
    assert "Traceback" not in said
    assert wait_for(lambda: not processes_with(mark))


if __name__ == "__main__":
    pytest.main([__file__])
