# Copyright (c) the torchrl_rpd authors.
#
# This source code is licensed under the MIT license found in the
# LICENSE file in the root directory of this source tree.
"""The scripted controllers: which way they go, and how they answer to bad input."""

from __future__ import annotations

import math
import pickle

import pytest
import torch
from scripted_states import COLUMNS, CUBE_TASKS, TASKS, ask, random_states, state
from tensordict import TensorDict

from torchrl_rpd.teachers import ScriptedTeacher


@pytest.mark.parametrize("task", ["PickCube-v1", "StackCube-v1"])
class TestReach:
    def test_far_aside_goes_there_with_an_open_hand(self, task):
        obs = state(task, tcp=(0.0, 0.0, 0.2), cube=(0.08, -0.08, 0.02))
        x, y, z, *rotation, gripper = ask(ScriptedTeacher(task), obs).tolist()
        # 80 mm away at gain 1.5 / 0.1 m is 1.2, clipped to 1
        assert (x, y) == (1.0, -1.0)
        assert z < 0 and rotation == [0, 0, 0] and gripper == 1.0

    def test_aside_and_low_rises_first(self, task):
        """Fingers at the cube's height, 60 mm aside: up, not into the cube."""
        obs = state(task, tcp=(0.06, 0.0, 0.02))
        action = ask(ScriptedTeacher(task), obs)
        # beyond 50 mm aside the target is 80 mm above the cube: 1.5 * 0.08 / 0.1 = 1.2
        assert action[2] == 1.0 and action[6] == 1.0

    def test_above_descends_with_an_open_hand(self, task):
        obs = state(task, tcp=(0.0, 0.0, 0.06))
        action = ask(ScriptedTeacher(task), obs)
        # straight above the target is the cube's centre: 1.5 * (0.02 - 0.06) / 0.1
        torch.testing.assert_close(
            action, torch.tensor([0.0, 0, -0.6, 0, 0, 0, 1]), atol=1e-6, rtol=0
        )

    def test_around_the_cube_closes(self, task):
        action = ask(ScriptedTeacher(task), state(task, tcp=(0.0, 0.003, 0.02)))
        assert action[6] == -1.0
        # 1.5 * -0.003 / 0.1
        torch.testing.assert_close(action[1], torch.tensor(-0.045), atol=1e-6, rtol=0)


def test_pick_carries_the_cube_to_the_goal():
    obs = state(
        "PickCube-v1",
        tcp=(0.0, 0.0, 0.1),
        cube=(0.0, 0.01, 0.1),
        goal=(0.04, -0.01, 0.3),
        grasped=True,
    )
    action = ask(ScriptedTeacher("PickCube-v1"), obs)
    # goal - cube = (0.04, -0.02, 0.2), times 15, clipped: (0.6, -0.3, 1)
    expected = torch.tensor([0.6, -0.3, 1.0, 0, 0, 0, -1])
    torch.testing.assert_close(action, expected, atol=1e-5, rtol=0)


def test_pick_holds_still_at_the_goal():
    at = (0.05, 0.05, 0.15)
    obs = state("PickCube-v1", tcp=at, cube=at, goal=at, grasped=True)
    assert ask(ScriptedTeacher("PickCube-v1"), obs).tolist() == [0.0] * 6 + [-1.0]


@pytest.mark.parametrize("task,sign", [("PushCube-v1", 1.0), ("PullCube-v1", -1.0)])
class TestSlide:
    def test_hand_on_the_goal_side_passes_over_the_cube(self, task, sign):
        obs = state(task, tcp=(0.1 * sign, 0.0, 0.02), goal=(0.2 * sign, 0.0, 0.0))
        action = ask(ScriptedTeacher(task), obs)
        # up to 60 mm above: 1.5 * 0.06 / 0.1 = 0.9, and back over the cube
        torch.testing.assert_close(action[2], torch.tensor(0.9), atol=1e-5, rtol=0)
        assert action[0] * sign < 0

    def test_hand_behind_and_high_descends(self, task, sign):
        obs = state(task, tcp=(-0.045 * sign, 0.0, 0.08), goal=(0.2 * sign, 0.0, 0.0))
        action = ask(ScriptedTeacher(task), obs)
        # 1.5 * (0.02 - 0.08) / 0.1; no sideways motion before it is down
        expected = torch.tensor([0.0, 0, -0.9, 0, 0, 0, -1])
        torch.testing.assert_close(action, expected, atol=1e-5, rtol=0)

    def test_hand_behind_and_low_sweeps_at_half_speed(self, task, sign):
        obs = state(task, tcp=(-0.03 * sign, 0.0, 0.02), goal=(0.2 * sign, 0.0, 0.0))
        action = ask(ScriptedTeacher(task), obs)
        expected = torch.tensor([0.5 * sign, 0, 0, 0, 0, 0, -1])
        torch.testing.assert_close(action, expected, atol=1e-5, rtol=0)

    def test_stops_with_the_cube_on_the_goal(self, task, sign):
        goal = (0.1 * sign, 0.0, 0.0)
        obs = state(
            task,
            tcp=(goal[0] - 0.03 * sign, 0.0, 0.02),
            cube=(goal[0], 0.0, 0.02),
            goal=goal,
        )
        action = ask(ScriptedTeacher(task), obs)
        torch.testing.assert_close(action[:6], torch.zeros(6), atol=1e-6, rtol=0)


class TestStack:
    B = (0.1, 0.0, 0.02)

    def action(self, at, *, fingers):
        obs = state("StackCube-v1", tcp=at, cube=at, goal=self.B, fingers=fingers)
        return ask(ScriptedTeacher("StackCube-v1"), obs)

    def test_held_on_the_table_lifts_without_going_sideways(self):
        action = self.action((0.0, 0.0, 0.02), fingers=0.02)
        assert action.tolist() == [0, 0, 1, 0, 0, 0, -1]

    def test_held_high_goes_over_cube_b(self):
        action = self.action((0.0, 0.0, 0.1), fingers=0.02)
        # target height: B + 2 * 20 mm + 40 mm of air = 0.1, which is where it is
        expected = torch.tensor([1.0, 0, 0, 0, 0, 0, -1])
        torch.testing.assert_close(action, expected, atol=1e-5, rtol=0)

    def test_held_over_cube_b_descends(self):
        action = self.action((0.1, 0.0, 0.09), fingers=0.02)
        # 1.5 * (0.06 - 0.09) / 0.1
        expected = torch.tensor([0.0, 0, -0.45, 0, 0, 0, -1])
        torch.testing.assert_close(action, expected, atol=1e-5, rtol=0)

    @pytest.mark.parametrize("fingers", [0.02, 0.03, 0.04])
    def test_on_cube_b_opens_and_stays_open(self, fingers):
        action = self.action((0.1, 0.0, 0.061), fingers=fingers)
        assert action.tolist() == [0.0] * 6 + [1.0]


class TestLiftPeg:
    """The peg lies along x; its far end is the one to hold, 90 mm from its middle."""

    TASK = "LiftPegUpright-v1"

    def action(self, tcp, *, angle=0.0, middle=(0.0, 0.0, 0.025), fingers=0.04):
        """The peg tilted by ``angle``, its far end up."""
        obs = state(self.TASK, tcp=tcp, cube=middle, fingers=fingers)
        # about x by 90 degrees (as it lies at the start), then about -y by ``angle``
        half, quarter = angle / 2, math.pi / 4
        tilt = (math.cos(half), 0.0, -math.sin(half), 0.0)
        roll = (math.cos(quarter), math.sin(quarter), 0.0, 0.0)
        obs[28:32] = torch.tensor(multiply(tilt, roll))
        return ask(ScriptedTeacher(self.TASK), obs)

    def test_goes_over_the_far_end_with_an_open_hand(self):
        action = self.action((0.09, 0.0, 0.06))
        # straight above: 1.5 * (0.025 - 0.06) / 0.1
        expected = torch.tensor([0.0, 0, -0.525, 0, 0, 0, 1])
        torch.testing.assert_close(action, expected, atol=1e-6, rtol=0)

    def test_presses_gently_and_lifts_once_it_holds(self):
        touching = self.action((0.09, 0.0, 0.025), fingers=0.03)
        torch.testing.assert_close(touching[6], torch.tensor(0.2), atol=1e-6, rtol=0)
        assert touching[:3].abs().max() < 1e-5  # not before the fingers have closed
        action = self.action((0.09, 0.0, 0.025), fingers=0.025)
        # 0.3 rad on, 0.21 m from the near end at -0.12 and half the peg's width up:
        # x = -0.12 + 0.21 cos 0.3 = 0.0806, z = 0.21 sin 0.3 + 0.025 cos 0.3 = 0.0859
        # 15 * (0.0806 - 0.09) = -0.141, 15 * (0.0859 - 0.025) = 0.914
        expected = torch.tensor([-0.141, 0, 0.914, 0, 0, 0, 0.2])
        torch.testing.assert_close(action, expected, atol=2e-3, rtol=0)

    def test_leads_the_held_end_past_the_top(self):
        middle = (0.0, 0.0, 0.12)
        # upright the direction of the tilt is lost; only the height is left to hold:
        # 0.21 sin(pi/2 + 0.3) = 0.2006: 15 * (0.2006 - 0.21) = -0.141
        action = self.action(
            (0.0, 0.0, 0.21), angle=math.pi / 2, middle=middle, fingers=0.025
        )
        expected = torch.tensor([0.0, 0, -0.141, 0, 0, 0, 0.3])
        torch.testing.assert_close(action, expected, atol=2e-3, rtol=0)

    def test_goal_offset_raises_the_hand(self):
        obs = state(self.TASK, tcp=(0.09, 0, 0.025), cube=(0, 0, 0.025), fingers=0.025)
        plain = ask(ScriptedTeacher(self.TASK), obs)
        high = ask(ScriptedTeacher(self.TASK, goal_offset=(0.5, 0.5, -0.02)), obs)
        # 15 * 0.02 lower; the peg may stand anywhere, so x and y do not count
        torch.testing.assert_close(plain[2] - high[2], torch.tensor(0.3))
        assert plain[:2].equal(high[:2])


def multiply(a, b):
    """Product of two quaternions, w first."""
    w, x, y, z = a
    p, q, r, s = b
    return (
        w * p - x * q - y * r - z * s,
        w * q + x * p + y * s - z * r,
        w * r - x * s + y * p + z * q,
        w * s + x * r - y * q + z * p,
    )


class TestRollBall:
    """The arm stands at (-0.1, 1.0) and looks along -y: its x is -y, its y is x."""

    TASK = "RollBall-v1"
    GOAL = (-0.1, -0.8, 0.0)

    def action(self, tcp, *, ball, fingers, speed=0.0):
        obs = state(self.TASK, tcp=tcp, cube=ball, goal=self.GOAL, fingers=fingers)
        obs[36] = -speed  # along -y
        return ask(ScriptedTeacher(self.TASK), obs)

    def test_turns_into_the_frame_of_the_arm(self):
        # hand straight above would be x = -0.1, y = 0.6; it is 0.02 off along each
        action = self.action((-0.08, 0.62, 0.2), ball=(-0.1, 0.6, 0.035), fingers=0.04)
        # 20 mm towards -y is +x of the arm: 15 * 0.02; towards -x is -y
        torch.testing.assert_close(action[:2], torch.tensor([0.3, -0.3]))
        assert action[2] < 0 and action[6] == 1

    def test_sweeps_towards_the_goal_while_it_holds(self):
        at = (-0.1, 0.6, 0.04)
        action = self.action(at, ball=at, fingers=0.034)
        # straight ahead at full speed, at this height, fingers closed on the ball
        expected = torch.tensor([1.0, 0, 0, 0, 0, 0, 0.2])
        torch.testing.assert_close(action, expected, atol=1e-5, rtol=0)

    def test_lets_go_on_the_way(self):
        # the arm's x of -0.03 is y = 1.0 - 0.615 + 0.03
        at = (-0.1, 0.415, 0.04)
        held = self.action(at, ball=at, fingers=0.034, speed=0.7)
        assert held[6] == 1 and held[0] == 1
        loose = self.action(at, ball=at, fingers=0.037, speed=0.7)
        # rises at the speed of the ball: 0.7 m/s along the arm's x
        expected = torch.tensor([1.0, 0, 1, 0, 0, 0, 1])
        torch.testing.assert_close(loose, expected, atol=1e-5, rtol=0)

    def test_rests_above_the_rolling_ball(self):
        action = self.action(
            (-0.1, 0.3, 0.12), ball=(-0.1, 0.2, 0.035), fingers=0.04, speed=0.6
        )
        expected = torch.tensor([0.0] * 6 + [1.0])
        torch.testing.assert_close(action, expected, atol=1e-6, rtol=0)

    def test_takes_a_ball_that_stopped_again(self):
        action = self.action((-0.1, 0.4, 0.12), ball=(-0.1, 0.35, 0.035), fingers=0.04)
        assert action[0] > 0 and action[6] == 1


@pytest.mark.parametrize("task", TASKS)
class TestEveryTask:
    def test_range_and_no_rotation(self, task):
        action = ask(ScriptedTeacher(task), random_states(task, 500))
        assert bool(action.isfinite().all()) and action.abs().max() <= 1
        assert not action[:, 3:6].any()
        assert action[:, :3].std(0).min() > 0.1

    def test_no_jumps(self, task):
        """A micrometre never changes an action by more than a thousandth."""
        # in-between states along lines through the workspace
        a, b = random_states(task, 200), random_states(task, 200, seed=1)
        if task == "PickCube-v1":  # the one switch: is_grasped is 0 or 1
            b[:, 18] = a[:, 18]
        a, b = a.double(), b.double()
        teacher = ScriptedTeacher(task)
        for t in (0.1, 0.37, 0.5, 0.83):
            here = ask(teacher, a + t * (b - a))
            there = ask(teacher, a + (t + 5e-6) * (b - a))
            assert (here - there).abs().max() < 1e-3

    def test_any_batch_shape_gives_the_same_actions(self, task):
        teacher = ScriptedTeacher(
            task,
            jitter=0.2,
            gripper_chatter=0.3,
            random_action=0.2,
            cube_offset_std=0.01,
            goal_offset_std=(0.01, 0.02, 0.03),
        )
        obs, seeds = random_states(task, 6, 5), torch.arange(30).view(6, 5)
        whole = ask(teacher, obs, seeds)
        assert ask(teacher, obs.flatten(0, 1), seeds.flatten()).equal(
            whole.flatten(0, 1)
        )
        for i in range(6):
            for j in range(5):
                assert ask(teacher, obs[i, j], seeds[i, j]).equal(whole[i, j])

    def test_wrong_size(self, task):
        size = COLUMNS[task][3]
        with pytest.raises(ValueError, match=rf"{task}.* {size} .*tcp_pose.*\(2, 34\)"):
            ask(ScriptedTeacher(task), torch.zeros(2, 34))


@pytest.mark.parametrize("task", CUBE_TASKS)
def test_commands_stay_within_reach(task):
    """A command that no joint position answers would leave the arm standing."""
    obs = state(task, tcp=(0.15, 0.0, 0.12), cube=(0.5, 0.0, 0.12), goal=(1, 0, 0))
    action = ask(ScriptedTeacher(task), obs)
    wanted = 0.15 + 0.1 * action[0].item()
    # level with the shoulder (0.123 m): base at -0.615, 0.088 + 0.71 m of arm
    assert wanted <= -0.615 + 0.088 + 0.71 + 1e-3


def test_observation_is_left_alone():
    obs = random_states("PickCube-v1", 8)
    td = TensorDict({"observation": obs.clone()}, [8])
    out = ScriptedTeacher("PickCube-v1", cube_offset=(0.1, 0, 0))(td)
    assert out is td and td["observation"].equal(obs)


def test_keys():
    teacher = ScriptedTeacher(
        "PickCube-v1",
        cube_offset_std=0.01,
        observation_key=("agents", "state"),
        episode_seed_key=("agents", "seed"),
        action_key="hint",
    )
    assert teacher.in_keys == [("agents", "state"), ("agents", "seed")]
    assert teacher.out_keys == ["hint"]
    obs = random_states("PickCube-v1", 3)
    seeds = torch.arange(3).unsqueeze(-1)
    td = TensorDict({"agents": {"state": obs, "seed": seeds}}, [3])
    expected = ask(ScriptedTeacher("PickCube-v1", cube_offset_std=0.01), obs, range(3))
    assert teacher(td)["hint"].squeeze(-2).equal(expected)


def test_has_no_state_and_survives_pickling():
    teacher = ScriptedTeacher("StackCube-v1", jitter=0.1, seed=3)
    assert not teacher.state_dict() and not list(teacher.parameters())
    obs = random_states("StackCube-v1", 4)
    copy = pickle.loads(pickle.dumps(teacher))
    assert ask(copy, obs).equal(ask(teacher, obs))


def test_repr_names_the_flaws():
    teacher = ScriptedTeacher("PickCube-v1", seed=2, jitter=0.1)
    assert repr(teacher) == "ScriptedTeacher('PickCube-v1', seed=2, jitter=0.1)"


def test_unknown_task():
    with pytest.raises(
        ValueError, match=r"'PegInsertionSide-v1'.*PickCube-v1.*StackCu"
    ):
        ScriptedTeacher("PegInsertionSide-v1")


def test_missing_observation():
    with pytest.raises(KeyError, match="obs_mode='state'"):
        ScriptedTeacher("PickCube-v1")(TensorDict({}, [2]))


if __name__ == "__main__":
    pytest.main([__file__])
