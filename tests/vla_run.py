# Copyright (c) the torchrl_rpd authors.
#
# This source code is licensed under the MIT license found in the
# LICENSE file in the root directory of this source tree.
"""A short RPD run from ManiSkill's pictures with an image teacher, and its examples."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import torch
from tensordict import TensorDictBase
from torchrl.collectors import Collector
from torchrl.envs import Compose, StepCounter, TransformedEnv

from torchrl_rpd.envs import ManiSkillEnv
from torchrl_rpd.objectives import DistillPPOLoss, FiniteHorizonGAE
from torchrl_rpd.students import cnn_actor_critic
from torchrl_rpd.trainers import LogTeacher, make_ppo_trainer
from torchrl_rpd.transforms import TeacherActionTransform

ROOT = Path(__file__).parents[1]
INSTRUCTION = "push the cube away from the robot base"
FRAMES, NUM_ENVS, STEPS = 16, 2, 4


def minibatches_of_a_run(
    teacher: TeacherActionTransform,
    *,
    distill_type: str,
    language_instruction: bool = False,
    minibatch_size: int = 4,
) -> list[TensorDictBase]:
    """Trains for two batches, checks what holds for every teacher.

    Returns:
        what the loss was given.
    """
    env = ManiSkillEnv(
        "PushCube-v1",
        num_envs=NUM_ENVS,
        obs_mode="rgb",
        camera="human",
        image_size=256,
        light_visuals=True,
        language_instruction=language_instruction,
    )
    # Episodes of three steps end inside the batches.
    env = TransformedEnv(env, Compose(StepCounter(3), teacher))
    env.set_seed(0)
    student = cnn_actor_critic(256, 7)
    loss = DistillPPOLoss(
        student.actor,
        student.critic,
        distill_type=distill_type,
        entropy_bonus=False,
        loss_critic_type="l2",
        normalize_advantage=True,
    )
    seen: list[TensorDictBase] = []
    loss.register_forward_pre_hook(lambda module, args: seen.append(args[0].clone()))
    before = [parameter.clone() for parameter in loss.parameters()]
    trainer = make_ppo_trainer(
        collector=Collector(
            env,
            student.actor,
            frames_per_batch=NUM_ENVS * STEPS,
            total_frames=FRAMES,
            auto_register_policy_transforms=False,
        ),
        loss_module=loss,
        optimizer=torch.optim.Adam(loss.parameters(), lr=3e-4, eps=1e-5),
        gae=FiniteHorizonGAE(gamma=0.8, lmbda=0.9, value_network=student.value_network),
        total_frames=FRAMES,
        minibatch_size=minibatch_size,
        num_epochs=1,
        target_kl=None,
        drop_keys=[("next", "observation")],
        progress_bar=False,
    )
    LogTeacher(teacher).register(trainer)
    trainer.train()

    assert trainer.collected_frames == FRAMES
    # Once per stored frame, and for roots that are not stored yet.
    assert FRAMES <= teacher.stats()["queries"] <= FRAMES + NUM_ENVS
    assert len(seen) == FRAMES // minibatch_size
    assert all(data["teacher_mask"].all() for data in seen)
    errors = trainer._log_dict["distill_error"]
    assert torch.tensor(errors).isfinite().all()
    after = list(loss.parameters())
    assert not all(torch.equal(a, b) for a, b in zip(after, before, strict=True))
    return seen


def run_example(script: str, *options: str) -> None:
    """Runs an example with its tiny teacher; it stores 32 frames of two environments."""
    done = subprocess.run(
        [sys.executable, "-W", "ignore", f"examples/{script}", "--tiny", *options],
        cwd=ROOT,
        capture_output=True,
        text=True,
        timeout=600,
    )
    assert done.returncode == 0, done.stderr[-3000:]
    # 32 stored frames and the roots of the two environments that come after them.
    assert "'queries': 34" in done.stdout
    assert "success_once" in done.stdout
