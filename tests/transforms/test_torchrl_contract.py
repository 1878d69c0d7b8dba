# Copyright (c) the torchrl_rpd authors.
#
# This source code is licensed under the MIT license found in the
# LICENSE file in the root directory of this source tree.
"""What TorchRL asks of the tests of every transform, by the names it gives them."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import pytest
import torch
from counting_env import (
    ACTION_DIM,
    CountingEnv,
    LookingBack,
    RecordingTeacher,
    assert_labels_belong,
    label_of,
    label_of_window,
    make_worker,
    make_worker_with_chain,
    make_worker_with_teacher,
    windows_of,
)
from tensordict import TensorDict, TensorDictBase
from tensordict.nn import TensorDictModule
from tensordict.utils import NestedKey
from torchrl.collectors import Collector
from torchrl.data import (
    LazyTensorStorage,
    ReplayBuffer,
    TensorDictReplayBuffer,
)
from torchrl.envs import (
    Compose,
    EnvBase,
    ParallelEnv,
    RewardSum,
    SerialEnv,
    StepCounter,
    TransformedEnv,
    check_env_specs,
)

from torchrl_rpd.transforms import TeacherActionTransform

NESTED: dict[str, NestedKey] = {
    "teacher_action_key": ("teacher", "action"),
    "teacher_mask_key": ("teacher", "mask"),
}
KEYS: dict[str, dict[str, Any]] = {"flat": {}, "nested": NESTED}
TEACHERS: dict[str, Callable[[], Any]] = {
    "plain": RecordingTeacher,
    "history": lambda: LookingBack(3),
}


def two_workers(first_id: int = 0) -> list[Callable[[], CountingEnv]]:
    return [lambda: make_worker(first_id), lambda: make_worker(first_id + 2)]


class TestTeacherActionTransform:
    """Mirrors ``TransformBase`` of TorchRL's own tests."""

    @pytest.mark.parametrize("teacher", TEACHERS)
    @pytest.mark.parametrize("keys", KEYS)
    @pytest.mark.parametrize("batch", [(), (2,), (2, 1)], ids=str)
    def test_single_trans_env_check(
        self, batch: Sequence[int], keys: str, teacher: str
    ) -> None:
        # An entry that is there already is refused: tests/transforms/test_placement.py
        lengths = (2, 3) if batch else (2,)
        env = TransformedEnv(
            CountingEnv(lengths, batch_size=batch),
            TeacherActionTransform(TEACHERS[teacher](), **KEYS[keys]),
        )
        check_env_specs(env)

    @pytest.mark.parametrize("make", [make_worker_with_teacher, make_worker_with_chain])
    def test_serial_trans_env_check(self, make: Callable[[], EnvBase]) -> None:
        env = SerialEnv(2, make)
        check_env_specs(env)
        assert env.batch_size == (2, 2)

    def test_parallel_trans_env_check(self) -> None:
        env = ParallelEnv(2, make_worker_with_chain)
        try:
            check_env_specs(env)
            frames = env.rollout(6, break_when_any_done=False)
            assert frames["teacher", "mask"].shape == (2, 2, 6, 1)
            assert frames["teacher", "mask"].all()
            exact = label_of_window(*windows_of(frames["observation"], 3))
            torch.testing.assert_close(frames["teacher", "action"], exact)
            # the second transform of a Compose, in every worker
            getattr(env.transform.transforms, "1").set_enabled(False)
            assert not env.reset()["teacher", "mask"].any()
        finally:
            env.close(raise_if_closed=False)

    @pytest.mark.parametrize("teacher", TEACHERS)
    @pytest.mark.parametrize("keys", KEYS)
    def test_trans_serial_env_check(self, keys: str, teacher: str) -> None:
        label = TeacherActionTransform(TEACHERS[teacher](), **KEYS[keys])
        env = TransformedEnv(SerialEnv(2, two_workers()), label)
        check_env_specs(env)
        assert env.batch_size == (2, 2)

    def test_trans_parallel_env_check(self) -> None:
        teacher = RecordingTeacher()
        # without buffers: with them, the parent spins while it waits
        base = ParallelEnv(2, [make_worker, lambda: make_worker(2)], use_buffers=False)
        env = TransformedEnv(base, TeacherActionTransform(teacher, **NESTED))
        try:
            check_env_specs(env)
            teacher.calls.clear()
            frames = env.rollout(9, break_when_any_done=False)
            assert frames.shape == (2, 2, 9) and frames["teacher", "mask"].all()
            torch.testing.assert_close(
                frames["teacher", "action"],
                label_of(frames["observation"]),
                rtol=0,
                atol=1e-9,
            )
            # Rows whose last step ended an episode: nobody asked for the next root.
            ended = int(frames["next", "done"][..., -1, :].sum())
            assert len(teacher.asked) == 2 * 2 * 9 + 4 - ended
        finally:
            env.close(raise_if_closed=False)

    @pytest.mark.parametrize("keys", KEYS)
    def test_transform_no_env(self, keys: str) -> None:
        label = TeacherActionTransform(RecordingTeacher(), **KEYS[keys])
        frames = TensorDict({"observation": torch.rand(2, 3, 3)}, [2, 3])
        out = label(frames)
        assert torch.equal(
            out[label.teacher_action_key], label_of(frames["observation"])
        )
        assert out[label.teacher_mask_key].shape == (2, 3, 1)
        assert label.teacher_action_key not in frames.keys(True)

    def test_transform_compose(self) -> None:
        label = TeacherActionTransform(RecordingTeacher())
        frames = TensorDict({"observation": torch.rand(4, 3)}, [4])
        assert_labels_belong(Compose(label)(frames))
        # What comes before it is what the teacher sees.
        shift = Compose(
            lambda td: td.set("observation", td["observation"] + 1), label.clone()
        )
        out = shift(frames.copy())
        assert torch.equal(out["observation"], frames["observation"] + 1)
        assert_labels_belong(out)

    @pytest.mark.parametrize("keys", KEYS)
    @pytest.mark.parametrize("batch", [(4,), (2, 2)], ids=str)
    def test_transform_env(self, batch: Sequence[int], keys: str) -> None:
        label = TeacherActionTransform(RecordingTeacher(), **KEYS[keys])
        action, mask = label.teacher_action_key, label.teacher_mask_key
        base = CountingEnv((2, 3, 4, 5), batch_size=batch)
        env = TransformedEnv(base, Compose(StepCounter(4), RewardSum(), label))
        root = env.reset()
        assert root[action].shape == (*batch, ACTION_DIM) and root[mask].all()
        assert torch.equal(root[action], label_of(root["observation"]))
        following = env.step(env.rand_action(root))["next"]
        assert torch.equal(following[action], label_of(following["observation"]))
        assert following[mask].all()
        frames = env.rollout(20, break_when_any_done=False)
        torch.testing.assert_close(
            frames[action], label_of(frames["observation"]), rtol=0, atol=1e-9
        )
        assert torch.equal(frames["next", mask], ~frames["next", "done"])

    def test_transform_model(self) -> None:
        # A student that reads the labels.
        student = TensorDictModule(
            lambda action, mask: torch.where(mask, 2 * action, 7.0),
            ["teacher_action", "teacher_mask"],
            ["out"],
        )
        teacher = RecordingTeacher()
        label = TeacherActionTransform(teacher, query_fraction=0.5)
        frames = TensorDict({"observation": torch.rand(40, 3)}, [40])
        out = torch.nn.Sequential(label, student)(frames)
        expected = torch.where(
            out["teacher_mask"], 2 * label_of(frames["observation"]), 7.0
        )
        assert torch.equal(out["out"], expected)
        assert 0 < len(teacher.asked) < 40

    @pytest.mark.parametrize("buffer_class", [ReplayBuffer, TensorDictReplayBuffer])
    @pytest.mark.parametrize("ndim", [1, 2])
    def test_transform_rb(self, buffer_class: Callable, ndim: int) -> None:
        teacher = RecordingTeacher()
        label = TeacherActionTransform(teacher)
        buffer = buffer_class(
            storage=LazyTensorStorage(90, ndim=ndim), batch_size=12, transform=label
        )
        frames = CountingEnv().rollout(10, break_when_any_done=False)
        buffer.extend(frames if ndim == 2 else frames.reshape(-1))
        assert len(teacher.asked) == 30
        for _ in range(3):
            assert_labels_belong(buffer.sample())
        assert len(teacher.asked) == 30
        # a buffer that is saved and loaded does not ask again
        other = buffer_class(
            storage=LazyTensorStorage(90, ndim=ndim),
            batch_size=12,
            transform=TeacherActionTransform(teacher),
        )
        other.load_state_dict(buffer.state_dict())
        assert_labels_belong(other.sample())
        assert len(teacher.asked) == 30

    def test_transform_rb_filled_by_a_collector(self) -> None:
        teacher = RecordingTeacher()
        buffer = ReplayBuffer(
            storage=LazyTensorStorage(90),
            batch_size=12,
            transform=TeacherActionTransform(teacher),
        )
        collector = Collector(
            CountingEnv(),
            None,
            frames_per_batch=30,
            total_frames=90,
            replay_buffer=buffer,
        )
        for i, _ in enumerate(collector, start=1):
            assert len(teacher.asked) == 30 * i
            assert_labels_belong(buffer.sample())
        assert_labels_belong(buffer[:])
        assert len(teacher.asked) == 90

    def test_transform_rb_single_frames(self) -> None:
        teacher = RecordingTeacher()
        buffer = TensorDictReplayBuffer(
            storage=LazyTensorStorage(10),
            batch_size=4,
            transform=TeacherActionTransform(teacher),
        )
        for frame in CountingEnv().rollout(2).reshape(-1).unbind(0):
            buffer.add(frame)
        assert len(teacher.asked) == 6
        assert_labels_belong(buffer[:])

    def test_transform_rb_unlabelled_frames_are_labelled_late(self) -> None:
        # Frames that were there before the transform: never a batch without labels.
        teacher = RecordingTeacher()
        buffer = ReplayBuffer(storage=LazyTensorStorage(90), batch_size=12)
        frames = CountingEnv().rollout(4, break_when_any_done=False).reshape(-1)
        buffer.extend(frames)
        buffer.append_transform(TeacherActionTransform(teacher))
        assert_labels_belong(buffer.sample())
        assert len(teacher.asked) == 12

    def test_transform_inverse(self) -> None:
        # In an env nothing is inverted; without one it is a replay buffer's extend.
        teacher = RecordingTeacher()
        label = TeacherActionTransform(teacher)
        frames = TensorDict({"observation": torch.rand(4, 3)}, [4])
        assert_labels_belong(label.inv(frames))
        seen: list[TensorDictBase] = []
        env = TransformedEnv(
            CountingEnv(), Compose(seen.append, TeacherActionTransform(teacher))
        )
        env.transform.inv(frames)
        assert len(teacher.asked) == 4


if __name__ == "__main__":
    pytest.main([__file__])
