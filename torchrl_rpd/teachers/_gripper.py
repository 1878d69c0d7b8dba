# Copyright (c) the torchrl_rpd authors.
#
# This source code is licensed under the MIT license found in the
# LICENSE file in the root directory of this source tree.
"""Which numbers mean open and closed: [0, 1] in some data sets, [-1, 1] in ManiSkill."""

from __future__ import annotations

import warnings
from collections.abc import Mapping
from typing import Any, Literal, get_args

import torch

Gripper = Literal["raw", "01_to_pm1"]


def check_gripper(gripper: str, action_statistics: Mapping[str, Any]) -> None:
    """Warns where a data set's statistics do not fit the convention that was chosen.

    Whether a checkpoint emits [0, 1] or [-1, 1] cannot be seen in its weights; its
    statistics tell, and nothing is converted unasked.

    Args:
        gripper (str): ``"raw"`` leaves the last action dimension as the teacher gives
            it, ``"01_to_pm1"`` maps it by ``2 g - 1``.
        action_statistics (mapping): with ``"min"`` and ``"max"`` (or ``"q01"`` and
            ``"q99"``) of every action dimension, the gripper last; without, nothing can
            be said.

    Raises:
        ValueError: for an unknown convention.

    Examples:
        >>> check_gripper("01_to_pm1", {"min": [-1.0, 0.0], "max": [1.0, 1.0]})
    """
    if gripper not in get_args(Gripper):
        raise ValueError(
            f"gripper must be one of {list(get_args(Gripper))}, got {gripper!r}."
        )
    low = action_statistics.get("q01", action_statistics.get("min"))
    high = action_statistics.get("q99", action_statistics.get("max"))
    if low is None or high is None:
        return
    low, high = float(low[-1]), float(high[-1])
    from_zero = low >= 0.0 and high <= 1.0
    if gripper == "raw" and from_zero:
        warnings.warn(
            f"The teacher's statistics have the gripper in [{low:g}, {high:g}], while "
            "ManiSkill's action space is [-1, 1]: 'closed' arrives there as 0, half "
            "closed. gripper='01_to_pm1' maps it by 2 g - 1; gripper='raw' keeps the "
            "teacher's numbers, as the paper's released code does.",
            stacklevel=3,
        )
    elif gripper == "01_to_pm1" and not from_zero:
        warnings.warn(
            f"gripper='01_to_pm1' maps by 2 g - 1, but the teacher's statistics have "
            f"the gripper in [{low:g}, {high:g}], not in [0, 1]: gripper='raw' leaves "
            "it as it is.",
            stacklevel=3,
        )


def convert_gripper(
    gripper: Gripper, action: torch.Tensor, *, is_std: bool = False
) -> torch.Tensor:
    """Actions ``[..., A]`` (or standard deviations) in the chosen convention.

    Args:
        gripper (str): as in :func:`check_gripper`.
        action (torch.Tensor): the gripper in the last entry.

    Keyword Args:
        is_std (bool): whether these are standard deviations, which a shift leaves
            alone. Defaults to ``False``.

    Examples:
        >>> convert_gripper("01_to_pm1", torch.tensor([[0.5, 0.0], [0.5, 1.0]]))
        tensor([[ 0.5000, -1.0000],
                [ 0.5000,  1.0000]])
    """
    if gripper == "raw":
        return action
    last = 2 * action[..., -1:] - (0.0 if is_std else 1.0)
    return torch.cat([action[..., :-1], last], -1)
