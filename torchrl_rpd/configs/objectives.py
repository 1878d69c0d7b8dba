# Copyright (c) the torchrl_rpd authors.
#
# This source code is licensed under the MIT license found in the
# LICENSE file in the root directory of this source tree.
"""Configuration of the losses and of the advantage estimator."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any

from omegaconf import MISSING
from torchrl.trainers.algorithms.configs.objectives import LossConfig

from torchrl_rpd.configs._plain import with_keys
from torchrl_rpd.objectives import (
    DistillKLPENPPOLoss,
    DistillPPOLoss,
    FiniteHorizonGAE,
)

_KEYS = ("advantage_key", "value_target_key", "value_key")


def _parts() -> list[Any]:
    return [[0, 1, 2], [3, 4, 5]]


@dataclass
class _DistillLossConfig(LossConfig):
    """What both losses have in common."""

    actor_network: Any = None
    critic_network: Any = None
    distill_type: str = "mse"
    distill_coeff: float = 1.0
    cosine_parts: list[Any] = field(default_factory=_parts)
    cosine_min_norm: float = 0.05
    kl_direction: str = "forward"
    ratio_weighted: bool = False
    entropy_bonus: bool = True
    samples_mc_entropy: int = 1
    entropy_coeff: Any = None
    log_explained_variance: bool = True
    critic_coeff: float | None = None
    loss_critic_type: str = "smooth_l1"
    normalize_advantage: bool = False
    normalize_advantage_exclude_dims: list[int] = field(default_factory=list)
    advantage_norm: Any = None
    gamma: float | None = None
    separate_losses: bool = False
    advantage_key: Any = None
    value_target_key: Any = None
    value_key: Any = None
    functional: bool = True
    actor: Any = None
    critic: Any = None
    reduction: str | None = None
    clip_value: Any = None
    delay_actor: bool = False
    max_importance_ratio: float | None = None
    device: Any = None
    _convert_: str = "all"


@dataclass
class DistillPPOLossConfig(_DistillLossConfig):
    """Hydra configuration for :class:`~torchrl_rpd.objectives.DistillPPOLoss`.

    Every argument of the constructor is a field, those that it hands to
    ``ClipPPOLoss`` included.

    Examples:
        >>> from hydra.utils import instantiate
        >>> from torchrl_rpd.configs import DistillPPOLossConfig
        >>> from torchrl_rpd.students import mlp_actor_critic
        >>> student = mlp_actor_critic(4, 2)
        >>> loss = instantiate(DistillPPOLossConfig(distill_type="l1", _partial_=True))
        >>> loss(student.actor, student.critic).distill_type
        'l1'
    """

    # A number, or (low, high).
    clip_epsilon: Any = 0.2
    _target_: str = "torchrl_rpd.configs.objectives.make_distill_ppo"


@dataclass
class DistillKLPENPPOLossConfig(_DistillLossConfig):
    """Hydra configuration for :class:`~torchrl_rpd.objectives.DistillKLPENPPOLoss`.

    Every argument of the constructor is a field, those that it hands to
    ``KLPENPPOLoss`` included.

    Examples:
        >>> from hydra.utils import instantiate
        >>> from torchrl_rpd.configs import DistillKLPENPPOLossConfig
        >>> from torchrl_rpd.students import mlp_actor_critic
        >>> student = mlp_actor_critic(4, 2)
        >>> loss = instantiate(DistillKLPENPPOLossConfig(dtarg=0.02, _partial_=True))
        >>> loss(student.actor, student.critic).dtarg
        0.02
    """

    dtarg: float = 0.01
    beta: float = 1.0
    increment: float = 2.0
    decrement: float = 0.5
    samples_mc_kl: int = 1
    _target_: str = "torchrl_rpd.configs.objectives.make_distill_klpen"


def _tidy(kwargs: dict[str, Any]) -> dict[str, Any]:
    """What YAML has as lists, as the tuples that the losses look for."""
    clip = kwargs.get("clip_epsilon")
    if isinstance(clip, Sequence):
        kwargs["clip_epsilon"] = tuple(clip)
    if "normalize_advantage_exclude_dims" in kwargs:
        exclude = tuple(kwargs["normalize_advantage_exclude_dims"])
        kwargs["normalize_advantage_exclude_dims"] = exclude
    return with_keys(kwargs, single=_KEYS)


def make_distill_ppo(*networks: Any, **kwargs: Any) -> DistillPPOLoss:
    """Builds the loss of a :class:`DistillPPOLossConfig`."""
    return DistillPPOLoss(**_networks(networks, _tidy(kwargs)))


def make_distill_klpen(*networks: Any, **kwargs: Any) -> DistillKLPENPPOLoss:
    """Builds the loss of a :class:`DistillKLPENPPOLossConfig`."""
    return DistillKLPENPPOLoss(**_networks(networks, _tidy(kwargs)))


def _networks(networks: tuple[Any, ...], kwargs: dict[str, Any]) -> dict[str, Any]:
    # A partial node carries actor_network=None: a positional one would be given twice.
    given = dict(zip(("actor_network", "critic_network"), networks, strict=False))
    return {**kwargs, **given}


@dataclass
class FiniteHorizonGAEConfig(LossConfig):
    """Hydra configuration for :class:`~torchrl_rpd.objectives.FiniteHorizonGAE`.

    Every argument of the constructor is a field, those that it hands to ``GAE``
    included. A trainer that knows the critic needs ``_partial_: true``.

    Examples:
        >>> from hydra.utils import instantiate
        >>> from torchrl_rpd.configs import FiniteHorizonGAEConfig
        >>> config = FiniteHorizonGAEConfig(
        ...     gamma=0.8, lmbda=0.9, bootstrap_at_done="always"
        ... )
        >>> instantiate(config).bootstrap_at_done
        'always'
    """

    gamma: float = MISSING
    lmbda: float = MISSING
    value_network: Any = None
    bootstrap_at_done: str = "truncated"
    average_gae: bool = False
    differentiable: bool = False
    vectorized: bool | None = None
    skip_existing: bool | None = None
    advantage_key: Any = None
    value_target_key: Any = None
    value_key: Any = None
    shifted: bool = False
    device: Any = None
    time_dim: int | None = None
    auto_reset_env: bool = False
    deactivate_vmap: bool = False
    value_chunk_size: int | None = None
    num_chunks: int | None = None
    num_chunk: int | None = None
    value_chunk_dim: int = 0
    shifted_budget: int = 1
    group_key: Any = None
    _target_: str = "torchrl_rpd.configs.objectives.make_finite_horizon_gae"
    _convert_: str = "all"


def make_finite_horizon_gae(**kwargs: Any) -> FiniteHorizonGAE:
    """Builds the estimator of a :class:`FiniteHorizonGAEConfig`."""
    return FiniteHorizonGAE(**with_keys(kwargs, single=(*_KEYS, "group_key")))
