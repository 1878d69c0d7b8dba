# Copyright (c) the torchrl_rpd authors.
#
# This source code is licensed under the MIT license found in the
# LICENSE file in the root directory of this source tree.
"""``python -m torchrl_rpd.teachers.serve``: what it builds, refuses, and how it stops."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import urllib.request
from pathlib import Path

import numpy as np
import pytest
import torch

pytest.importorskip("msgpack", reason="needs the extra 'remote'")
pytest.importorskip("websockets", reason="needs the extra 'remote'")

from websockets.exceptions import ConnectionClosed
from websockets.sync.client import connect

from torchrl_rpd.teachers.octo import write_random_checkpoint
from torchrl_rpd.teachers.remote import TeacherServer, pack, unpack
from torchrl_rpd.teachers.serve import main

ROOT = Path(__file__).parents[2]
FACTORIES = """
import torch

class Teacher:
    in_keys, action_dim = ["observation"], 2

    def __init__(self, **options):
        self.options = options

    def __call__(self, td):
        return td["observation"][:, :2]

def make(**options):
    return Teacher(**options)

def broken(**options):
    return 1 / 0

def waits(*, path):
    import pathlib, time

    class Waiting(Teacher):
        def __call__(self, td):
            while not pathlib.Path(path).exists():
                time.sleep(0.01)
            return super().__call__(td)

    return Waiting()
"""


@pytest.fixture
def factories(tmp_path, monkeypatch):
    (tmp_path / "some_factories.py").write_text(FACTORIES)
    monkeypatch.syspath_prepend(tmp_path)
    yield tmp_path
    sys.modules.pop("some_factories", None)


@pytest.fixture
def built(monkeypatch):
    """The server that ``main`` builds, which then stops at once."""
    servers = []

    async def serve_forever(self, *, ready, timeout):
        servers.append(self)
        ready()
        return timeout > 0

    monkeypatch.setattr(TeacherServer, "serve_forever", serve_forever)
    monkeypatch.delenv("TORCHRL_RPD_TOKEN", raising=False)
    return servers


class TestWhatIsServed:
    def test_scripted(self, built, capsys):
        arguments = "scripted --task PushCube-v1 --port 1234 --option laziness=0.25"
        assert main(arguments.split()) == 0
        (server,) = built
        assert server.info.request_keys == ("observation",)
        assert server.info.max_message_bytes == 256 * 2**20
        model = "ScriptedTeacher('PushCube-v1', seed=0, laziness=0.25)"
        assert server.info.model == model
        # one line, and nothing else
        assert capsys.readouterr().out == f"serving {model} on ws://127.0.0.1:1234\n"

    def test_octo(self, built, tmp_path):
        folder = write_random_checkpoint(tmp_path / "my_octo")
        arguments = ["octo", "--path", str(folder), "--instruction", "push"]
        main([*arguments, "--dtype", "bfloat16", "--option", "num_samples=3"])
        info = built[0].info
        assert info.model == "octo(my_octo)"  # not where it lies
        assert info.request_keys == ("observation/image",)
        assert (info.action_horizon, info.action_dim, info.writes_std) == (4, 7, True)
        assert info.action_convention == "un-normalised, gripper as the model gives it"

    def test_openvla(self, built, tmp_path):
        pytest.importorskip("tokenizers", reason="needs the extra 'openvla'")
        from torchrl_rpd.teachers.openvla import write_tiny_checkpoint

        folder = write_tiny_checkpoint(tmp_path / "vla")
        arguments = ["openvla", "--path", str(folder), "--unnorm-key", "tiny"]
        main([*arguments, "--option", "readout=mean", "--max-megabytes", "3"])
        info = built[0].info
        assert info.model == "openvla(vla, tiny)"
        assert info.request_keys == ("observation/image", "prompt")
        assert (info.action_horizon, info.action_dim) == (1, 7)
        assert info.action_convention == "un-normalised, gripper as the model gives it"
        assert info.deterministic is True
        assert info.max_message_bytes == 3 * 2**20

    def test_factory(self, built, factories):
        arguments = ["some_factories:make", "--path", "x", "--dtype", "float16"]
        main([*arguments, "--option", "sizes=[1, 2]", "--option", "name=a b"])
        options = built[0]._teacher.teacher.options
        assert options == {
            "path": "x",
            "dtype": torch.float16,
            "sizes": [1, 2],
            "name": "a b",
        }
        assert built[0].info.model == "some_factories:make(x)"

    def test_token(self, built, tmp_path, monkeypatch):
        arguments = ["scripted", "--task", "PushCube-v1"]
        main(arguments)
        monkeypatch.setenv("TORCHRL_RPD_TOKEN", "from-environment")
        main(arguments)
        file = tmp_path / "token"
        file.write_text("from-file\n")
        main([*arguments, "--token-file", str(file)])
        tokens = [server._gate.token for server in built]
        assert tokens == [None, "from-environment", "from-file"]

    def test_code_when_the_teacher_hangs(self, built):
        assert main(["scripted", "--task", "PushCube-v1", "--grace", "0"]) == 1


class TestRefusals:
    """One sentence and code 2, no traceback."""

    @pytest.mark.parametrize(
        ("arguments", "reason"),
        [
            (
                "nonsense",
                "no teacher 'nonsense'; there are scripted, openvla, octo and",
            ),
            ("scripted", "The teacher scripted needs --task."),
            ("scripted --task Foo-v1", "no controller for task 'Foo-v1'; it has: "),
            ("scripted --task PushCube-v1 --path x", "scripted takes no --path."),
            ("scripted --task PushCube-v1 --option jitter", "expected NAME=VALUE."),
            ("scripted --task PushCube-v1 --option a=1", "keyword argument 'a'"),
            (
                "scripted --task PushCube-v1 --max-batch 0",
                "max_batch must be at least 1",
            ),
            ("scripted --task PushCube-v1 --token-file no/where", "No such file"),
            ("openvla", "The teacher openvla needs --path."),
            ("openvla --path ./no/folder", "There is no folder ./no/folder"),
            ("octo --path ./no/folder", "There is no folder ./no/folder"),
            ("octo --path x --task y", "octo takes no --task."),
            ("no_such_module:make", "cannot be imported: No module named"),
            ("some_factories:absent", "has no attribute 'absent'"),
            ("some_factories:broken", "raised ZeroDivisionError: division by zero"),
            ("some_factories:FACTORIES.x", "has no attribute"),
        ],
    )
    def test_reasons(self, built, factories, capsys, arguments, reason):
        with pytest.raises(SystemExit) as caught:
            main(arguments.split())
        assert caught.value.code == 2
        printed = capsys.readouterr()
        assert printed.out == "" and not built
        (line,) = printed.err.splitlines()
        assert line.startswith("python -m torchrl_rpd.teachers.serve: error: ")
        assert reason in line

    def test_missing_extra(self, built, capsys, monkeypatch):
        monkeypatch.setitem(sys.modules, "websockets", None)
        with pytest.raises(SystemExit):
            main(["scripted", "--task", "PushCube-v1"])
        assert "pip install 'torchrl_rpd[remote]'" in capsys.readouterr().err

    def test_port_that_is_taken(self, capsys):
        import socket

        with socket.create_server(("127.0.0.1", 0)) as taken:
            port = str(taken.getsockname()[1])
            with pytest.raises(SystemExit) as caught:
                main(["scripted", "--task", "PushCube-v1", "--port", port])
        assert caught.value.code == 2
        assert "address already in use" in capsys.readouterr().err


def test_process_stops_cleanly(factories):
    """SIGTERM: what was accepted is answered, connections end with 1001, code 0."""
    gate = factories / "go"
    command = [sys.executable, "-m", "torchrl_rpd.teachers.serve"]
    process = subprocess.Popen(
        [*command, "some_factories:waits", "--path", str(gate), "--port", "0"],
        cwd=factories,
        env=dict(os.environ, PYTHONPATH=str(ROOT)),
        stdout=subprocess.PIPE,
        text=True,
    )
    try:
        line = process.stdout.readline()
        model, address = line.removeprefix("serving ").rstrip().split(" on ")
        assert model == "some_factories:waits(go)"
        state = np.arange(6, dtype=np.float32).reshape(2, 3)
        with connect(address, compression=None) as client:
            assert unpack(client.recv(60))["model"] == model
            client.send(pack({"observation": state}))
            health = address.replace("ws://", "http://") + "/health"
            while True:
                with urllib.request.urlopen(health, timeout=60) as answer:
                    if b'"requests": 1' in answer.read():
                        break
            process.send_signal(signal.SIGTERM)
            with pytest.raises(TimeoutError):
                client.recv(0.2)
            gate.touch()
            answer = unpack(client.recv(60))
            np.testing.assert_array_equal(answer["actions"], state[:, None, :2])
            with pytest.raises(ConnectionClosed) as caught:
                client.recv(60)
            assert caught.value.rcvd.code == 1001
        assert process.wait(60) == 0
        assert process.stdout.read() == ""
    finally:
        process.kill()


if __name__ == "__main__":
    pytest.main([__file__])
