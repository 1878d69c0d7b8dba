# Copyright (c) the torchrl_rpd authors.
#
# This source code is licensed under the MIT license found in the
# LICENSE file in the root directory of this source tree.
"""Resizes images as Pillow does, bit for bit, on any device."""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Literal, NamedTuple

import torch
from torch import nn

# Pillow's fixed point: coefficients of 22 bits, sums in integers, rounded to 8 bits
# after each of the two passes (libImaging/Resample.c).
_PRECISION_BITS = 32 - 8 - 2

# Output pixels that share one product: a resize matrix is a narrow band, and all of it
# at once would mostly multiply zeros.
_BLOCK = 32

# Pixels at a time on a CPU: in float64 they should stay in its caches.
_CPU_PIXELS = 1 << 19

Filter = Literal["bicubic", "lanczos"]


def _bicubic(x: float) -> float:
    a = -0.5
    x = abs(x)
    if x < 1.0:
        return ((a + 2.0) * x - (a + 3.0)) * x * x + 1
    if x < 2.0:
        return (((x - 5) * x + 8) * x - 4) * a
    return 0.0


def _lanczos(x: float) -> float:
    if not -3.0 <= x < 3.0:
        return 0.0
    return _sinc(x) * _sinc(x / 3)


def _sinc(x: float) -> float:
    if x == 0.0:
        return 1.0
    x *= math.pi
    return math.sin(x) / x


_FILTERS: dict[str, tuple[Callable[[float], float], float]] = {
    "bicubic": (_bicubic, 2.0),
    "lanczos": (_lanczos, 3.0),
}


class _Block(NamedTuple):
    """Coefficients of some output pixels over the input pixels that they need."""

    first: int
    last: int
    weights: torch.Tensor  # [inputs, outputs] float64, integers


class PILResize(nn.Module):
    """Resizes uint8 images to exactly what ``PIL.Image.resize`` gives.

    Vision-language-action models were trained on images that Pillow resized:
    antialiased, in two passes (width, then height), rounded to 8 bits after each.
    One-pass interpolation differs by up to 20 grey levels. Here the passes are products
    with Pillow's own fixed-point coefficients in float64, which holds the integer sums
    exactly: the result does not depend on the device, the batch or the order of the
    summation. No parameters, no buffers, no synchronisation.

    .. note:: Pillow 13 takes the height first where it shrinks by much more than the
        width. This module keeps the order of the versions that the models were trained
        with, so that labels do not depend on what is installed; square images to square
        sizes are the same in all versions.

    Args:
        size (int or (int, int)): height and width of the result, one int for both.
        filter (str): ``"bicubic"`` (OpenVLA) or ``"lanczos"`` (Octo). Defaults to
            ``"bicubic"``.

    Raises:
        ValueError: for an unknown filter or a size below 1.

    Examples:
        >>> import torch
        >>> from torchrl_rpd.teachers._resize import PILResize
        >>> images = torch.randint(256, (2, 3, 256, 256), dtype=torch.uint8)
        >>> resized = PILResize(224)(images)
        >>> resized.shape, resized.dtype
        (torch.Size([2, 3, 224, 224]), torch.uint8)
    """

    def __init__(self, size: int | tuple[int, int], filter: Filter = "bicubic") -> None:
        super().__init__()
        self.size = (size, size) if isinstance(size, int) else tuple(size)
        if len(self.size) != 2 or min(self.size) < 1:
            raise ValueError(f"size must be (height, width), at least 1, got {size}.")
        if filter not in _FILTERS:
            raise ValueError(
                f"filter must be one of {sorted(_FILTERS)}, got {filter!r}."
            )
        self.filter = filter
        self._blocks: dict[tuple[int, int, torch.device], list[_Block]] = {}

    def forward(self, images: torch.Tensor) -> torch.Tensor:
        """Resizes ``[*B, C, H, W]`` uint8 to ``[*B, C, *size]`` uint8.

        Raises:
            TypeError: if the images are not uint8.
            ValueError: if they have less than three dimensions.
        """
        if images.dtype != torch.uint8:
            raise TypeError(
                f"PILResize takes uint8 images in [0, 255], got {images.dtype}."
            )
        if images.ndim < 3:
            raise ValueError(
                f"PILResize takes images [*B, C, H, W], got {list(images.shape)}."
            )
        if images.device.type != "cpu" or images.numel() <= _CPU_PIXELS:
            return self._resize(images)
        planes = images.reshape(-1, *images.shape[-2:])
        at_once = max(_CPU_PIXELS // planes[0].numel(), 1)
        resized = torch.cat([self._resize(part) for part in planes.split(at_once)])
        return resized.view(*images.shape[:-2], *self.size)

    def _resize(self, images: torch.Tensor) -> torch.Tensor:
        height, width = images.shape[-2:]
        # Pillow leaves out a pass that changes nothing; so does this.
        if width != self.size[1]:
            images = self._columns(images, self._get(width, self.size[1], images))
        if height != self.size[0]:
            images = self._rows(images, self._get(height, self.size[0], images))
        return images

    def extra_repr(self) -> str:
        """What ``print(module)`` shows."""
        return f"size={self.size}, filter={self.filter!r}"

    @staticmethod
    def _columns(images: torch.Tensor, blocks: list[_Block]) -> torch.Tensor:
        exact = images.to(torch.float64)
        parts = [_to_8_bits(exact[..., a:b] @ weights) for a, b, weights in blocks]
        return torch.cat(parts, -1)

    @staticmethod
    def _rows(images: torch.Tensor, blocks: list[_Block]) -> torch.Tensor:
        exact = images.to(torch.float64)
        parts = [_to_8_bits(w.T @ exact[..., a:b, :]) for a, b, w in blocks]
        return torch.cat(parts, -2)

    def _get(self, before: int, after: int, images: torch.Tensor) -> list[_Block]:
        key = (before, after, images.device)
        if key not in self._blocks:
            self._blocks[key] = [
                block._replace(weights=block.weights.to(images.device))
                for block in _blocks(before, after, self.filter)
            ]
        return self._blocks[key]


def _to_8_bits(sums: torch.Tensor) -> torch.Tensor:
    """Rounds half up and clips, as ``clip8((sum + half) >> bits)`` does."""
    scaled = sums.add_(2.0 ** (_PRECISION_BITS - 1)).mul_(2.0**-_PRECISION_BITS)
    return scaled.floor_().clamp_(0, 255).to(torch.uint8)


def _blocks(before: int, after: int, filter: str) -> list[_Block]:
    taps = [_taps(before, after, i, filter) for i in range(after)]
    blocks = []
    for start in range(0, after, _BLOCK):
        group = taps[start : start + _BLOCK]
        first = min(offset for offset, _ in group)
        last = max(offset + len(weights) for offset, weights in group)
        matrix = torch.zeros(last - first, len(group), dtype=torch.float64)
        for column, (offset, weights) in enumerate(group):
            rows = slice(offset - first, offset - first + len(weights))
            matrix[rows, column] = torch.tensor(weights, dtype=torch.float64)
        blocks.append(_Block(first, last, matrix))
    return blocks


def _taps(before: int, after: int, index: int, filter: str) -> tuple[int, list[int]]:
    """First input pixel and fixed-point coefficients of one output pixel."""
    function, support = _FILTERS[filter]
    scale = before / after
    stretch = max(scale, 1.0)
    support *= stretch
    center = (index + 0.5) * scale
    # int() truncates towards zero as C's cast does, then the image's border.
    first = max(int(center - support + 0.5), 0)
    last = min(int(center + support + 0.5), before)
    # Multiplied by the inverse and summed one by one as in C: the last bit matters.
    inverse = 1.0 / stretch
    weights = [
        function((x + first - center + 0.5) * inverse) for x in range(last - first)
    ]
    total = 0.0
    for weight in weights:
        total += weight
    if total != 0.0:
        weights = [weight * (1.0 / total) for weight in weights]
    one = float(1 << _PRECISION_BITS)
    return first, [int(w * one + (0.5 if w >= 0 else -0.5)) for w in weights]
