# Copyright (c) the torchrl_rpd authors.
#
# This source code is licensed under the MIT license found in the
# LICENSE file in the root directory of this source tree.
"""Teachers behind TorchRL's InferenceServer; workers: ``tests/test_teacher_process.py``."""

from __future__ import annotations

import functools
import os
import signal
import threading
import time
from collections.abc import Callable, Iterator
from typing import Any

import pytest
import torch
from tensordict import NonTensorStack, TensorDict, TensorDictBase
from torchrl.envs import TransformedEnv
from torchrl.modules.inference_server import (
    InferenceServer,
    MPTransport,
    ProcessInferenceServer,
    SharedMemoryTransport,
)
from toy_envs import ReachEnv

from torchrl_rpd.teachers.inference import InferenceTeacher, ServableTeacher
from torchrl_rpd.teachers.ray_actor import RayTeacher, TeacherActor
from torchrl_rpd.teachers.remote import TeacherUnavailable
from torchrl_rpd.transforms import TeacherActionTransform

CHUNK = ("vla_action", "chunk")


def label_of(observation: torch.Tensor) -> torch.Tensor:
    return (-5 * observation).clamp(-1, 1)


class TowardsTheOrigin:
    """Chunks of two actions; the second one is the first one halved."""

    in_keys = ("observation",)

    def __init__(self) -> None:
        self.asked: list[TensorDictBase] = []

    def __call__(self, tensordict: TensorDictBase) -> TensorDictBase:
        self.asked.append(tensordict.clone())
        label = label_of(tensordict["observation"])
        return tensordict.set(CHUNK, torch.stack([label, label / 2], -2))


class Held(TowardsTheOrigin):
    """Answers when it is let go."""

    def __init__(self) -> None:
        super().__init__()
        self.go = threading.Event()

    def __call__(self, tensordict: TensorDictBase) -> TensorDictBase:
        assert self.go.wait(60)
        return super().__call__(tensordict)


def rows_of(*batch: int) -> TensorDict:
    return TensorDict({"observation": torch.randn(*batch, 2)}, batch)


def assert_answers(teacher: Callable[..., Any], rows: TensorDictBase) -> None:
    chunk = teacher(rows.clone())[CHUNK]
    assert torch.equal(chunk[..., 0, :], label_of(rows["observation"]))
    assert torch.equal(chunk[..., 1, :], label_of(rows["observation"]) / 2)


@pytest.fixture
def start() -> Iterator[Callable[..., InferenceServer]]:
    """Starts servers in threads, and ends them with the test."""
    servers = []

    def start(teacher: Any, *args: Any, **kwargs: Any) -> InferenceServer:
        model = ServableTeacher(lambda: teacher)
        servers.append(InferenceServer(model, *args, **kwargs).start())
        return servers[-1]

    yield start
    for server in servers:
        server.shutdown()


def test_in_an_env(start) -> None:
    server = start(TowardsTheOrigin())
    factory = InferenceTeacher.factories(server, 1, in_keys=["observation"])[0]
    env = TransformedEnv(ReachEnv(4), TeacherActionTransform(teacher_factory=factory))
    frames = env.rollout(20, break_when_any_done=False)
    assert frames["teacher_mask"].all()
    assert torch.equal(frames["teacher_action"], label_of(frames["observation"]))
    # 80 frames, and the 4 roots after them. Episodes end at steps 8 and 16.
    assert server.stats()["requests"] == 80 + 4 == env.transform.stats()["queries"]


def test_any_batch_of_rows(start) -> None:
    server = start(TowardsTheOrigin(), max_batch_size=4)
    teacher = InferenceTeacher(server.client())
    for batch in [(3,), (2, 3), (1,), ()]:
        assert_answers(teacher, rows_of(*batch))
    assert server.stats()["requests"] == 3 + 6 + 1 + 1


def test_rows_of_several_askers_are_one_batch(start) -> None:
    server = start(TowardsTheOrigin(), min_batch_size=6, timeout=3.0)
    teachers = [InferenceTeacher(server.client()) for _ in range(2)]
    threads = [
        threading.Thread(target=assert_answers, args=(teacher, rows_of(n)))
        for teacher, n in zip(teachers, (4, 2), strict=True)
    ]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    stats = server.stats()
    assert (stats["requests"], stats["batches"]) == (6, 1)


def test_only_what_is_read_travels_there_and_only_the_answer_back(start) -> None:
    expert = TowardsTheOrigin()
    server = start(expert)
    rows = rows_of(2)
    rows["image"] = torch.zeros(2, 3, 4, 4, dtype=torch.uint8)
    rows["timestep_pad_mask"] = torch.ones(2, 1, dtype=torch.bool)
    rows["language_instruction"] = NonTensorStack("push", "pull")
    InferenceTeacher(server.client())(rows.clone())
    assert set(expert.asked[-1].keys()) == set(rows.keys())
    assert expert.asked[-1]["language_instruction"] == ["push", "pull"]
    # The mask of a history belongs to the question of every teacher that looks back.
    InferenceTeacher(server.client(), in_keys=["observation"])(rows.clone())
    assert set(expert.asked[-1].keys()) == {"observation", "timestep_pad_mask"}
    answer = server.client()(rows[0])
    assert set(answer.keys(True, True)) == {CHUNK, "policy_version"}


def test_a_spread_comes_back(start) -> None:
    def expert(tensordict: TensorDictBase) -> TensorDictBase:
        tensordict["teacher_std"] = 0.1 + tensordict["observation"].abs()
        return TowardsTheOrigin()(tensordict)

    rows = rows_of(3)
    out = InferenceTeacher(start(expert).client())(rows.clone())
    assert torch.equal(out["teacher_std"], 0.1 + rows["observation"].abs())


def test_shared_memory(start) -> None:
    transport = SharedMemoryTransport(
        rows_of(), TensorDict({CHUNK: torch.zeros(2, 2)}), num_slots=6
    )
    server = start(TowardsTheOrigin(), transport, policy_version_key=None)
    teacher = InferenceTeacher(server.client(), timeout=0.2, on_error="mask")
    for _ in range(3):
        assert_answers(teacher, rows_of(4))
    server.shutdown()
    # 4 of 6 slots are taken by a question without an answer: the next one would wait
    # for slots, for good. It is not asked.
    for _ in range(2):
        assert teacher(rows_of(4))[CHUNK].isnan().all()
    server.start()
    # The first 4 are answered now, late.
    _until_answered(teacher)
    assert_answers(teacher, rows_of(4))


def _until_answered(teacher: InferenceTeacher) -> None:
    deadline = time.monotonic() + 60
    while teacher(rows_of(4))[CHUNK].isnan().any():
        assert time.monotonic() < deadline


class TestGone:
    def test_raises_in_time(self, start) -> None:
        server = start(TowardsTheOrigin())
        teacher = InferenceTeacher(server.client(), timeout=0.2)
        assert_answers(teacher, rows_of(3))
        server.shutdown()
        with pytest.raises(TeacherUnavailable, match=r"3 of 3 rows.*within 0.2 s"):
            teacher(rows_of(3))

    def test_what_is_open_on_a_shutdown(self, start) -> None:
        expert = Held()
        server = start(expert, max_batch_size=1)
        teacher = InferenceTeacher(server.client())
        raised: list[Exception] = []

        def ask() -> None:
            try:
                teacher(rows_of(2))
            except Exception as error:
                raised.append(error)

        thread = threading.Thread(target=ask)
        thread.start()
        server.shutdown(timeout=0.2)  # the first row is with the teacher
        expert.go.set()
        thread.join(60)
        assert isinstance(raised[0], TeacherUnavailable)
        assert "shutting down" in str(raised[0])

    def test_masks_until_it_is_back(self, start) -> None:
        server = start(TowardsTheOrigin())
        factory = functools.partial(
            InferenceTeacher, server.client(), timeout=0.1, on_error="mask"
        )
        label = TeacherActionTransform(teacher_factory=factory)
        env = TransformedEnv(ReachEnv(4), label)
        td = env.reset()
        assert td["teacher_mask"].all()
        server.shutdown()
        td = env.step(env.rand_action(td))["next"]
        assert not td["teacher_mask"].any() and not td["teacher_action"].any()
        assert label.stats()["non_finite"] == 4
        server.start()
        for _ in range(500):  # until what was asked in vain has been answered
            td = env.step(env.rand_action(env.reset()))["next"]
            if td["teacher_mask"].any():
                break
        assert td["teacher_mask"].all()
        assert torch.equal(td["teacher_action"], label_of(td["observation"]))

    def test_the_shape_of_masked_rows(self) -> None:
        server = InferenceServer(ServableTeacher(TowardsTheOrigin))  # never started
        kwargs: dict[str, Any] = {"timeout": 0.01, "on_error": "mask"}
        with pytest.raises(TeacherUnavailable, match="action_dim="):
            InferenceTeacher(server.client(), **kwargs)(rows_of(2))
        teacher = InferenceTeacher(server.client(), action_dim=7, **kwargs)
        out = teacher(rows_of(2))
        assert out[CHUNK].shape == (2, 1, 7) and out[CHUNK].isnan().all()
        assert out["teacher_std"].shape == (2, 7) and out["teacher_std"].isnan().all()

    def test_a_late_answer_is_not_taken_for_another(self, start) -> None:
        expert = Held()
        teacher = InferenceTeacher(start(expert).client(), timeout=0.5)
        with pytest.raises(TeacherUnavailable, match=r"within 0.5 s"):
            teacher(rows_of(2))
        began = time.monotonic()
        with pytest.raises(TeacherUnavailable, match=r"2 rows of an earlier question"):
            teacher(rows_of(2))
        assert time.monotonic() - began < 0.4  # at once
        expert.go.set()
        deadline = time.monotonic() + 60
        while time.monotonic() < deadline:
            try:
                assert_answers(teacher, rows_of(3))
                break
            except TeacherUnavailable:
                continue
        assert_answers(teacher, rows_of(2))

    def test_what_is_lost_is_not_awaited_for_good(self, start) -> None:
        expert = Held()
        teacher = InferenceTeacher(start(expert).client(), timeout=0.2)
        with pytest.raises(TeacherUnavailable):
            teacher(rows_of(2))
        time.sleep(0.25)
        with pytest.raises(TeacherUnavailable, match="within"):  # it was asked again
            teacher(rows_of(2))
        expert.go.set()


@pytest.mark.parametrize("on_error", ["raise", "mask"])
def test_an_error_of_the_teacher_is_no_absence(start, on_error) -> None:
    server = start(TowardsTheOrigin())
    teacher = InferenceTeacher(server.client(), on_error=on_error, action_dim=2)
    rows = TensorDict({"something": torch.zeros(2, 1)}, [2])
    with pytest.raises(KeyError, match="observation"):
        teacher(rows)
    assert_answers(teacher, rows_of(2))  # the server lives on


def test_what_is_refused() -> None:
    with pytest.raises(ValueError, match="timeout"):
        InferenceTeacher(None, timeout=0.0)
    with pytest.raises(ValueError, match="on_error"):
        InferenceTeacher(None, on_error="ignore")  # type: ignore[arg-type]
    with pytest.raises(TypeError, match="TensorDict module, got dict"):
        ServableTeacher(dict)
    with pytest.raises(KeyError, match=r"function wrote no .*chunk"):
        ServableTeacher(lambda: lambda td: td["observation"])(rows_of(2))
    with (
        InferenceServer(lambda td: td) as server,
        pytest.raises(KeyError, match="Serve ServableTeacher"),
    ):
        InferenceTeacher(server.client())(rows_of(2))


def test_a_module_is_frozen() -> None:
    module = torch.nn.Linear(2, 2).train()
    ServableTeacher(lambda: module)
    assert not module.training and not module.weight.requires_grad


def _call(factory: Callable[[], Any], pipe: Any) -> None:
    try:
        factory()
        pipe.send("made")
    except RuntimeError as error:
        pipe.send(str(error))


def test_one_client_serves_one_process(start) -> None:
    server = start(TowardsTheOrigin(), MPTransport())
    mine, yours = InferenceTeacher.factories(server, 2, timeout=5.0)
    assert mine()._client is mine()._client is not yours._client
    context = torch.multiprocessing.get_context("fork")
    said = []
    for factory in (mine, yours):
        here, there = context.Pipe()
        process = context.Process(target=_call, args=(factory, there))
        process.start()
        assert here.poll(60)
        said.append(here.recv())
        process.join()
    assert "Two processes use the same client" in said[0]
    assert said[1] == "made"


def test_a_server_in_a_process_that_is_killed() -> None:
    server = ProcessInferenceServer(
        policy_factory=functools.partial(ServableTeacher, TowardsTheOrigin),
        transport=MPTransport(),
        max_batch_size=8,
        policy_version_key=None,
    ).start()
    try:
        teacher = InferenceTeacher(server.client(), timeout=60.0)
        rows = rows_of(4)
        assert_answers(teacher, rows)
        assert not rows["observation"].is_shared()
        assert server.stats()["requests"] == 4
        pid = server.health()["pid"]
        assert isinstance(pid, int)
        os.kill(pid, signal.SIGKILL)
        began = time.monotonic()
        with pytest.raises(TeacherUnavailable, match="MailboxPeerClosedError"):
            teacher(rows_of(4))
        assert time.monotonic() - began < 30  # long before the timeout
    finally:
        server.shutdown()


def test_the_teacher_of_a_ray_actor_without_ray() -> None:
    """The actor as an object, and the client as far as it goes without a cluster."""
    actor = TeacherActor(TowardsTheOrigin, max_batch_size=2)
    try:
        rows = rows_of(3)
        answer = actor.ask(rows)
        assert set(answer.keys(True, True)) == {CHUNK}
        assert torch.equal(answer[CHUNK][:, 0], label_of(rows["observation"]))
        assert set(rows.keys()) == {"observation"}
        assert actor.stats()["requests"] == 3
    finally:
        actor.shutdown()
    assert RayTeacher(None, in_keys=[("a", "b")]).in_keys == [("a", "b")]


if __name__ == "__main__":
    pytest.main([__file__])
