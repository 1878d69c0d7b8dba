# Copyright (c) the torchrl_rpd authors.
#
# This source code is licensed under the MIT license found in the
# LICENSE file in the root directory of this source tree.
"""The groups and names of this package's nodes."""

from __future__ import annotations

from typing import Any, NamedTuple

# Registers TorchRL's own nodes, next to which ours stand.
import torchrl.trainers.algorithms.configs  # noqa: F401
from hydra.core.config_store import ConfigStore

from torchrl_rpd.configs.envs import ManiSkillEnvConfig
from torchrl_rpd.configs.hooks import (
    CheckpointHookConfig,
    DistillCoeffScheduleConfig,
    EvaluationHookConfig,
    LogEpisodesConfig,
    LogTeacherConfig,
    NumericalGuardConfig,
    ObservationNormUpdateConfig,
    OnPolicyMinibatchesConfig,
    SyncPolicyConfig,
    TargetKLStepperConfig,
)
from torchrl_rpd.configs.jump_start import (
    JumpStartScheduleConfig,
    JumpStartTransformConfig,
)
from torchrl_rpd.configs.objectives import (
    DistillKLPENPPOLossConfig,
    DistillPPOLossConfig,
    FiniteHorizonGAEConfig,
)
from torchrl_rpd.configs.students import CNNStudentConfig, MLPStudentConfig
from torchrl_rpd.configs.teachers import (
    OctoTeacherConfig,
    OpenVLATeacherConfig,
    PocketVLATeacherConfig,
    RemoteTeacherConfig,
    ScriptedTeacherConfig,
)
from torchrl_rpd.configs.trainers import RPDTrainerConfig
from torchrl_rpd.configs.transforms import TeacherActionTransformConfig


class Node(NamedTuple):
    """Where Hydra finds a node."""

    group: str
    name: str
    node: Any


#: Every node of this package.
NODES = (
    Node("env", "maniskill", ManiSkillEnvConfig),
    Node("transform", "teacher_action", TeacherActionTransformConfig),
    Node("transform", "jump_start", JumpStartTransformConfig),
    Node("loss", "distill_ppo", DistillPPOLossConfig),
    Node("loss", "distill_klpen", DistillKLPENPPOLossConfig),
    Node("value", "finite_horizon_gae", FiniteHorizonGAEConfig),
    Node("teacher", "scripted", ScriptedTeacherConfig),
    Node("teacher", "openvla", OpenVLATeacherConfig),
    Node("teacher", "octo", OctoTeacherConfig),
    Node("teacher", "pocket", PocketVLATeacherConfig),
    Node("teacher", "remote", RemoteTeacherConfig),
    Node("student", "mlp", MLPStudentConfig),
    Node("student", "cnn", CNNStudentConfig),
    Node("schedule", "constant", DistillCoeffScheduleConfig(kind="constant")),
    Node("schedule", "linear", DistillCoeffScheduleConfig(kind="linear")),
    Node("schedule", "cosine", DistillCoeffScheduleConfig(kind="cosine")),
    Node("schedule", "return_ratio", DistillCoeffScheduleConfig(kind="return_ratio")),
    Node("hook", "log_episodes", LogEpisodesConfig),
    Node("hook", "log_teacher", LogTeacherConfig),
    Node("hook", "jump_start_schedule", JumpStartScheduleConfig),
    Node("hook", "evaluation", EvaluationHookConfig),
    Node("hook", "numerical_guard", NumericalGuardConfig),
    Node("hook", "observation_norm_update", ObservationNormUpdateConfig),
    Node("hook", "target_kl_stepper", TargetKLStepperConfig),
    Node("hook", "on_policy_minibatches", OnPolicyMinibatchesConfig),
    Node("hook", "sync_policy", SyncPolicyConfig),
    Node("hook", "checkpoint", CheckpointHookConfig),
    Node("trainer", "rpd", RPDTrainerConfig),
)


def register() -> None:
    """Stores the nodes in Hydra's ``ConfigStore``, any number of times.

    An installed package needs no call: Hydra finds them through its plugin. A
    configuration folder should have no file of a node's name (``student/mlp.yaml``):
    Hydra takes the node for the file's schema then, and warns.

    Examples:
        >>> from hydra import compose, initialize
        >>> from torchrl_rpd.configs import register
        >>> register()
        >>> with initialize(version_base="1.3", config_path=None):
        ...     cfg = compose(overrides=["+loss=distill_ppo", "loss.distill_coeff=0.5"])
        >>> cfg.loss.distill_type, cfg.loss.distill_coeff
        ('mse', 0.5)
    """
    store = ConfigStore.instance()
    for group, name, node in NODES:
        store.store(group=group, name=name, node=node)
