# Copyright (c) the torchrl_rpd authors.
#
# This source code is licensed under the MIT license found in the
# LICENSE file in the root directory of this source tree.
"""OpenVLA's network: two towers, a projector, Llama, and a greedy decoder of actions."""

from __future__ import annotations

from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from torchrl_rpd.teachers._hub import require
from torchrl_rpd.teachers.openvla._cache import StaticKVCache
from torchrl_rpd.teachers.openvla._config import OpenVLAConfig
from torchrl_rpd.teachers.openvla._prompt import PromptBatch
from torchrl_rpd.teachers.openvla._vision import (
    NUM_PATCHES,
    Projector,
    VisionBackbone,
)

NUM_BINS = 256


class Prefilled(NamedTuple):
    """The state after image and prompt, from which actions are decoded.

    Attributes:
        logits (torch.Tensor): ``[B, V]`` of the first action token.
        rope (tuple of torch.Tensor): cosines and sines of the positions to come,
            ``[B or 1, steps, head_dim]``.
        visible (torch.Tensor, optional): bool ``[B, columns]``, columns that are not
            padding; None where none is.
        columns (int): that are filled.
    """

    logits: Tensor
    rope: tuple[Tensor, Tensor]
    visible: Tensor | None
    columns: int


class Decoded(NamedTuple):
    """Actions as tokens.

    Attributes:
        tokens (torch.Tensor): int64 ``[B, A]``, ids of the vocabulary.
        logits (torch.Tensor): ``[B, A, 256]`` of the action ids at each step.
    """

    tokens: Tensor
    logits: Tensor


class OpenVLAModel(nn.Module):
    """OpenVLA's network, batched.

    Tensors are named as in the published checkpoints. Rows of different prompts are
    padded between image and prompt, and the padding is masked: every row gets what it
    gets alone.

    Args:
        config (OpenVLAConfig): the sizes.

    Raises:
        ImportError: if transformers is not installed.
    """

    def __init__(self, config: OpenVLAConfig) -> None:
        super().__init__()
        transformers = require("transformers")
        llama = transformers.LlamaConfig(**config.llama, attn_implementation="sdpa")
        self.vision_backbone = VisionBackbone(config.towers)
        self.projector = Projector(
            sum(tower.embed_dim for tower in config.towers), llama.hidden_size
        )
        self.language_model = transformers.LlamaForCausalLM(llama)
        # Computed here: its buffers, which no checkpoint holds, would stay on meta.
        self.language_model.model.rotary_emb = nn.Identity()
        self.rope_theta = float(config.llama["rope_theta"])
        self.vocab_size = config.vocab_size
        self.cache = StaticKVCache(
            llama.num_hidden_layers,
            llama.num_key_value_heads,
            llama.hidden_size // llama.num_attention_heads,
        )

    def patches(self, pixels: Tensor) -> Tensor:
        """Normalised pixels ``[B, 6, 224, 224]`` to image tokens ``[B, 256, D]``."""
        return self.projector(self.vision_backbone(pixels))

    def prefill(
        self, patches: Tensor, prompts: PromptBatch, *, num_tokens: int
    ) -> Prefilled:
        """Reads image and prompt.

        Args:
            patches (torch.Tensor): image tokens ``[B, 256, D]``.
            prompts (PromptBatch): of the same rows.

        Keyword Args:
            num_tokens (int): that will be decoded.
        """
        llama = self.language_model.model
        text = llama.embed_tokens(prompts.ids)
        hidden = torch.cat([text[:, :1], patches.to(text), text[:, 1:]], 1)
        rows, columns = hidden.shape[:2]
        total = columns + num_tokens - 1
        mask = visible = None
        positions = torch.arange(total, device=hidden.device).unsqueeze(0)
        if prompts.padding is not None:
            # [BOS, image, padding, prompt]
            start = 1 + NUM_PATCHES
            end = (start + prompts.padding).unsqueeze(-1)
            visible = (positions < start) | (positions >= end)
            positions = visible.cumsum(-1) - 1
            causal = torch.ones(
                columns, columns, dtype=torch.bool, device=hidden.device
            ).tril()
            mask = (causal & visible[:, None, :columns]).unsqueeze(1)
        cos, sin = self._rope(positions, hidden.dtype)
        self.cache.start(rows, total, hidden)
        rope = (cos[:, :columns], sin[:, :columns])
        logits = self._logits(self._layers(hidden, rope, mask))
        rope = (cos[:, columns:], sin[:, columns:])
        return Prefilled(logits, rope, visible, columns)

    def decode(self, state: Prefilled, *, num_tokens: int) -> Decoded:
        """Takes the most probable token ``num_tokens`` times."""
        embed = self.language_model.model.embed_tokens
        logits = state.logits
        tokens, windows = [], []
        for step in range(num_tokens):
            tokens.append(logits.argmax(-1))
            windows.append(logits[:, self.vocab_size - NUM_BINS : self.vocab_size])
            if step == num_tokens - 1:
                break
            mask = None
            if state.visible is not None:
                mask = state.visible[:, None, None, : state.columns + step + 1]
            rope = tuple(table[:, step : step + 1] for table in state.rope)
            hidden = self._layers(embed(tokens[-1]).unsqueeze(1), rope, mask)
            logits = self._logits(hidden)
        return Decoded(torch.stack(tokens, 1), torch.stack(windows, 1))

    def forward(
        self, pixels: Tensor, prompts: PromptBatch, *, num_tokens: int
    ) -> Decoded:
        """From pixels ``[B, 6, 224, 224]`` and prompts to ``num_tokens`` tokens."""
        state = self.prefill(self.patches(pixels), prompts, num_tokens=num_tokens)
        return self.decode(state, num_tokens=num_tokens)

    def _layers(self, hidden: Tensor, rope: Any, mask: Tensor | None) -> Tensor:
        """Through all layers, without the final norm; new columns go to the cache.

        The layers are called one by one because the model around them builds masks and
        positions from its own idea of a cache, which differs between versions.
        """
        for layer in self.language_model.model.layers:
            hidden = layer(
                hidden,
                attention_mask=mask,
                position_embeddings=rope,
                past_key_values=self.cache,
                use_cache=True,
            )
        self.cache.advance(hidden.shape[1])
        return hidden

    def _rope(self, positions: Tensor, dtype: torch.dtype) -> tuple[Tensor, Tensor]:
        """Cosines and sines of rotary embeddings (https://arxiv.org/abs/2104.09864).

        In float32 whatever the weights are, as in the original.
        """
        size = self.cache.head_dim
        half = torch.arange(0, size, 2, device=positions.device).float() / size
        angles = positions.unsqueeze(-1).float() * (1.0 / self.rope_theta**half)
        angles = torch.cat([angles, angles], -1)
        return angles.cos().to(dtype), angles.sin().to(dtype)

    def _logits(self, hidden: Tensor) -> Tensor:
        last = self.language_model.model.norm(hidden[:, -1])
        return self.language_model.lm_head(last)
