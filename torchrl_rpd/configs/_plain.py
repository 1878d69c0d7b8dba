# Copyright (c) the torchrl_rpd authors.
#
# This source code is licensed under the MIT license found in the
# LICENSE file in the root directory of this source tree.
"""What YAML cannot say: tuples as keys, and torch's data types."""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any

import torch
from torchrl.trainers.algorithms.configs.common import (
    _normalize_hydra_key,
    _normalize_hydra_keys,
)


def with_keys(
    kwargs: dict[str, Any], *, single: Iterable[str] = (), several: Iterable[str] = ()
) -> dict[str, Any]:
    """The arguments, with lists of names turned into nested keys.

    Args:
        kwargs: arguments as a YAML file gives them.

    Keyword Args:
        single: arguments that are one key: ``[observation, image]`` is nested.
        several: arguments that are lists of keys.
    """
    keys = {n: _normalize_hydra_key(kwargs[n]) for n in single if n in kwargs}
    lists = {n: _normalize_hydra_keys(kwargs[n]) for n in several if n in kwargs}
    return {**kwargs, **keys, **lists}


def as_dtype(dtype: Any) -> torch.dtype | None:
    """A data type from its name, e.g. ``"bfloat16"``."""
    if dtype is None or isinstance(dtype, torch.dtype):
        return dtype
    found = getattr(torch, str(dtype).removeprefix("torch."), None)
    if not isinstance(found, torch.dtype):
        raise ValueError(f"dtype={dtype!r} is no data type of torch, e.g. 'bfloat16'.")
    return found
