# Copyright (c) the torchrl_rpd authors.
#
# This source code is licensed under the MIT license found in the
# LICENSE file in the root directory of this source tree.
"""ManiSkill tasks with other cameras or another look of the robot.

ManiSkill builds its scene in the constructor, so that an object cannot be changed before
its scene is built. Here a subclass of the task is made, which nobody else sees: neither
the task's class nor ManiSkill's registries change.
"""

from __future__ import annotations

import dataclasses
import functools
import math
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

from torchrl_rpd.envs.cameras import CAMERA_VIEWS, CameraView

# The human render camera that draws for the teacher, where student and teacher have the
# same view in two sizes.
TEACHER_CAMERA = "teacher_camera"


@dataclass(frozen=True)
class SceneChanges:
    """What differs from the task as it is registered.

    Args:
        sensors: the sensor cameras that are used, by name or role; the others are never
            drawn. None: all.
        extra_cameras: poses of the cameras to add, by name.
        human_views: the changed views of the human camera that are used.
        teacher_view: what a human render camera of the teacher's own shows: a name of
            :data:`~torchrl_rpd.envs.CAMERA_VIEWS`. None: it needs no such camera.
        light_visuals: whether the robot is drawn as its collision shapes.
    """

    sensors: tuple[str, ...] | None = None
    extra_cameras: Mapping[str, Any] = field(default_factory=dict)
    human_views: tuple[str, ...] = ()
    teacher_view: str | None = None
    light_visuals: bool = False

    @property
    def any(self) -> bool:
        """Whether the registered task does not do."""
        return self != SceneChanges()


@functools.cache
def adapted_class(task_class: Any) -> type:
    """The task's subclass that takes a further argument ``changes``."""
    from mani_skill.sensors.camera import CameraConfig, parse_camera_configs

    from torchrl_rpd.envs._views import Cameras

    class Adapted(task_class):
        """A ManiSkill task with other cameras or another look of the robot."""

        robot_uids: Any

        def __init__(self, *args: Any, changes: SceneChanges, **kwargs: Any) -> None:
            self._changes = changes
            super().__init__(*args, **kwargs)

        @property
        def _default_sensor_configs(self) -> dict[str, Any]:
            configs = parse_camera_configs(super()._default_sensor_configs)
            for name, pose in self._changes.extra_cameras.items():
                if name in configs:
                    raise ValueError(
                        f"extra_cameras: the task has a camera {name!r} already. "
                        "Override it with sensor_configs."
                    )
                configs[name] = CameraConfig(
                    uid=name, pose=pose, width=128, height=128, fov=1.0
                )
            return configs

        @property
        def _default_human_render_camera_configs(self) -> dict[str, Any]:
            configs = parse_camera_configs(super()._default_human_render_camera_configs)
            added = {name: name for name in self._changes.human_views}
            if self._changes.teacher_view is not None:
                added[TEACHER_CAMERA] = self._changes.teacher_view
            if added and not configs:
                raise ValueError("This task has no human render camera.")
            # The task's own camera is the first, and stays it.
            for uid, name in added.items():
                first = next(iter(configs.values()))
                configs[uid] = _changed(first, CAMERA_VIEWS[name], uid)
            return configs

        def _setup_sensors(self, options: dict[str, Any]) -> None:
            super()._setup_sensors(options)
            if self._changes.sensors is not None:
                cameras = Cameras.of(self)
                used = {cameras.find(name) for name in self._changes.sensors}
                # The scene draws what this dictionary holds.
                for name in set(self._sensors) - used:
                    del self._sensors[name]

        def _load_agent(self, *args: Any, **kwargs: Any) -> None:
            if not self._changes.light_visuals:
                super()._load_agent(*args, **kwargs)
                return
            # The tasks look at the robot's name, hence for this call only.
            name = self.robot_uids
            self.robot_uids = _light(name)
            try:
                super()._load_agent(*args, **kwargs)
            finally:
                self.robot_uids = name

    Adapted.__name__ = task_class.__name__
    Adapted.__qualname__ = task_class.__qualname__
    return Adapted


def _changed(config: Any, view: CameraView, uid: str) -> Any:
    """The settings of a camera that stands beside another one and shows this view."""
    import sapien
    from mani_skill.utils.structs.pose import Pose

    if config.fov is None and view.fov_scale != 1.0:
        raise ValueError(
            f"{view.name!r} changes the field of view, and the camera {config.uid!r} of "
            "this task has an intrinsic matrix instead."
        )
    move = sapien.Pose(p=list(view.position))
    move.set_rpy([math.radians(angle) for angle in view.rotation])
    return dataclasses.replace(
        config,
        uid=uid,
        pose=config.pose * Pose.create(move),
        fov=None if config.fov is None else config.fov * view.fov_scale,
    )


def _light(robot: Any) -> Any:
    """The robot's class (each one's, of several) with light visuals."""
    from mani_skill.agents.registration import REGISTERED_AGENTS

    from torchrl_rpd.envs._light_visuals import light_agent

    if isinstance(robot, tuple | list):
        return tuple(_light(r) for r in robot)
    if isinstance(robot, str):
        robot = REGISTERED_AGENTS[robot].agent_cls
    return light_agent(robot)
