# Copyright (c) the torchrl_rpd authors.
#
# This source code is licensed under the MIT license found in the
# LICENSE file in the root directory of this source tree.
"""Whether a teacher and an env go together, as far as both say, before the first step."""

from __future__ import annotations

from typing import Any

from torchrl.data.tensor_specs import Composite


def check_fit(
    teacher: Any,
    specs: Composite,
    width: int | None,
    *,
    name: str,
    converted: bool,
    replan_interval: int,
) -> None:
    """Compares what a teacher says of itself with what an env shows and takes.

    Args:
        teacher: its attributes ``action_dim`` and ``chunk_size`` are looked at, and its
            method ``check_observation_spec(specs)`` is called, where it has them.
        specs (Composite): of what the env shows. Entries that are not in it may be
            there all the same (functions as transforms write such); the first reset
            tells.
        width (int, optional): entries of the env's action.

    Keyword Args:
        name (str): what to call the teacher in an error.
        converted (bool): whether its actions are converted to those of the env, which
            may have another width.
        replan_interval (int): for how many steps a chunk is followed.

    Raises:
        ValueError: if its actions or chunks are not of the right size.

    Examples:
        >>> import torch
        >>> from types import SimpleNamespace
        >>> from torchrl.data import Unbounded
        >>> teacher = SimpleNamespace(action_dim=7)
        >>> how = dict(name="it", converted=False, replan_interval=1)
        >>> check_fit(teacher, Composite(observation=Unbounded(3)), 8, **how)
        Traceback (most recent call last):
            ...
        ValueError: it gives actions of 7 entries; the env's action has 8. ...
    """
    action_dim = getattr(teacher, "action_dim", None)
    if not converted and None not in (action_dim, width) and action_dim != width:
        raise ValueError(
            f"{name} gives actions of {action_dim} entries; the env's action has "
            f"{width}. Choose a control mode that fits, or give action_transform=."
        )
    chunk_size = getattr(teacher, "chunk_size", None)
    if chunk_size is not None and chunk_size < replan_interval:
        raise ValueError(
            f"{name} gives chunks of {chunk_size} actions; "
            f"replan_interval={replan_interval} needs at least as many."
        )
    check = getattr(teacher, "check_observation_spec", None)
    if check is not None:
        check(specs)
