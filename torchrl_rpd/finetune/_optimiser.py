# Copyright (c) the torchrl_rpd authors.
#
# This source code is licensed under the MIT license found in the
# LICENSE file in the root directory of this source tree.
"""Learning rates and weight decay as in the originals' fine-tuning."""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any, Literal, get_args

from torch import nn

Schedule = Literal["constant", "cosine"]


def rate_factor(
    schedule: Schedule = "constant", *, warmup_steps: int = 0, total_steps: int
) -> Callable[[int], float]:
    """By what a learning rate is multiplied at each step, for ``LambdaLR``.

    A linear warm-up from 0, then the rate itself (OpenVLA's fine-tuning: no warm-up,
    constant) or half a cosine down to 0 at ``total_steps`` (Octo's: 2000 of 50,000
    steps of warm-up).

    Args:
        schedule ("constant" or "cosine"): Defaults to ``"constant"``.

    Keyword Args:
        warmup_steps (int): Defaults to ``0``.
        total_steps (int): of the whole run, warm-up included.

    Raises:
        ValueError: for an unknown schedule, or a warm-up as long as the run.

    Examples:
        >>> from torchrl_rpd.finetune import rate_factor
        >>> factor = rate_factor("cosine", warmup_steps=2, total_steps=6)
        >>> [round(factor(step), 2) for step in range(7)]
        [0.0, 0.5, 1.0, 0.85, 0.5, 0.15, 0.0]
    """
    if schedule not in get_args(Schedule):
        raise ValueError(
            f"schedule must be one of {get_args(Schedule)}, got {schedule!r}."
        )
    if not 0 <= warmup_steps < total_steps:
        raise ValueError(
            f"warmup_steps must be in [0, {total_steps}), the steps of the run, got "
            f"{warmup_steps}."
        )

    def factor(step: int) -> float:
        if step < warmup_steps:
            return step / warmup_steps
        if schedule == "constant":
            return 1.0
        done = min((step - warmup_steps) / (total_steps - warmup_steps), 1.0)
        return 0.5 * (1.0 + math.cos(math.pi * done))

    return factor


def weight_decay_groups(module: nn.Module, weight_decay: float) -> list[dict[str, Any]]:
    """Trained parameters in two groups: kernels decay, the rest does not.

    As Octo's optimiser has it: matrices and convolutions decay; biases, norms and
    position embeddings do not.

    Args:
        module (nn.Module): whose parameters that require a gradient are taken.
        weight_decay (float): of the first group.

    Returns:
        for a constructor of ``torch.optim``, without empty groups.

    Raises:
        ValueError: if nothing requires a gradient.

    Examples:
        >>> import torch
        >>> from torchrl_rpd.finetune import weight_decay_groups
        >>> layers = torch.nn.Sequential(torch.nn.Linear(2, 2), torch.nn.LayerNorm(2))
        >>> groups = weight_decay_groups(layers, 0.01)
        >>> [(len(group["params"]), group["weight_decay"]) for group in groups]
        [(1, 0.01), (3, 0.0)]
    """
    kernels: list[nn.Parameter] = []
    rest: list[nn.Parameter] = []
    for name, parameter in module.named_parameters():
        if parameter.requires_grad:
            kernel = parameter.ndim > 1 and name.endswith((".weight", "frequencies"))
            (kernels if kernel else rest).append(parameter)
    if not kernels and not rest:
        raise ValueError("Nothing requires a gradient: there is nothing to train.")
    groups = [(kernels, weight_decay), (rest, 0.0)]
    return [{"params": p, "weight_decay": decay} for p, decay in groups if p]
