# Copyright (c) the torchrl_rpd authors.
#
# This source code is licensed under the MIT license found in the
# LICENSE file in the root directory of this source tree.
"""The whole network: images and text in, readout tokens and action chunks out."""

from __future__ import annotations

from collections.abc import Mapping

import torch
from torch import Tensor, nn

from torchrl_rpd.teachers._hub import require
from torchrl_rpd.teachers.octo._config import OctoConfig
from torchrl_rpd.teachers.octo._head import DiffusionHead
from torchrl_rpd.teachers.octo._stem import FEATURES, SmallStem16
from torchrl_rpd.teachers.octo._transformer import (
    BlockTransformer,
    attention_mask,
    readout_rows,
)


class OctoModel(nn.Module):
    """Octo 1.5 for inference.

    The transformer computes in the dtype of its parameters (see :meth:`to_dtype`). The
    rest is cheap and stays in float32: the stems because their norms subtract large
    means, the head because its last steps amplify errors.

    Args:
        config (OctoConfig): see there.
    """

    def __init__(self, config: OctoConfig) -> None:
        super().__init__()
        self.config = config
        width, horizon = config.width, config.max_horizon
        self.text_encoder = _t5(config)
        self.text_projection = nn.Linear(config.text.d_model, width)
        self.text_position = nn.Parameter(torch.zeros(config.text_length, width))
        cameras = config.image_size
        self.stems = nn.ModuleDict(
            {camera: SmallStem16(config.goal_stacked[camera]) for camera in cameras}
        )
        self.projections = nn.ModuleDict(
            {camera: nn.Linear(FEATURES, width) for camera in cameras}
        )
        self.positions = nn.ParameterDict(
            {
                camera: nn.Parameter(torch.zeros(horizon, (pixels // 16) ** 2, width))
                for camera, pixels in cameras.items()
            }
        )
        self.readout_position = nn.Parameter(torch.zeros(horizon, 1, width))
        self.transformer = BlockTransformer(
            width, config.num_layers, config.num_heads, config.mlp_dim
        )
        self.head = DiffusionHead(width, config.head)
        self._masks: dict[tuple[object, ...], tuple[Tensor, Tensor]] = {}

    @classmethod
    def from_state_dict(
        cls, config: OctoConfig, state: Mapping[str, Tensor]
    ) -> OctoModel:
        """Builds the model around existing tensors, without initialising any."""
        with torch.device("meta"):
            model = cls(config)
        shared = state["text_encoder.shared.weight"]
        state = {**state, "text_encoder.encoder.embed_tokens.weight": shared}
        model.load_state_dict(state, assign=True)
        return model.requires_grad_(False).eval()

    def to_dtype(self, dtype: torch.dtype) -> OctoModel:
        """Casts the transformer, where nearly all the work is."""
        for name, child in self.named_children():
            if name not in ("text_encoder", "stems", "head"):
                child.to(dtype)
        self.text_position.data = self.text_position.data.to(dtype)
        self.readout_position.data = self.readout_position.data.to(dtype)
        return self

    def encode_text(self, input_ids: Tensor, attention_mask: Tensor) -> Tensor:
        """T5's last hidden state, ``[B, T, d_model]`` float32 for int64 ``[B, T]``."""
        encoded = self.text_encoder(input_ids=input_ids, attention_mask=attention_mask)
        return encoded.last_hidden_state

    def readouts(
        self,
        images: Mapping[str, Tensor],
        text: Tensor,
        rows: Tensor | None = None,
        timestep_pad_mask: Tensor | None = None,
    ) -> Tensor:
        """Runs stems and transformer once.

        Args:
            images (mapping of str to Tensor): by camera, uint8 ``[B, W, 3, S, S]`` of
                the size in the configuration; cameras may be left out.
            text (Tensor): from :meth:`encode_text`, ``[U, T, d_model]``.
            rows (Tensor, optional): int64 ``[B]``, which text belongs to which row.
                Needed unless ``U`` is 1 (then every row has that one) or ``B``.
            timestep_pad_mask (Tensor, optional): bool ``[B, W]``, False where a time
                step is padding. Defaults to all True.

        Returns:
            float32 ``[B, W, 1, D]``.
        """
        first = next(iter(images.values()))
        batch, horizon = first.shape[:2]
        dtype = self.text_projection.weight.dtype
        task = self.text_projection(text.to(dtype)) + self.text_position
        task = task.expand(batch, -1, -1) if rows is None else task[rows]
        groups = [
            self._camera(name, images[name]) for name in self.stems if name in images
        ]
        seen = sum(group.shape[2] for group in groups)
        # The repeated task tokens count as observed at every step, padded or not.
        groups.append(task.unsqueeze(1).expand(-1, horizon, -1, -1))
        groups.append(self.readout_position[:horizon].expand(batch, -1, -1, -1))
        tokens = torch.cat([task, torch.cat(groups, 2).flatten(1, 2)], 1)
        mask, readouts = self._mask(horizon, seen, tokens.device)
        if timestep_pad_mask is not None:
            mask = mask & self._not_padded(timestep_pad_mask, seen)
        out = self.transformer(tokens, mask, readouts)
        return out.unsqueeze(2).to(torch.float32)

    def _camera(self, name: str, images: Tensor) -> Tensor:
        horizon = images.shape[1]
        tokens = self.stems[name](images.flatten(0, 1))
        tokens = tokens.to(self.text_projection.weight.dtype)
        tokens = self.projections[name](tokens).unflatten(0, (-1, horizon))
        return tokens + self.positions[name][:horizon]

    def _mask(
        self, horizon: int, seen: int, device: torch.device
    ) -> tuple[Tensor, Tensor]:
        """The mask ``[L, L]`` and the readouts' rows; made once, they never change."""
        key = (horizon, seen, device)
        if key not in self._masks:
            text = self.config.text_length
            sizes = (text, seen + text, horizon)
            self._masks[key] = (
                attention_mask(*sizes).to(device),
                readout_rows(*sizes).to(device),
            )
        return self._masks[key]

    def _not_padded(self, timestep_pad_mask: Tensor, seen: int) -> Tensor:
        """Bool ``[B, 1, 1, L]``: False for the images of padded time steps."""
        batch, horizon = timestep_pad_mask.shape
        text = self.config.text_length
        real = timestep_pad_mask.to(torch.bool).unsqueeze(-1)
        always = real.new_ones(batch, horizon, text + 1)
        steps = torch.cat([real.expand(-1, -1, seen), always], -1).flatten(1)
        prefix = real.new_ones(batch, text)
        return torch.cat([prefix, steps], 1)[:, None, None, :]


def _t5(config: OctoConfig) -> nn.Module:
    transformers = require("transformers", extra="octo")
    text = config.text
    return transformers.T5EncoderModel(
        transformers.T5Config(
            d_model=text.d_model,
            d_kv=text.d_kv,
            d_ff=text.d_ff,
            num_layers=text.num_layers,
            num_heads=text.num_heads,
            vocab_size=text.vocab_size,
            relative_attention_num_buckets=text.relative_attention_num_buckets,
            relative_attention_max_distance=128,
            feed_forward_proj="relu",
            layer_norm_epsilon=1e-6,
            is_encoder_decoder=False,
            use_cache=False,
        )
    )
