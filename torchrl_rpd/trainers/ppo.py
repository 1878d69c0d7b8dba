# Copyright (c) the torchrl_rpd authors.
#
# This source code is licensed under the MIT license found in the
# LICENSE file in the root directory of this source tree.
"""The stock PPOTrainer, wired for RPD."""

from __future__ import annotations

import warnings
from collections.abc import Callable, Sequence
from typing import Any

import torch
from tensordict import NestedKey, TensorDict, TensorDictBase
from torchrl.collectors import BaseCollector
from torchrl.objectives import ClipPPOLoss
from torchrl.trainers.algorithms import PPOTrainer

from torchrl_rpd.trainers.minibatches import OnPolicyMinibatches
from torchrl_rpd.trainers.target_kl import KLRule, TargetKLStepper


def make_ppo_trainer(
    *,
    collector: BaseCollector,
    loss_module: ClipPPOLoss,
    optimizer: torch.optim.Optimizer,
    gae: Callable[[TensorDictBase], TensorDictBase],
    total_frames: int,
    minibatch_size: int,
    num_epochs: int = 8,
    clip_norm: float = 0.5,
    target_kl: float | None = 0.2,
    kl_rule: KLRule = "stop",
    anneal_from: float | None = None,
    compile: bool | dict[str, Any] = False,
    loss_components: Sequence[str] | None = None,
    drop_keys: Sequence[NestedKey] = (),
    **kwargs: Any,
) -> PPOTrainer:
    """Builds TorchRL's ``PPOTrainer`` for :class:`~torchrl_rpd.objectives.DistillPPOLoss`.

    It is the stock class. What stands here, and only here, is how to get the released
    algorithm out of it in TorchRL 0.14:

    - ``optim_steps_per_batch=None``: a number equal to the minibatches of an epoch
      silently skips every second epoch.
    - GAE is done once per batch, and the minibatches are drawn from the batch where it
      lies, by :class:`~torchrl_rpd.trainers.OnPolicyMinibatches`; the trainer's own
      wiring recomputes the advantages with the updated critic and copies the batch in
      every epoch, and writes the buffer into every checkpoint.
    - There is no target KL in the trainer: see
      :class:`~torchrl_rpd.trainers.TargetKLStepper`, which also logs the losses of all
      epochs where the trainer averages the last one only.
    - ``Trainer.__new__`` keeps counters on the class, so that building a second trainer
      clears those of the first: this one gets its own.
    - The collector may hold a copy of the policy that differs from the loss's until the
      first update: the weights are sent once before the first batch.
    - The warnings that every construction emits (of being experimental, and of its own
      use of the older ``"optimizer"`` hook) are silenced.

    Keyword Args:
        collector (BaseCollector): collects ``[*B, T]`` batches.
        loss_module (ClipPPOLoss): the loss; its ``loss_*`` entries are summed.
        optimizer (Optimizer): over ``loss_module.parameters()``.
        gae: writes ``advantage`` and ``value_target``.
        total_frames (int): when to stop.
        minibatch_size (int): rows per minibatch.
        num_epochs (int): passes over each batch. Default: ``8``, the released code.
        clip_norm (float): bound of the gradient's norm. Default: ``0.5``.
        target_kl (float, optional): in nats. Default: ``0.2``, the released code.
        kl_rule (str): ``"stop"`` (released), ``"distill_only"`` or ``"adaptive_lr"``.
        anneal_from (float, optional): share of ``total_frames`` from which the learning
            rate falls to 0. Default: never, the released code. Any other course is
            TorchRL's ``lr_scheduler``, stepped once per batch.
        compile (bool or dict): whether the loss runs through ``torch.compile``, with
            the entries of a dictionary as its arguments, e.g.
            ``{"mode": "reduce-overhead"}`` for CUDA graphs (*not run here*). It compiles
            before the first update, and rounds differently. Default: ``False``.
        loss_components (sequence of str, optional): the loss entries that count, see
            :class:`~torchrl_rpd.trainers.TargetKLStepper`. Default: all.
        drop_keys (sequence of NestedKey): entries that the loss does not read.
        **kwargs: passed to ``PPOTrainer``, e.g. ``logger``, ``progress_bar``,
            ``log_interval``, ``checkpoint``.

    Returns:
        a ``PPOTrainer``; more hooks can be registered, then call ``train()``, which
        closes the collector at its end.

    Raises:
        TypeError: for arguments that the wiring above sets itself.
        ValueError: if the optimiser does not hold the loss's parameters, or for
            ``anneal_from`` or ``kl_rule="adaptive_lr"`` beside ``lr_scheduler``.

    Examples:
        >>> import torch
        >>> from torchrl.collectors import Collector
        >>> from torchrl.envs import TransformedEnv
        >>> from torchrl_rpd.envs import ManiSkillEnv
        >>> from torchrl_rpd.objectives import DistillPPOLoss, FiniteHorizonGAE
        >>> from torchrl_rpd.students import mlp_actor_critic
        >>> from torchrl_rpd.teachers import ScriptedTeacher
        >>> from torchrl_rpd.trainers import make_ppo_trainer
        >>> from torchrl_rpd.transforms import TeacherActionTransform
        >>> teacher = TeacherActionTransform(ScriptedTeacher("PushCube-v1"))
        >>> env = TransformedEnv(ManiSkillEnv("PushCube-v1", num_envs=2), teacher)
        >>> student = mlp_actor_critic(35, 7)
        >>> loss = DistillPPOLoss(student.actor, student.critic)
        >>> collector = Collector(
        ...     env,
        ...     student.actor,
        ...     frames_per_batch=8,
        ...     total_frames=16,
        ...     auto_register_policy_transforms=False,
        ... )
        >>> trainer = make_ppo_trainer(
        ...     collector=collector,
        ...     loss_module=loss,
        ...     optimizer=torch.optim.Adam(loss.parameters(), lr=3e-4),
        ...     gae=FiniteHorizonGAE(
        ...         gamma=0.8, lmbda=0.9, value_network=student.value_network
        ...     ),
        ...     total_frames=16,
        ...     minibatch_size=4,
        ...     num_epochs=2,
        ...     progress_bar=False,
        ... )
        >>> trainer.train()
        >>> trainer.collected_frames
        16
    """
    fixed = {"optim_steps_per_batch", "add_gae", "replay_buffer", "clip_grad_norm"}
    if fixed & set(kwargs):
        raise TypeError(
            f"{sorted(fixed & set(kwargs))} are set by make_ppo_trainer. Build a "
            "PPOTrainer yourself to choose them."
        )
    if kwargs.get("lr_scheduler") is not None:
        rival = None
        if anneal_from is not None:
            rival = f"anneal_from={anneal_from}"
        elif kl_rule == "adaptive_lr" and target_kl is not None:
            rival = "kl_rule='adaptive_lr'"
        if rival is not None:
            raise ValueError(
                f"{rival} and lr_scheduler would overwrite each other's learning rate: "
                "give one of them."
            )
    held = {id(p) for group in optimizer.param_groups for p in group["params"]}
    missing = [n for n, p in loss_module.named_parameters() if id(p) not in held]
    if missing:
        raise ValueError(
            f"The optimiser does not hold {len(missing)} of the loss's parameters, e.g. "
            f"{missing[0]}: build it over loss_module.parameters()."
        )
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", message=".*experimental/prototype.*")
        warnings.filterwarnings("ignore", message=".*hook stage will be replaced.*")
        trainer = PPOTrainer(
            collector=collector,
            loss_module=loss_module,
            optimizer=optimizer,
            total_frames=total_frames,
            frame_skip=1,
            optim_steps_per_batch=None,
            num_epochs=num_epochs,
            clip_grad_norm=True,
            clip_norm=clip_norm,
            add_gae=False,
            auto_log_optim_steps=False,
            **kwargs,
        )
    if compile:
        # In place: the names in the state_dict stay.
        loss_module.compile(**(compile if isinstance(compile, dict) else {}))
    trainer._last_log = {}
    trainer._last_save = trainer._optim_count = trainer.collected_frames = 0

    stepper = TargetKLStepper(
        target_kl,
        rule=kl_rule,
        anneal_from=anneal_from,
        loss_components=loss_components,
    )
    trainer.optimization_stepper = stepper
    stepper.register(trainer)
    minibatches = OnPolicyMinibatches(
        gae, minibatch_size, drop_keys=drop_keys, stepper=stepper
    )
    minibatches.register(trainer)

    def log_updates(batch: TensorDictBase) -> dict[str, float]:
        per_epoch = minibatches.num_minibatches(batch.numel())
        out = stepper.summary(planned=num_epochs * per_epoch)
        return {**out, "lr": optimizer.param_groups[0]["lr"]}

    trainer.register_op("post_steps_log", log_updates)
    collector.update_policy_weights_(TensorDict.from_module(loss_module.actor_network))
    return trainer
