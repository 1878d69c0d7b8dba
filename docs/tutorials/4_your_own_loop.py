# Copyright (c) the torchrl_rpd authors.
#
# This source code is licensed under the MIT license found in the
# LICENSE file in the root directory of this source tree.
"""
RPD in your own loop
====================

No trainer, every step in sight: a collector, a loss, an optimiser. If you have a PPO
loop in TorchRL already, three lines of it change.

**What this page ran** while the site was built: six batches, seconds on one core.
``examples/rpd_loop.py`` is the same loop grown up; it takes two minutes for PushCube
with sparse reward.
"""

# %%
# A stock PPO loop, and what RPD adds
# -----------------------------------

import torch
from torchrl.collectors import Collector
from torchrl.envs import Compose, StepCounter, TransformedEnv

from torchrl_rpd import set_learner_threads
from torchrl_rpd.envs import ManiSkillEnv
from torchrl_rpd.objectives import DistillPPOLoss, FiniteHorizonGAE
from torchrl_rpd.students import mlp_actor_critic
from torchrl_rpd.teachers import ScriptedTeacher
from torchrl_rpd.transforms import TeacherActionTransform

set_learner_threads()
torch.manual_seed(0)
num_envs, steps = 4, 50

# %%
# **One**: a transform in the environment. From here on every stored frame has
# ``teacher_action`` and ``teacher_mask``. It comes after everything that ends episodes.

teacher = TeacherActionTransform(ScriptedTeacher("PushCube-v1"))
env = TransformedEnv(
    ManiSkillEnv(
        "PushCube-v1", num_envs=num_envs, reward_mode="sparse", fast_controller=True
    ),
    Compose(StepCounter(), teacher),
)
env.set_seed(0)

# %%
# The student is any actor whose distribution has an event dimension
# (``IndependentNormal``, ``TanhNormal``) and any critic.

student = mlp_actor_critic(35, 7, log_std_init=-1.2)

# %%
# **Two**: ``DistillPPOLoss`` where ``ClipPPOLoss`` was. All its arguments are still
# there, and with ``distill_coeff=0`` it *is* ClipPPOLoss, bit for bit.

loss = DistillPPOLoss(
    student.actor,
    student.critic,
    distill_coeff=2.0,
    entropy_bonus=False,
    loss_critic_type="l2",
    critic_coeff=0.25,  # ManiSkill's 0.5 * 0.5 * MSE
    normalize_advantage=True,
)
gae = FiniteHorizonGAE(gamma=0.99, lmbda=0.9, value_network=student.value_network)
optimizer = torch.optim.Adam(loss.parameters(), lr=3e-4, eps=1e-5)

# %%
# **Three**: the sum has one entry more, ``loss_distill``. (A loop that sums everything
# that begins with ``loss_`` does not change at all.)

collector = Collector(
    env,
    student.actor,
    frames_per_batch=num_envs * steps,
    total_frames=6 * num_envs * steps,
    auto_register_policy_transforms=False,
)
for batch in collector:
    frames = gae(batch.copy()).reshape(-1)  # the collector re-uses its own batch
    for _ in range(8):
        for rows in torch.randperm(len(frames)).split(50):
            out = loss(frames[rows])
            optimizer.zero_grad()
            sum(v for k, v in out.items() if k.startswith("loss_")).backward()
            torch.nn.utils.clip_grad_norm_(loss.parameters(), 0.5)
            optimizer.step()
    student.observation_norm.update(batch["observation"])
    print(
        f"distill_error {out['distill_error']:.3f}  kl {out['kl_k3']:.3f}  "
        f"labelled {out['distill_coverage']:.0%}  queries {teacher.stats()['queries']}"
    )
collector.shutdown()

# %%
# What is in a frame
# ------------------

print(frames.exclude("next", "collector"))

# %%
# Variations
# ----------
#
# Let the teacher go after a while: the coefficient is a buffer, set it whenever you
# like. Switch the transform off as well, and nobody is asked any more.

loss.distill_coeff = 0.3
teacher.enabled = False

# %%
# Ask about a fifth of the frames, drawn at random; the others have ``teacher_mask``
# False and do not count. Another distance, another direction of the KL, labels with a
# spread: arguments of :class:`~torchrl_rpd.objectives.DistillPPOLoss`.

sparse_labels = TeacherActionTransform(
    ScriptedTeacher("PushCube-v1"), query_fraction=0.2
)
by_direction = DistillPPOLoss(
    student.actor, student.critic, distill_type="cosine", entropy_bonus=False
)
print(by_direction(frames)["distill_error"])

# %%
# Label a whole batch at once, after collection and in the largest batches possible,
# instead of step by step (for teachers without memory): the same transform as the
# collector's ``postproc``. Exactly one query per frame.

label = TeacherActionTransform(
    ScriptedTeacher("PushCube-v1"), in_keys=["observation"], low=-1.0, high=1.0
)
labelled = label(frames.exclude("teacher_action", "teacher_mask"))
same = torch.equal(labelled["teacher_action"], frames["teacher_action"])
print(
    f"{label.stats()['queries']} queries in {label.stats()['calls']} call(s); same: {same}"
)

# %%
# With TorchRL's own ``PPOTrainer``, logs, evaluation and checkpoints:
# ``examples/rpd_trainer.py``, :func:`~torchrl_rpd.trainers.make_ppo_trainer`. With
# Hydra: :doc:`/configuration`.
