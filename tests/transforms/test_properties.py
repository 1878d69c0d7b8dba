# Copyright (c) the torchrl_rpd authors.
#
# This source code is licensed under the MIT license found in the
# LICENSE file in the root directory of this source tree.
"""Whatever the pattern of episodes: a label belongs to the observation beside it."""

from __future__ import annotations

import copy
from collections.abc import Sequence

import pytest
import torch
from counting_env import CountingEnv, RecordingTeacher, label_of, windows_of
from hypothesis import given, settings
from hypothesis import strategies as st
from tensordict import TensorDict, TensorDictBase
from torchrl.collectors import Collector
from torchrl.envs import TransformedEnv, step_mdp

from torchrl_rpd.transforms import TeacherActionTransform


def bounded(max_examples: int) -> settings:
    """The same examples everywhere, never timed, nothing left on disk."""
    return settings(
        max_examples=max_examples, derandomize=True, deadline=None, database=None
    )


class ScriptedEnv(CountingEnv):
    """Episode ``k`` of env ``i`` takes ``script[i][k]`` steps (the script repeats)."""

    def __init__(self, script: Sequence[Sequence[int]]) -> None:
        super().__init__([1] * len(script))
        self.script = script

    def _reset(self, tensordict: TensorDictBase | None = None) -> TensorDictBase:
        out = super()._reset(tensordict)
        now = self.episode.tolist()
        steps = [s[k % len(s)] for s, k in zip(self.script, now, strict=True)]
        # CountingEnv adds one step in odd episodes
        self.lengths = torch.tensor(steps) - self.episode % 2
        return out


HORIZON = 5


class Oracle:
    """Says what it was shown: a chunk ``[n, HORIZON, 5]`` of plain numbers.

    The code of the latest observation, the entry of the chunk, how many places of the
    window are real, and two sums over the window that tell order and content.
    """

    def __init__(self, window: int) -> None:
        self.history_window = window
        self.history_keys = ["observation"]

    def __call__(self, tensordict: TensorDictBase) -> TensorDictBase:
        seen = tensordict["observation"]
        if self.history_window == 1:
            assert "timestep_pad_mask" not in tensordict.keys()
            seen, real = seen[:, None], torch.ones(len(seen), 1, dtype=torch.bool)
        else:
            real = tensordict["timestep_pad_mask"]
        chunk = says(seen, real)[:, None].repeat(1, HORIZON, 1)
        chunk[..., 1] = torch.arange(HORIZON)
        return TensorDict({"vla_action": {"chunk": chunk}}, tensordict.batch_size)


def says(seen: torch.Tensor, real: torch.Tensor) -> torch.Tensor:
    places = torch.arange(1.0, seen.shape[-2] + 1)
    code = seen @ torch.tensor([1e4, 1e2, 1.0])
    return torch.stack(
        [
            code[..., -1],
            torch.zeros_like(code[..., -1]),
            real.sum(-1).float(),
            (places * real).sum(-1),
            (places * seen[..., 2]).sum(-1),
        ],
        -1,
    )


def belongs(label: torch.Tensor, observation: torch.Tensor, window: int) -> int:
    """Checks one label against one observation; returns the age of its plan."""
    env, episode, step = observation.tolist()
    age = int(label[1])
    planned_at = torch.tensor([env, episode, step - age])
    assert step - age >= 0, "planned in another episode"
    exact = says(*windows_of(planned_at, window))
    exact[1] = age
    assert torch.equal(label, exact)
    return age


scripts = st.integers(1, 3).flatmap(
    lambda n: st.lists(
        st.lists(st.integers(1, 7), min_size=1, max_size=3), min_size=n, max_size=n
    )
)


def mask_of(bits: int, num_envs: int) -> torch.Tensor:
    return torch.tensor([bool(bits >> i & 1) for i in range(num_envs)])


@st.composite
def plays(draw: st.DrawFn) -> tuple[list[list[int]], list[tuple[int, int, bool]]]:
    """Lengths of episodes; per step which envs move, are reset, and the switch."""
    script = draw(scripts)
    moves = st.one_of(st.just(7), st.integers(0, 7))
    resets = st.one_of(st.just(0), st.just(0), st.integers(0, 7))
    switch = st.sampled_from([True, True, True, False])
    steps = st.lists(st.tuples(moves, resets, switch), min_size=3, max_size=14)
    return script, draw(steps)


def make(
    base: ScriptedEnv, window: int, interval: int, fraction: float = 1.0
) -> TransformedEnv:
    label = TeacherActionTransform(
        Oracle(window),
        replan_interval=interval,
        query_fraction=fraction,
        max_batch_size=2,
        clip_labels=False,
    )
    return TransformedEnv(base, label)


class Play:
    """Drives an env by hand, and knows what has been observed without a gap."""

    def __init__(self, env: TransformedEnv, window: int) -> None:
        self.env, self.window = env, window
        self.n = env.batch_size.numel()
        self.run = [0] * self.n  # observations since the last gap
        self.whole = [False] * self.n  # ... which is the start of the episode
        self.root = env.reset()
        self.look(torch.ones(self.n, dtype=torch.bool), fresh=True)

    def look(self, observed: torch.Tensor, fresh: bool) -> None:
        if not self.env.transform.enabled:
            self.run, self.whole = [0] * self.n, [False] * self.n
            return
        for i in observed.nonzero().flatten().tolist():
            self.run[i] = 1 if fresh else self.run[i] + 1
            self.whole[i] = fresh or self.whole[i]

    def step(self, moves: int, resets: int, switch: bool) -> TensorDictBase:
        """One step, and the resets that follow; returns what ``next`` was."""
        self.env.transform.enabled = switch
        moving = mask_of(moves, self.n)
        root = self.root.set("action", torch.zeros(self.n, 5))
        if not moving.all():
            root.set("_step", moving.unsqueeze(-1))
        td = self.env.step(root)
        if moving.any():  # otherwise TorchRL does not even ask the transforms
            self.look(moving, fresh=False)
        following = td["next"].clone()
        self.root = step_mdp(td, keep_other=False)
        again = td["next", "done"].squeeze(-1) | mask_of(resets, self.n)
        if again.any():
            self.root = self.env.reset(self.root.set("_reset", again.unsqueeze(-1)))
            self.look(again, fresh=True)
        return following

    def known(self) -> list[bool]:
        return [
            whole or run >= self.window
            for whole, run in zip(self.whole, self.run, strict=True)
        ]


class FiveActions(ScriptedEnv):
    """With an action as wide as what the oracle says."""

    def __init__(self, script: Sequence[Sequence[int]]) -> None:
        super().__init__(script)
        spec = self.action_spec
        low = spec.space.low[:, :1].expand(-1, 5)
        self.action_spec = type(spec)(low, -low, (len(script), 5))


@bounded(120)
@given(plays(), st.integers(1, 4), st.integers(1, HORIZON))
def test_any_pattern_in_an_env(
    play: tuple[list[list[int]], list[tuple[int, int, bool]]],
    window: int,
    interval: int,
) -> None:
    """Ends, resets, standing still, the switch, chunk lengths and windows."""
    script, steps = play
    driver = Play(make(FiveActions(script), window, interval), window)
    was_off = False
    for moves, resets, switch in steps:
        before = driver.root["teacher_mask"].clone()
        following = driver.step(moves, resets, switch)
        # done rows are terminal or over: never labelled in this very step
        moved = mask_of(moves, driver.n)
        ended = following["done"].squeeze(-1) & moved
        assert not following["teacher_mask"].squeeze(-1)[ended].any()
        still = ~moved
        assert torch.equal(following["teacher_mask"][still], before[still])
        mask = driver.root["teacher_mask"].squeeze(-1).tolist()
        known = driver.known()
        again = following["done"].squeeze(-1) | mask_of(resets, driver.n)
        for i in range(driver.n):
            observation = driver.root["observation"][i]
            label = driver.root["teacher_action"][i]
            fresh = bool(again[i])
            if not mask[i]:
                assert not label.any()
            if fresh or moved[i]:
                assert mask[i] == (switch and (window == 1 or known[i]))
                if mask[i]:
                    age = belongs(label, observation, window)
                    assert age < interval
                    if fresh:
                        assert age == 0
            elif mask[i]:  # stands still with the label it had
                belongs(label, observation, window)
        was_off = was_off or not switch
        if not was_off:
            # without a gap, plans are made at every interval-th step
            for i in range(driver.n):
                step = int(driver.root["observation"][i, 2])
                assert int(driver.root["teacher_action"][i, 1]) == step % interval


@bounded(30)
@given(
    plays(),
    st.integers(1, 4),
    st.integers(1, HORIZON),
    st.integers(0, 13),
    st.sampled_from([1.0, 0.5]),
)
def test_resume_anywhere(
    play: tuple[list[list[int]], list[tuple[int, int, bool]]],
    window: int,
    interval: int,
    stop: int,
    fraction: float,
) -> None:
    """What a state_dict holds goes on as if nothing had happened."""
    script, steps = play
    if interval > 1:
        fraction = 1.0
    env = make(FiveActions(script), window, interval, fraction)
    driver = Play(env, window)
    for step in steps[:stop]:
        driver.step(*step)
    other_env = make(copy.deepcopy(env.base_env), window, interval, fraction)
    other_env.load_state_dict(copy.deepcopy(env.state_dict()))
    other = copy.copy(driver)
    other.env, other.root = other_env, driver.root.clone()
    for step in steps[stop:] + steps[:stop]:
        expected, resumed = driver.step(*step), other.step(*step)
        for a, b in ((expected, resumed), (driver.root, other.root)):
            for key in ("observation", "teacher_action", "teacher_mask"):
                assert torch.equal(a[key], b[key])


@bounded(25)
@given(
    scripts,
    st.integers(1, 4),
    st.integers(1, HORIZON),
    st.integers(1, 9),
    st.sampled_from([1.0, 0.5]),
)
def test_any_batch_border_of_a_collector(
    script: list[list[int]],
    window: int,
    interval: int,
    steps_per_batch: int,
    fraction: float,
) -> None:
    env = make(FiveActions(script), window, interval, 1.0 if interval > 1 else fraction)
    n = len(script)
    asked_rows = 0
    for frames in Collector(
        env,
        None,
        frames_per_batch=n * steps_per_batch,
        total_frames=3 * n * steps_per_batch,
    ):
        flat = frames.reshape(-1)
        labelled = flat["teacher_mask"].squeeze(-1)
        if fraction == 1.0 or interval > 1:
            assert labelled.all()
        for row in flat[labelled].unbind(0):
            age = belongs(row["teacher_action"], row["observation"], window)
            assert age == int(row["observation"][2]) % interval
            asked_rows += age == 0
    queries = env.transform.stats()["queries"]
    assert asked_rows <= queries <= asked_rows + n


@bounded(60)
@given(st.data())
def test_any_frames(data: st.DataObject) -> None:
    """Any batch shape, mask, size of calls and fraction: on frames, in one go."""
    shape = tuple(data.draw(st.lists(st.integers(1, 4), max_size=3)))
    seed = data.draw(st.integers(0, 2**16))
    generator = torch.Generator().manual_seed(seed)
    observation = torch.rand((*shape, 3), generator=generator)
    valid = torch.rand(shape, generator=generator) < data.draw(
        st.sampled_from([0.0, 0.5, 1.0])
    )
    teacher = RecordingTeacher()
    label = TeacherActionTransform(
        teacher,
        max_batch_size=data.draw(st.none() | st.integers(1, 70)),
        query_fraction=data.draw(st.sampled_from([0.0, 0.3, 1.0])),
        low=[-1.0, -1.0],
    )
    label.enabled = data.draw(st.sampled_from([True, True, False]))
    frames = TensorDict({"observation": observation}, shape)
    frames["collector", "mask"] = valid
    out = label(frames)
    mask = out["teacher_mask"]
    assert mask.shape == (*shape, 1)
    assert not (mask.squeeze(-1) & ~valid).any()
    if label.query_fraction == 1.0 and label.enabled:
        assert torch.equal(mask.squeeze(-1), valid)
    if label.query_fraction == 0.0 or not label.enabled:
        assert not mask.any()
    exact = torch.where(mask, label_of(observation), 0.0)
    torch.testing.assert_close(out["teacher_action"], exact, rtol=0, atol=1e-7)
    assert len(teacher.asked) == int(mask.sum()) == label.stats()["queries"]
    assert label.stats()["frames"] == int(valid.sum())


if __name__ == "__main__":
    pytest.main([__file__])
