# Copyright (c) the torchrl_rpd authors.
#
# This source code is licensed under the MIT license found in the
# LICENSE file in the root directory of this source tree.
"""Random numbers without a random state: counter-based hashing of tensors.

A scripted teacher must give the same label for the same input, in every batch, process
and placement, and must not move torch's global generator. Its "noise" is therefore a
hash of its inputs: SplitMix64 finalisers (Steele, Lea and Flood, "Fast splittable
pseudorandom number generators", OOPSLA 2014) on int64 tensors, whose multiplication
wraps modulo 2**64 as required.
"""

from __future__ import annotations

import math

import torch
from torch import Tensor

__all__ = ["float_words", "hash_rows", "normal", "uniform"]

_U64 = 1 << 64


def _signed(value: int) -> int:
    """The int64 with the same 64 bits as ``value`` modulo 2**64."""
    value %= _U64
    return value - _U64 if value >= _U64 >> 1 else value


_GOLDEN = 0x9E3779B97F4A7C15
_MUL_1 = _signed(0xBF58476D1CE4E5B9)
_MUL_2 = _signed(0x94D049BB133111EB)


def _shift_right(x: Tensor, bits: int) -> Tensor:
    # torch shifts int64 arithmetically; the mask removes the copies of the sign bit
    return (x >> bits) & ((1 << (64 - bits)) - 1)


def _mix(x: Tensor) -> Tensor:
    """SplitMix64's finaliser: a bijection of int64 whose output bits look random."""
    x = (x ^ _shift_right(x, 30)) * _MUL_1
    x = (x ^ _shift_right(x, 27)) * _MUL_2
    return x ^ _shift_right(x, 31)


def _mix_int(value: int) -> int:
    """:func:`_mix` of one Python integer: no tensor, so no transfer to a device."""
    x = value % _U64
    x = (x ^ (x >> 30)) * _MUL_1 % _U64
    x = (x ^ (x >> 27)) * _MUL_2 % _U64
    return _signed(x ^ (x >> 31))


def _counter(n: int, like: Tensor) -> Tensor:
    """``n`` well separated int64 keys, one per position."""
    steps = torch.arange(1, n + 1, device=like.device, dtype=torch.int64)
    return _mix(steps * _signed(_GOLDEN))


def float_words(x: Tensor) -> Tensor:
    """The bit pattern of each float32 in ``x`` as int64, with -0.0 read as 0.0."""
    return (x.to(torch.float32) + 0.0).view(torch.int32).to(torch.int64)


def hash_rows(words: Tensor, *, seed: int, stream: int) -> Tensor:
    """Hash each row of integers into one int64 key.

    Args:
        words (Tensor): ``[*B, W]`` int64.

    Keyword Args:
        seed (int): any integer; keys of different seeds are unrelated.
        stream (int): any integer; separates uses of the same words and seed.

    Returns:
        Tensor: ``[*B]`` int64. A row's key depends on that row alone, order of the
        words included.
    """
    start = _mix_int(_mix_int(seed + _GOLDEN) + stream)
    # integer addition is exact in any order, so no batch shape or device changes it
    total = _mix((words ^ start) + _counter(words.shape[-1], words)).sum(-1)
    return _mix(total ^ start)


def uniform(keys: Tensor, n: int) -> Tensor:
    """``n`` uniform draws in [0, 1) per key.

    Args:
        keys (Tensor): ``[*B]`` int64, from :func:`hash_rows`.
        n (int): draws per key.

    Returns:
        Tensor: ``[*B, n]`` float64.
    """
    bits = _mix(keys.unsqueeze(-1) + _counter(n, keys))
    # 53 bits are what a float64 mantissa holds
    return _shift_right(bits, 11).to(torch.float64) * 2.0**-53


def normal(keys: Tensor, n: int) -> Tensor:
    """``n`` standard normal draws per key (Box and Muller's transform).

    Args:
        keys (Tensor): ``[*B]`` int64, from :func:`hash_rows`.
        n (int): draws per key.

    Returns:
        Tensor: ``[*B, n]`` float64.
    """
    radius, angle = uniform(keys, 2 * n).chunk(2, -1)
    # 1 - u lies in (0, 1], so the logarithm is finite
    return (-2.0 * torch.log1p(-radius)).sqrt() * torch.cos(2.0 * math.pi * angle)
