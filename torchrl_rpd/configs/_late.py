# Copyright (c) the torchrl_rpd authors.
#
# This source code is licensed under the MIT license found in the
# LICENSE file in the root directory of this source tree.
"""Hooks that need the trainer's parts, in configurations that cannot name them."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, TypeVar

from torch import nn
from torchrl.envs import TransformedEnv
from torchrl.trainers import Trainer, TrainerHookBase

from torchrl_rpd.students import RunningObservationNorm
from torchrl_rpd.transforms import TeacherActionTransform

T = TypeVar("T")


class LateHook(TrainerHookBase):
    """Builds a hook when it is registered, from the trainer that it is registered with.

    Hydra instantiates a trainer's ``hooks`` before the trainer: a hook of the loss, the
    critic or the teacher's transform cannot be given them there (``${loss}`` would be
    another loss with other weights).

    Args:
        build: takes the trainer, returns the hook.
    """

    def __init__(self, build: Callable[[Trainer], TrainerHookBase]) -> None:
        self._build = build
        self.hook: Any = None

    def register(self, trainer: Trainer, name: str | None = None) -> None:
        """Builds the hook and registers it, under its own name if none is given."""
        self.hook = self._build(trainer)
        self.hook.register(trainer, **({} if name is None else {"name": name}))

    def state_dict(self) -> dict[str, Any]:
        """That of the hook."""
        return self.hook.state_dict()

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """That of the hook."""
        self.hook.load_state_dict(state_dict)


def find_transform(trainer: Trainer, kind: type[T]) -> T:
    """The transform of a class in the environment of the trainer's collector."""
    layer = getattr(trainer.collector, "env", None)
    while isinstance(layer, TransformedEnv):
        transform = layer.transform
        parts = [transform] if not hasattr(transform, "transforms") else transform
        for part in parts:
            if isinstance(part, kind):
                return part
        layer = layer.base_env
    raise ValueError(
        f"The trainer's collector has no {kind.__name__} in an environment of this "
        "process: use the collector 'sync', or give the hook its transform."
    )


def find_teacher(trainer: Trainer) -> TeacherActionTransform:
    """The teacher's transform in the environment of the trainer's collector."""
    return find_transform(trainer, TeacherActionTransform)


def find_norm(actor: nn.Module) -> RunningObservationNorm:
    """The running statistics of a student's observations."""
    for module in actor.modules():
        if isinstance(module, RunningObservationNorm):
            return module
    raise ValueError(
        "The student has no RunningObservationNorm: leave the hook out, or set "
        "student.normalize_observation=true."
    )
