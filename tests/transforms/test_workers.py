# Copyright (c) the torchrl_rpd authors.
#
# This source code is licensed under the MIT license found in the
# LICENSE file in the root directory of this source tree.
"""Worker processes, of batched envs and of collectors.

``ParallelEnv`` inside: ``tests/transforms/test_torchrl_contract.py``.
"""

from __future__ import annotations

from collections.abc import Callable
from multiprocessing.connection import Connection
from typing import Any

import pytest
import torch
from counting_env import (
    CountingEnv,
    RecordingTeacher,
    assert_labels_belong,
    make_worker,
    make_worker_with_teacher,
)
from torchrl.collectors import MultiAsyncCollector, MultiSyncCollector
from torchrl.data import LazyTensorStorage, ReplayBuffer
from torchrl.envs import (
    ParallelEnv,
    SerialEnv,
    TransformedEnv,
    check_env_specs,
)

from torchrl_rpd.transforms import TeacherActionTransform


def test_in_process_teacher_inside_workers_is_refused() -> None:
    def make() -> TransformedEnv:
        return TransformedEnv(make_worker(), TeacherActionTransform(RecordingTeacher()))

    for batched in (SerialEnv, ParallelEnv):
        with pytest.raises(RuntimeError, match="teacher_factory="):
            batched(2, make)


def test_factory_inside_serial_env() -> None:
    env = SerialEnv(2, make_worker_with_teacher)
    check_env_specs(env)
    frames = env.rollout(12, break_when_any_done=False)
    assert frames.shape == (2, 2, 12)
    assert_labels_belong(frames)


def test_factory_inside_parallel_env() -> None:
    env = ParallelEnv(1, make_worker_with_teacher)
    try:
        assert_labels_belong(env.rollout(12, break_when_any_done=False))
        asked = [stats["queries"] for stats in env.transform.stats()]
        assert len(asked) == 1 and asked[0] >= 2 * 12
        env.transform.set_enabled(False)
        frames = env.rollout(4, break_when_any_done=False)
        assert not frames["teacher_mask"].any()
        assert [stats["queries"] for stats in env.transform.stats()] == asked
    finally:
        env.close(raise_if_closed=False)


def test_the_switch_raises_where_it_cannot_reach() -> None:
    import cloudpickle

    label = TeacherActionTransform(teacher_factory=RecordingTeacher)
    arrived = cloudpickle.loads(cloudpickle.dumps(label))
    arrived.enabled = False  # the copy that travelled has a switch of its own
    with pytest.raises(RuntimeError, match="set_enabled"):
        label.enabled = False


COLLECTORS = {"sync": MultiSyncCollector, "async": MultiAsyncCollector}


@pytest.mark.parametrize("kind", COLLECTORS)
def test_factory_in_collector_workers(kind: str) -> None:
    collector = COLLECTORS[kind](
        [make_worker_with_teacher], None, frames_per_batch=20, total_frames=60
    )
    try:
        stored = 0
        for frames in collector:
            assert_labels_belong(frames)
            stored += frames.numel()
        assert stored == 60
        if kind == "sync":
            # One query per stored frame and one for each root of the next batch.
            state = collector.state_dict()["worker0"]["env_state_dict"]
            stats = state["_extra_state"]["stats"]
            assert stats["queries"] == 60 + 2 == stats["labelled"]
    finally:
        collector.shutdown()


@pytest.mark.parametrize("kind", COLLECTORS)
def test_postproc_of_collectors_with_workers(kind: str) -> None:
    """The teacher stays in this process; counters and switch are its own."""
    teacher = RecordingTeacher()
    label = TeacherActionTransform(teacher)
    # The batches of two workers are put together (sync), or come from the one (async).
    collector = COLLECTORS[kind](
        [make_worker] * (2 if kind == "sync" else 1),
        None,
        frames_per_batch=20,
        total_frames=80,
        postproc=label,
    )
    try:
        for i, frames in enumerate(collector, start=1):
            if i < 3:
                assert_labels_belong(frames)
                assert len(teacher.asked) == 20 * i == label.stats()["queries"]
            else:
                assert not frames["teacher_mask"].any()
                assert not frames["teacher_action"].any()
            label.enabled = i < 2
        assert len(teacher.asked) == 40 and label.stats()["frames"] == 80
    finally:
        collector.shutdown()


def hold(thing: Any) -> Callable[[], Any]:
    return lambda: thing


@pytest.mark.parametrize("where", ["env", "function", "replay buffer"])
def test_an_in_process_teacher_is_not_sent_to_workers(where: str) -> None:
    label = TeacherActionTransform(RecordingTeacher())
    kwargs: dict[str, Any] = {"frames_per_batch": 20, "total_frames": 20}
    make: Any = make_worker
    if where == "replay buffer":
        kwargs["replay_buffer"] = ReplayBuffer(
            storage=LazyTensorStorage(100), batch_size=8, transform=label, shared=True
        )
    else:
        env = TransformedEnv(CountingEnv((2, 3)), label)
        make = env if where == "env" else hold(env)
    with pytest.raises(
        RuntimeError, match=r"RecordingTeacher lives in .*teacher_factory="
    ):
        MultiSyncCollector([make], None, **kwargs)


def _in_child(label: TeacherActionTransform, pipe: Connection) -> None:
    frames = CountingEnv().rollout(2)
    try:
        before = bool(label(frames)["teacher_mask"].all())
        pipe.send("ready")
        pipe.recv()
        pipe.send((before, bool(label(frames)["teacher_mask"].any())))
    except RuntimeError as error:
        pipe.send(str(error))


def test_forked_processes() -> None:
    """Nothing is pickled on a fork: an in-process teacher is refused at its first use."""
    context = torch.multiprocessing.get_context("fork")

    def fork(label: TeacherActionTransform) -> tuple[Any, Connection]:
        here, there = context.Pipe()
        process = context.Process(target=_in_child, args=(label, there))
        process.start()
        return process, here

    process, pipe = fork(TeacherActionTransform(RecordingTeacher()))
    assert pipe.poll(60) and "teacher_factory=" in pipe.recv()
    process.join()

    built: list[int] = []

    def factory() -> RecordingTeacher:
        built.append(1)
        return RecordingTeacher()

    label = TeacherActionTransform(teacher_factory=factory)
    label(CountingEnv().rollout(2))
    process, pipe = fork(label)
    assert pipe.poll(60) and pipe.recv() == "ready"
    label.enabled = False  # the switch reaches a forked copy
    pipe.send("go on")
    assert pipe.poll(60) and pipe.recv() == (True, False)
    process.join()
    assert built == [1]


if __name__ == "__main__":
    pytest.main([__file__])
