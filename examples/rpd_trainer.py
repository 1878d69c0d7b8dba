# Copyright (c) the torchrl_rpd authors.
#
# This source code is licensed under the MIT license found in the
# LICENSE file in the root directory of this source tree.
"""RPD with TorchRL's own PPOTrainer.

The stock trainer runs the loss and the environment as they are; hooks add what RPD
needs: a schedule of the coefficient, the target KL, success rates and evaluations.

    python examples/rpd_trainer.py
    python examples/rpd_trainer.py --kl-rule stop --workers 2

Killed or interrupted, the same command goes on from its last checkpoint in ``--out``.
"""

from __future__ import annotations

import argparse
from pathlib import Path

import torch
from torchrl.collectors import Collector
from torchrl.envs import Compose, RewardSum, StepCounter, TransformedEnv
from torchrl.record.loggers import CSVLogger

from torchrl_rpd import set_learner_threads
from torchrl_rpd.envs import ManiSkillEnv
from torchrl_rpd.evaluation import evaluate
from torchrl_rpd.objectives import DistillPPOLoss, FiniteHorizonGAE
from torchrl_rpd.students import mlp_actor_critic
from torchrl_rpd.teachers import ScriptedTeacher, check_teacher
from torchrl_rpd.trainers import (
    CheckpointHook,
    DistillCoeffSchedule,
    EvaluationHook,
    LogEpisodes,
    LogTeacher,
    ObservationNormUpdate,
    make_ppo_trainer,
)
from torchrl_rpd.transforms import TeacherActionTransform


def main() -> None:
    """Trains, logs and evaluates."""
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--task", default="PushCube-v1")
    parser.add_argument("--frames", type=int, default=40_000)
    parser.add_argument("--workers", type=int, default=1)
    parser.add_argument(
        "--kl-rule",
        default="distill_only",
        choices=["stop", "distill_only", "adaptive_lr"],
    )
    parser.add_argument("--episodes", type=int, default=200, help="to evaluate")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--checkpoint-every", type=int, default=8_000, help="frames")
    parser.add_argument("--out", type=Path, default=Path("runs/rpd_trainer"))
    args = parser.parse_args()
    set_learner_threads(num_workers=args.workers)
    torch.manual_seed(args.seed)

    def make_env() -> ManiSkillEnv:
        return ManiSkillEnv(
            args.task,
            num_envs=16 // args.workers,
            num_workers=args.workers,
            fast_controller=True,
        )

    eval_env = make_env()
    expert = ScriptedTeacher(args.task, jitter=0.3)
    print(check_teacher(expert, eval_env))  # raises if it cannot be right
    teacher = TeacherActionTransform(expert)
    env = TransformedEnv(make_env(), Compose(StepCounter(), RewardSum(), teacher))
    env.set_seed(args.seed)
    student = mlp_actor_critic(
        env.observation_spec["observation"].shape[-1],
        env.action_spec.shape[-1],
        log_std_init=-1.2,
    )
    loss = DistillPPOLoss(
        student.actor,
        student.critic,
        entropy_bonus=False,
        loss_critic_type="l2",
        critic_coeff=0.25,
        normalize_advantage=True,
    )
    trainer = make_ppo_trainer(
        collector=Collector(
            env,
            student.actor,
            frames_per_batch=800,
            total_frames=args.frames,
            auto_register_policy_transforms=False,
        ),
        loss_module=loss,
        optimizer=torch.optim.Adam(loss.parameters(), lr=3e-4, eps=1e-5),
        gae=FiniteHorizonGAE(
            gamma=0.8,
            lmbda=0.9,
            value_network=student.value_network,
            bootstrap_at_done="always",
        ),
        total_frames=args.frames,
        minibatch_size=50,
        num_epochs=8,
        target_kl=0.2,
        kl_rule=args.kl_rule,
        logger=CSVLogger(args.out.name, log_dir=str(args.out.parent)),
        log_interval=1,
    )
    # The released code's cosine; at 0 the teacher is not asked any more.
    DistillCoeffSchedule(
        loss,
        kind="cosine",
        init=2.0,
        end=0.0,
        end_frames=args.frames,
        transform=teacher,
    ).register(trainer)
    LogEpisodes().register(trainer)
    LogTeacher(teacher).register(trainer)
    ObservationNormUpdate(student.observation_norm).register(trainer)
    EvaluationHook(
        eval_env, student.actor, interval=args.frames // 4, episodes=32, seeds=1_000_000
    ).register(trainer)
    checkpoints = CheckpointHook(
        args.out / "checkpoints",
        every=args.checkpoint_every,
        # What the run depends on: a checkpoint of other settings is refused.
        config={k: v for k, v in vars(args).items() if k not in ("out", "episodes")},
    )
    checkpoints.register(trainer)
    if checkpoints.resume():
        print(f"going on at {trainer.collected_frames} frames")
    trainer.train()
    if checkpoints.stopped_by:
        print(f"{checkpoints.stopped_by}: the same command goes on from here")
        eval_env.close()
        return

    print(evaluate(eval_env, student.actor, episodes=args.episodes, seeds=2_000_000))
    print(f"teacher: {teacher.stats()}")
    print(f"logged scalars: {args.out}")
    eval_env.close()


if __name__ == "__main__":
    main()
