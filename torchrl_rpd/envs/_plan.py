# Copyright (c) the torchrl_rpd authors.
#
# This source code is licensed under the MIT license found in the
# LICENSE file in the root directory of this source tree.
"""Which cameras have to draw for the student and the teacher, and at what size."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from torchrl_rpd.envs._build import Size, camera_settings, height_width
from torchrl_rpd.envs._scene import TEACHER_CAMERA
from torchrl_rpd.envs._views import CameraArgument, ObsMode, camera_names
from torchrl_rpd.envs.cameras import CAMERA_VIEWS

# The paper's pictures; ManiSkill's own human camera has 512.
_HUMAN_SIZE = 256


@dataclass(frozen=True)
class Plan:
    """Which cameras have to draw, and at what size.

    Args:
        sensors: the sensor cameras that student and teacher see, by name or role. None:
            all.
        sensor_textures: what these draw, nothing if there are none.
        human_sizes: the sizes of the human views, by name; ``"human"`` has one in any
            case, for videos.
        teacher_view: the human view that teacher and student have in two sizes, for
            which the teacher gets a camera of its own. None: it does not need one.
        teacher_size: the size of that camera's pictures.
    """

    sensors: tuple[str, ...] | None
    sensor_textures: tuple[str, ...]
    human_sizes: Mapping[str, Size]
    teacher_view: str | None
    teacher_size: Size

    @classmethod
    def of(
        cls,
        mode: ObsMode,
        camera: CameraArgument,
        *,
        image_size: Size | None,
        teacher_camera: str | None,
        teacher_image_size: Size | None,
    ) -> Plan:
        """The plan for arguments of :class:`~torchrl_rpd.envs.ManiSkillEnv`."""
        names = camera_names(camera)
        # What the student sees: None is all sensor cameras.
        sensors: tuple[str, ...] | None = None
        if not mode.textures:
            sensors = ()
        elif names is not None:
            sensors = tuple(name for name in names if name not in CAMERA_VIEWS)
        textures = set(mode.textures) if sensors != () else set()
        if teacher_camera is not None and teacher_camera not in CAMERA_VIEWS:
            textures.add("rgb")
            if sensors is not None:
                sensors = (*sensors, teacher_camera)

        size = _HUMAN_SIZE if image_size is None else image_size
        teacher_size = _HUMAN_SIZE if teacher_image_size is None else teacher_image_size
        views = [n for n in names or () if n in CAMERA_VIEWS] if mode.textures else []
        human_sizes = dict.fromkeys(views, size)
        teacher_view = None
        if teacher_camera in views and height_width(size) != height_width(teacher_size):
            teacher_view = teacher_camera
        elif teacher_camera in CAMERA_VIEWS:
            human_sizes.setdefault(teacher_camera, teacher_size)
        human_sizes.setdefault("human", teacher_size)
        return cls(
            sensors=sensors,
            sensor_textures=tuple(t for t in ("rgb", "depth") if t in textures),
            human_sizes=human_sizes,
            teacher_view=teacher_view,
            teacher_size=teacher_size,
        )

    @property
    def changed_views(self) -> tuple[str, ...]:
        """The human views beside the task's own."""
        return tuple(name for name in self.human_sizes if name != "human")

    def human_settings(self, overrides: Mapping[str, Any] | None) -> dict[str, Any]:
        """ManiSkill's settings of the human cameras, with what overrides them."""
        overrides = overrides or {}
        places = {"pose", "eye", "target", "fov", "intrinsic"} & set(overrides)
        if places and self.changed_views:
            raise ValueError(
                f"human_render_camera_configs: {sorted(places)} for all human cameras "
                f"would make {[*self.changed_views]} the same as 'human'. Give them to "
                "one camera, by its name."
            )
        settings = camera_settings(self.human_sizes["human"], overrides)
        sizes = {name: self.human_sizes[name] for name in self.changed_views}
        if self.teacher_view is not None:
            sizes[TEACHER_CAMERA] = self.teacher_size
        for name, size in sizes.items():
            own = dict(zip(("height", "width"), height_width(size), strict=True))
            # A size that is given for all human cameras holds for this one as well.
            own = {key: value for key, value in own.items() if key not in overrides}
            settings[name] = {**own, **settings.get(name, {})}
        return settings
