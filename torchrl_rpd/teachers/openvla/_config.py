# Copyright (c) the torchrl_rpd authors.
#
# This source code is licensed under the MIT license found in the
# LICENSE file in the root directory of this source tree.
"""What a checkpoint's JSON files say, and which of it this code can honour."""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

# The published checkpoints leave out every field that equals transformers' default, and
# defaults may change: pinned here. (Llama-2 itself has rms_norm_eps 1e-5; OpenVLA was
# trained with the class default.)
_LLAMA_7B: dict[str, Any] = {
    "attention_bias": False,
    "bos_token_id": 1,
    "eos_token_id": 2,
    "hidden_act": "silu",
    "hidden_size": 4096,
    "intermediate_size": 11008,
    "max_position_embeddings": 2048,
    "mlp_bias": False,
    "num_attention_heads": 32,
    "num_hidden_layers": 32,
    "pad_token_id": 32000,
    "rms_norm_eps": 1e-6,
    "rope_theta": 10000.0,
    "tie_word_embeddings": False,
    "vocab_size": 32064,
}
# Say how the weights were stored or used in training, not what the network is.
_LLAMA_IGNORED = {
    "_name_or_path",
    "architectures",
    "attention_dropout",
    "dtype",
    "head_dim",
    "initializer_range",
    "model_type",
    "num_key_value_heads",
    "pretraining_tp",
    "rope_scaling",
    "torch_dtype",
    "transformers_version",
    "use_cache",
}
# Whose other values would need other code.
_LLAMA_FIXED = (
    "attention_bias",
    "hidden_act",
    "mlp_bias",
    "rope_theta",
    "tie_word_embeddings",
)

# What the code in this package does; another value means another model.
SUPPORTED: dict[str, Any] = {
    "model_type": "openvla",
    "arch_specifier": "no-align+fused-gelu-mlp",
    "vision_backbone_id": "dinosiglip-vit-so-224px",
    "timm_model_ids": [
        "vit_large_patch14_reg4_dinov2.lvd142m",
        "vit_so400m_patch14_siglip_224",
    ],
    "timm_override_act_layers": [None, None],
    "use_fused_vision_backbone": True,
    "image_resize_strategy": "resize-naive",
    "image_sizes": [224, 224],
    "llm_backbone_id": "llama2-7b-pure",
    "n_action_bins": 256,
}
SUPPORTED_IMAGES: dict[str, Any] = {
    "image_resize_strategy": "resize-naive",
    "input_sizes": [[3, 224, 224], [3, 224, 224]],
    "interpolations": ["bicubic", "bicubic"],
    "use_fused_vision_backbone": True,
}
_WHY = {
    "llm_backbone_id": "checkpoints on Vicuna ('v01') use another prompt",
    "image_resize_strategy": "only plain resizing to a square is implemented",
}


@dataclass(frozen=True)
class TowerConfig:
    """Size and kind of one vision transformer (patches of 14, images of 224).

    Attributes:
        embed_dim (int): width.
        depth (int): blocks of the original tower; the last one is not used.
        num_heads (int): attention heads.
        mlp_dim (int): hidden width of the MLPs.
        prefix_tokens (int): class and register tokens before the patches.
        layer_scale (bool): whether branches are scaled (DINOv2) or not (SigLIP).
    """

    embed_dim: int
    depth: int
    num_heads: int
    mlp_dim: int
    prefix_tokens: int
    layer_scale: bool


_DINO = TowerConfig(1024, 24, 16, 4096, prefix_tokens=5, layer_scale=True)
_SIGLIP = TowerConfig(1152, 27, 16, 4304, prefix_tokens=0, layer_scale=False)
_SIGLIP_MLP_RATIO = 3.7362


@dataclass(frozen=True)
class OpenVLAConfig:
    """A network of OpenVLA's kind; the defaults are the published 7B one.

    Attributes:
        towers (tuple of TowerConfig): DINOv2 and SigLIP.
        llama (dict): arguments of transformers' ``LlamaConfig``.
        pad_to_multiple_of (int): rows of the vocabulary that stand for no token.
        means (tuple of tuple of float): of the pixels in [0, 1], for each tower.
        stds (tuple of tuple of float): likewise.
        dtype (str): in which the weights were saved.
        norm_stats (dict): statistics of the training sets, by their names.

    Examples:
        >>> config = OpenVLAConfig()
        >>> config.vocab_size, config.llama["rms_norm_eps"]
        (32000, 1e-06)
    """

    towers: tuple[TowerConfig, TowerConfig] = (_DINO, _SIGLIP)
    llama: dict[str, Any] = field(default_factory=lambda: dict(_LLAMA_7B))
    pad_to_multiple_of: int = 64
    means: tuple[tuple[float, ...], ...] = ((0.485, 0.456, 0.406), (0.5, 0.5, 0.5))
    stds: tuple[tuple[float, ...], ...] = ((0.229, 0.224, 0.225), (0.5, 0.5, 0.5))
    dtype: str = "bfloat16"
    norm_stats: dict[str, Any] = field(default_factory=dict)

    @property
    def vocab_size(self) -> int:
        """Token ids that stand for text or actions; the last 256 are the actions."""
        return int(self.llama["vocab_size"]) - self.pad_to_multiple_of


def read_config(folder: Path, name: str | None = None) -> OpenVLAConfig:
    """Reads ``config.json``, ``preprocessor_config.json``, ``dataset_statistics.json``.

    Args:
        folder (path): of the checkpoint.
        name (str, optional): of the checkpoint, where it differs from the folder's (the
            Hub's cache names folders by commits).

    Raises:
        FileNotFoundError: if one of the first two is missing.
        ValueError: if the checkpoint asks for something that is not implemented.
    """
    raw = read_json(folder / "config.json")
    _demand(raw, SUPPORTED, folder / "config.json")
    name = name or folder.name
    if "v01" in name:  # the original decides by the name, too
        raise ValueError(
            f"{name} is a checkpoint of version v01, trained with Vicuna's prompt; only "
            "the later prompt ('In: What action should the robot take to ...') is "
            "implemented."
        )
    images = read_json(folder / "preprocessor_config.json")
    _demand(images, SUPPORTED_IMAGES, folder / "preprocessor_config.json")
    if images.get("tvf_do_letterbox"):
        raise ValueError(f"{folder}/preprocessor_config.json asks for letterboxing.")
    return OpenVLAConfig(
        towers=_towers(raw.get("vision_overrides")),
        llama=_llama(raw.get("text_config", {}), folder / "config.json"),
        pad_to_multiple_of=raw.get("pad_to_multiple_of", 64),
        means=tuple(map(tuple, images["means"])),
        stds=tuple(map(tuple, images["stds"])),
        dtype=raw.get("torch_dtype", "bfloat16"),
        norm_stats=_norm_stats(raw, folder),
    )


def read_json(path: Path) -> dict[str, Any]:
    """Reads a file of the checkpoint."""
    if not path.is_file():
        raise FileNotFoundError(
            f"{path.parent} holds no {path.name}: not an OpenVLA checkpoint in the "
            "published layout, or not all of it was downloaded."
        )
    return json.loads(path.read_text(encoding="utf-8"))


def _demand(found: Mapping[str, Any], wanted: Mapping[str, Any], file: Path) -> None:
    for name, value in wanted.items():
        if name in found and found[name] == value:
            continue
        what = repr(found[name]) if name in found else "nothing"
        why = f" ({_WHY[name]})" if name in _WHY else ""
        raise ValueError(
            f"{file} has {what} for {name!r}; OpenVLATeacher implements {value!r} "
            f"only{why}."
        )


def _towers(overrides: Mapping[str, int] | None) -> tuple[TowerConfig, TowerConfig]:
    """Published sizes, or small ones for tests (a field of ours in config.json)."""
    if overrides is None:
        return _DINO, _SIGLIP
    dim, depth, heads = (overrides[k] for k in ("embed_dim", "depth", "num_heads"))
    siglip_mlp = int(dim * _SIGLIP_MLP_RATIO)
    return (
        TowerConfig(dim, depth, heads, 4 * dim, prefix_tokens=5, layer_scale=True),
        TowerConfig(dim, depth, heads, siglip_mlp, prefix_tokens=0, layer_scale=False),
    )


def _llama(text: Mapping[str, Any], file: Path) -> dict[str, Any]:
    llama = {**_LLAMA_7B, **{k: v for k, v in text.items() if k in _LLAMA_7B}}
    unknown = sorted(set(text) - set(_LLAMA_7B) - _LLAMA_IGNORED)
    heads = llama["num_attention_heads"]
    head_dim = llama["hidden_size"] // heads
    refused = {
        "model_type": (text.get("model_type", "llama"), "llama"),
        "rope_scaling": (text.get("rope_scaling"), None),
        "num_key_value_heads": (text.get("num_key_value_heads", heads), heads),
        "head_dim": (text.get("head_dim") or head_dim, head_dim),
        **{name: (llama[name], _LLAMA_7B[name]) for name in _LLAMA_FIXED},
    }
    for name, (found, wanted) in refused.items():
        if found != wanted:
            raise ValueError(
                f"{file} has {found!r} for {name!r} of the language model; "
                f"OpenVLATeacher implements {wanted!r} only."
            )
    if unknown:
        raise ValueError(
            f"{file} has fields of the language model that are not known: {unknown}."
        )
    return llama


def _norm_stats(raw: Mapping[str, Any], folder: Path) -> dict[str, Any]:
    # A fine-tuned checkpoint keeps the base model's statistics in config.json; its own
    # are in the file, which wins (as in the original).
    own = folder / "dataset_statistics.json"
    return read_json(own) if own.is_file() else dict(raw.get("norm_stats") or {})
