# Copyright (c) the torchrl_rpd authors.
#
# This source code is licensed under the MIT license found in the
# LICENSE file in the root directory of this source tree.
"""The transform on stored frames: postproc, replay buffer, plain tensordicts."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from counting_env import CountingEnv, RecordingTeacher, assert_labels_belong
from tensordict import NonTensorStack, TensorDict
from tensordict.nn import TensorDictModule, TensorDictSequential
from torchrl.collectors import Collector
from torchrl.data import LazyTensorStorage, ReplayBuffer
from torchrl.envs import Compose, EnvBase, RewardSum, SerialEnv, TransformedEnv

from torchrl_rpd.transforms import TeacherActionTransform


def collect(
    env: EnvBase, batches: int = 4, frames: int = 30, **kwargs: Any
) -> Collector:
    return Collector(
        env, None, frames_per_batch=frames, total_frames=batches * frames, **kwargs
    )


@pytest.mark.parametrize("max_batch_size", [None, 1, 7, 1000])
def test_postproc_asks_once_per_stored_frame(max_batch_size: int | None) -> None:
    # Four batches: a label that was left in the collector's buffer by an earlier batch
    # would be found by the comparison from the second one on.
    teacher = RecordingTeacher()
    label = TeacherActionTransform(teacher, max_batch_size=max_batch_size)
    for i, frames in enumerate(collect(CountingEnv(), postproc=label), start=1):
        assert_labels_belong(frames)
        assert len(teacher.asked) == 30 * i
        stored = frames["observation"].reshape(-1, 3).tolist()
        assert teacher.asked[-30:] == [tuple(map(int, row)) for row in stored]
    # 30 rows are 1, 30, ceil(30 / 7) = 5 and 1 calls
    calls = {None: 1, 1: 30, 7: 5, 1000: 1}[max_batch_size]
    assert label.stats()["calls"] == len(teacher.calls) == 4 * calls
    assert max(len(call) for call in teacher.calls) <= (max_batch_size or 30)
    assert label.stats()["frames"] == label.stats()["labelled"] == 120


def test_postproc_leaves_the_collectors_buffer_alone() -> None:
    label = TeacherActionTransform(RecordingTeacher())
    frames = CountingEnv().rollout(5, break_when_any_done=False)
    keys = set(frames.keys(True, True))
    labelled = label(frames)
    assert set(frames.keys(True, True)) == keys
    assert labelled["observation"].data_ptr() == frames["observation"].data_ptr()
    # what is there already is not trusted
    frames = labelled.copy()
    frames["observation"] = frames["observation"] + 1
    assert_labels_belong(label(frames))


def test_labels_agree_between_placements() -> None:
    def net() -> TensorDictModule:
        torch.manual_seed(3)
        return TensorDictModule(
            torch.nn.Linear(3, 2), in_keys=["observation"], out_keys=["a"]
        )

    def run(where: str) -> torch.Tensor:
        label = TeacherActionTransform(net(), low=-0.5, high=0.5)
        make = [lambda: CountingEnv((2, 3)), lambda: CountingEnv((4, 1), first_id=2)]
        if where == "env":
            env, kwargs = TransformedEnv(SerialEnv(2, make), label), {}
        else:
            env, kwargs = SerialEnv(2, make), {"postproc": label}
            if where == "composed postproc":
                kwargs = {"postproc": Compose(label)}
        out = [b["teacher_action"].clone() for b in collect(env, 3, 40, **kwargs)]
        assert label.stats()["clipped"] > 0
        return torch.stack(out)

    in_env = run("env")
    assert torch.equal(in_env, run("postproc"))
    assert torch.equal(in_env, run("composed postproc"))


def test_split_trajectories_pay_for_no_padding() -> None:
    teacher = RecordingTeacher()
    label = TeacherActionTransform(teacher)
    for i, frames in enumerate(
        collect(CountingEnv(), 3, split_trajs=True, postproc=label), start=1
    ):
        valid = frames["collector", "mask"]
        assert not valid.all()
        assert torch.equal(frames["teacher_mask"].squeeze(-1), valid)
        assert_labels_belong(frames[valid])
        assert len(teacher.asked) == 30 * i == len(set(teacher.asked))


def test_replay_buffer_labels_on_extend_and_not_on_sample() -> None:
    teacher = RecordingTeacher()
    label = TeacherActionTransform(teacher)
    buffer = ReplayBuffer(storage=LazyTensorStorage(100), batch_size=32)
    buffer.append_transform(label)
    buffer.extend(CountingEnv().rollout(10, break_when_any_done=False).reshape(-1))
    assert len(teacher.asked) == 30
    for _ in range(3):
        assert_labels_belong(buffer.sample())
    assert len(teacher.asked) == 30


def test_nn_sequential_and_plain_batch_shapes() -> None:
    teacher = RecordingTeacher()
    model = TensorDictSequential(
        TensorDictModule(lambda x: x + 1, ["observation"], ["observation"])
    )
    chain = torch.nn.Sequential(model, TeacherActionTransform(teacher))
    for shape in ((), (1,), (4,), (2, 3, 4)):
        frames = TensorDict({"observation": torch.rand(*shape, 3)}, shape)
        out = chain(frames)
        assert out["teacher_action"].shape == (*shape, 2)
        assert out["teacher_mask"].shape == (*shape, 1)
        assert_labels_belong(out)


def test_instructions_reach_the_teacher_row_by_row() -> None:
    def teacher(td: TensorDict) -> torch.Tensor:
        return torch.tensor([[float(len(text))] for text in td["language_instruction"]])

    text = [["push", "pull it"], ["x", "reach"]]
    frames = TensorDict(
        {
            "observation": torch.zeros(2, 2, 3),
            "language_instruction": NonTensorStack(*[NonTensorStack(*t) for t in text]),
        },
        [2, 2],
    )
    frames["collector", "mask"] = torch.tensor([[True, False], [True, True]])
    expected = torch.tensor([[4.0, 0.0], [1.0, 5.0]])  # the lengths of the words
    for keys in (None, ["language_instruction"]):
        out = TeacherActionTransform(teacher, in_keys=keys, max_batch_size=2)(frames)
        assert torch.equal(out["teacher_action"].squeeze(-1), expected)


def test_the_whole_observation_and_nothing_else() -> None:
    seen: list[set] = []

    def teacher(td: TensorDict) -> torch.Tensor:
        seen.append(set(td.keys(True, True)))
        td["observation", "scratch"] = td["observation", "state"] * 0  # stays inside
        return td["observation", "state"]

    frames = TensorDict(
        {
            "observation": {
                "image": torch.zeros(2, 3, 4, 4),
                "state": torch.ones(2, 2),
            },
            "action": torch.zeros(2, 2),
            "done": torch.zeros(2, 1, dtype=torch.bool),
            "terminated": torch.zeros(2, 1, dtype=torch.bool),
            "truncated": torch.zeros(2, 1, dtype=torch.bool),
            "next": {"reward": torch.zeros(2, 1), "observation": torch.zeros(2)},
            "collector": {"traj_ids": torch.zeros(2)},
        },
        [2],
    )
    label = TeacherActionTransform(teacher)
    out = label(label(frames))
    assert seen == [{("observation", "image"), ("observation", "state")}] * 2
    assert ("observation", "scratch") not in out.keys(True)


def test_enabled_on_frames() -> None:
    teacher = RecordingTeacher()
    label = TeacherActionTransform(teacher)
    label.enabled = False
    frames = CountingEnv().rollout(4, break_when_any_done=False)
    out = label(frames)
    assert not out["teacher_mask"].any() and out["teacher_action"].shape == (3, 4, 2)
    # without an action beside them, nothing tells how wide the zeros are
    with pytest.raises(RuntimeError, match="width of the labels"):
        label(frames.select("observation"))
    wide = TeacherActionTransform(teacher, low=[-1.0] * 7)
    wide.enabled = False
    assert wide(frames.select("observation"))["teacher_action"].shape == (3, 4, 7)
    assert not teacher.calls


def test_query_fraction_bounds_on_frames() -> None:
    frames = CountingEnv().rollout(6, break_when_any_done=False)
    for fraction, count in ((0.0, 0), (1.0, 18)):
        teacher = RecordingTeacher()
        out = TeacherActionTransform(teacher, query_fraction=fraction)(frames)
        assert int(out["teacher_mask"].sum()) == len(teacher.asked) == count


def test_missing_key_is_named() -> None:
    frames = CountingEnv().rollout(2)
    label = TeacherActionTransform(RecordingTeacher(), in_keys=[("obs", "image")])
    with pytest.raises(KeyError, match=r"\('obs', 'image'\).*not there.*'observation'"):
        label(frames)


def test_width_is_checked_against_the_actions_stored() -> None:
    frames = CountingEnv().rollout(2)
    label = TeacherActionTransform(lambda td: td["observation"])
    with pytest.raises(ValueError, match="actions of 3 entries; expected 2"):
        label(frames)
    with pytest.raises(ValueError, match="low is of shape"):
        TeacherActionTransform(lambda td: td["observation"], low=[0.0] * 3)(frames)


def test_replan_interval_is_refused_on_frames() -> None:
    label = TeacherActionTransform(RecordingTeacher(), replan_interval=2)
    with pytest.raises(ValueError, match="needs the transform in the env"):
        label(CountingEnv().rollout(2))


def test_counters() -> None:
    label = TeacherActionTransform(RecordingTeacher())
    frames = CountingEnv().rollout(4, break_when_any_done=False)
    label(frames)
    stats = label.pop_stats()
    assert stats["seconds"] > 0
    assert {k: v for k, v in stats.items() if k != "seconds"} == {
        "frames": 12,
        "queries": 12,
        "calls": 1,
        "labelled": 12,
        "clipped": 0,
        "non_finite": 0,
        "no_ops": 0,
        "incomplete": 0,
    }
    assert not any(label.stats().values())


def test_reward_sum_in_the_env_and_labels_after_it() -> None:
    env = TransformedEnv(CountingEnv(), RewardSum())
    teacher = RecordingTeacher()
    label = TeacherActionTransform(teacher, in_keys=["observation"])
    for frames in collect(env, 2, postproc=label):
        assert_labels_belong(frames)
        assert "episode_reward" in frames["next"]
    assert len(teacher.asked) == 60


if __name__ == "__main__":
    pytest.main([__file__])
