# Copyright (c) the torchrl_rpd authors.
#
# This source code is licensed under the MIT license found in the
# LICENSE file in the root directory of this source tree.
"""``examples/rpd_ray.py`` on a Ray of this machine, whose processes are killed for real."""

from __future__ import annotations

import argparse
import importlib.util
import os
import re
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest
import torch
from tensordict import TensorDictBase
from toy_envs import ReachEnv

ROOT = Path(__file__).parents[1]

pytestmark = [
    pytest.mark.slow,
    pytest.mark.skipif(
        importlib.util.find_spec("ray") is None,
        reason="needs Ray: pip install 'torchrl_rpd[ray]'",
    ),
]

# 2 collectors of 4 environments and 8 steps: 64 frames per batch, two batches.
FRAMES, ENVS, BATCH = 128, 8, 64


def make_simulators(args: argparse.Namespace, seed: int) -> ReachEnv:
    env = ReachEnv(args.num_envs)
    env.set_seed(seed)
    return env


def label_of(observation: torch.Tensor) -> torch.Tensor:
    return (-5 * observation).clamp(-1, 1)


class TowardsTheOrigin:
    in_keys = ("observation",)

    def __call__(self, tensordict: TensorDictBase) -> TensorDictBase:
        label = label_of(tensordict["observation"])
        return tensordict.set(("vla_action", "chunk"), label.unsqueeze(1))


def make_teacher(args: argparse.Namespace) -> TowardsTheOrigin:
    return TowardsTheOrigin()


def descendants(pid: int) -> set[int]:
    """Processes that ``pid`` has started, and those that they have started."""
    parents: dict[int, int] = {}
    for stat in Path("/proc").glob("[0-9]*/stat"):
        try:
            fields = stat.read_text().rpartition(")")[2].split()
        except OSError:
            continue
        if fields[0] != "Z":
            parents[int(stat.parent.name)] = int(fields[1])
    found: set[int] = set()
    new = {pid}
    while new:
        new = {child for child, parent in parents.items() if parent in new} - found
        found |= new
    return found


def alive(pids: set[int]) -> dict[int, str]:
    """Those of ``pids`` that run, with their command lines."""
    out = {}
    for pid in pids:
        try:
            fields = Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()
            command = Path(f"/proc/{pid}/cmdline").read_text().replace("\0", " ")
        except OSError:
            continue
        # Python's own resource tracker ends with this process.
        if fields[0] != "Z" and "resource_tracker" not in command:
            out[pid] = command
    return out


@pytest.fixture(scope="module")
def example() -> Iterator[ModuleType]:
    """The example as a module, with a Ray that is gone without a trace afterwards."""
    import ray

    paths = [ROOT, ROOT / "tests", ROOT / "examples"]
    old = os.environ.get("PYTHONPATH")
    os.environ["PYTHONPATH"] = os.pathsep.join(map(str, paths))  # of Ray's processes
    os.environ["OMP_NUM_THREADS"] = "1"
    sys.path.insert(0, str(ROOT / "examples"))
    before = descendants(os.getpid())
    try:
        import rpd_ray

        rpd_ray.start_ray(rpd_ray.parse_args([]))
        yield rpd_ray
        ours = descendants(os.getpid()) - before
        assert ours, "Ray runs in no process"
    finally:
        ray.shutdown()
        sys.path.remove(str(ROOT / "examples"))
        if old is None:
            del os.environ["PYTHONPATH"]
        else:
            os.environ["PYTHONPATH"] = old
    deadline = time.monotonic() + 30
    while alive(ours) and time.monotonic() < deadline:
        time.sleep(0.2)
    assert not alive(ours), "processes of Ray are left over"


def kill(actor: Any) -> int:
    """Kills the process of an actor as the system would; returns its id."""
    import ray

    pid = ray.get(actor.__ray_call__.remote(lambda self: __import__("os").getpid()))
    os.kill(pid, signal.SIGKILL)
    while alive({pid}):
        time.sleep(0.05)
    return pid


class Watch:
    """Looks at every batch, and does something after the first."""

    def __init__(self, then: Callable[..., Any] | None = None) -> None:
        self.then = then
        self.batches: list[TensorDictBase] = []
        self.requests: list[int] = []
        self.teacher: Any = None

    def __call__(
        self, *, batch: TensorDictBase, student: Any, collectors: Any, teacher: Any
    ) -> None:
        import ray

        labels = label_of(batch["observation"])
        mask = batch["teacher_mask"]
        expected = torch.where(mask, labels, 0.0)
        torch.testing.assert_close(batch["teacher_action"], expected, rtol=0, atol=0)
        # What was learned has arrived in every collector.
        for state in collectors.map_fn("policy.state_dict"):
            for key, value in student.actor.state_dict().items():
                assert torch.equal(state[key], value), key
        self.batches.append(batch.clone())
        self.teacher = teacher
        try:
            self.requests.append(ray.get(teacher.stats.remote())["requests"])
        except ray.exceptions.RayActorError:
            self.requests.append(-1)
        if len(self.batches) == 1 and self.then is not None:
            self.then(collectors=collectors, teacher=teacher, student=student)

    @property
    def labelled(self) -> list[float]:
        return [b["teacher_mask"].double().mean().item() for b in self.batches]


def train(example: ModuleType, watch: Watch, *options: str) -> None:
    args = example.parse_args(
        [
            *("--frames", str(FRAMES), "--num-envs", str(ENVS // 2), "--steps", "8"),
            *options,
        ]
    )
    example.train(
        args,
        make_simulators=make_simulators,
        make_teacher=make_teacher,
        after_batch=watch,
    )


def test_in_the_envs_of_the_collectors(example) -> None:
    watch = Watch()
    train(example, watch)
    assert [b.shape for b in watch.batches] == [(2, 4, 8)] * 2
    assert watch.labelled == [1, 1]
    # Every stored frame once, and the 8 roots of the next batch: F + N.
    assert watch.requests == [BATCH + ENVS, 2 * BATCH + ENVS]


def test_in_the_main_process(example) -> None:
    watch = Watch()
    train(example, watch, "--placement", "postproc")
    assert watch.labelled == [1, 1]
    assert watch.requests == [BATCH, 2 * BATCH]  # exactly F


def kill_the_teacher(teacher: Any, **_: Any) -> None:
    kill(teacher)


def test_a_killed_teacher_is_started_again(example) -> None:
    watch = Watch(kill_the_teacher)
    train(example, watch)
    assert watch.labelled == [1, 1]
    # The new one has answered the 64 frames since, and those alone: one label per frame.
    assert watch.requests == [BATCH + ENVS, BATCH]


def test_without_the_teacher_the_run_goes_on_without_labels(example) -> None:
    watch = Watch(kill_the_teacher)
    train(example, watch, "--on-teacher-loss", "mask")
    first, second = watch.batches
    assert first["teacher_mask"].all()
    # The first frames of the second batch were labelled with the last of the first.
    mask = second["teacher_mask"][..., 0]
    assert mask[..., 0].all() and not mask[..., 1:].any()
    assert watch.requests == [BATCH + ENVS, -1]


@pytest.mark.parametrize("placement", ["env", "postproc"])
def test_without_the_teacher_the_run_stops(example, placement) -> None:
    watch = Watch(kill_the_teacher)
    options = ("--on-teacher-loss", "stop", "--placement", placement)
    with pytest.raises(SystemExit, match=r"teacher is gone after 64 frames.*actor"):
        train(example, watch, *options)
    assert len(watch.batches) == 1


def kill_a_collector(collectors: Any, **_: Any) -> None:
    kill(collectors.remote_collectors[0])


def test_killed_collectors_are_started_again(example) -> None:
    watch = Watch(kill_a_collector)
    train(example, watch)
    assert sum(b.numel() for b in watch.batches) == FRAMES
    assert watch.labelled == [1, 1]
    # The other collector finished its half of the batch that was lost; then both
    # started with a reset: 64 + 8, 32, 8 + 64.
    assert watch.requests == [72, 72 + 32 + 72]


def test_a_collector_that_is_killed_before_the_weights_are_sent(example) -> None:
    def then(collectors: Any, student: Any, **_: Any) -> None:
        kill_a_collector(collectors)
        start = time.monotonic()
        try:
            collectors.update_policy_weights_(student.actor)
        finally:
            # TorchRL's weight transport gives up after a minute.
            assert time.monotonic() - start < 120

    watch = Watch(then)
    train(example, watch)
    assert sum(b.numel() for b in watch.batches) == FRAMES
    assert watch.labelled == [1, 1]


def test_without_a_collector_the_run_stops(example) -> None:
    watch = Watch(kill_a_collector)
    with pytest.raises(SystemExit, match=r"A collector died after 64 frames"):
        train(example, watch, "--on-collector-loss", "stop")
    assert len(watch.batches) == 1


@pytest.mark.maniskill
def test_from_the_command_line() -> None:
    done = subprocess.run(
        [
            *(sys.executable, "-W", "ignore", "examples/rpd_ray.py"),
            *("--frames", "800", "--num-envs", "4", "--episodes", "4"),
        ],
        cwd=ROOT,
        env={**os.environ, "PYTHONPATH": str(ROOT)},
        capture_output=True,
        text=True,
        timeout=1200,
    )
    assert done.returncode == 0, done.stderr[-3000:]
    # Two batches of 2 collectors, 4 environments and 50 steps.
    assert re.findall(r"^ *(\d+) frames .*labelled 1.00", done.stdout, re.M) == [
        "400",
        "800",
    ]
    assert f"'requests': {800 + 2 * 4}" in done.stdout
    assert "success_once" in done.stdout


if __name__ == "__main__":
    pytest.main([__file__])
