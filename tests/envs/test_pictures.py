# Copyright (c) the torchrl_rpd authors.
#
# This source code is licensed under the MIT license found in the
# LICENSE file in the root directory of this source tree.
"""Pictures against plain ManiSkill, and inside TorchRL. Small ones: drawing is slow."""

from __future__ import annotations

import importlib

import gymnasium as gym
import pytest
import torch
from torchrl.envs import Compose, SerialEnv, StepCounter, TransformedEnv
from torchrl.envs.utils import check_env_specs
from torchrl.record import VideoRecorder

from torchrl_rpd.envs import ManiSkillEnv, ManiSkillWrapper

pytestmark = [
    pytest.mark.maniskill,
    pytest.mark.render,
    pytest.mark.usefixtures("renderer"),
]

SIDE = 16
FAST = {"fast_controller": True, "light_visuals": True, "image_size": SIDE}
IMAGE = ("observation", "image")


def make_push(**kwargs) -> ManiSkillEnv:
    """For worker processes, which need a function of a module."""
    return ManiSkillEnv("PushCube-v1", obs_mode="rgb", camera="human", **FAST, **kwargs)


def plain_env(task: str, **kwargs):
    """ManiSkill itself, with pictures."""
    importlib.import_module("mani_skill.envs")  # registers the tasks
    return gym.make(
        task,
        control_mode="pd_ee_delta_pose",
        render_backend="cpu",
        render_mode="rgb_array",
        **kwargs,
    ).unwrapped


def chw(picture: torch.Tensor) -> torch.Tensor:
    return picture.permute(0, 3, 1, 2)


def green(image: torch.Tensor) -> int:
    """How many pixels of ``[1, 3, H, W]`` have the colour of PickCube's goal."""
    r, g, b = image[0].int()
    return int(((g > 100) & (r < g // 2) & (b < g // 2)).sum())


class TestAgainstManiSkill:
    def test_all_sensor_cameras_with_depth_and_state(self):
        size = {"width": SIDE, "height": SIDE}
        plain = plain_env(
            "StackCube-v1", obs_mode="rgb+depth+state", sensor_configs=size
        )
        env = ManiSkillEnv("StackCube-v1", obs_mode="rgbd+state", image_size=SIDE)
        env.set_seed(0)
        td = env.reset()
        raw, _ = plain.reset(seed=0)
        for _ in range(3):
            observed = td["observation"]
            base, hand = (raw["sensor_data"][c] for c in ("base_camera", "hand_camera"))
            assert torch.equal(observed["image"], chw(base["rgb"]))
            assert torch.equal(observed["depth"], chw(base["depth"]))
            assert torch.equal(observed["wrist_image"], chw(hand["rgb"]))
            assert torch.equal(observed["wrist_depth"], chw(hand["depth"]))
            assert torch.equal(observed["state"], raw["state"])
            assert len(observed.keys()) == 5
            td = env.step(env.rand_action(td))
            raw = plain.step(td["action"])[0]
            td = td["next"]
        assert observed["image"].dtype == torch.uint8
        assert observed["depth"].dtype == torch.int16
        assert observed["depth"].shape == (1, 1, SIDE, SIDE)

    def test_human_camera_of_any_size(self):
        size = {"width": 40, "height": 24}
        plain = plain_env(
            "PickCube-v1", obs_mode="state", human_render_camera_configs=size
        )
        env = ManiSkillEnv(
            "PickCube-v1", obs_mode="rgb+state", camera="human", image_size=(24, 40)
        )
        env.set_seed(0)
        td = env.reset()
        raw, _ = plain.reset(seed=0)
        for _ in range(2):
            assert torch.equal(td[IMAGE], chw(plain.render_rgb_array()))
            assert torch.equal(td["observation", "state"], raw)
            td = env.step(env.rand_action(td))
            raw = plain.step(td["action"])[0]
            td = td["next"]
        assert td[IMAGE].shape == (1, 3, 24, 40)

    def test_wrapper_of_what_gym_made(self):
        base = plain_env("PushCube-v1", obs_mode="rgb")
        env = ManiSkillWrapper(base, camera=("main", "human"))
        td = env.reset()
        assert set(td["observation"].keys()) == {"image", "human_image"}
        assert td["observation", "human_image"].shape == (1, 3, 512, 512)
        with pytest.raises(ValueError, match=r"\['depth', 'state'\] needs"):
            ManiSkillWrapper(base, obs_mode="rgbd+state")


def test_the_human_camera_shows_the_goal():
    """It is hidden from the sensors, also when both draw the same step."""
    env = ManiSkillEnv(
        "PickCube-v1",
        obs_mode="rgb",
        camera=("human", "main"),
        **{**FAST, "image_size": 64},
    )
    env.set_seed(1)  # an episode whose goal no part of the robot covers
    td = env.reset()
    for _ in range(2):
        assert green(td["observation", "human_image"]) > 0
        assert green(td[IMAGE]) == 0
        td = env.step(td.set("action", torch.zeros(1, 7)))["next"]


class TestOnlyWhatIsAskedForIsDrawn:
    @pytest.fixture
    def drawn(self, monkeypatch):
        from mani_skill.sensors.camera import Camera

        names = []
        capture = Camera.capture

        def counted(self):
            names.append(self.config.uid)
            capture(self)

        monkeypatch.setattr(Camera, "capture", counted)
        return names

    @pytest.mark.parametrize(
        ("kwargs", "expected"),
        [
            ({"obs_mode": "rgb", "camera": "human"}, ["render_camera"]),
            ({"obs_mode": "rgb", "camera": "hand"}, ["hand_camera"]),
            ({"obs_mode": "state", "teacher_camera": "main"}, ["base_camera"]),
            # One picture for two readers.
            (
                {"obs_mode": "rgb", "camera": "human", "from_pixels": True},
                ["render_camera"],
            ),
            (
                {
                    "obs_mode": "rgb",
                    "camera": "human",
                    "teacher_camera": "human",
                    "teacher_image_size": SIDE,
                },
                ["render_camera"],
            ),
        ],
    )
    def test_cameras(self, drawn, kwargs, expected):
        env = ManiSkillEnv("StackCube-v1", **FAST, **kwargs)
        td = env.reset()
        drawn.clear()
        env.step(env.rand_action(td))
        assert drawn == expected


class TestCameras:
    def test_added_and_moved(self):
        """A camera put where the base camera stands draws its picture; a moved base
        camera draws another. Each has its own size."""
        place = {"eye": [0.3, 0, 0.6], "target": [-0.1, 0, 0.1]}  # base_camera's
        env = ManiSkillEnv(
            "PushCube-v1",
            obs_mode="rgb",
            light_visuals=True,
            extra_cameras={
                "side": {**place, "fov": 1.5707963, "height": 24, "width": 24},
                "top": {"pose": (0, 0, 1.5, 0.7071068, 0, 0.7071068, 0)},
            },
            image_size=SIDE,
        )
        stock = ManiSkillEnv(
            "PushCube-v1",
            obs_mode="rgb",
            light_visuals=True,
            image_size=24,
            sensor_configs={"base_camera": {"width": 24}},
        )
        moved = ManiSkillEnv(
            "PushCube-v1",
            obs_mode="rgb",
            light_visuals=True,
            image_size=24,
            sensor_configs={"base_camera": {"pose": [0.5, 0, 0.6, 0, 0.3, 0, 0.95]}},
        )
        pictures = []
        for each in (env, stock, moved):
            each.set_seed(0)
            pictures.append(each.reset()["observation"])
        assert pictures[0]["image"].shape == (1, 3, SIDE, SIDE)
        assert pictures[0]["top_image"].shape == (1, 3, SIDE, SIDE)
        difference = (
            pictures[0]["side_image"].int() - pictures[1]["image"].int()
        ).abs()
        assert difference.float().mean() < 1
        difference = (pictures[1]["image"].int() - pictures[2]["image"].int()).abs()
        assert difference.float().mean() > 5

    def test_human_camera_moved(self):
        pictures = []
        for config in ({}, {"eye": [0.1, 0.1, 1.2], "target": [0, 0, 0]}):
            env = make_push(human_render_camera_configs={"render_camera": config})
            env.set_seed(0)
            pictures.append(env.reset()[IMAGE].int())
        assert (pictures[0] - pictures[1]).abs().float().mean() > 5

    def test_unknown(self):
        with pytest.raises(ValueError, match=r"no camera 'hand'.*base_camera"):
            ManiSkillEnv("PushCube-v1", obs_mode="rgb", camera="hand", **FAST)
        with pytest.raises(ValueError, match="already"):
            ManiSkillEnv(
                "PushCube-v1",
                obs_mode="rgb",
                extra_cameras={"base_camera": {"eye": [1, 0, 1], "target": [0, 0, 0]}},
            )


class TestTeacher:
    def test_beside_a_state_student(self):
        """The state is what it is without the teacher, the picture the human camera's."""
        env = ManiSkillEnv(
            "PickCube-v1", num_envs=2, teacher_camera="human", teacher_image_size=SIDE
        )
        check_env_specs(env)
        alone = ManiSkillEnv("PickCube-v1", num_envs=2)
        view = ManiSkillEnv(
            "PickCube-v1", num_envs=2, obs_mode="rgb", camera="human", image_size=SIDE
        )
        starts = []
        for each in (env, alone, view):
            each.set_seed(0)
            starts.append(each.reset())
        assert torch.equal(starts[0]["observation"], starts[1]["observation"])
        assert torch.equal(starts[0]["teacher_image"], starts[2][IMAGE])

    def test_of_another_size_than_the_students(self):
        env = make_push(teacher_camera="human", teacher_image_size=(24, 32))
        td = env.reset()
        assert td[IMAGE].shape == (1, 3, SIDE, SIDE)
        assert td["teacher_image"].shape == (1, 3, 24, 32)


@pytest.mark.parametrize(
    "kwargs",
    [
        {"obs_mode": "depth"},
        {"obs_mode": "rgb+state"},
        {"obs_mode": "rgb+state_dict", "camera": "human"},
        {"obs_mode": "rgbd", "camera": ("human", "main"), "from_pixels": True},
        {"obs_mode": "state_dict", "from_pixels": True, "language_instruction": True},
    ],
)
def test_specs(kwargs):
    env = ManiSkillEnv("PushCube-v1", **FAST, **kwargs)
    check_env_specs(env)
    assert env.render_backend == "sapien_cpu"


@pytest.mark.parametrize(("task", "actions"), [("PushT-v1", 6), ("RollBall-v1", 7)])
def test_tasks_with_another_robot_or_place(task, actions):
    env = ManiSkillEnv(task, obs_mode="rgb", light_visuals=True, image_size=SIDE)
    rollout = env.rollout(2)
    assert rollout["action"].shape == (1, 2, actions)
    assert rollout[IMAGE].float().std() > 5


def test_resets_keep_terminal_pictures():
    """Rows end at different steps; the picture before a reset is the episode's last, and
    the one after it the first of the episode of its seed."""
    env = make_push(num_envs=2, max_episode_steps=2)
    check_env_specs(env)
    env.set_seed(0)
    td = env.step(env.rand_action(env.reset()))["next"].exclude("reward")
    mask = torch.tensor([[True], [False]])
    td = env.reset(td.set("_reset", mask))  # row 0 is now a step behind row 1
    frames = []
    for _ in range(4):
        frame, td = env.step_and_maybe_reset(env.rand_action(td))
        frames.append(frame)
    data = torch.stack(frames, 1)
    done = data["next", "done"].squeeze(-1)
    assert done.tolist() == [[False, True, False, True], [True, False, True, False]]
    same = (data["next"][IMAGE][:, :-1] == data[IMAGE][:, 1:]).flatten(2).all(-1)
    assert torch.equal(same, ~done[:, :-1])
    fresh = data[:, 1:][done[:, :-1]][0]
    again = make_push()
    again.set_seed(int(fresh["episode_seed"]))
    assert torch.equal(again.reset()[IMAGE][0], fresh[IMAGE])


def test_serial_and_workers_agree():
    serial = SerialEnv(2, make_push, create_env_kwargs={"max_episode_steps": 3})
    workers = ManiSkillEnv(
        "PushCube-v1",
        num_workers=2,
        obs_mode="rgb",
        camera="human",
        max_episode_steps=3,
        **FAST,
    )
    try:
        check_env_specs(workers)
        rollouts = []
        for env in (serial, workers):
            env.set_seed(0)
            torch.manual_seed(0)
            rollouts.append(env.rollout(4, break_when_any_done=False))
        for key in (IMAGE, ("next", *IMAGE), "episode_seed", "action"):
            assert torch.equal(rollouts[0][key], rollouts[1][key]), key
        assert rollouts[1][IMAGE].shape == (2, 1, 4, 3, SIDE, SIDE)
    finally:
        workers.close()
        serial.close()


class Logger:
    """Keeps the videos."""

    def __init__(self):
        self.videos = []

    def log_video(self, name, video, step=None, **kwargs):
        self.videos.append(video)


def test_video_recorder():
    """Beside a state student: the frames of the video are the human camera's."""
    logger = Logger()
    env = TransformedEnv(
        ManiSkillEnv(
            "PushCube-v1",
            from_pixels=True,
            human_render_camera_configs={"width": 24, "height": SIDE},
            light_visuals=True,
        ),
        Compose(StepCounter(), VideoRecorder(logger, "push")),
    )
    check_env_specs(env)
    env.transform.dump()
    logger.videos.clear()
    rollout = env.rollout(3)
    env.transform.dump()
    (video,) = logger.videos
    frames = torch.cat([rollout["pixels"][:, :1], rollout["next", "pixels"]], 1)
    assert frames.shape == (1, 4, SIDE, 24, 3)
    assert frames.dtype == torch.uint8
    # [1, T, C, H, W]: the reset and three steps.
    assert torch.equal(video, frames.permute(0, 1, 4, 2, 3))


if __name__ == "__main__":
    pytest.main([__file__])
