# Copyright (c) the torchrl_rpd authors.
#
# This source code is licensed under the MIT license found in the
# LICENSE file in the root directory of this source tree.
"""OpenVLA for :mod:`benchmarks.teacher_throughput`: batches against the original's loop.

Options: ``compile`` (towers and prefill) and ``cuda_graph`` (decoding).
"""

from __future__ import annotations

import tempfile
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from benchmarks._measure import INSTRUCTION, Timed, measure_batches
from torchrl_rpd.teachers.openvla import OpenVLATeacher, write_tiny_checkpoint
from torchrl_rpd.teachers.openvla._config import OpenVLAConfig, read_config
from torchrl_rpd.teachers.openvla._model import OpenVLAModel
from torchrl_rpd.teachers.openvla._prompt import Prompts
from torchrl_rpd.teachers.openvla._tiny import random_model
from torchrl_rpd.teachers.openvla._vision import NUM_PATCHES

NUM_TOKENS = 7


def flops_per_frame(model: OpenVLAModel, prompt: int) -> float:
    """Multiply-adds, times two, that one frame needs: nothing padded or wasted.

    Products with weights, and attention's own; causal attention counts half.
    """
    flops = 0.0
    towers = model.vision_backbone
    for tower in (towers.featurizer, towers.fused_featurizer):
        tokens = NUM_PATCHES + tower.prefix_tokens
        weights = sum(p.numel() for p in tower.blocks.parameters() if p.ndim == 2)
        dim = tower.pos_embed.shape[-1]
        flops += 2 * tokens * weights + 4 * len(tower.blocks) * tokens**2 * dim
        flops += 2 * NUM_PATCHES * tower.patch_embed.proj.weight.numel()
    weights = sum(p.numel() for p in model.projector.parameters() if p.ndim == 2)
    flops += 2 * NUM_PATCHES * weights
    llama = model.language_model
    layers = llama.model.layers
    weights = sum(p.numel() for p in layers.parameters() if p.ndim == 2)
    columns = NUM_PATCHES + prompt + NUM_TOKENS - 1  # the last token is not read
    dim = llama.config.hidden_size
    flops += 2 * columns * weights + 2 * len(layers) * columns**2 * dim
    return flops + 2 * NUM_TOKENS * llama.lm_head.weight.numel()


def build(
    *, device: torch.device, dtype: torch.dtype, tiny: bool, **options: bool
) -> OpenVLATeacher:
    """A teacher with random weights; its tokenizer is the tiny checkpoint's."""
    with tempfile.TemporaryDirectory() as name:
        folder = write_tiny_checkpoint(name)
        config = read_config(folder) if tiny else OpenVLAConfig()
        prompts = Prompts(
            Path(folder) / "tokenizer.json",
            bos_token_id=1,
            pad_token_id=32000,
            most_tokens=1024,
        )
    statistics = {"q01": [-1.0] * 7, "q99": [1.0] * 7, "mask": [True] * 7}
    model = random_model(config, device=device, dtype=dtype)
    teacher = OpenVLATeacher(
        model, prompts, statistics, config=config, instruction=INSTRUCTION, **options
    )
    return teacher.eval().to(device)


@torch.no_grad()
def original_loop(teacher: OpenVLATeacher, images: Tensor) -> Tensor:
    """One image after the other, as the original code does it.

    Pillow resizes, the cache grows with every token, the host waits for each action.
    """
    import numpy as np
    from PIL import Image
    from transformers import DynamicCache

    model = teacher.model
    device, dtype = teacher._weight.device, teacher._weight.dtype
    model.language_model.model.rotary_emb = _Rotary(model)
    ids = torch.tensor([teacher._prompts.ids(INSTRUCTION)], device=device)
    actions = []
    for image in images:
        small = Image.fromarray(image.permute(1, 2, 0).contiguous().cpu().numpy())
        small = np.asarray(small.resize((224, 224), Image.Resampling.BICUBIC)).copy()
        pixels = torch.from_numpy(small).permute(2, 0, 1).float().div(255)
        pixels = torch.cat([pixels, pixels]).to(device)
        pixels = pixels.sub(teacher._means).div(teacher._stds).to(dtype)
        patches = model.patches(pixels.unsqueeze(0))
        text = model.language_model.model.embed_tokens(ids)
        embeds = torch.cat([text[:, :1], patches, text[:, 1:]], 1)
        cache = DynamicCache()
        tokens = []
        out = model.language_model(
            inputs_embeds=embeds, past_key_values=cache, use_cache=True
        )
        for step in range(NUM_TOKENS):
            tokens.append(out.logits[:, -1].argmax(-1))
            if step < NUM_TOKENS - 1:
                out = model.language_model(
                    input_ids=tokens[-1][:, None], past_key_values=cache, use_cache=True
                )
        actions.append(teacher.decoder(torch.stack(tokens, 1)))
    return torch.cat(actions).unsqueeze(1)


class _Rotary(torch.nn.Module):
    """The model's rotary embeddings behind the interface that transformers calls."""

    def __init__(self, model: OpenVLAModel) -> None:
        super().__init__()
        self._call = model._rope

    def forward(self, hidden: Tensor, position_ids: Tensor) -> tuple[Tensor, Tensor]:
        return self._call(position_ids, hidden.dtype)


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
    chosen = {name: name in options for name in ("compile", "cuda_graph")}
    teacher = build(device=device, dtype=dtype, tiny=tiny, **chosen)

    def parts(images: Tensor, timed: Timed) -> dict[str, float]:
        prompts = teacher._prompts.batch([INSTRUCTION] * len(images), device)
        pixels = teacher.pixels(images)
        patches = teacher._patches(pixels)
        state = teacher._prefill(patches, prompts, num_tokens=NUM_TOKENS)

        def decode() -> Any:
            teacher.model.cache.rewind(state.columns)
            return teacher._decode(state, num_tokens=NUM_TOKENS)

        return {
            "resize": timed(lambda: teacher.pixels(images)),
            "towers": timed(lambda: teacher._patches(pixels)),
            "prefill": timed(
                lambda: teacher._prefill(patches, prompts, num_tokens=NUM_TOKENS)
            ),
            "decode": timed(decode),
        }

    prompt = len(teacher._prompts.ids(INSTRUCTION))
    return measure_batches(
        "openvla",
        teacher,
        batches,
        original_loop=lambda images: original_loop(teacher, images),
        parts=parts,
        flops=flops_per_frame(teacher.model, prompt),
        device=device,
        repeats=repeats,
    )
