# Copyright (c) the torchrl_rpd authors.
#
# This source code is licensed under the MIT license found in the
# LICENSE file in the root directory of this source tree.
"""
First RPD run
=============

PushCube with sparse reward: the robot is paid only when the cube is in the target. PPO
alone finds no reward there. A scripted teacher with a shaking hand labels what the
student sees, and a student is there within minutes.

**What this page ran** while the site was built: a tenth of a run, on one core, state
observations, no GPU, no graphics driver. **What a full run takes** is at the end, with
its command.
"""

# %%
# The environment, and in it the teacher
# --------------------------------------
#
# Four ManiSkill environments, stepped in this process. The batch size is always
# ``[num_envs]``.

import time

import torch
from torchrl.collectors import Collector
from torchrl.envs import Compose, RewardSum, StepCounter, TransformedEnv

from torchrl_rpd import set_learner_threads
from torchrl_rpd.envs import ManiSkillEnv
from torchrl_rpd.teachers import ScriptedTeacher, check_teacher
from torchrl_rpd.transforms import TeacherActionTransform

start = time.perf_counter()
set_learner_threads()
torch.manual_seed(0)


def make_env():
    return ManiSkillEnv(
        "PushCube-v1", num_envs=4, reward_mode="sparse", fast_controller=True
    )


simulators = make_env()
print(simulators.batch_size, simulators.action_spec.shape)

# %%
# A teacher is anything that turns observations into actions. Look at it before you
# train with it: this asks a few questions that a broken teacher answers wrongly, and
# raises if one is.

expert = ScriptedTeacher("PushCube-v1", jitter=0.3)
print(check_teacher(expert, simulators, steps=4))

# %%
# The transform asks it once per frame and stores the answer with the frame.

teacher = TeacherActionTransform(expert)
env = TransformedEnv(simulators, Compose(StepCounter(), RewardSum(), teacher))
env.set_seed(0)
frames = env.rollout(3)
print(frames["teacher_action"].shape, frames["teacher_mask"].all())

# %%
# Student, loss, trainer
# ----------------------
#
# The loss is TorchRL's ``ClipPPOLoss`` with one term more; the trainer is TorchRL's
# ``PPOTrainer``.

import tempfile

from torchrl.record.loggers import CSVLogger

from torchrl_rpd.objectives import DistillPPOLoss, FiniteHorizonGAE
from torchrl_rpd.students import mlp_actor_critic
from torchrl_rpd.trainers import ObservationNormUpdate, make_ppo_trainer

total_frames = 2_400  # a full run: 24,000
logs = tempfile.mkdtemp()
student = mlp_actor_critic(35, 7, log_std_init=-1.2)
loss = DistillPPOLoss(
    student.actor,
    student.critic,
    distill_coeff=2.0,
    entropy_bonus=False,
    loss_critic_type="l2",
    critic_coeff=0.25,
    normalize_advantage=True,
)
trainer = make_ppo_trainer(
    collector=Collector(
        env,
        student.actor,
        frames_per_batch=200,
        total_frames=total_frames,
        auto_register_policy_transforms=False,
    ),
    loss_module=loss,
    optimizer=torch.optim.Adam(loss.parameters(), lr=1e-3, eps=1e-5),
    gae=FiniteHorizonGAE(gamma=0.99, lmbda=0.9, value_network=student.value_network),
    total_frames=total_frames,
    minibatch_size=50,
    num_epochs=8,
    target_kl=None,  # the distillation may move the policy as far as it wants
    progress_bar=False,
    logger=CSVLogger("first_run", log_dir=logs),
    log_interval=1,
)
ObservationNormUpdate(student.observation_norm).register(trainer)
trainer.train()  # closes the simulators at its end
print(f"{trainer.collected_frames} frames, {teacher.stats()['queries']} queries")

# %%
# One query per frame, and one for the first observation of each of the four environments
# that the last batch left behind. (Sixteen more are those of ``rollout(3)`` above.)

from pathlib import Path

import matplotlib.pyplot as plt
import numpy as np

scalars = Path(logs) / "first_run" / "scalars"
frames, error = np.loadtxt(scalars / "distill_error.csv", delimiter=",").T
fig, axes = plt.subplots(figsize=(6, 3), layout="constrained")
axes.plot(frames, error, marker="o")
axes.set(xlabel="frames", ylabel="distill_error", ylim=(0, None))
plt.show()

# %%
# *Drawn by the block above, from this run: squared distance between the student's mean
# action and the teacher's, mean over rows and action entries, one point for each
# batch.*
#
# How good is it?
# ---------------
#
# Whole episodes, a fixed number for each environment, on seeds that nobody has trained on.
# In brackets a 95 % interval: so few episodes say little.

from torchrl_rpd.evaluation import evaluate

env = make_env()
result = evaluate(env, student.actor, episodes=12, seeds=2_000_000)
print("student:", result.success_once)
print("teacher:", evaluate(env, expert, episodes=12, seeds=2_000_000).success_once)
print(f"this page took {time.perf_counter() - start:.0f} seconds")

# %%
# After a tenth of a run the student has begun to follow its teacher, and hardly succeeds
# yet.
#
# A full run
# ----------
#
# .. code-block:: bash
#
#     python examples/rpd_loop.py  # PushCube, 24,000 frames: two minutes on one core
#     make demo                    # PickCube, 100,000 frames: six minutes, two cores
#     python examples/rpd.py task=pick_cube reward=dense teacher=scripted seed=0
#
# (The times are those of the script's docstring and of the README.) The third is the
# demo as a recipe: it logs, evaluates, makes checkpoints, and goes on after a kill:
# :doc:`/configuration`. Compare with ``algo=ppo`` and ``algo=imitation`` before you
# believe a curve: :doc:`/results/index`.
