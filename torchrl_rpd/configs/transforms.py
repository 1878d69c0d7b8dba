# Copyright (c) the torchrl_rpd authors.
#
# This source code is licensed under the MIT license found in the
# LICENSE file in the root directory of this source tree.
"""Configuration of the teacher's transform."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

from torch import Tensor
from torchrl.trainers.algorithms.configs.transforms import TransformConfig

from torchrl_rpd.configs._plain import with_keys
from torchrl_rpd.transforms import TeacherActionTransform


@dataclass
class TeacherActionTransformConfig(TransformConfig):
    """Hydra configuration for :class:`~torchrl_rpd.transforms.TeacherActionTransform`.

    Every argument of the constructor is a field. ``teacher`` is a node of the group
    ``teacher``; ``teacher_factory`` is the same with ``_partial_: true``. Nested keys
    are lists: ``[observation, image]``.

    Examples:
        >>> from hydra.utils import instantiate
        >>> from torchrl_rpd.configs import (
        ...     ScriptedTeacherConfig,
        ...     TeacherActionTransformConfig,
        ... )
        >>> instantiate(
        ...     TeacherActionTransformConfig(
        ...         teacher=ScriptedTeacherConfig(task_id="PushCube-v1"),
        ...         teacher_action_key=["teacher", "action"],
        ...     )
        ... ).teacher_action_key
        ('teacher', 'action')
    """

    teacher: Any = None
    teacher_factory: Any = None
    in_keys: Any = None
    teacher_action_key: Any = "teacher_action"
    teacher_mask_key: Any = "teacher_mask"
    teacher_std_key: Any = None
    action_key: Any = "action"
    max_batch_size: int | None = None
    query_fraction: float = 1.0
    always_query_key: Any = None
    replan_interval: int = 1
    history_window: int | None = None
    history_keys: Any = None
    action_transform: Any = None
    clip_labels: bool = True
    low: Any = None
    high: Any = None
    on_non_finite: str = "mask"
    no_op_norm: float | None = None
    seed: int = 0
    deferred: bool = False
    teacher_ticket_key: Any = "teacher_ticket"
    _target_: str = "torchrl_rpd.configs.transforms.make_teacher_action"
    _convert_: str = "all"
    _partial_: bool = False


def make_teacher_action(**kwargs: Any) -> TeacherActionTransform:
    """Builds the transform of a :class:`TeacherActionTransformConfig`."""
    kwargs = with_keys(
        kwargs,
        single=(
            "teacher_action_key",
            "teacher_mask_key",
            "teacher_std_key",
            "teacher_ticket_key",
            "action_key",
            "always_query_key",
        ),
        several=("in_keys", "history_keys"),
    )
    return TeacherActionTransform(**kwargs)


def first_dimensions(action: Tensor, *, count: int) -> Tensor:
    """The first ``count`` dimensions of ``[n, A]`` actions, as an ``action_transform``.

    PushT-v1's robot has no gripper: the last dimension of a teacher's action is dropped.
    """
    return action[..., :count]
