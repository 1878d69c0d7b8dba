# Copyright (c) the torchrl_rpd authors.
#
# This source code is licensed under the MIT license found in the
# LICENSE file in the root directory of this source tree.
"""What else can be observed and chosen, without pictures."""

from __future__ import annotations

import gymnasium as gym
import pytest
import torch
from torchrl.envs import SerialEnv
from torchrl.envs.utils import check_env_specs

from torchrl_rpd.envs import TASKS, ManiSkillEnv, ManiSkillWrapper, _build, _rendering

CONTROL_MODES = (
    "pd_joint_delta_pos",
    "pd_joint_pos",
    "pd_joint_target_delta_pos",
    "pd_joint_vel",
    "pd_joint_pos_vel",
    "pd_joint_delta_pos_vel",
    "pd_ee_delta_pos",
    "pd_ee_delta_pose",
    "pd_ee_pose",
    "pd_ee_target_delta_pos",
    "pd_ee_target_delta_pose",
)


@pytest.mark.maniskill
class TestStateDict:
    def test_is_mani_skills_dictionary(self):
        """StackCube has numbers per environment among its entries, PickCube a bool."""
        env = ManiSkillEnv("PickCube-v1", num_envs=2, obs_mode="state_dict")
        check_env_specs(env)
        env.set_seed(0)
        td = env.reset()
        for row in range(2):
            plain, _ = env._env[row].reset(seed=int(td["episode_seed"][row]))
            leaves = {
                (part, name): value
                for part, values in plain.items()
                for name, value in values.items()
            }
            observed = td["observation"][row]
            assert set(observed.keys(True, True)) == set(leaves)
            for key, value in leaves.items():
                assert torch.equal(observed[key], value.reshape(-1))
                assert observed[key].dtype == value.dtype
        assert td["observation", "extra", "is_grasped"].shape == (2, 1)
        assert td["observation", "extra", "is_grasped"].dtype == torch.bool

    def test_wrapper(self):
        base = gym.make("PushCube-v1", obs_mode="state_dict", render_backend="none")
        env = ManiSkillWrapper(base)
        assert env.rollout(2)["observation", "agent", "qpos"].shape == (1, 2, 9)


@pytest.mark.maniskill
@pytest.mark.parametrize("control_mode", CONTROL_MODES)
def test_control_modes(control_mode):
    env = ManiSkillEnv("PushCube-v1", control_mode=control_mode)
    space = env._env[0].single_action_space
    assert env.action_spec.shape == (1, *space.shape)
    assert torch.equal(env.action_spec.space.low[0], torch.as_tensor(space.low))
    assert torch.equal(env.action_spec.space.high[0], torch.as_tensor(space.high))
    assert env.rollout(2)["observation"].isfinite().all()


@pytest.mark.maniskill
def test_control_modes_are_all_of_them():
    env = ManiSkillEnv("PushCube-v1")
    supported = set(env._env[0].agent.supported_control_modes)
    # The passive mode has no action at all.
    assert supported - {"passive"} == set(CONTROL_MODES)


@pytest.mark.maniskill
def test_roll_ball_ends_after_80_steps():
    env = ManiSkillEnv("RollBall-v1", fast_controller=True, ignore_terminations=True)
    still = torch.zeros(1, 7)
    rollout = env.rollout(100, lambda td: td.set("action", still))
    assert rollout.shape == (1, 80)
    assert rollout["next", "truncated"][0, -1]


@pytest.mark.maniskill
def test_ignore_terminations():
    from torchrl_rpd.teachers import ScriptedTeacher

    teacher = ScriptedTeacher("PushCube-v1")

    def policy(td):
        return td.set("action", teacher(td.clone())["vla_action", "chunk"][..., 0, :])

    ends = {}
    for ignore in (False, True):
        env = ManiSkillEnv(
            "PushCube-v1", ignore_terminations=ignore, max_episode_steps=15
        )
        env.set_seed(0)
        last = env.rollout(30, policy)["next"]
        assert last["success"].any()
        ends[ignore] = last.shape[1], bool(last["terminated"].any())
    assert ends[False][0] < 15 and ends[False][1]
    assert ends[True] == (15, False)


@pytest.mark.maniskill
def test_reconfiguration_freq():
    """The scene is rebuilt at every reset, and the episodes are those of their seeds."""
    env = ManiSkillEnv("PushCube-v1", reconfiguration_freq=1)
    env.set_seed(3)
    scenes, starts = [], []
    for _ in range(2):
        td = env.reset()
        scenes.append(env._env[0].scene)
        starts.append(td)
    assert scenes[0] is not scenes[1]
    plain = ManiSkillEnv("PushCube-v1")._env[0]
    for td in starts:
        obs, _ = plain.reset(seed=int(td["episode_seed"]))
        assert torch.equal(td["observation"], obs)


@pytest.mark.maniskill
class TestInstruction:
    def test_from_the_table(self):
        env = ManiSkillEnv(
            "PushCube-v1", num_envs=2, language_instruction=True, max_episode_steps=2
        )
        check_env_specs(env)
        text = TASKS["PushCube-v1"].instruction
        rollout = env.rollout(3, break_when_any_done=False)
        for frames in (rollout, rollout["next"]):
            assert frames["language_instruction"] == [[text] * 3] * 2

    def test_in_batched_environments(self):
        env = SerialEnv(
            2, lambda: ManiSkillEnv("PushCube-v1", language_instruction="push it")
        )
        assert env.rollout(2)["language_instruction"] == [[["push it"] * 2]] * 2

    def test_not_by_default(self):
        assert "language_instruction" not in ManiSkillEnv("PushCube-v1").reset().keys()

    def test_task_without_one(self):
        with pytest.raises(ValueError, match=r"language_instruction='\.\.\.'"):
            ManiSkillEnv("PickSingleYCB-v1", language_instruction=True)


@pytest.mark.maniskill
def test_push_t_has_six_actions():
    env = ManiSkillEnv("PushT-v1")
    check_env_specs(env)
    assert env.action_spec.shape == (1, 6)


class TestRenderBackend:
    @pytest.fixture
    def drawing(self, monkeypatch):
        """Sets which devices can draw, and whether there is CUDA."""

        def install(*devices, cuda=False):
            monkeypatch.setattr(
                _rendering, "can_draw", lambda device: device in devices
            )
            monkeypatch.setattr(torch.cuda, "is_available", lambda: cuda)

        return install

    @pytest.mark.parametrize(
        ("devices", "cuda", "expected"),
        [
            (("cpu",), False, "cpu"),
            (("cuda",), True, "gpu"),
            (("cuda", "cpu"), True, "gpu"),
            # A GPU for computing only.
            (("cpu",), True, "cpu"),
        ],
    )
    def test_auto(self, drawing, devices, cuda, expected):
        drawing(*devices, cuda=cuda)
        assert _rendering.choose_render_backend("auto", "obs_mode='rgb'") == expected

    def test_nothing_is_asked_of_the_machine_for_states(self, monkeypatch):
        def never(device):
            raise AssertionError

        monkeypatch.setattr(_rendering, "can_draw", never)
        assert _rendering.choose_render_backend("auto", None) == "none"
        assert _rendering.choose_render_backend("gpu", None) == "gpu"

    @pytest.mark.parametrize("backend", ["auto", "cpu", "gpu"])
    def test_missing_renderer(self, drawing, backend):
        drawing()
        with pytest.raises(RuntimeError, match="from_pixels=True draws") as error:
            _rendering.choose_render_backend(backend, "from_pixels=True")
        # One sentence, with what to install.
        message = str(error.value)
        assert "mesa-vulkan-drivers" in message
        assert "bookworm-backports" in message
        assert message.count(". ") == 0 and message.endswith(".")

    def test_switched_off(self):
        with pytest.raises(ValueError, match="render_backend='auto'"):
            _rendering.choose_render_backend("none", "obs_mode='rgb'")

    @pytest.mark.maniskill
    @pytest.mark.parametrize(
        "kwargs",
        [
            {"obs_mode": "rgb"},
            {"obs_mode": "rgb", "camera": "human"},
            {"teacher_camera": "human"},
            {"from_pixels": True},
        ],
    )
    def test_who_needs_it(self, drawing, kwargs):
        drawing()
        with pytest.raises(RuntimeError, match=next(iter(kwargs))):
            ManiSkillEnv("PushCube-v1", **kwargs)

    @pytest.mark.maniskill
    def test_reported(self):
        assert ManiSkillEnv("PushCube-v1").render_backend == "none"


class TestSimBackend:
    @pytest.mark.parametrize(
        ("backend", "fast", "expected"),
        [
            ("auto", False, "physx_cuda"),
            ("auto", True, "physx_cpu"),  # the fast controller is for the CPU
            ("gpu", False, "physx_cuda"),
            ("physx_cuda:1", False, "physx_cuda:1"),
            ("cpu", True, "physx_cpu"),
        ],
    )
    def test_with_cuda(self, monkeypatch, backend, fast, expected):
        monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
        assert _build.choose_sim_backend(backend, fast_controller=fast) == expected

    def test_fast_controller_on_a_gpu(self, monkeypatch):
        monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
        with pytest.raises(ValueError, match="fast_controller=True is for CPU"):
            _build.choose_sim_backend("physx_cuda", fast_controller=True)

    def test_without_cuda(self, monkeypatch):
        monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
        assert _build.choose_sim_backend("auto", fast_controller=False) == "physx_cpu"
        with pytest.raises(ValueError, match=r"sim_backend='physx_cuda'.*'physx_cpu'"):
            _build.choose_sim_backend("physx_cuda", fast_controller=False)


@pytest.mark.parametrize(
    ("size", "expected"), [(64, (64, 64)), ((48, 64), (48, 64)), ([8, 9], (8, 9))]
)
def test_sizes(size, expected):
    assert _build.height_width(size) == expected


def test_size_of_nothing():
    with pytest.raises(ValueError, match="positive"):
        _build.height_width((0, 4))


def test_half_a_pose():
    with pytest.raises(ValueError, match="both eye and target"):
        _build.with_pose({"eye": [0, 0, 1]})
    with pytest.raises(ValueError, match="7 numbers"):
        _build.with_pose({"pose": [0, 0, 1]})


if __name__ == "__main__":
    pytest.main([__file__])
