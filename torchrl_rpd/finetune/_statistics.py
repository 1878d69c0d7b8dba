# Copyright (c) the torchrl_rpd authors.
#
# This source code is licensed under the MIT license found in the
# LICENSE file in the root directory of this source tree.
"""Statistics of demonstrated actions, as the checkpoints carry them."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import torch
from tensordict.utils import NestedKey
from torch import Tensor
from torchrl.data import ReplayBuffer
from torchrl.data.vla.schema import ACTION_KEY

from torchrl_rpd.data._spread import spread


def action_statistics(
    actions: ReplayBuffer | Tensor,
    *,
    mask: Sequence[bool] | None = None,
    action_key: NestedKey = ACTION_KEY,
) -> dict[str, Any]:
    """What OpenVLA and Octo normalise actions with, over all demonstrations.

    Mean and (population) standard deviation, extremes, and the quantiles 0.01 and 0.99
    of each action dimension, as both originals' ``get_dataset_statistics`` computes
    them. Demonstrations of :mod:`torchrl_rpd.data` tell their own:
    ``demos.statistics()``; this is for any other replay buffer.

    Args:
        actions (ReplayBuffer or Tensor): the whole buffer, read at once without its
            transforms, or the actions ``[..., A]``.

    Keyword Args:
        mask (sequence of bool, optional): which dimensions are normalised. Defaults to
            ``None``: all but the last, the gripper, as in both originals.
        action_key (NestedKey): of the buffer's actions. Defaults to ``"action"``.

    Returns:
        the content of a ``dataset_statistics.json`` of one data set, in plain lists:
        ``"action"`` (``mean``, ``std``, ``min``, ``max``, ``q01``, ``q99``, ``mask``)
        and ``"num_transitions"``.

    Raises:
        KeyError: if the buffer's samples have no actions.
        ValueError: if there are none, some are not finite, or the mask has another
            length.

    Examples:
        >>> import torch
        >>> from torchrl_rpd.finetune import action_statistics
        >>> statistics = action_statistics(torch.tensor([[0.0, 1.0], [2.0, 1.0]]))
        >>> action = statistics["action"]
        >>> action["mean"], action["std"], action["mask"]
        ([1.0, 1.0], [1.0, 0.0], [True, False])
    """
    if isinstance(actions, ReplayBuffer):
        actions = _stored(actions, action_key)
    values = actions.detach().cpu().reshape(-1, actions.shape[-1])
    if not values.numel():
        raise ValueError("There are no actions: the replay buffer is empty.")
    if not values.isfinite().all():
        raise ValueError("Some of the demonstrated actions are NaN or infinite.")
    size = values.shape[-1]
    mask = [True] * (size - 1) + [False] if mask is None else [bool(m) for m in mask]
    if len(mask) != size:
        raise ValueError(f"mask has {len(mask)} entries for {size} action dimensions.")
    action = {**spread(values), "mask": mask}
    return {"action": action, "num_transitions": len(values)}


def _stored(buffer: ReplayBuffer, key: NestedKey) -> Tensor:
    if not len(buffer):
        raise ValueError(
            "The replay buffer is empty: no episode was read, or all were skipped."
        )
    data = buffer.storage[: len(buffer)]
    actions = data.get(key, None)
    if not isinstance(actions, torch.Tensor):
        raise KeyError(
            f"The replay buffer has no actions under {key!r}; found "
            f"{sorted(data.keys(True, True), key=str)}."
        )
    return actions


def of_actions(
    statistics: Mapping[str, Any], names: Sequence[str], model: str
) -> dict[str, Any]:
    """The actions' statistics, or what a model lacks to normalise with."""
    action = statistics.get("action", {})
    missing = [name for name in names if name not in action]
    if missing:
        raise ValueError(
            f"{model} normalises actions with the statistics {list(names)}; missing are "
            f"{missing} under 'action', found {sorted(action)} there and "
            f"{sorted(statistics)} beside it. demos.statistics() has them, and "
            "action_statistics(buffer) computes them."
        )
    return dict(action)
