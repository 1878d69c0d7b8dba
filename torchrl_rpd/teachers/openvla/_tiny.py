# Copyright (c) the torchrl_rpd authors.
#
# This source code is licensed under the MIT license found in the
# LICENSE file in the root directory of this source tree.
"""Random weights: a small checkpoint to try things with, a large model to time."""

from __future__ import annotations

import json
import os
from pathlib import Path
from typing import Any

import torch

from torchrl_rpd.teachers._hub import require
from torchrl_rpd.teachers.openvla._config import (
    SUPPORTED,
    SUPPORTED_IMAGES,
    OpenVLAConfig,
    read_config,
)
from torchrl_rpd.teachers.openvla._model import NUM_BINS, OpenVLAModel

_TINY_LLAMA = {
    "hidden_size": 24,
    "intermediate_size": 48,
    "model_type": "llama",
    "num_attention_heads": 4,
    "num_hidden_layers": 2,
    "pad_token_id": 32000,
    "vocab_size": 32064,
}
_TINY_TOWERS = {"embed_dim": 24, "depth": 3, "num_heads": 3}
_BINS = 7 * [1.0]
_TINY_STATISTICS = {
    "tiny": {
        "action": {
            "q01": [-bin for bin in _BINS],
            "q99": _BINS,
            "mask": [True, True, True, True, True, True, False],
        }
    }
}
_TEXT = (
    "In: What action should the robot take to pick up the red cube?\nOut:",
    "In: What action should the robot take to push the ball away from the base?\nOut:",
    "In: What action should the robot take to stack, pull, lift the peg upright?\nOut:",
)


def random_model(
    config: OpenVLAConfig,
    *,
    device: torch.device | str = "cpu",
    dtype: torch.dtype = torch.float32,
    seed: int = 0,
) -> OpenVLAModel:
    """A network with random weights, made where it is used.

    Weights are scaled so that activations stay of order one and the most probable
    tokens are actions that depend on the image.

    Args:
        config (OpenVLAConfig): the sizes.

    Keyword Args:
        device (device): of the weights.
        dtype (torch.dtype): of the weights.
        seed (int): of the generator; torch's global one is not touched.
    """
    with torch.device("meta"):
        model = OpenVLAModel(config).to(dtype)
    model = model.to_empty(device=device).requires_grad_(False).eval()
    generator = torch.Generator(device).manual_seed(seed)
    for name, weight in model.named_parameters():
        if name.endswith((".bias", "_token", "pos_embed")) or "embed_tokens" in name:
            weight.normal_(0.0, 0.3, generator=generator)
        elif weight.ndim == 1:  # scales of norms and branches
            weight.fill_(1.0)
        else:
            std = weight[0].numel() ** -0.5
            weight.normal_(0.0, 2 * std, generator=generator)
    head = model.language_model.lm_head.weight
    head[config.vocab_size - NUM_BINS : config.vocab_size] *= 4
    return model


def write_tiny_checkpoint(folder: str | os.PathLike[str], *, seed: int = 0) -> Path:
    """Writes a checkpoint with small random weights, in the published layout.

    For examples, tests and timing: :meth:`OpenVLATeacher.from_pretrained` loads it like
    a published one (6 MB instead of 15 GB), and its actions mean nothing.

    Args:
        folder (path): where to; made if it is not there.

    Keyword Args:
        seed (int): of the weights. Defaults to ``0``.

    Returns:
        the folder.

    Raises:
        ImportError: if transformers, tokenizers or safetensors are missing.

    Examples:
        >>> import tempfile
        >>> from torchrl_rpd.teachers.openvla import write_tiny_checkpoint
        >>> folder = write_tiny_checkpoint(tempfile.mkdtemp())
        >>> sorted(file.name for file in folder.iterdir())[:2]
        ['config.json', 'dataset_statistics.json']
    """
    folder = Path(folder)
    folder.mkdir(parents=True, exist_ok=True)
    defaults = OpenVLAConfig()
    files: dict[str, dict[str, Any]] = {
        "config.json": {
            **SUPPORTED,
            "pad_to_multiple_of": defaults.pad_to_multiple_of,
            "text_config": _TINY_LLAMA,
            "torch_dtype": "float32",
            "vision_overrides": _TINY_TOWERS,
        },
        "preprocessor_config.json": {
            **SUPPORTED_IMAGES,
            "means": defaults.means,
            "stds": defaults.stds,
        },
        "dataset_statistics.json": _TINY_STATISTICS,
    }
    for name, content in files.items():
        (folder / name).write_text(json.dumps(content, indent=1))
    _tokenizer().save(str(folder / "tokenizer.json"))
    model = random_model(read_config(folder), seed=seed)
    require("safetensors.torch").save_file(
        model.state_dict(), str(folder / "model.safetensors")
    )
    return folder


def _tokenizer() -> Any:
    """A byte-fallback BPE tokenizer of Llama's kind, trained on a few prompts."""
    tokenizers = require("tokenizers")
    tokenizer = tokenizers.Tokenizer(
        tokenizers.models.BPE(unk_token="<unk>", fuse_unk=True, byte_fallback=True)
    )
    tokenizer.normalizer = tokenizers.normalizers.Sequence(
        [
            tokenizers.normalizers.Prepend("▁"),
            tokenizers.normalizers.Replace(" ", "▁"),
        ]
    )
    special = ["<unk>", "<s>", "</s>", *(f"<0x{byte:02X}>" for byte in range(256))]
    trainer = tokenizers.trainers.BpeTrainer(
        vocab_size=400, special_tokens=special, show_progress=False
    )
    tokenizer.train_from_iterator(_TEXT, trainer)
    return tokenizer
