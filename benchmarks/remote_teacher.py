# Copyright (c) the torchrl_rpd authors.
#
# This source code is licensed under the MIT license found in the
# LICENSE file in the root directory of this source tree.
"""What asking a teacher elsewhere costs: round trips of batches of images.

    python -m benchmarks.remote_teacher
    python -m benchmarks.remote_teacher --out benchmarks/results/remote_teacher.md

One teacher, which looks at a few pixels of each image only, is asked

- in this process (what every other way is measured against);
- over a websocket: :class:`~torchrl_rpd.teachers.RemoteTeacher` and
  :class:`~torchrl_rpd.teachers.remote.TeacherServer` in a process of its own, on
  loopback;
- behind TorchRL's InferenceServer in a thread, and in a process of its own, row by row
  as its clients do.

All are asked in turns, round after round, so that a busy machine slows all of them; a
round is the median of several calls. The images are new at each call (one of four
batches in turn), as those of an environment are. On a busy machine, where everybody
waits for a processor, the fastest call and the time that the processors spent in the
processes concerned (both sides) say more than round trips.
"""

from __future__ import annotations

import argparse
import asyncio
import contextlib
import functools
import multiprocessing
import os
import statistics
import time
from collections.abc import Callable, Iterator
from multiprocessing.connection import Connection
from pathlib import Path
from typing import NamedTuple

import torch
from tensordict import TensorDict, TensorDictBase
from tensordict.nn import TensorDictModuleBase
from torch import Tensor
from torchrl.modules.inference_server import (
    InferenceServer,
    MPTransport,
    ProcessInferenceServer,
)

from benchmarks.machine import machine_line
from torchrl_rpd.teachers.inference import InferenceTeacher, ServableTeacher
from torchrl_rpd.teachers.remote import RemoteTeacher, TeacherServer

IMAGE, CHUNK = ("observation", "image"), ("vla_action", "chunk")
SIZE = 256
BATCHES = 4  # of images, in turn
BAR_ROWS, BAR_MS = 32, 20.0  # the most that a websocket may add to these rows

Ask = Callable[[TensorDictBase], TensorDictBase]


class Round(NamedTuple):
    """Seconds of a call of one way with one number of rows."""

    wall: float  # median of the calls
    fastest: float
    processor: float  # of all processes concerned, mean of the calls


Times = dict[tuple[str, int], list[Round]]  # by way and rows


def glance(images: Tensor) -> Tensor:
    """Chunks ``[n, 1, 7]`` from four pixels of each image."""
    few = images[:, :, ::128, ::128].float().mean((1, 2, 3))
    return few[:, None, None].expand(-1, 1, 7).contiguous()


class Glance(TensorDictModuleBase):
    """A teacher that costs next to nothing."""

    in_keys = (IMAGE,)
    out_keys = (CHUNK,)
    action_dim, chunk_size = 7, 1

    def forward(self, tensordict: TensorDictBase) -> TensorDictBase:
        """Writes ``("vla_action", "chunk")`` ``[n, 1, 7]``."""
        return tensordict.set(CHUNK, glance(tensordict[IMAGE]))


def make_teacher() -> Glance:
    """The teacher; called where it is to live."""
    torch.set_num_threads(1)
    return Glance()


def serve(rows: int, ready: Connection) -> None:
    """The process of the websocket's server."""
    server = TeacherServer(make_teacher(), port=0, max_batch=rows)
    asyncio.run(server.serve_forever(ready=lambda: ready.send(server.address)))


@contextlib.contextmanager
def over_websocket(rows: int) -> Iterator[Ask]:
    """Asks a server in a process of its own."""
    context = multiprocessing.get_context("spawn")
    here, there = context.Pipe()
    process = context.Process(target=serve, args=(rows, there))
    process.start()
    try:
        with RemoteTeacher(here.recv()) as teacher:
            yield teacher
    finally:
        process.terminate()
        process.join()


@contextlib.contextmanager
def behind_inference_server(kind: str, rows: int) -> Iterator[Ask]:
    """Asks TorchRL's server, in a thread or in a process of its own."""
    options = {
        "policy_factory": functools.partial(ServableTeacher, make_teacher),
        "max_batch_size": rows,
        "policy_version_key": None,
    }
    server: InferenceServer | ProcessInferenceServer
    if kind == "thread":
        server = InferenceServer(**options)
    else:
        server = ProcessInferenceServer(transport=MPTransport(), **options)
    with server:
        yield InferenceTeacher(server.client(), in_keys=[IMAGE])


def processor_seconds(pids: set[int]) -> float:
    """What all threads of these processes have used (Linux; 0 elsewhere)."""
    files = [
        file for pid in pids for file in Path("/proc").glob(f"{pid}/task/*/schedstat")
    ]
    return sum(int(file.read_text().split()[0]) for file in files) / 1e9


def measure(all_rows: list[int], *, rounds: int, calls: int) -> Times:
    """Asks all ways in turns."""
    torch.set_num_threads(1)
    most = max(all_rows)
    shape = (BATCHES, most, 3, SIZE, SIZE)
    images = torch.randint(256, shape, dtype=torch.uint8)
    opened: dict[str, contextlib.AbstractContextManager[Ask]] = {
        "in process": contextlib.nullcontext(make_teacher()),
        "websocket": over_websocket(most),
        "InferenceServer, thread": behind_inference_server("thread", most),
        "InferenceServer, process": behind_inference_server("process", most),
    }
    times: Times = {(name, rows): [] for rows in all_rows for name in opened}
    with contextlib.ExitStack() as stack:
        ways: dict[str, tuple[Ask, set[int]]] = {}
        for name, context in opened.items():
            before = {child.pid for child in multiprocessing.active_children()}
            ask = stack.enter_context(context)
            after = {child.pid for child in multiprocessing.active_children()}
            ways[name] = ask, {os.getpid(), *(after - before)}
        for turn in range(-1, rounds):  # the first one is for caches and connections
            for (name, rows), spent in times.items():
                ask, pids = ways[name]
                walls, answers = [], []
                used = processor_seconds(pids)
                for call in range(calls):
                    shown = images[call % BATCHES, :rows]
                    td = TensorDict({IMAGE: shown}, [rows])
                    start = time.perf_counter()
                    answers.append(ask(td)[CHUNK])
                    walls.append(time.perf_counter() - start)
                used = processor_seconds(pids) - used
                for call, answer in enumerate(answers):
                    expected = glance(images[call % BATCHES, :rows])
                    torch.testing.assert_close(answer, expected, rtol=0, atol=0)
                if turn >= 0:
                    median = statistics.median(walls)
                    spent.append(Round(median, min(walls), used / calls))
    return times


def table(times: Times) -> str:
    """The results in Markdown: medians over the rounds, in milliseconds."""
    lines = [
        "| images | asked | round trip | lowest - highest round | fastest call | "
        "more than in process | processors | images/s |",
        "| ---: | --- | ---: | ---: | ---: | ---: | ---: | ---: |",
    ]
    for (name, rows), spent in times.items():
        walls = [1e3 * one.wall for one in spent]
        median = statistics.median(walls)
        fastest = 1e3 * min(one.fastest for one in spent)
        used = 1e3 * statistics.median(one.processor for one in spent)
        more = "" if name == "in process" else f"{extra(times, name, rows):.1f}"
        lines.append(
            f"| {rows} | {name} | {median:.2f} | {min(walls):.2f} - {max(walls):.2f} | "
            f"{fastest:.2f} | {more} | {used:.1f} | {1e3 * rows / median:.0f} |"
        )
    return "\n".join(lines)


def extra(times: Times, name: str, rows: int) -> float:
    """Milliseconds above in process: the median over rounds of each one's difference."""
    pairs = zip(times[name, rows], times["in process", rows], strict=True)
    return 1e3 * statistics.median(there.wall - here.wall for there, here in pairs)


def main() -> None:
    """Measures and prints."""
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--rows", type=int, nargs="+", default=[1, 32, 128])
    parser.add_argument("--rounds", type=int, default=15)
    parser.add_argument("--calls", type=int, default=8, help="in a round")
    parser.add_argument("--out", type=Path, help="write the results there, too")
    args = parser.parse_args()

    busy = os.getloadavg()[0]
    times = measure(args.rows, rounds=args.rounds, calls=args.calls)
    busy = max(busy, os.getloadavg()[0])
    text = table(times)
    if BAR_ROWS in args.rows:
        more = extra(times, "websocket", BAR_ROWS)
        verdict = "met" if more <= BAR_MS else "missed"
        text += (
            f"\n\nBar: a websocket on loopback adds at most {BAR_MS:g} ms to {BAR_ROWS} "
            f"images: {more:.1f} ms, {verdict}."
        )
    text += (
        f"\n\n{args.rounds} rounds of {args.calls} calls; load average up to {busy:.1f}; "
        f"{machine_line('websockets', 'msgpack')}."
    )
    print(text)
    if args.out is not None:
        args.out.write_text(f"{text}\n")


if __name__ == "__main__":
    main()
