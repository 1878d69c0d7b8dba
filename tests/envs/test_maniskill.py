# Copyright (c) the torchrl_rpd authors.
#
# This source code is licensed under the MIT license found in the
# LICENSE file in the root directory of this source tree.
"""The adapter against plain ManiSkill, and inside TorchRL."""

from __future__ import annotations

import gymnasium as gym
import numpy as np
import pytest
import torch
from tensordict import TensorDict
from torchrl.collectors import Collector
from torchrl.envs import (
    Compose,
    ParallelEnv,
    RewardSum,
    SerialEnv,
    StepCounter,
    TransformedEnv,
)
from torchrl.envs.utils import check_env_specs

from torchrl_rpd.envs import ManiSkillEnv, ManiSkillWrapper
from torchrl_rpd.envs._seeds import EpisodeSeeds

pytestmark = pytest.mark.maniskill

TASKS = ("PickCube-v1", "PushCube-v1", "PullCube-v1", "StackCube-v1")
CONTROL_MODES = ("pd_ee_delta_pose", "pd_joint_delta_pos")
ALL_TASKS = (
    *TASKS,
    "LiftPegUpright-v1",
    "PegInsertionSide-v1",
    "PokeCube-v1",
    "PullCubeTool-v1",
    "RollBall-v1",
    "PlugCharger-v1",
    "PushT-v1",
)


def plain_env(task: str, **kwargs):
    """ManiSkill itself; the adapter has made the imports and, if needed, the patch."""
    return gym.make(
        task,
        num_envs=1,
        obs_mode="state",
        sim_backend="physx_cpu",
        render_backend="none",
        **kwargs,
    ).unwrapped


def make_pick(**kwargs) -> ManiSkillEnv:
    """For worker processes, which need a function of a module."""
    return ManiSkillEnv("PickCube-v1", **kwargs)


@pytest.mark.parametrize("control_mode", CONTROL_MODES)
@pytest.mark.parametrize("task", TASKS)
def test_bit_for_bit_maniskill(task, control_mode):
    """Every env of the batch, over several resets: reset(seed=episode_seed) and the
    recorded actions give the same numbers in plain ManiSkill."""
    limit = 6
    env = ManiSkillEnv(
        task, num_envs=2, control_mode=control_mode, max_episode_steps=limit
    )
    env.set_seed(11)
    rollout = env.rollout(3 * limit + 2, break_when_any_done=False)
    plain = plain_env(task, control_mode=control_mode, reward_mode="normalized_dense")
    for row in rollout:
        seeds = []
        for step in row:
            seed = int(step["episode_seed"])
            if not seeds or seed != seeds[-1]:
                seeds.append(seed)
                obs, info = plain.reset(seed=seed)
                elapsed = 0
                assert torch.equal(step["observation"], obs[0])
                assert bool(step["success"]) == bool(info["success"])
            obs, reward, terminated, _, info = plain.step(step["action"])
            elapsed += 1
            after = step["next"]
            assert torch.equal(after["observation"], obs[0])
            assert after["reward"].item() == reward.item()
            assert bool(after["terminated"]) == bool(terminated)
            assert bool(after["success"]) == bool(info["success"])
            assert bool(after["truncated"]) == (elapsed == limit)
            assert bool(after["done"]) == (bool(terminated) or elapsed == limit)
        assert len(seeds) == 4  # three whole episodes and the start of a fourth
        assert len(set(seeds)) == 4


@pytest.mark.parametrize("task", ["PickCube-v1", "PushCube-v1"])
def test_bit_for_bit_through_contacts(task):
    """Whole episodes with grasps and pushes that end in success, played again by a plain
    environment in the same order (PhysX keeps a trace of earlier contacts)."""
    from torchrl_rpd.teachers import ScriptedTeacher

    teacher = ScriptedTeacher(task, jitter=0.05)
    env = ManiSkillEnv(task, num_envs=2)
    env.set_seed(3)

    def policy(td):
        return td.set("action", teacher(td.clone())["vla_action", "chunk"][..., 0, :])

    rollout = env.rollout(45, policy, break_when_any_done=False)
    assert rollout["next", "success"].sum() >= 2
    for row in rollout:
        plain = plain_env(
            task, control_mode="pd_ee_delta_pose", reward_mode="normalized_dense"
        )
        last = None
        for step in row:
            seed = int(step["episode_seed"])
            if seed != last:
                obs, _ = plain.reset(seed=seed)
                assert torch.equal(step["observation"], obs[0])
                last = seed
            obs, reward, terminated, _, _ = plain.step(step["action"])
            assert torch.equal(step["next", "observation"], obs[0])
            assert step["next", "reward"].item() == reward.item()
            assert bool(step["next", "terminated"]) == bool(terminated)


@pytest.mark.parametrize("task", ALL_TASKS)
def test_every_task_steps(task):
    mode = "sparse" if task == "PlugCharger-v1" else "normalized_dense"
    env = ManiSkillEnv(task, reward_mode=mode)
    rollout = env.rollout(2)
    assert rollout.shape == (1, 2)
    assert rollout["observation"].isfinite().all()
    assert rollout["next", "success"].dtype == torch.bool
    env.close()


@pytest.mark.parametrize("num_envs", [1, 3])
def test_specs(num_envs):
    env = ManiSkillEnv("PickCube-v1", num_envs=num_envs)
    check_env_specs(env)
    assert env.batch_size == (num_envs,)
    assert env.observation_spec["observation"].shape == (num_envs, 42)
    assert env.action_spec.shape == (num_envs, 7)
    assert (env.action_spec.space.low == -1).all()
    assert (env.action_spec.space.high == 1).all()
    for key in ("done", "terminated", "truncated"):
        assert env.full_done_spec[key].shape == (num_envs, 1)
        assert env.full_done_spec[key].dtype == torch.bool


def test_partial_reset_touches_only_its_rows_and_keeps_terminal_observations():
    env = ManiSkillEnv("PushCube-v1", num_envs=3)
    env.set_seed(0)
    td = env.rand_action(env.reset())
    td = env.step(td)
    before = td["next"].clone()
    mask = torch.tensor([[False], [True], [False]])
    after = env.reset(td["next"].clone().set("_reset", mask))
    for row in (0, 2):
        assert torch.equal(after["observation"][row], before["observation"][row])
        assert after["episode_seed"][row] == before["episode_seed"][row]
    assert not torch.equal(after["observation"][1], before["observation"][1])
    assert after["episode_seed"][1] != before["episode_seed"][1]
    # What the step returned has not been overwritten by the reset.
    assert torch.equal(td["next", "observation"], before["observation"])

    rollout = ManiSkillEnv("PushCube-v1", max_episode_steps=2).rollout(
        4, break_when_any_done=False
    )[0]
    assert rollout["next", "done"].flatten().tolist() == [False, True, False, True]
    assert torch.equal(rollout["next", "observation"][0], rollout["observation"][1])
    assert not torch.equal(rollout["next", "observation"][1], rollout["observation"][2])


def test_seed_streams():
    """Environment 0 gets the seed, the rest what ManiSkill derives; each has its own
    stream, which a partial reset of another one does not move."""
    env = ManiSkillEnv("PushCube-v1", num_envs=3)
    env.set_seed(5)
    first = env.reset()["episode_seed"].flatten().tolist()
    derived = np.random.RandomState(5).randint(2**31, size=(2,)).tolist()
    assert first == [5, *derived]

    def second(order):
        env.set_seed(5)
        env.reset()
        seeds = {}
        for row in order:
            mask = torch.zeros(3, 1, dtype=torch.bool)
            mask[row] = True
            td = env.reset(TensorDict({"_reset": mask}, batch_size=[3]))
            seeds[row] = int(td["episode_seed"][row])
        return seeds

    assert second([0, 1, 2]) == second([2, 0, 1])
    assert len(set(second([0, 1, 2]).values())) == 3


def test_set_seed_acts_at_each_envs_next_reset():
    env = ManiSkillEnv("PushCube-v1", num_envs=2)
    env.set_seed(1)
    td = env.reset()
    env.set_seed(9)
    mask = torch.tensor([[False], [True]])
    td = env.reset(td.set("_reset", mask))
    derived = int(np.random.RandomState(9).randint(2**31, size=(1,))[0])
    assert td["episode_seed"].flatten().tolist() == [1, derived]
    td = env.reset(td.set("_reset", ~mask))
    assert td["episode_seed"].flatten().tolist() == [9, derived]


def test_stream_state_is_saved():
    env = ManiSkillEnv("PushCube-v1", num_envs=2)
    env.set_seed(3)
    env.reset()
    env.reset()
    state = env.state_dict()
    expected = [env.reset()["episode_seed"] for _ in range(2)]
    other = ManiSkillEnv("PushCube-v1", num_envs=2)
    other.load_state_dict(state)
    for seeds in expected:
        assert torch.equal(other.reset()["episode_seed"], seeds)
    with pytest.raises(ValueError, match="cannot be loaded"):
        ManiSkillEnv("PushCube-v1").load_state_dict(state)


def test_unseeded_environments_play_different_episodes():
    seeds = [int(EpisodeSeeds(1).draw(0)) for _ in range(4)]
    assert len(set(seeds)) == 4


@pytest.mark.parametrize("seed", [-1, 2**32])
def test_seed_out_of_range(seed):
    with pytest.raises(ValueError, match="A seed lies in"):
        EpisodeSeeds(1).restart(seed)


def test_global_random_number_generator_is_left_alone():
    torch.manual_seed(0)
    before = torch.get_rng_state()
    env = ManiSkillEnv("PickCube-v1", num_envs=2)
    td = env.reset()
    action = torch.zeros(2, 7)
    for _ in range(3):
        td = env.step(td.set("action", action))["next"]
    env.reset()
    assert torch.equal(torch.get_rng_state(), before)

    # Nor is it read: other global states, the same episodes.
    observations = []
    for state in (0, 1):
        torch.manual_seed(state)
        env.set_seed(4)
        observations.append(env.reset()["observation"])
    assert torch.equal(*observations)


def test_sparse_reward_is_success():
    env = ManiSkillEnv("PushCube-v1", reward_mode="sparse", num_envs=2)
    rollout = env.rollout(5)
    reward = rollout["next", "reward"]
    assert reward.dtype == torch.float32
    assert torch.equal(reward, rollout["next", "success"].float())


def test_dense_is_not_normalised():
    rewards = {}
    for mode in ("dense", "normalized_dense"):
        env = ManiSkillEnv("PickCube-v1", reward_mode=mode)
        env.set_seed(0)
        td = env.reset().set("action", torch.zeros(1, 7))
        rewards[mode] = env.step(td)["next", "reward"].item()
    # PickCube's dense reward is at most 5.
    assert rewards["dense"] == pytest.approx(5 * rewards["normalized_dense"], rel=1e-5)


def test_serial_parallel_and_workers_agree():
    """The same seeds and actions in one process, in SerialEnv and in two workers."""
    serial = SerialEnv(2, make_pick, create_env_kwargs={"max_episode_steps": 3})
    workers = ManiSkillEnv("PickCube-v1", num_workers=2, max_episode_steps=3)
    try:
        assert isinstance(workers, ParallelEnv)
        assert workers.batch_size == (2, 1)
        check_env_specs(workers)
        rollouts = []
        for env in (serial, workers):
            env.set_seed(0)
            torch.manual_seed(0)
            rollouts.append(env.rollout(7, break_when_any_done=False))
        for key in ("observation", "episode_seed", ("next", "reward"), "action"):
            assert torch.equal(rollouts[0][key], rollouts[1][key]), key
        plain = plain_env("PickCube-v1", control_mode="pd_ee_delta_pose")
        for row in rollouts[1].reshape(-1, 7):
            obs, _ = plain.reset(seed=int(row["episode_seed"][0]))
            assert torch.equal(row["observation"][0], obs[0])
        assert rollouts[1]["next", "done"][..., 2, 0].all()
        assert workers.state_dict()["worker1"]["episode_seeds"]["count"] == 3
    finally:
        workers.close()
        serial.close()


def test_with_torchrl_transforms_and_collector():
    env = TransformedEnv(
        ManiSkillEnv("PushCube-v1", num_envs=2, max_episode_steps=4),
        Compose(RewardSum(), StepCounter()),
    )
    check_env_specs(env)
    env.set_seed(0)
    collector = Collector(
        env,
        frames_per_batch=20,
        total_frames=40,
        auto_register_policy_transforms=False,
    )
    batches = [batch.clone() for batch in collector]
    collector.shutdown()
    data = torch.cat(batches, -1)
    assert data.shape == (2, 20)
    done = data["next", "done"].squeeze(-1)
    assert torch.equal(done.nonzero()[:5, 1], torch.tensor([3, 7, 11, 15, 19]))
    # The sum of the rewards of an episode, over the border between the two batches.
    episode = data["next", "reward"][0, 8:12].sum()
    assert data["next", "episode_reward"][0, 11].item() == pytest.approx(episode.item())
    assert data["next", "step_count"][done].unique().tolist() == [4]


def test_wrapper_takes_what_gym_made():
    env = ManiSkillWrapper(
        gym.make("PushCube-v1", obs_mode="state", render_backend="none")
    )
    assert env.batch_size == (1,)
    assert env._max_episode_steps == 50
    check_env_specs(env)


class TestRefusals:
    def test_vector_env_with_auto_reset(self):
        from mani_skill.vector.wrappers.gymnasium import ManiSkillVectorEnv

        base = gym.make("PushCube-v1", obs_mode="state", render_backend="none")
        env = ManiSkillVectorEnv(base, auto_reset=True)
        with pytest.raises(ValueError, match="without ManiSkillVectorEnv"):
            ManiSkillWrapper(env)

    def test_other_gym_environment(self):
        class Other(gym.Env):
            pass

        with pytest.raises(TypeError, match="GymWrapper"):
            ManiSkillWrapper(Other())
        with pytest.raises(TypeError, match="Expected a ManiSkill environment"):
            ManiSkillWrapper(object())

    def test_wrapper_that_would_be_bypassed(self):
        from mani_skill.utils.wrappers.gymnasium import CPUGymWrapper

        base = gym.make("PushCube-v1", obs_mode="state", render_backend="none")
        with pytest.raises(ValueError, match="CPUGymWrapper would be bypassed"):
            ManiSkillWrapper(CPUGymWrapper(base))

    def test_batches_of_different_kinds(self):
        make = {"obs_mode": "state", "render_backend": "none"}
        push = gym.make("PushCube-v1", **make)
        with pytest.raises(ValueError, match="same task"):
            ManiSkillWrapper([push, gym.make("PickCube-v1", **make)])
        with pytest.raises(ValueError, match="passed twice"):
            ManiSkillWrapper([push, push])
        with pytest.raises(ValueError, match="observation mode"):
            ManiSkillWrapper(
                [push, gym.make("PushCube-v1", **{**make, "obs_mode": "state_dict"})]
            )

    def test_batches_that_observe_differently(self):
        make = {"obs_mode": "state", "render_backend": "none"}
        robots = ("panda", "fetch")
        envs = [gym.make("PickCube-v1", robot_uids=r, **make) for r in robots]
        with pytest.raises(ValueError, match=r"control mode|observe the same"):
            ManiSkillWrapper(envs)

    def test_reward_mode_that_the_task_lacks(self):
        with pytest.raises(ValueError, match=r"PlugCharger-v1 has no.*'sparse'"):
            ManiSkillEnv("PlugCharger-v1")

    def test_unknown_task(self):
        with pytest.raises(ValueError, match="PickCube-v1"):
            ManiSkillEnv("PickCub-v1")

    @pytest.mark.parametrize(
        "kwargs",
        [
            {"num_envs": 0},
            {"num_workers": 0},
            {"sim_backend": "physx"},
            {"obs_mode": "pointcloud"},
            {"camera": "main"},  # of states
            {"render_backend": "none", "obs_mode": "rgb"},
            {"extra_cameras": {"side": {"fov": 1.0}}},
            {"extra_cameras": {"side": {"fov": 1.0}}, "obs_mode": "rgb"},  # no pose
        ],
    )
    def test_arguments(self, kwargs):
        name = next(iter(kwargs))
        with pytest.raises(ValueError, match=name):
            ManiSkillEnv("PushCube-v1", **kwargs)

    def test_reset_arguments_and_use_after_close(self):
        env = ManiSkillEnv("PushCube-v1")
        with pytest.raises(TypeError, match="set_seed"):
            env.reset(seed=3)
        env.close()
        with pytest.raises(RuntimeError, match="closed"):
            env.close()


def test_fast_grasp_gives_the_same_answers():
    """Through steps with no, one and two fingers in contact."""
    from torchrl_rpd.envs._fast_grasp import use_fast_grasp
    from torchrl_rpd.teachers import ScriptedTeacher

    stock, fast = (ManiSkillEnv("PickCube-v1") for _ in range(2))
    use_fast_grasp(fast._env[0])
    teacher = ScriptedTeacher("PickCube-v1", jitter=0.3)
    grasped = []
    for seed in range(2):
        stock.set_seed(seed)
        fast.set_seed(seed)
        a, b = stock.reset(), fast.reset()
        for _ in range(25):
            action = teacher(a.clone())["vla_action", "chunk"][:, 0]
            a = stock.step(a.set("action", action))["next"].exclude("reward")
            b = fast.step(b.set("action", action))["next"].exclude("reward")
            assert torch.equal(a["observation"], b["observation"])
            assert torch.equal(a["success"], b["success"])
            grasped.append(bool(a["observation"][0, 18]))
    assert 10 < sum(grasped) < 45  # both answers occur


if __name__ == "__main__":
    pytest.main([__file__])
