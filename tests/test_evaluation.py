# Copyright (c) the torchrl_rpd authors.
#
# This source code is licensed under the MIT license found in the
# LICENSE file in the root directory of this source tree.
"""The evaluation protocol against known rates and ManiSkill's own metrics."""

from __future__ import annotations

import math

import pytest
import torch
from torchrl.data.vla import ACTION_CHUNK_KEY
from torchrl.envs import TransformedEnv
from toy_envs import CoinEnv, ReachEnv

from torchrl_rpd.evaluation import Estimate, evaluate, quotas
from torchrl_rpd.students import mlp_actor_critic
from torchrl_rpd.transforms import TeacherActionTransform


def idle(td):
    return torch.zeros(*td.batch_size, 2)


@pytest.mark.parametrize(("num_envs", "episodes"), [(16, 32), (16, 16), (3, 12)])
def test_known_rate_of_one_half(num_envs, episodes):
    """Successes are five times as short as failures; they must not count for more."""
    result = evaluate(CoinEnv(num_envs), idle, episodes=episodes)
    assert result.success_once.mean == 0.5
    assert result.success_at_end.mean == 0.5
    # Half of the episodes take 2 steps and half 10; the reward is 1 per step.
    assert result.length.mean == 6.0
    assert result.episode_return.mean == 6.0
    assert len(result.episodes["length"]) == episodes


def test_quota_per_environment_is_fixed():
    result = evaluate(CoinEnv(4), idle, episodes=10)
    assert quotas(10, 4).tolist() == [3, 3, 2, 2]
    assert result.episodes["env"].bincount().tolist() == [3, 3, 2, 2]
    # The first ones of each environment, in order, with their seeds.
    for env, number in enumerate([3, 3, 2, 2]):
        rows = result.episodes["env"] == env
        assert result.episodes["episode_seed"][rows].tolist() == list(range(number))


def test_more_environments_than_episodes():
    result = evaluate(CoinEnv(8), idle, episodes=2)
    assert result.episodes["env"].tolist() == [0, 1]
    assert result.success_once.n == 2


def test_success_once_is_not_success_at_end():
    result = evaluate(CoinEnv(4, success_at_end=False), idle, episodes=8)
    assert result.success_once.mean == 0.5
    assert result.success_at_end.mean == 0.0


def test_intervals_by_hand():
    # Wilson for 45 of 50, z = 1.96: centre (.9 + z^2/100) / (1 + z^2/50) = .8714,
    # half width z / (1 + z^2/50) * sqrt(.9 * .1 / 50 + z^2 / 10000) = .0853.
    share = Estimate.of_share(45, 50)
    assert share.low == pytest.approx(0.7864, abs=1e-4)
    assert share.high == pytest.approx(0.9565, abs=1e-4)
    assert Estimate.of_share(0, 200).low == 0.0
    assert Estimate.of_share(0, 200).high == pytest.approx(0.0188, abs=1e-4)
    # [1, 2, 3]: standard deviation 1, so 1.96 / sqrt(3).
    mean = Estimate.of_mean(torch.tensor([1.0, 2.0, 3.0]))
    assert mean.mean == 2.0
    assert mean.high - mean.mean == pytest.approx(1.96 / math.sqrt(3), rel=1e-4)
    with pytest.raises(ValueError, match="hits"):
        Estimate.of_share(3, 2)


def test_student_acts_deterministically_and_nothing_keeps_a_graph():
    student = mlp_actor_critic(2, 2, log_std_init=1.0, normalize_observation=False)
    results = [
        evaluate(ReachEnv(4), student.actor, episodes=8, seeds=3) for _ in range(2)
    ]
    first, second = (r.episodes["episode_return"] for r in results)
    assert torch.equal(first, second)
    assert not first.requires_grad
    other = evaluate(ReachEnv(4), student.actor, episodes=8, seeds=4)
    assert not torch.equal(first, other.episodes["episode_return"])


def test_teacher_is_a_policy_and_acts_anew_in_each_step():
    class Teacher(torch.nn.Module):
        calls = 0

        def forward(self, td):
            self.calls += 1
            direction = -td["observation"] / 0.2
            return td.set(ACTION_CHUNK_KEY, direction.clamp(-1, 1).unsqueeze(-2))

    teacher = Teacher()
    result = evaluate(ReachEnv(4), teacher, episodes=8)
    assert teacher.calls == 16  # two episodes of 8 steps in each environment
    # A step goes 0.2 per axis: the farthest corner is reached in five of eight steps.
    assert result.success_at_end.mean == 1.0


def test_teachers_in_the_environment_are_not_asked():
    asked = []

    def teacher(td):
        asked.append(td.numel())
        return torch.zeros(td.numel(), 2)

    transform = TeacherActionTransform(teacher, in_keys=["observation"])
    env = TransformedEnv(ReachEnv(4), transform)
    evaluate(env, idle, episodes=4)
    assert not asked
    assert transform.enabled
    env.reset()
    assert asked == [4]


class TestRefusals:
    def test_no_success(self):
        with pytest.raises(KeyError, match="success_key"):
            evaluate(CoinEnv(2), idle, episodes=2, success_key="is_success")

    def test_policy_that_writes_no_action(self):
        with pytest.raises(KeyError, match="neither"):
            evaluate(CoinEnv(2), lambda td: td, episodes=2)

    def test_no_end(self):
        with pytest.raises(RuntimeError, match="time limit"):
            evaluate(CoinEnv(2), idle, episodes=40, max_steps=20)

    def test_no_episodes(self):
        with pytest.raises(ValueError, match="episodes"):
            evaluate(CoinEnv(2), idle, episodes=0)


@pytest.mark.maniskill
def test_against_maniskills_own_metrics():
    """The same episodes in ManiSkillVectorEnv, which records the metrics itself."""
    import gymnasium as gym
    from mani_skill.vector.wrappers.gymnasium import ManiSkillVectorEnv
    from tensordict import TensorDict

    from torchrl_rpd.envs import ManiSkillEnv
    from torchrl_rpd.teachers import ScriptedTeacher

    teacher = ScriptedTeacher("PushCube-v1", random_action=0.4)
    env = ManiSkillEnv("PushCube-v1", num_envs=2, max_episode_steps=12)
    result = evaluate(env, teacher, episodes=8, seeds=1)
    assert 0 < result.success_once.mean < 1

    # One for each environment: what PhysX keeps from earlier contacts must be the same.
    owns = [
        ManiSkillVectorEnv(
            gym.make(
                "PushCube-v1",
                obs_mode="state",
                control_mode="pd_ee_delta_pose",
                reward_mode="normalized_dense",
                render_backend="none",
                max_episode_steps=12,
            ),
            auto_reset=False,
            record_metrics=True,
        )
        for _ in range(2)
    ]
    rows = result.episodes
    for index, seed in enumerate(rows["episode_seed"].tolist()):
        own = owns[rows["env"][index]]
        obs, _ = own.reset(seed=seed)
        for _ in range(12):
            td = TensorDict(observation=obs, batch_size=[1])
            action = teacher(td)[ACTION_CHUNK_KEY][:, 0]
            obs, _, terminated, truncated, info = own.step(action)
            if terminated or truncated:
                break
        metrics = info["episode"]
        assert bool(metrics["success_once"]) == bool(rows["success_once"][index])
        assert int(metrics["episode_len"]) == int(rows["length"][index])
        assert float(metrics["return"]) == pytest.approx(
            float(rows["episode_return"][index]), rel=1e-5
        )


def test_actions_of_another_convention():
    """Three dimensions of which the environment takes the first two, halved."""

    def teacher(td):
        action = -4 * td["observation"]
        return torch.cat([2 * action, torch.ones(4, 1)], -1)

    def convert(action):
        return action[:, :2] / 2

    plain = evaluate(ReachEnv(4), lambda td: -4 * td["observation"], episodes=8)
    result = evaluate(ReachEnv(4), teacher, episodes=8, action_transform=convert)
    assert result.episode_return == plain.episode_return


if __name__ == "__main__":
    pytest.main([__file__])
