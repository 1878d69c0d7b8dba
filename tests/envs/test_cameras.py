# Copyright (c) the torchrl_rpd authors.
#
# This source code is licensed under the MIT license found in the
# LICENSE file in the root directory of this source tree.
"""The camera study: where the views look from, and whose pictures go where."""

from __future__ import annotations

import importlib
import itertools
from collections.abc import Generator

import numpy as np
import pytest
import torch

from torchrl_rpd.envs import CAMERA_VIEWS, ManiSkillEnv
from torchrl_rpd.envs._plan import Plan
from torchrl_rpd.envs._scene import TEACHER_CAMERA, SceneChanges, adapted_class
from torchrl_rpd.envs._views import Cameras, ObsMode

CHANGED = [name for name in CAMERA_VIEWS if name != "human"]
SIDE = 32
IMAGE = ("observation", "image")


class TestTable:
    def test_names(self):
        assert all(name == view.name for name, view in CAMERA_VIEWS.items())
        assert set(CAMERA_VIEWS) >= {"human_moved", "human_rotated", "human_zoomed"}

    def test_the_papers_view_is_mani_skills(self):
        view = CAMERA_VIEWS["human"]
        assert view.position == view.rotation == (0.0, 0.0, 0.0)
        assert view.fov_scale == 1.0

    @pytest.mark.parametrize(
        ("name", "change"),
        [
            ("human_moved", "position"),
            ("human_rotated", "rotation"),
            ("human_zoomed", "fov_scale"),
        ],
    )
    def test_one_change_each(self, name, change):
        view, stock = CAMERA_VIEWS[name], CAMERA_VIEWS["human"]
        changed = {
            field
            for field in ("position", "rotation", "fov_scale")
            if getattr(view, field) != getattr(stock, field)
        }
        assert changed == {change}


SCENE = Cameras(
    sensors=("base_camera", "hand_camera"),
    mounted=("hand_camera",),
    humans=("render_camera", "human_moved", "human_zoomed"),
)


class TestKeys:
    @pytest.mark.parametrize(
        ("camera", "expected"),
        [
            ("human_moved", {"human_moved": "image"}),
            (
                ("human_moved", "hand"),
                {"human_moved": "image", "hand_camera": "wrist_image"},
            ),
            # The task's own view keeps its key, whatever the order.
            (
                ("human_moved", "human"),
                {"human_moved": "human_moved_image", "render_camera": "image"},
            ),
            (
                ("human_moved", "main"),
                {"human_moved": "human_moved_image", "base_camera": "image"},
            ),
            (
                ("human_zoomed", "human_moved"),
                {"human_zoomed": "image", "human_moved": "human_moved_image"},
            ),
        ],
    )
    def test_student(self, camera, expected):
        views = SCENE.views(camera, ("rgb",))
        assert {view.camera: view.keys[0][1][1] for view in views} == expected
        for view in views:
            assert view.human == (view.camera not in SCENE.sensors)

    def test_unknown(self):
        with pytest.raises(ValueError, match=r"'human_top'.*'human_rotated'"):
            SCENE.find("human_top")


def plan(camera, teacher=None, mode="rgb", size=None, teacher_size=None) -> Plan:
    return Plan.of(
        ObsMode.parse(mode),
        camera,
        image_size=size,
        teacher_camera=teacher,
        teacher_image_size=teacher_size,
    )


class TestPlan:
    @pytest.mark.parametrize(
        ("made", "sizes", "teacher_view"),
        [
            (plan("human"), {"human": 256}, None),
            (plan("human", size=64), {"human": 64}, None),
            # The human camera draws in the teacher's size, if nobody looks at it.
            (plan("human_moved", size=64), {"human_moved": 64, "human": 256}, None),
            (
                plan("human_moved", "human", size=64),
                {"human_moved": 64, "human": 256},
                None,
            ),
            (
                plan("human", "human_moved", size=64, teacher_size=(24, 32)),
                {"human": 64, "human_moved": (24, 32)},
                None,
            ),
            # One camera for both; two where the sizes differ.
            (
                plan("human_moved", "human_moved"),
                {"human_moved": 256, "human": 256},
                None,
            ),
            (
                plan("human_moved", "human_moved", size=64),
                {"human_moved": 64, "human": 256},
                "human_moved",
            ),
            (
                plan(None, "human_moved", mode="state"),
                {"human_moved": 256, "human": 256},
                None,
            ),
        ],
    )
    def test_sizes(self, made, sizes, teacher_view):
        assert made.human_sizes == sizes
        assert made.teacher_view == teacher_view
        assert "human_moved" not in (made.sensors or ())

    def test_settings(self):
        """Each camera has its size, a size for all holds for all."""
        both = plan("human_moved", "human_moved", size=64, teacher_size=32)
        assert both.human_settings(None) == {
            "height": 32,
            "width": 32,
            "human_moved": {"height": 64, "width": 64},
            TEACHER_CAMERA: {"height": 32, "width": 32},
        }
        given = {"width": 8, "human_moved": {"height": 4}}
        assert both.human_settings(given) == {
            "height": 32,
            "width": 8,
            "human_moved": {"height": 4},
            TEACHER_CAMERA: {"height": 32},
        }

    def test_one_pose_for_all_is_refused(self):
        place = {"fov": 0.7}
        assert plan("human", size=64).human_settings(place)["fov"] == 0.7
        with pytest.raises(ValueError, match=r"\['fov'\].*\['human_moved'\]"):
            plan("human_moved").human_settings(place)


def expected_camera(view, eye, target) -> tuple[np.ndarray, np.ndarray, float]:
    """Position, axes (columns: forward, left, up) and field of view, from the table."""
    forward = np.subtract(target, eye) / np.linalg.norm(np.subtract(target, eye))
    left = np.cross([0.0, 0.0, 1.0], forward)
    left /= np.linalg.norm(left)
    axes = np.stack([forward, left, np.cross(forward, left)], 1)
    turns = []
    for axis, angle in enumerate(np.deg2rad(view.rotation)):
        j, k = (axis + 1) % 3, (axis + 2) % 3
        turn = np.eye(3)
        turn[[j, k], [j, k]] = np.cos(angle)
        turn[k, j], turn[j, k] = np.sin(angle), -np.sin(angle)
        turns.append(turn)
    return (
        eye + axes @ np.array(view.position),
        axes @ turns[2] @ turns[1] @ turns[0],
        view.fov_scale * 1.0,
    )


HUMAN = ((0.6, 0.7, 0.6), (0.0, 0.0, 0.35))  # eye and target in the cube tasks


@pytest.fixture(scope="module")
def configs():
    """ManiSkill's settings of the human cameras; nothing is built."""
    module = "mani_skill.envs.tasks.tabletop.push_cube"
    task = adapted_class(importlib.import_module(module).PushCubeEnv)
    env = object.__new__(task)
    env._changes = SceneChanges(human_views=tuple(CHANGED), teacher_view="human_moved")
    return env._default_human_render_camera_configs


@pytest.mark.maniskill
class TestPoses:
    def test_cameras(self, configs):
        # The task's own comes first: "human" is the first one.
        assert [*configs] == ["render_camera", *CHANGED, TEACHER_CAMERA]
        assert all(uid == config.uid for uid, config in configs.items())
        teacher, moved = configs[TEACHER_CAMERA], configs["human_moved"]
        assert torch.equal(teacher.pose.raw_pose, moved.pose.raw_pose)

    @pytest.mark.parametrize("name", CHANGED)
    def test_against_the_table(self, configs, name):
        position, axes, fov = expected_camera(CAMERA_VIEWS[name], *HUMAN)
        matrix = configs[name].pose.to_transformation_matrix()[0].numpy()
        np.testing.assert_allclose(matrix[:3, 3], position, atol=1e-5)
        np.testing.assert_allclose(matrix[:3, :3], axes, atol=1e-5)
        assert configs[name].fov == pytest.approx(fov)

    @pytest.mark.parametrize("name", CAMERA_VIEWS)
    def test_what_matters_is_in_the_picture(self, configs, name):
        """Every start of cube, goal and hand in PushCube, PullCube and PickCube."""
        config = configs["render_camera" if name == "human" else name]
        matrix = config.pose.to_transformation_matrix()[0].numpy()
        corners = [*itertools.product((-0.1, 0.1), (-0.1, 0.1))]
        points = [(x, y, 0.02) for x, y in corners]  # cubes
        points += [(x + 0.2, y, 0.0) for x, y in corners]  # PushCube's goal
        points += [(x - 0.2, y, 0.0) for x, y in corners]  # PullCube's goal
        points += [(x, y, 0.32) for x, y in corners]  # PickCube's highest goal
        points += [(0.0, 0.0, 0.17)]  # the hand
        forward, left, up = ((np.array(points) - matrix[:3, 3]) @ matrix[:3, :3]).T
        edge = forward * np.tan(config.fov / 2)
        assert (forward > 0).all()
        assert (np.abs(left) < edge).all() and (np.abs(up) < edge).all()


@pytest.fixture(scope="module")
def pictures(renderer) -> Generator[dict[str, torch.Tensor]]:
    """The same moment in all views, at the reset and after a step."""
    env = make(camera=("human", *CHANGED))
    td = play(env)
    yield {
        name: td["observation", "image" if name == "human" else f"{name}_image"]
        for name in CAMERA_VIEWS
    }
    env.close()


@pytest.mark.maniskill
@pytest.mark.render
@pytest.mark.usefixtures("renderer")
class TestPictures:
    def test_they_differ(self, pictures):
        for one, other in itertools.combinations(pictures.values(), 2):
            assert (one.int() - other.int()).abs().float().mean() > 5

    @pytest.mark.parametrize("name", ["human_rotated", "human_zoomed"])
    def test_as_if_the_human_camera_were_there(self, pictures, name):
        position, axes, fov = expected_camera(CAMERA_VIEWS[name], *HUMAN)
        rotation = importlib.import_module("scipy.spatial.transform").Rotation
        x, y, z, w = rotation.from_matrix(axes).as_quat()
        place = {"pose": [*position.tolist(), w, x, y, z], "fov": fov}
        config = {"render_camera": place}
        td = play(make(camera="human", human_render_camera_configs=config))
        difference = (td[IMAGE].int() - pictures[name].int()).abs().float()
        assert difference.mean() < 1

    @pytest.mark.parametrize(
        ("camera", "teacher"),
        [("human_moved", "human"), ("human", "human_moved"), ("human_moved",) * 2],
    )
    def test_student_and_teacher_choose(self, pictures, monkeypatch, camera, teacher):
        """Each gets the picture that it asked for, and each view is drawn once."""
        from mani_skill.sensors.camera import Camera

        env = make(camera=camera, teacher_camera=teacher, teacher_image_size=SIDE)
        td = play(env)
        assert torch.equal(td[IMAGE], pictures[camera])
        assert torch.equal(td["teacher_image"], pictures[teacher])
        assert len(td["observation"].keys()) == 1
        drawn = []
        capture = Camera.capture
        monkeypatch.setattr(
            Camera, "capture", lambda c: (drawn.append(c.config.uid), capture(c))
        )
        env.step(td.set("action", torch.zeros(1, 7)))
        own = {"human": "render_camera"}
        wanted = {own.get(name, name) for name in (camera, teacher)}
        assert sorted(drawn) == sorted(wanted)

    def test_one_view_in_two_sizes(self, pictures):
        env = make(
            camera="human_moved",
            image_size=SIDE // 2,
            teacher_camera="human_moved",
            teacher_image_size=SIDE,
        )
        td = play(env)
        assert td[IMAGE].shape == (1, 3, SIDE // 2, SIDE // 2)
        assert torch.equal(td["teacher_image"], pictures["human_moved"])

    def test_videos_keep_the_papers_view(self, pictures):
        env = make(camera="human_moved", from_pixels=True, teacher_image_size=SIDE)
        td = play(env)
        assert torch.equal(td[IMAGE], pictures["human_moved"])
        assert torch.equal(td["pixels"].permute(0, 3, 1, 2), pictures["human"])

    def test_beside_a_state_student(self, pictures):
        env = make(
            obs_mode="state", teacher_camera="human_moved", teacher_image_size=SIDE
        )
        td = play(env)
        assert torch.equal(td["teacher_image"], pictures["human_moved"])
        assert td["observation"].shape == (1, 35)

    def test_refused(self):
        place = {"eye": [1, 0, 1], "target": [0, 0, 0]}
        with pytest.raises(ValueError, match=r"extra_cameras.*human_moved"):
            make(extra_cameras={"human_moved": place})
        with pytest.raises(ValueError, match="no camera 'human_top'"):
            make(camera="human_top")


def make(**kwargs) -> ManiSkillEnv:
    settings = {"obs_mode": "rgb", "image_size": SIDE, "light_visuals": True}
    return ManiSkillEnv("PushCube-v1", **{**settings, **kwargs})


def play(env: ManiSkillEnv):
    """The observation after one step of a fixed episode."""
    env.set_seed(1)
    action = torch.tensor([[0.3, 0.2, -0.5, 0.0, 0.0, 0.0, 1.0]])
    return env.step(env.reset().set("action", action))["next"].exclude("reward")


if __name__ == "__main__":
    pytest.main([__file__])
