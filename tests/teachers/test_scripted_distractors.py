# Copyright (c) the torchrl_rpd authors.
#
# This source code is licensed under the MIT license found in the
# LICENSE file in the root directory of this source tree.
"""The scripted ways through the hold-outs in which the tool is a distractor."""

from __future__ import annotations

import math

import pytest
import torch
from scripted_states import ask

from torchrl_rpd.teachers import ScriptedTeacher, check_teacher
from torchrl_rpd.teachers._layout import LAYOUTS

PULL, POKE = "PullCubeToolDistractor-v1", "PokeCubeDistractor-v1"
SIZES = {PULL: 39, POKE: 54}
BASE = -0.615  # where the robot stands on the x axis
TILT = 0.8  # of a hand that reaches far


def state(task, *, tcp, cube, tilt=0.0, fingers=0.04, goal_x=None) -> torch.Tensor:
    """``[D]``: tcp_pose 18:25 and cube_pose 25:32; in PokeCube the way from the cube to
    the goal, which is as far left and right as the cube, in 48:51."""
    x = torch.zeros(SIZES[task], dtype=torch.float64)
    x[7:9] = fingers
    x[18:21] = torch.tensor(tcp)
    # (0, 1, 0, 0) points down; leaning outwards is a turn by -tilt about y before it
    x[22], x[24] = math.cos(tilt / 2), math.sin(tilt / 2)
    x[25:28] = torch.tensor(cube)
    x[28] = 1.0
    if goal_x is not None:
        x[48:51] = torch.tensor([goal_x - cube[0], 0.0, -0.019])
    return x


def random_states(task: str, *shape: int, seed: int = 0) -> torch.Tensor:
    """``[*shape, D]``: hand and cube anywhere in the workspace."""
    generator = torch.Generator().manual_seed(seed)
    x = torch.randn(*shape, SIZES[task], generator=generator) * 0.1
    x[..., 18:20] = torch.rand(*shape, 2, generator=generator) * 0.3 - 0.1
    x[..., 20] = torch.rand(*shape, generator=generator) * 0.2
    x[..., 22] += 1.0
    x[..., 24] += torch.rand(*shape, generator=generator)  # leaning out by 0 to pi / 2
    x[..., 25:27] = torch.rand(*shape, 2, generator=generator) * 0.3 - 0.1
    x[..., 27] = 0.02
    x[..., 7:9] = torch.rand(*shape, 1, generator=generator) * 0.04
    return x


def act(task: str, *, flaws=None, seed=None, **parts) -> torch.Tensor:
    return ask(ScriptedTeacher(task, **(flaws or {})), state(task, **parts), seed)


def near(action, *expected: float) -> None:
    wanted = torch.tensor(expected, dtype=torch.float32)
    torch.testing.assert_close(action, wanted, atol=5e-5, rtol=0)


class TestLayout:
    def test_pull_goes_straight_to_the_base(self):
        obs = state(PULL, tcp=(0.1, 0.2, 0.3), cube=(-0.015, -0.45, 0.03), tilt=0.4)
        scene = LAYOUTS[PULL].scene(obs)
        # 0.6 and -0.45 from the base are 0.75 m; 0.53 m of it are 0.424 and -0.318
        expected = torch.tensor([BASE + 0.424, -0.318, 0.02], dtype=torch.float64)
        torch.testing.assert_close(scene.goal, expected)
        assert scene.cube.equal(obs[25:28]) and scene.tcp.equal(obs[18:21])
        assert scene.hand is not None and scene.hand.equal(obs[21:25])

    def test_poke_adds_the_way_to_the_goal(self):
        obs = state(POKE, tcp=(0.1, 0.2, 0.3), cube=(0.2, 0.05, 0.03), goal_x=0.3)
        obs[39:42] = 7.0  # the peg's place, which ManiSkill calls goal_pos
        scene = LAYOUTS[POKE].scene(obs)
        # on the table, where the centre of a cube of 40 mm is 20 mm high
        expected = torch.tensor([0.3, 0.05, 0.02], dtype=torch.float64)
        torch.testing.assert_close(scene.goal, expected)
        assert scene.cube.equal(obs[25:28]) and scene.tcp.equal(obs[18:21])

    @pytest.mark.parametrize("task", SIZES)
    def test_wrong_size(self, task):
        size = SIZES[task]
        with pytest.raises(ValueError, match=rf"{task}.* {size} .*tcp_pose.*\(2, 35\)"):
            ask(ScriptedTeacher(task), torch.zeros(2, 35))

    def test_listed(self):
        assert set(SIZES) <= set(ScriptedTeacher.TASKS) == set(LAYOUTS)


class TestPull:
    def test_upright_over_a_near_cube(self):
        # 0.665 m from the base; straight above: 1.5 * (0.02 - 0.06) / 0.1
        action = act(PULL, tcp=(0.05, 0.0, 0.06), cube=(0.05, 0.0, 0.02))
        near(action, 0, 0, -0.6, 0, 0, 0, 1)

    def test_leans_out_for_a_far_one(self):
        """At 0.8 m it waits above until it is tilted, then comes down."""
        cube = (BASE + 0.8, 0.0, 0.02)
        upright = act(PULL, tcp=(cube[0], 0.0, 0.1), cube=cube)
        # 80 mm above the cube is where it is
        near(upright[1:], 0, 0, 0, 1, 0, 1)
        tilted = act(PULL, tcp=(cube[0], 0.0, 0.06), cube=cube, tilt=TILT)
        near(tilted, 0, 0, -0.6, 0, 0, 0, 1)
        # 1.5 / 0.1 * 0.5 * sin(0.02), upwards and back
        less = act(PULL, tcp=(cube[0], 0.0, 0.06), cube=cube, tilt=TILT - 0.02)
        more = act(PULL, tcp=(cube[0], 0.0, 0.06), cube=cube, tilt=TILT + 0.02)
        near(less[3:6], 0, 0.14999, 0)
        near(more[3:6], 0, -0.14999, 0)

    def test_fingers_at_right_angles_to_the_way(self):
        """A cube to the right turns the hand to the right, and the command is reversed."""
        # bearing -0.02: 1.5 / 0.1 * 0.5 * sin(0.02)
        cube = (BASE + 0.665, -0.665 * math.tan(0.02), 0.02)
        near(act(PULL, tcp=(0.0, 0.0, 0.2), cube=cube)[3:6], 0, 0, 0.14999)

    def test_around_the_cube_closes(self):
        at = (0.05, 0.0, 0.02)
        near(act(PULL, tcp=at, cube=at), 0, 0, 0, 0, 0, 0, -1)

    @pytest.mark.parametrize("tilt", [0.0, 0.5, TILT])
    def test_drags_what_it_holds_without_turning(self, tilt):
        at = (0.185, 0.0, 0.02)
        action = act(PULL, tcp=at, cube=at, tilt=tilt, fingers=0.02)
        near(action[1:], 0, 0, 0, 0, 0, -1)
        assert action[0] == -1

    @pytest.mark.parametrize("fingers", [0.02, 0.03, 0.04])
    def test_opens_at_the_goal(self, fingers):
        at = (BASE + 0.53, 0.0, 0.02)
        near(act(PULL, tcp=at, cube=at, fingers=fingers)[:3], 0, 0, 0)
        assert act(PULL, tcp=at, cube=at, fingers=fingers)[6] == 1


class TestPoke:
    def action(self, tcp, *, cube=(0.2, 0.0, 0.02), goal_x=0.3):
        return act(POKE, tcp=tcp, cube=cube, tilt=TILT, goal_x=goal_x)

    def test_passes_over_the_peg(self):
        # 12 mm above the cube's centre, where it touches, and 80 mm of air
        action = self.action((0.05, 0.0, 0.112))
        near(action, 1, 0, 0, 0, 0, 0, -0.2)

    def test_comes_down_behind_the_cube(self):
        # 55 mm behind the cube: 1.5 * (0.032 - 0.09) / 0.1
        near(self.action((0.145, 0.0, 0.09)), 0, 0, -0.87, 0, 0, 0, -0.2)

    def test_sweeps_at_half_speed(self):
        near(self.action((0.16, 0.0, 0.032)), 0.5, 0, 0, 0, 0, 0, -0.2)

    def test_stops_with_the_cube_in_the_goal(self):
        near(self.action((0.17, 0.0, 0.032), goal_x=0.2), 0, 0, 0, 0, 0, 0, -0.2)

    def test_leans_out(self):
        parts = {"cube": (0.2, 0.0, 0.02), "goal_x": 0.3}
        action = act(POKE, tcp=(0.0, 0.0, 0.2), tilt=TILT - 0.02, **parts)
        near(action[3:6], 0, 0.14999, 0)

    def test_commands_stay_within_reach_of_the_tilted_hand(self):
        action = self.action((0.25, 0.0, 0.032), cube=(0.29, 0.0, 0.02), goal_x=0.5)
        # the hand's centre below the shoulder's level, which for a hand that leans is
        # 0.123 + 0.21 (1 - cos 0.8) + 0.088 sin 0.8 = 0.2498: 0.2178
        # 0.088 cos 0.8 + 0.21 sin 0.8 + sqrt(0.71^2 - 0.2178^2) = 0.8877 from the base
        near(action[:1], (BASE + 0.88772 - 0.25) / 0.1)


@pytest.mark.parametrize("task", SIZES)
class TestBoth:
    def test_range(self, task):
        action = ask(ScriptedTeacher(task), random_states(task, 500))
        assert bool(action.isfinite().all()) and action.abs().max() <= 1
        assert action[:, :6].std(0).min() > 0.1

    def test_no_jumps(self, task):
        """A micrometre never changes an action by more than a thousandth."""
        a = random_states(task, 200).double()
        b = random_states(task, 200, seed=1).double()
        teacher = ScriptedTeacher(task)
        for t in (0.1, 0.37, 0.5, 0.83):
            here = ask(teacher, a + t * (b - a))
            there = ask(teacher, a + (t + 5e-6) * (b - a))
            assert (here - there).abs().max() < 1e-3

    def test_any_batch_shape_gives_the_same_actions(self, task):
        teacher = ScriptedTeacher(
            task, jitter=0.2, gripper_chatter=0.3, cube_offset_std=0.01
        )
        obs, seeds = random_states(task, 3, 4), torch.arange(12).view(3, 4)
        whole = ask(teacher, obs, seeds)
        flat = ask(teacher, obs.flatten(0, 1), seeds.flatten())
        assert flat.equal(whole.flatten(0, 1))
        for i in range(3):
            for j in range(4):
                assert ask(teacher, obs[i, j], seeds[i, j]).equal(whole[i, j])

    def test_cube_offset(self, task):
        """It goes where it sees the cube; the goal stays where it is."""
        parts = {"tcp": (0.1, 0.0, 0.12), "cube": (0.12, 0.0, 0.02)}
        parts |= {"goal_x": 0.3} if task == POKE else {}
        right = act(task, **parts)
        shifted = act(task, flaws={"cube_offset": (0.0, 0.01, 0.0)}, **parts)
        # 1.5 * 0.01 / 0.1, a little less where the arm is at its limit
        torch.testing.assert_close(
            shifted[1] - right[1], torch.tensor(0.15), atol=5e-3, rtol=0
        )

    def test_goal_offset(self, task):
        if task == POKE:  # behind the cube, which lies in the goal
            parts = {"tcp": (0.17, 0.0, 0.032), "cube": (0.2, 0.0, 0.02)}
            parts |= {"goal_x": 0.2, "tilt": TILT}
        else:  # the cube in hand at the goal
            at = (BASE + 0.53, 0.0, 0.02)
            parts = {"tcp": at, "cube": at, "fingers": 0.02}
        assert not act(task, **parts)[:3].abs().gt(1e-5).any()
        x = act(task, flaws={"goal_offset": (0.05, 0.0, 0.0)}, **parts)[0]
        # 1.5 * 0.05 / 0.1 = 0.75; pushing is at half speed at most
        torch.testing.assert_close(x, torch.tensor(0.5 if task == POKE else 0.75))

    def test_per_episode_and_blind(self, task):
        parts = {"tcp": (0.0, 0.0, 0.12), "cube": (0.02, 0.01, 0.02)}
        parts |= {"goal_x": 0.12} if task == POKE else {}
        flaws = {"cube_offset_std": 0.005}
        first = act(task, flaws=flaws, seed=1, **parts)
        assert first.equal(act(task, flaws=flaws, seed=1, **parts))
        assert not first.equal(act(task, flaws=flaws, seed=2, **parts))
        region = ((0.0, 0.03), (0.0, math.inf))
        blind = act(task, flaws={"blind_region": region}, **parts)
        assert blind.tolist() == [0.0] * 6 + [1.0]


@pytest.mark.maniskill
@pytest.mark.parametrize("task", SIZES)
def test_solves_it(task):
    """Four episodes; PokeCube's goal is out of reach for a cube from x = 0.25 m on."""
    from torchrl_rpd.envs import ManiSkillEnv

    env = ManiSkillEnv(task, num_envs=4, fast_controller=True, reward_mode="sparse")
    teacher = ScriptedTeacher(task)
    assert check_teacher(teacher, env, steps=4).passed
    env.set_seed(7100)
    td = env.reset()
    within = td["observation"][:, 25] < (0.24 if task == POKE else 1.0)
    success = torch.zeros(4, dtype=torch.bool)
    for _ in range(45):
        td["action"] = teacher(td)["vla_action", "chunk"][:, 0]
        td = env.step(td)["next"].select("observation", "success")
        success |= td["success"].squeeze(-1)
        if bool(success[within].all()):
            break
    env.close()
    # measured over 100 episodes: 0.99, and in PokeCube every start within reach
    assert int(within.sum()) >= 2 and bool(success[within].all())


if __name__ == "__main__":
    pytest.main([__file__])
