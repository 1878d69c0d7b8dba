# Copyright (c) the torchrl_rpd authors.
#
# This source code is licensed under the MIT license found in the
# LICENSE file in the root directory of this source tree.
"""The real openpi-client and its codec, in an environment of their own, both ways.

openpi-client asks for numpy < 2, which nothing else here does: it is installed into a
virtual environment that lasts as long as these tests.
"""

from __future__ import annotations

import contextlib
import json
import os
import subprocess
import sys
import venv
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import pytest
import torch
from tensordict import TensorDict

pytest.importorskip("msgpack", reason="needs the extra 'remote'")
pytest.importorskip("websockets", reason="needs the extra 'remote'")

from torchrl_rpd.teachers import OctoTeacher, RemoteTeacher
from torchrl_rpd.teachers.octo import write_random_checkpoint
from torchrl_rpd.teachers.remote import TeacherError

pytestmark = pytest.mark.slow

ROOT = Path(__file__).parents[2]
CHUNK = ("vla_action", "chunk")
# (typing_extensions: openpi-client uses it and does not say so)
PACKAGES = ("openpi-client", "msgpack", "websockets", "typing_extensions", "numpy<2")

# Runs in openpi-client's environment: three observations, and one that is wrong.
CLIENT = """
import json, sys
import numpy as np
from openpi_client.websocket_client_policy import WebsocketClientPolicy

host, port, token = sys.argv[1], int(sys.argv[2]), sys.argv[3]
policy = WebsocketClientPolicy(host=host, port=port, api_key=token)
images = np.load(sys.argv[4])
said = {"numpy": np.__version__, "metadata": policy.get_server_metadata(), "answers": []}
for image in images:
    answer = policy.infer({"observation/image": image, "prompt": "push the cube"})
    said["answers"].append(answer["actions"].tolist())
try:
    policy.infer({"observation/image": images[0].astype(np.float32), "prompt": "push"})
except RuntimeError as error:
    said["error"] = str(error)
print(json.dumps(said))
"""

# Runs there as well: an OpenPI policy server as theirs is, with a policy that answers
# (colours of the first pixel, length of the prompt) for one observation.
SERVER = """
import asyncio, traceback
import numpy as np
import websockets.asyncio.server
from openpi_client import msgpack_numpy

def infer(obs):
    image = obs["observation/image"]
    if image.shape != (8, 8, 3):
        raise ValueError(f"one image at a time, not {image.shape}")
    action = np.append(image[0, 0].astype(np.float32), np.float32(len(obs["prompt"])))
    return {"actions": np.stack([action, -action])}

async def handler(websocket):
    packer = msgpack_numpy.Packer()
    await websocket.send(packer.pack({"reset_pose": [0.0]}))
    while True:
        try:
            obs = msgpack_numpy.unpackb(await websocket.recv())
            await websocket.send(packer.pack(infer(obs)))
        except websockets.ConnectionClosed:
            break
        except Exception:
            await websocket.send(traceback.format_exc())
            await websocket.close(1011, "Internal server error.")
            raise

async def main():
    serve = websockets.asyncio.server.serve
    async with serve(handler, "127.0.0.1", 0, compression=None, max_size=None) as server:
        print(server.sockets[0].getsockname()[1], flush=True)
        await server.serve_forever()

asyncio.run(main())
"""


@pytest.fixture(scope="module")
def openpi(tmp_path_factory) -> str:
    """The Python of an environment with openpi-client."""
    folder = tmp_path_factory.mktemp("openpi")
    try:
        venv.create(folder, with_pip=True)
        python = str(folder / "bin" / "python")
        command = [python, "-m", "pip", "install", "-q", *PACKAGES]
        subprocess.run(command, check=True, capture_output=True, text=True, timeout=600)
    except (OSError, subprocess.SubprocessError) as error:
        reason = getattr(error, "stderr", "") or str(error)
        pytest.skip(f"openpi-client cannot be installed: {str(reason)[-300:]}")
    return python


@contextlib.contextmanager
def process(*command: str, **environment: str) -> Iterator[str]:
    """A process that serves; its first line."""
    running = subprocess.Popen(
        command,
        env=dict(os.environ, PYTHONPATH=str(ROOT), **environment),
        stdout=subprocess.PIPE,
        text=True,
    )
    try:
        yield running.stdout.readline().strip()
    finally:
        running.terminate()
        running.wait(60)


def pictures(rows: int, size: int) -> np.ndarray:
    generator = np.random.default_rng(0)
    return generator.integers(256, size=(rows, size, size, 3), dtype=np.uint8)


def test_their_client_asks_our_server(openpi, tmp_path):
    folder = write_random_checkpoint(tmp_path / "octo-tiny")
    images = pictures(3, 64)
    np.save(tmp_path / "images.npy", images)
    command = [sys.executable, "-m", "torchrl_rpd.teachers.serve", "octo"]
    command += ["--path", str(folder), "--port", "0"]
    with process(*command, TORCHRL_RPD_TOKEN="s3cret") as line:
        assert line.startswith("serving octo(octo-tiny) on ws://127.0.0.1:")
        port = line.rpartition(":")[2]
        arguments = [openpi, "-c", CLIENT, "127.0.0.1", port]
        files = [str(tmp_path / "images.npy")]
        asked = [*arguments, "s3cret", *files]
        done = subprocess.run(asked, capture_output=True, text=True, timeout=300)
        assert done.returncode == 0, done.stderr[-2000:]
        refused = subprocess.run(
            [*arguments, "wrong", *files], capture_output=True, text=True, timeout=300
        )
        assert refused.returncode != 0
        assert "401" in refused.stderr
    said = json.loads(done.stdout)
    print(json.dumps(said, indent=1))
    assert said["numpy"].startswith("1.")
    assert said["metadata"]["protocol"] == "torchrl_rpd/1"
    assert said["metadata"]["request_keys"] == ["observation/image", "prompt"]
    # The same draws here: Octo's generator starts from seed 0, one row after the other.
    teacher = OctoTeacher.from_pretrained(folder)
    for image, answer in zip(images, said["answers"], strict=True):
        shown = torch.from_numpy(image).permute(2, 0, 1)[None]
        frames = TensorDict({("observation", "image"): shown}, [1])
        frames["language_instruction"] = "push the cube"
        wanted = teacher(frames)[CHUNK][0]
        torch.testing.assert_close(torch.tensor(answer), wanted, atol=1e-5, rtol=1e-5)
    assert "BadRequest: observation/image: expected uint8 [H, W, 3]" in said["error"]


def test_our_client_asks_their_server(openpi):
    images = pictures(5, 8)
    frames = TensorDict(
        {("observation", "image"): torch.from_numpy(images).permute(0, 3, 1, 2)}, [5]
    )
    with contextlib.ExitStack() as stack:
        port = stack.enter_context(process(openpi, "-c", SERVER))
        address = f"ws://127.0.0.1:{port}"
        teacher = stack.enter_context(RemoteTeacher(address, instruction="push"))
        assert not teacher.info.batch and teacher.info.protocol is None
        chunk = teacher(frames)[CHUNK]
        assert teacher.stats()["requests"] == 5  # one observation per message
        action = np.concatenate([images[:, 0, 0], np.full((5, 1), 4)], 1)
        wanted = torch.tensor(np.stack([action, -action], 1), dtype=torch.float32)
        assert torch.equal(chunk, wanted)
        wrong = frames.apply(lambda image: image[..., :4])
        with pytest.raises(TeacherError, match="one image at a time"):
            teacher(wrong)
        # their server ends the connection after an error: a new one is made
        assert torch.equal(teacher(frames)[CHUNK], wanted)


if __name__ == "__main__":
    pytest.main([__file__])
