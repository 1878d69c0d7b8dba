# Copyright (c) the torchrl_rpd authors.
#
# This source code is licensed under the MIT license found in the
# LICENSE file in the root directory of this source tree.
from __future__ import annotations

import math
from types import SimpleNamespace

import numpy as np
import pytest
import torch

from torchrl_rpd.envs import _fast_controller
from torchrl_rpd.envs._fast_controller import use_fast_controller
from torchrl_rpd.envs._vulkan import has_render_device, use_without_vulkan


class TestAlgebra:
    """The pose algebra alone, against float64 matrices."""

    @staticmethod
    def rotation(axis, angle):
        matrix = np.eye(3)
        i, j = {"X": (1, 2), "Y": (2, 0), "Z": (0, 1)}[axis]
        matrix[i, i] = matrix[j, j] = math.cos(angle)
        matrix[j, i], matrix[i, j] = math.sin(angle), -math.sin(angle)
        return matrix

    @staticmethod
    def to_matrix(q):
        w, x, y, z = (float(v) for v in q)
        cross = np.array([[0, -z, y], [z, 0, -x], [-y, x, 0]])
        return np.eye(3) + 2 * w * cross + 2 * cross @ cross

    def test_euler_quaternion(self):
        rng = np.random.default_rng(0)
        for _ in range(100):
            angles = rng.uniform(-0.5, 0.5, 3)
            q = _fast_controller._euler_quaternion(
                tuple(np.cos(angles).astype(np.float32)),
                tuple(np.sin(angles).astype(np.float32)),
            )
            expected = (
                self.rotation("X", angles[0])
                @ self.rotation("Y", angles[1])
                @ self.rotation("Z", angles[2])
            )
            np.testing.assert_allclose(self.to_matrix(q), expected, atol=1e-6)

    def test_relative_pose_by_hand(self):
        # The root stands at (1, 0, 0), turned by +90 degrees about z; a point at
        # (1, 2, 0) is 2 along the world's y, which is the root's x: (2, 0, 0).
        # A pose without rotation is turned by -90 degrees as seen from the root.
        half = np.float32(math.sqrt(0.5))
        root = np.float32([1, 0, 0]), np.array([half, 0, 0, half], np.float32)
        pose = np.float32([1, 2, 0]), np.float32([1, 0, 0, 0])
        p, q = _fast_controller._relative_pose(*root, *pose)
        np.testing.assert_allclose(p, [2, 0, 0], atol=1e-6)
        np.testing.assert_allclose(q, [half, 0, 0, -half], atol=1e-6)

    def test_versor(self):
        assert _fast_controller._versor((-0.6, 0.8, 0.0, 0.0)) == (0.6, -0.8, 0.0, 0.0)
        assert _fast_controller._versor((0.6, 0.8, 0.0, 0.0)) == (0.6, 0.8, 0.0, 0.0)


def stock_controller(**changes):
    config = {
        "use_delta": True,
        "use_target": False,
        "interpolate": False,
        "normalize_action": True,
        "frame": "root_translation:root_aligned_body_rotation",
        "rot_lower": -0.1,
    }
    gpu = changes.pop("gpu", False)
    return SimpleNamespace(
        config=SimpleNamespace(**{**config, **changes}),
        scene=SimpleNamespace(gpu_sim_enabled=gpu),
    )


class TestWhyNot:
    def test_covered(self):
        assert _fast_controller._why_not(stock_controller()) is None

    @pytest.mark.parametrize(
        ("change", "reason"),
        [
            ({"gpu": True}, "GPU"),
            ({"use_delta": False}, "use_delta"),
            ({"use_target": True}, "use_target"),
            ({"interpolate": True}, "interpolate"),
            ({"normalize_action": False}, "normalised"),
            ({"frame": "body_translation:body_aligned_body_rotation"}, "frame"),
            ({"rot_lower": -2 * math.pi}, "rad"),
        ],
    )
    def test_not_covered(self, change, reason):
        assert reason in _fast_controller._why_not(stock_controller(**change))


def make(task_id, control_mode="pd_ee_delta_pose"):
    import gymnasium
    import mani_skill.envs  # noqa: F401

    if not has_render_device():
        use_without_vulkan()
    return gymnasium.make(
        task_id, obs_mode="state", render_backend="none", control_mode=control_mode
    ).unwrapped


def arm(env):
    return env.agent.controller.controllers["arm"]


def drive_targets(env):
    """What the physics engine was told, for all joints, the gripper's included."""
    return np.array([j.drive_target[0, 0] for j in env.agent.robot.active_joints])


def compare(stock, fast, actions):
    for action in actions:
        expected, got = stock.step(action), fast.step(action)
        np.testing.assert_allclose(
            drive_targets(fast), drive_targets(stock), rtol=0, atol=1e-6
        )
        torch.testing.assert_close(got[0], expected[0], rtol=0, atol=1e-6)
        torch.testing.assert_close(got[1], expected[1], rtol=0, atol=1e-6)
        assert torch.equal(got[2], expected[2])


@pytest.fixture(scope="module", params=["PushCube-v1", "PickCube-v1", "RollBall-v1"])
def pair(request):
    """A stock and a fast environment (RollBall's robot is turned by 90 degrees)."""
    stock, fast = make(request.param), make(request.param)
    use_fast_controller(fast)
    yield stock, fast
    stock.close()
    fast.close()


@pytest.mark.maniskill
class TestFastController:
    @pytest.mark.parametrize("seed", [0, 1, 2])
    @pytest.mark.parametrize("scale", [1.0, 3.0])
    def test_equals_stock(self, pair, seed, scale):
        # Scale 3 leaves [-1, 1]: clipped per dimension and by the rotation's norm.
        stock, fast = pair
        rng = np.random.default_rng(seed)
        actions = rng.uniform(-scale, scale, (60, 1, 7)).astype(np.float32)
        before = actions.copy()
        for env in pair:
            env.reset(seed=seed)
        compare(stock, fast, actions)
        assert np.array_equal(actions, before)  # inputs are not modified

    def test_out_of_reach(self, pair):
        # Away from the base and up for 60 steps: the arm straightens and the inverse
        # kinematics fails, on which the joints hold where they are.
        stock, fast = pair
        for env in pair:
            env.reset(seed=3)
        solve, failures = arm(stock).kinematics.compute_ik, []

        def counting(*args, **kwargs):
            result = solve(*args, **kwargs)
            failures.append(result is None)
            return result

        arm(stock).kinematics.compute_ik = counting
        action = torch.tensor([[1.0, 0.3, 1.0, 0.4, -0.2, 0.3, -1.0]])
        try:
            compare(stock, fast, [action] * 60)
        finally:
            arm(stock).kinematics.compute_ik = solve
        assert 5 < sum(failures) < 60

    def test_survives_reconfigure(self, pair):
        stock, fast = pair
        before = arm(fast)
        for env in pair:
            env.reset(seed=4, options={"reconfigure": True})
        assert arm(fast) is not before
        assert type(arm(fast)) is type(before)
        rng = np.random.default_rng(4)
        compare(stock, fast, rng.uniform(-1, 1, (20, 1, 7)).astype(np.float32))

    def test_twice_is_once(self, pair):
        _, fast = pair
        load_agent, controller = fast._load_agent, arm(fast)
        use_fast_controller(fast)
        assert fast._load_agent is load_agent
        assert arm(fast) is controller

    def test_others_keep_the_stock_controller(self, pair):
        from mani_skill.agents.controllers import PDEEPoseController

        stock, fast = pair
        assert type(arm(stock)) is PDEEPoseController
        assert isinstance(arm(fast), PDEEPoseController)
        assert type(arm(fast)) is not PDEEPoseController

    @pytest.mark.parametrize(
        ("control_mode", "reason"),
        [
            ("pd_joint_delta_pos", "no end-effector pose controller"),
            ("pd_ee_delta_pos", "no end-effector pose controller"),
            ("pd_ee_target_delta_pose", "use_target=True"),
            ("pd_ee_pose", "use_delta=False"),
        ],
    )
    def test_refuses_other_modes(self, control_mode, reason):
        env = make("PushCube-v1", control_mode)
        load_agent = env._load_agent
        with pytest.raises(ValueError, match=reason):
            use_fast_controller(env)
        assert env._load_agent == load_agent
        env.close()


if __name__ == "__main__":
    pytest.main([__file__])
