# Copyright (c) the torchrl_rpd authors.
#
# This source code is licensed under the MIT license found in the
# LICENSE file in the root directory of this source tree.
"""Low-rank adapters by peft, and the weights with the adapters in them."""

from __future__ import annotations

from typing import Any

from torch import Tensor, nn

from torchrl_rpd.teachers._hub import require
from torchrl_rpd.teachers.openvla import OpenVLATeacher

# The original adapts every linear layer but the output embedding.
_LEFT_OUT = "language_model.lm_head"


def add_lora(
    teacher: OpenVLATeacher,
    *,
    rank: int = 32,
    alpha: int | None = None,
    dropout: float = 0.0,
) -> list[str]:
    """Puts low-rank adapters (https://arxiv.org/abs/2106.09685) into OpenVLA.

    As in the original's ``vla-scripts/finetune.py``: every linear layer of the vision
    towers, the projector and the language model, but not ``lm_head``; ``A`` drawn from
    a Gaussian, ``B`` zero, so that nothing changes before the first step. (Its
    ``"all-linear"`` also catches the patch embeddings, which are convolutions, by their
    name; they stay as they are here.) The adapters are float32 whatever the weights
    are; everything else is frozen.

    Args:
        teacher (OpenVLATeacher): changed in place.

    Keyword Args:
        rank (int): Defaults to ``32``.
        alpha (int, optional): the adapters' output counts ``alpha / rank``. Defaults to
            ``None``: ``min(rank, 16)``, as in the original.
        dropout (float): before the adapters, in training mode. Defaults to ``0.0``.

    Returns:
        the names of the adapted layers.

    Raises:
        ImportError: if peft is not installed.
        ValueError: for a rank under 1, or if there are adapters already.

    Examples:
        >>> import tempfile
        >>> from torchrl_rpd.finetune import add_lora
        >>> from torchrl_rpd.teachers.openvla import (
        ...     OpenVLATeacher,
        ...     write_tiny_checkpoint,
        ... )
        >>> folder = write_tiny_checkpoint(tempfile.mkdtemp())
        >>> teacher = OpenVLATeacher.from_pretrained(folder)
        >>> len(add_lora(teacher, rank=2))
        33
        >>> {p.requires_grad for p in teacher.model.language_model.lm_head.parameters()}
        {False}
    """
    if rank < 1:
        raise ValueError(f"rank must be at least 1, got {rank}.")
    model = teacher.model
    if any(hasattr(module, "base_layer") for module in model.modules()):
        raise ValueError("This teacher has adapters already.")
    peft = require("peft", extra="finetune")
    names = [
        name
        for name, module in model.named_modules()
        if isinstance(module, nn.Linear) and name != _LEFT_OUT
    ]
    model.requires_grad_(False)
    config = peft.LoraConfig(
        r=rank,
        lora_alpha=min(rank, 16) if alpha is None else alpha,
        lora_dropout=dropout,
        target_modules=names,
        init_lora_weights="gaussian",
    )
    peft.inject_adapter_in_model(config, model)
    for parameter in model.parameters():
        if parameter.requires_grad:
            parameter.data = parameter.data.float()
    return names


def merged_weight(model: nn.Module, name: str) -> Tensor:
    """A parameter as it is with its adapters added, the module left as it is.

    Args:
        model (nn.Module): with or without adapters.
        name (str): as in the model without adapters.

    Returns:
        the tensor, detached, in the dtype of the weight: added up in float32 and
        rounded once.

    Examples:
        >>> import torch
        >>> from torchrl_rpd.finetune import merged_weight
        >>> layer = torch.nn.Sequential(torch.nn.Linear(2, 2))
        >>> merged_weight(layer, "0.weight").shape
        torch.Size([2, 2])
    """
    path, _, leaf = name.rpartition(".")
    module: Any = model.get_submodule(path)
    base = getattr(module, "base_layer", module)
    tensor: Tensor = getattr(base, leaf).detach()
    if base is module or leaf != "weight":
        return tensor
    total = tensor.float()
    for adapter in module.active_adapters:
        total = total + module.get_delta_weight(adapter).detach().float()
    return total.to(tensor.dtype)
