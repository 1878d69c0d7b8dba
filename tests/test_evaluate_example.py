# Copyright (c) the torchrl_rpd authors.
#
# This source code is licensed under the MIT license found in the
# LICENSE file in the root directory of this source tree.
"""examples/evaluate.py: students and teachers of a run, films and contact sheets."""

from __future__ import annotations

import importlib.util
import sys
from pathlib import Path
from types import ModuleType
from typing import Any

import numpy as np
import pytest
import torch
from tensordict import TensorDictBase
from torchrl.data import Unbounded
from toy_envs import CoinEnv

from torchrl_rpd.students import cnn_actor_critic, mlp_actor_critic

OmegaConf = pytest.importorskip("omegaconf").OmegaConf

ROOT = Path(__file__).parents[1]


class FilmedEnv(CoinEnv):
    """CoinEnv whose picture is as bright as the episode is old: 20 per step."""

    def __init__(self, num_envs: int, from_pixels: bool = False) -> None:
        super().__init__(num_envs)
        self.shown = from_pixels
        if from_pixels:
            shape = (num_envs, 32, 48, 3)
            self.observation_spec["pixels"] = Unbounded(shape, dtype=torch.uint8)

    def _observe(self) -> dict[str, torch.Tensor]:
        out = super()._observe()
        if self.shown:
            grey = (20 * self.time).to(torch.uint8)[:, None, None, None]
            out["pixels"] = grey.expand(-1, 32, 48, 3).clone()
        return out


def filmed(*, num_envs: int, from_pixels: bool = False, **rest: Any) -> FilmedEnv:
    """What config.yaml names; remembers what it was told."""
    BUILT.append({"num_envs": num_envs, **rest})
    return FilmedEnv(num_envs, from_pixels)


BUILT: list[dict[str, Any]] = []


class Teacher:
    """Three actions, one too many."""

    def __call__(self, tensordict: TensorDictBase) -> torch.Tensor:
        return torch.zeros(*tensordict.batch_size, 3)


@pytest.fixture(scope="module")
def script() -> ModuleType:
    spec = importlib.util.spec_from_file_location(
        "examples_evaluate", ROOT / "examples" / "evaluate.py"
    )
    module = importlib.util.module_from_spec(spec)
    sys.modules[spec.name] = module  # dataclasses look their module up
    spec.loader.exec_module(module)
    # The number of threads is this process's, not the script's.
    module.set_learner_threads = lambda **_: None
    return module


@pytest.fixture
def run(tmp_path) -> Path:
    """What examples/rpd.py leaves of a run, in small."""
    env = {"_target_": f"{__name__}.filmed", "_partial_": True, "task_id": "Coin-v1"}
    config = {
        "algo": "rpd",
        "labels": "scripted",
        "env": {**env, "num_envs": 8, "num_workers": 2, "fast_controller": True},
        "evaluation": {"env_overrides": {"num_envs": 500, "camera": "human"}},
        "teacher": {"_target_": f"{__name__}.Teacher"},
        "teacher_action": {
            "action_transform": {
                "_target_": "torchrl_rpd.configs.transforms.first_dimensions",
                "_partial_": True,
                "count": 2,
            }
        },
    }
    folder = tmp_path / "run"
    folder.mkdir()
    OmegaConf.save(config, folder / "config.yaml")
    mlp_actor_critic(1, 2).save(folder / "student.safetensors", task="Coin-v1")
    BUILT.clear()
    return folder


@pytest.fixture
def films(script) -> list[Any]:
    """Two episodes with seed 0: a success after 2 steps, a failure after 10."""
    return script.film(FilmedEnv(2, True), lambda td: torch.zeros(2, 2), seeds=0)


class TestNumbers:
    def test_student_of_a_run(self, script, run, capsys):
        script.main([str(run), "--episodes", "8", "--envs", "4", "--seeds", "0"])
        out = capsys.readouterr().out
        # Each env succeeds in one of its two episodes, after 2 steps; else 10.
        assert "success_once    0.500" in out
        assert "length          6.000" in out
        assert "on Coin-v1, 8 episodes, seeds from 0" in out

    def test_env_is_the_runs(self, script, run):
        script.main([str(run), "--episodes", "2", "--envs", "2", "env.task_id=X-v1"])
        # As it evaluates, in one process, with ManiSkill's own controller.
        assert BUILT == [
            {
                "num_envs": 2,
                "num_workers": 1,
                "camera": "human",
                "fast_controller": False,
                "task_id": "X-v1",
            }
        ]

    def test_teacher_of_a_run(self, script, run, capsys):
        # Its third dimension would not fit: the run's action_transform is part of it.
        words = [
            str(run),
            "--teacher",
            "--episodes",
            "4",
            "--envs",
            "4",
            "--seeds",
            "0",
        ]
        script.main(words)
        out = capsys.readouterr().out
        assert "scripted (teacher) on Coin-v1" in out
        assert "success_once    0.500" in out

    def test_teacher_without_a_run(self, script):
        cfg = script.composed_config(["task=push_t", "teacher=octo", "reward=dense"])
        assert cfg.env.task_id == "PushT-v1"
        assert cfg.env.teacher_camera == "human"
        assert cfg.env.fast_controller is False
        assert cfg.teacher.path_or_repo.startswith("Juelg/octo")
        assert cfg.teacher_action.action_transform.count == 6

    @pytest.mark.parametrize(("state_dim", "mode"), [(None, "rgb"), (5, "rgb+state")])
    def test_a_students_file_alone(self, script, monkeypatch, state_dim, mode):
        built = {}
        monkeypatch.setattr(
            script, "ManiSkillEnv", lambda task, **kw: built.update(kw, task=task)
        )
        student = cnn_actor_critic((64, 48), 7, state_dim=state_dim)
        student.metadata = {"task": "PushCube-v1", "reward": "sparse"}
        script.env_of_student(student)(num_envs=3)
        assert built == {
            "task": "PushCube-v1",
            "reward_mode": "sparse",
            "obs_mode": mode,
            "camera": "human",
            "image_size": (64, 48),
            "num_envs": 3,
        }


class TestFilms:
    def test_frames(self, films):
        won, lost = films
        # The first and the terminal observation included; nothing of what follows.
        assert [int(f[0, 0, 0]) for f in won.frames] == [0, 20, 40]
        assert [int(f[0, 0, 0]) for f in lost.frames] == list(range(0, 220, 20))
        assert won.success == [False, False, True]
        assert not any(lost.success)
        assert (won.title, lost.title) == (
            "episode 0: success, 2 steps",
            "episode 0: no success, 10 steps",
        )

    def test_sheet(self, script, films):
        sheet = np.asarray(script.contact_sheet(films, columns=4, side=40))
        # Rows of 20 (text) + 40 + 8; columns of 40 + 4, and 4 at the end.
        assert sheet.shape == (2 * 68, 4 * 44 + 4, 3)
        centres = [4 + 44 * i + 30 for i in range(4)]
        # Steps 0, 1, 2 of an episode of 2 steps, and an empty place.
        assert [int(v) for v in sheet[50, centres, 0]] == [0, 20, 40, 255]
        # Steps 0, 3.3, 6.7 and 10 of the other one.
        assert [int(v) for v in sheet[68 + 50, centres, 0]] == [0, 60, 140, 200]
        # Bars: green, and red.
        assert tuple(sheet[65, 90]) == (0, 128, 0)
        assert tuple(sheet[68 + 65, 90]) == (178, 34, 34)
        # The frame of the successful step alone: lime green beside the third picture.
        assert tuple(sheet[40, 4 + 88 - 2]) == (50, 205, 50)
        assert tuple(sheet[40, 4 + 44 - 2]) == (255, 255, 255)

    def test_videos(self, script, films, tmp_path):
        imageio = pytest.importorskip("imageio.v2")
        pytest.importorskip("imageio_ffmpeg")
        files = script.write_videos([films[1]], tmp_path / "new")
        assert [file.name for file in files] == ["episode-0-failure.mp4"]
        frames = imageio.mimread(files[0])
        assert len(frames) == 11
        # Compressed, and brighter from picture to picture.
        assert np.mean(frames[10]) == pytest.approx(200, abs=4)

    def test_from_the_command_line(self, script, run, capsys):
        sheet = run / "new" / "sheet.png"
        words = [str(run), "--episodes", "2", "--envs", "2", "--filmed", "3"]
        script.main([*words, "--sheet", str(sheet)])
        assert sheet.read_bytes()[:4] == b"\x89PNG"
        assert f"wrote {sheet}" in capsys.readouterr().out
        assert [env["num_envs"] for env in BUILT] == [2, 3]


class TestErrors:
    @pytest.mark.parametrize(
        ("words", "sentence"),
        [
            ([], "Name a student's file or folder, or say --teacher"),
            (["nowhere"], "nowhere does not exist; `make demo` writes one"),
            (["run", "run"], "One run at a time"),
            (["run", "env.no_such=1"], "no_such"),
            (["run/bare", "--teacher"], "no config.yaml"),
            (["run/bare"], "student.safetensors does not exist"),
            (["run/ppo", "--teacher"], "algo=ppo has no teacher"),
            (["--teacher", "task=no_such"], "no_such"),
        ],
    )
    def test_message(self, script, run, monkeypatch, capsys, words, sentence):
        (run / "bare").mkdir()
        (run / "ppo").mkdir()
        text = (run / "config.yaml").read_text().replace("algo: rpd", "algo: ppo")
        (run / "ppo" / "config.yaml").write_text(text)
        monkeypatch.chdir(run.parent)
        with pytest.raises(SystemExit):
            script.main(words)
        assert sentence in capsys.readouterr().err

    def test_a_student_without_a_task(self, script):
        with pytest.raises(ValueError, match="names no task"):
            script.env_of_student(mlp_actor_critic(1, 2))

    @pytest.mark.parametrize(
        ("flag", "module", "sentence"),
        [
            ("--videos", "imageio_ffmpeg", r"pip install 'imageio[ffmpeg]'"),
            ("--sheet", "PIL", "pip install pillow"),
        ],
    )
    def test_no_writer(self, script, run, monkeypatch, capsys, flag, module, sentence):
        real = importlib.util.find_spec
        monkeypatch.setattr(
            importlib.util, "find_spec", lambda n: None if n == module else real(n)
        )
        with pytest.raises(SystemExit):
            script.main([str(run), flag, "x"])
        assert sentence in capsys.readouterr().err
        # Said before anything was played.
        assert not BUILT


@pytest.mark.maniskill
@pytest.mark.render
@pytest.mark.slow
class TestPictures:
    def test_rgb_student_of_a_run(self, script, tmp_path, capsys):
        """A student that saw 64x64 pictures is evaluated on them, and filmed."""
        words = ["student=rgb", "task=push_cube", "env.image_size=64"]
        words += ["env.light_visuals=true", "env.max_episode_steps=3"]
        cfg = script.composed_config(words)
        OmegaConf.save(cfg, tmp_path / "config.yaml", resolve=True)
        cnn_actor_critic(64, 7).save(tmp_path / "student.safetensors")
        words = [str(tmp_path), "--episodes", "1", "--envs", "1", "--filmed", "1"]
        script.main([*words, "--sheet", str(tmp_path / "sheet.png")])
        assert "length          3.000" in capsys.readouterr().out
        assert (tmp_path / "sheet.png").exists()


if __name__ == "__main__":
    pytest.main([__file__])
