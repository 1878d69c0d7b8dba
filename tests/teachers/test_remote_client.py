# Copyright (c) the torchrl_rpd authors.
#
# This source code is licensed under the MIT license found in the
# LICENSE file in the root directory of this source tree.
"""RemoteTeacher: a teacher like any other, and what it does when the server is not."""

from __future__ import annotations

import copy
import functools
import multiprocessing
import os
import pickle
import re
import signal
import threading
import time
import warnings
from collections.abc import Callable, Iterator
from typing import Any

import numpy as np
import pytest
import torch
from remote_servers import (
    CLOSE,
    HANG,
    METADATA,
    FakeServer,
    back,
    free_port,
    pack,
    server_process,
)
from tensordict import NonTensorStack, TensorDict
from torchrl.envs import ParallelEnv, TransformedEnv
from toy_envs import ReachEnv
from toy_image_envs import SpotEnv

from torchrl_rpd.teachers import RemoteTeacher, check_teacher
from torchrl_rpd.teachers.remote import (
    TeacherError,
    TeacherMismatch,
    TeacherServer,
    TeacherUnavailable,
)
from torchrl_rpd.teachers.remote._connection import Connection
from torchrl_rpd.teachers.remote._requests import arrange
from torchrl_rpd.transforms import TeacherActionTransform

IMAGE = ("observation", "image")
PLAIN: dict = {}  # the metadata of a plain OpenPI server
# A server that answers has all the time that a busy machine may need, one that does not
# is given up soon.
PATIENT, SOON = 60.0, 0.5


def connect(server: FakeServer | str, **kwargs: Any) -> RemoteTeacher:
    address = server if isinstance(server, str) else server.address
    options: dict[str, Any] = {"timeout": PATIENT, "backoff": 0.01, "cooldown": 1000.0}
    return RemoteTeacher(address, **{**options, **kwargs})


@pytest.fixture
def serve() -> Iterator[Callable[..., FakeServer]]:
    servers: list[FakeServer] = []

    def start(*args: Any, **kwargs: Any) -> FakeServer:
        servers.append(FakeServer(*args, **kwargs))
        return servers[-1]

    yield start
    for server in servers:
        server.stop()


def frames(*batch: int) -> TensorDict:
    return TensorDict({"observation": torch.randn(*batch, 2)}, batch)


def expected(td: TensorDict) -> torch.Tensor:
    """What ``remote_servers.back`` answers: entry h is minus the observation / (h+1)."""
    steps = torch.arange(1.0, 4.0).unsqueeze(-1)
    return -td["observation"].unsqueeze(-2) / steps


def chunk_of(teacher: RemoteTeacher, td: TensorDict) -> torch.Tensor:
    return teacher(td.copy())["vla_action", "chunk"]


def rest_is_over(teacher: RemoteTeacher) -> None:
    """As if the cool-down had passed."""
    teacher._channel._rest_until = 0.0


# ---------------------------------------------------------------------- a good server
def test_a_teacher_like_any_other_in_an_env(serve):
    server = serve()
    teacher = connect(server)
    label = TeacherActionTransform(teacher)
    out = TransformedEnv(ReachEnv(3), label).rollout(10, break_when_any_done=False)
    assert out["teacher_mask"].all()
    want = (-out["observation"]).clamp(-1, 1)
    torch.testing.assert_close(out["teacher_action"], want)
    # One message per reset or step with all rows that are not done: 11 questions (the
    # root and 10 steps) and one more at the reset after step 8, when nobody is asked
    # about the terminal observations.
    assert [len(r["observation"]) for r in server.requests] == [3] * 11
    assert label.stats()["queries"] == 33 and label.stats()["labelled"] == 33
    stats = teacher.stats()
    assert stats["rows"] == 33 and stats["requests"] == 11
    assert stats["connections"] == 1 and stats["failed_rows"] == 0


def test_any_batch_shape_and_what_is_sent(serve):
    server = serve()
    with connect(server) as teacher:
        assert teacher.in_keys == ["observation"]
        assert teacher.out_keys == [("vla_action", "chunk")]
        assert (teacher.action_dim, teacher.chunk_size) == (2, 3)
        assert teacher.history_window == 1 and teacher.history_keys == []
        for batch in ((), (1,), (4,), (2, 3)):
            td = frames(*batch)
            chunk = chunk_of(teacher, td)
            assert chunk.shape == (*batch, 3, 2) and chunk.dtype == torch.float32
            torch.testing.assert_close(chunk, expected(td))
        assert not list(teacher.parameters()) and not teacher.state_dict()
        assert "fake" in repr(teacher)
    request = server.requests[-1]
    assert request["batch"] == 6 and request["observation"].shape == (6, 2)
    assert len({r["request_id"] for r in server.requests}) == 4


def test_spread_is_written_where_the_server_sends_one(serve):
    def answer(request):
        rows = len(request["observation"])
        return {**back(request), "std": np.full((rows, 2), 0.5, np.float64)}

    server = serve(answer, {**METADATA, "writes_std": True})
    teacher = connect(server)
    assert teacher.out_keys == [("vla_action", "chunk"), "teacher_std"]
    label = TeacherActionTransform(teacher, teacher_std_key="teacher_std")
    out = label(frames(4))
    assert torch.equal(out["teacher_std"], torch.full((4, 2), 0.5))
    # one of every action of the chunk, as examples/servers/octo_jax_server.py sends it
    server.answer = lambda r: {**back(r), "std": np.abs(back(r)["actions"])}
    td = frames(4)
    torch.testing.assert_close(label(td)["teacher_std"], td["observation"].abs())
    # none where no answer came
    teacher = connect(server, on_error="mask", retries=0)
    label = TeacherActionTransform(teacher, teacher_std_key="teacher_std")
    server.answer = lambda request: CLOSE
    out = label(td)
    assert not out["teacher_mask"].any() and not out["teacher_std"].any()


@pytest.mark.parametrize(
    ("limits", "sizes"),
    [
        ({"max_batch": 4}, [4, 4, 2]),
        # 8 bytes per row and 5 for no instruction; 4096 are kept for names and the like:
        # (4096 + 40) - 4096 = 40 bytes, 3 rows of 13
        ({"max_message_bytes": 4096 + 40}, [3, 3, 3, 1]),
    ],
    ids=["rows", "bytes"],
)
def test_limits_of_the_server_split_a_question(serve, limits, sizes):
    server = serve(metadata={**METADATA, **limits})
    td = frames(10)
    torch.testing.assert_close(chunk_of(connect(server), td), expected(td))
    assert [len(r["observation"]) for r in server.requests] == sizes


def test_a_row_that_is_too_large_for_the_server(serve):
    server = serve(metadata={**METADATA, "max_message_bytes": 4100})
    with pytest.raises(
        TeacherMismatch, match=r"One row is a message of 4109 bytes.*4100"
    ):
        connect(server)(frames(2))


def test_plain_openpi_servers_get_one_row_per_message_pipelined_and_in_order(serve):
    ahead = []

    def session(connection):
        # Nothing is answered before three requests are here, and no fourth comes.
        waiting = [connection.recv(timeout=30) for _ in range(3)]
        with pytest.raises(TimeoutError):
            connection.recv(timeout=0.2)
        ahead.append(len(waiting))
        while waiting:
            request = server_read(waiting.pop(0))
            requests.append(request)
            connection.send(pack({**back(request), "server_timing": {"infer_ms": 1.0}}))
            if len(requests) + len(waiting) < 7:
                waiting.append(connection.recv(timeout=30))

    requests: list[dict] = []
    server = serve(metadata=PLAIN, session=session)
    teacher = connect(server, in_keys=["observation"], instruction="push", pipeline=3)
    assert (teacher.action_dim, teacher.chunk_size) == (None, None)
    td = frames(7)
    torch.testing.assert_close(chunk_of(teacher, td), expected(td))
    assert ahead == [3] and len(requests) == 7
    # only what OpenPI knows, without a batch dimension
    assert set(requests[0]) == {"observation", "prompt"}
    assert requests[0]["observation"].shape == (2,) and requests[0]["prompt"] == "push"
    assert (teacher.action_dim, teacher.chunk_size) == (2, 3)


def server_read(message: bytes) -> dict:
    from remote_servers import unpack

    return unpack(message)


# ---------------------------------------------------------------------- what is sent
def zeros(request: dict) -> dict:
    rows = next(len(v) for v in request.values() if isinstance(v, np.ndarray))
    return {"actions": np.zeros((rows, 3, 2), np.float32)}


def test_images_go_in_the_layout_that_needs_no_copy(serve):
    keys = ["observation/image", "prompt"]
    both = {**METADATA, "image_layouts": ["HWC", "CHW"], "request_keys": keys}
    server = serve(zeros, both)
    teacher = connect(server)
    assert teacher.in_keys == [IMAGE, "language_instruction"]
    image = torch.randint(256, (2, 3, 8, 9), dtype=torch.uint8)
    td = TensorDict({IMAGE: image}, [2])
    td["language_instruction"] = NonTensorStack("push", "pull")
    teacher(td)
    request = server.requests[-1]
    assert request["image_layout"] == "CHW" and request["prompt"] == ["push", "pull"]
    assert np.array_equal(request["observation/image"], image.numpy())
    # the same picture, with its channels last in memory
    channels_last = image.movedim(1, -1).contiguous().movedim(-1, 1)
    td[IMAGE], td["language_instruction"] = (
        channels_last,
        NonTensorStack("lift", "lift"),
    )
    teacher(td)
    request = server.requests[-1]
    assert "image_layout" not in request and request["prompt"] == "lift"
    assert np.array_equal(request["observation/image"], image.movedim(1, -1).numpy())


@pytest.mark.parametrize("layouts", [("HWC",), ("HWC", "CHW")], ids=str)
@pytest.mark.parametrize("last", [False, True], ids=["CHW memory", "HWC memory"])
def test_arrays_share_memory_where_they_can(layouts, last):
    image = torch.randint(256, (4, 2, 3, 8, 9), dtype=torch.uint8)
    if last:
        image = image.movedim(-3, -1).contiguous().movedim(-1, -3)
    state = torch.randn(4, 5)
    arrays, layout = arrange({"i": image, "s": state}, {"i"}, layouts)
    assert layout == ("CHW" if "CHW" in layouts and not last else "HWC")
    want = image if layout == "CHW" else image.movedim(-3, -1)
    assert np.array_equal(arrays["i"], want.numpy()) and arrays["i"].flags.c_contiguous
    shared = np.shares_memory(arrays["i"], image.numpy())
    assert shared == (last or "CHW" in layouts)
    assert np.shares_memory(arrays["s"], state.numpy())


def test_other_names_and_dtypes(serve):
    server = serve(zeros, {**PLAIN, "batch": True, "action_dim": 2})
    names = {"arm": "observation/joint_position", IMAGE: "observation/exterior_image"}
    teacher = connect(server, in_keys={**names, "task": "prompt"})
    assert teacher.in_keys == ["arm", IMAGE, "task"]
    td = TensorDict({"arm": torch.ones(2, 7, dtype=torch.bfloat16)}, [2])
    td[IMAGE] = torch.zeros(2, 3, 4, 4, dtype=torch.uint8)
    td["task"] = NonTensorStack("a", "b")
    teacher(td)
    sent = server.requests[-1]
    assert set(sent) == {*names.values(), "prompt"} and sent["prompt"] == ["a", "b"]
    assert sent["observation/joint_position"].dtype == np.float32
    assert sent["observation/exterior_image"].shape == (2, 4, 4, 3)
    with pytest.raises(KeyError, match="arm"):
        teacher(td.exclude("arm"))


def test_history_is_shown_in_windows(serve):
    def answer(request):
        assert request["timestep_pad_mask"].dtype == bool
        window = request["observation/image"]  # [B, 2, H, W, 3]
        actions = window.mean((2, 3, 4), dtype=np.float32)  # older, newer
        return {"actions": np.repeat(actions[:, None], 3, 1)}

    keys = ["observation/image", "timestep_pad_mask"]
    history = {"history_window": 2, "history_keys": ["observation/image"]}
    server = serve(answer, {**METADATA, "request_keys": keys, **history})
    teacher = connect(server)
    assert teacher.in_keys == teacher.history_keys == [IMAGE]
    label = TeacherActionTransform(teacher, clip_labels=False)
    out = TransformedEnv(SpotEnv(1, size=8), label).rollout(3)
    mean = out[IMAGE].float().mean((-1, -2, -3))  # [1, 3]
    older = torch.cat([mean[:, :1], mean[:, :-1]], 1)
    want = torch.stack([older, mean], -1)
    torch.testing.assert_close(out["teacher_action"], want)
    assert server.requests[0]["timestep_pad_mask"].tolist() == [[False, True]]
    assert server.requests[1]["timestep_pad_mask"].all()


# ---------------------------------------------------------------------- the handshake
@pytest.mark.parametrize(
    ("said", "asked", "match"),
    [
        ({"protocol": "torchrl_rpd/9"}, {}, "torchrl_rpd/9.*torchrl_rpd/1"),
        ({}, {"action_dim": 7}, "action_dim=7 .*says 2"),
        ({}, {"chunk_size": 8}, "chunk_size=8 .*says 3"),
        ({}, {"action_convention": "inches"}, "'inches'.*says 'metres'"),
        ({}, {"model": "octo"}, "'octo'.*says 'fake'"),
        ({"model": None}, {"model": "octo"}, "'octo'.*does not say"),
        ({}, {"in_keys": ["other"]}, r"reads \['observation'\].*\['other'\]"),
        ({}, {"instruction": "push"}, r"instruction.*only \['observation'\]"),
        ({"action_dim": "two"}, {}, "action_dim='two'"),
    ],
    ids=lambda value: str(value)[:30],
)
def test_every_mismatch_is_named_before_anything_is_asked(serve, said, asked, match):
    server = serve(metadata={**METADATA, **said})
    with pytest.raises(TeacherMismatch, match=match):
        connect(server, **asked)
    assert not server.requests


@pytest.mark.parametrize("first", ["hello", b"\xc1", pack([1, 2])], ids=str)
def test_servers_of_something_else(serve, first):
    with pytest.raises(TeacherMismatch, match=r"says first|no metadata|in a map"):
        connect(serve(first=first))


def test_what_was_asked_for_and_is_said(serve):
    asked = {"action_dim": 2, "chunk_size": 3, "model": "fake"}
    connect(serve(), action_convention="metres", **asked).close()


def test_bad_options():
    for address in ("localhost:80", "http://localhost:80", "ws://"):
        with pytest.raises(ValueError, match="ws://host:port"):
            RemoteTeacher(address)
    for name in ("timeout", "retries", "backoff", "pipeline"):
        with pytest.raises(ValueError, match=name):
            RemoteTeacher("ws://localhost:80", **{name: -1})
    with pytest.raises(ValueError, match="on_error"):
        RemoteTeacher("ws://localhost:80", on_error="zero")


def test_the_token(serve):
    server = serve(token="sesame")
    teacher, td = connect(server, token="sesame"), frames(2)
    torch.testing.assert_close(chunk_of(teacher, td), expected(td))
    assert "sesame" not in repr(teacher) + repr(teacher._channel)
    for token, match in (("other", "refuses the token"), (None, "without token=")):
        # ("1 attempt": not asked again)
        with pytest.raises(TeacherUnavailable, match=f"after 1 attempt .*{match}.*401"):
            connect(server, token=token)


def test_nobody_is_there():
    port = free_port()
    match = f"ws://127.0.0.1:{port} after 3 attempts .*Connection"
    with pytest.raises(TeacherUnavailable, match=match) as caught:
        connect(f"ws://127.0.0.1:{port}", retries=2)
    assert isinstance(caught.value.__cause__, ConnectionRefusedError)
    with pytest.raises(TeacherUnavailable):  # also with "mask": there is no teacher yet
        connect(f"ws://127.0.0.1:{port}", retries=0, on_error="mask")


def test_a_server_that_accepts_and_says_nothing(serve):
    server = serve(first=HANG)
    with pytest.raises(TeacherUnavailable, match=r"no metadata within 1 s|timed out"):
        connect(server, connect_timeout=1.0, retries=0)


# ---------------------------------------------------------------------- in an env
def test_what_the_env_expects_is_checked_before_the_first_step(serve):
    env = ReachEnv(2)
    wide = connect(serve(metadata={**METADATA, "action_dim": 7}))
    with pytest.raises(ValueError, match=r"RemoteTeacher gives actions of 7.*has 2"):
        TransformedEnv(env, TeacherActionTransform(wide)).observation_spec  # noqa: B018
    # converted by hand: only the answer tells
    narrow = TeacherActionTransform(wide, action_transform=lambda raw: raw[:, :2])
    assert TransformedEnv(env, narrow).observation_spec is not None
    short = TeacherActionTransform(connect(serve()), replan_interval=4)
    with pytest.raises(ValueError, match=r"chunks of 3.*replan_interval=4"):
        TransformedEnv(env, short).observation_spec  # noqa: B018

    images = {**METADATA, "request_keys": ["observation/image"], "image_size": 32}
    server = serve(zeros, images)
    label = TeacherActionTransform(connect(server))
    with pytest.raises(TeacherMismatch, match=r"36 x 36.*takes 32 x 32"):
        TransformedEnv(SpotEnv(2), label).observation_spec  # noqa: B018
    assert (
        TransformedEnv(SpotEnv(2, size=32), label.clone()).reset()["teacher_mask"].all()
    )
    # a camera that the env does not have
    server = serve(zeros, {**METADATA, "request_keys": ["observation/wrist_image"]})
    with pytest.raises(KeyError, match="wrist_image"):
        TransformedEnv(SpotEnv(2), TeacherActionTransform(connect(server))).reset()
    assert not server.requests


def test_masking_needs_a_transform_that_masks(serve):
    server = serve()
    build = functools.partial(connect, server, on_error="mask")
    with pytest.raises(ValueError, match=r"on_error='mask'.*on_non_finite='mask'"):
        TeacherActionTransform(build(), on_non_finite="raise")
    label = TeacherActionTransform(teacher_factory=build, on_non_finite="raise")
    with pytest.raises(ValueError, match="on_error='mask'"):  # before the first step
        TransformedEnv(ReachEnv(2), label).reset()
    TeacherActionTransform(connect(server), on_non_finite="raise")


def test_masking_needs_to_know_the_shape_of_chunks(serve):
    server = serve(metadata=PLAIN)
    build = functools.partial(
        connect, server, in_keys=["observation"], on_error="mask", action_dim=2
    )
    with pytest.raises(ValueError, match="chunk_size="):
        build()
    assert build(chunk_size=3).chunk_size == 3


def test_check_teacher_examines_it(serve):
    inside = frames(8).apply(torch.tanh)
    report = check_teacher(
        connect(serve()), inside, action_spec=ReachEnv(8).action_spec
    )
    assert report.passed


# ---------------------------------------------------------------------- faults
def fault(kind: str) -> Callable[[dict], Any]:
    """An answer that is wrong; rows 0 of a batch have something to lose."""

    def answer(request: dict) -> Any:
        good = back(request)["actions"]
        return {
            "hung": HANG,
            "killed": CLOSE,
            "text": "TeacherError: out of memory",
            "traceback": "Traceback (most recent call last):\nValueError: shape",
            "garbage": b"\xc1\xc1",
            "not a map": pack([1]),
            "no actions": {"std": good[:, 0]},
            "too few rows": {"actions": good[:-1]},
            "too wide": {"actions": np.concatenate([good, good], -1)},
            "short chunk": {"actions": good[:, :2]},
            "no chunk": {"actions": good[:, 0]},
            "integers": {"actions": good.astype(np.int64)},
            "list": {"actions": good.tolist()},
            "another's": {"actions": good, "request_id": 999},
            "std": {"actions": good, "std": good[:, 0, :1]},
        }[kind]

    return answer


GONE = ("hung", "killed")
WRONG = (
    *("text", "traceback", "garbage", "not a map", "no actions", "too few rows"),
    *("too wide", "short chunk", "no chunk", "integers", "list", "another's", "std"),
)


@pytest.mark.parametrize("kind", [*GONE, *WRONG])
def test_faults_raise_by_name_and_the_next_question_has_its_own_answer(serve, kind):
    server = serve(fault(kind))
    teacher = connect(server, timeout=SOON if kind == "hung" else PATIENT, retries=1)
    label = TeacherActionTransform(teacher)
    error = TeacherUnavailable if kind in GONE else TeacherError
    with pytest.raises(error) as caught:
        label(frames(3))
    if kind in GONE:
        assert server.address in str(caught.value) and "2 attempts" in str(caught.value)
        assert len(server.requests) == 2
        assert ("within 0.5 s" in str(caught.value)) == (kind == "hung")
        assert caught.value.__cause__ is not None
    else:
        assert len(server.requests) == 1  # not repeated
    server.answer = back
    teacher._channel.timeout = PATIENT
    td = frames(3)
    torch.testing.assert_close(chunk_of(teacher, td), expected(td))


@pytest.mark.parametrize("kind", [*GONE, "text", "too few rows"])
@pytest.mark.parametrize("interval", [1, 3])
def test_faults_are_masked_and_counted_and_the_run_goes_on(serve, kind, interval):
    server = serve()
    timeout = SOON if kind == "hung" else PATIENT
    teacher = connect(server, on_error="mask", timeout=PATIENT, retries=0)
    label = TeacherActionTransform(teacher, replan_interval=interval)
    env = TransformedEnv(ReachEnv(2), label)
    state = env.reset()
    assert state["teacher_mask"].all() and state["teacher_action"].any()

    def step(state: TensorDict) -> TensorDict:
        state = state.set("action", torch.zeros(2, 2))
        return env.step(state)["next"].exclude("reward")

    # Steps 1 to 3 without a teacher: with an interval of 3 the chunk of the root is
    # followed in steps 1 and 2, and is over at step 3.
    server.answer = fault(kind)
    teacher._channel.timeout = timeout
    teacher.close()
    masks = []
    for _ in range(3):
        state = step(state)
        masks.append(bool(state["teacher_mask"].any()))
        if not masks[-1]:  # neither an old label nor any other
            assert not state["teacher_action"].any()
        rest_is_over(teacher)
    assert masks == ([False] * 3 if interval == 1 else [True, True, False])
    # Step 4: it is back, and asked at once, not when a chunk of NaN is over.
    server.answer = back
    teacher._channel.timeout = PATIENT
    state = step(state)
    assert state["teacher_mask"].all()
    want = -state["observation"].clamp(-1, 1)
    torch.testing.assert_close(state["teacher_action"], want)
    failed = 6 if interval == 1 else 2
    stats = label.stats()
    assert (stats["frames"], stats["labelled"]) == (10, 10 - failed)
    assert stats["non_finite"] == failed == teacher.stats()["failed_rows"]
    assert teacher.stats()["failed_requests"] == failed // 2


def test_rows_of_nan_are_masked_one_by_one(serve):
    def answer(request):
        actions = back(request)["actions"]
        actions[1, 0, 1] = np.nan
        return {"actions": actions}

    td = frames(3)
    label = TeacherActionTransform(connect(serve(answer)), clip_labels=False)
    out = label(td)
    assert out["teacher_mask"].squeeze(-1).tolist() == [True, False, True]
    assert not out["teacher_action"][1].any()
    torch.testing.assert_close(out["teacher_action"][0], -td["observation"][0])
    assert label.stats()["non_finite"] == 1
    with pytest.raises(ValueError, match="not finite in 1 of 3 rows"):
        TeacherActionTransform(connect(serve(answer)), on_non_finite="raise")(td)


def test_a_broken_chunk_is_not_followed(serve):
    def answer(request):
        actions = back(request)["actions"]
        actions[0, 1:] = np.nan  # env 0: a good label, and no plan
        return {"actions": actions}

    server = serve(answer)
    label = TeacherActionTransform(connect(server), replan_interval=3)
    env = TransformedEnv(ReachEnv(2), label)
    out = env.rollout(3)
    assert out["teacher_mask"].all()
    # env 0 is asked about at every step, env 1 at steps 0 and 3
    assert [len(r["observation"]) for r in server.requests] == [2, 1, 1, 2]
    want = -out["observation"][0].clamp(-1, 1)
    torch.testing.assert_close(out["teacher_action"][0], want)
    # and so it is after a restart of the run
    state = label._labeller.state()
    again = TeacherActionTransform(connect(server), replan_interval=3)
    again._labeller.load(state)
    cache = again._labeller._cache
    cache.load(state["chunks"])
    assert cache.advance(torch.arange(2), 2).tolist() == [0]


def test_a_bad_request_raises_in_any_case(serve):
    server = serve(lambda request: "BadRequest: observation: expected [B, 3]")
    with pytest.raises(TeacherError, match=r"does not take.*expected \[B, 3\]"):
        connect(server, on_error="mask")(frames(2))


def test_rows_of_a_plain_server_fail_one_by_one(serve):
    """It sends a traceback and closes; what was sent ahead is asked again."""
    asked = []

    def session(connection):
        for message in connection:
            request = server_read(message)
            asked.append(request["observation"][0])
            if request["observation"][0] > 0:
                connection.send("Traceback (most recent call last): ...")
                connection.close(1011)
                return
            connection.send(pack(back(request)))

    server = serve(metadata=PLAIN, session=session)
    shape = {"action_dim": 2, "chunk_size": 3, "in_keys": ["observation"]}
    teacher = connect(server, on_error="mask", **shape)
    observation = torch.tensor([[-1.0, 0], [2.0, 0], [-3.0, 0], [4.0, 0], [5.0, 0]])
    td = TensorDict({"observation": observation}, [5])
    out = TeacherActionTransform(teacher, clip_labels=False)(td)
    good = torch.tensor([True, False, True, False, False])
    assert torch.equal(out["teacher_mask"].squeeze(-1), good)
    assert torch.equal(out["teacher_action"][good], -observation[good])
    assert teacher.stats()["failed_rows"] == 3
    with pytest.raises(TeacherError, match="Traceback"):
        connect(server, **shape)(td)


def test_an_answer_that_comes_late_is_never_taken_for_another(serve):
    late = threading.Event()

    def session(connection):
        for message in connection:
            request = server_read(message)
            if len(server.connections) == 1:
                late.wait(30)  # the first one is answered when nobody waits any more
            answer = back(request)
            answer["request_id"] = request["request_id"]
            connection.send(pack(answer))

    server = serve(session=session)
    teacher = connect(server, timeout=SOON, retries=0)
    with pytest.raises(
        TeacherUnavailable, match=r"TimeoutError: no answer within 0.5 s"
    ):
        teacher(frames(2))
    late.set()
    teacher._channel.timeout = PATIENT
    for _ in range(3):
        td = frames(2)
        torch.testing.assert_close(chunk_of(teacher, td), expected(td))
    assert teacher.stats()["connections"] == 2


def test_an_interrupt_leaves_no_answer_behind(serve, monkeypatch):
    teacher = connect(serve())

    def interrupted(*args):
        raise KeyboardInterrupt

    with monkeypatch.context() as patch:
        patch.setattr(Connection, "_receive", interrupted)
        with pytest.raises(KeyboardInterrupt):
            teacher(frames(2))
    td = frames(2)
    torch.testing.assert_close(chunk_of(teacher, td), expected(td))


def test_slow_is_not_gone(serve):
    def answer(request):
        time.sleep(0.7)
        return back(request)

    td = frames(2)
    teacher = connect(serve(answer), timeout=PATIENT, retries=0)
    torch.testing.assert_close(chunk_of(teacher, td), expected(td))


def test_a_server_that_does_not_read_is_given_up(serve):
    stuck = threading.Event()
    server = serve(session=lambda connection: stuck.wait(30))
    server_side = server.connections
    teacher = connect(server, timeout=SOON, retries=0)
    server_side[0].socket.setsockopt(1, 8, 4096)  # SO_RCVBUF
    try:
        # 64 MB fit into no buffer on the way
        td = TensorDict({"observation": torch.zeros(2, 8_000_000)}, [2])
        with pytest.raises(TeacherUnavailable):
            teacher(td)
    finally:
        stuck.set()


def test_a_server_that_is_gone_is_left_alone_for_a_while(serve):
    server = serve()
    teacher = connect(server, on_error="mask", retries=2)
    label = TeacherActionTransform(teacher)
    assert label(frames(2))["teacher_mask"].all()
    server.answer = fault("killed")
    assert not label(frames(2))["teacher_mask"].any()
    # the connection of before, and two retries of which each made another
    assert len(server.connections) == 3 and teacher.stats()["retries"] == 2
    for _ in range(20):  # cool-down: nobody is asked
        assert not label(frames(2))["teacher_mask"].any()
    assert len(server.connections) == 3
    rest_is_over(teacher)
    assert not label(frames(2))["teacher_mask"].any()
    assert len(server.connections) == 4  # one attempt, no retries
    server.answer = back
    assert not label(frames(2))["teacher_mask"].any()  # still resting
    rest_is_over(teacher)
    assert label(frames(2))["teacher_mask"].all()
    assert teacher.stats()["failed_rows"] == 2 * 23 == label.stats()["non_finite"]
    # and with all retries again from here on
    server.answer = fault("killed")
    label(frames(2))
    assert teacher.stats()["retries"] == 4


def test_a_cooldown_is_as_long_as_the_failure_took(serve):
    server = serve(fault("hung"))
    teacher = connect(
        server,
        on_error="mask",
        cooldown=0.0,
        timeout=SOON,
        retries=0,
        connect_timeout=9,
    )
    started = time.monotonic()
    teacher(frames(1))
    took = time.monotonic() - started
    assert took >= SOON
    assert teacher._channel._rest_until >= started + 2 * SOON


@pytest.mark.parametrize("on_error", ["raise", "mask"])
def test_a_killed_process_and_its_successor(on_error):
    port = free_port()
    address = f"ws://127.0.0.1:{port}"
    label: TeacherActionTransform
    with server_process(port, "hang") as process:
        teacher = connect(address, on_error=on_error, retries=1)
        label = TeacherActionTransform(teacher)

        def kill():
            assert process.stdout.readline() == "asked\n"  # in the middle of a request
            os.kill(process.pid, signal.SIGKILL)

        killer = threading.Thread(target=kill)
        killer.start()
        if on_error == "raise":
            with pytest.raises(TeacherUnavailable, match=f"{port} after 2 attempts"):
                label(frames(3))
        else:
            assert not label(frames(3))["teacher_mask"].any()
        killer.join()
    with server_process(port):
        rest_is_over(teacher)
        td = frames(3)
        out = label(td)
        assert out["teacher_mask"].all()
        torch.testing.assert_close(chunk_of(teacher, td), expected(td))
    teacher.close()


def test_a_restart_between_two_questions_is_not_noticed(serve):
    server = serve()
    teacher = connect(server, retries=1)
    teacher(frames(2))
    server.stop()
    said = {**METADATA, "server": "fake 2", "max_batch": 2}
    serve(metadata=said, port=server.port)
    td = frames(3)
    torch.testing.assert_close(chunk_of(teacher, td), expected(td))
    assert teacher.stats()["connections"] == 2 and teacher.info.server == "fake 2"


@pytest.mark.parametrize("on_error", ["raise", "mask"])
def test_another_teacher_at_the_same_address_is_refused(serve, on_error):
    server = serve()
    teacher = connect(server, on_error=on_error)
    teacher(frames(2))
    server.stop()
    serve(metadata={**METADATA, "model": "other"}, port=server.port)
    for _ in range(2):
        with pytest.raises(TeacherMismatch, match=r"model: 'fake' before, 'other' now"):
            teacher(frames(2))


# ---------------------------------------------------------------------- many of them
class Back:
    """``back``, as a teacher for our own server."""

    in_keys = ("observation",)
    action_dim, chunk_size = 2, 3

    def __call__(self, td: TensorDict) -> TensorDict:
        return TensorDict({"vla_action": {"chunk": expected(td)}}, td.batch_size)


def test_our_own_server_and_many_clients_at_once():
    server = TeacherServer(Back(), port=0, max_batch=8, max_wait=0.001)
    wrong = []
    with server.running():
        shared = connect(server.address)

        def ask(teacher: RemoteTeacher, rows: int) -> None:
            for _ in range(15):
                td = frames(rows)
                if not torch.equal(chunk_of(teacher, td), expected(td)):
                    wrong.append(rows)

        # two threads of one client, and three clients; 11 rows are two messages
        jobs = [
            (shared, 2),
            (shared, 3),
            *((connect(server.address), n) for n in (1, 4, 11)),
        ]
        threads = [threading.Thread(target=ask, args=job) for job in jobs]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join()
        for teacher, _ in jobs:
            teacher.close()
    assert not wrong
    assert shared.stats()["rows"] == 15 * 5 and shared.stats()["connections"] == 1


def test_our_own_server_stops_and_starts_again():
    port = free_port()
    with TeacherServer(Back(), port=port, token="t").running():
        teacher = connect(
            f"ws://127.0.0.1:{port}", token="t", on_error="mask", retries=0
        )
        td = frames(2)
        torch.testing.assert_close(chunk_of(teacher, td), expected(td))
    assert chunk_of(teacher, td).isnan().all()
    with TeacherServer(Back(), port=port, token="t").running():
        rest_is_over(teacher)
        torch.testing.assert_close(chunk_of(teacher, td), expected(td))
        teacher.close()


@pytest.mark.parametrize(
    "travel", [copy.deepcopy, lambda t: pickle.loads(pickle.dumps(t))]
)
def test_copies_have_connections_of_their_own(serve, travel):
    server = serve()
    teacher = connect(server)
    other = travel(teacher)
    assert other.in_keys == teacher.in_keys and other.info == teacher.info
    assert len(server.connections) == 1  # made when it is needed
    td = frames(2)
    torch.testing.assert_close(chunk_of(other, td), expected(td))
    teacher.close()
    torch.testing.assert_close(chunk_of(other, td), expected(td))
    assert len(server.connections) == 2 and other.stats()["connections"] == 1


def test_a_forked_process_has_its_own_connection(serve):
    server = serve()
    teacher = connect(server)
    td = frames(2)
    chunk_of(teacher, td)
    context = multiprocessing.get_context("fork")
    queue = context.SimpleQueue()

    def child() -> None:
        good = torch.allclose(chunk_of(teacher, td), expected(td))
        queue.put((good, dict(teacher.stats())))

    with warnings.catch_warnings():
        warnings.simplefilter("ignore", DeprecationWarning)  # threads and fork, 3.12
        process = context.Process(target=child)
        process.start()
    process.join(60)
    good, stats = queue.get()
    assert good and stats["connections"] == 1 and stats["rows"] == 2
    torch.testing.assert_close(chunk_of(teacher, td), expected(td))
    assert teacher.stats()["connections"] == 1 and len(server.connections) == 2


def make_env(address: str) -> TransformedEnv:
    factory = functools.partial(RemoteTeacher, address, timeout=PATIENT)
    return TransformedEnv(ReachEnv(2), TeacherActionTransform(teacher_factory=factory))


def test_workers_build_their_own(serve):
    server = serve()
    env = ParallelEnv(
        2, functools.partial(make_env, server.address), mp_start_method="fork"
    )
    try:
        out = env.rollout(4)
    finally:
        env.close(raise_if_closed=False)
    assert out["teacher_mask"].all()
    want = (-out["observation"]).clamp(-1, 1)
    torch.testing.assert_close(out["teacher_action"], want)
    assert len(server.connections) == 2


def test_without_the_extra(monkeypatch):
    import sys

    monkeypatch.setitem(sys.modules, "websockets.sync.client", None)
    with pytest.raises(ImportError, match=re.escape("torchrl_rpd[remote]")):
        RemoteTeacher("ws://127.0.0.1:1")


if __name__ == "__main__":
    pytest.main([__file__])
