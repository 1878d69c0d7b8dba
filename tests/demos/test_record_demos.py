# Copyright (c) the torchrl_rpd authors.
#
# This source code is licensed under the MIT license found in the
# LICENSE file in the root directory of this source tree.
"""Playing and recording: what is kept, and that ManiSkill reads it."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import pytest
import torch
from tensordict import TensorDict
from torchrl.data import Unbounded
from toy_envs import ToyEnv

from torchrl_rpd.data import ManiSkillDemos, flat_state, record_demos
from torchrl_rpd.envs import ManiSkillEnv
from torchrl_rpd.teachers import ScriptedTeacher

h5py = pytest.importorskip(
    "h5py", reason="needs h5py: pip install 'torchrl_rpd[maniskill]'"
)


class CountingEnv(ToyEnv):
    """Scene ``i`` of an episode with seed ``s`` ends after ``1 + (s + i) % 4`` steps.

    It succeeds if that number is even. The observation is (seed, time).
    """

    def __init__(self, num_envs: int) -> None:
        shape = (num_envs,)
        super().__init__(
            num_envs,
            observation=Unbounded((*shape, 2)),
            episode_seed=Unbounded((*shape, 1), dtype=torch.int64),
        )
        self.scene = torch.arange(num_envs)
        self.played: list[int] = []
        self.fatal = -1  # raises at this episode, counted from 0

    def _set_seed(self, seed):
        self.seed = 10 * seed

    def _observe(self):
        seeds = self.seed + self.scene
        length = 1 + seeds % 4
        over = self.time >= length
        good = over & (length % 2 == 0)
        pair = torch.stack([seeds, self.time], -1).float()
        return {
            "observation": pair,
            "episode_seed": seeds[:, None],
            "success": good[:, None],
        }, over[:, None]

    def _reset(self, tensordict=None):
        if len(self.played) == self.fatal:
            raise KeyboardInterrupt
        self.played.append(self.seed)
        self.time = torch.zeros(self.batch_size, dtype=torch.int64)
        return TensorDict(self._observe()[0], self.batch_size)

    def _step(self, tensordict):
        self.time = self.time + 1
        seen, over = self._observe()
        flags = {"done": over, "terminated": over, "truncated": over & False}
        reward = tensordict["action"][..., :1]
        return TensorDict({**seen, "reward": reward, **flags}, self.batch_size)


def policy(td):
    """Acts (time, seed) / 100."""
    return td["observation"].flip(-1) / 100


def record(env, path, episodes, **kwargs):
    kwargs = {"instruction": "count", **kwargs}
    return record_demos(
        env, policy, path, task_id="Count-v1", episodes=episodes, **kwargs
    )


class TestRounds:
    def test_keeps_success_only(self, tmp_path):
        # Seeds 0, 10, 20, ...: lengths 1, 3, 1, 3 ... of one scene never succeed; scene
        # 1 has lengths 2, 4, 2, 4.
        done = record(CountingEnv(2), tmp_path / "a.h5", 3)
        assert (done.episodes, done.dropped, done.steps) == (3, 3, 2 + 4 + 2)
        assert done.success == 0.5
        demos = ManiSkillDemos(tmp_path / "a.h5")
        assert [e.seed for e in demos.episodes] == [1, 11, 21]
        assert [e.length for e in demos.episodes] == [2, 4, 2]
        assert demos.instructions == ["count"]

    def test_every_step_is_in_its_place(self, tmp_path):
        record(CountingEnv(2), tmp_path / "a.h5", 2)
        with h5py.File(tmp_path / "a.h5") as file:
            second = file["traj_1"]
            # seed 11, four steps: five observations, the last one included
            assert second["obs"][:].tolist() == [[11, t] for t in range(5)]
            wanted = [[t / 100, 0.11] for t in range(4)]
            np.testing.assert_allclose(second["actions"], wanted, atol=1e-7)
            np.testing.assert_allclose(second["rewards"], [t / 100 for t in range(4)])
            for name in ("terminated", "success"):
                assert second[name][:].tolist() == [False, False, False, True]
            assert not second["truncated"][:].any()

    def test_keeps_all(self, tmp_path):
        done = record(CountingEnv(2), tmp_path / "a.h5", 4, keep="all")
        assert (done.episodes, done.dropped) == (4, 0)
        described = json.loads((tmp_path / "a.json").read_text())
        kept = [(e["episode_seed"], e["success"]) for e in described["episodes"]]
        assert kept == [(0, False), (1, True), (10, False), (11, True)]

    def test_goes_on_after_an_interruption(self, tmp_path):
        whole = record(CountingEnv(2), tmp_path / "whole.h5", 4)
        env = CountingEnv(2)
        env.fatal = 2
        with pytest.raises(KeyboardInterrupt):
            record(env, tmp_path / "cut.h5", 4)
        assert len(ManiSkillDemos(tmp_path / "cut.h5").episodes) == 2
        env = CountingEnv(2)
        done = record(env, tmp_path / "cut.h5", 4)
        assert env.played == [20, 30]  # not the first two again
        assert (done.episodes, done.dropped) == (whole.episodes, whole.dropped)
        entries = [
            json.loads((tmp_path / f"{name}.json").read_text())["episodes"]
            for name in ("whole", "cut")
        ]
        assert entries[0] == entries[1]

    def test_adds_episodes(self, tmp_path):
        record(CountingEnv(2), tmp_path / "a.h5", 2)
        env = CountingEnv(2)
        assert record(env, tmp_path / "a.h5", 3).episodes == 3
        assert env.played == [20]
        assert record(env, tmp_path / "a.h5", 3).episodes == 3
        assert env.played == [20]

    def test_no_episode_twice(self, tmp_path):
        env = CountingEnv(2)
        env._set_seed = lambda seed: setattr(env, "seed", 10 * (seed // 2))
        done = record(env, tmp_path / "a.h5", 2, max_attempts=100)
        assert done.episodes == 2
        seeds = [e.seed for e in ManiSkillDemos(tmp_path / "a.h5").episodes]
        assert seeds == [1, 11]

    def test_gives_up(self, tmp_path):
        with pytest.raises(RuntimeError, match="5 episodes were played, and 0 of 1"):
            record(CountingEnv(1), tmp_path / "a.h5", 1, max_attempts=5)

    def test_noise_is_executed_and_not_learned(self, tmp_path):
        def played(name, **kwargs):
            record(CountingEnv(2), tmp_path / f"{name}.h5", 6, **kwargs)
            with h5py.File(tmp_path / f"{name}.h5") as file:
                groups = [file[f"traj_{i}"] for i in range(6)]
                names = ("actions", "intended_actions", "rewards")
                return [{n: g[n][:] for n in names if n in g} for g in groups]

        plain, noisy, again = (
            played("a"),
            played("b", noise=0.2),
            played("c", noise=0.2),
        )
        sizes = []
        for was, now, same in zip(plain, noisy, again, strict=True):
            assert "intended_actions" not in was
            np.testing.assert_array_equal(now["intended_actions"], was["actions"])
            np.testing.assert_array_equal(now["actions"], same["actions"])
            difference = now["actions"] - now["intended_actions"]
            assert (difference[:, 0] != 0).all()
            assert (difference[:, 1] == 0).all()  # the gripper's place
            # The toy's reward is the action's first dimension: the noise was executed.
            np.testing.assert_allclose(now["rewards"], now["actions"][:, 0], atol=1e-6)
            sizes.append(np.abs(difference[:, 0]).mean())
        assert max(sizes) > 2 * min(sizes)  # each episode has its own scale
        demos = ManiSkillDemos(tmp_path / "b.h5")
        np.testing.assert_array_equal(
            demos.episode(0)["action"], plain[0]["actions"].astype(np.float32)
        )
        executed = ManiSkillDemos(tmp_path / "b.h5", intended=False)
        np.testing.assert_array_equal(
            executed.episode(0)["action"], noisy[0]["actions"].astype(np.float32)
        )

    def test_noise_goes_on_after_an_interruption(self, tmp_path):
        record(CountingEnv(2), tmp_path / "whole.h5", 4, noise=0.2)
        record(CountingEnv(2), tmp_path / "cut.h5", 2, noise=0.2)
        record(CountingEnv(2), tmp_path / "cut.h5", 4, noise=0.2)
        whole, cut = (
            ManiSkillDemos(tmp_path / f"{n}.h5", intended=False)
            for n in ("whole", "cut")
        )
        assert torch.equal(whole[:]["action"], cut[:]["action"])
        with pytest.raises(ValueError, match=r"noise: 0\.2 there, None asked for"):
            record(CountingEnv(2), tmp_path / "cut.h5", 4)

    def test_noise_is_no_negative_number(self, tmp_path):
        with pytest.raises(ValueError, match="must not be negative"):
            record(CountingEnv(1), tmp_path / "a.h5", 1, noise=-0.1)

    def test_needs_an_instruction(self, tmp_path):
        with pytest.raises(ValueError, match="no instruction for Count-v1"):
            record(CountingEnv(1), tmp_path / "a.h5", 1, instruction=None)


@pytest.fixture(scope="module")
def pushed(tmp_path_factory) -> Path:
    """Two real episodes of PushCube from the state."""
    pytest.importorskip("mani_skill")
    path = tmp_path_factory.mktemp("push") / "push.h5"
    env = ManiSkillEnv("PushCube-v1", reward_mode="sparse")
    record_demos(
        env,
        ScriptedTeacher("PushCube-v1"),
        path,
        task_id="PushCube-v1",
        episodes=2,
        env_kwargs={"obs_mode": "state", "reward_mode": "sparse"},
    )
    env.close()
    return path


@pytest.mark.maniskill
class TestState:
    def test_read_by_us(self, pushed):
        demos = ManiSkillDemos(pushed, chunk_size=4)
        assert [e.seed for e in demos.episodes] == [0, 1]
        assert all(5 <= e.length <= 20 for e in demos.episodes)
        rows = demos.episode(1)
        assert rows["observation", "state"].shape[-1] == 35
        assert rows["next", "terminated"][-1]
        # the teacher is a function of the state: its labels are the recorded actions
        teacher = ScriptedTeacher("PushCube-v1")
        seen = TensorDict({"observation": rows["observation", "state"]}, rows.shape)
        chunk = teacher(seen)["vla_action", "chunk"]
        torch.testing.assert_close(chunk[:, 0], rows["action"])

    def test_read_by_mani_skill(self, pushed):
        from mani_skill.trajectory.dataset import ManiSkillTrajectoryDataset

        theirs = ManiSkillTrajectoryDataset(str(pushed), success_only=True)
        ours = ManiSkillDemos(pushed)
        assert len(theirs) == len(ours)
        rows = ours[:]
        for i in range(len(theirs)):
            step = theirs[i]
            torch.testing.assert_close(step["action"], rows["action"][i])
            seen = torch.as_tensor(step["obs"])
            torch.testing.assert_close(seen, rows["observation", "state"][i])
            assert bool(step["success"]) == bool(rows["next", "success"][i])

    def test_played_again_by_mani_skill(self, pushed):
        """The JSON makes the environment again, and the actions lead to the same end."""
        import gymnasium as gym
        from mani_skill.trajectory.replay_trajectory import sanity_check_and_format_seed

        described = json.loads(pushed.with_suffix(".json").read_text())
        info, entry = described["env_info"], described["episodes"][0]
        sanity_check_and_format_seed(entry)
        env = gym.make(info["env_id"], render_backend="none", **info["env_kwargs"])
        obs, _ = env.reset(**entry["reset_kwargs"])
        with h5py.File(pushed) as file:
            group = file["traj_0"]
            np.testing.assert_array_equal(obs[0].numpy(), group["obs"][0])
            for action in group["actions"][:]:
                obs, _, _, _, outcome = env.step(action)
            np.testing.assert_array_equal(obs[0].numpy(), group["obs"][-1])
            states = env.unwrapped.get_state_dict()
            np.testing.assert_array_equal(
                states["actors"]["cube"][0].numpy(),
                group["env_states/actors/cube"][-1],
            )
        assert bool(outcome["success"])
        env.close()


@pytest.mark.maniskill
@pytest.mark.render
def test_pictures(tmp_path):
    """A real episode with the human camera, by the teacher from the parts of the state."""
    env = ManiSkillEnv(
        "PushCube-v1",
        obs_mode="rgb+state_dict",
        camera="human",
        image_size=32,
        light_visuals=True,
    )
    teacher = ScriptedTeacher("PushCube-v1")
    shown = []

    def act(td):
        shown.append(td["observation", "image"][0].clone())
        seen = TensorDict({"observation": flat_state(td)}, td.batch_size)
        return teacher(seen)["vla_action", "chunk"][..., 0, :]

    path = tmp_path / "push.h5"
    record_demos(
        env, act, path, task_id="PushCube-v1", episodes=1, cameras={"image": "human"}
    )
    env.close()
    state = ManiSkillEnv("PushCube-v1")
    state.set_seed(0)
    flat = state.reset()["observation"]
    state.close()
    demos = ManiSkillDemos(path)
    rows = demos[:]
    assert torch.equal(rows["observation", "image"], torch.stack(shown))
    assert len(torch.unique(rows["observation", "image"])) > 20
    # the parts joined are the flat state of the same episode
    parts = ["agent/qpos", "agent/qvel", "extra/tcp_pose"]
    parts += ["extra/goal_pos", "extra/obj_pose"]
    joined = ManiSkillDemos(path, cameras=[], state=parts)[:]["observation", "state"]
    torch.testing.assert_close(joined[0], flat[0])


if __name__ == "__main__":
    pytest.main([__file__])
