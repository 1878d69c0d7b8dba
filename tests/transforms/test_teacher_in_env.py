# Copyright (c) the torchrl_rpd authors.
#
# This source code is licensed under the MIT license found in the
# LICENSE file in the root directory of this source tree.
"""The transform inside envs: who is asked when, and where the answer lands."""

from __future__ import annotations

import io
from collections.abc import Callable

import pytest
import torch
from counting_env import (
    ACTION_DIM,
    CountingEnv,
    RecordingTeacher,
    assert_labels_belong,
    label_of,
    make_worker,
)
from tensordict import TensorDictBase
from torchrl.collectors import Collector
from torchrl.data import Bounded, Categorical
from torchrl.envs import (
    Compose,
    RewardSum,
    SerialEnv,
    StepCounter,
    TransformedEnv,
    check_env_specs,
)

from torchrl_rpd.transforms import TeacherActionTransform

BATCHES = {
    "[]": lambda: CountingEnv((3,), batch_size=[]),
    "[1]": lambda: CountingEnv((3,)),
    "[3]": lambda: CountingEnv((2, 3, 5)),
    "[2, 3]": lambda: CountingEnv((2, 3, 5, 4, 2, 7), batch_size=[2, 3]),
    "serial": lambda: SerialEnv(2, [make_worker, lambda: make_worker(2)]),
}


@pytest.mark.parametrize("batch", BATCHES)
def test_collector_queries_every_stored_frame_once_plus_n(batch: str) -> None:
    teacher = RecordingTeacher()
    label = TeacherActionTransform(teacher)
    env = TransformedEnv(BATCHES[batch](), label)
    num_envs = env.batch_size.numel()
    collector = Collector(
        env, None, frames_per_batch=7 * num_envs, total_frames=42 * num_envs
    )
    stored = []
    for i, frames in enumerate(collector, start=1):
        assert_labels_belong(frames)
        done, following = frames["next", "done"], frames["next"]
        assert torch.equal(following["teacher_mask"], ~done)
        expected = torch.where(done, 0.0, label_of(following["observation"]))
        torch.testing.assert_close(following["teacher_action"], expected)
        stored += [
            tuple(map(int, row))
            for row in frames["observation"].reshape(-1, 3).tolist()
        ]
        # one query per stored frame, and the roots of the next batch
        assert len(teacher.asked) == len(stored) + num_envs
        assert label.stats()["queries"] == 7 * num_envs * i + num_envs
    assert i == 6
    # no observation was asked about twice, and every stored one was
    assert len(set(teacher.asked)) == len(teacher.asked)
    assert set(stored) < set(teacher.asked)


def test_terminal_rows_are_not_asked_about() -> None:
    # Lengths 2 and 3 (+ 1 in odd episodes). By hand: the reset asks about both envs,
    # and so does step 1; in step 2 env 0 ends, and its reset asks about it alone; in
    # step 3 env 1 ends.
    teacher = RecordingTeacher()
    env = TransformedEnv(CountingEnv((2, 3)), TeacherActionTransform(teacher))
    env.rollout(3, break_when_any_done=False)
    calls = [[tuple(map(int, row)) for row in c.tolist()] for c in teacher.calls]
    assert calls == [
        [(0, 0, 0), (1, 0, 0)],
        [(0, 0, 1), (1, 0, 1)],
        [(1, 0, 2)],
        [(0, 1, 0)],
        [(0, 1, 1)],
    ]


def test_rows_that_stand_still_keep_their_label() -> None:
    teacher = RecordingTeacher()
    env = TransformedEnv(CountingEnv((4, 6)), TeacherActionTransform(teacher))
    root = env.rand_action(env.reset())
    root["_step"] = torch.tensor([[True], [False]])
    following = env.step(root)["next"]
    assert teacher.asked == [(0, 0, 0), (1, 0, 0), (0, 0, 1)]
    expected = label_of(torch.tensor([[0.0, 0.0, 1.0], [1.0, 0.0, 0.0]]))
    torch.testing.assert_close(following["teacher_action"], expected)
    assert following["teacher_mask"].all()


@pytest.mark.parametrize("replan_interval", [1, 2])
def test_rollout_until_all_are_done(replan_interval: int) -> None:
    # TorchRL lets envs stand still there that are done before the others.
    def teacher(td: TensorDictBase) -> TensorDictBase:
        chunk = label_of(td["observation"]).unsqueeze(1).expand(-1, 2, -1)
        return td.set(("vla_action", "chunk"), chunk)

    label = TeacherActionTransform(teacher, replan_interval=replan_interval)
    env = TransformedEnv(CountingEnv((2, 5, 3)), label)
    frames = env.rollout(
        10, break_when_any_done=False, break_when_all_done=True, auto_reset=True
    )
    assert frames.shape == (3, 5)
    live = ~frames["done"]
    assert torch.equal(frames["teacher_mask"], live)
    asked_at = frames["observation"].clone()
    asked_at[..., 2] -= asked_at[..., 2] % replan_interval
    expected = torch.where(live, label_of(asked_at), 0.0)
    torch.testing.assert_close(frames["teacher_action"], expected)
    assert label.stats()["labelled"] == 2 + 5 + 3


@pytest.mark.parametrize("batch", BATCHES)
def test_check_env_specs(batch: str) -> None:
    env = TransformedEnv(
        BATCHES[batch](),
        Compose(
            StepCounter(4),
            RewardSum(),
            TeacherActionTransform(RecordingTeacher()),
        ),
    )
    check_env_specs(env)
    spec = env.observation_spec
    assert spec["teacher_action"].shape == (*env.batch_size, ACTION_DIM)
    assert spec["teacher_action"].dtype == torch.float32
    assert spec["teacher_mask"].shape == (*env.batch_size, 1)
    assert spec["teacher_mask"].dtype == torch.bool


def test_compose_with_step_counter_and_reward_sum() -> None:
    teacher = RecordingTeacher()
    chain = Compose(StepCounter(3), RewardSum(), TeacherActionTransform(teacher))
    env = TransformedEnv(CountingEnv((9, 2)), chain)
    frames = env.rollout(20, break_when_any_done=False)
    assert_labels_belong(frames)
    done = frames["next", "done"]
    assert done[0, 2] and torch.equal(frames["next", "teacher_mask"], ~done)
    assert frames["next", "episode_reward"].max() == 3


def test_step_counter_after_the_transform_is_refused() -> None:
    label = TeacherActionTransform(RecordingTeacher())
    env = TransformedEnv(CountingEnv(), Compose(label, StepCounter(3)))
    with pytest.raises(ValueError, match="Put the StepCounter first"):
        env.reset()


def test_nested_keys() -> None:
    env = TransformedEnv(
        CountingEnv(),
        TeacherActionTransform(
            RecordingTeacher(),
            teacher_action_key=("teacher", "action"),
            teacher_mask_key=("teacher", "mask"),
        ),
    )
    check_env_specs(env)
    frames = env.rollout(8, break_when_any_done=False)
    torch.testing.assert_close(
        frames["teacher", "action"], label_of(frames["observation"])
    )
    assert frames["teacher", "mask"].all()


def test_enabled_in_an_env() -> None:
    teacher = RecordingTeacher()
    label = TeacherActionTransform(teacher)
    env = TransformedEnv(CountingEnv(), label)
    label.enabled = False
    frames = env.rollout(6, break_when_any_done=False)
    assert not teacher.calls
    assert not frames["teacher_mask"].any() and not frames["teacher_action"].any()
    assert frames["teacher_action"].shape == (3, 6, ACTION_DIM)
    assert label.stats()["frames"] > 0 and label.stats()["queries"] == 0
    label.enabled = True
    assert_labels_belong(env.rollout(6, break_when_any_done=False))


def test_switch_and_counters_survive_unwrapping() -> None:
    # Wrapping a TransformedEnv again makes TorchRL clone its transforms.
    teacher = RecordingTeacher()
    label = TeacherActionTransform(teacher)
    env = TransformedEnv(TransformedEnv(CountingEnv(), label), RewardSum())
    assert env.transform[0] is not label
    env.reset()
    assert label.stats()["queries"] == 3
    label.enabled = False
    env.reset()
    assert len(teacher.asked) == 3


def test_native_autoreset_is_refused() -> None:
    base = CountingEnv()
    base._torchrl_native_autoreset = True
    with pytest.raises(RuntimeError, match="native auto-reset"):
        TransformedEnv(base, TeacherActionTransform(RecordingTeacher()))
    with pytest.raises(RuntimeError, match="native auto-reset"):
        TransformedEnv(base, Compose(TeacherActionTransform(RecordingTeacher())))
    label = TeacherActionTransform(RecordingTeacher())
    with pytest.raises(RuntimeError, match="native_autoreset=False"):
        label._reset_on_native_autoreset(base.reset(), base.reset())


def test_a_clipped_label_uses_the_env_box() -> None:
    # 0.7 and -0.2, doubled and shifted: 1.4 -> clipped to 1, -0.4; then one row inside.
    raw = torch.tensor([[0.7, -0.2], [0.1, 0.2]])
    label = TeacherActionTransform(lambda td: raw, action_transform=lambda a: 2 * a)
    root = TransformedEnv(CountingEnv((3, 3)), label).reset()
    expected = torch.tensor([[1.0, -0.4], [0.2, 0.4]])
    torch.testing.assert_close(root["teacher_action"], expected)
    assert label.stats()["clipped"] == 1

    loose = TeacherActionTransform(
        lambda td: raw, action_transform=lambda a: 2 * a, clip_labels=False
    )
    root = TransformedEnv(CountingEnv((3, 3)), loose).reset()
    torch.testing.assert_close(root["teacher_action"], 2 * raw)
    assert loose.stats()["clipped"] == 0


def test_the_box_is_that_of_the_env_around_it() -> None:
    def env_with(limit: float, label: TeacherActionTransform) -> TransformedEnv:
        base = CountingEnv((2, 2))
        base.action_spec = Bounded(-limit, limit, (2, ACTION_DIM))
        return TransformedEnv(base, label)

    label = TeacherActionTransform(lambda td: torch.full((2, 2), 9.0))
    assert env_with(1.0, label).reset()["teacher_action"].max() == 1.0
    label.reset_parent()
    assert env_with(2.0, label).reset()["teacher_action"].max() == 2.0


def test_errors_about_the_action_spec() -> None:
    def env_with(spec: object) -> TransformedEnv:
        base = CountingEnv((2, 2))
        base.action_spec = spec
        return TransformedEnv(base, TeacherActionTransform(RecordingTeacher()))

    with pytest.raises(TypeError, match="continuous action vectors"):
        env_with(Categorical(4, shape=(2,))).observation_spec  # noqa: B018
    low = torch.tensor([[-1.0, -1.0], [-2.0, -1.0]])
    with pytest.raises(ValueError, match="different boxes"):
        env_with(Bounded(low, -low)).observation_spec  # noqa: B018
    base = CountingEnv((2, 2))
    env = TransformedEnv(
        base, TeacherActionTransform(RecordingTeacher(), action_key="torque")
    )
    with pytest.raises(KeyError, match="action_key="):
        env.observation_spec  # noqa: B018


def test_wrong_width_is_refused_in_an_env() -> None:
    env = TransformedEnv(
        CountingEnv((2, 2)), TeacherActionTransform(lambda td: torch.zeros(2, 7))
    )
    with pytest.raises(ValueError, match="actions of 7 entries; expected 2"):
        env.reset()


def test_global_rng_is_left_alone() -> None:
    def build() -> Callable[[TensorDictBase], torch.Tensor]:
        net = torch.nn.Linear(3, ACTION_DIM)  # draws weights
        return lambda td: net(td["observation"])

    env = TransformedEnv(
        CountingEnv(), TeacherActionTransform(teacher_factory=build, query_fraction=0.5)
    )
    torch.manual_seed(0)
    before = torch.get_rng_state()
    root = env.reset()
    for _ in range(3):
        root = env.step_and_maybe_reset(root.set("action", torch.zeros(3, 2)))[1]
    assert torch.equal(torch.get_rng_state(), before)


def test_query_fraction_and_resume() -> None:
    def make() -> TransformedEnv:
        label = TeacherActionTransform(RecordingTeacher(), query_fraction=0.3, seed=5)
        return TransformedEnv(CountingEnv((50,) * 40), label)

    env = make()
    frames = env.rollout(49)
    share = frames["teacher_mask"].float().mean()
    # 1960 draws: standard deviation sqrt(0.3 * 0.7 / 1960) = 0.010
    assert abs(share - 0.3) < 0.05
    expected = label_of(frames["observation"]) * frames["teacher_mask"]
    torch.testing.assert_close(frames["teacher_action"], expected)
    again = make()
    assert torch.equal(again.rollout(49)["teacher_mask"], frames["teacher_mask"])

    resumed = make()
    file = io.BytesIO()
    torch.save(env.state_dict(), file)
    file.seek(0)
    resumed.load_state_dict(torch.load(file, weights_only=True))
    assert resumed.transform.stats() == env.transform.stats()
    assert torch.equal(resumed.reset()["teacher_mask"], env.reset()["teacher_mask"])


if __name__ == "__main__":
    pytest.main([__file__])
