# Copyright (c) the torchrl_rpd authors.
#
# This source code is licensed under the MIT license found in the
# LICENSE file in the root directory of this source tree.
"""Hydra nodes of this package, in groups next to TorchRL's own.

Installed with the extra ``hydra``, they are found by every Hydra application that uses
TorchRL, such as TorchRL's own training scripts, without an import: see
``hydra_plugins/torchrl_rpd_plugin.py``. The names are loaded when they are asked for, so
that this package can be imported where Hydra is missing.
"""

from __future__ import annotations

import importlib
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
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
    from torchrl_rpd.configs.nodes import NODES, register
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
    from torchrl_rpd.configs.trainers import (
        RPDParts,
        RPDTrainerConfig,
        make_rpd_trainer,
    )
    from torchrl_rpd.configs.transforms import TeacherActionTransformConfig

_MODULES = {
    "envs": ("ManiSkillEnvConfig",),
    "hooks": (
        "CheckpointHookConfig",
        "DistillCoeffScheduleConfig",
        "EvaluationHookConfig",
        "LogEpisodesConfig",
        "LogTeacherConfig",
        "NumericalGuardConfig",
        "ObservationNormUpdateConfig",
        "OnPolicyMinibatchesConfig",
        "SyncPolicyConfig",
        "TargetKLStepperConfig",
    ),
    "jump_start": ("JumpStartScheduleConfig", "JumpStartTransformConfig"),
    "nodes": ("NODES", "register"),
    "objectives": (
        "DistillKLPENPPOLossConfig",
        "DistillPPOLossConfig",
        "FiniteHorizonGAEConfig",
    ),
    "students": ("CNNStudentConfig", "MLPStudentConfig"),
    "teachers": (
        "OctoTeacherConfig",
        "OpenVLATeacherConfig",
        "PocketVLATeacherConfig",
        "RemoteTeacherConfig",
        "ScriptedTeacherConfig",
    ),
    "trainers": ("RPDParts", "RPDTrainerConfig", "make_rpd_trainer"),
    "transforms": ("TeacherActionTransformConfig",),
}
_HOME = {name: module for module, names in _MODULES.items() for name in names}

__all__ = [
    "NODES",
    "CNNStudentConfig",
    "CheckpointHookConfig",
    "DistillCoeffScheduleConfig",
    "DistillKLPENPPOLossConfig",
    "DistillPPOLossConfig",
    "EvaluationHookConfig",
    "FiniteHorizonGAEConfig",
    "JumpStartScheduleConfig",
    "JumpStartTransformConfig",
    "LogEpisodesConfig",
    "LogTeacherConfig",
    "MLPStudentConfig",
    "ManiSkillEnvConfig",
    "NumericalGuardConfig",
    "ObservationNormUpdateConfig",
    "OctoTeacherConfig",
    "OnPolicyMinibatchesConfig",
    "OpenVLATeacherConfig",
    "PocketVLATeacherConfig",
    "RPDParts",
    "RPDTrainerConfig",
    "RemoteTeacherConfig",
    "ScriptedTeacherConfig",
    "SyncPolicyConfig",
    "TargetKLStepperConfig",
    "TeacherActionTransformConfig",
    "make_rpd_trainer",
    "register",
]


def __getattr__(name: str) -> Any:
    if name not in _HOME:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    try:
        module = importlib.import_module(f"{__name__}.{_HOME[name]}")
    except ModuleNotFoundError as error:
        if (error.name or "").partition(".")[0] not in ("hydra", "omegaconf"):
            raise
        raise ImportError(
            f"{__name__}.{name} needs Hydra: pip install 'torchrl_rpd[hydra]'"
        ) from error
    return getattr(module, name)
