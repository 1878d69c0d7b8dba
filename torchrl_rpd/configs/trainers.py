# Copyright (c) the torchrl_rpd authors.
#
# This source code is licensed under the MIT license found in the
# LICENSE file in the root directory of this source tree.
"""The trainer node: RPD from parts that are each built once."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
from omegaconf import MISSING
from tensordict import NestedKey
from torch import nn
from torchrl.collectors import BaseCollector, Collector
from torchrl.envs import Compose, EnvBase, TransformedEnv
from torchrl.trainers import TrainerHookBase
from torchrl.trainers.algorithms import PPOTrainer
from torchrl.trainers.algorithms.configs.trainers import TrainerConfig

from torchrl_rpd.configs._late import LateHook
from torchrl_rpd.configs._plain import with_keys
from torchrl_rpd.students import ActorCritic
from torchrl_rpd.trainers import (
    EvaluationHook,
    ObservationNormUpdate,
    OwnStepsAdvantage,
    make_ppo_trainer,
)
from torchrl_rpd.trainers.target_kl import KLRule
from torchrl_rpd.transforms import JumpStartTransform, TeacherActionTransform

_KEYS = (
    "done_key",
    "terminated_key",
    "reward_key",
    "episode_reward_key",
    "action_key",
    "observation_key",
)


@dataclass
class RPDTrainerConfig(TrainerConfig):
    """Hydra configuration for :func:`make_rpd_trainer`.

    Every argument of :func:`make_rpd_trainer`, of
    :func:`~torchrl_rpd.trainers.make_ppo_trainer` and of TorchRL's ``PPOTrainer`` is a
    field, but for those that the wiring sets. Parts marked *partial* are nodes with
    ``_partial_: true``, finished here with what they have in common.

    Examples:
        >>> from torchrl_rpd.configs import RPDTrainerConfig
        >>> RPDTrainerConfig(total_frames=1000).kl_rule
        'stop'
    """

    env: Any = MISSING
    student: Any = MISSING
    teacher: Any = MISSING
    teacher_action: Any = MISSING
    loss_module: Any = MISSING
    gae: Any = MISSING
    optimizer: Any = MISSING
    collector: Any = None
    total_frames: int = MISSING
    steps_per_batch: int = MISSING
    minibatch_size: int = MISSING
    transforms: list[Any] = field(default_factory=list)
    jump_start: Any = None
    schedule: Any = None
    hooks: list[Any] = field(default_factory=list)
    seed: int | None = None
    num_epochs: int = 8
    clip_norm: float = 0.5
    target_kl: float | None = 0.2
    kl_rule: str = "stop"
    anneal_from: float | None = None
    compile: Any = False
    loss_components: Any = None
    drop_keys: list[Any] = field(default_factory=list)
    lr_scheduler: Any = None
    target_net_updater: Any = None
    logger: Any = None
    progress_bar: bool = True
    save_trainer_interval: int = 10000
    log_interval: int = 10000
    save_trainer_file: str | None = None
    checkpoint: Any = None
    checkpoint_rotation: Any = None
    checkpoint_metadata: Any = None
    enable_logging: bool = True
    log_rewards: bool = True
    log_actions: bool = True
    log_observations: bool = False
    log_timings: bool = False
    done_key: Any = "done"
    terminated_key: Any = "terminated"
    reward_key: Any = "reward"
    episode_reward_key: Any = "reward"
    action_key: Any = "action"
    observation_key: Any = "observation"
    _target_: str = "torchrl_rpd.configs.trainers.make_rpd_trainer"
    _convert_: str = "all"


@dataclass(frozen=True)
class RPDParts:
    """What :func:`make_rpd_trainer` has built: ``trainer.parts``.

    Attributes:
        env: the collector's environment, closed when training ends.
        student: actor, critic and how to save them.
        teacher: what labels the observations.
        teacher_action: the transform that asks it; it counts the queries.
        evaluation: the hook that evaluates, if there is one; its ``env`` stays open.

    Examples:
        >>> from torchrl_rpd.configs import RPDParts
        >>> [field for field in RPDParts.__dataclass_fields__]
        ['env', 'student', 'teacher', 'teacher_action', 'evaluation']
    """

    env: EnvBase
    student: ActorCritic
    teacher: Any
    teacher_action: TeacherActionTransform
    evaluation: EvaluationHook | None


def make_rpd_trainer(
    *,
    env: EnvBase | Callable[..., EnvBase],
    student: ActorCritic | Callable[..., ActorCritic],
    teacher: Any,
    teacher_action: Callable[..., TeacherActionTransform],
    loss_module: Callable[..., nn.Module],
    gae: Callable[..., nn.Module],
    optimizer: Callable[..., torch.optim.Optimizer],
    total_frames: int,
    steps_per_batch: int,
    minibatch_size: int,
    collector: Callable[..., BaseCollector] | None = None,
    transforms: Sequence[Any] = (),
    jump_start: JumpStartTransform | None = None,
    schedule: TrainerHookBase | None = None,
    hooks: Sequence[TrainerHookBase] = (),
    seed: int | None = None,
    kl_rule: KLRule = "stop",
    drop_keys: Sequence[NestedKey] = (),
    lr_scheduler: Any = None,
    target_net_updater: Any = None,
    **kwargs: Any,
) -> PPOTrainer:
    """Builds the stock ``PPOTrainer`` for RPD from the parts of a configuration.

    Hydra instantiates ``${student}`` anew wherever it is named, so that collector, loss
    and advantage estimator of TorchRL's own trainer nodes each get networks of their
    own. Here every part is built once and handed to those that need it: the environment
    to the student (sizes) and the collector, the student to collector, loss and
    advantage estimator, the loss to optimiser and schedule. The rest is
    :func:`~torchrl_rpd.trainers.make_ppo_trainer`. A distillation coefficient that
    starts at 0 means PPO alone: the teacher is never asked.

    Keyword Args:
        env: the environment, or a function that builds it.
        student: actor and critic, or a function of ``env=`` that builds them.
        teacher: what labels the observations.
        teacher_action: a function of ``teacher`` that builds the transform, which goes
            behind the ``transforms``.
        loss_module: a function of ``actor_network`` and ``critic_network``.
        gae: a function of ``value_network``.
        optimizer: a function of the parameters.
        total_frames (int): when to stop.
        steps_per_batch (int): steps of each environment per batch.
        minibatch_size (int): rows per minibatch.
        collector: a function of ``create_env_fn``, ``policy``, ``frames_per_batch`` and
            ``total_frames``. Default: :class:`~torchrl.collectors.Collector`.
        transforms (sequence of Transform): of the environment. Default: none.
        jump_start (JumpStartTransform, optional): goes before the teacher's transform;
            the advantage estimator is then wrapped in
            :class:`~torchrl_rpd.trainers.OwnStepsAdvantage`. Default: none.
        schedule: hook of the distillation coefficient. Default: none, it is constant.
        hooks (sequence of TrainerHookBase): registered in this order, after the schedule
            and the update of the student's observation statistics.
        seed (int, optional): of the student's weights, of the action noise and of the
            environment.
        kl_rule (str): see :func:`~torchrl_rpd.trainers.make_ppo_trainer`.
        drop_keys (sequence of NestedKey): likewise.
        lr_scheduler: a function of the optimiser, or a scheduler.
        target_net_updater: a function of the loss, or an updater.
        **kwargs: of :func:`~torchrl_rpd.trainers.make_ppo_trainer`.

    Returns:
        a ``PPOTrainer``, with its parts as the attribute ``parts`` (:class:`RPDParts`).

    Raises:
        ValueError: for ``jump_start`` with a loss that normalises advantages itself or
            with a ``teacher_action`` that is deferred; for one that is and a collector
            with a ``postproc`` of its own.

    Examples:
        >>> from functools import partial
        >>> import torch
        >>> from torchrl_rpd.configs import make_rpd_trainer
        >>> from torchrl_rpd.envs import ManiSkillEnv
        >>> from torchrl_rpd.objectives import DistillPPOLoss, FiniteHorizonGAE
        >>> from torchrl_rpd.students import mlp_actor_critic
        >>> from torchrl_rpd.teachers import ScriptedTeacher
        >>> from torchrl_rpd.transforms import JumpStartTransform, TeacherActionTransform
        >>> trainer = make_rpd_trainer(
        ...     env=partial(ManiSkillEnv, "PushCube-v1", num_envs=2),
        ...     student=mlp_actor_critic(35, 7),
        ...     teacher=ScriptedTeacher("PushCube-v1"),
        ...     teacher_action=TeacherActionTransform,
        ...     loss_module=DistillPPOLoss,
        ...     gae=partial(FiniteHorizonGAE, gamma=0.8, lmbda=0.9),
        ...     optimizer=torch.optim.Adam,
        ...     total_frames=16,
        ...     steps_per_batch=4,
        ...     minibatch_size=4,
        ...     num_epochs=1,
        ...     progress_bar=False,
        ... )
        >>> trainer.train()
        >>> trainer.parts.teacher_action.stats()["queries"]
        18
    """
    if seed is not None:
        torch.manual_seed(seed)
    transform = teacher_action(teacher=teacher)
    simulators = env if isinstance(env, EnvBase) else env()
    chain = [*transforms, *([] if jump_start is None else [jump_start]), transform]
    whole = TransformedEnv(simulators, Compose(*chain))
    if seed is not None:
        whole.set_seed(seed)
    if not isinstance(student, ActorCritic):
        student = student(env=whole)
    for module in (student.actor, student.critic, student.value_network):
        module.to(whole.device)
    loss = loss_module(actor_network=student.actor, critic_network=student.critic)
    if float(getattr(loss, "distill_coeff", 1.0)) == 0:
        # PPO alone. The collector resets the environment, which would ask the teacher.
        transform.enabled = False
    advantages: Any = gae(value_network=student.value_network)
    if jump_start is not None:
        if getattr(loss, "normalize_advantage", False):
            raise ValueError(
                "With jump_start the advantages of the student's own steps are "
                "normalised before the loss: set loss.normalize_advantage=false."
            )
        advantages = OwnStepsAdvantage(
            advantages,
            jump_start_key=jump_start.jump_start_key,
            teacher_mask_key=jump_start.teacher_mask_key,
        )
    adam = optimizer(loss.parameters())
    num_envs = max(1, whole.batch_size.numel())
    kwargs = with_keys(kwargs, single=_KEYS)
    trainer = make_ppo_trainer(
        collector=(collector or _collector)(
            create_env_fn=whole,
            policy=student.actor,
            frames_per_batch=num_envs * steps_per_batch,
            total_frames=total_frames,
            **_fetching(transform, collector),
        ),
        loss_module=loss,
        optimizer=adam,
        gae=advantages,
        total_frames=total_frames,
        minibatch_size=minibatch_size,
        kl_rule=kl_rule,
        lr_scheduler=lr_scheduler(adam) if callable(lr_scheduler) else lr_scheduler,
        target_net_updater=(
            target_net_updater(loss)
            if callable(target_net_updater)
            else target_net_updater
        ),
        **with_keys({"drop_keys": drop_keys}, several=("drop_keys",)),
        **kwargs,
    )
    # Until here a deferred teacher has looked at the collector's first reset. It is the
    # caller's again, to be examined before the training.
    transform.stats()
    registered: list[Any] = [] if schedule is None else [schedule]
    if student.observation_norm is not None:
        key = student.actor.in_keys[0]
        norm = ObservationNormUpdate(student.observation_norm, observation_key=key)
        registered.append(norm)
    registered += hooks
    for hook in registered:
        hook.register(trainer)
    built = [hook.hook if isinstance(hook, LateHook) else hook for hook in registered]
    evaluations = [hook for hook in built if isinstance(hook, EvaluationHook)]
    trainer.parts = RPDParts(
        env=whole,
        student=student,
        teacher=teacher,
        teacher_action=transform,
        evaluation=evaluations[0] if evaluations else None,
    )
    return trainer


def _fetching(transform: TeacherActionTransform, collector: Any) -> dict[str, Any]:
    """Labels that are made in the background are fetched by the collector."""
    if not transform.deferred:
        return {}
    if getattr(collector, "keywords", {}).get("postproc") is not None:
        raise ValueError(
            "With teacher_action.deferred=true the teacher's transform is the collector's "
            "postproc: leave collector.postproc out."
        )
    return {"postproc": transform}


def _collector(**kwargs: Any) -> Collector:
    # The same tensors for every batch: nothing here keeps one until the next, and a copy
    # of the pictures would double the memory.
    return Collector(
        **kwargs, return_same_td=True, auto_register_policy_transforms=False
    )
