# Copyright (c) the torchrl_rpd authors.
#
# This source code is licensed under the MIT license found in the
# LICENSE file in the root directory of this source tree.
"""Configuration of the students."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any

from torchrl.envs import EnvBase
from torchrl.trainers.algorithms.configs.common import ConfigBase

from torchrl_rpd.configs._plain import with_keys
from torchrl_rpd.students import ActorCritic, cnn_actor_critic, mlp_actor_critic


@dataclass
class _StudentConfig(ConfigBase):
    _convert_: str = "all"
    _partial_: bool = False

    def __post_init__(self) -> None:
        """Nothing to set up."""


@dataclass
class MLPStudentConfig(_StudentConfig):
    """Hydra configuration for :func:`~torchrl_rpd.students.mlp_actor_critic`.

    Every argument of it is a field. Sizes that are null are taken from the environment
    that the trainer node gives (``_partial_: true``).

    Examples:
        >>> from hydra.utils import instantiate
        >>> from torchrl_rpd.configs import MLPStudentConfig
        >>> student = instantiate(MLPStudentConfig(observation_dim=42, action_dim=7))
        >>> student.config["num_cells"]
        [256, 256]
    """

    observation_dim: int | None = None
    action_dim: int | None = None
    num_cells: list[int] = field(default_factory=lambda: [256, 256])
    log_std_init: Any = -0.5
    normalize_observation: bool = True
    observation_key: Any = "observation"
    _target_: str = "torchrl_rpd.configs.students.make_mlp"


@dataclass
class CNNStudentConfig(_StudentConfig):
    """Hydra configuration for :func:`~torchrl_rpd.students.cnn_actor_critic`.

    Every argument of it is a field. Sizes that are null are taken from the environment
    that the trainer node gives (``_partial_: true``); a null ``state_dim`` means no
    state.

    Examples:
        >>> from hydra.utils import instantiate
        >>> from torchrl_rpd.configs import CNNStudentConfig
        >>> student = instantiate(CNNStudentConfig(image_size=64, action_dim=7))
        >>> student.actor.in_keys
        [('observation', 'image')]
    """

    image_size: Any = None
    action_dim: int | None = None
    crop: list[int] | None = None
    state_dim: int | None = None
    log_std_init: Any = -0.5
    image_key: Any = field(default_factory=lambda: ["observation", "image"])
    state_key: Any = field(default_factory=lambda: ["observation", "state"])
    _target_: str = "torchrl_rpd.configs.students.make_cnn"


def make_mlp(
    *,
    env: EnvBase | None = None,
    observation_dim: int | None = None,
    action_dim: int | None = None,
    **kwargs: Any,
) -> ActorCritic:
    """Builds the student of an :class:`MLPStudentConfig`."""
    kwargs = with_keys(kwargs, single=("observation_key",))
    if observation_dim is None:
        key = kwargs.get("observation_key", "observation")
        observation_dim = _spec(env, "observation_dim", key).shape[-1]
    action_dim = _action_dim(env) if action_dim is None else action_dim
    return mlp_actor_critic(observation_dim, action_dim, **kwargs)


def make_cnn(
    *,
    env: EnvBase | None = None,
    image_size: Any = None,
    action_dim: int | None = None,
    **kwargs: Any,
) -> ActorCritic:
    """Builds the student of a :class:`CNNStudentConfig`."""
    kwargs = with_keys(kwargs, single=("image_key", "state_key"))
    if image_size is None:
        key = kwargs.get("image_key", ("observation", "image"))
        image_size = tuple(_spec(env, "image_size", key).shape[-2:])
    action_dim = _action_dim(env) if action_dim is None else action_dim
    return cnn_actor_critic(
        image_size if isinstance(image_size, int) else tuple(image_size),
        action_dim,
        **kwargs,
    )


def _spec(env: EnvBase | None, name: str, key: Any) -> Any:
    if env is None:
        raise ValueError(
            f"The student's {name} is null and there is no environment to take it "
            "from: give it, or use the trainer node 'rpd' and _partial_: true."
        )
    spec = env.observation_spec
    if key not in spec.keys(True, True):
        raise KeyError(
            f"The student reads {key!r}, which the environment does not write: it has "
            f"{sorted(map(str, spec.keys(True, True)))}."
        )
    return spec[key]


def _action_dim(env: EnvBase | None) -> int:
    if env is None:
        raise ValueError(
            "The student's action_dim is null and there is no environment to take it "
            "from: give it, or use the trainer node 'rpd' and _partial_: true."
        )
    return int(env.action_spec.shape[-1])
