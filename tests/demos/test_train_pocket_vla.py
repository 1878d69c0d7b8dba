# Copyright (c) the torchrl_rpd authors.
#
# This source code is licensed under the MIT license found in the
# LICENSE file in the root directory of this source tree.
"""The script that trains the pocket VLA: what it reads, learns, writes and refuses."""

from __future__ import annotations

import sys
from pathlib import Path

import pytest
import torch
from demo_files import write
from tensordict import TensorDict

from torchrl_rpd.teachers import PocketVLATeacher

sys.path.insert(0, str(Path(__file__).parents[2] / "examples"))
import train_pocket_vla


def run(monkeypatch: pytest.MonkeyPatch, *words: str) -> None:
    monkeypatch.setattr(sys, "argv", ["train_pocket_vla.py", *words])
    train_pocket_vla.main()


@pytest.mark.parametrize("extra", [(), ("--bfloat16",)])
def test_learns_what_was_recorded(tmp_path, monkeypatch, capsys, extra):
    write(tmp_path / "push.h5", (3, 5), cameras=["human"], success=(True, False))
    out = tmp_path / "vla.safetensors"
    sizes = ("--image-size", "16", "--batch-size", "16", "--updates", "60")
    words = (str(tmp_path), "--keep-failures", "--out", str(out), *sizes, *extra)
    run(monkeypatch, *words)
    assert "8 frames of 2 episodes" in capsys.readouterr().out
    teacher = PocketVLATeacher("PushCube-v1", path=out)
    assert teacher.config["image_size"] == 16
    assert teacher.metadata["episodes"] == 2
    # The actions lie in [0, 0.14]: an untrained model's answers are ten times as far off.
    assert teacher.metadata["error"] < 0.1
    images = torch.zeros(1, 3, 16, 16, dtype=torch.uint8)
    chunk = teacher(TensorDict({("observation", "image"): images}, [1]))
    assert ((chunk["vla_action", "chunk"] - 0.07).abs() < 0.1).all()


def test_leaves_failures_out(tmp_path, monkeypatch, capsys):
    write(tmp_path / "push.h5", (3, 5), cameras=["human"], success=(True, False))
    out = str(tmp_path / "vla.safetensors")
    sizes = ("--image-size", "16", "--batch-size", "4", "--updates", "1")
    run(monkeypatch, str(tmp_path), "--out", out, *sizes)
    assert (
        "3 frames of 1 episodes, left out: {'no success': 1}" in capsys.readouterr().out
    )


def test_no_demonstrations(tmp_path, monkeypatch):
    with pytest.raises(
        SystemExit, match=r"train_pocket_vla\.py: There is no \.h5 file"
    ):
        run(monkeypatch, str(tmp_path))


def test_another_camera(tmp_path, monkeypatch):
    write(tmp_path / "push.h5", (3,), cameras=["human"])
    with pytest.raises(SystemExit, match="no pictures of"):
        run(monkeypatch, str(tmp_path), "--camera", "wrist")
