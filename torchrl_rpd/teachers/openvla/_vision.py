# Copyright (c) the torchrl_rpd authors.
#
# This source code is licensed under the MIT license found in the
# LICENSE file in the root directory of this source tree.
"""The two vision transformers of OpenVLA, named as in its checkpoints."""

from __future__ import annotations

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from torchrl_rpd.teachers.openvla._config import TowerConfig

IMAGE_SIZE = 224
_PATCH = 14
NUM_PATCHES = (IMAGE_SIZE // _PATCH) ** 2


class _Attention(nn.Module):
    def __init__(self, dim: int, num_heads: int) -> None:
        super().__init__()
        self.num_heads = num_heads
        self.qkv = nn.Linear(dim, 3 * dim)
        self.proj = nn.Linear(dim, dim)

    def forward(self, x: Tensor) -> Tensor:
        rows, tokens, dim = x.shape
        qkv = self.qkv(x).view(rows, tokens, 3, self.num_heads, dim // self.num_heads)
        q, k, v = qkv.permute(2, 0, 3, 1, 4).unbind(0)
        out = F.scaled_dot_product_attention(q, k, v)
        return self.proj(out.transpose(1, 2).reshape(rows, tokens, dim))


class _MLP(nn.Module):
    def __init__(self, dim: int, hidden: int) -> None:
        super().__init__()
        self.fc1 = nn.Linear(dim, hidden)
        self.fc2 = nn.Linear(hidden, dim)

    def forward(self, x: Tensor) -> Tensor:
        return self.fc2(F.gelu(self.fc1(x)))  # exact GELU in both towers


class _LayerScale(nn.Module):
    def __init__(self, dim: int) -> None:
        super().__init__()
        self.scale_factor = nn.Parameter(torch.ones(dim))

    def forward(self, x: Tensor) -> Tensor:
        return x * self.scale_factor


class _Block(nn.Module):
    def __init__(self, config: TowerConfig) -> None:
        super().__init__()
        dim = config.embed_dim
        self.norm1 = nn.LayerNorm(dim, eps=1e-6)
        self.attn = _Attention(dim, config.num_heads)
        self.ls1 = _LayerScale(dim) if config.layer_scale else nn.Identity()
        self.norm2 = nn.LayerNorm(dim, eps=1e-6)
        self.mlp = _MLP(dim, config.mlp_dim)
        self.ls2 = _LayerScale(dim) if config.layer_scale else nn.Identity()

    def forward(self, x: Tensor) -> Tensor:
        x = x + self.ls1(self.attn(self.norm1(x)))
        return x + self.ls2(self.mlp(self.norm2(x)))


class _PatchEmbed(nn.Module):
    def __init__(self, dim: int) -> None:
        super().__init__()
        self.proj = nn.Conv2d(3, dim, _PATCH, stride=_PATCH)

    def forward(self, pixels: Tensor) -> Tensor:
        return self.proj(pixels).flatten(2).transpose(1, 2)


class Tower(nn.Module):
    """A vision transformer up to its last block but one, without the final norm.

    That is what OpenVLA reads; the last block, the norm and SigLIP's pooling head are
    in the checkpoints but not built (:func:`unused_tensors`).

    Args:
        config (TowerConfig): the size.
    """

    def __init__(self, config: TowerConfig) -> None:
        super().__init__()
        dim = config.embed_dim
        if config.prefix_tokens:
            self.cls_token = nn.Parameter(torch.zeros(1, 1, dim))
            self.reg_token = nn.Parameter(torch.zeros(1, config.prefix_tokens - 1, dim))
        self.prefix_tokens = config.prefix_tokens
        self.pos_embed = nn.Parameter(torch.zeros(1, NUM_PATCHES, dim))
        self.patch_embed = _PatchEmbed(dim)
        self.blocks = nn.ModuleList(_Block(config) for _ in range(config.depth - 1))

    def forward(self, pixels: Tensor) -> Tensor:
        """Normalised pixels ``[B, 3, 224, 224]`` to patch features ``[B, 256, D]``."""
        x = self.patch_embed(pixels) + self.pos_embed
        if self.prefix_tokens:
            prefix = torch.cat([self.cls_token, self.reg_token], 1)
            x = torch.cat([prefix.expand(x.shape[0], -1, -1), x], 1)
        for block in self.blocks:
            x = block(x)
        return x[:, self.prefix_tokens :]


class VisionBackbone(nn.Module):
    """DINOv2 and SigLIP side by side, each with its own normalisation of the pixels.

    Args:
        towers (tuple of TowerConfig): their sizes.
    """

    def __init__(self, towers: tuple[TowerConfig, TowerConfig]) -> None:
        super().__init__()
        self.featurizer, self.fused_featurizer = map(Tower, towers)

    def forward(self, pixels: Tensor) -> Tensor:
        """Pixels ``[B, 6, 224, 224]``, three for each tower, to ``[B, 256, D1 + D2]``."""
        first, second = pixels.split(3, 1)
        return torch.cat([self.featurizer(first), self.fused_featurizer(second)], -1)


class Projector(nn.Module):
    """Patch features to the embedding space of the language model.

    Args:
        vision_dim (int): of both towers together.
        llm_dim (int): of the language model.
    """

    def __init__(self, vision_dim: int, llm_dim: int) -> None:
        super().__init__()
        self.fc1 = nn.Linear(vision_dim, 4 * vision_dim)
        self.fc2 = nn.Linear(4 * vision_dim, llm_dim)
        self.fc3 = nn.Linear(llm_dim, llm_dim)

    def forward(self, features: Tensor) -> Tensor:
        """``[B, 256, vision_dim]`` to ``[B, 256, llm_dim]``."""
        return self.fc3(F.gelu(self.fc2(F.gelu(self.fc1(features)))))


def unused_tensors(towers: tuple[TowerConfig, TowerConfig]) -> tuple[str, ...]:
    """Prefixes of the checkpoint's tensors that have no effect on the features.

    Examples:
        >>> from torchrl_rpd.teachers.openvla._config import OpenVLAConfig
        >>> unused_tensors(OpenVLAConfig().towers)[0]
        'vision_backbone.featurizer.blocks.23.'
    """
    names = ("vision_backbone.featurizer", "vision_backbone.fused_featurizer")
    prefixes = []
    for name, tower in zip(names, towers, strict=True):
        prefixes += [f"{name}.blocks.{tower.depth - 1}.", f"{name}.norm."]
    return (*prefixes, f"{names[1]}.attn_pool.")
