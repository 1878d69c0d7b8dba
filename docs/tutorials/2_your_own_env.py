# Copyright (c) the torchrl_rpd authors.
#
# This source code is licensed under the MIT license found in the
# LICENSE file in the root directory of this source tree.
"""
Your own environment
====================

RPD needs no particular simulator. This page writes a small environment for TorchRL from
nothing, gives it a teacher that is systematically wrong, and trains a student that ends
better than its teacher.

**What this page ran** while the site was built: everything, seconds on one core.
"""

# %%
# The environment
# ---------------
#
# A point in the plane is to reach the origin within eight steps; the action is its
# displacement. Any ``EnvBase`` will do. Four things matter to RPD:
#
# - a batch size: ``[num_envs]`` rows are stepped together;
# - the *terminal* observation stays in ``("next", ...)``: TorchRL resets, the
#   environment does not;
# - partial resets: only the rows that ``_reset`` names begin anew;
# - a bounded action spec, which tells the width of the labels and what they are clipped
#   to.

import torch
from tensordict import TensorDict
from torchrl.data import Bounded, Categorical, Composite, Unbounded
from torchrl.envs import EnvBase
from torchrl.envs.utils import check_env_specs


class Reach(EnvBase):
    """Reward: minus the distance to the origin. Success: closer than 0.1."""

    def __init__(self, num_envs=32):
        super().__init__(batch_size=[num_envs])
        flag = Categorical(2, shape=(num_envs, 1), dtype=torch.bool)
        self.observation_spec = Composite(
            observation=Unbounded((num_envs, 2)), success=flag, shape=(num_envs,)
        )
        self.action_spec = Bounded(-1.0, 1.0, (num_envs, 2))
        self.reward_spec = Unbounded((num_envs, 1))
        self.full_done_spec = Composite(
            done=flag, terminated=flag, truncated=flag, shape=(num_envs,)
        )
        self.point = torch.zeros(num_envs, 2)
        self.steps = torch.zeros(num_envs, 1, dtype=torch.int64)
        self.generator = torch.Generator().manual_seed(0)

    def _observation(self):
        success = self.point.norm(dim=-1, keepdim=True) < 0.1
        return {"observation": self.point.clone(), "success": success}

    def _reset(self, tensordict):
        begin = None if tensordict is None else tensordict.get("_reset", None)
        if begin is None:
            begin = torch.ones_like(self.steps, dtype=torch.bool)
        start = 2 * torch.rand(self.point.shape, generator=self.generator) - 1
        self.point = torch.where(begin, start, self.point)
        self.steps = torch.where(begin, 0, self.steps)
        return TensorDict(self._observation(), self.batch_size)

    def _step(self, tensordict):
        self.point = self.point + 0.2 * tensordict["action"].clamp(-1, 1)
        self.steps = self.steps + 1
        out = TensorDict(self._observation(), self.batch_size)
        truncated = self.steps >= 8
        out["reward"] = -self.point.norm(dim=-1, keepdim=True)
        out["terminated"] = torch.zeros_like(truncated)
        out["truncated"] = truncated
        out["done"] = truncated.clone()
        return out

    def _set_seed(self, seed):
        self.generator.manual_seed(seed or 0)


check_env_specs(Reach())

# %%
# A teacher that is wrong
# -----------------------
#
# It knows the way, but sees the point 0.25 to the right of where it is: always. Such an
# error does not average out, so that imitation learns it; only the reward tells.


def teacher(frames):
    seen = frames["observation"] + torch.tensor([0.25, 0.0])
    return (-5 * seen).clamp(-1, 1)


from torchrl.envs import Compose, RewardSum, StepCounter, TransformedEnv

from torchrl_rpd.teachers import check_teacher
from torchrl_rpd.transforms import TeacherActionTransform

print(check_teacher(teacher, Reach()))

# %%
# It passes. ``check_teacher`` finds what is *broken*; it cannot know that a teacher is
# mistaken, and need not: that is what the reward is for.
#
# Three students
# --------------
#
# The same loop, thrice: distillation and reward, distillation alone, reward alone. Both
# controls belong beside every claim that RPD helps.

from torchrl.collectors import Collector

from torchrl_rpd.evaluation import evaluate
from torchrl_rpd.objectives import DistillPPOLoss, FiniteHorizonGAE
from torchrl_rpd.students import mlp_actor_critic


def train(terms, coeff, batches=20):
    """Sums the entries of the loss that are named, for ``batches`` of 256 frames."""
    torch.manual_seed(0)
    label = TeacherActionTransform(teacher, in_keys=["observation"])
    env = TransformedEnv(Reach(), Compose(StepCounter(), RewardSum(), label))
    student = mlp_actor_critic(
        2, 2, num_cells=(64,), log_std_init=-1.0, normalize_observation=False
    )
    loss = DistillPPOLoss(
        student.actor,
        student.critic,
        entropy_bonus=False,
        normalize_advantage=True,
        loss_critic_type="l2",
        critic_coeff=0.25,
    )
    gae = FiniteHorizonGAE(gamma=0.9, lmbda=0.9, value_network=student.value_network)
    optimizer = torch.optim.Adam(loss.parameters(), lr=3e-3)
    collector = Collector(
        env,
        student.actor,
        frames_per_batch=256,
        total_frames=256 * batches,
        auto_register_policy_transforms=False,
    )
    for number, batch in enumerate(collector):
        # The teacher leads, then lets go.
        loss.distill_coeff = coeff * max(0.0, 1 - number / (0.6 * batches))
        rows = gae(batch.copy()).reshape(-1)
        for _ in range(4):
            for minibatch in torch.randperm(len(rows)).split(64):
                out = loss(rows[minibatch])
                optimizer.zero_grad()
                sum(out[term] for term in terms).backward()
                torch.nn.utils.clip_grad_norm_(loss.parameters(), 0.5)
                optimizer.step()
    collector.shutdown()
    return student.actor


ppo = ["loss_objective", "loss_critic"]
students = {
    "RPD": train([*ppo, "loss_distill"], coeff=2.0),
    "imitation alone": train(["loss_distill"], coeff=2.0),
    "PPO alone": train(ppo, coeff=0.0),
}
env = Reach()
results = {"teacher": evaluate(env, teacher, episodes=320, seeds=1_000)}
for name, actor in students.items():
    results[name] = evaluate(env, actor, episodes=320, seeds=1_000)
for name, result in results.items():
    print(f"{name:16} success {result.success_at_end}")

# %%
# Imitation learns the mistake. PPO alone gets there as well: with a reward for every step
# the toy is easy. So this shows how the parts fit, not that the method works: what was
# measured on real tasks is under :doc:`/results/index`.
#
# Whatever has the same shape trains in the same way: a simulator on a GPU, a
# ``ParallelEnv``, your robot. For ManiSkill3 the adapter exists: :doc:`/maniskill`.
