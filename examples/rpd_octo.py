# Copyright (c) the torchrl_rpd authors.
#
# This source code is licensed under the MIT license found in the
# LICENSE file in the root directory of this source tree.
"""RPD from images with Octo as the teacher: the paper's configuration.

One picture for student and teacher (ManiSkill's human camera, 256x256), 128 environments
on the GPU, 50 steps, 8 epochs, one draw of the teacher per stored frame, MSE. The teacher
is the authors' fine-tuned Octo; its tokenizer (t5-base) comes from the Hub as well. The
full run needs a GPU and has not been run here.

    python examples/rpd_octo.py
    python examples/rpd_octo.py --task StackCube-v1 --samples 10 --dtype bfloat16

Everything at a small size, on a CPU with software rendering, without a download: random
weights, so nothing is learnt.

    python examples/rpd_octo.py --tiny
"""

from __future__ import annotations

import argparse
import tempfile
from pathlib import Path

import torch
from torchrl.collectors import Collector
from torchrl.envs import Compose, RewardSum, StepCounter, TransformedEnv
from torchrl.record.loggers import CSVLogger

from torchrl_rpd import set_learner_threads
from torchrl_rpd.envs import TASKS, ManiSkillEnv
from torchrl_rpd.evaluation import evaluate
from torchrl_rpd.objectives import DistillPPOLoss, FiniteHorizonGAE
from torchrl_rpd.students import cnn_actor_critic
from torchrl_rpd.teachers import CHECKPOINTS, check_teacher
from torchrl_rpd.teachers.octo import OctoTeacher, write_random_checkpoint
from torchrl_rpd.trainers import (
    EvaluationHook,
    LogEpisodes,
    LogTeacher,
    make_ppo_trainer,
)
from torchrl_rpd.transforms import TeacherActionTransform

PUBLISHED = CHECKPOINTS["octo"]


def parse() -> argparse.Namespace:
    """The command line; ``--tiny`` replaces the sizes."""
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--task", default="PickCube-v1", choices=TASKS)
    parser.add_argument("--checkpoint", default=PUBLISHED.name, help="folder or Hub id")
    parser.add_argument("--step", type=int, help="which saved step; the last one")
    parser.add_argument("--tokenizer", help="T5's, if the Hub cannot be reached")
    parser.add_argument("--samples", type=int, default=1, help="the teacher's draws")
    parser.add_argument("--gripper", default="raw", choices=["raw", "01_to_pm1"])
    parser.add_argument("--dtype", default="float32", choices=["float32", "bfloat16"])
    parser.add_argument("--image-size", type=int, default=256)
    parser.add_argument("--envs", type=int, default=128)
    parser.add_argument("--steps", type=int, default=50, help="per iteration")
    parser.add_argument("--frames", type=int, default=30_000_000)
    parser.add_argument("--episodes", type=int, default=500, help="to evaluate")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--out", type=Path, default=Path("runs/rpd_octo"))
    parser.add_argument("--tiny", action="store_true")
    args = parser.parse_args()
    if args.tiny:
        args.envs, args.steps, args.frames, args.episodes = 2, 8, 32, 2
        args.image_size = 64
    return args


def main() -> None:
    """Trains, logs and evaluates."""
    args = parse()
    set_learner_threads()
    torch.manual_seed(args.seed)

    # 1. The teacher.
    if args.tiny:
        args.checkpoint = write_random_checkpoint(tempfile.mkdtemp())
    octo = OctoTeacher.from_pretrained(
        args.checkpoint,
        instruction=TASKS[args.task].instruction,
        step=args.step,
        num_samples=args.samples,
        gripper=args.gripper,
        dtype=getattr(torch, args.dtype),
        device="cuda" if torch.cuda.is_available() else "cpu",
        tokenizer=args.tokenizer,
        seed=args.seed,
    )
    teacher = TeacherActionTransform(octo)

    # 2. The environments: the human camera shows the goal that sensor cameras hide.
    def make_env(num_envs: int) -> ManiSkillEnv:
        return ManiSkillEnv(
            args.task,
            num_envs=num_envs,
            obs_mode="rgb",
            camera="human",
            image_size=args.image_size,
            light_visuals=args.tiny,
            max_episode_steps=6 if args.tiny else None,
        )

    simulators = make_env(args.envs)
    # Stops here if the teacher cannot be right. (Random weights need not be.)
    print(check_teacher(octo, simulators, raise_on_failure=not args.tiny))
    env = TransformedEnv(simulators, Compose(StepCounter(), RewardSum(), teacher))
    env.set_seed(args.seed)

    # 3. The student: NatureCNN, 13.2 M parameters, and the released hyper-parameters.
    student = cnn_actor_critic(args.image_size, env.action_spec.shape[-1])
    for module in (student.actor, student.critic):
        module.to(env.device)
    loss = DistillPPOLoss(
        student.actor,
        student.critic,
        distill_type="mse",
        distill_coeff=1.0,
        entropy_bonus=False,
        loss_critic_type="l2",
        critic_coeff=0.25,
        normalize_advantage=True,
    )
    batch = args.envs * args.steps
    trainer = make_ppo_trainer(
        collector=Collector(
            env,
            student.actor,
            frames_per_batch=batch,
            total_frames=args.frames,
            no_cuda_sync=True,
            return_same_td=True,  # no second copy of the pictures
            auto_register_policy_transforms=False,
        ),
        loss_module=loss,
        optimizer=torch.optim.Adam(loss.parameters(), lr=3e-4, eps=1e-5),
        gae=FiniteHorizonGAE(
            gamma=0.8,
            lmbda=0.9,
            value_network=student.value_network,
            bootstrap_at_done="always",
            value_chunk_size=8,  # environments at a time
        ),
        total_frames=args.frames,
        # 133 of 6,400: 49 minibatches, the last one of 16.
        minibatch_size=max(batch // 48, 4),
        num_epochs=8,
        target_kl=0.2,
        drop_keys=[("next", "observation")],
        logger=CSVLogger(args.out.name, log_dir=str(args.out.parent)),
        log_interval=1,
    )
    LogEpisodes().register(trainer)
    LogTeacher(teacher).register(trainer)

    # 4. Every ten iterations as the released code; the teacher is not asked.
    eval_env = make_env(min(args.episodes, args.envs))
    EvaluationHook(
        eval_env,
        student.actor,
        interval=min(10 * batch, args.frames),
        episodes=args.episodes,
        seeds=1_000_000,
    ).register(trainer)
    trainer.train()

    print(evaluate(eval_env, student.actor, episodes=args.episodes, seeds=2_000_000))
    print(f"teacher: {teacher.stats()}")
    print(f"logged scalars: {args.out}")
    eval_env.close()


if __name__ == "__main__":
    main()
