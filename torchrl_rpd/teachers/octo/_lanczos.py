# Copyright (c) the torchrl_rpd authors.
#
# This source code is licensed under the MIT license found in the
# LICENSE file in the root directory of this source tree.
"""Resizes images as Octo does: Lanczos with antialiasing, rounded once."""

from __future__ import annotations

import functools
import math

import torch
from torch import Tensor

_RADIUS = 3


def lanczos_resize(images: Tensor, size: int) -> Tensor:
    """Resizes uint8 images to squares as Octo's ``ResizeImageWrapper`` does.

    That is ``tf.image.resize(..., method="lanczos3", antialias=True)``, rounded to
    even and clipped (octo/utils/gym_wrappers.py, the filter of Octo's training data):
    both passes in float32, where Pillow rounds to 8 bits in between. Images of the
    right size are returned as they are; RPD's are, and its code refuses any other.
    The wrapper's centre crop, which RPD does not use, is left out here as well.

    Args:
        images (Tensor): uint8 ``[*B, C, H, W]``.
        size (int): height and width of the result.

    Returns:
        uint8 ``[*B, C, size, size]``.

    Examples:
        >>> import torch
        >>> grey = torch.full((2, 3, 48, 64), 7, dtype=torch.uint8)
        >>> lanczos_resize(grey, 16).shape, int(lanczos_resize(grey, 16).max())
        (torch.Size([2, 3, 16, 16]), 7)
    """
    height, width = images.shape[-2:]
    if (height, width) == (size, size):
        return images
    rows = _weights(height, size, images.device)
    columns = _weights(width, size, images.device)
    resized = rows @ images.to(torch.float32) @ columns.T
    return resized.round_().clamp_(0, 255).to(torch.uint8)


@functools.lru_cache(maxsize=16)
def _weights(before: int, after: int, device: torch.device) -> Tensor:
    """Weights of every input pixel in every output pixel, float32 [after, before]."""
    scale = before / after
    stretch = max(scale, 1.0)
    matrix = torch.zeros(after, before, dtype=torch.float64)
    for i in range(after):
        centre = (i + 0.5) * scale - 0.5
        first = max(math.ceil(centre - _RADIUS * stretch), 0)
        last = min(math.floor(centre + _RADIUS * stretch), before - 1)
        for j in range(first, last + 1):
            matrix[i, j] = _kernel((j - centre) / stretch)
    matrix /= matrix.sum(1, keepdim=True)
    return matrix.to(device, torch.float32)


def _kernel(x: float) -> float:
    if abs(x) >= _RADIUS:
        return 0.0
    if x == 0:
        return 1.0
    angle = math.pi * x
    return _RADIUS * math.sin(angle) * math.sin(angle / _RADIUS) / (angle * angle)
