# Copyright (c) the torchrl_rpd authors.
#
# This source code is licensed under the MIT license found in the
# LICENSE file in the root directory of this source tree.
"""examples/rpd.py and its configuration tree."""

from __future__ import annotations

import copy
import functools
import importlib.util
import json
import os
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest
import torch
from hydra import compose, initialize_config_dir
from hydra.errors import (
    ConfigCompositionException,
    InstantiationException,
    MissingConfigException,
)
from hydra.utils import instantiate
from hydra_toys import OVERRIDES
from omegaconf import DictConfig, OmegaConf

from torchrl_rpd.configs import NODES
from torchrl_rpd.envs import TASKS
from torchrl_rpd.students import ActorCritic
from torchrl_rpd.teachers import CHECKPOINTS
from torchrl_rpd.teachers.octo import write_random_checkpoint
from torchrl_rpd.teachers.openvla import write_tiny_checkpoint
from torchrl_rpd.teachers.pocket import PocketVLA

ROOT = Path(__file__).parents[1]
CONF = ROOT / "examples" / "conf"
FILES = sorted(CONF.rglob("*.yaml"))


@pytest.fixture(scope="module")
def rpd() -> ModuleType:
    """The script, as a module."""
    spec = importlib.util.spec_from_file_location(
        "examples_rpd", ROOT / "examples" / "rpd.py"
    )
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


@functools.cache
def _composed(*words: str) -> DictConfig:
    with initialize_config_dir(str(CONF), version_base="1.3"):
        return compose("config", overrides=list(words))


def composed(*words: str, **values: Any) -> DictConfig:
    """The configuration of a command line; ``a__b=1`` is ``a.b=1``, but cheaper."""
    cfg = copy.deepcopy(_composed(*words))
    for name, value in values.items():
        OmegaConf.update(cfg, name.replace("__", "."), value)
    return cfg


@pytest.fixture(scope="module")
def resolved() -> Callable[..., dict[str, Any]]:
    """Composes, once for each choice of words."""
    known: dict[tuple[str, ...], dict[str, Any]] = {}

    def get(*words: str) -> dict[str, Any]:
        if words not in known:
            known[words] = flat(OmegaConf.to_container(composed(*words), resolve=True))
        return known[words]

    return get


def flat(tree: Any, prefix: str = "") -> dict[str, Any]:
    """Leaves by dotted names; lists and empty sections are leaves."""
    if not isinstance(tree, dict) or not tree:
        return {prefix: tree}
    out = {}
    for key, value in tree.items():
        out |= flat(value, f"{prefix}.{key}" if prefix else str(key))
    return out


# The released configuration: train.py over the defaults of ppo_rgb_rpd.py.
PAPER = {
    "env.num_envs": 128,
    "env.num_workers": 1,
    "env.obs_mode": "rgb",
    "env.camera": "human",
    "env.image_size": 256,
    "env.control_mode": "pd_ee_delta_pose",
    "env.fast_controller": False,
    "env.light_visuals": False,
    "env.ignore_terminations": False,  # partial_reset=True
    "trainer.steps_per_batch": 50,
    "trainer.num_epochs": 8,
    "trainer.minibatch_size": 133,  # 128 * 50 // 48
    "trainer.target_kl": 0.2,
    "trainer.kl_rule": "stop",
    "trainer.clip_norm": 0.5,
    "trainer.anneal_from": None,
    "trainer.loss_components": None,
    "trainer.lr_scheduler": None,
    "frames": 30_000_000,
    "value.lmbda": 0.9,
    "value.bootstrap_at_done": "always",
    "value.average_gae": False,
    "loss.distill_type": "mse",
    "loss.distill_coeff": 1.0,
    "loss.clip_epsilon": 0.2,
    "loss.clip_value": None,
    "loss.entropy_bonus": False,
    "loss.loss_critic_type": "l2",
    "loss.critic_coeff": 0.25,  # 0.5 * vf_coef 0.5; TorchRL's l2 has no factor 0.5
    "loss.normalize_advantage": True,
    "schedule.kind": "constant",
    "schedule.init": 1.0,
    "optimizer._target_": "torch.optim.Adam",
    "optimizer.lr": 3e-4,
    "optimizer.eps": 1e-5,
    "optimizer.weight_decay": 0.0,
    "student._target_": "torchrl_rpd.configs.students.make_cnn",
    "student.state_dim": None,  # include_state=False
    "student.log_std_init": -0.5,
    "teacher_action.query_fraction": 1.0,
    "teacher_action.replan_interval": 1,
    "teacher_action.action_transform": None,
    "teacher.path": "Juelg/openvla-7b-finetuned-maniskill",
    "teacher.unnorm_key": "maniskill_human:7.0.0",
    "teacher.gripper": "raw",
    "teacher.readout": "greedy",
    "evaluation.interval": 64_000,  # every 10 iterations
    "evaluation.episodes": 500,
    "evaluation.env_overrides.num_envs": 500,
    "evaluation.env_overrides.ignore_terminations": True,  # no partial reset
}


class TestPaper:
    @pytest.mark.parametrize("name", PAPER)
    def test_value(self, resolved, name):
        assert resolved("preset=paper")[name] == PAPER[name]

    @pytest.mark.parametrize(
        ("reward", "mode", "gamma"),
        [("dense", "normalized_dense", 0.8), ("sparse", "sparse", 0.99)],
    )
    def test_reward(self, resolved, reward, mode, gamma):
        paper = resolved("preset=paper", f"reward={reward}")
        assert paper["env.reward_mode"] == mode
        assert paper["value.gamma"] == gamma
        # Nothing else depends on the reward.
        for name, value in PAPER.items():
            assert paper[name] == value

    def test_minibatches(self, resolved):
        paper = resolved("preset=paper")
        batch = paper["env.num_envs"] * paper["trainer.steps_per_batch"]
        assert batch == 6400
        # 48 whole ones of 133 leave 16 rows: 6400 = 48 * 133 + 16.
        assert divmod(batch, paper["trainer.minibatch_size"]) == (48, 16)

    def test_octo(self, resolved):
        paper = resolved("preset=paper", "teacher=octo")
        assert paper["teacher.path_or_repo"] == CHECKPOINTS["octo"].name
        assert paper["teacher.num_samples"] == 1
        assert paper["teacher.window_size"] == 1
        assert paper["teacher.wrist_image_key"] is None

    def test_command_line_wins(self, resolved):
        cheap = resolved("preset=paper", "student=mlp", "teacher=scripted")
        assert cheap["env.obs_mode"] == "state"
        assert cheap["teacher.task_id"] == "PickCube-v1"
        assert cheap["trainer.minibatch_size"] == 133


def arm(reward: str) -> dict[str, Any]:
    """The tuned settings of examples/demo.py and benchmarks/demo_full.py."""
    from benchmarks.demo_full import DEMO, OFFSET

    arm = {"dense": DEMO, "sparse": OFFSET}[reward]
    return {
        "frames": arm.frames,
        "env.task_id": arm.task,
        "env.reward_mode": arm.reward,
        "value.gamma": arm.gamma,
        "value.lmbda": arm.lmbda,
        "value.bootstrap_at_done": arm.bootstrap,
        "student.log_std_init": arm.log_std_init,
        "optimizer.lr": arm.learning_rate,
        "trainer.num_epochs": arm.epochs,
        "trainer.minibatch_size": arm.minibatch_size,
        "trainer.target_kl": arm.target_kl,
        "trainer.kl_rule": arm.kl_rule,
        "trainer.anneal_from": arm.anneal_from,
        "trainer.steps_per_batch": arm.steps_per_batch,
        "loss.distill_coeff": arm.coeff,
        "schedule.kind": "linear",
        "schedule.init": arm.coeff,
        "schedule.end": arm.coeff_end,
        "schedule.start_frames": arm.coeff_start_frames,
        "schedule.end_frames": arm.coeff_end_frames,
        "evaluation.interval": arm.eval_interval,
        "evaluation.episodes": arm.eval_episodes,
        **{
            f"teacher.{name}": list(v) if isinstance(v, tuple) else v
            for name, v in arm.teacher.items()
        },
    }


class TestCPU:
    @pytest.mark.parametrize(
        ("reward", "flaw"), [("dense", "cube_per_episode"), ("sparse", "goal")]
    )
    def test_is_the_tuned_one(self, resolved, monkeypatch, reward, flaw):
        monkeypatch.syspath_prepend(str(ROOT))
        cpu = resolved(f"reward={reward}", f"flaw={flaw}")
        expected = arm(reward)
        assert {name: cpu[name] for name in expected} == expected
        assert cpu["env.num_envs"] * cpu["env.num_workers"] == 16
        assert cpu["env.num_workers"] == 2

    def test_is_the_default(self, resolved):
        assert resolved()["preset"] == "cpu"
        assert resolved("reward=dense", "flaw=cube_per_episode") == resolved()


class TestJumpStart:
    def test_is_cpu_with_a_teacher_that_leads_in(self, resolved):
        values = resolved("preset=best", "reward=sparse")
        assert values["trainer.jump_start.fraction"] == 0.5
        # The arm as in `cpu`, the gripper wider.
        assert values["student.log_std_init"] == [-1.5] * 6 + [-0.3]
        assert values["loss.normalize_advantage"] is False
        last = values["trainer.hooks"][-1]
        assert (last["start_frames"], last["end_frames"]) == (40_000, 150_000)
        assert values["env.num_workers"] == resolved()["env.num_workers"]

    def test_loss_must_leave_the_advantages_alone(self):
        cfg = composed("preset=best", loss__normalize_advantage=True)
        OmegaConf.update(cfg, "env.num_workers", 1)
        with pytest.raises(InstantiationException, match="normalize_advantage=false"):
            instantiate(cfg.trainer)


class TestPixels:
    @pytest.fixture
    def values(self, resolved) -> dict[str, Any]:
        words = "preset=pixels reward=sparse task=push_cube teacher=pocket student=rgb"
        return resolved(*words.split())

    def test_student_and_teacher_share_a_picture(self, values):
        assert values["env.camera"] == values["env.teacher_camera"] == "human"
        # Two sizes would be drawn twice.
        assert values["env.image_size"] == values["env.teacher_image_size"] == 128
        # Both look at the same part of it, the model by shares.
        top, left, side = (int(128 * share) for share in PocketVLA().config["crop"])
        assert values["student.crop"] == [top, left, side, side]
        assert values["env.light_visuals"] is True
        assert values["teacher.image_key"] == "teacher_image"

    def test_the_coefficient_falls_within_the_budget(self, values):
        assert values["schedule.end_frames"] < values["frames"]
        assert values["schedule.end"] < values["schedule.init"]

    def test_the_rate_falls_before_the_coefficient_and_within_the_budget(self, values):
        batch = 16 * values["trainer.steps_per_batch"]
        milestones = values["trainer.lr_scheduler.milestones"]
        assert milestones[0] * batch < values["schedule.end_frames"]
        assert milestones[-1] * batch < values["frames"]
        # Two schedules of one rate would overwrite each other.
        assert values["trainer.anneal_from"] is None


class TestControls:
    """Everything else is equal."""

    @staticmethod
    def changed(resolved: Callable, algo: str, *words: str) -> set[str]:
        control, rpd = resolved(f"algo={algo}", *words), resolved(*words)
        names = set(control) | set(rpd)
        return {n for n in names if control.get(n, "absent") != rpd.get(n, "absent")}

    # The same nodes, where they are used.
    COPIES = ("trainer.", "evaluation.env.")

    def test_imitation(self, resolved):
        changed = self.changed(resolved, "imitation")
        logged = {"name", "logger.exp_name", "trainer.logger.exp_name"}
        assert changed - logged == {"algo", "trainer.loss_components"}
        control = resolved("algo=imitation")
        assert control["trainer.loss_components"] == ["loss_distill"]

    @pytest.mark.parametrize("words", [(), ("preset=paper",), ("reward=sparse",)])
    def test_ppo(self, resolved, words):
        changed = self.changed(resolved, "ppo", *words)
        own = {n for n in changed if not n.startswith(self.COPIES)}
        assert own - {"name", "logger.exp_name", "schedule.kind"} == {
            "algo",
            "loss.distill_coeff",
            "schedule.init",
            "no_teacher._target_",
            "no_teacher._partial_",
        }
        others = {n for n in changed - own if not n.startswith("trainer.teacher.")} - {
            "trainer.logger.exp_name",
            "trainer.schedule.kind",
        }
        assert others == {"trainer.loss_module.distill_coeff", "trainer.schedule.init"}
        control = resolved("algo=ppo", *words)
        assert control["loss.distill_coeff"] == control["schedule.init"] == 0
        assert control["schedule.kind"] == "constant"


class TestTeachers:
    @pytest.mark.parametrize("teacher", ["openvla", "octo"])
    @pytest.mark.parametrize(
        ("student", "mode", "camera", "key"),
        [
            ("mlp", "state", "human", "teacher_image"),
            ("rgb", "rgb", None, ["observation", "image"]),
        ],
    )
    def test_vla(self, resolved, teacher, student, mode, camera, key):
        cfg = resolved(f"teacher={teacher}", f"student={student}", "task=stack_cube")
        path = {"openvla": "teacher.path", "octo": "teacher.path_or_repo"}[teacher]
        assert cfg[path] == CHECKPOINTS[teacher].name
        assert cfg["teacher.unnorm_key"] == CHECKPOINTS[teacher].unnorm_key
        assert cfg["teacher.instruction"] == "stack the red cube on the green cube"
        assert cfg["teacher.image_key"] == key
        assert cfg["env.obs_mode"] == mode
        assert cfg["env.teacher_camera"] == camera

    @pytest.mark.parametrize(
        ("student", "mode", "key"),
        [
            ("mlp", "state", "observation"),
            ("rgb", "rgb+state", ["observation", "state"]),
        ],
    )
    def test_scripted_sees_the_state(self, resolved, student, mode, key):
        cfg = resolved(f"student={student}")
        assert cfg["env.obs_mode"] == mode
        assert cfg["env.teacher_camera"] is None
        assert cfg["teacher.observation_key"] == key

    def test_server(self, resolved):
        cfg = resolved("teacher=remote")
        assert cfg["teacher.in_keys.teacher_image"] == "observation/image"
        assert cfg["env.teacher_camera"] == "human"

    def test_rgb_is_cnn(self, resolved):
        assert resolved("student=rgb") == resolved("student=cnn")


class TestTree:
    def test_tasks(self):
        found = {}
        for file in (CONF / "task").iterdir():
            task = OmegaConf.load(file)
            task = task.get("task", task)
            assert task.name == file.stem
            found[task.task_id] = task.instruction
        assert found == {task.task_id: task.instruction for task in TASKS.values()}

    def test_task_without_gripper(self):
        cfg = composed("task=push_t", "teacher=octo")
        drop = instantiate(cfg.teacher_action.action_transform)
        assert drop(torch.zeros(3, 7)).shape == (3, TASKS["PushT-v1"].action_dim)

    def test_no_file_has_the_name_of_a_node(self):
        # Hydra would take the node for the file's schema.
        nodes = {f"{node.group}/{node.name}.yaml" for node in NODES}
        assert not nodes & {file.relative_to(CONF).as_posix() for file in FILES}

    @pytest.mark.parametrize(
        "file", FILES, ids=lambda f: f.relative_to(CONF).as_posix()
    )
    def test_is_commented(self, file):
        lines = file.read_text().splitlines()
        first = lines[1] if lines[0].startswith("# @package") else lines[0]
        assert first.startswith("# ")
        assert first.endswith((".", ",")) or lines[lines.index(first) + 1].startswith(
            "#"
        )

    @pytest.mark.parametrize("logger", ["csv", "tensorboard"])
    def test_loggers(self, tmp_path, logger):
        cfg = composed(f"logger={logger}", runs=str(tmp_path), name="here")
        made = instantiate(cfg.logger)
        made.log_scalar("a", 1.0, step=0)
        assert (tmp_path / "here").is_dir()

    def test_wandb(self):
        cfg = composed("logger=wandb", "logger.offline=true")
        assert cfg.logger._target_.endswith("_make_wandb_logger")
        assert cfg.logger.exp_name == cfg.name


class TestMistakes:
    def test_unknown_choice(self):
        with pytest.raises(MissingConfigException, match="imitation\n\tppo\n\trpd"):
            composed("algo=reinforce")

    def test_unknown_value(self):
        with pytest.raises(ConfigCompositionException, match=r"teacher\.jiter"):
            composed("teacher.jiter=0.3")

    def test_flaw_of_a_teacher_that_has_none(self):
        with pytest.raises(ConfigCompositionException, match="flaw"):
            composed("teacher=octo", "flaw=goal")

    @pytest.mark.parametrize(
        ("words", "values", "sentence"),
        [
            ((), {"task__task_id": "PokeCube-v1"}, "no scripted teacher for PokeCube"),
            (
                ("algo=imitation",),
                {"task__task_id": "PushT-v1"},
                "no scripted teacher for PushT-v1: .*PickCube-v1.*PokeCubeDistractor-v1",
            ),
            ((), {"frames": 100}, "less than one batch: 800 frames"),
            (("algo=ppo",), {"schedule__init": 1.0}, "no teacher to ask"),
            ((), {"schedule__init": 0.0, "schedule__end": 0.0}, "is algo=ppo: say so"),
            (
                ("algo=imitation",),
                {"teacher_action__query_fraction": 0.0},
                "query_fraction=0 has none",
            ),
            ((), {"loss__distill_type": "kl"}, "needs a teacher with a spread"),
            (
                ("preset=paper",),
                {"loss__distill_type": "kl"},
                "teacher_std_key=teacher_std",
            ),
            (
                ("algo=ppo",),
                {"task__task_id": "PlugCharger-v1"},
                "PlugCharger-v1 has no reward 'normalized_dense', only sparse, none",
            ),
        ],
    )
    def test_nonsense(self, rpd, tmp_path, words, values, sentence):
        cfg = composed(*words, **values, runs=str(tmp_path))
        with pytest.raises(SystemExit, match=sentence):
            rpd.main(cfg)
        assert not list(tmp_path.iterdir())

    @pytest.mark.parametrize(
        ("flaw", "setting"),
        [
            ("blind", "blind_region=((-inf, inf), (0.03, inf))"),
            ("jitter", "jitter=0.22"),
        ],
    )
    def test_flaws_that_are_files(self, flaw, setting):
        cfg = composed(f"flaw={flaw}")
        assert cfg.labels == f"scripted_{flaw}"
        assert setting in repr(instantiate(cfg.teacher))

    @pytest.mark.parametrize(
        ("words", "task"),
        [
            ((), "PickCube-v1"),
            (("algo=imitation",), "StackCube-v1"),
            (("algo=ppo",), "PokeCube-v1"),
            (("preset=paper",), "PokeCube-v1"),
            (("reward=sparse",), "PullCubeToolDistractor-v1"),
            (("reward=sparse", "algo=imitation"), "PokeCubeDistractor-v1"),
        ],
    )
    def test_sense(self, rpd, words, task):
        assert rpd.nonsense(composed(*words, task__task_id=task)) is None


class TestRun:
    """The whole script on a toy environment."""

    @pytest.fixture(autouse=True)
    def _threads(self, rpd, monkeypatch):
        # The number of threads is this process's, not the script's.
        monkeypatch.setattr(rpd, "set_learner_threads", lambda **_: None)

    @staticmethod
    def run(rpd: ModuleType, runs: Path, *words: str) -> tuple[dict[str, Any], Path]:
        rpd.main(composed(*OVERRIDES, *words, runs=str(runs), name="toy"))
        return json.loads((runs / "toy" / "results.json").read_text()), runs / "toy"

    def test_rpd(self, rpd, tmp_path, capsys):
        results, out = self.run(rpd, tmp_path)
        assert {file.name for file in out.iterdir()} >= {
            "config.yaml",
            "results.json",
            "student.safetensors",
            "scalars",
        }
        assert results["frames"] == 256
        # One query per stored frame, and those that the last rollout ends with.
        assert results["teacher_stats"]["queries"] == 256 + 8
        assert results["teacher"]["success_once"]["n"] == 8
        assert [frames for frames, _ in results["curve"]] == [128, 256]
        student = ActorCritic.load(out / "student.safetensors")
        assert student.metadata["task"] == "PickCube-v1"
        assert student.config["observation_dim"] == 2
        # The file is the whole run: nothing in it needs the tree.
        saved = OmegaConf.load(out / "config.yaml")
        assert saved.trainer.steps_per_batch == 16
        assert "${" not in (out / "config.yaml").read_text()
        assert "check_teacher" in capsys.readouterr().out

    def test_ppo_asks_nobody(self, rpd, tmp_path):
        results, out = self.run(rpd, tmp_path, "algo=ppo")
        assert results["teacher"] is None
        assert results["teacher_stats"]["queries"] == 0
        assert "loss_objective" in {f.stem for f in (out / "scalars").iterdir()}

    def test_imitation_follows_labels_alone(self, rpd, tmp_path):
        results, out = self.run(
            rpd, tmp_path, "algo=imitation", "trainer.target_kl=null"
        )
        assert results["ppo_active"] == 0
        assert results["distill_active"] == 1
        # The critic's last layer is where it was.
        student = ActorCritic.load(out / "student.safetensors")
        bias = list(student.critic.parameters())[-1]
        assert torch.equal(bias, torch.zeros_like(bias))

    def test_goes_on_from_its_checkpoint(self, rpd, tmp_path, capsys):
        first, out = self.run(rpd, tmp_path, "checkpoint.every=128")
        (out / "results.json").unlink()
        assert "going on" not in capsys.readouterr().out
        again, _ = self.run(rpd, tmp_path, "checkpoint.every=128")
        assert "going on at 256 frames" in capsys.readouterr().out
        assert again["student"]["episode_return"] == first["student"]["episode_return"]
        # Another configuration is another run.
        with pytest.raises(SystemExit, match="gamma"):
            self.run(rpd, tmp_path, "checkpoint.every=128", "value.gamma=0.5")


@pytest.mark.maniskill
@pytest.mark.render
@pytest.mark.slow
class TestPictures:
    """Every kind of teacher beside every kind of student, with random weights."""

    @pytest.mark.parametrize(
        ("student", "teacher"),
        [("rgb", "openvla"), ("mlp", "octo"), ("rgb", "scripted")],
    )
    def test_labels(self, rpd, tmp_path, monkeypatch, student, teacher):
        monkeypatch.setattr(rpd, "set_learner_threads", lambda **_: None)
        words = [f"student={student}", f"teacher={teacher}", "task=push_cube"]
        values = {
            "frames": 8,
            "episodes": 1,
            "check_teacher": teacher == "scripted",
            "runs": str(tmp_path),
            "name": "run",
            "env__num_envs": 1,
            "env__num_workers": 1,
            "env__light_visuals": True,
            "env__max_episode_steps": 4,
            "trainer__steps_per_batch": 4,
            "trainer__minibatch_size": 4,
            "trainer__num_epochs": 1,
            "evaluation__interval": 8,
            "evaluation__episodes": 1,
            "checkpoint__every": None,
        }
        if student == "rgb":
            values["env__image_size"] = 64
        if teacher == "openvla":
            values["teacher__path"] = str(write_tiny_checkpoint(tmp_path / "vla"))
            values["teacher__unnorm_key"] = None
        if teacher == "octo":
            folder = str(write_random_checkpoint(tmp_path / "vla"))
            values["teacher__path_or_repo"] = folder
        if teacher != "scripted":
            values["teacher__device"] = "cpu"
        rpd.main(composed(*words, **values))
        results = json.loads((tmp_path / "run" / "results.json").read_text())
        # The first episode ends after 4 steps: 3 labels and a reset's, twice; and one
        # root that is not stored.
        assert results["teacher_stats"]["labelled"] == 8 + 1


class TestCommandLine:
    @pytest.mark.slow
    def test_shows_its_configuration(self, tmp_path):
        done = subprocess.run(
            [
                *(sys.executable, "-W", "ignore", ROOT / "examples" / "rpd.py"),
                *("preset=paper", "reward=sparse", "--cfg", "job"),
            ],
            cwd=tmp_path,
            env=dict(os.environ, PYTHONPATH=str(ROOT)),
            capture_output=True,
            text=True,
        )
        assert done.returncode == 0, done.stderr[-2000:]
        assert "minibatch_size: 133" in done.stdout
        assert not list(tmp_path.iterdir())

    @pytest.mark.maniskill
    @pytest.mark.slow
    def test_is_the_demo(self, rpd, tmp_path, monkeypatch):
        """preset=cpu trains the student of examples/demo.py, weight by weight."""
        monkeypatch.syspath_prepend(str(ROOT))
        from dataclasses import replace

        from examples.demo import DEMO, make_env, train

        monkeypatch.setattr(rpd, "set_learner_threads", lambda **_: None)
        words = ["frames=1600", "episodes=2", "env.num_envs=16", "env.num_workers=1"]
        words += ["checkpoint.every=null"]
        rpd.main(composed(*words, f"runs={tmp_path}", "name=run"))
        student = ActorCritic.load(tmp_path / "run" / "student.safetensors")
        env = make_env(DEMO)
        demo, _ = train(replace(DEMO, frames=1600), 0, eval_env=env, progress_bar=False)
        env.close()
        for ours, theirs in zip(
            student.actor.state_dict().values(),
            demo.actor.state_dict().values(),
            strict=True,
        ):
            assert torch.equal(ours, theirs)


if __name__ == "__main__":
    pytest.main([__file__])
