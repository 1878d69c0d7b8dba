# Copyright (c) the torchrl_rpd authors.
#
# This source code is licensed under the MIT license found in the
# LICENSE file in the root directory of this source tree.
"""examples/report.py on runs whose numbers are worked out by hand."""

from __future__ import annotations

import importlib.util
import json
import math
import sys
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest

yaml = pytest.importorskip("yaml")
pytest.importorskip("matplotlib")

ROOT = Path(__file__).parents[1]


@pytest.fixture(scope="module")
def page() -> ModuleType:
    """The script, as a module."""
    spec = importlib.util.spec_from_file_location(
        "examples_report", ROOT / "examples" / "report.py"
    )
    module = importlib.util.module_from_spec(spec)
    # Dataclasses look their module up.
    sys.modules[spec.name] = module
    spec.loader.exec_module(module)
    return module


def write(
    folder: Path,
    *,
    seed: int,
    success: float,
    curve: list[tuple[int, float]],
    algo: str = "rpd",
    task: str = "PickCube-v1",
    reward: str = "normalized_dense",
    labels: str = "scripted",
    teacher: float | None = 0.5,
    config: dict[str, Any] | None = None,
    **results: Any,
) -> Path:
    """What examples/rpd.py leaves of a run."""
    folder.mkdir(parents=True)

    def share(value: float) -> dict[str, dict[str, float]]:
        estimate = {"mean": value, "low": value - 0.05, "high": value + 0.05, "n": 200}
        return {"success_once": estimate, "success_at_end": estimate}

    tree = {
        "seed": seed,
        "name": folder.name,
        "runs": str(folder.parent),
        "logger": {"exp_name": folder.name},
        "env": {"num_envs": 8, "num_workers": 2, "camera": None},
        "sees": {"student": "state"},
        # One teacher for all seeds, whatever they are.
        "teacher": {"seed": 0, "jitter": 0.1},
        "value": {"gamma": 0.8},
        "teacher_action": {"seed": seed},
        "trainer": {
            "seed": seed,
            "gae": {"gamma": 0.8},
            "progress_bar": bool(seed),
            "hooks": [{"interval": 100}, {"seed": seed}],
        },
    }
    for key, value in (config or {}).items():
        at = tree
        *path, last = key.split(".")
        for name in path:
            at = at[name]
        at[last] = value
    (folder / "config.yaml").write_text(yaml.safe_dump(tree))
    content = {
        "algo": algo,
        "task": task,
        "reward": reward,
        "labels": labels,
        "preset": "cpu",
        "seed": seed,
        "frames": 300,
        "resumed": False,
        "seconds": 60.0 + 10 * seed,
        "teacher": None if teacher is None else share(teacher),
        "student": share(success),
        "teacher_stats": {"queries": 0 if algo == "ppo" else 316, "seconds": 1.5},
        "curve": curve,
        "versions": {"torch": "2.0"},
        **results,
    }
    (folder / "results.json").write_text(json.dumps(content))
    return folder


RISES = [(100, 0.2), (200, 0.5), (300, 0.9)]
LATE = [(100, 0.0), (200, 0.4), (300, 0.8)]
FLAT = [(100, 0.0), (200, 0.0), (300, 0.1)]


class TestStatistics:
    def test_interval(self, page):
        # Mean 0.5; deviations -0.1, 0, 0.1, so that the standard deviation is
        # sqrt(0.02 / 2) = 0.1; t(2) = 4.3027: 4.3027 * 0.1 / sqrt(3) = 0.24842.
        mean, low, high = page.interval([0.4, 0.5, 0.6])
        assert mean == pytest.approx(0.5)
        assert low == pytest.approx(0.25158, abs=1e-5)
        assert high == pytest.approx(0.74842, abs=1e-5)

    def test_interval_stays_a_share(self, page):
        # Two seeds: 12.7062 * 0.0707 / sqrt(2) = 0.635.
        assert page.interval([0.9, 1.0])[1:] == (pytest.approx(0.31469), 1.0)

    def test_one_seed_has_none(self, page):
        mean, low, high = page.interval([0.7])
        assert mean == 0.7
        assert math.isnan(low)
        assert math.isnan(high)

    @pytest.mark.parametrize("n", [2, 3, 5, 11, 31, 32, 41, 1001])
    def test_t(self, page, n):
        stats = pytest.importorskip("scipy.stats")
        assert page.t_point(n) == pytest.approx(stats.t.ppf(0.975, n - 1), abs=2e-4)

    def test_steps(self, page):
        assert page.steps_to(RISES, 0.5) == 200  # at the threshold counts
        assert page.steps_to(RISES, 0.7) == 300
        assert page.steps_to(RISES, 0.95) == math.inf

    def test_steps_of_a_running_mean(self, page):
        # Means of three: (0.9 + 0.1) / 2 = 0.5, (0.9 + 0.1 + 0.2) / 3 = 0.4,
        # (0.1 + 0.2 + 0.9) / 3 = 0.4, (0.2 + 0.9) / 2 = 0.55.
        jumps = [(1, 0.9), (2, 0.1), (3, 0.2), (4, 0.9)]
        assert page.steps_to(jumps, 0.52) == 1
        assert page.steps_to(jumps, 0.52, window=3) == 4

    @pytest.mark.parametrize(
        ("method", "steps"),
        [
            # Of the curves measured from the figure, by the same rule.
            ("RPD-MSE_Octo", [1_472_000, 2_304_000]),
            ("RPD-MSE_OpenVLA", [1_728_000, 2_752_000]),
            ("PPO", [8_576_000, 10_368_000]),
            ("PPD_Octo", [math.inf, math.inf]),
        ],
    )
    def test_steps_of_the_paper(self, page, method, steps):
        curve = page.PICK.curves[method]
        assert [page.steps_to(curve, t, window=5) for t in (0.5, 0.7)] == steps


class TestPaper:
    def test_curves(self, page):
        curves = page.PICK.curves
        assert len(curves["PPO"]) == 207
        assert curves["PPO"][-1][0] == 13_184_000
        # OpenVLA's curve ends early: empty cells are no zeros.
        assert curves["RPD-MSE_OpenVLA"][-1][0] < 7_200_000
        assert len(page.PUSH.curves["PPO"]) == 24

    @pytest.mark.parametrize("figure", ["PICK", "PUSH"])
    def test_source_is_named(self, page, figure):
        text = (page.DATA / getattr(page, figure).file).read_text()
        assert "arXiv 2503.05833" in text.split("env_steps")[0]

    @pytest.mark.parametrize(
        ("task", "reward", "camera", "figure"),
        [
            ("PickCube-v1", "normalized_dense", None, "PICK"),
            ("PickCube-v1", "sparse", None, None),
            ("PushCube-v1", "normalized_dense", None, None),
            ("PushCube-v1", "normalized_dense", "human", None),
            ("PushCube-v1", "normalized_dense", "human_moved", "PUSH"),
        ],
    )
    def test_where_it_says_something(
        self, page, tmp_path, task, reward, camera, figure
    ):
        what = {"task": task, "reward": reward, "config": {"env.camera": camera}}
        write(tmp_path / "a", seed=0, success=0.5, curve=RISES, **what)
        runs, _ = page.find([tmp_path])
        arms = page.arms_of("rpd", runs)
        assert page.figure_for(arms) is (figure and getattr(page, figure))


class TestArms:
    @staticmethod
    def arms(page: ModuleType, folder: Path) -> list[Any]:
        runs, _ = page.find([folder])
        return page.arms_of("rpd", runs)

    def test_seeds_are_one(self, page, tmp_path):
        for seed in (0, 1, 2):
            write(tmp_path / f"s{seed}", seed=seed, success=0.5, curve=RISES)
        (arm,) = self.arms(page, tmp_path)
        assert [run.seed for run in arm.runs] == [0, 1, 2]
        assert arm.name == "RPD"

    def test_a_setting_that_differs(self, page, tmp_path):
        other = {"value.gamma": 0.9, "trainer.gae": {"gamma": 0.9}}
        for seed in (0, 1):
            write(tmp_path / f"a{seed}", seed=seed, success=0.5, curve=RISES)
        write(tmp_path / "b0", seed=0, success=0.9, curve=RISES, config=other)
        first, second = self.arms(page, tmp_path)
        # Named once, though it stands there twice.
        assert first.name == "RPD [value.gamma=0.8]"
        assert second.name == "RPD [value.gamma=0.9]"
        assert [len(arm.runs) for arm in (first, second)] == [2, 1]

    def test_a_teachers_own_seed_is_a_setting(self, page, tmp_path):
        write(tmp_path / "a", seed=0, success=0.5, curve=RISES)
        other = {"teacher.seed": 7}
        write(tmp_path / "b", seed=1, success=0.5, curve=RISES, config=other)
        names = [arm.name for arm in self.arms(page, tmp_path)]
        assert names == ["RPD [teacher.seed=0]", "RPD [teacher.seed=7]"]

    def test_a_shorter_run(self, page, tmp_path):
        write(tmp_path / "a", seed=0, success=0.5, curve=RISES)
        write(tmp_path / "b", seed=1, success=0.5, curve=RISES[:2], frames=200)
        names = [arm.name for arm in self.arms(page, tmp_path)]
        assert names == ["RPD [frames=200]", "RPD [frames=300]"]

    def test_one_run_twice(self, page, tmp_path):
        for name in ("a", "b"):
            write(tmp_path / name, seed=0, success=0.5, curve=RISES)
        with pytest.raises(ValueError, match=r"a and .*b are the same run, seed 0"):
            self.arms(page, tmp_path)

    def test_band(self, page, tmp_path):
        write(tmp_path / "a", seed=0, success=0.5, curve=RISES)
        write(tmp_path / "b", seed=1, success=0.5, curve=LATE[:2])
        (arm,) = self.arms(page, tmp_path)
        # Where both were evaluated: means (0.2 + 0) / 2 and (0.5 + 0.4) / 2.
        assert [(s, pytest.approx(m)) for s, m, _, _ in arm.band()] == [
            (100, 0.1),
            (200, 0.45),
        ]
        # 12.7062 * 0.070711 / sqrt(2) = 0.63531 to both sides of 0.45, within [0, 1].
        assert arm.band()[1][2:] == (0.0, 1.0)
        assert arm.end == 200


@pytest.fixture(scope="module")
def out(page, tmp_path_factory) -> Path:
    """Three seeds of RPD, two of PPO, one of each other kind; the report's folder."""
    folder = tmp_path_factory.mktemp("runs")
    finals, curves = (0.8, 0.9, 1.0), (RISES, RISES, LATE)
    for seed, (success, curve) in enumerate(zip(finals, curves, strict=True)):
        write(
            folder / f"rpd{seed}",
            seed=seed,
            success=success,
            curve=curve,
            teacher=0.4 + 0.1 * seed,
            resumed=seed == 2,
        )
    for seed, curve in enumerate((FLAT, LATE)):
        write(
            folder / f"ppo{seed}",
            algo="ppo",
            teacher=None,
            seed=seed,
            success=curve[-1][1],
            curve=curve,
        )
    more = {"seed": 0, "success": 0.3, "curve": FLAT, "labels": "octo"}
    write(folder / "octo", **more)
    write(folder / "sparse", **{**more, "labels": "scripted"}, reward="sparse")
    (folder / "dead").mkdir()
    (folder / "dead" / "config.yaml").write_text("seed: 3\n")
    page.main([str(folder), "--out", str(folder / "out")])
    return folder / "out"


@pytest.fixture(scope="module")
def text(out) -> str:
    """The page."""
    return (out / "report.md").read_text()


class TestPage:
    @staticmethod
    def row(text: str, first: str, number: int = 0) -> list[str]:
        """The cells of the table row that begins so, in the first section."""
        scripted = text.split("Teacher `scripted`")[1]
        rows = [r for r in scripted.split("\n") if r.startswith(f"| {first} |")]
        return [cell.strip() for cell in rows[number].strip("|").split("|")]

    def test_final_table(self, text):
        row = self.row(text, "RPD")
        # (0.8 + 0.9 + 1) / 3; 4.3027 * 0.1 / sqrt(3) = 0.2484, at most 100 %.
        assert row[1:4] == ["300", "90.0 [65.2, 100.0]", "0: 80.0, 1: 90.0, 2: 100.0"]
        # 316 queries, 1.5 s of the teacher's, (60 + 70 + 80) / 3 s; one was interrupted.
        assert row[5:] == ["316", "1.5", "70 (*)"]
        assert "since the last start" in text
        assert self.row(text, "PPO alone")[5] == "0"

    def test_teacher(self, text):
        row = self.row(text, "teacher")
        # (0.4 + 0.5 + 0.6) / 3 and the same 24.8 %.
        assert row[2:4] == ["50.0 [25.2, 74.8]", "0: 40.0, 1: 50.0, 2: 60.0"]

    def test_steps(self, text):
        # 50 %: 200, 200, 300; 70 %: 300 for all; 90 %: 300, 300, never.
        assert self.row(text, "RPD", 1)[1:] == ["200 (3/3)", "300 (3/3)", "300 (2/3)"]
        # PPO: never and 300: censored, since one of the two has not.
        assert self.row(text, "PPO alone", 1)[1:] == ["> 300 (1/2)"] * 2 + [
            "> 300 (0/2)"
        ]

    def test_paper(self, text):
        row = self.row(text, "*paper: PPO*")
        assert row[1:] == ["8,576,000", "10,368,000", "> 13,184,000"]
        assert "a student that sees the simulator's state, 16 environments" in text
        # Sparse reward: the paper has no such figure.
        sparse = text.split("sparse reward")[-1]
        assert "paper:" not in sparse
        assert "the authors' page" not in sparse

    def test_unequal_numbers_of_seeds_are_said(self, text):
        assert "different numbers of seeds: [2, 3]" in text

    def test_ppo_serves_every_teacher(self, text):
        octo = text.split("Teacher `octo`")[1].split("##")[0]
        assert "PPO alone (runs of `scripted`)" in octo
        # Not across rewards.
        assert "PPO alone" not in text.split("sparse reward")[-1]

    def test_one_seed(self, text):
        assert "30.0 (one seed, no interval)" in text

    def test_unfinished(self, text):
        assert "dead: unfinished" in text

    def test_pictures(self, text, out):
        from matplotlib.image import imread

        files = sorted(out.glob("*.png"))
        assert len(files) == 3
        for file in files:
            assert f"]({file.name})" in text
        # The paper's panel beside ours makes it wide.
        wide = {f.name: imread(f).shape[1] > 1000 for f in files}
        assert wide == {
            "PickCube-v1-normalized_dense-octo-state-cpu.png": True,
            "PickCube-v1-normalized_dense-scripted-state-cpu.png": True,
            "PickCube-v1-sparse-scripted-state-cpu.png": False,
        }

    def test_configurations_that_differ_are_marked(self, page, tmp_path):
        for seed, gamma in enumerate((0.8, 0.8, 0.9)):
            config = {"value.gamma": gamma}
            what = {"seed": seed, "success": 0.5, "curve": RISES, "config": config}
            write(tmp_path / f"s{seed}", **what)
        text = page.report([tmp_path], tmp_path / "out").read_text()
        assert "Configurations differ in more than the seed" in text
        assert "| RPD [value.gamma=0.9] | 300 | 50.0 (one seed" in text


@pytest.mark.slow
class TestRealRuns:
    def test_reads_what_the_script_writes(self, page, tmp_path, monkeypatch):
        pytest.importorskip("hydra")
        from hydra import compose, initialize_config_dir
        from hydra_toys import OVERRIDES

        spec = importlib.util.spec_from_file_location(
            "examples_rpd_report", ROOT / "examples" / "rpd.py"
        )
        script = importlib.util.module_from_spec(spec)
        spec.loader.exec_module(script)
        monkeypatch.setattr(script, "set_learner_threads", lambda **_: None)
        words = [*OVERRIDES, "frames=128", "check_teacher=false", "schedule=constant"]
        with initialize_config_dir(str(ROOT / "examples" / "conf"), version_base="1.3"):
            cfg = compose("config", overrides=[*words, f"runs={tmp_path / 'runs'}"])
        for seed in (0, 1):
            cfg.seed = seed
            script.main(cfg)
        runs, left_out = page.find([tmp_path / "runs"])
        assert not left_out
        # Everything in config.yaml that goes with the seed is known to do so.
        (arm,) = page.arms_of("rpd", runs)
        assert [run.seed for run in arm.runs] == [0, 1]
        assert [len(curve) for curve in arm.curves] == [1, 1]
        text = page.report([tmp_path / "runs"], tmp_path / "out").read_text()
        assert "| RPD | 128 |" in text


class TestErrors:
    @pytest.mark.parametrize(
        ("words", "sentence"),
        [
            (["nowhere"], "nowhere does not exist"),
            (["."], "No finished run below"),
            ([".", "--window", "4"], "an odd number"),
        ],
    )
    def test_message(self, page, tmp_path, monkeypatch, capsys, words, sentence):
        monkeypatch.chdir(tmp_path)
        with pytest.raises(SystemExit):
            page.main(words)
        assert sentence in capsys.readouterr().err

    def test_without_a_configuration(self, page, tmp_path, capsys):
        run = write(tmp_path / "run", seed=0, success=0.5, curve=RISES)
        (run / "config.yaml").unlink()
        with pytest.raises(SystemExit):
            page.main([str(tmp_path)])
        assert "nothing can be compared" in capsys.readouterr().err


if __name__ == "__main__":
    pytest.main([__file__])
