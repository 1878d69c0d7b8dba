# Copyright (c) the torchrl_rpd authors.
#
# This source code is licensed under the MIT license found in the
# LICENSE file in the root directory of this source tree.
"""What :mod:`benchmarks.teacher_throughput` measures of any image teacher."""

from __future__ import annotations

import statistics
import time
from collections.abc import Callable, Sequence
from typing import Any

import torch
from tensordict import TensorDict
from torch import Tensor, nn

INSTRUCTION = "push the cube away from the robot base"
IMAGE_SIZE = 256
LOOPED_IMAGES = 4  # per repetition of the loop

Timed = Callable[[Callable[[], Any]], float]  # seconds of a call


def seconds(
    function: Callable[[], Any], *, device: torch.device, repeats: int
) -> float:
    """Median wall-clock time of a call, its work on the device included."""

    def wait() -> None:
        if device.type == "cuda":
            torch.cuda.synchronize(device)

    function()  # allocations, compilation, caches
    times = []
    for _ in range(repeats):
        wait()
        start = time.perf_counter()
        function()
        wait()
        times.append(time.perf_counter() - start)
    return statistics.median(times)


def random_images(count: int, device: torch.device) -> Tensor:
    """uint8 ``[count, 3, 256, 256]``, the same in every run."""
    generator = torch.Generator().manual_seed(0)
    shape = (count, 3, IMAGE_SIZE, IMAGE_SIZE)
    images = torch.randint(256, shape, dtype=torch.uint8, generator=generator)
    return images.to(device)


def measure_batches(
    name: str,
    teacher: nn.Module,
    batches: Sequence[int],
    *,
    original_loop: Callable[[Tensor], Any],
    parts: Callable[[Tensor, Timed], dict[str, float]],
    flops: float,
    device: torch.device,
    repeats: int,
) -> list[dict[str, Any]]:
    """One row of the table for each batch size.

    Args:
        name (str): of the teacher.
        teacher (nn.Module): reads ``("observation", "image")``.
        batches (sequence of int): batch sizes.

    Keyword Args:
        original_loop (callable): asks about single images, one after the other.
        parts (callable): given images and a stopwatch, the seconds of each part of a
            call, in order; called without gradients.
        flops (float): of one frame.
        device (torch.device): where the teacher is.
        repeats (int): of each measurement.
    """
    everything = random_images(max(batches), device)
    looped = everything[:LOOPED_IMAGES]
    on_cuda = device.type == "cuda"

    def timed(function: Callable[[], Any]) -> float:
        return seconds(function, device=device, repeats=repeats)

    rows = []
    for batch in batches:
        if on_cuda:
            torch.cuda.reset_peak_memory_stats(device)
        images = everything[:batch]
        td = TensorDict({"observation": {"image": images}}, [batch], device=device)
        # Beside each other, so that a busy machine slows both.
        loop = timed(lambda: original_loop(looped)) / looped.shape[0]
        whole = timed(lambda td=td: teacher(td.copy()))
        with torch.no_grad():
            spent = parts(images, timed)
        peak = torch.cuda.max_memory_allocated(device) if on_cuda else None
        rows.append(
            {
                "teacher": name,
                "batch": batch,
                "frames_per_second": batch / whole,
                "loop_frames_per_second": 1 / loop,
                "parts": spent,
                "flops_per_frame": flops,
                "peak_memory": peak,
            }
        )
    return rows
