# Copyright (c) the torchrl_rpd authors.
#
# This source code is licensed under the MIT license found in the
# LICENSE file in the root directory of this source tree.
"""The paper's view, and changed views for its camera study."""

from __future__ import annotations

from dataclasses import dataclass

__all__ = ["CAMERA_VIEWS", "CameraView"]


@dataclass(frozen=True)
class CameraView:
    """A view of the scene, as it differs from the task's own human camera.

    A camera has axes of its own: forward (the way it looks), left and up. Being relative,
    one view serves all tasks.

    Args:
        name (str): its name as a ``camera`` or ``teacher_camera`` of
            :class:`~torchrl_rpd.envs.ManiSkillEnv`.
        description (str): what was done to the camera.
        position (tuple of 3 floats): metres by which it is moved forward, left and up.
        rotation (tuple of 3 floats): degrees by which it is turned about its forward,
            left and up axes, right-handed: positive ones lean it to its right, make it
            look down, and make it look left. They are applied in this order, each about
            an axis that the camera had before all turns.
        fov_scale (float): factor of the field of view; above 1 zooms out.

    Examples:
        >>> from torchrl_rpd.envs import CAMERA_VIEWS
        >>> CAMERA_VIEWS["human_moved"].description
        'moved 0.2 m to its left and 0.1 m down, looking the same way'
        >>> CAMERA_VIEWS["human_zoomed"].fov_scale
        1.4
    """

    name: str
    description: str
    position: tuple[float, float, float] = (0.0, 0.0, 0.0)
    rotation: tuple[float, float, float] = (0.0, 0.0, 0.0)
    fov_scale: float = 1.0


#: The views by their names: the paper's own, and changed ones. The paper studies one
#: changed camera, whose pose is unpublished: these are choices of this package.
CAMERA_VIEWS: dict[str, CameraView] = {
    view.name: view
    for view in (
        CameraView("human", "ManiSkill's camera for people: the paper's view"),
        CameraView(
            "human_moved",
            "moved 0.2 m to its left and 0.1 m down, looking the same way",
            position=(0.0, 0.2, -0.1),
        ),
        CameraView(
            "human_shifted",
            "moved 0.07 m to its left and 0.035 m down: a third of human_moved",
            position=(0.0, 0.07, -0.035),
        ),
        CameraView(
            "human_nudged",
            "moved 0.045 m to its left and 0.0225 m down",
            position=(0.0, 0.045, -0.0225),
        ),
        CameraView(
            "human_rotated",
            "turned in its place: leaning 15 degrees to its right, looking 10 down",
            rotation=(15.0, 10.0, 0.0),
        ),
        CameraView(
            "human_zoomed",
            "zoomed out: 1.4 times the field of view",
            fov_scale=1.4,
        ),
        CameraView(
            "human_close",
            "0.15 m closer, looking 15 degrees down",
            position=(0.15, 0.0, 0.0),
            rotation=(0.0, 15.0, 0.0),
        ),
    )
}
