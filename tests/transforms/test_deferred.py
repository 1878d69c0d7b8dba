# Copyright (c) the torchrl_rpd authors.
#
# This source code is licensed under the MIT license found in the
# LICENSE file in the root directory of this source tree.
"""Labels that are made in the background are those of ``deferred=False``, later."""

from __future__ import annotations

import copy
import gc
import threading
import time
import weakref
from collections.abc import Callable
from typing import Any

import cloudpickle
import pytest
import torch
from counting_env import (
    CountingEnv,
    LookingBack,
    RecordingTeacher,
    assert_labels_belong,
    label_of,
    make_worker,
)
from tensordict import NonTensorStack, TensorDict, TensorDictBase
from torchrl.collectors import Collector, MultiSyncCollector
from torchrl.data import LazyTensorStorage, ReplayBuffer
from torchrl.envs import (
    Compose,
    SerialEnv,
    StepCounter,
    TransformedEnv,
    check_env_specs,
)
from torchrl.modules.inference_server import InferenceServer

from torchrl_rpd.teachers.inference import InferenceTeacher, ServableTeacher
from torchrl_rpd.transforms import JumpStartTransform, TeacherActionTransform

CHUNK = ("vla_action", "chunk")


class Planner:
    """Chunks of three actions that tell their observation, place and query number."""

    out_keys = (CHUNK,)
    in_keys = ("observation",)

    def __init__(self) -> None:
        self.calls = 0

    def __call__(self, td: TensorDictBase) -> TensorDictBase:
        self.calls += 1
        first = label_of(td["observation"])
        places = torch.arange(3.0).view(1, 3, 1) / 10 + self.calls / 1e4
        return td.set(CHUNK, first.unsqueeze(1) + places)


class Spread:
    """A label and its spread."""

    def __call__(self, td: TensorDictBase) -> TensorDictBase:
        label = label_of(td["observation"])
        return TensorDict({CHUNK: label.unsqueeze(1), "teacher_std": 1 + label.abs()})


class Drawing:
    """Labels from a generator of its own: they tell in which order it was asked."""

    def __init__(self) -> None:
        self.generator = torch.Generator().manual_seed(0)

    def __call__(self, td: TensorDictBase) -> torch.Tensor:
        return torch.rand(len(td), 2, generator=self.generator)


class Broken(RecordingTeacher):
    """NaN for every third step of an episode."""

    def __call__(self, td: TensorDictBase) -> torch.Tensor:
        third = td["observation"][:, 2:] % 3 == 2
        return torch.where(third, torch.nan, super().__call__(td))


class Slow(RecordingTeacher):
    """Answers late."""

    def __call__(self, td: TensorDictBase) -> torch.Tensor:
        time.sleep(0.002)
        return super().__call__(td)


CASES: dict[str, tuple[Callable[[], Any], dict[str, Any]]] = {
    "plain": (Slow, {}),
    "drawing": (Drawing, {"query_fraction": 0.6, "seed": 3}),
    "chunks": (Planner, {"replan_interval": 3}),
    "history": (lambda: LookingBack(3, ["observation"]), {}),
    "not finite": (Broken, {}),
    "std": (Spread, {"teacher_std_key": "teacher_std"}),
    "no-ops, clipped": (RecordingTeacher, {"no_op_norm": 0.015, "high": 0.02}),
    "nested": (
        RecordingTeacher,
        {
            "teacher_action_key": ("teacher", "action"),
            "teacher_mask_key": ("teacher", "mask"),
            "teacher_ticket_key": ("teacher", "ticket"),
        },
    ),
}


def batches_of(
    label: TeacherActionTransform, batches: int = 4, **kwargs: Any
) -> list[TensorDictBase]:
    """Of envs whose episodes end at different steps: 7 steps of 3 envs each."""
    torch.manual_seed(0)
    env = TransformedEnv(CountingEnv(), label)
    collector = Collector(
        env,
        None,
        frames_per_batch=21,
        total_frames=21 * batches,
        postproc=label if label.deferred else None,
        **kwargs,
    )
    return [batch.clone() for batch in collector]


def deferred(teacher: Any, **kwargs: Any) -> TeacherActionTransform:
    return TeacherActionTransform(teacher, deferred=True, **kwargs)


@pytest.mark.parametrize("same_td", [False, True])
@pytest.mark.parametrize("case", CASES)
def test_labels_are_the_same(case: str, same_td: bool) -> None:
    make, kwargs = CASES[case]
    at_once = TeacherActionTransform(make(), **kwargs)
    later = deferred(make(), **kwargs)
    expected = batches_of(at_once, return_same_td=same_td)
    found = batches_of(later, return_same_td=same_td)
    for one, other in zip(expected, found, strict=True):
        assert set(one.keys(True, True)) == set(other.keys(True, True))
        assert torch.equal(one["observation"], other["observation"])
        for key in at_once.out_keys:
            assert torch.equal(one[key], other[key]), key
        # What comes next is labelled where it is a root.
        assert not other["next", later.teacher_mask_key].any()
        assert not other["next", later.teacher_action_key].any()
    assert any(batch[later.teacher_mask_key].any() for batch in found)
    counted, as_before = later.stats(), at_once.stats()
    counted.pop("seconds"), as_before.pop("seconds")
    assert counted == as_before
    generators = (t._labeller.shared.generator.get_state() for t in (at_once, later))
    assert torch.equal(*generators)


def test_the_env_goes_on_meanwhile() -> None:
    # The teacher answers nothing before four steps are made; it would wait for ever.
    steps = threading.Semaphore(0)

    def teacher(td: TensorDictBase) -> torch.Tensor:
        if int(td["observation"][0, 2]) == 0:
            for _ in range(4):
                assert steps.acquire(timeout=60)
        return label_of(td["observation"])

    label = deferred(teacher)
    env = TransformedEnv(CountingEnv((9, 9)), label)
    root = env.reset()
    frames = []
    for _ in range(4):
        assert not root["teacher_mask"].any() and not root["teacher_action"].any()
        step, root = env.step_and_maybe_reset(env.rand_action(root))
        frames.append(step)
        steps.release()
    assert_labels_belong(label(torch.stack(frames, -1)))


def test_split_trajectories_and_flat_frames() -> None:
    label = deferred(RecordingTeacher())
    for batch in batches_of(label, split_trajs=True):
        valid = batch["collector", "mask"]
        assert not valid.all()
        assert torch.equal(batch["teacher_mask"].squeeze(-1), valid)
        assert_labels_belong(batch[valid])
    env = TransformedEnv(CountingEnv(), label.clone())
    frames = env.rollout(12, break_when_any_done=False).reshape(-1)
    order = torch.randperm(36, generator=torch.Generator().manual_seed(0))
    assert_labels_belong(label(frames[order]))


@pytest.mark.parametrize("batch_size", [(), (2, 2)], ids=str)
def test_batch_shapes(batch_size: tuple[int, ...]) -> None:
    lengths = (2, 3, 4, 5) if batch_size else (3,)
    label = deferred(RecordingTeacher())
    env = TransformedEnv(
        CountingEnv(lengths, batch_size=batch_size), Compose(StepCounter(4), label)
    )
    check_env_specs(env)
    assert env.observation_spec["teacher_ticket"].shape == (*batch_size, 1)
    assert_labels_belong(label(env.rollout(12, break_when_any_done=False)))


def test_outside_of_a_batched_env() -> None:
    label = deferred(RecordingTeacher())
    env = TransformedEnv(SerialEnv(2, [make_worker, lambda: make_worker(2)]), label)
    for batch in Collector(
        env, None, frames_per_batch=40, total_frames=120, postproc=label
    ):
        assert batch.shape == (2, 2, 10)
        assert_labels_belong(batch)
    # 30 steps of 4 envs and the roots after the last one
    ended = int(batch["next", "done"][..., -1, :].sum())
    assert 120 <= label.stats()["queries"] <= 124 + ended


def test_pictures_in_memory_that_is_used_again() -> None:
    class OneBuffer(CountingEnv):
        """Shows every observation in the same memory."""

        def __init__(self) -> None:
            self.buffer = torch.zeros(3, 3)
            super().__init__()

        def _observe(self) -> torch.Tensor:
            return self.buffer.copy_(super()._observe())

    go_on = threading.Event()
    asked = RecordingTeacher()

    def teacher(td: TensorDictBase) -> torch.Tensor:
        assert go_on.wait(60)
        return asked(td)

    label = deferred(teacher)
    env = TransformedEnv(OneBuffer(), label)
    root = env.reset()
    first = root["teacher_ticket"].clone()
    env.step(env.rand_action(root))
    go_on.set()
    root = label(TensorDict({"teacher_ticket": first}, [3]))
    start = torch.tensor([[0.0, 0, 0], [1, 0, 0], [2, 0, 0]])  # env, episode 0, step 0
    assert torch.equal(root["teacher_action"], label_of(start))


def test_switched_off_and_on() -> None:
    def run(label: TeacherActionTransform) -> list[TensorDictBase]:
        env = TransformedEnv(CountingEnv((9, 8)), label)
        root, frames = env.reset(), []
        for number in range(12):
            label.enabled = not 3 <= number < 6
            step, root = env.step_and_maybe_reset(env.rand_action(root))
            frames.append(step)
        out = torch.stack(frames, -1)
        return label(out) if label.deferred else out

    later = run(deferred(Planner(), replan_interval=3))
    at_once = run(TeacherActionTransform(Planner(), replan_interval=3))
    for key in ("teacher_action", "teacher_mask"):
        assert torch.equal(later[key], at_once[key])
    # Roots 4 to 6 of env 0 were shown while the teacher was off.
    expected = [True] * 4 + [False] * 3 + [True] * 5
    assert later["teacher_mask"][0].flatten().tolist() == expected


def test_stored_frames_are_labelled_at_once() -> None:
    label = deferred(RecordingTeacher())
    frames = TensorDict({"observation": torch.rand(2, 5, 3)}, [2, 5])
    out = label(frames)
    assert_labels_belong(out)
    assert "teacher_ticket" not in out.keys() and len(label._queue()) == 0
    buffer = ReplayBuffer(storage=LazyTensorStorage(30), transform=deferred(Slow()))
    buffer.extend(frames.reshape(-1))
    assert_labels_belong(buffer[:])


def test_fetched_by_a_replay_buffer() -> None:
    label = deferred(Slow())
    buffer = ReplayBuffer(
        storage=LazyTensorStorage(90), batch_size=12, transform=label.clone()
    )
    env = TransformedEnv(CountingEnv(), label)
    for _ in Collector(
        env, None, frames_per_batch=30, total_frames=90, replay_buffer=buffer
    ):
        assert_labels_belong(buffer.sample())
    assert_labels_belong(buffer[:])
    assert "teacher_ticket" not in buffer[:].keys()


def test_nothing_is_kept_of_what_was_fetched() -> None:
    label = deferred(RecordingTeacher())
    collector = Collector(
        TransformedEnv(CountingEnv(), label),
        None,
        frames_per_batch=30,
        total_frames=300,
        postproc=label,
    )
    outstanding = [len(label._queue()) for _ in collector]
    # What shows the last roots and what shows the next: a step each, and a reset of envs
    # whose episodes ended there.
    assert len(outstanding) == 10 and max(outstanding) <= 4


def test_labels_that_nobody_fetches() -> None:
    label = deferred(RecordingTeacher())
    label.max_outstanding = 12
    env = TransformedEnv(CountingEnv((50,)), label)
    collector = Collector(env, None, frames_per_batch=5, total_frames=500)
    with pytest.raises(RuntimeError, match=r"12 steps .* postproc=transform"):
        for _ in collector:
            pass
    with pytest.raises(RuntimeError, match="without deferred=True"):
        _ = TeacherActionTransform(RecordingTeacher()).max_outstanding


def test_an_error_of_the_teacher() -> None:
    class Fails(RecordingTeacher):
        def __call__(self, td: TensorDictBase) -> torch.Tensor:
            if len(self.calls) == 3:
                raise OSError("the cable was pulled")
            return super().__call__(td)

    teacher = Fails()
    label = deferred(teacher)
    with pytest.raises(
        RuntimeError, match=r"at submission 4 of \d+: OSError: the cable was pulled"
    ) as caught:
        batches_of(label)
    assert isinstance(caught.value.__cause__, OSError)
    # Nobody is asked after that: what is remembered of the envs has a gap.
    assert len(teacher.calls) == 3
    state = label.state_dict()
    label.load_state_dict(state)
    env = TransformedEnv(CountingEnv(), label.clone())
    teacher.calls.clear()
    assert_labels_belong(label(env.rollout(2)))


def test_frames_of_somebody_else() -> None:
    label, other = deferred(RecordingTeacher()), deferred(RecordingTeacher())
    frames = TransformedEnv(CountingEnv(), label).rollout(3)
    with pytest.raises(RuntimeError, match="not the one in their env"):
        other(frames)
    TransformedEnv(CountingEnv(), other).rollout(30)
    with pytest.raises(RuntimeError, match="6 of 6 frames"):
        other(frames)
    assert_labels_belong(label(frames))


def test_state_dict_in_the_middle() -> None:
    def make(base: CountingEnv) -> TransformedEnv:
        label = deferred(LookingBack(3), query_fraction=0.7)
        return TransformedEnv(base, label)

    env = make(CountingEnv((9, 8)))
    frames = env.rollout(4, auto_cast_to_device=True)
    state = copy.deepcopy(env.state_dict())
    # The same process: what was seen before keeps its labels.
    env.load_state_dict(state)
    before = env.transform(frames)
    assert before["teacher_mask"].any()
    # Another process: none of its tickets is one of ours.
    other = make(copy.deepcopy(env.base_env))
    other.load_state_dict(state)
    with pytest.raises(RuntimeError, match="does not know"):
        other.transform(frames)
    torch.manual_seed(0)
    ours = env.transform(env.rollout(6))
    other = make(CountingEnv((9, 8)))
    other.base_env.episode.fill_(0)  # the second episode follows
    other.load_state_dict(state)
    theirs = other.transform(other.rollout(6))
    for key in ("observation", "teacher_action", "teacher_mask"):
        assert torch.equal(ours[key], theirs[key])


def test_copies() -> None:
    label = deferred(Slow())
    env = TransformedEnv(CountingEnv(), label)
    root = env.reset()
    other = copy.deepcopy(env)
    assert len(other.transform._queue()) == 0
    assert_labels_belong(other.transform(other.rollout(3)))
    # A postproc that is copied and the transform in the env have the queue in common.
    outside = label.clone()
    assert_labels_belong(copy.deepcopy(outside)(root))


def test_the_thread_ends_with_the_transform() -> None:
    label = deferred(RecordingTeacher())
    label(TransformedEnv(CountingEnv(), label).rollout(2))
    (thread,) = label._queue()._thread._threads
    gone = weakref.ref(label)
    del label
    gc.collect()
    thread.join(timeout=60)
    assert gone() is None and not thread.is_alive()


def make_with_factory() -> TransformedEnv:
    label = TeacherActionTransform(teacher_factory=RecordingTeacher, deferred=True)
    return TransformedEnv(make_worker(), label)


def test_another_process() -> None:
    label = TeacherActionTransform(teacher_factory=RecordingTeacher, deferred=True)
    arrived = cloudpickle.loads(cloudpickle.dumps(label))
    with pytest.raises(RuntimeError, match="sent to another process"):
        TransformedEnv(CountingEnv(), arrived).reset()
    with pytest.raises(RuntimeError, match=r"cannot live inside .*postproc=transform"):
        SerialEnv(2, make_with_factory)


@pytest.mark.slow
def test_workers_of_a_collector() -> None:
    label = TeacherActionTransform(teacher_factory=RecordingTeacher, deferred=True)
    collector = MultiSyncCollector(
        [make_with_factory],
        None,
        frames_per_batch=10,
        total_frames=20,
        postproc=label,
        cat_results="stack",
    )
    try:
        with pytest.raises(RuntimeError, match="the env is in another process"):
            next(iter(collector))
    finally:
        collector.shutdown()


def test_jump_start_needs_labels_at_once() -> None:
    env = TransformedEnv(
        CountingEnv(), Compose(JumpStartTransform(), deferred(RecordingTeacher()))
    )
    with pytest.raises(ValueError, match="deferred=False"):
        env.reset()


def test_number_of_envs() -> None:
    label = deferred(RecordingTeacher())
    env = TransformedEnv(CountingEnv(), label)
    env.reset()
    with pytest.raises(RuntimeError, match="deferred=False"):
        label._labeller.label_env(
            TensorDict({"observation": torch.zeros(2, 3)}, [2]),
            torch.ones(2, dtype=torch.bool),
            label._box(),
            observed=None,
            fresh=True,
        )


def test_inference_server() -> None:
    class Served:
        def __call__(self, td: TensorDictBase) -> TensorDictBase:
            time.sleep(0.001)
            return td.set(CHUNK, label_of(td["observation"]).unsqueeze(1))

    with InferenceServer(ServableTeacher(Served)) as server:
        label = deferred(InferenceTeacher(server.client(), in_keys=["observation"]))
        for batch in batches_of(label):
            assert_labels_belong(batch)


def test_remote_teacher() -> None:
    pytest.importorskip("websockets")
    from torchrl_rpd.teachers import RemoteTeacher
    from torchrl_rpd.teachers.remote import TeacherServer

    class Served(RecordingTeacher):
        action_dim = 2
        chunk_size = 1
        in_keys = ("observation",)

    with TeacherServer(Served(), port=0).running() as server:
        address = f"ws://127.0.0.1:{server.port}"
        label = deferred(RemoteTeacher(address, in_keys=["observation"], action_dim=2))
        for batch in batches_of(label, 2):
            assert_labels_belong(batch)


def test_instructions_travel_along() -> None:
    def teacher(td: TensorDictBase) -> torch.Tensor:
        return torch.stack([torch.full((2,), float(len(t))) for t in td["words"]]) / 10

    class Speaking(CountingEnv):
        """Tells what is to be done."""

        def _reset(self, tensordict: TensorDictBase | None = None) -> TensorDictBase:
            words = NonTensorStack("push", "pull it")
            return super()._reset(tensordict).set("words", words)

        def _step(self, tensordict: TensorDictBase) -> TensorDictBase:
            return super()._step(tensordict).set("words", NonTensorStack("go", "x"))

    label = deferred(teacher)
    env = TransformedEnv(Speaking((9, 9)), label)
    root = env.reset()
    following = env.step(env.rand_action(root))["next"]
    # a tenth of the lengths of the words
    expected = torch.tensor([[0.4, 0.4], [0.7, 0.7]])
    torch.testing.assert_close(label(root)["teacher_action"], expected)
    expected = torch.tensor([[0.2, 0.2], [0.1, 0.1]])
    torch.testing.assert_close(label(following)["teacher_action"], expected)


if __name__ == "__main__":
    pytest.main([__file__])
