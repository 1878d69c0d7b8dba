# Copyright (c) the torchrl_rpd authors.
#
# This source code is licensed under the MIT license found in the
# LICENSE file in the root directory of this source tree.
"""The teacher acts first, the rollout keeps what the student would have done."""

from __future__ import annotations

import pytest
import torch
from tensordict import TensorDict
from torchrl.collectors import Collector
from torchrl.envs import Compose, SerialEnv, StepCounter, TransformedEnv
from torchrl.envs.utils import check_env_specs
from toy_envs import ReachEnv

from torchrl_rpd.transforms import JumpStartTransform, TeacherActionTransform


def steer(td):
    """Towards the origin."""
    return (-5 * td["observation"]).clamp(-1, 1)


def make(jump, num_envs=64, teacher=None, **kwargs):
    teacher = TeacherActionTransform(steer, **kwargs) if teacher is None else teacher
    return TransformedEnv(ReachEnv(num_envs), Compose(StepCounter(), jump, teacher))


def by_episode(rollout):
    """Steps that the teacher acted in, for each episode of 8 steps: ``[envs, n]``."""
    flags = rollout["jump_start"].squeeze(-1)
    assert flags.shape[1] % 8 == 0
    return flags.unflatten(1, (-1, 8))


def test_specs():
    check_env_specs(make(JumpStartTransform(), num_envs=3))


def test_what_is_executed_and_what_is_kept():
    env = make(JumpStartTransform(fraction=0.5, max_steps=6))
    policy = lambda td: td.set("action", torch.full((64, 2), 0.25))  # noqa: E731
    rollout = env.rollout(16, policy, break_when_any_done=False)
    # The student's own action is stored everywhere ...
    assert torch.equal(rollout["action"], torch.full_like(rollout["action"], 0.25))
    # ... and the point moved by 0.2 times the teacher's or the student's.
    executed = torch.where(rollout["jump_start"], rollout["teacher_action"], 0.25)
    moved = rollout["next", "observation"] - rollout["observation"]
    torch.testing.assert_close(moved, 0.2 * executed)


def test_it_leads_in_and_draws_anew_for_each_episode():
    env = make(JumpStartTransform(fraction=0.5, max_steps=6))
    flags = by_episode(env.rollout(80, break_when_any_done=False))
    steps = flags.sum(-1)
    # A prefix of the episode, never in the middle.
    assert torch.equal(flags, torch.arange(8) < steps.unsqueeze(-1))
    # 640 episodes: about half are led into, by 1 to 6 steps alike. The binomial's
    # standard deviation is sqrt(640) / 2 = 12.6, and sqrt(640 * 11 / 144) = 7.0 of the
    # 53.3 that are expected of each length.
    counts = steps.flatten().bincount(minlength=7)
    assert len(counts) == 7
    assert abs(int(counts[0]) - 320) < 4 * 12.6
    assert all(abs(int(n) - 53.3) < 4 * 7.0 for n in counts[1:])


@pytest.mark.parametrize(("fraction", "expected"), [(0.0, 0), (1.0, 8)])
def test_never_and_always(fraction, expected):
    env = make(JumpStartTransform(fraction=fraction, max_steps=1))
    steps = by_episode(env.rollout(8, break_when_any_done=False)).sum(-1)
    assert torch.equal(steps, torch.full_like(steps, min(expected, 1)))


def test_rows_without_a_label_are_the_students():
    env = make(JumpStartTransform(fraction=1.0, max_steps=8), query_fraction=0.5)
    policy = lambda td: td.set("action", torch.full((64, 2), 0.25))  # noqa: E731
    rollout = env.rollout(8, policy, break_when_any_done=False)
    flags, mask = rollout["jump_start"], rollout["teacher_mask"]
    # All episodes are led into by a step at least; half of them without a label.
    assert flags[:, 0].all()
    assert 0 < mask[:, 0].sum() < 64
    executed = torch.where(flags & mask, rollout["teacher_action"], 0.25)
    moved = rollout["next", "observation"] - rollout["observation"]
    torch.testing.assert_close(moved, 0.2 * executed)


def test_the_teacher_is_always_asked_where_it_leads():
    env = make(
        JumpStartTransform(fraction=0.5, max_steps=6),
        query_fraction=0.1,
        always_query_key="jump_start",
    )
    rollout = env.rollout(80, break_when_any_done=False)
    flags, mask = rollout["jump_start"], rollout["teacher_mask"]
    assert mask[flags].all()
    # Of the other frames a tenth: binomial with standard deviation 0.3 * sqrt(n).
    others = (~flags).sum()
    assert abs(int(mask[~flags].sum()) - 0.1 * int(others)) < 4 * 0.3 * others**0.5
    # (The rollout ends with a reset, whose frames are in no step.)
    queries = env.transform[-1].stats()["queries"]
    assert 0 <= queries - int(mask.sum()) <= 64


def test_partial_resets_leave_the_others_alone():
    env = make(JumpStartTransform(fraction=1.0, max_steps=5), num_envs=32)
    td = env.rollout(2)[:, -1]["next"].exclude("reward")
    left = env.transform[-2]._left.clone()
    assert left.max() == 3  # 5 steps at most, 2 are gone
    reset = torch.zeros(32, 1, dtype=torch.bool)
    reset[::2] = True
    env.reset(td.set("_reset", reset))
    assert torch.equal(env.transform[-2]._left[1::2], left[1::2])
    assert (env.transform[-2]._left[::2] >= 1).all()


def test_in_a_collector_and_in_workers():
    def one():
        return make(JumpStartTransform(fraction=1.0, max_steps=3), num_envs=2)

    def factory():
        return TransformedEnv(
            ReachEnv(2),
            Compose(
                JumpStartTransform(fraction=1.0, max_steps=3),
                TeacherActionTransform(teacher_factory=lambda: steer),
            ),
        )

    for env in (one(), SerialEnv(2, factory)):
        policy = lambda td: td.set("action", torch.zeros(*td.batch_size, 2))  # noqa: E731
        collector = Collector(
            env,
            policy,
            frames_per_batch=env.batch_size.numel() * 4,
            total_frames=env.batch_size.numel() * 8,
            auto_register_policy_transforms=False,
        )
        for batch in collector:
            moved = batch["next", "observation"] - batch["observation"]
            executed = torch.where(batch["jump_start"], batch["teacher_action"], 0.0)
            torch.testing.assert_close(moved, 0.2 * executed)
            assert not batch["action"].any()
        collector.shutdown()


def test_state_goes_on():
    jump = JumpStartTransform(fraction=0.7, max_steps=6)
    env = make(jump)
    env.rollout(3)
    state = jump.state_dict()
    after = by_episode(env.rollout(8)).sum(-1)
    other = JumpStartTransform(seed=5)
    other.load_state_dict(state)
    assert other.fraction == 0.7
    other.max_steps = 6
    assert torch.equal(by_episode(make(other).rollout(8)).sum(-1), after)


def test_global_generator_is_left_alone():
    before = torch.get_rng_state()
    env = make(JumpStartTransform())
    env.reset()
    assert torch.equal(torch.get_rng_state(), before)


class TestRefusals:
    def test_ranges(self):
        with pytest.raises(ValueError, match="fraction must lie in"):
            JumpStartTransform(fraction=1.5)
        with pytest.raises(ValueError, match="max_steps must be at least 1"):
            JumpStartTransform(max_steps=0)
        with pytest.raises(ValueError, match="fraction must lie in"):
            JumpStartTransform().fraction = -0.1

    def test_without_a_teacher(self):
        env = TransformedEnv(ReachEnv(2), JumpStartTransform())
        with pytest.raises(KeyError, match="have a TeacherActionTransform"):
            env.rollout(1)

    def test_asked_always_but_nobody_says_where(self):
        teacher = TeacherActionTransform(
            steer, query_fraction=0.1, always_query_key="jump_start"
        )
        env = TransformedEnv(ReachEnv(2), Compose(teacher, JumpStartTransform()))
        with pytest.raises(KeyError, match="JumpStartTransform, before"):
            env.reset()

    def test_a_step_without_the_flag(self):
        env = make(JumpStartTransform(), num_envs=2)
        td = env.reset().exclude("jump_start")
        with pytest.raises(KeyError, match="that its reset or step returned"):
            env.step(td.set("action", torch.zeros(2, 2)))

    def test_frames_are_left_alone(self):
        td = TensorDict(action=torch.ones(3, 2), batch_size=[3])
        assert JumpStartTransform()(td) is td
        assert torch.equal(JumpStartTransform().inv(td)["action"], td["action"])


if __name__ == "__main__":
    pytest.main([__file__])
