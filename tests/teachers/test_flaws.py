# Copyright (c) the torchrl_rpd authors.
#
# This source code is licensed under the MIT license found in the
# LICENSE file in the root directory of this source tree.
"""The scripted teacher's flaws: each one has the size that it was asked to have."""

from __future__ import annotations

import math

import pytest
import torch
from scripted_states import COLUMNS, TASKS, ask, random_states, state
from tensordict import TensorDict

from torchrl_rpd.teachers import ScriptedTeacher

N = 4000
PICK = "PickCube-v1"


@pytest.fixture(scope="module")
def many() -> torch.Tensor:
    return random_states(PICK, N)


@pytest.fixture(scope="module")
def perfect(many) -> torch.Tensor:
    return ask(ScriptedTeacher(PICK), many)


def held(n: int, *, at=(0.0, 0.0, 0.1), goal=(0.0, 0.0, 0.1)) -> torch.Tensor:
    """``n`` states with the cube in hand that differ in the joint velocities only."""
    obs = state(PICK, tcp=at, cube=at, goal=goal, grasped=True).repeat(n, 1)
    obs[:, 9:18] = torch.randn(n, 9, generator=torch.Generator().manual_seed(1))
    return obs


def test_jitter(many, perfect):
    still = held(N)
    action = ask(ScriptedTeacher(PICK, jitter=0.2), still)
    # the perfect answer is zero; at 5 standard deviations clipping does nothing
    noise = action[:, :6]
    assert noise.mean(0).abs().max() < 4.5 * 0.2 / math.sqrt(N)
    assert (noise.std(0) / 0.2 - 1).abs().max() < 4.5 / math.sqrt(2 * N)
    assert (torch.corrcoef(noise.T) - torch.eye(6)).abs().max() < 4.5 / math.sqrt(N)
    assert bool((action[:, 6] == -1).all())
    noisy = ask(ScriptedTeacher(PICK, jitter=5.0), many)
    assert noisy.abs().max() == 1
    assert noisy[:, 6].equal(perfect[:, 6])


@pytest.mark.parametrize("p", [0.0, 0.4, 1.0])
def test_gripper_chatter(many, perfect, p):
    action = ask(ScriptedTeacher(PICK, gripper_chatter=p), many)
    closing = perfect[:, 6] < 0
    opened = action[closing, 6] == 1
    n = int(closing.sum())
    assert n > 1000
    assert abs(opened.double().mean() - p) <= 4.5 * math.sqrt(p * (1 - p) / n)
    # nothing else changes
    assert action[:, :6].equal(perfect[:, :6])
    assert action[~closing].equal(perfect[~closing])
    assert action[closing][~opened].equal(perfect[closing][~opened])


@pytest.mark.parametrize("p", [0.3, 1.0])
def test_random_action(many, perfect, p):
    action = ask(ScriptedTeacher(PICK, random_action=p), many)
    replaced = (action != perfect).any(-1)
    n = int(replaced.sum())
    assert abs(n / N - p) <= 4.5 * math.sqrt(p * (1 - p) / N)
    drawn = action[replaced].double()
    assert drawn.abs().max() <= 1
    # uniform in [-1, 1]: mean 0, variance 1/3, variance of the square 1/5 - 1/9
    assert drawn.mean(0).abs().max() < 4.5 * math.sqrt(1 / 3 / n)
    assert (drawn.square().mean(0) - 1 / 3).abs().max() < 4.5 * math.sqrt(4 / 45 / n)


def test_laziness(many, perfect):
    action = ask(ScriptedTeacher(PICK, laziness=0.75), many)
    torch.testing.assert_close(action[:, :6], 0.25 * perfect[:, :6])
    assert action[:, 6].equal(perfect[:, 6])


@pytest.mark.parametrize("task", TASKS)
def test_cube_offset_is_a_moved_cube(task):
    offset = (0.01, -0.02, 0.005)
    column = COLUMNS[task][1]
    obs = random_states(task, 100)
    moved = obs.double()
    moved[:, column : column + 3] += torch.tensor(offset, dtype=torch.float64)
    action = ask(ScriptedTeacher(task, cube_offset=offset), obs)
    torch.testing.assert_close(action, ask(ScriptedTeacher(task), moved))
    assert not action.equal(ask(ScriptedTeacher(task), obs))


@pytest.mark.parametrize("task", [t for t in TASKS if COLUMNS[t][2] is not None])
def test_goal_offset_is_a_moved_goal(task):
    offset = (0.01, -0.02, 0.005)
    column = COLUMNS[task][2]
    obs = random_states(task, 100)
    moved = obs.double()
    moved[:, column : column + 3] += torch.tensor(offset, dtype=torch.float64)
    action = ask(ScriptedTeacher(task, goal_offset=offset), obs)
    torch.testing.assert_close(action, ask(ScriptedTeacher(task), moved))


def seen_offset(action: torch.Tensor) -> torch.Tensor:
    """The error in metres behind the answer to a cube that is held at the goal.

    There the answer is 1.5 / 0.1 m times (goal seen - cube seen), unclipped below
    67 mm.
    """
    return action[:, :3].double() / 15


@pytest.mark.parametrize(
    "std,expected",
    [
        (0.012, (0.012, 0.012, 0.0)),
        ((0.012, 0.004, 0.008), (0.012, 0.004, 0.008)),
    ],
)
@pytest.mark.parametrize("name", ["cube_offset_std", "goal_offset_std"])
def test_offset_per_episode(name, std, expected):
    teacher = ScriptedTeacher(PICK, **{name: std})
    offset = seen_offset(ask(teacher, held(N), range(N)))
    expected = torch.tensor(expected, dtype=torch.float64)
    assert bool((offset.mean(0).abs() <= 4.5 * expected / math.sqrt(N) + 1e-6).all())
    error = (offset.std(0) - expected).abs()
    assert bool((error <= 4.5 * expected / math.sqrt(2 * N) + 1e-6).all())
    correlation = offset[:, :2].T.corrcoef()[0, 1]
    assert correlation.abs() < 4.5 / math.sqrt(N)


def test_offset_is_constant_within_an_episode():
    teacher = ScriptedTeacher(PICK, cube_offset_std=0.01)
    offset = seen_offset(ask(teacher, held(50), [7] * 50))
    assert offset.equal(offset[:1].expand(50, 3))
    other = seen_offset(ask(teacher, held(50), [8] * 50))
    assert not other[0].equal(offset[0])


def test_cube_and_goal_offsets_are_unrelated():
    cube = seen_offset(
        ask(ScriptedTeacher(PICK, cube_offset_std=0.01), held(N), range(N))
    )
    goal = seen_offset(
        ask(ScriptedTeacher(PICK, goal_offset_std=0.01), held(N), range(N))
    )
    for axis in range(2):
        pair = torch.stack([cube[:, axis], goal[:, axis]])
        assert pair.corrcoef()[0, 1].abs() < 4.5 / math.sqrt(N)


def test_blind_region():
    """Blind for y < 0: the border itself is seen (lower bounds are inside)."""
    inf = math.inf
    teacher = ScriptedTeacher(PICK, blind_region=((-inf, inf), (-inf, 0.0)))
    ys = torch.tensor([-0.05, -1e-4, 0.0, 1e-4, 0.05])
    obs = torch.stack(
        [state(PICK, tcp=(0.1, 0.1, 0.2), cube=(0.0, float(y), 0.02)) for y in ys]
    )
    action = ask(teacher, obs)
    assert action[:2].tolist() == [[0.0] * 6 + [1.0]] * 2
    assert action[2:].equal(ask(ScriptedTeacher(PICK), obs[2:]))


def test_blindness_is_about_where_the_cube_is():
    """Not about where the teacher believes it to be."""
    obs = state(PICK, tcp=(0.1, 0.1, 0.2), cube=(0.0, 0.01, 0.02))
    teacher = ScriptedTeacher(
        PICK, cube_offset=(0.0, -0.05, 0.0), blind_region=((-1, 1), (-1, 0.0))
    )
    assert ask(teacher, obs)[:3].abs().max() > 0


def test_flaws_combine(many):
    """Offset, then laziness, then jitter, then chatter: each as it is alone."""
    offset = {"cube_offset": (0.01, 0.0, 0.0)}
    base = ask(ScriptedTeacher(PICK, **offset), many)
    still = held(N)
    noise = ask(ScriptedTeacher(PICK, jitter=0.1), still)[:, :6]
    together = ask(ScriptedTeacher(PICK, laziness=0.5, jitter=0.1, **offset), still)
    expected = ask(ScriptedTeacher(PICK, **offset), still)[:, :6] * 0.5 + noise
    torch.testing.assert_close(together[:, :6], expected.clamp(-1, 1))
    chatter = ask(ScriptedTeacher(PICK, gripper_chatter=0.5, **offset), many)
    both = ask(ScriptedTeacher(PICK, gripper_chatter=0.5, laziness=0.5, **offset), many)
    assert both[:, 6].equal(chatter[:, 6])
    torch.testing.assert_close(both[:, :6], 0.5 * base[:, :6])


NOISE = {"jitter": 0.3, "gripper_chatter": 0.4, "random_action": 0.2}
PER_EPISODE = {"cube_offset_std": 0.016, "goal_offset_std": 0.01}


class TestReproducible:
    def test_same_seed_same_labels_without_torchs_generator(self, many):
        first = ScriptedTeacher(PICK, seed=5, **NOISE, **PER_EPISODE)
        again = ScriptedTeacher(PICK, seed=5, **NOISE, **PER_EPISODE)
        state_before = torch.get_rng_state()
        a = ask(first, many, range(N))
        assert torch.get_rng_state().equal(state_before)
        torch.manual_seed(99)
        # queried before, and in another order: no memory
        ask(again, many[:10], range(10))
        order = torch.randperm(N)
        assert ask(again, many[order], torch.arange(N)[order]).equal(a[order])

    def test_another_seed_other_labels(self, many):
        a = ask(ScriptedTeacher(PICK, seed=0, **NOISE), many)
        b = ask(ScriptedTeacher(PICK, seed=1, **NOISE), many)
        assert (a != b).any(-1).double().mean() > 0.9
        off_0 = seen_offset(
            ask(ScriptedTeacher(PICK, seed=0, **PER_EPISODE), held(N), range(N))
        )
        off_1 = seen_offset(
            ask(ScriptedTeacher(PICK, seed=1, **PER_EPISODE), held(N), range(N))
        )
        pair = torch.stack([off_0[:, 0], off_1[:, 0]])
        assert pair.corrcoef()[0, 1].abs() < 4.5 / math.sqrt(N)


class TestErrors:
    @pytest.mark.parametrize(
        "flaw,message",
        [
            ({"jitter": -0.1}, "jitter"),
            ({"jitter": math.inf}, "jitter"),
            ({"gripper_chatter": 1.1}, r"gripper_chatter.*\[0, 1\]"),
            ({"random_action": math.nan}, "random_action"),
            ({"laziness": 1.0}, r"laziness.*\[0, 1\)"),
            ({"cube_offset": 0.01}, "cube_offset.*three"),
            ({"goal_offset": (0.01, 0.02)}, "goal_offset.*three"),
            ({"cube_offset": (0.0, 0.0, math.nan)}, "cube_offset.*finite"),
            ({"cube_offset_std": -0.01}, "cube_offset_std.*>= 0"),
            ({"goal_offset_std": (0.1, 0.1)}, "goal_offset_std.*three"),
            ({"blind_region": (0.0, 1.0)}, "blind_region"),
            ({"blind_region": ((0.0, 0.0), (0.0, 1.0))}, "low < high"),
        ],
    )
    def test_out_of_range(self, flaw, message):
        with pytest.raises(ValueError, match=message):
            ScriptedTeacher(PICK, **flaw)

    def test_seed_must_be_an_integer(self):
        with pytest.raises(TypeError):
            ScriptedTeacher(PICK, seed=0.5)

    def test_missing_episode_seed(self):
        teacher = ScriptedTeacher(PICK, cube_offset_std=0.01)
        with pytest.raises(KeyError, match=r"episode_seed.*ManiSkillEnv"):
            ask(teacher, random_states(PICK, 2))
        # without such a flaw it is not asked for
        assert ScriptedTeacher(PICK, jitter=0.1).in_keys == ["observation"]

    @pytest.mark.parametrize(
        "episode_seed", [torch.arange(2), torch.zeros(2, 1), torch.zeros(2, 2).long()]
    )
    def test_wrong_episode_seed(self, episode_seed):
        td = TensorDict({"observation": random_states(PICK, 2)}, [2])
        td["episode_seed"] = episode_seed
        with pytest.raises(ValueError, match=r"episode_seed.*\(2, 1\)"):
            ScriptedTeacher(PICK, cube_offset_std=0.01)(td)


if __name__ == "__main__":
    pytest.main([__file__])
