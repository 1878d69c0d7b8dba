# Copyright (c) the torchrl_rpd authors.
#
# This source code is licensed under the MIT license found in the
# LICENSE file in the root directory of this source tree.
"""Configuration of the schedules and hooks.

Parts of the trainer that a hook needs (loss, transform, critic, ...) may be null: the
hook takes them from the trainer that it is registered with.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

from omegaconf import MISSING
from tensordict import TensorDict
from torch import nn
from torchrl.envs import EnvBase
from torchrl.trainers import Trainer, TrainerHookBase
from torchrl.trainers.algorithms.configs.hooks import HookConfig

from torchrl_rpd.configs._late import LateHook, find_norm, find_teacher
from torchrl_rpd.configs._plain import with_keys
from torchrl_rpd.trainers import (
    DistillCoeffSchedule,
    EvaluationHook,
    LogEpisodes,
    LogTeacher,
    NumericalGuard,
    ObservationNormUpdate,
    OnPolicyMinibatches,
    TargetKLStepper,
)
from torchrl_rpd.trainers._stateless import StatelessHook


@dataclass
class DistillCoeffScheduleConfig(HookConfig):
    """Hydra configuration for :class:`~torchrl_rpd.trainers.DistillCoeffSchedule`.

    Every argument of the constructor is a field. The group ``schedule`` has it as
    ``constant``, ``linear``, ``cosine`` and ``return_ratio``, which differ in ``kind``.

    Examples:
        >>> from hydra.utils import instantiate
        >>> from torchrl_rpd.configs import DistillCoeffScheduleConfig
        >>> from torchrl_rpd.objectives import DistillPPOLoss
        >>> from torchrl_rpd.students import mlp_actor_critic
        >>> student = mlp_actor_critic(4, 2)
        >>> loss = DistillPPOLoss(student.actor, student.critic)
        >>> config = DistillCoeffScheduleConfig(kind="linear", init=2.0, end_frames=100)
        >>> instantiate(config, _partial_=True)(loss=loss).set(50)
        >>> float(loss.distill_coeff)
        1.0
    """

    loss: Any = None
    kind: str = "constant"
    init: float = MISSING
    end: float = 0.0
    start_frames: int = 0
    end_frames: int | None = None
    floor: float = 0.0
    teacher_score: float | None = None
    switch_off_score: float | None = None
    switch_off_rises: int = 3
    score_key: Any = "episode_reward"
    score_episodes: int = 50
    transform: Any = None
    _target_: str = "torchrl_rpd.configs.hooks.make_distill_coeff_schedule"
    _convert_: str = "all"


def make_distill_coeff_schedule(
    *, loss: Any = None, transform: Any = None, **kwargs: Any
) -> TrainerHookBase:
    """Builds the hook of a :class:`DistillCoeffScheduleConfig`."""
    kwargs = with_keys(kwargs, single=("score_key",))
    if loss is not None:
        return DistillCoeffSchedule(loss, transform=transform, **kwargs)
    return LateHook(
        lambda trainer: DistillCoeffSchedule(
            trainer.loss_module,
            transform=find_teacher(trainer) if transform is None else transform,
            **kwargs,
        )
    )


@dataclass
class LogEpisodesConfig(HookConfig):
    """Hydra configuration for :class:`~torchrl_rpd.trainers.LogEpisodes`.

    Examples:
        >>> from hydra.utils import instantiate
        >>> from torchrl_rpd.configs import LogEpisodesConfig
        >>> instantiate(LogEpisodesConfig(success_key=["info", "success"])).success_key
        ('info', 'success')
    """

    success_key: Any = "success"
    length_key: Any = "step_count"
    _target_: str = "torchrl_rpd.configs.hooks.make_log_episodes"
    _convert_: str = "all"


def make_log_episodes(**kwargs: Any) -> LogEpisodes:
    """Builds the hook of a :class:`LogEpisodesConfig`."""
    return LogEpisodes(**with_keys(kwargs, single=("success_key", "length_key")))


@dataclass
class LogTeacherConfig(HookConfig):
    """Hydra configuration for :class:`~torchrl_rpd.trainers.LogTeacher`.

    Examples:
        >>> from hydra.utils import instantiate
        >>> from torchrl_rpd.configs import LogTeacherConfig
        >>> hook = instantiate(LogTeacherConfig())  # finds the transform later
        >>> hook.hook is None
        True
    """

    transform: Any = None
    _target_: str = "torchrl_rpd.configs.hooks.make_log_teacher"


def make_log_teacher(*, transform: Any = None) -> TrainerHookBase:
    """Builds the hook of a :class:`LogTeacherConfig`."""
    if transform is not None:
        return LogTeacher(transform)
    return LateHook(lambda trainer: LogTeacher(find_teacher(trainer)))


@dataclass
class NumericalGuardConfig(HookConfig):
    """Hydra configuration for :class:`~torchrl_rpd.trainers.NumericalGuard`.

    Every argument of the constructor is a field.

    Examples:
        >>> from hydra.utils import instantiate
        >>> from torchrl_rpd.configs import NumericalGuardConfig
        >>> instantiate(NumericalGuardConfig(directory="runs/guard")).max_kl
        2.0
    """

    directory: str = MISSING
    keys: Any = None
    teacher_action_key: Any = "teacher_action"
    teacher_mask_key: Any = "teacher_mask"
    on_non_finite: str = "stop"
    max_kl: float | None = 2.0
    min_ess: float | None = 0.1
    _target_: str = "torchrl_rpd.configs.hooks.make_numerical_guard"
    _convert_: str = "all"


def make_numerical_guard(**kwargs: Any) -> NumericalGuard:
    """Builds the hook of a :class:`NumericalGuardConfig`."""
    single = ("teacher_action_key", "teacher_mask_key")
    return NumericalGuard(**with_keys(kwargs, single=single, several=("keys",)))


@dataclass
class EvaluationHookConfig(HookConfig):
    """Hydra configuration for :class:`~torchrl_rpd.trainers.EvaluationHook`.

    Every argument of the constructor is a field. ``env`` is an environment's node; with
    ``_partial_: true`` it is built here, with ``env_overrides`` in place of what the
    node says, e.g. ``{num_envs: 100}``. A null ``policy`` is the trainer's actor.

    Examples:
        >>> from hydra.utils import instantiate
        >>> from torchrl_rpd.configs import EvaluationHookConfig
        >>> from torchrl_rpd.students import mlp_actor_critic
        >>> config = EvaluationHookConfig(interval=1000, episodes=8)
        >>> policy = mlp_actor_critic(4, 2).actor
        >>> instantiate(config, _partial_=True)(policy=policy).interval
        1000
    """

    env: Any = None
    policy: Any = None
    interval: int = MISSING
    episodes: int = 50
    seeds: int = 0
    env_overrides: dict[str, Any] = field(default_factory=dict)
    _target_: str = "torchrl_rpd.configs.hooks.make_evaluation"
    _convert_: str = "all"


def make_evaluation(
    *,
    env: EnvBase | Callable[..., EnvBase] | None = None,
    policy: Any = None,
    env_overrides: dict[str, Any] | None = None,
    **kwargs: Any,
) -> TrainerHookBase:
    """Builds the hook of an :class:`EvaluationHookConfig`."""
    if env is not None and not isinstance(env, EnvBase):
        env = env(**(env_overrides or {}))
    elif env_overrides:
        raise ValueError(
            f"env_overrides={env_overrides} would change nothing: give the environment's "
            "node _partial_: true, so that it is built with them."
        )
    if policy is not None:
        return EvaluationHook(env, policy, **kwargs)
    return LateHook(
        lambda trainer: EvaluationHook(env, trainer.loss_module.actor_network, **kwargs)
    )


@dataclass
class CheckpointHookConfig(HookConfig):
    """Hydra configuration for :class:`~torchrl_rpd.trainers.CheckpointHook`.

    Every argument of the constructor is a field. The last of a trainer's hooks.

    Examples:
        >>> import tempfile
        >>> from hydra.utils import instantiate
        >>> from torchrl_rpd.configs import CheckpointHookConfig
        >>> hook = instantiate(
        ...     CheckpointHookConfig(tempfile.mkdtemp(), every=10_000, config={"seed": 0})
        ... )
        >>> print(hook.latest())
        None
    """

    directory: str = MISSING
    every: int = MISSING
    config: dict[str, Any] = MISSING
    keep_last: int = 2
    _target_: str = "torchrl_rpd.trainers.CheckpointHook"
    _convert_: str = "all"


@dataclass
class ObservationNormUpdateConfig(HookConfig):
    """Hydra configuration for :class:`~torchrl_rpd.trainers.ObservationNormUpdate`.

    Examples:
        >>> from hydra.utils import instantiate
        >>> from torchrl_rpd.configs import ObservationNormUpdateConfig
        >>> from torchrl_rpd.students import RunningObservationNorm
        >>> config = ObservationNormUpdateConfig(observation_key=["observation", "state"])
        >>> instantiate(config, _partial_=True)(
        ...     norm=RunningObservationNorm(4)
        ... ).observation_key
        ('observation', 'state')
    """

    norm: Any = None
    observation_key: Any = "observation"
    _target_: str = "torchrl_rpd.configs.hooks.make_observation_norm_update"
    _convert_: str = "all"


def make_observation_norm_update(*, norm: Any = None, **kwargs: Any) -> TrainerHookBase:
    """Builds the hook of an :class:`ObservationNormUpdateConfig`."""
    kwargs = with_keys(kwargs, single=("observation_key",))
    if norm is not None:
        return ObservationNormUpdate(norm, **kwargs)
    return LateHook(
        lambda trainer: ObservationNormUpdate(
            find_norm(trainer.loss_module.actor_network), **kwargs
        )
    )


@dataclass
class TargetKLStepperConfig(HookConfig):
    """Hydra configuration for :class:`~torchrl_rpd.trainers.TargetKLStepper`.

    As a hook of TorchRL's own trainer node it takes the place of the trainer's
    optimisation step. The trainer node ``rpd`` has one already.

    Examples:
        >>> from hydra.utils import instantiate
        >>> from torchrl_rpd.configs import TargetKLStepperConfig
        >>> hook = instantiate(TargetKLStepperConfig(target_kl=0.1, rule="distill_only"))
        >>> hook.hook is None  # built for a trainer
        True
    """

    target_kl: float | None = MISSING
    rule: str = "stop"
    min_lr: float = 1e-5
    anneal_from: float | None = None
    loss_components: Any = None
    _target_: str = "torchrl_rpd.configs.hooks.make_target_kl_stepper"
    _convert_: str = "all"


def make_target_kl_stepper(*, target_kl: float | None, **kwargs: Any) -> LateHook:
    """Builds the hook of a :class:`TargetKLStepperConfig`."""

    def build(trainer: Trainer) -> TargetKLStepper:
        stepper = TargetKLStepper(target_kl, **kwargs)
        trainer.optimization_stepper = stepper
        return stepper

    return LateHook(build)


@dataclass
class OnPolicyMinibatchesConfig(HookConfig):
    """Hydra configuration for :class:`~torchrl_rpd.trainers.OnPolicyMinibatches`.

    For TorchRL's own trainer node, with ``add_gae: false`` and no replay buffer: ``gae``
    is a value node with ``_partial_: true``, which gets the loss's critic. After the
    hook ``target_kl`` it ends the epochs when that has stopped.

    Examples:
        >>> from hydra.utils import instantiate
        >>> from torchrl_rpd.configs import (
        ...     FiniteHorizonGAEConfig,
        ...     OnPolicyMinibatchesConfig,
        ... )
        >>> gae = FiniteHorizonGAEConfig(gamma=0.8, lmbda=0.9, _partial_=True)
        >>> hook = instantiate(OnPolicyMinibatchesConfig(gae=gae, minibatch_size=100))
        >>> hook.hook is None  # built for a trainer
        True
    """

    gae: Any = MISSING
    minibatch_size: int = MISSING
    drop_keys: list[Any] = field(default_factory=list)
    stepper: Any = None
    _target_: str = "torchrl_rpd.configs.hooks.make_on_policy_minibatches"
    _convert_: str = "all"


def make_on_policy_minibatches(
    *, gae: Any, minibatch_size: int, stepper: Any = None, **kwargs: Any
) -> LateHook:
    """Builds the hook of an :class:`OnPolicyMinibatchesConfig`."""
    kwargs = with_keys(kwargs, several=("drop_keys",))

    def build(trainer: Trainer) -> OnPolicyMinibatches:
        at_hand = trainer.optimization_stepper
        found = at_hand if isinstance(at_hand, TargetKLStepper) else None
        critic = trainer.loss_module.critic_network
        return OnPolicyMinibatches(
            gae if isinstance(gae, nn.Module) else gae(value_network=critic),
            minibatch_size,
            stepper=found if stepper is None else stepper,
            **kwargs,
        )

    return LateHook(build)


@dataclass
class SyncPolicyConfig(HookConfig):
    """Hydra configuration for :class:`SyncPolicy`.

    Examples:
        >>> from hydra.utils import instantiate
        >>> from torchrl_rpd.configs import SyncPolicyConfig
        >>> instantiate(SyncPolicyConfig())
        SyncPolicy()
    """

    _target_: str = "torchrl_rpd.configs.hooks.SyncPolicy"


class SyncPolicy(StatelessHook):
    """Gives the collector the weights of the loss's actor before the first batch.

    TorchRL's trainer nodes instantiate the policy once for the collector and once for
    the loss, with different weights: without this the first batch is another policy's.
    """

    def register(self, trainer: Trainer, name: str = "sync_policy") -> None:
        """Sends the weights at once."""
        trainer.collector.update_policy_weights_(
            TensorDict.from_module(trainer.loss_module.actor_network)
        )

    def __repr__(self) -> str:
        return "SyncPolicy()"
