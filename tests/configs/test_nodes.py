# Copyright (c) the torchrl_rpd authors.
#
# This source code is licensed under the MIT license found in the
# LICENSE file in the root directory of this source tree.
"""Every node has every argument of what it configures, with the same default."""

from __future__ import annotations

import inspect
import sys
from collections.abc import Callable, Mapping, Sequence
from dataclasses import MISSING as NO_DEFAULT
from dataclasses import dataclass, field, fields
from typing import Any

import pytest
import torch
import torchrl.trainers.algorithms.configs
from hydra.core.config_store import ConfigStore
from hydra.utils import instantiate
from omegaconf import MISSING, OmegaConf
from torchrl.objectives import ClipPPOLoss, KLPENPPOLoss, PPOLoss
from torchrl.objectives.value import GAE
from torchrl.trainers.algorithms import PPOTrainer

from torchrl_rpd import configs, students, teachers, trainers, transforms
from torchrl_rpd.configs.hooks import SyncPolicy
from torchrl_rpd.configs.students import make_cnn, make_mlp
from torchrl_rpd.envs import ManiSkillEnv
from torchrl_rpd.objectives import (
    DistillKLPENPPOLoss,
    DistillPPOLoss,
    FiniteHorizonGAE,
)
from torchrl_rpd.trainers import make_ppo_trainer

NONE = {"self", "args", "kwargs"}
HYDRA = {"_target_", "_partial_", "_convert_", "_recursive_"}


@dataclass
class Pair:
    """A node's class and the functions whose arguments it has, the first one first.

    ``filled``: required arguments whose null means that somebody else fills them in.
    ``left_out``: arguments without a field, ``added``: fields without an argument.
    """

    config: str
    functions: Sequence[Callable]
    filled: set[str] = field(default_factory=set)
    left_out: set[str] = field(default_factory=set)
    added: dict[str, Any] = field(default_factory=dict)


# Set by make_ppo_trainer's wiring, or read only by the wiring that it replaces.
WIRED = {
    "frame_skip",
    "optim_steps_per_batch",
    "clip_grad_norm",
    "replay_buffer",
    "batch_size",
    "gamma",
    "lmbda",
    "async_collection",
    "add_gae",
    "weight_update_map",
    "auto_log_optim_steps",
}
PAIRS = [
    Pair(
        "ManiSkillEnvConfig",
        [ManiSkillEnv.__init__],
        added={"num_workers": 1, "make_kwargs": {}},
    ),
    Pair("TeacherActionTransformConfig", [transforms.TeacherActionTransform.__init__]),
    Pair("JumpStartTransformConfig", [transforms.JumpStartTransform.__init__]),
    Pair(
        "JumpStartScheduleConfig",
        [trainers.JumpStartSchedule.__init__],
        filled={"transform"},
    ),
    Pair(
        "DistillPPOLossConfig",
        [DistillPPOLoss.__init__, ClipPPOLoss.__init__, PPOLoss.__init__],
    ),
    Pair(
        "DistillKLPENPPOLossConfig",
        [DistillKLPENPPOLoss.__init__, KLPENPPOLoss.__init__, PPOLoss.__init__],
    ),
    Pair(
        "FiniteHorizonGAEConfig",
        [FiniteHorizonGAE.__init__, GAE.__init__],
        filled={"value_network"},
    ),
    Pair("ScriptedTeacherConfig", [teachers.ScriptedTeacher.__init__]),
    Pair(
        "OpenVLATeacherConfig",
        [teachers.OpenVLATeacher.from_pretrained, teachers.OpenVLATeacher.__init__],
        left_out={"model", "prompts", "statistics", "config"},
    ),
    Pair("OctoTeacherConfig", [teachers.OctoTeacher.from_pretrained]),
    Pair("PocketVLATeacherConfig", [teachers.PocketVLATeacher.__init__]),
    Pair("RemoteTeacherConfig", [teachers.remote.RemoteTeacher.__init__]),
    Pair(
        "MLPStudentConfig",
        [students.mlp_actor_critic],
        filled={"observation_dim", "action_dim"},
    ),
    Pair(
        "CNNStudentConfig",
        [students.cnn_actor_critic],
        filled={"image_size", "action_dim"},
    ),
    Pair(
        "DistillCoeffScheduleConfig",
        [trainers.DistillCoeffSchedule.__init__],
        filled={"loss"},
    ),
    Pair("NumericalGuardConfig", [trainers.NumericalGuard.__init__]),
    Pair("LogEpisodesConfig", [trainers.LogEpisodes.__init__]),
    Pair("LogTeacherConfig", [trainers.LogTeacher.__init__], filled={"transform"}),
    Pair(
        "EvaluationHookConfig",
        [trainers.EvaluationHook.__init__],
        filled={"env", "policy"},
        added={"env_overrides": {}},
    ),
    Pair(
        "ObservationNormUpdateConfig",
        [trainers.ObservationNormUpdate.__init__],
        filled={"norm"},
    ),
    Pair("CheckpointHookConfig", [trainers.CheckpointHook.__init__]),
    Pair("TargetKLStepperConfig", [trainers.TargetKLStepper.__init__]),
    Pair("OnPolicyMinibatchesConfig", [trainers.OnPolicyMinibatches.__init__]),
    Pair("SyncPolicyConfig", [SyncPolicy.__init__]),
    Pair(
        "RPDTrainerConfig",
        [configs.make_rpd_trainer, make_ppo_trainer, PPOTrainer.__init__],
        left_out=WIRED,
    ),
]


def arguments(functions: Sequence[Callable]) -> dict[str, Any]:
    """Names and defaults; where two functions have a name, the first one's default."""
    found: dict[str, Any] = {}
    for function in functions:
        for name, parameter in inspect.signature(function).parameters.items():
            if name not in NONE:
                found.setdefault(name, parameter.default)
    return found


def plain(value: Any) -> Any:
    """Tuples as lists, data types as their names: what YAML has."""
    if isinstance(value, torch.dtype):
        return str(value).removeprefix("torch.")
    if isinstance(value, Mapping):
        return {k: plain(v) for k, v in value.items()}
    if isinstance(value, tuple | list):
        return [plain(v) for v in value]
    return value


def defaults(config: type) -> dict[str, Any]:
    """Names and defaults of a configuration's fields."""
    found = {}
    for entry in fields(config):
        if entry.name in HYDRA:
            continue
        if entry.default_factory is not NO_DEFAULT:
            found[entry.name] = entry.default_factory()
        else:
            found[entry.name] = entry.default
    return found


@pytest.mark.parametrize("pair", PAIRS, ids=lambda pair: pair.config)
class TestParity:
    def test_names(self, pair):
        theirs = set(arguments(pair.functions)) - pair.left_out
        ours = set(defaults(getattr(configs, pair.config)))
        assert ours - set(pair.added) == theirs

    def test_defaults(self, pair):
        ours = defaults(getattr(configs, pair.config))
        for name, expected in arguments(pair.functions).items():
            if name in pair.left_out:
                continue
            if expected is inspect.Parameter.empty:
                expected = None if name in pair.filled else MISSING
            assert plain(ours[name]) == plain(expected), name
        for name, expected in pair.added.items():
            assert ours[name] == expected, name

    def test_exceptions_are_needed(self, pair):
        theirs = arguments(pair.functions)
        assert pair.left_out <= set(theirs)
        assert not set(pair.added) & set(theirs)
        required = {n for n, v in theirs.items() if v is inspect.Parameter.empty}
        assert pair.filled <= required

    def test_hydra_can_hold_it(self, pair):
        config = OmegaConf.structured(getattr(configs, pair.config))
        target = config["_target_"]
        module, name = target.rsplit(".", 1)
        assert callable(getattr(sys.modules[module], name))


class TestNodes:
    def test_every_config_is_a_node(self):
        nodes = {
            node.node if isinstance(node.node, type) else type(node.node)
            for node in configs.NODES
        }
        named = {getattr(configs, n) for n in configs.__all__ if n.endswith("Config")}
        assert nodes == named == {getattr(configs, pair.config) for pair in PAIRS}

    def test_groups_are_the_documented_ones(self):
        assert {(n.group, n.name) for n in configs.NODES} >= {
            ("env", "maniskill"),
            ("transform", "teacher_action"),
            ("loss", "distill_ppo"),
            ("loss", "distill_klpen"),
            ("value", "finite_horizon_gae"),
            ("teacher", "scripted"),
            ("teacher", "openvla"),
            ("teacher", "octo"),
            ("teacher", "remote"),
            ("student", "mlp"),
            ("student", "cnn"),
            ("schedule", "cosine"),
            ("schedule", "return_ratio"),
            ("hook", "evaluation"),
            ("trainer", "rpd"),
        }

    def test_replaces_none_of_torchrl(self, monkeypatch):
        theirs = set()

        def note(group: str, name: str, node: Any) -> None:
            theirs.add((group, name))

        monkeypatch.setattr(ConfigStore.instance(), "store", note)
        torchrl.trainers.algorithms.configs._register_configs()
        assert ("trainer", "ppo") in theirs
        assert not theirs & {(node.group, node.name) for node in configs.NODES}

    def test_register_twice(self):
        configs.register()
        configs.register()
        assert "distill_ppo.yaml" in ConfigStore.instance().list("loss")

    def test_schedules_differ_in_kind(self):
        kinds = {n.name: n.node.kind for n in configs.NODES if n.group == "schedule"}
        assert set(kinds) == {"constant", "linear", "cosine", "return_ratio"}
        assert all(kind == name for name, kind in kinds.items())

    def test_unknown_name(self):
        with pytest.raises(AttributeError, match="no attribute 'Nothing'"):
            _ = configs.Nothing

    def test_hydra_is_named_where_it_is_missing(self, monkeypatch):
        monkeypatch.delitem(sys.modules, "torchrl_rpd.configs.nodes")
        monkeypatch.setitem(sys.modules, "hydra", None)
        monkeypatch.setitem(sys.modules, "hydra.core.config_store", None)
        with pytest.raises(ImportError, match=r"torchrl_rpd\[hydra\]"):
            _ = configs.register


class TestValues:
    """What YAML cannot say arrives as Python means it."""

    def test_nested_keys(self):
        config = configs.TeacherActionTransformConfig(
            teacher_mask_key=["labels", "mask"], in_keys=["a", ["b", "c"]]
        )
        made = instantiate(config, _partial_=True)(teacher=lambda td: td["a"])
        assert made.teacher_mask_key == ("labels", "mask")

    def test_asymmetric_clip(self):
        student = students.mlp_actor_critic(4, 2)
        config = configs.DistillPPOLossConfig(clip_epsilon=[0.1, 0.3], _partial_=True)
        loss = instantiate(config)(
            actor_network=student.actor, critic_network=student.critic
        )
        assert float(loss.clip_epsilon_low) == pytest.approx(0.1)
        assert float(loss.clip_epsilon_high) == pytest.approx(0.3)

    def test_dtype(self):
        from torchrl_rpd.configs._plain import as_dtype

        assert as_dtype("bfloat16") is torch.bfloat16
        assert as_dtype(None) is None
        with pytest.raises(ValueError, match="no data type"):
            as_dtype("float7")

    def test_students_need_their_sizes(self):
        with pytest.raises(ValueError, match="observation_dim is null"):
            make_mlp(action_dim=2)
        with pytest.raises(ValueError, match="image_size is null"):
            make_cnn(action_dim=2)
        with pytest.raises(ValueError, match="action_dim is null"):
            make_mlp(observation_dim=4)

    def test_student_of_another_environment(self):
        from toy_envs import ReachEnv

        with pytest.raises(KeyError, match="does not write"):
            make_mlp(env=ReachEnv(2), observation_key=["observation", "state"])
        assert make_mlp(env=ReachEnv(2)).config["observation_dim"] == 2

    def test_overrides_of_a_built_environment(self):
        from toy_envs import ReachEnv

        config = configs.EvaluationHookConfig(interval=1, env_overrides={"num_envs": 2})
        with pytest.raises(ValueError, match="_partial_"):
            instantiate(config, _partial_=True)(env=ReachEnv(2))

    def test_no_teacher(self):
        from torchrl_rpd.configs.teachers import no_teacher

        with pytest.raises(RuntimeError, match="no teacher"):
            no_teacher(None)


if __name__ == "__main__":
    pytest.main([__file__])
