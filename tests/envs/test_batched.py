# Copyright (c) the torchrl_rpd authors.
#
# This source code is licensed under the MIT license found in the
# LICENSE file in the root directory of this source tree.
"""The adapter over one ManiSkill environment of many scenes, as on a GPU.

A stand-in (batched_mani_skill.py) takes the place of GPU simulation, which was not run.
"""

from __future__ import annotations

import pytest
import torch
from tensordict import TensorDict
from torchrl.envs.utils import check_env_specs

from torchrl_rpd.envs import ManiSkillEnv, ManiSkillWrapper

pytestmark = pytest.mark.maniskill

N, LIMIT = 3, 4


@pytest.fixture(scope="module")
def stand_in():
    from batched_mani_skill import BatchedManiSkill

    env = BatchedManiSkill("PushCube-v1", N)
    # A wrapper that is no longer used closes what it wraps.
    env.close = lambda: None
    return env


@pytest.fixture
def base(stand_in):
    stand_in.resets.clear()
    stand_in.reconfiguration_freq = 0
    return stand_in


@pytest.fixture
def env(base):
    return ManiSkillWrapper(base, max_episode_steps=LIMIT)


def staggered(env, steps):
    """A rollout in which row 1 is also reset after each step with an even number."""
    torch.manual_seed(0)
    td = env.reset()
    frames = []
    for t in range(steps):
        td, following = env.step_and_maybe_reset(env.rand_action(td))
        frames.append(td)
        if t % 2 == 0:
            mask = torch.tensor([[False], [True], [False]])
            following = env.reset(following.set("_reset", mask))
        td = following
    return torch.stack(frames, 1)


def test_equals_as_many_cpu_environments(env):
    """Same seeds and actions: same states, rewards, ends and seeds, row by row."""
    cpu = ManiSkillEnv("PushCube-v1", num_envs=N, max_episode_steps=LIMIT)
    rollouts = []
    for each in (env, cpu):
        each.set_seed(5)
        rollouts.append(staggered(each, 2 * LIMIT + 3))
    batched, plain = rollouts
    for root in ((), ("next",)):
        state = batched[(*root, "observation", "state")]
        assert torch.equal(state, plain[(*root, "observation")])
    for key in ("episode_seed", "action"):
        assert torch.equal(batched[key], plain[key])
    for key in ("reward", "done", "terminated", "truncated", "success"):
        assert torch.equal(batched["next", key], plain["next", key])
    assert batched["next", "truncated"].any()


def test_pictures_are_not_views_of_the_buffer(env):
    """Each frame keeps the picture of its own state, terminal frames included."""
    from batched_mani_skill import picture

    env.set_seed(0)
    rollout = env.rollout(2 * LIMIT, break_when_any_done=False)
    for frames in (rollout, rollout["next"]):
        image = frames["observation", "image"].flatten(0, 1)
        state = frames["observation", "state"].flatten(0, 1)
        assert torch.equal(image, picture(state).permute(0, 3, 1, 2))
    assert rollout["next", "done"].any()
    assert len(rollout["observation", "image"][0].unique(dim=0)) == 2 * LIMIT


def test_partial_resets_touch_only_their_rows(env, base):
    env.set_seed(0)
    td = env.step(env.rand_action(env.reset()))["next"]
    mask = torch.tensor([[True], [False], [True]])
    after = env.reset(td.clone().set("_reset", mask))
    assert base.resets[-1][1] == [0, 2]
    for key in (("observation", "state"), ("observation", "image"), "episode_seed"):
        assert torch.equal(after[key][1], td[key][1])
        assert not torch.equal(after[key][0], td[key][0])
    # Steps are counted per row: row 1 is one step ahead.
    for _ in range(LIMIT - 1):
        after = env.step(env.rand_action(after))["next"]
    assert after["truncated"].flatten().tolist() == [False, True, False]
    # A mask without a row resets nothing.
    count = len(base.resets)
    env.reset(after.set("_reset", torch.zeros(N, 1, dtype=torch.bool)))
    assert len(base.resets) == count


def test_seeds(env, base):
    """ManiSkill draws new poses with the first seed of the list: it must be a new one at
    every reset, also if scene 0 goes on."""
    env.set_seed(9)
    td = env.reset()
    first = td["episode_seed"].flatten().tolist()
    assert base.resets == [(first, [0, 1, 2])]
    heads = []
    for _ in range(3):
        mask = torch.tensor([[False], [True], [False]])
        td = env.reset(td.set("_reset", mask))
        seeds, rows = base.resets[-1]
        assert rows == [1]
        assert seeds[1] == int(td["episode_seed"][1])
        assert seeds[2] == first[2]
        assert int(td["episode_seed"][0]) == first[0]
        heads.append(seeds[0])
    assert len({*heads, first[0]}) == 4


def test_specs(env):
    assert env.batch_size == (N,)
    check_env_specs(env)


def test_a_step_asks_for_no_value(env, base, monkeypatch):
    """On a GPU each of these would wait until the device has caught up."""
    td = env.rand_action(env.reset())
    waits = ("item", "tolist", "__bool__", "__int__", "__float__", "__index__")
    allowed = [False]
    for name in (*waits, "nonzero", "cpu", "numpy"):
        method = getattr(torch.Tensor, name)

        def watched(self, *args, method=method, name=name, **kwargs):
            assert allowed[0], f"{name} waits for the device"
            return method(self, *args, **kwargs)

        monkeypatch.setattr(torch.Tensor, name, watched)
    step = base.step

    def simulate(action):
        allowed[0] = True  # the stand-in's scenes run on the CPU
        result = step(action)
        allowed[0] = False
        return result

    monkeypatch.setattr(base, "step", simulate)
    env._step(td)


def test_action_on_another_device(env):
    td = env.reset().set("action", torch.zeros(N, 7, device="meta"))
    with pytest.raises(RuntimeError, match="The action is on meta"):
        env._step(td)


def test_pictures_on_another_device(base, monkeypatch):
    from torchrl_rpd.envs._observer import Observer
    from torchrl_rpd.envs._views import ObsMode, View

    view = View("base_camera", False, (("rgb", ("observation", "image")),))
    device = torch.device("meta")  # stands for a GPU that simulates
    observer = Observer(ObsMode.parse("rgb"), [view], device=device)
    with pytest.raises(RuntimeError, match="is on cpu, the simulation on meta"):
        observer.read(base, base._last_obs)


def test_rebuilding_with_partial_resets(env, base):
    base.reconfiguration_freq = 1
    env.reset()
    mask = torch.tensor([[False], [True], [False]])
    with pytest.raises(RuntimeError, match="ignore_terminations=True"):
        env.reset(TensorDict({"_reset": mask}, batch_size=[N]))


def test_not_among_others(base):
    other = ManiSkillEnv("PushCube-v1")._env[0]
    with pytest.raises(ValueError, match="a single GPU environment"):
        ManiSkillWrapper([base, other])


if __name__ == "__main__":
    pytest.main([__file__])
