# Copyright (c) the torchrl_rpd authors.
#
# This source code is licensed under the MIT license found in the
# LICENSE file in the root directory of this source tree.
"""Octo's image stem: convolutions that turn each 16x16 patch into a token."""

from __future__ import annotations

import torch
from torch import nn
from torch.nn import functional as F

# Of Octo's SmallStem16 (vit_encoders.py).
WIDTHS = (32, 96, 192, 384)
FEATURES = 512


class GroupNorm(nn.GroupNorm):
    """Group normalisation that subtracts the mean before it scales.

    PyTorch's kernel computes ``x * scale + (bias - mean * scale)``, which loses digits
    where a channel's mean is large beside its spread, as it is behind a standardised
    convolution: the tests' tiny model then errs by 7e-4 in the first layer and
    3e-3 in an action.
    """

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        """Normalises ``[N, C, H, W]``; overwrites its input."""
        groups = x.unflatten(1, (self.num_groups, -1))
        groups.sub_(groups.mean((2, 3, 4), keepdim=True))
        return super().forward(x)


class SmallStem16(nn.Module):
    """Four strided convolutions and a projection, one token per 16x16 pixels.

    The original standardises the kernels at every call; these hold the standardised
    ones (see ``_weights.py``).

    Args:
        goal_stacked (bool): whether the first convolution has three more channels for
            a goal image. Without a goal (this teacher is told in words) the original
            stacks a black one, which is -1 after normalisation.
    """

    def __init__(self, goal_stacked: bool) -> None:
        super().__init__()
        self.goal_channels = 3 if goal_stacked else 0
        channels = (3 + self.goal_channels, *WIDTHS)
        self.convs = nn.ModuleList(
            nn.Conv2d(before, after, 3, stride=2, padding=1)
            for before, after in zip(channels, WIDTHS, strict=False)
        )
        self.norms = nn.ModuleList(GroupNorm(32, width, eps=1e-6) for width in WIDTHS)
        self.embedding = nn.Conv2d(WIDTHS[-1], FEATURES, 1)

    def forward(self, images: torch.Tensor) -> torch.Tensor:
        """Maps uint8 images ``[N, 3, H, W]`` to tokens ``[N, H / 16 * W / 16, 512]``."""
        if images.is_cuda:
            return self._tokens(images)
        # A few images at a time stay in a CPU's cache: 1.5 times as fast as 32 at once.
        return torch.cat([self._tokens(few) for few in images.split(4)])

    def _tokens(self, images: torch.Tensor) -> torch.Tensor:
        x = images.to(self.embedding.weight.dtype).div_(127.5).sub_(1.0)
        if self.goal_channels:
            x = F.pad(x, (0, 0, 0, 0, 0, self.goal_channels), value=-1.0)
        for conv, norm in zip(self.convs, self.norms, strict=True):
            x = norm(conv(x)).relu_()
        return self.embedding(x).flatten(2).transpose(1, 2)
