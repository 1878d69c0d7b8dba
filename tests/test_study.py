# Copyright (c) the torchrl_rpd authors.
#
# This source code is licensed under the MIT license found in the
# LICENSE file in the root directory of this source tree.
"""The study's runner: what is left to do, and its pages from made-up results."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

pytest.importorskip("hydra")
pytest.importorskip("matplotlib")

from hydra import compose, initialize_config_dir

from benchmarks import study
from benchmarks.study_groups import GROUPS, Group
from examples.rpd import nonsense

ROOT = Path(__file__).parents[1]


@pytest.fixture
def made_up(monkeypatch, tmp_path):
    """Two arms with two seeds, and a folder of their own."""
    group = Group(
        "Made up",
        "task=push_cube frames=1000",
        {"rpd": "algo=rpd", "imitation": "algo=imitation"},
        (0, 1),
    )
    monkeypatch.setitem(GROUPS, "made_up", group)
    monkeypatch.setattr(study, "RESULTS", tmp_path / "results")
    return group


def results(algo: str, seed: int, success: float, teacher: float) -> dict:
    """What examples/rpd.py writes, as far as the pages read it."""

    def share(value: float) -> dict:
        estimate = {"mean": value, "low": value, "high": value, "n": 200}
        return {"success_once": estimate, "success_at_end": estimate}

    return {
        "algo": algo,
        "task": "PushCube-v1",
        "reward": "sparse",
        "labels": "scripted_goal",
        "preset": "cpu",
        "seed": seed,
        "frames": 1000,
        "seconds": 1800.0,
        "teacher": share(teacher),
        "student": share(success),
        "teacher_stats": {"queries": 250, "seconds": 1.0},
        "curve": [(500, success / 2), (1000, success)],
    }


def enter(algo: str, seed: int, success: float, teacher: float = 0.4) -> None:
    """As if this run were done."""
    job = study.Job("made_up", algo, seed)
    done = study.load("made_up")
    done["machine"] = {"cpu": "none", "cores": 2}
    done["runs"][job.name] = {
        "overrides": job.overrides,
        "results": results(algo, seed, success, teacher),
    }
    study.save("made_up", done)


def names(jobs: list) -> list[str]:
    """Of the runs."""
    return [job.name for job in jobs]


def test_what_is_left(made_up, monkeypatch):
    # All arms of a seed before the next seed.
    whole = ["rpd-seed0", "imitation-seed0", "rpd-seed1", "imitation-seed1"]
    assert names(study.todo(["made_up"], None)) == whole
    enter("imitation", 0, 0.5)
    assert names(study.todo(["made_up"], None)) == [whole[0], *whole[2:]]
    assert names(study.todo(["made_up"], [7])) == ["rpd-seed7", "imitation-seed7"]
    # Other settings: what was measured with the old ones does not count.
    other = Group(made_up.title, "task=push_cube frames=2000", made_up.arms, (0, 1))
    monkeypatch.setitem(GROUPS, "made_up", other)
    assert names(study.todo(["made_up"], None)) == whole
    assert study.Job("made_up", "rpd", 0).frames == 2000


def test_the_hours_of_the_plan():
    state = study.Job("best_goal", "rpd", 0)
    pictures = study.Job("vla_push_cube", "rpd", 0)
    assert state.hours == pytest.approx(state.frames / 220 / 3600)
    assert pictures.hours == pytest.approx(72_000 / 70 / 3600)


def test_a_page(made_up):
    for seed, (rpd, imitation) in enumerate([(0.90, 0.50), (0.94, 0.30)]):
        enter("rpd", seed, rpd)
        enter("imitation", seed, imitation)
    page = study.page("made_up")
    # Mean 0.92; the t interval of two values is 0.92 -+ 12.706 * 0.02828 / sqrt(2),
    # so down to 0.666. A fourth of the frames was asked about; 4 half hours.
    assert (
        "RPD 92.0, lower bound 66.6: above teacher (40.0), above imitation alone (40.0)"
        in page
    )
    assert "Queries of the teacher: 25.0 % of the frames" in page
    assert "Runs: 4, 2.0 hours of training added up" in page
    assert "`env.num_workers=1 env.num_envs=16 trainer.progress_bar=false " in page
    assert (study.RESULTS / "made_up.png").stat().st_size > 1000
    assert (study.RESULTS / "made_up.md").read_text() == page


def test_a_page_that_shows_no_refinement(made_up):
    for seed in (0, 1):
        enter("rpd", seed, 0.5 + 0.1 * seed, teacher=0.6)
        enter("imitation", seed, 0.9, teacher=0.6)
    assert "NOT above teacher (60.0), NOT above imitation alone (90.0)" in study.page(
        "made_up"
    )


def test_a_page_of_one_seed_claims_nothing(made_up):
    enter("rpd", 0, 0.9)
    enter("imitation", 0, 0.5)
    assert "RPD 90.0: one seed so far, which has no interval." in study.page("made_up")


def test_the_committed_results_are_of_these_settings():
    for name in GROUPS:
        file = ROOT / "benchmarks" / "results" / "study" / f"{name}.json"
        if not file.exists():
            continue
        runs = json.loads(file.read_text())["runs"]
        for run_name, run in runs.items():
            arm, seed = run_name.rsplit("-seed", 1)
            assert run["overrides"] == study.Job(name, arm, int(seed)).overrides
            assert run["results"]["seed"] == int(seed)


def test_every_command_makes_sense():
    commands = {
        tuple(study.Job(name, arm, 0).overrides)
        for name, group in GROUPS.items()
        for arm in group.arms
    }
    with initialize_config_dir(str(ROOT / "examples" / "conf"), version_base="1.3"):
        for words in sorted(commands):
            cfg = compose("config", overrides=list(words))
            assert nonsense(cfg) is None, words
            # The plan reads the budget from the command line.
            assert f"frames={cfg.frames}" in words


@pytest.mark.parametrize(
    ("group", "student"), [("vla_push_cube", "rgb"), ("best_goal", "state")]
)
def test_what_the_student_sees_is_in_the_title(group, student):
    config = study.config_of(study.Job(group, "rpd", 0).overrides)
    assert config["sees.student"] == student


if __name__ == "__main__":
    pytest.main([__file__])
