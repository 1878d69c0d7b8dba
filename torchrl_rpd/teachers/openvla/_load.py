# Copyright (c) the torchrl_rpd authors.
#
# This source code is licensed under the MIT license found in the
# LICENSE file in the root directory of this source tree.
"""The parts of a teacher from a checkpoint's folder."""

from __future__ import annotations

from pathlib import Path

import torch

from torchrl_rpd.teachers.openvla._checkpoint import load_weights
from torchrl_rpd.teachers.openvla._config import OpenVLAConfig
from torchrl_rpd.teachers.openvla._model import OpenVLAModel
from torchrl_rpd.teachers.openvla._prompt import Prompts
from torchrl_rpd.teachers.openvla._vision import NUM_PATCHES, unused_tensors


def load_parts(
    folder: Path,
    config: OpenVLAConfig,
    *,
    action_dim: int,
    dtype: torch.dtype | None,
    device: torch.device,
) -> tuple[OpenVLAModel, Prompts]:
    """The network on ``device`` and the tokenizer.

    Args:
        folder (Path): of the checkpoint.
        config (OpenVLAConfig): its own.

    Keyword Args:
        action_dim (int): tokens of an answer, for which the prompt leaves room.
        dtype (torch.dtype, optional): of the weights; None for the checkpoint's own.
        device (torch.device): of the weights.
    """
    prompts = Prompts(
        folder / "tokenizer.json",
        bos_token_id=config.llama["bos_token_id"],
        pad_token_id=config.llama["pad_token_id"],
        most_tokens=config.llama["max_position_embeddings"] - NUM_PATCHES - action_dim,
    )
    with torch.device("meta"):
        model = OpenVLAModel(config)
    load_weights(
        model,
        folder,
        device=device,
        dtype=getattr(torch, config.dtype) if dtype is None else dtype,
        unused=unused_tensors(config.towers),
    )
    return model, prompts
