# Copyright (c) the torchrl_rpd authors.
#
# This source code is licensed under the MIT license found in the
# LICENSE file in the root directory of this source tree.
"""Observation modes, camera names and keys, without a simulator."""

from __future__ import annotations

import pytest

from torchrl_rpd.envs._views import Cameras, ObsMode

ARM = Cameras(
    sensors=("base_camera", "hand_camera", "side"),
    mounted=("hand_camera",),
    humans=("render_camera", "teacher_camera"),
)


class TestObsMode:
    @pytest.mark.parametrize(
        ("text", "state", "textures"),
        [
            ("state", "state", ()),
            ("state_dict", "state_dict", ()),
            ("rgb", None, ("rgb",)),
            ("depth", None, ("depth",)),
            ("rgbd", None, ("rgb", "depth")),
            ("rgb+depth", None, ("rgb", "depth")),
            ("depth+state+rgb", "state", ("rgb", "depth")),
            ("rgbd+state", "state", ("rgb", "depth")),
            ("rgb+state_dict", "state_dict", ("rgb",)),
        ],
    )
    def test_parts(self, text, state, textures):
        assert ObsMode.parse(text) == ObsMode(state, textures)

    @pytest.mark.parametrize(
        "text", ["none", "pointcloud", "rgb+normal", "", "state+state_dict", "image"]
    )
    def test_refused(self, text):
        with pytest.raises(ValueError, match="obs_mode="):
            ObsMode.parse(text)

    @pytest.mark.parametrize(
        ("text", "textures", "expected"),
        [
            ("rgbd+state", ("rgb", "depth"), "rgb+depth+state"),
            # The human camera alone: nothing for ManiSkill to draw.
            ("rgb", (), "none"),
            ("rgb+state", (), "state"),
            # A sensor's picture for the teacher beside a state student.
            ("state", ("rgb",), "rgb+state"),
        ],
    )
    def test_what_mani_skill_draws(self, text, textures, expected):
        assert ObsMode.parse(text).of_mani_skill(textures) == expected


def keys(cameras, camera, textures=("rgb",)):
    return {
        view.camera: [key[1] for _, key in view.keys]
        for view in cameras.views(camera, textures)
    }


class TestCameras:
    @pytest.mark.parametrize(
        ("camera", "expected"),
        [
            (
                None,
                {
                    "base_camera": ["image"],
                    "hand_camera": ["wrist_image"],
                    "side": ["side_image"],
                },
            ),
            ("main", {"base_camera": ["image"]}),
            ("base_camera", {"base_camera": ["image"]}),
            ("hand", {"hand_camera": ["wrist_image"]}),
            ("side", {"side": ["side_image"]}),
            ("human", {"render_camera": ["image"]}),
            (
                ("human", "hand"),
                {"render_camera": ["image"], "hand_camera": ["wrist_image"]},
            ),
            # The main camera keeps its key, whatever the order.
            (
                ("human", "main"),
                {"render_camera": ["human_image"], "base_camera": ["image"]},
            ),
        ],
    )
    def test_keys(self, camera, expected):
        assert keys(ARM, camera) == expected

    def test_depth(self):
        assert keys(ARM, ("main", "hand", "side"), ("rgb", "depth")) == {
            "base_camera": ["image", "depth"],
            "hand_camera": ["wrist_image", "wrist_depth"],
            "side": ["side_image", "side_depth"],
        }

    def test_only_the_human_cameras_are_human(self):
        human = {v.camera: v.human for v in ARM.views(("human", "main"), ("rgb",))}
        assert human == {"render_camera": True, "base_camera": False}

    def test_several_mounted_cameras(self):
        robot = Cameras(("head", "hand_camera"), ("head", "hand_camera"), ())
        assert keys(robot, None) == {
            "head": ["head_image"],
            "hand_camera": ["wrist_image"],
        }
        assert robot.main is None
        assert Cameras(("fetch_hand",), ("fetch_hand",), ()).hand == "fetch_hand"

    def test_unknown(self):
        with pytest.raises(ValueError, match=r"'top'.*'main'.*'side'.*extra_cameras"):
            ARM.find("top")
        with pytest.raises(ValueError, match="no camera 'human'"):
            Cameras(("base_camera",), (), ()).find("human")

    @pytest.mark.parametrize("camera", [("main", "main"), (), ("main", "base_camera")])
    def test_twice_or_none(self, camera):
        with pytest.raises(ValueError, match="camera="):
            ARM.views(camera, ("rgb",))

    def test_no_sensor(self):
        with pytest.raises(ValueError, match="camera='human'"):
            Cameras((), (), ("render_camera",)).views(None, ("rgb",))


if __name__ == "__main__":
    pytest.main([__file__])
