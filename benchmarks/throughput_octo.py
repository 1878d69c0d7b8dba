# Copyright (c) the torchrl_rpd authors.
#
# This source code is licensed under the MIT license found in the
# LICENSE file in the root directory of this source tree.
"""Octo for :mod:`benchmarks.teacher_throughput`: batches against the original's loop.

    python -m benchmarks.teacher_throughput --teacher octo --batch 1 8 32 64 128 256
    python -m benchmarks.teacher_throughput --teacher octo --tiny --device cpu

Full size is octo-base-1.5 (random weights). Also prints how long reading the checkpoint
takes, as published (flax msgpack) and as the converted copy. No options.
"""

from __future__ import annotations

import statistics
import tempfile
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from benchmarks._measure import IMAGE_SIZE, INSTRUCTION, Timed, measure_batches
from torchrl_rpd.teachers.octo import OctoTeacher, write_random_checkpoint
from torchrl_rpd.teachers.octo._checkpoint import load_checkpoint
from torchrl_rpd.teachers.octo._model import OctoModel
from torchrl_rpd.teachers.octo.convert import convert


def flops_per_frame(model: OctoModel) -> float:
    """Multiply-adds, times two, that one frame needs: nothing padded or wasted.

    The text encoder is left out: it runs once per instruction.
    """
    config = model.config
    flops, side = 0.0, IMAGE_SIZE
    stem = model.stems["primary"]
    for conv in stem.convs:
        side //= 2
        flops += 2 * side**2 * conv.weight.numel()
    images = side**2
    flops += 2 * images * stem.embedding.weight.numel()
    flops += 2 * images * model.projections["primary"].weight.numel()
    text = config.text_length
    flops += 2 * text * model.text_projection.weight.numel()
    tokens = text + images + text + 1
    # Of the last block only the readout's row is needed, and every key and value.
    rows = [tokens] * (config.num_layers - 1) + [1]
    for block, asking in zip(model.transformer.blocks, rows, strict=True):
        weights = sum(p.numel() for p in block.parameters() if p.ndim == 2)
        keys = block.key_value.weight.numel()
        flops += 2 * asking * (weights - keys) + 2 * tokens * keys
        flops += 4 * asking * tokens * config.width
    head = model.head
    per_step = (
        head.output.weight.numel() + config.head.hidden_dim * head.output.out_features
    )
    per_step += sum(p.numel() for p in head.blocks.parameters() if p.ndim == 2)
    return flops + 2 * config.head.diffusion_steps * per_step


@torch.no_grad()
def original_loop(teacher: OctoTeacher, images: Tensor) -> Tensor:
    """One image after the other, as the released code's server calls Octo.

    The text encoder runs at every call, the last block for all tokens, and the time
    features and the readout go through the head's first layer in all 20 steps.
    """
    model, head = teacher.model, teacher.model.head
    device = images.device
    draws = []
    for image in images:
        ids, mask = (t.to(device) for t in teacher._tokenize([INSTRUCTION]))
        text = model.encode_text(ids, mask)
        everything = torch.arange(2 * ids.shape[1] + 257, device=device)
        model._masks[(1, 256, device)] = (model._mask(1, 256, device)[0], everything)
        readout = model.readouts({"primary": image[None, None]}, text)[:, -1]
        del model._masks[(1, 256, device)]
        noise = teacher._noise(21, (), readout[:, 0])
        x = noise[0]
        for z, step in zip(noise[1:], reversed(range(20)), strict=True):
            scale, share, spread = head._steps[step]
            time_step = torch.full((1,), step, device=device)
            x = scale * (x - share * head.eps(readout[:, 0], x, time_step))
            x = (x + (step > 0) * spread * z).clamp(-5, 5)
        draws.append(teacher.normalisation(x.view(1, 4, 7)))
    return torch.cat(draws)


def measure_loading(folder: Path) -> None:
    """Prints the time to read both forms of the same checkpoint, median of 3."""
    copy = convert(folder, folder / "copy")
    times = {}
    for name, source in (("msgpack", folder), ("safetensors", copy)):
        taken = []
        for _ in range(3):
            start = time.perf_counter()
            state = load_checkpoint(source).state
            # Files are mapped lazily: only what is looked at has been read.
            for tensor in state.values():
                tensor.sum()
            taken.append(time.perf_counter() - start)
        times[name] = statistics.median(taken)
    size = (copy / "model.safetensors").stat().st_size / 1e6
    print(
        f"reading {size:.0f} MB: msgpack {times['msgpack']:.3f} s, safetensors "
        f"{times['safetensors']:.3f} s ({times['msgpack'] / times['safetensors']:.1f}x)\n"
    )


def measure(
    batches: Sequence[int],
    *,
    device: torch.device,
    dtype: torch.dtype,
    tiny: bool,
    repeats: int,
    options: Sequence[str],
) -> list[dict[str, Any]]:
    """See :mod:`benchmarks.teacher_throughput`."""
    if options:
        raise SystemExit(f"throughput_octo has no options, got {list(options)}.")
    with tempfile.TemporaryDirectory() as name:
        folder = write_random_checkpoint(
            name, "tiny" if tiny else "base", layout="msgpack"
        )
        measure_loading(folder)
        teacher = OctoTeacher.from_pretrained(
            folder / "copy", instruction=INSTRUCTION, device=device, dtype=dtype
        )
    model = teacher.model
    text, _ = teacher._texts([INSTRUCTION])

    def parts(images: Tensor, timed: Timed) -> dict[str, float]:
        shown = {"primary": images.unsqueeze(1)}
        given: list[Any] = []
        hook = model.transformer.register_forward_pre_hook(
            lambda module, args: given.extend(args)
        )
        readout = model.readouts(shown, text)[:, -1, 0]
        hook.remove()
        noise = teacher._noise(21, (), readout)
        return {
            "stem": timed(lambda: model._camera("primary", shown["primary"])),
            "transformer": timed(lambda: model.transformer(*given)),
            "diffusion": timed(lambda: model.head.sample(readout, noise[0], noise[1:])),
        }

    return measure_batches(
        "octo",
        teacher,
        batches,
        original_loop=lambda images: original_loop(teacher, images),
        parts=parts,
        flops=flops_per_frame(model),
        device=device,
        repeats=repeats,
    )
