# Copyright (c) the torchrl_rpd authors.
#
# This source code is licensed under the MIT license found in the
# LICENSE file in the root directory of this source tree.
"""Checkpoints with random weights in the published layout: for tests and measurements."""

from __future__ import annotations

import json
import math
import os
import zlib
from dataclasses import replace
from pathlib import Path
from typing import Any, Literal, get_args

import torch
from torch import Tensor

from torchrl_rpd.teachers._hub import require
from torchrl_rpd.teachers.octo._checkpoint import save_copy
from torchrl_rpd.teachers.octo._config import OctoConfig, T5Config
from torchrl_rpd.teachers.octo._msgpack import write_arrays
from torchrl_rpd.teachers.octo._weights import array_shapes, to_state_dict

Size = Literal["tiny", "small", "base"]

# Octo's transformer sizes (components/transformer.py), and one for tests.
_SIZES = {
    "tiny": {"width": 48, "layers": 2, "heads": 4, "mlp": 96},
    "small": {"width": 384, "layers": 12, "heads": 6, "mlp": 1536},
    "base": {"width": 768, "layers": 12, "heads": 12, "mlp": 3072},
}
_TINY_T5 = T5Config(
    d_model=16, d_kv=8, d_ff=32, num_layers=2, num_heads=2, vocab_size=256
)
_STEP = 1000


def write_random_checkpoint(
    folder: str | os.PathLike[str],
    size: Size = "tiny",
    *,
    layout: Literal["msgpack", "safetensors"] = "safetensors",
    seed: int = 0,
) -> Path:
    """Writes an Octo checkpoint whose weights mean nothing.

    It has everything that :meth:`OctoTeacher.from_pretrained` reads, a tokenizer of
    characters included, so that a whole run can be tried without a download, and the
    speed of the real sizes be measured. Its actions are noise.

    Args:
        folder (str or path): where to; made where it is missing.
        size ("tiny", "small" or "base"): the sizes of octo-small-1.5 and octo-base-1.5,
            or 5 MB. Defaults to ``"tiny"``.

    Keyword Args:
        layout ("msgpack" or "safetensors"): as Octo saves it (needs msgpack), or as
            ``python -m torchrl_rpd.teachers.octo.convert`` writes it. Defaults to
            ``"safetensors"``.
        seed (int): of the weights. Defaults to ``0``.

    Returns:
        the folder.

    Examples:
        >>> import tempfile
        >>> from torchrl_rpd.teachers.octo import write_random_checkpoint
        >>> folder = write_random_checkpoint(tempfile.mkdtemp())
        >>> sorted(file.name for file in folder.iterdir())[:2]
        ['config.json', 'dataset_statistics.json']
    """
    if size not in get_args(Size):
        raise ValueError(f"size must be one of {get_args(Size)}, got {size!r}.")
    folder = Path(folder)
    folder.mkdir(parents=True, exist_ok=True)
    (folder / "config.json").write_text(json.dumps(published_config(size)))
    statistics = {
        "mean": [0.0] * 7,
        "std": [0.3] * 7,
        "mask": [True] * 6 + [False],
        "min": [-1.0] * 7,
        "max": [1.0] * 7,
    }
    (folder / "dataset_statistics.json").write_text(json.dumps({"action": statistics}))
    _tokenizer().save(str(folder / "tokenizer.json"))
    config = random_config(size)
    arrays = {
        name: _random(name, shape, seed) for name, shape in array_shapes(config).items()
    }
    _let_denoise(arrays)
    if layout == "msgpack":
        write_arrays(folder / str(_STEP) / "default" / "checkpoint", arrays)
    else:
        save_copy(folder, config, to_state_dict(arrays, config), _STEP)
    return folder


def random_config(size: Size) -> OctoConfig:
    """The configuration of a size, text encoder included."""
    config = OctoConfig.from_json(published_config(size))
    return replace(config, text=_TINY_T5) if size == "tiny" else config


def published_config(size: Size) -> dict[str, Any]:
    """What config.json says in the 1.5 releases, as far as it is about the model."""
    sizes = _SIZES[size]
    return {
        "model": {
            "observation_tokenizers": {
                camera: _spec(
                    "tokenizers:ImageTokenizer",
                    obs_stack_keys=[f"image_{camera}"],
                    task_stack_keys=[f"image_{camera}"],
                    encoder=_spec("vit_encoders:SmallStem16"),
                )
                for camera in ("primary", "wrist")
            },
            "task_tokenizers": {
                "language": _spec(
                    "tokenizers:LanguageTokenizer",
                    encoder="t5-base",
                    finetune_encoder=False,
                )
            },
            "heads": {
                "action": _spec(
                    "action_heads:DiffusionActionHead",
                    readout_key="readout_action",
                    use_map=False,
                    action_horizon=4,
                    action_dim=7,
                    n_diffusion_samples=1,
                    dropout_rate=0.0,
                )
            },
            "readouts": {"action": 1},
            "token_embedding_size": sizes["width"],
            "max_horizon": 10,
            "repeat_task_tokens": True,
            "use_correct_attention": True,
            "transformer_kwargs": {
                "num_layers": sizes["layers"],
                "mlp_dim": sizes["mlp"],
                "num_attention_heads": sizes["heads"],
                "dropout_rate": 0.0,
                "attention_dropout_rate": 0.0,
                "add_position_embedding": False,
            },
        },
        "text_processor": {
            **_spec("text_processing:HFTokenizer"),
            "kwargs": {
                "encode_with_model": False,
                "tokenizer_name": "t5-base",
                "tokenizer_kwargs": {
                    "max_length": 16,
                    "padding": "max_length",
                    "return_tensors": "np",
                    "truncation": True,
                },
            },
        },
        "window_size": 2,
    }


def _spec(path: str, **kwargs: Any) -> dict[str, Any]:
    module, name = path.split(":")
    module = f"octo.model.components.{module}"
    return {"module": module, "name": name, "args": [], "kwargs": kwargs}


def _random(name: str, shape: tuple[int, ...], seed: int) -> Tensor:
    """Weights that keep signals at their size; each array has a seed of its own."""
    generator = torch.Generator().manual_seed(seed + zlib.crc32(name.encode()))
    z = torch.randn(shape, generator=generator)
    leaf = name.rsplit("/", 1)[-1]
    if leaf in ("scale", "weight"):
        return 1.0 + 0.1 * z
    if leaf in ("bias", "embedding") or leaf.endswith("_embedding"):
        return 0.1 * z
    # An attention's output kernel is [heads, size, width], its inputs' [width, ...].
    split = "DotProductAttention_0" in name and "/out/" not in name
    inputs = shape[0] if split else math.prod(shape[:-1])
    return z / math.sqrt(inputs)


def _let_denoise(arrays: dict[str, Tensor]) -> None:
    """Makes the head roughly return the noise it is given.

    With random weights alone the denoising diverges: every action is +5 or -5. Here two
    hidden units carry each action, x and -x, and swish(x) - swish(-x) = x.
    """
    net = "heads_action/diffusion_model/reverse_network"
    inner, outer = arrays[f"{net}/Dense_0/kernel"], arrays[f"{net}/Dense_1/kernel"]
    actions = outer.shape[1]
    pair = torch.cat([torch.eye(actions), -torch.eye(actions)], 1)
    inner[-actions:] = 0.0
    inner[-actions:, : 2 * actions] = pair
    outer *= 0.3
    outer[: 2 * actions] = pair.T
    for name, array in arrays.items():
        if name.startswith(f"{net}/MLPResNetBlock") and name.endswith("1/kernel"):
            array *= 0.1


def _tokenizer() -> Any:
    """Like T5's: <pad> is 0, </s> is 1 and ends every text; one token a character."""
    tokenizers = require("tokenizers", extra="octo")
    characters = " abcdefghijklmnopqrstuvwxyzABCDEFGHIJKLMNOPQRSTUVWXYZ0123456789.,'-"
    pieces = [("<pad>", 0.0), ("</s>", 0.0), ("<unk>", 0.0)]
    pieces += [(character.replace(" ", "▁"), -1.0) for character in characters]
    tokenizer = tokenizers.Tokenizer(tokenizers.models.Unigram(pieces, unk_id=2))
    tokenizer.pre_tokenizer = tokenizers.pre_tokenizers.Metaspace()
    tokenizer.post_processor = tokenizers.processors.TemplateProcessing(
        single="$A </s>", special_tokens=[("</s>", 1)]
    )
    return tokenizer
