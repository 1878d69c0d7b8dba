# Copyright (c) the torchrl_rpd authors.
#
# This source code is licensed under the MIT license found in the
# LICENSE file in the root directory of this source tree.
"""Workers that share one served teacher, and ``examples/teacher_process.py``."""

from __future__ import annotations

import contextlib
import functools
import os
import re
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from tensordict import TensorDictBase
from torchrl.envs import ParallelEnv, TransformedEnv
from torchrl.modules.inference_server import MPTransport, ProcessInferenceServer
from toy_envs import ReachEnv

from torchrl_rpd.teachers.inference import InferenceTeacher, ServableTeacher
from torchrl_rpd.teachers.remote import TeacherUnavailable
from torchrl_rpd.transforms import TeacherActionTransform

ROOT = Path(__file__).parents[1]

pytestmark = pytest.mark.slow

WORKERS, ENVS = 2, 3


def label_of(observation: torch.Tensor) -> torch.Tensor:
    return (-5 * observation).clamp(-1, 1)


class TowardsTheOrigin:
    in_keys = ("observation",)

    def __call__(self, tensordict: TensorDictBase) -> TensorDictBase:
        label = label_of(tensordict["observation"])
        return tensordict.set(("vla_action", "chunk"), label.unsqueeze(1))


def make_env(factory: Callable[[], InferenceTeacher]) -> TransformedEnv:
    torch.set_num_threads(1)
    return TransformedEnv(
        ReachEnv(ENVS), TeacherActionTransform(teacher_factory=factory)
    )


def make_server() -> ProcessInferenceServer:
    return ProcessInferenceServer(
        policy_factory=functools.partial(ServableTeacher, TowardsTheOrigin),
        transport=MPTransport(use_manager=True),
        max_batch_size=WORKERS * ENVS,
        min_batch_size=WORKERS * ENVS,
        timeout=2.0,
        policy_version_key=None,
    )


def make_workers(server: ProcessInferenceServer, **kwargs: Any) -> ParallelEnv:
    factories = InferenceTeacher.factories(
        server, WORKERS, in_keys=["observation"], **kwargs
    )
    return ParallelEnv(WORKERS, [functools.partial(make_env, f) for f in factories])


def assert_labelled(frames: TensorDictBase) -> None:
    assert frames["teacher_mask"].all()
    assert torch.equal(frames["teacher_action"], label_of(frames["observation"]))


def kill(server: ProcessInferenceServer) -> None:
    pid = server.health()["pid"]
    assert isinstance(pid, int)
    os.kill(pid, signal.SIGKILL)


def test_workers_share_a_server_that_may_be_killed_and_started_again() -> None:
    server = make_server().start()
    try:
        env = make_workers(server, on_error="mask", timeout=60.0)
        try:
            td = env.reset()
            frames = env.rollout(16, auto_reset=False, tensordict=td)
            assert_labelled(frames)
            stats = server.stats()
            # The reset and 7 steps of 8 frames: the last one ends all episodes.
            assert stats["requests"] == WORKERS * ENVS * 8
            # A worker sends 3 rows and awaits the answers: with more than 3 in a batch,
            # some are of the other worker. Here the server waits for all 6.
            assert stats["avg_batch_size"] > ENVS

            kill(server)
            start = time.monotonic()
            frames = env.rollout(4)
            assert not frames["teacher_mask"].any()
            assert not frames["teacher_action"].any()
            assert time.monotonic() - start < 50  # before a single timeout

            server.start()
            deadline = time.monotonic() + 120
            while not env.rollout(2)["teacher_mask"].all():
                assert time.monotonic() < deadline
            assert_labelled(env.rollout(8))
        finally:
            env.close()
    finally:
        server.shutdown()
        server.transport.close()


def test_without_the_server_the_workers_stop(capfd) -> None:
    server = make_server().start()
    try:
        env = make_workers(server, timeout=60.0)
        try:
            assert_labelled(env.rollout(4))
            kill(server)
            # ParallelEnv tells that a worker ended; why, the worker has printed.
            with pytest.raises(RuntimeError, match=r"worker \d dead"):
                env.rollout(4)
        finally:
            # The other worker may not have noticed yet.
            with contextlib.suppress(RuntimeError, ValueError):
                env.close(raise_if_closed=False)
    finally:
        server.shutdown()
        server.transport.close()
    said = f"{TeacherUnavailable.__name__}: No answer from the InferenceServer"
    assert said in capfd.readouterr().err


@pytest.mark.maniskill
@pytest.mark.parametrize("server", ["thread", "process"])
def test_example(server) -> None:
    done = subprocess.run(
        [
            *(sys.executable, "-W", "ignore", "examples/teacher_process.py"),
            *("--server", server, "--steps", "10"),
        ],
        cwd=ROOT,
        env={**os.environ, "PYTHONPATH": str(ROOT)},
        capture_output=True,
        text=True,
        timeout=900,
    )
    assert done.returncode == 0, done.stderr[-3000:]
    # 2 workers of 4 environments: 80 frames, and the 8 roots after them.
    found = re.search(
        rf"{server}: 80 frames .* 88 rows in (\d+) batches, ([\d.]+)", done.stdout
    )
    assert found is not None, done.stdout
    assert float(found[2]) > 4  # rows of both workers in a batch


if __name__ == "__main__":
    pytest.main([__file__])
