# Copyright (c) the torchrl_rpd authors.
#
# This source code is licensed under the MIT license found in the
# LICENSE file in the root directory of this source tree.
"""Octo's action head: a small network that denoises whole action chunks (DDPM)."""

from __future__ import annotations

import math

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from torchrl_rpd.teachers.octo._config import HeadConfig


class ResidualBlock(nn.Module):
    """Norm, widen, swish, narrow; added to the input."""

    def __init__(self, width: int) -> None:
        super().__init__()
        self.norm = nn.LayerNorm(width, eps=1e-6)
        self.up = nn.Linear(width, 4 * width)
        self.down = nn.Linear(4 * width, width)

    def forward(self, x: Tensor) -> Tensor:
        """Maps ``[..., width]`` to the same shape."""
        return x + self.down(F.silu(self.up(self.norm(x))))


class DiffusionHead(nn.Module):
    """Predicts the noise in an action chunk, and removes it step by step.

    The first layer takes time features, readout and noisy actions side by side. Its
    product with the readout is the same in every step and its product with the time
    features the same for every row, so both are computed once per call.

    Args:
        width (int): size of the readout.
        config (HeadConfig): the head's configuration.
    """

    def __init__(self, width: int, config: HeadConfig) -> None:
        super().__init__()
        self.config = config
        actions = config.action_dim * config.action_horizon
        time, hidden = config.time_dim, config.hidden_dim
        self._inputs = (time, width, actions)
        self.frequencies = nn.Parameter(torch.zeros(time // 2, 1))
        self.time_up = nn.Linear(time, 2 * time)
        self.time_down = nn.Linear(2 * time, time)
        self.input = nn.Linear(sum(self._inputs), hidden)
        self.blocks = nn.ModuleList(
            ResidualBlock(hidden) for _ in range(config.num_blocks)
        )
        self.output = nn.Linear(hidden, actions)
        # Plain numbers, so that no step waits for an accelerator.
        beta = self.betas()
        alpha = 1.0 - beta
        noise = (1.0 - alpha.cumprod(0)).sqrt()
        self._steps = list(
            zip(
                alpha.sqrt().reciprocal().tolist(),
                ((1.0 - alpha) / noise).tolist(),
                beta.sqrt().tolist(),
                strict=True,
            )
        )

    def betas(self) -> Tensor:
        """The cosine schedule (https://openreview.net/forum?id=-NEXDKk8gZ), [steps].

        In float32 and in the order of the original, whose rounding matters: the
        largest beta is close to 1.
        """
        steps, shift = self.config.diffusion_steps, 0.008
        t = torch.linspace(0, steps, steps + 1, device="cpu") / steps
        left = torch.cos((t + shift) / (1 + shift) * math.pi * 0.5) ** 2
        left = left / left[0]
        return (1 - left[1:] / left[:-1]).clamp(0, 0.999)

    def eps(self, readout: Tensor, noisy: Tensor, time: Tensor) -> Tensor:
        """The noise in ``noisy`` ``[..., H * A]``.

        Args:
            readout (Tensor): ``[..., D]``.
            noisy (Tensor): ``[..., H * A]``.
            time (Tensor): denoising steps in ``[0, steps)``, broadcastable to ``[...]``.
        """
        return self._eps(noisy, self._of_readout(readout) + self._of_time(time))

    def sample(self, readout: Tensor, initial: Tensor, noise: Tensor) -> Tensor:
        """Denoises chunks.

        Args:
            readout (Tensor): ``[B, D]``.
            initial (Tensor): standard normal, ``[*S, B, H * A]``.
            noise (Tensor): standard normal, ``[steps, *S, B, H * A]``; entry ``i`` is
                added in the ``i``-th step (the last one is not used).

        Returns:
            normalised actions ``[*S, B, H * A]``.
        """
        of_readout = self._of_readout(readout)
        steps = torch.arange(len(self._steps), device=readout.device)
        of_time = self._of_time(steps)
        limit = self.config.max_action
        x = initial
        for z, time in zip(noise, reversed(range(len(self._steps))), strict=True):
            scale, share, spread = self._steps[time]
            eps = self._eps(x, of_readout + of_time[time])
            x = scale * (x - share * eps)
            if time:
                x = x + spread * z
            x = x.clamp(-limit, limit)
        return x

    def _of_time(self, time: Tensor) -> Tensor:
        angle = (2 * math.pi * time.to(self.frequencies.dtype)).unsqueeze(-1)
        angle = angle @ self.frequencies.T
        features = torch.cat([angle.cos(), angle.sin()], -1)
        features = self.time_down(F.silu(self.time_up(features)))
        return F.linear(features, self._weights()[0])

    def _of_readout(self, readout: Tensor) -> Tensor:
        return F.linear(readout, self._weights()[1], self.input.bias)

    def _eps(self, noisy: Tensor, conditions: Tensor) -> Tensor:
        x = F.linear(noisy, self._weights()[2]) + conditions
        for block in self.blocks:
            x = block(x)
        return self.output(F.silu(x))

    def _weights(self) -> tuple[Tensor, ...]:
        return self.input.weight.split(self._inputs, 1)
