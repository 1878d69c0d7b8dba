# Copyright (c) the torchrl_rpd authors.
#
# This source code is licensed under the MIT license found in the
# LICENSE file in the root directory of this source tree.
"""Parts of a run of examples/rpd.py in which something goes wrong at a known moment.

The environment variable ``FAULT`` says what, and ``FAULT_AFTER`` when: in the first
question to the teacher after there is a file of this name (a pattern).
"""

from __future__ import annotations

import glob
import multiprocessing
import os
import signal
import sys
import time
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

import torch
from hydra_toys import OVERRIDES
from tensordict import TensorDictBase
from torchrl.envs import EnvBase, ParallelEnv

from torchrl_rpd.envs._workers import in_worker

ROOT = Path(__file__).parents[2]
PATHS = [ROOT / "tests" / name for name in ("", "demos", "trainers", "trust")]
sys.path += [str(path) for path in PATHS if str(path) not in sys.path]

from resumable import StreamEnv  # noqa: E402

# Four batches of 128 frames, and a checkpoint after each.
WORDS = [
    *OVERRIDES,
    "env._target_=faulty_parts.env",
    "teacher._target_=faulty_parts.teacher",
    "frames=512",
    "checkpoint.every=128",
    "trainer.num_epochs=1",
    "episodes=2",
    "evaluation.episodes=2",
    "+evaluation.env_overrides.num_workers=1",
    "+evaluation.env_overrides.num_envs=2",
    "check_teacher=false",
]


class TeacherIsIll(Exception):
    """What a teacher of somebody's own may raise."""


def _ill() -> None:
    raise TeacherIsIll("a fever of 41")


FAULTS: dict[str, Callable[[], Any]] = {
    "ill": _ill,
    "kill": lambda: os.kill(os.getpid(), signal.SIGKILL),
    "kill_a_worker": lambda: multiprocessing.active_children()[0].kill(),
    "sigterm": lambda: os.kill(os.getpid(), signal.SIGTERM),
    "sigint": lambda: os.kill(os.getpid(), signal.SIGINT),
    # As a terminal does: to every process of the command.
    "ctrl_c": lambda: os.killpg(os.getpgid(0), signal.SIGINT),
    "nan": lambda: None,
    "wide": lambda: None,
}


class Teacher:
    """Points to the origin, and does harm once."""

    in_keys = ("observation",)

    def __call__(self, tensordict: TensorDictBase) -> torch.Tensor:
        action = (-5 * tensordict["observation"]).clamp(-1, 1)
        fault = os.environ.get("FAULT")
        if fault and glob.glob(os.environ["FAULT_AFTER"]):
            del os.environ["FAULT"]
            FAULTS[fault]()
            if fault == "nan":
                action[0] = torch.nan
            if fault == "wide":
                return torch.cat([action, action], -1)
        return action


def teacher(**_: Any) -> Teacher:
    return Teacher()


def env(*, num_envs: int, num_workers: int = 1, **_: Any) -> EnvBase:
    """The toy environment, in worker processes as ManiSkillEnv has them."""
    if num_workers == 1:
        return StreamEnv(num_envs)
    return ParallelEnv(
        num_workers,
        partial(in_worker, _one_thread, num_envs),
        use_buffers=False,
        metadata_from_workers=True,
        num_sub_threads=1,
    )


def _one_thread(num_envs: int) -> EnvBase:
    torch.set_num_threads(1)
    return StreamEnv(num_envs)


def no_env(**_: Any) -> EnvBase:
    """Workers that cannot build theirs."""
    make = partial(in_worker, _no_camera)
    return ParallelEnv(2, make, use_buffers=False, metadata_from_workers=True)


def _no_camera() -> EnvBase:
    raise ValueError("There is no camera 'ceiling'; choose from main, human.")


def processes_with(mark: str) -> dict[int, str]:
    """Command lines of all processes with ``mark`` in their environment, parents or not."""
    found = {}
    for folder in Path("/proc").glob("[0-9]*"):
        try:
            if mark.encode() in (folder / "environ").read_bytes():
                command = (folder / "cmdline").read_bytes().replace(b"\0", b" ")
                found[int(folder.name)] = command.decode()[:300]
        except OSError:
            continue  # somebody else's, or over
    return found


def wait_for(done: Callable[[], bool], seconds: float = 120.0) -> bool:
    """Whether it came true in time."""
    deadline = time.monotonic() + seconds
    while not done():
        if time.monotonic() > deadline:
            return False
        time.sleep(0.1)
    return True
