# Copyright (c) the torchrl_rpd authors.
#
# This source code is licensed under the MIT license found in the
# LICENSE file in the root directory of this source tree.
"""What a distillation term reads from a student's action distribution."""

from __future__ import annotations

import torch
from tensordict import unravel_key
from tensordict.nn import CompositeDistribution
from tensordict.utils import NestedKey
from torch import Tensor
from torch import distributions as d


def distilled_head(
    dist: d.Distribution, key: NestedKey | list[NestedKey]
) -> d.Distribution:
    """Returns the distribution over the action that the teacher labels.

    Args:
        dist (Distribution): the student's distribution.
        key (NestedKey or list of NestedKey): the action; it picks the head of a
            ``CompositeDistribution`` and must then be a single one.

    Raises:
        KeyError: if ``key`` does not name one head of a ``CompositeDistribution``.
        ValueError: if ``dist`` has no event dimension, that is, one log-probability per
            action dimension.
    """
    if isinstance(dist, CompositeDistribution):
        heads = {unravel_key(head_key): head for head_key, head in dist.dists.items()}
        if isinstance(key, list) or unravel_key(key) not in heads:
            raise KeyError(
                f"The student has the action heads {list(heads)}, and {key!r} does not "
                "name one of them. Choose the head to distil with "
                "loss.set_keys(distill_action=...)."
            )
        return heads[unravel_key(key)]
    if not dist.event_shape:
        point_estimate(dist)  # Discrete actions have an error of their own.
        raise ValueError(
            f"The student's {type(dist).__name__} distribution keeps the action "
            "dimension in its log-probability, so that PPO would clip one ratio per "
            "action dimension. Use torchrl.modules.IndependentNormal (or TanhNormal) "
            "as distribution_class."
        )
    return dist


def point_estimate(dist: d.Distribution) -> Tensor:
    """Returns the action that the student takes without exploring, ``[*B, A]``.

    That is what TorchRL's ``ExplorationType.DETERMINISTIC`` takes: the mean of a
    Gaussian, the squashed mean of a ``TanhNormal`` (its median: neither its mean nor
    its mode, which have no closed form).

    Raises:
        TypeError: if ``dist`` has no such action, or one without a gradient.
    """
    try:
        # torchrl's distributions have the attribute, those of torch a mean.
        point = getattr(dist, "deterministic_sample", None)
        point = dist.mean if point is None else point
    except NotImplementedError as err:
        raise TypeError(
            f"The student's {type(dist).__name__} distribution has neither a "
            "deterministic_sample nor a mean to distil. Use "
            "torchrl.modules.IndependentNormal or TanhNormal."
        ) from err
    if not point.is_floating_point():
        raise TypeError(
            f"The student's {type(dist).__name__} distribution has discrete actions: no "
            "gradient leads from a distance to its parameters. Distillation needs "
            "continuous actions (torchrl.modules.IndependentNormal or TanhNormal)."
        )
    return point


def gaussian_parameters(dist: d.Distribution) -> tuple[Tensor, Tensor] | None:
    """Returns mean and standard deviation, ``[*B, A]``, or None if not Gaussian."""
    while isinstance(dist, d.Independent):
        dist = dist.base_dist
    return (dist.loc, dist.scale) if type(dist) is d.Normal else None


def gate(x: Tensor, keep: Tensor) -> Tensor:
    """Returns ``x``, with no gradient (not even NaN) where ``keep`` is False.

    The zero that flows back there is -0.0, the one number that changes no bit of what
    it is added to: adding 0.0 would turn a gradient of -0.0 into 0.0.
    """
    return -torch.where(keep, -x, -x.detach())
