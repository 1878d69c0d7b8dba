# Copyright (c) the torchrl_rpd authors.
#
# This source code is licensed under the MIT license found in the
# LICENSE file in the root directory of this source tree.
"""Chunks that are followed for several steps, env by env."""

from __future__ import annotations

import copy

import pytest
import torch
from counting_env import CountingEnv
from tensordict import TensorDict, TensorDictBase
from torchrl.collectors import Collector
from torchrl.envs import EnvBase, SerialEnv, TransformedEnv, check_env_specs

from torchrl_rpd.transforms import TeacherActionTransform

LENGTHS = (2, 3, 5, 9)


class Planner:
    """Entry ``h`` of a chunk is ``(code of the observation asked about, h / 10)``."""

    def __init__(self, horizon: int = 4) -> None:
        self.horizon = horizon
        self.rows = 0

    def __call__(self, tensordict: TensorDictBase) -> TensorDictBase:
        code = tensordict["observation"] @ torch.tensor([1e-2, 1e-4, 1e-6])
        self.rows += len(code)
        entry = torch.arange(self.horizon) / 10
        chunk = torch.stack(
            [code[:, None].expand(-1, self.horizon), entry.expand(len(code), -1)], -1
        )
        return TensorDict({"vla_action": {"chunk": chunk}}, tensordict.batch_size)


def expected_label(observation: torch.Tensor, interval: int) -> torch.Tensor:
    """A new plan at every ``interval``-th step of an episode, by the definition."""
    step = observation[..., 2:]
    entry = step % interval
    asked_at = torch.cat([observation[..., :2], step - entry], -1)
    code = asked_at @ torch.tensor([1e-2, 1e-4, 1e-6])
    return torch.cat([code.unsqueeze(-1), entry / 10], -1)


@pytest.mark.parametrize("interval", [1, 2, 3, 4])
@pytest.mark.parametrize("batch", [[4], [2, 2], None], ids=["4", "2,2", "serial"])
def test_labels_over_staggered_resets_and_batch_borders(
    interval: int, batch: list[int] | None
) -> None:
    if batch is None:
        base: EnvBase = SerialEnv(
            2,
            [
                lambda: CountingEnv(LENGTHS[:2]),
                lambda: CountingEnv(LENGTHS[2:], None, 2),
            ],
        )
    else:
        base = CountingEnv(LENGTHS, batch_size=batch)
    teacher = Planner()
    label = TeacherActionTransform(teacher, replan_interval=interval)
    env = TransformedEnv(base, label)
    # 7 steps per batch: no multiple of an interval or of an episode's length
    asked = 0
    for frames in Collector(env, None, frames_per_batch=28, total_frames=280):
        assert frames["teacher_mask"].all()
        expected = expected_label(frames["observation"], interval)
        torch.testing.assert_close(frames["teacher_action"], expected)
        asked += int((frames["observation"][..., 2] % interval == 0).sum())
    # at most the four roots of the next batch come on top
    assert asked <= teacher.rows <= asked + 4
    assert label.stats()["queries"] == teacher.rows
    assert label.stats()["labelled"] == 280 + 4


def test_specs_and_short_chunks() -> None:
    env = TransformedEnv(
        CountingEnv(LENGTHS), TeacherActionTransform(Planner(), replan_interval=3)
    )
    check_env_specs(env)
    env = TransformedEnv(
        CountingEnv(LENGTHS), TeacherActionTransform(Planner(2), replan_interval=3)
    )
    with pytest.raises(ValueError, match="hold 2 actions, replan_interval=3"):
        env.reset()


def test_envs_that_stand_still_keep_their_place() -> None:
    label = TeacherActionTransform(Planner(), replan_interval=3)
    env = TransformedEnv(CountingEnv((20, 20)), label)
    root = env.reset()
    for moves in ([1, 0], [1, 0], [1, 1], [0, 1], [1, 1]):
        root["action"] = torch.zeros(2, 2)
        root["_step"] = torch.tensor(moves, dtype=torch.bool).unsqueeze(-1)
        following = env.step(root)["next"]
        expected = expected_label(following["observation"], 3)
        torch.testing.assert_close(following["teacher_action"], expected)
        root = following.exclude("reward")
    assert following["observation"][:, 2].tolist() == [4.0, 3.0]


def test_switching_off_and_on_never_gives_an_old_plan() -> None:
    label = TeacherActionTransform(Planner(), replan_interval=4)
    env = TransformedEnv(CountingEnv((20, 20)), label)
    root = env.reset()

    def move(root: TensorDictBase) -> TensorDictBase:
        return env.step_and_maybe_reset(root.set("action", torch.zeros(2, 2)))[1]

    root = move(root)
    label.enabled = False
    root = move(move(root))
    assert not root["teacher_mask"].any()
    label.enabled = True
    root = move(root)  # step 4: asked anew, and the plan starts here
    code = root["observation"] @ torch.tensor([1e-2, 1e-4, 1e-6])
    torch.testing.assert_close(root["teacher_action"][:, 0], code)
    assert not root["teacher_action"][:, 1].any()
    assert root["observation"][:, 2].tolist() == [4.0, 4.0]


def test_state_dict_continues_in_the_middle_of_a_plan() -> None:
    base = CountingEnv((20, 20))
    env = TransformedEnv(base, TeacherActionTransform(Planner(), replan_interval=4))
    root = env.reset()
    for _ in range(2):
        root = env.step_and_maybe_reset(root.set("action", torch.zeros(2, 2)))[1]
    teacher = Planner()
    other = TransformedEnv(
        copy.deepcopy(base), TeacherActionTransform(teacher, replan_interval=4)
    )
    other.load_state_dict(copy.deepcopy(env.state_dict()))
    for _ in range(6):
        root = root.set("action", torch.zeros(2, 2))
        resumed = other.step_and_maybe_reset(root.clone())[1]
        root = env.step_and_maybe_reset(root)[1]
        assert torch.equal(resumed["teacher_action"], root["teacher_action"])
        assert resumed["teacher_mask"].all()
    assert teacher.rows == 4  # steps 4 and 8 of two envs; step 3 came from the cache


def test_loading_into_running_episodes_asks_anew() -> None:
    def make() -> TransformedEnv:
        label = TeacherActionTransform(Planner(), replan_interval=4)
        return TransformedEnv(CountingEnv((20, 20)), label)

    env, other = make(), make()
    env.reset()
    env.reset()
    state = env.state_dict()
    root = other.reset()  # its plans belong to these episodes, not to the saved ones
    other.load_state_dict(state)
    root = other.step_and_maybe_reset(root.set("action", torch.zeros(2, 2)))[1]
    code = root["observation"] @ torch.tensor([1e-2, 1e-4, 1e-6])
    torch.testing.assert_close(root["teacher_action"][:, 0], code)
    assert root["observation"][:, 2].tolist() == [1.0, 1.0]


if __name__ == "__main__":
    pytest.main([__file__])
