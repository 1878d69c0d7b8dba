# Copyright (c) the torchrl_rpd authors.
#
# This source code is licensed under the MIT license found in the
# LICENSE file in the root directory of this source tree.
"""The server of remote teachers: answers, batches, refusals, and what it survives."""

from __future__ import annotations

import asyncio
import contextlib
import importlib.util
import json
import random
import socket
import threading
import time
import urllib.error
import urllib.request
from collections import Counter
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import numpy as np
import pytest
import torch
from tensordict import NonTensorStack, TensorDict
from tensordict.nn import TensorDictModule, TensorDictModuleBase

pytest.importorskip("msgpack", reason="needs the extra 'remote'")
pytest.importorskip("websockets", reason="needs the extra 'remote'")

from malformed_frames import KINDS, broken_streams, malformed_frames
from websockets.exceptions import ConnectionClosed, InvalidStatus
from websockets.sync.client import connect

from torchrl_rpd.teachers import ScriptedTeacher
from torchrl_rpd.teachers.octo import OctoTeacher, write_random_checkpoint
from torchrl_rpd.teachers.remote import (
    RemoteTeacher,
    TeacherError,
    TeacherInfo,
    TeacherServer,
    pack,
    unpack,
)
from torchrl_rpd.teachers.remote._batcher import Batcher, Busy, ShuttingDown

CHUNK = ("vla_action", "chunk")
LIMIT = 2**18  # bytes of a message
WAIT = 60.0  # seconds for what takes milliseconds: a limit, not a measurement


class Brightness(TensorDictModuleBase):
    """Answers [first pixel of each colour, length of the prompt], as a chunk of 2.

    Keeps the sizes of its batches; prompts that start with "raise" make it raise.
    ``hold`` makes it wait inside of a call until ``go``.
    """

    action_dim, chunk_size = 4, 2

    def __init__(self):
        super().__init__()
        self.in_keys = [("observation", "image"), "language_instruction"]
        self.out_keys = [CHUNK]
        self.batches: list[int] = []
        self.inside, self.go = threading.Event(), threading.Event()
        self.go.set()

    def hold(self):
        self.inside.clear()
        self.go.clear()

    def forward(self, td):
        self.inside.set()
        assert self.go.wait(WAIT)
        texts = td.get("language_instruction").tolist()
        if any(text.startswith("raise") for text in texts):
            raise (StopIteration if "stop" in texts[0] else RuntimeError)(
                "no such thing"
            )
        image = td["observation", "image"]
        assert image.shape[1] == 3  # channels first, whatever was sent
        self.batches.append(len(image))
        lengths = torch.tensor([[float(len(text))] for text in texts])
        action = torch.cat([image[:, :, 0, 0].float(), lengths], -1)
        return td.set(CHUNK, torch.stack([action, -action], 1))


class Client:
    """A bare client: it knows the protocol, not the package's own client."""

    def __init__(self, server, **kwargs):
        self.socket = connect(
            server.address, compression=None, max_size=None, close_timeout=1, **kwargs
        )
        self.socket.__enter__()
        self.metadata = unpack(self.socket.recv(WAIT))

    def send(self, request):
        self.socket.send(pack(request))

    def receive(self):
        answer = self.socket.recv(WAIT)
        return answer if isinstance(answer, str) else unpack(answer)

    def ask(self, request):
        self.send(request)
        return self.receive()

    def __enter__(self):
        return self

    def __exit__(self, *args):
        self.socket.close()


def images(rows, size=8, seed=0):
    generator = np.random.default_rng(seed)
    return generator.integers(256, size=(rows, size, size, 3), dtype=np.uint8)


def expected(image, prompt="push"):
    """What Brightness answers to images [n, H, W, 3]."""
    colours = image[:, 0, 0].astype(np.float32)
    lengths = np.full((len(image), 1), len(prompt), np.float32)
    action = np.concatenate([colours, lengths], 1)
    return np.stack([action, -action], 1)


def request(image, prompt="push", **also):
    return {"observation/image": image, "prompt": prompt, **also}


def until(condition):
    """Waits for what another thread does."""
    end = time.monotonic() + WAIT
    while not condition():
        assert time.monotonic() < end
        time.sleep(0.002)


@pytest.fixture(scope="module")
def served():
    """A server and its teacher, for tests that leave them as they were."""
    teacher = Brightness()
    server = TeacherServer(teacher, port=0, max_batch=8, max_message_bytes=LIMIT)
    with server.running():
        yield server, teacher


@pytest.fixture
def client(served):
    with Client(served[0]) as client:
        yield client


class TestAnswers:
    def test_metadata(self, client):
        info = TeacherInfo.from_metadata(client.metadata)
        assert info.protocol == "torchrl_rpd/1"
        assert info.server.startswith("torchrl_rpd ")
        assert (info.model, info.action_dim, info.action_horizon) == (
            "Brightness",
            4,
            2,
        )
        assert info.batch and info.max_batch == 8
        assert info.request_keys == ("observation/image", "prompt")
        assert info.image_layouts == ("HWC", "CHW")
        assert info.max_message_bytes == LIMIT
        assert not info.writes_std and info.deterministic is None

    def test_batch(self, client):
        image = images(3)
        answer = client.ask(request(image, request_id=7))
        assert answer["request_id"] == 7
        assert answer["actions"].dtype == np.float32
        np.testing.assert_array_equal(answer["actions"], expected(image))
        assert set(answer["server_timing"]) == {"infer_ms", "queue_ms", "batch_rows"}
        assert answer["server_timing"]["batch_rows"] == 3

    def test_one_observation_as_openpi_sends_it(self, client):
        image = images(1)
        # (what the teacher does not read is passed over: OpenPI's clients send it)
        answer = client.ask(
            request(image[0], **{"observation/state": np.zeros(8), "note": None})
        )
        np.testing.assert_array_equal(answer["actions"], expected(image)[0])
        assert "request_id" not in answer

    def test_one_row_of_a_batch_keeps_its_dimension(self, client):
        assert client.ask(request(images(1), batch=1))["actions"].shape == (1, 2, 4)

    def test_channels_first(self, client):
        image = images(3)
        first = np.ascontiguousarray(image.transpose(0, 3, 1, 2))
        answer = client.ask(request(first, image_layout="CHW"))
        np.testing.assert_array_equal(answer["actions"], expected(image))

    def test_a_prompt_for_each_row(self, client):
        answer = client.ask(request(images(2), ["a", "four"]))
        assert answer["actions"][:, 0, 3].tolist() == [1.0, 4.0]

    def test_longer_than_a_batch(self, served, client):
        image = images(19)
        served[1].batches.clear()
        answer = client.ask(request(image))
        np.testing.assert_array_equal(answer["actions"], expected(image))
        assert served[1].batches == [8, 8, 3]

    def test_several_in_flight_are_answered_in_order(self, client):
        image = images(20)
        for i in range(20):
            client.send(request(image[i], request_id=i))
            if i % 5 == 0:
                client.send({"nothing": 1})
        for i in range(20):
            answer = client.receive()
            assert answer["request_id"] == i
            np.testing.assert_array_equal(
                answer["actions"], expected(image[i : i + 1])[0]
            )
            if i % 5 == 0:
                assert client.receive().startswith("BadRequest: ")

    def test_two_clients_get_their_own_answers(self, served):
        def play(seed):
            with Client(served[0]) as client:
                for step in range(15):
                    image = images(1 + (seed + step) % 4, seed=seed * 100 + step)
                    prompt = "x" * (seed + 1)
                    actions = client.ask(request(image, prompt))["actions"]
                    np.testing.assert_array_equal(actions, expected(image, prompt))
            return True

        with ThreadPoolExecutor(3) as pool:
            assert all(pool.map(play, range(3)))

    def test_nan_passes_through(self):
        def teacher(td):
            return torch.where(td["observation"] > 0, td["observation"], torch.nan)

        server = TeacherServer(teacher, port=0)
        with server.running(), Client(server) as client:
            assert "request_keys" not in client.metadata  # it does not say
            state = np.array([[1.0, -1.0], [2.0, 3.0]], np.float64)
            actions = client.ask({"observation": state})["actions"]
        np.testing.assert_array_equal(actions, [[[1.0, np.nan]], [[2.0, 3.0]]])

    def test_standard_deviation_and_single_actions(self):
        def spread(state):
            return state + 1, torch.stack([state, state], 1) * 0.5

        teacher = TensorDictModule(
            spread, in_keys=["observation"], out_keys=["action", ("vla_action", "std")]
        )
        server = TeacherServer(teacher, port=0, action_dim=2, model="adder")
        with server.running(), Client(server) as client:
            assert client.metadata["writes_std"]
            assert client.metadata["action_horizon"] == 1
            state = np.ones((3, 2), np.float32)
            one = client.ask({"observation": state[0]})
            # the mean is [n, A], the deviation [n, 2, A]: no chunk of the same shape
            assert one.startswith("TeacherError: ValueError: ")
        teacher = TensorDictModule(
            lambda state: (state + 1, state * 0.5),
            in_keys=["observation"],
            out_keys=["action", "teacher_std"],
        )
        server = TeacherServer(teacher, port=0, action_dim=2, model="adder")
        with server.running(), Client(server) as client:
            answer = client.ask({"observation": state})
            np.testing.assert_array_equal(answer["actions"], state[:, None] + 1)
            np.testing.assert_array_equal(answer["std"], state * 0.5)
            assert client.ask({"observation": state[0]})["std"].shape == (2,)

    def test_scripted_teacher(self):
        teacher = ScriptedTeacher("PickCube-v1", cube_offset_std=0.01)
        server = TeacherServer(teacher, port=0)
        assert server.info.deterministic is True
        assert (server.info.action_dim, server.info.action_horizon) == (7, 1)
        state, seeds = torch.randn(5, 42), torch.arange(5)[:, None]
        frames = TensorDict({"observation": state, "episode_seed": seeds}, [5])
        with server.running(), Client(server) as client:
            answer = client.ask(
                {"observation": state.numpy(), "episode_seed": seeds.numpy()}
            )
            np.testing.assert_array_equal(answer["actions"], teacher(frames)[CHUNK])
            refused = client.ask({"observation": state[:, :41].numpy()})
            assert refused.startswith("BadRequest: the request lacks ['episode_seed']")

    def test_octo_with_history(self, tmp_path):
        folder = write_random_checkpoint(tmp_path)
        teacher = OctoTeacher.from_pretrained(folder, window_size=2, num_samples=2)
        server = TeacherServer(teacher, port=0)
        assert server.info.deterministic is False and server.info.writes_std
        shown = torch.randint(256, (2, 2, 3, 32, 32), dtype=torch.uint8)
        mask = torch.tensor([[False, True], [True, True]])
        frames = TensorDict({("observation", "image"): shown}, [2])
        frames["timestep_pad_mask"], frames["language_instruction"] = mask, "push"
        state = teacher.get_rng_state()
        wanted = teacher(frames)
        with server.running(), Client(server) as client:
            required = ["observation/image", "prompt", "timestep_pad_mask"]
            assert client.metadata["request_keys"] == required
            assert client.metadata["history_window"] == 2
            for layout, axes in (("CHW", (0, 1, 2, 3, 4)), ("HWC", (0, 1, 3, 4, 2))):
                teacher.set_rng_state(state)
                image = np.ascontiguousarray(shown.numpy().transpose(axes))
                asked = request(
                    image, image_layout=layout, timestep_pad_mask=mask.numpy()
                )
                answer = client.ask(asked)
                np.testing.assert_allclose(answer["actions"], wanted[CHUNK], atol=1e-5)
                np.testing.assert_allclose(
                    answer["std"], wanted["teacher_std"], atol=1e-5
                )
            # one row of two time steps has four dimensions, as a batch of images has
            teacher.set_rng_state(state)
            one = client.ask(request(image[0], timestep_pad_mask=mask.numpy()[0]))
            assert one["actions"].shape == (4, 7)


class TestBatches:
    def test_clients_share_a_batch(self):
        teacher = Brightness()
        server = TeacherServer(teacher, port=0, max_batch=8, max_wait=WAIT)
        with server.running(), contextlib.ExitStack() as stack:
            clients = [stack.enter_context(Client(server)) for _ in range(3)]
            teacher.hold()
            clients[0].send(request(images(8, seed=9)))  # a full batch, for a start
            assert teacher.inside.wait(WAIT)
            for i, client in enumerate(clients):
                client.send(request(images(i + 1, seed=i), prompt="x" * i))
            until(lambda: server.health()["queue_rows"] == 6)
            teacher.go.set()
            clients[0].receive()
            for i, client in enumerate(clients):
                answer = client.receive()
                wanted = expected(images(i + 1, seed=i), "x" * i)
                np.testing.assert_array_equal(answer["actions"], wanted)
                assert answer["server_timing"]["batch_rows"] == 6
            assert teacher.batches == [8, 6]
            assert server.health()["mean_batch_rows"] == 7.0

    def test_waits_for_others_but_not_for_nobody(self):
        teacher = Brightness()
        server = TeacherServer(teacher, port=0, max_batch=8, max_wait=WAIT)
        with server.running(), Client(server) as first:
            first.ask(request(images(1)))  # nobody else: at once
            with Client(server) as second:
                first.send(request(images(1)))
                until(lambda: server.health()["queue_rows"] == 1)
                assert teacher.batches == [1]  # until the other one asks as well
                second.ask(request(images(2)))
                first.receive()
                assert teacher.batches == [1, 3]
                first.send(request(images(1)))
                until(lambda: server.health()["queue_rows"] == 1)
            first.receive()  # the other one left

    def test_shapes_that_differ_are_asked_apart(self):
        teacher = Brightness()
        server = TeacherServer(teacher, port=0, max_batch=8, max_wait=0.0)
        with server.running(), Client(server) as client:
            teacher.hold()
            client.send(request(images(2, 8)))
            assert teacher.inside.wait(WAIT)
            for size in (4, 8, 4):
                client.send(request(images(2, size)))
            until(lambda: server.health()["queue_rows"] == 6)
            teacher.go.set()
            for size in (8, 4, 8, 4):
                answer = client.receive()["actions"]
                np.testing.assert_array_equal(answer, expected(images(2, size)))
        assert teacher.batches == [2, 4, 2]

    def test_one_that_raises_leaves_the_others_alone(self, served):
        server, teacher = served
        with Client(server) as good, Client(server) as bad:
            teacher.hold()
            good.send(request(images(8)))
            assert teacher.inside.wait(WAIT)
            bad.send(request(images(2), "raise"))
            good.send(request(images(3)))
            until(lambda: server.health()["queue_rows"] == 5)
            teacher.go.set()
            reason = "TeacherError: RuntimeError: no such thing"
            assert bad.receive() == reason
            good.receive()
            np.testing.assert_array_equal(
                good.receive()["actions"], expected(images(3))
            )
            assert bad.ask(request(images(1)))["actions"].shape == (1, 2, 4)
            # which Python would not carry through a future
            assert bad.ask(request(images(1), "raise stop")).startswith(
                "TeacherError: StopIteration: no such thing"
            )

    def test_busy(self):
        teacher = Brightness()
        server = TeacherServer(teacher, port=0, max_batch=4, max_queue=6)
        with server.running(), Client(server) as client:
            assert client.ask(request(images(7))).startswith("BadRequest: the request ")
            teacher.hold()
            client.send(request(images(4)))
            assert teacher.inside.wait(WAIT)
            for rows in (6, 1, 1):
                client.send(request(images(rows)))
            until(lambda: server.health()["errors"].get("Busy") == 2)
            teacher.go.set()
            assert client.receive()["actions"].shape[0] == 4
            assert client.receive()["actions"].shape[0] == 6
            assert client.receive().startswith("Busy: 6 rows are waiting, of at most 6")
            assert client.receive().startswith("Busy: ")
            assert client.ask(request(images(1)))["actions"].shape[0] == 1

    def test_client_killed_while_it_waits(self):
        teacher = Brightness()
        server = TeacherServer(teacher, port=0, max_batch=4, max_wait=0.0)
        with server.running(), Client(server) as good:
            killed = Client(server)
            teacher.hold()
            killed.send(request(images(4)))
            assert teacher.inside.wait(WAIT)
            killed.send(request(images(4)))
            good.send(request(images(3)))
            until(lambda: server.health()["queue_rows"] == 7)
            killed.socket.socket.shutdown(socket.SHUT_RDWR)  # no goodbye
            until(lambda: server.health()["connections"] == 1)
            teacher.go.set()
            np.testing.assert_array_equal(
                good.receive()["actions"], expected(images(3))
            )
            assert teacher.batches == [4, 3]  # what waited was dropped

    def test_batcher_alone(self):
        calls = []

        def ask(td):
            calls.append(td.batch_size[0])
            if td["x"].isnan().any():
                raise SystemExit("a teacher that wants to leave")
            return td["x"][:, None].numpy(), None

        batcher = Batcher(ask, max_batch=4, max_wait=0.0, max_rows=8, max_bytes=32)
        bad = batcher.submit({"x": torch.full((6, 1), torch.nan)}, 6, source=0)
        assert isinstance(bad.exception(WAIT).error, SystemExit)
        assert calls == [4]  # the rest of it is not asked about
        good = batcher.submit({"x": torch.ones(1, 1)}, 1, source=0)
        assert good.result(WAIT).chunk.tolist() == [[[1.0]]]
        assert (batcher.rows, batcher.batches) == (1, 1)
        assert batcher.close(WAIT)
        with pytest.raises(ShuttingDown):
            batcher.submit({"x": torch.ones(1, 1)}, 1, source=0)

    def test_batcher_bounds_bytes(self):
        go = threading.Event()

        def ask(td):
            assert go.wait(WAIT)
            return td["x"][:, None].numpy(), None

        batcher = Batcher(ask, max_batch=4, max_wait=0.0, max_rows=99, max_bytes=32)
        rows = {"x": torch.ones(4, 1)}  # 16 bytes
        futures = [batcher.submit(rows, 4, source=0)]
        until(lambda: batcher.queue_rows == 0)
        futures += [batcher.submit(rows, 4, source=0) for _ in range(2)]
        with pytest.raises(Busy, match="of 32"):
            batcher.submit(rows, 4, source=0)
        assert futures.pop().cancel()  # makes room
        futures.append(batcher.submit(rows, 4, source=0))
        go.set()
        assert [f.result(WAIT).chunk.shape for f in futures] == [(4, 1, 1)] * 3
        assert batcher.close(WAIT)


class TestRefusals:
    @pytest.mark.parametrize(
        ("message", "reason"),
        [
            (
                {"prompt": "push"},
                "the request lacks ['observation/image']: this teacher",
            ),
            (request(images(2), image_layout="WHC"), "image_layout: expected one of "),
            (
                request(images(2).astype(np.float32)),
                "observation/image: expected uint8 ",
            ),
            (request(images(2)[..., 0]), "observation/image: expected uint8 [H, W, 3]"),
            (
                request(images(2), batch=3),
                "expected uint8 [B, H, W, 3] with B = 3, got",
            ),
            (request("picture"), "expected uint8 [B, H, W, 3], got 'picture'."),
            (request(images(2), ["push"]), "prompt: expected one text, or a list of 2"),
            (
                request(images(2), "x" * 5000),
                "prompt: 5000 characters; expected at most",
            ),
            (
                request(images(2), request_id="a"),
                "request_id: expected a whole number.",
            ),
            ([1, 2], "a request is a map with names (text) as its keys."),
        ],
    )
    def test_says_what_to_do(self, client, message, reason):
        answer = client.ask(message)
        assert answer.startswith("BadRequest: ")
        assert reason in answer
        assert client.ask(request(images(1)))["actions"].shape == (1, 2, 4)

    def test_rows_that_nobody_could_count(self):
        server = TeacherServer(lambda td: td["a"], port=0)
        with server.running(), Client(server) as client:
            numbers = np.ones((2, 3), np.float32)
            assert "with an entry 'batch'" in client.ask({"a": numbers})
            assert client.ask({"a": numbers, "batch": 2})["actions"].shape == (2, 1, 3)
            assert "no entry's name" in client.ask({"a//b": numbers, "batch": 2})
            assert "holds nothing" in client.ask({"batch": 2})
            assert "expected an array" in client.ask({"a": 7, "batch": 2})
            # rows without content, more than memory has
            nothing = {b"__ndarray__": True, b"data": b"", b"dtype": "<f4"}
            nothing[b"shape"] = [2**31, 0]
            assert "which is empty" in client.ask({"a": nothing, "batch": 2**31})
            assert "rows; expected 1 to 4096" in client.ask(
                {"prompt": "a", "batch": 5000}
            )

    def test_teacher_that_answers_something_else(self):
        server = TeacherServer(lambda td: td["observation"], port=0, action_dim=7)
        with server.running(), Client(server) as client:
            answer = client.ask({"observation": np.ones((2, 3), np.float32)})
        assert answer.startswith("TeacherError: ValueError: ")
        assert "[2, 1, 3]" in answer and "action_dim=7" in answer

    def test_longer_than_the_limit(self, served):
        with Client(served[0]) as client:
            client.socket.send(bytes(LIMIT + 1))
            with pytest.raises(ConnectionClosed) as caught:
                client.receive()
        assert caught.value.rcvd.code == 1009

    def test_options(self):
        for wrong in ({"max_batch": 0}, {"max_wait": -1.0}, {"token": ""}):
            with pytest.raises(ValueError, match=next(iter(wrong))):
                TeacherServer(Brightness(), **wrong)
        with pytest.raises(TypeError, match="got int"):
            TeacherServer(7)


class TestHttp:
    @staticmethod
    def get(server, path, **headers):
        url = f"http://127.0.0.1:{server.port}{path}"
        asked = urllib.request.Request(url, headers=headers)
        try:
            with urllib.request.urlopen(asked, timeout=WAIT) as answer:
                return answer.status, answer.headers, answer.read().decode()
        except urllib.error.HTTPError as error:
            return error.code, error.headers, error.read().decode()

    def test_health(self):
        server = TeacherServer(Brightness(), port=0, max_batch=8)
        assert server.health()["rows"] == 0
        with server.running(), Client(server) as client:
            client.ask(request(images(3)))
            client.ask(request(images(1)))
            client.ask({})
            assert self.get(server, "/healthz")[::2] == (200, "OK\n")
            status, headers, body = self.get(server, "/health")
        assert (status, headers["Content-Type"]) == (200, "application/json")
        health = json.loads(body)
        assert health.pop("uptime_s") > 0
        assert health == {
            "model": "Brightness",
            "connections": 1,
            "requests": 2,
            "rows": 4,
            "batches": 2,
            "mean_batch_rows": 2.0,
            "queue_rows": 0,
            "errors": {"BadRequest": 1},
        }

    def test_token(self):
        server = TeacherServer(Brightness(), port=0, token="s3cret")
        with server.running():
            for scheme in ("Bearer", "Api-Key"):
                right = {"Authorization": f"{scheme} s3cret"}
                with Client(server, additional_headers=right) as client:
                    assert client.ask(request(images(1)))["actions"].shape == (1, 2, 4)
            for wrong in (
                {},
                {"Authorization": "Bearer s3cre"},
                {"Authorization": "é"},
            ):
                with pytest.raises(InvalidStatus) as caught:
                    Client(server, additional_headers=wrong)
                assert caught.value.response.status_code == 401
                assert b"Bearer <token>" in caught.value.response.body
            assert self.get(server, "/healthz")[0] == 200
            assert self.get(server, "/health")[0] == 401
            status, _, body = self.get(server, "/health", Authorization="Bearer s3cret")
            assert status == 200
            assert json.loads(body)["errors"] == {"Unauthorized": 4}

    def test_web_pages_are_kept_out(self, served):
        # A page in a browser on this machine could reach loopback as well.
        with pytest.raises(InvalidStatus) as caught:
            Client(served[0], origin="https://example.com")
        assert caught.value.response.status_code == 403

    def test_warns_where_everybody_may_ask(self, caplog):
        # "localhost" and loopback addresses are silent; port taken: nothing listens.
        async def start(host, token):
            with socket.create_server(("", 0)) as taken:
                port = taken.getsockname()[1]
                server = TeacherServer(Brightness(), host=host, port=port, token=token)
                with pytest.raises(OSError):
                    await server.start()

        for host, token in (("127.0.0.1", None), ("0.0.0.0", "a"), ("0.0.0.0", None)):
            caplog.clear()
            with caplog.at_level("WARNING", logger="torchrl"):
                asyncio.run(start(host, token))
            warned = "without a token" in caplog.text
            assert warned == (host == "0.0.0.0" and token is None)


class TestShutdown:
    def test_answers_what_was_accepted(self):
        teacher = Brightness()
        server = TeacherServer(teacher, port=0, max_batch=4)
        with contextlib.ExitStack() as running:
            running.enter_context(server.running())
            busy, idle = Client(server), Client(server)
            teacher.hold()
            for seed in range(3):
                busy.send(request(images(4, seed=seed)))
            assert teacher.inside.wait(WAIT)
            until(lambda: server.health()["requests"] == 3)
            address = server.address
            stopping = threading.Thread(target=running.close)
            stopping.start()
            with pytest.raises(ConnectionClosed) as caught:
                idle.receive()  # told at once
            assert caught.value.rcvd.code == 1001
            with pytest.raises(OSError):
                connect(address, open_timeout=WAIT)
            teacher.go.set()
            for seed in range(3):
                actions = busy.receive()["actions"]
                np.testing.assert_array_equal(actions, expected(images(4, seed=seed)))
            with pytest.raises(ConnectionClosed) as caught:
                busy.receive()
            assert caught.value.rcvd.code == 1001
            stopping.join(WAIT)

    def test_teacher_that_hangs_does_not_keep_it(self):
        teacher = Brightness()
        server = TeacherServer(teacher, port=0)
        with server.running(timeout=0.05):
            client = Client(server)
            teacher.hold()
            client.send(request(images(1)))
            assert teacher.inside.wait(WAIT)
        assert client.receive().startswith("ShuttingDown: ")
        with pytest.raises(ConnectionClosed):
            client.receive()
        teacher.go.set()

    def test_client_that_does_not_read_does_not_keep_it(self):
        # 40 answers of 4096 rows are 5 MB each, more than the sockets' buffers hold.
        server = TeacherServer(
            lambda td: td["a"].expand(-1, 300), port=0, max_batch=4096, max_queue=99999
        )
        with server.running(timeout=0.5):
            client = Client(server)
            for _ in range(40):
                client.send({"a": np.ones((4096, 1), np.float32), "batch": 4096})
            until(lambda: server.health()["requests"] >= 2)
        client.socket.socket.close()

    def test_starts_once(self):
        server = TeacherServer(Brightness(), port=0)
        with server.running():
            pass
        with pytest.raises(RuntimeError, match="started once"), server.running():
            pass


def test_octo_jax_server_speaks_it():
    """The example that runs in Octo's own environment, with a policy of ours in it."""
    path = Path(__file__).parents[2] / "examples" / "servers" / "octo_jax_server.py"
    spec = importlib.util.spec_from_file_location("octo_jax_server", path)
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    policy = object.__new__(module.OctoPolicy)
    policy.metadata = module.metadata("octo-small", action_dim=7, action_horizon=4)

    def infer(asked):
        assert asked["prompt"] in ("push", ["push", "pull"])
        if asked["observation/image"].shape[-2] != 256:
            raise ValueError("wrong size")
        rows = asked["observation/image"][:, 0, 0, :1].astype(np.float32)
        return {"actions": np.broadcast_to(rows[:, None], (len(rows), 4, 7)).copy()}

    policy.infer = infer
    with socket.create_server(("127.0.0.1", 0)) as free:
        port = free.getsockname()[1]
    loop = asyncio.new_event_loop()
    serving = loop.create_task(module.serve(policy, "127.0.0.1", port, 2**24))

    def run():
        with contextlib.suppress(asyncio.CancelledError):
            loop.run_until_complete(serving)
        loop.close()

    thread = threading.Thread(target=run)
    thread.start()
    try:
        shown = torch.randint(256, (2, 3, 256, 256), dtype=torch.uint8)
        frames = TensorDict({("observation", "image"): shown}, [2])
        frames["language_instruction"] = NonTensorStack("push", "pull")
        with RemoteTeacher(
            f"ws://127.0.0.1:{port}", action_dim=7, chunk_size=4, backoff=0.05
        ) as teacher:
            assert teacher.info.batch and teacher.info.image_size == (256, 256)
            assert teacher.info.max_message_bytes == 2**24
            chunk = teacher(frames)[CHUNK]
            assert torch.equal(chunk[:, 3, 6], shown[:, 0, 0, 0].float())
            with pytest.raises(TeacherError, match="wrong size"):
                teacher(frames.apply(lambda image: image[..., :8]))
    finally:
        loop.call_soon_threadsafe(serving.cancel)
        thread.join(WAIT)


class GoodClient(threading.Thread):
    """Asks again and again, beside whatever else happens to the server."""

    def __init__(self, server):
        super().__init__()
        self.server, self.done = server, threading.Event()
        self.answers, self.failure = 0, None
        self.start()

    def run(self):
        try:
            with Client(self.server) as client:
                while not self.done.is_set():
                    image = images(2, seed=self.answers)
                    answer = client.ask(request(image))
                    np.testing.assert_array_equal(answer["actions"], expected(image))
                    self.answers += 1
                    time.sleep(0.005)
        except BaseException as error:
            self.failure = error

    def __enter__(self):
        return self

    def __exit__(self, *args):
        self.done.set()
        self.join(WAIT)


def attack(server, frames):
    """Sends frames, checks each reply, and returns how many there were by class."""
    seen = Counter()
    client = Client(server)
    for frame in frames:
        client.socket.send(frame.data)
        seen[frame.kind] += 1
        if frame.closes is None:
            answer = client.socket.recv(WAIT)
            assert isinstance(answer, str), (frame.kind, frame.data[:99])
            assert answer.startswith("BadRequest: "), (frame.kind, answer)
            assert len(answer) < 1_100
        else:
            with pytest.raises(ConnectionClosed) as caught:
                client.socket.recv(WAIT)
            assert caught.value.rcvd.code == frame.closes, frame.kind
            client = Client(server)
    client.socket.close()
    return seen


class TestMalformed:
    def test_seeded(self):
        first, again = (list(malformed_frames(3, 99)) for _ in range(2))
        assert first == again
        assert first != list(malformed_frames(4, 99))

    @pytest.mark.parametrize(
        "count", [600, pytest.param(10_000, marks=pytest.mark.slow)]
    )
    def test_frames(self, served, count):
        server, _ = served
        before = server.health()["errors"].get("BadRequest", 0)
        with GoodClient(server) as good:
            seen = attack(server, malformed_frames(0, count, limit=LIMIT))
            until(lambda: good.answers > 5 or good.failure)
        assert good.failure is None
        assert set(seen) == set(KINDS) and seen.total() == count
        wrong = server.health()["errors"]["BadRequest"] - before
        assert wrong == count - seen["oversized"]
        with Client(server) as client:  # the server lives on
            assert client.ask(request(images(1)))["actions"].shape == (1, 2, 4)

    @pytest.mark.parametrize("count", [32, pytest.param(800, marks=pytest.mark.slow)])
    def test_broken_streams(self, served, count):
        server, _ = served
        handshake = (
            b"GET / HTTP/1.1\r\nHost: a\r\nUpgrade: websocket\r\nConnection: Upgrade\r\n"
            b"Sec-WebSocket-Key: dGhlIHNhbXBsZSBub25jZQ==\r\n"
            b"Sec-WebSocket-Version: 13\r\n\r\n"
        )
        with GoodClient(server) as good:
            for _name, inside, data in broken_streams(0, count):
                with socket.create_connection(("127.0.0.1", server.port), WAIT) as raw:
                    if inside:
                        raw.sendall(handshake)
                        assert raw.recv(9) == b"HTTP/1.1 "
                    with contextlib.suppress(ConnectionError):
                        raw.sendall(data)
            until(lambda: good.answers > 5 or good.failure)
        assert good.failure is None
        until(lambda: server.health()["connections"] == 0)  # every one was noticed

    def test_random_bits_of_a_request(self, served):
        # What a flipped bit leaves well-formed is answered, the rest is refused.
        rng = random.Random(0)
        whole = pack(request(images(1), batch=1, request_id=1))
        with Client(served[0]) as client:
            for _ in range(200):
                broken = bytearray(whole)
                broken[rng.randrange(len(whole))] ^= 1 << rng.randrange(8)
                client.socket.send(bytes(broken))
                answer = client.receive()
                if isinstance(answer, str):
                    assert answer.startswith("BadRequest: ")
                else:
                    assert answer["actions"].shape == (1, 2, 4)


if __name__ == "__main__":
    pytest.main([__file__])
