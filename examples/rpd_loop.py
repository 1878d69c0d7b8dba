# Copyright (c) the torchrl_rpd authors.
#
# This source code is licensed under the MIT license found in the
# LICENSE file in the root directory of this source tree.
"""RPD as a hand-written loop: no trainer, every step in sight.

The parts are an environment with a teacher in it, a loss with a distillation term, and
what TorchRL has for the rest. PushCube with sparse reward takes two minutes on one core;
PPO alone finds no reward there at all (``--coeff 0`` switches the distillation off).

    python examples/rpd_loop.py
    python examples/rpd_loop.py --task PickCube-v1 --frames 40000
"""

from __future__ import annotations

import argparse

import torch
from torchrl.collectors import Collector
from torchrl.data import (
    LazyTensorStorage,
    SamplerWithoutReplacement,
    TensorDictReplayBuffer,
)
from torchrl.envs import Compose, StepCounter, TransformedEnv

from torchrl_rpd import set_learner_threads
from torchrl_rpd.envs import ManiSkillEnv
from torchrl_rpd.evaluation import evaluate
from torchrl_rpd.objectives import DistillPPOLoss, FiniteHorizonGAE
from torchrl_rpd.students import mlp_actor_critic
from torchrl_rpd.teachers import ScriptedTeacher, check_teacher
from torchrl_rpd.transforms import TeacherActionTransform


def main() -> None:
    """Trains and evaluates."""
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--task", default="PushCube-v1")
    parser.add_argument("--frames", type=int, default=24_000)
    parser.add_argument("--coeff", type=float, default=2.0, help="distillation")
    parser.add_argument("--episodes", type=int, default=100, help="to evaluate")
    parser.add_argument("--seed", type=int, default=0)
    args = parser.parse_args()
    set_learner_threads()
    torch.manual_seed(args.seed)

    # 1. The environment, and in it the teacher that labels every frame once.
    # (With num_workers=2 the simulators run in two processes.)
    num_envs, steps = 16, 50
    simulators = ManiSkillEnv(
        args.task, num_envs=num_envs, reward_mode="sparse", fast_controller=True
    )
    expert = ScriptedTeacher(args.task, jitter=0.3)
    print(check_teacher(expert, simulators))  # raises if it cannot be right
    teacher = TeacherActionTransform(expert)
    teacher.enabled = args.coeff > 0
    env = TransformedEnv(simulators, Compose(StepCounter(), teacher))
    env.set_seed(args.seed)

    # 2. The student.
    student = mlp_actor_critic(
        env.observation_spec["observation"].shape[-1],
        env.action_spec.shape[-1],
        log_std_init=-1.2,
    )

    # 3. PPO plus distillation. "l2" with 0.25 is ManiSkill's 0.5 * 0.5 * MSE.
    loss = DistillPPOLoss(
        student.actor,
        student.critic,
        distill_coeff=args.coeff,
        entropy_bonus=False,
        loss_critic_type="l2",
        critic_coeff=0.25,
        normalize_advantage=True,
    )
    gae = FiniteHorizonGAE(gamma=0.99, lmbda=0.9, value_network=student.value_network)
    optimizer = torch.optim.Adam(loss.parameters(), lr=3e-4, eps=1e-5)

    # 4. Collect, then eight epochs of minibatches.
    collector = Collector(
        env,
        student.actor,
        frames_per_batch=num_envs * steps,
        total_frames=args.frames,
        auto_register_policy_transforms=False,
    )
    buffer = TensorDictReplayBuffer(
        storage=LazyTensorStorage(num_envs * steps),
        sampler=SamplerWithoutReplacement(),
        batch_size=50,
    )
    for iteration, batch in enumerate(collector):
        batch = gae(batch.copy())  # once per batch; the collector re-uses its own
        buffer.extend(batch.reshape(-1))
        for _ in range(8):
            for minibatch in buffer:
                out = loss(minibatch)
                if args.coeff == 0 and out["kl_k3"] > 0.2:
                    break  # PPO's target KL; distillation may move the policy further
                total = out["loss_objective"] + out["loss_critic"] + out["loss_distill"]
                optimizer.zero_grad()
                total.backward()
                torch.nn.utils.clip_grad_norm_(loss.parameters(), 0.5)
                optimizer.step()
        # After the updates: the next rollout and its updates see the same statistics.
        student.observation_norm.update(batch["observation"])
        if iteration % 5 == 4:
            ended = batch["next", "done"]
            success = batch["next", "success"][ended].double().mean()
            print(
                f"{(iteration + 1) * num_envs * steps:>7} frames  "
                f"success {success:.2f}  distill_error {out['distill_error']:.4f}  "
                f"teacher queries {teacher.stats()['queries']}",
                flush=True,
            )
    collector.shutdown()

    # 5. The student's mean action on episodes that it has not seen.
    env = ManiSkillEnv(args.task, num_envs=num_envs, reward_mode="sparse")
    seeds = args.seed + 2_000_000
    print(evaluate(env, student.actor, episodes=args.episodes, seeds=seeds))


if __name__ == "__main__":
    main()
