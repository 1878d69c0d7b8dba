# Copyright (c) the torchrl_rpd authors.
#
# This source code is licensed under the MIT license found in the
# LICENSE file in the root directory of this source tree.
"""Two seeded runs on a CPU are one, bit for bit: docs/determinism.md."""

from __future__ import annotations

import json
import random
from pathlib import Path

import numpy as np
import pytest
import torch
from faulty_parts import ROOT
from hydra import compose, initialize_config_dir
from resumable import assert_same
from safetensors.torch import load_file

# What is not a number of the run: the wall clock, and its names.
CLOCK = ("seconds", "per_second", "time", "fps")


def logged(run: Path) -> dict[str, str]:
    """Everything that was logged, as text, by name."""
    files = {file.stem: file.read_text() for file in run.glob("scalars/*.csv")}
    assert len(files) >= 15
    return {n: text for n, text in files.items() if not any(c in n for c in CLOCK)}


def results(run: Path) -> dict:
    """results.json without the wall clock."""

    def timeless(value):
        if isinstance(value, dict):
            return {k: timeless(v) for k, v in value.items() if "seconds" not in k}
        return value

    return timeless(json.loads((run / "results.json").read_text()))


def assert_equal_runs(one: Path, other: Path) -> None:
    ours, theirs = logged(one), logged(other)
    assert ours.keys() == theirs.keys()
    assert [name for name in ours if ours[name] != theirs[name]] == []
    assert results(one) == results(other)
    assert saved(one).keys() == saved(other).keys()
    assert [
        k for k, v in saved(one).items() if not torch.equal(v, saved(other)[k])
    ] == []


def saved(run: Path) -> dict[str, torch.Tensor]:
    """The student's weights; safetensors writes its header in any order."""
    return load_file(run / "student.safetensors")


def another_past() -> None:
    """What a process has drawn before is not what a run depends on."""
    random.seed(99)
    np.random.seed(99)
    torch.manual_seed(99)
    torch.rand(7)


class TestToy:
    @pytest.mark.parametrize("words", [(), ("teacher_action.query_fraction=0.5",)])
    def test_twice(self, words, start, tmp_path):
        one = start(tmp_path / "one" / "run", *words)
        another_past()
        other = start(tmp_path / "other" / "run", *words)
        assert_equal_runs(one, other)
        last = "checkpoints/checkpoint-000000000512"
        assert_same(one / last, other / last)  # optimiser, generators, counters

    def test_another_seed_is_another_run(self, start, undisturbed, tmp_path):
        other = start(tmp_path / "run", "seed=1")
        ours, theirs = saved(undisturbed), saved(other)
        assert any(not torch.equal(ours[key], theirs[key]) for key in ours)
        assert logged(undisturbed)["loss_distill"] != logged(other)["loss_distill"]


@pytest.mark.maniskill
@pytest.mark.slow
@pytest.mark.parametrize("workers", [1, 2])
def test_maniskill_twice(workers, rpd, tmp_path):
    """The whole of examples/rpd.py, with an imperfect teacher, twice."""
    words = [
        *("task=push_cube", "frames=400", "episodes=4", "evaluation.episodes=4"),
        *("env.num_envs=2", f"env.num_workers={workers}", "checkpoint.every=200"),
        *("evaluation.interval=200", "trainer.progress_bar=false"),
        "flaw=jitter",
    ]
    runs = []
    for name in ("one", "other"):
        another_past()
        torch.rand(len(name))
        with initialize_config_dir(str(ROOT / "examples" / "conf"), version_base="1.3"):
            place = [f"runs={tmp_path / name}", "name=run"]
            cfg = compose("config", overrides=[*words, *place])
        rpd.main(cfg)
        runs.append(tmp_path / name / "run")
    assert_equal_runs(*runs)


if __name__ == "__main__":
    pytest.main([__file__])
