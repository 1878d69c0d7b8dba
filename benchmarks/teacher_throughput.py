# Copyright (c) the torchrl_rpd authors.
#
# This source code is licensed under the MIT license found in the
# LICENSE file in the root directory of this source tree.
"""Frames per second of an image teacher, and where the time goes.

    python -m benchmarks.teacher_throughput --teacher openvla
    python -m benchmarks.teacher_throughput --teacher openvla --tiny --device cpu

Every batch size is held against the loop over single images, as the original code runs
it, in the same process: ratios travel from machine to machine, seconds do not. Needs
neither a simulator nor a download: the weights are random (full size, or ``--tiny``).

Each teacher has a module ``benchmarks.throughput_<teacher>`` with one function::

    measure(
        batches: Sequence[int],
        *,
        device: torch.device,
        dtype: torch.dtype,
        tiny: bool,
        repeats: int,
        options: Sequence[str],
    ) -> list[dict[str, Any]]

that returns one dictionary for each batch size, with the keys

- ``teacher`` (str), ``batch`` (int);
- ``frames_per_second`` (float): of whole calls of the teacher, median of ``repeats``;
- ``loop_frames_per_second`` (float): of the loop over single images, the same for all
  batch sizes or measured beside each of them;
- ``parts`` (dict of str to float): seconds per call of each part, in order;
- ``flops_per_frame`` (float): the model's own multiply-adds, times two, of one frame;
- ``peak_memory`` (int or None): bytes allocated on the accelerator, weights included.

``options`` are free words of the teacher, e.g. ``compile``, given as ``--option``.
"""

from __future__ import annotations

import argparse
import importlib
import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch

from benchmarks._measure import seconds
from benchmarks.machine import machine_line

DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16}


def product_rate(device: torch.device, dtype: torch.dtype, size: int) -> float:
    """Operations per second of a ``size``-cubed matrix product, median of 20."""
    a, b = (torch.randn(size, size, device=device, dtype=dtype) for _ in range(2))
    return 2 * size**3 / seconds(lambda: a @ b, device=device, repeats=20)


def report(rows: Sequence[dict[str, Any]], rate: float) -> str:
    """The results as a Markdown table."""
    parts = list(rows[0]["parts"])
    header = ["batch", "frames/s", "loop", "ratio", *(f"{p} ms" for p in parts)]
    header += ["of the product", "memory GiB"]
    lines = [" | ".join(header), " | ".join("---" for _ in header)]
    for row in rows:
        fps, loop = row["frames_per_second"], row["loop_frames_per_second"]
        memory = row["peak_memory"]
        cells = [str(row["batch"]), f"{fps:.1f}", f"{loop:.1f}", f"{fps / loop:.2f}"]
        cells += [f"{1000 * row['parts'][part]:.1f}" for part in parts]
        cells.append(f"{fps * row['flops_per_frame'] / rate:.1%}")
        cells.append("" if memory is None else f"{memory / 2**30:.1f}")
        lines.append(" | ".join(cells))
    return "\n".join(f"| {line} |" for line in lines)


def main() -> None:
    """Measures and prints."""
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--teacher", choices=["openvla", "octo"], default="openvla")
    parser.add_argument("--batch", type=int, nargs="+", default=[1, 8, 32, 64, 128])
    parser.add_argument(
        "--device", default="cuda" if torch.cuda.is_available() else "cpu"
    )
    parser.add_argument(
        "--dtype", choices=DTYPES, help="bfloat16 on CUDA, float32 elsewhere"
    )
    parser.add_argument("--tiny", action="store_true", help="a few layers, small")
    parser.add_argument("--repeats", type=int, default=5)
    parser.add_argument("--option", nargs="*", default=[], help="words of the teacher")
    parser.add_argument("--json", type=Path, help="write the numbers there, too")
    args = parser.parse_args()

    device = torch.device(args.device)
    on_cuda = device.type == "cuda"
    dtype = DTYPES[args.dtype or ("bfloat16" if on_cuda else "float32")]
    torch.manual_seed(0)
    name = f", {torch.cuda.get_device_name(device)}" if on_cuda else ""
    print(f"{args.teacher}{' (tiny)' if args.tiny else ''}{name}, {dtype}, ", end="")
    print(f"{torch.get_num_threads()} threads, {machine_line()}")
    size = 8192 if on_cuda else 1024
    rate = product_rate(device, dtype, size)
    print(f"{size}-cubed product: {rate / 1e12:.3f} TFLOP/s (median of 20)\n")

    module = importlib.import_module(f"benchmarks.throughput_{args.teacher}")
    rows = module.measure(
        args.batch,
        device=device,
        dtype=dtype,
        tiny=args.tiny,
        repeats=args.repeats,
        options=args.option,
    )
    print(report(rows, rate))
    if args.json is not None:
        args.json.write_text(json.dumps({"product_rate": rate, "rows": rows}, indent=1))


if __name__ == "__main__":
    main()
