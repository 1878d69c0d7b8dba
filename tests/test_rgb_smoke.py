# Copyright (c) the torchrl_rpd authors.
#
# This source code is licensed under the MIT license found in the
# LICENSE file in the root directory of this source tree.
"""Students that see images, from end to end: toy pictures and ManiSkill's."""

from __future__ import annotations

import copy

import pytest
import torch
from torch import nn
from torchrl.collectors import Collector
from torchrl.envs import TransformedEnv
from torchrl.envs.utils import check_env_specs
from toy_image_envs import SpotEnv, spot_teacher

from torchrl_rpd.evaluation import evaluate
from torchrl_rpd.objectives import DistillPPOLoss, FiniteHorizonGAE
from torchrl_rpd.students import ActorCritic, NatureCNN, cnn_actor_critic
from torchrl_rpd.teachers import ScriptedTeacher
from torchrl_rpd.trainers import LogEpisodes, LogTeacher, make_ppo_trainer
from torchrl_rpd.transforms import TeacherActionTransform

IMAGE = ("observation", "image")


class RGBRun:
    """The paper's wiring: one picture for student and teacher, the stock trainer."""

    def __init__(
        self, env, teacher, student, *, frames_per_batch, batches, lr=3e-4, **loss
    ):
        self.transform = TeacherActionTransform(teacher)
        self.env = TransformedEnv(env, self.transform)
        self.student = student
        self.loss = DistillPPOLoss(
            student.actor,
            student.critic,
            loss_critic_type="l2",
            critic_coeff=0.25,
            entropy_coeff=0.0,
            normalize_advantage=True,
            **loss,
        )
        self.before = {n: p.clone() for n, p in self.loss.named_parameters()}
        self.minibatches = []
        hook = self.loss.register_forward_pre_hook(
            lambda module, args: self.minibatches.append(args[0])
        )
        self.encoded = []
        count = next(
            m for m in student.actor.modules() if isinstance(m, NatureCNN)
        ).register_forward_hook(
            lambda module, args, out: self.encoded.append(torch.is_grad_enabled())
        )
        collector = Collector(
            self.env,
            student.actor,
            frames_per_batch=frames_per_batch,
            total_frames=batches * frames_per_batch,
            auto_register_policy_transforms=False,
        )
        gae = FiniteHorizonGAE(
            gamma=0.8,
            lmbda=0.9,
            value_network=student.value_network,
            bootstrap_at_done="always",
            value_chunk_size=2,
        )
        self.trainer = make_ppo_trainer(
            collector=collector,
            loss_module=self.loss,
            optimizer=torch.optim.Adam(self.loss.parameters(), lr=lr, eps=1e-5),
            gae=gae,
            total_frames=batches * frames_per_batch,
            minibatch_size=frames_per_batch // 2,
            num_epochs=2,
            target_kl=None,
            drop_keys=[("next", "observation")],
            progress_bar=False,
        )
        LogTeacher(self.transform).register(self.trainer)
        LogEpisodes().register(self.trainer)
        self.steps = batches * 2 * 2  # epochs, minibatches
        self.trainer.train()
        hook.remove()
        count.remove()

    def log(self, key):
        return self.trainer._log_dict[key]

    def check(self, frames, num_envs):
        """What holds for every RGB run."""
        assert self.trainer.collected_frames == frames
        assert len(self.minibatches) == self.steps
        # With gradient: once per call of the loss, for actor and critic together.
        assert sum(self.encoded) == self.steps
        # One label per stored frame, and those of the first roots not yet stored.
        assert frames <= self.transform.stats()["queries"] <= frames + num_envs
        for data in self.minibatches:
            assert data[IMAGE].dtype == torch.uint8
            assert data["teacher_mask"].all()
            assert "features" not in data.keys()
            assert ("next", *IMAGE) not in data.keys(True)
        for key in ("distill_error", "loss_distill", "loss_objective", "loss_critic"):
            assert torch.tensor(self.log(key)).isfinite().all(), key
        for name, parameter in self.loss.named_parameters():
            assert not torch.equal(parameter, self.before[name]), name


class TestToy:
    def test_env(self):
        check_env_specs(SpotEnv(3))
        td = SpotEnv(6).rollout(6, break_when_any_done=False)
        # The starts are staggered, so that partial resets occur.
        assert td["next", "done"].sum(1).flatten().tolist() == [1] * 6
        assert td["next", "done"].squeeze(-1).float().argmax(1).unique().numel() == 6

    def test_teacher_sees(self):
        env = SpotEnv(16)
        td = env.reset()
        expected = (-td["observation", "state"] / 0.3).clamp(-1, 1)
        # To a pixel and what the border cuts off.
        assert (spot_teacher(td) - expected).abs().mean() < 0.2

    def test_run(self):
        student = cnn_actor_critic(36, 2, log_std_init=-1.0)
        run = RGBRun(SpotEnv(6), spot_teacher, student, frames_per_batch=48, batches=3)
        run.check(frames=144, num_envs=6)

    def test_student_learns_from_pictures(self, tmp_path):
        untrained = cnn_actor_critic(36, 2, log_std_init=-1.0)
        start = evaluate(SpotEnv(6), untrained.actor, episodes=12)
        student = cnn_actor_critic(36, 2, log_std_init=-1.0)
        run = RGBRun(
            SpotEnv(6),
            spot_teacher,
            student,
            frames_per_batch=96,
            batches=20,
            lr=1e-3,
        )
        errors = run.log("distill_error")
        assert errors[-1] < 0.3 * errors[0]
        student.save(tmp_path / "student.safetensors")
        loaded = ActorCritic.load(tmp_path / "student.safetensors")
        end = evaluate(SpotEnv(6), loaded.actor, episodes=12)
        assert end.episode_return.mean > start.episode_return.mean + 0.5

    def test_image_and_state(self):
        student = cnn_actor_critic(36, 2, state_dim=2)
        run = RGBRun(SpotEnv(2), spot_teacher, student, frames_per_batch=12, batches=2)
        run.check(frames=24, num_envs=2)
        assert run.minibatches[0]["observation", "state"].shape == (6, 2)


class TinyImageTeacher(nn.Module):
    """Seven numbers from a picture: what a VLA's place is taken by."""

    in_keys = (IMAGE,)

    def __init__(self):
        super().__init__()
        self.linear = nn.Linear(3 * 8 * 8, 7)

    def forward(self, td):
        small = nn.functional.adaptive_avg_pool2d(td[IMAGE].float() / 255, 8)
        return self.linear(small.flatten(-3)).tanh()


@pytest.mark.maniskill
@pytest.mark.render
class TestManiSkill:
    @staticmethod
    def env(obs_mode):
        from torchrl_rpd.envs import ManiSkillEnv

        return ManiSkillEnv(
            "PickCube-v1",
            num_envs=2,
            obs_mode=obs_mode,
            camera="human",
            image_size=64,
            light_visuals=True,
        )

    def test_picture_for_student_and_teacher(self):
        """The paper's set-up: both see the human camera, nobody sees the state."""
        env = self.env("rgb")
        env.set_seed(0)
        student, teacher = cnn_actor_critic(64, 7), TinyImageTeacher()
        run = RGBRun(env, teacher, student, frames_per_batch=40, batches=3)
        run.check(frames=120, num_envs=2)
        pictures = torch.cat([data[IMAGE] for data in run.minibatches]).float()
        assert pictures.shape[1:] == (3, 64, 64)
        assert pictures.std() > 10  # Not blank,
        assert (pictures[0] != pictures).flatten(1).any(1).sum() > 100  # nor one.
        assert "state" not in run.minibatches[0]["observation"].keys()
        # The label belongs to the picture beside it.
        data = run.minibatches[-1]
        assert data["teacher_action"].shape == (20, 7)
        with torch.no_grad():
            labels = teacher(data)
        torch.testing.assert_close(labels, data["teacher_action"])

    def test_scripted_teacher_beside_an_image_student(self):
        """The teacher knows where the cube is; the student has the picture alone."""
        teacher = ScriptedTeacher(
            "PickCube-v1", observation_key=("observation", "state")
        )
        env = self.env("rgb+state")
        env.set_seed(0)
        student = cnn_actor_critic(64, 7)
        untrained = copy.deepcopy(student)
        run = RGBRun(env, teacher, student, frames_per_batch=40, batches=3, lr=1e-3)
        run.check(frames=120, num_envs=2)
        assert run.minibatches[0]["observation", "state"].shape == (20, 42)
        data = torch.cat(run.minibatches)
        label = data["teacher_action"]
        # Closer to the teacher on what both have seen.
        with torch.no_grad():
            before, after = (
                (module.actor(data.select(IMAGE))["loc"] - label).square().mean()
                for module in (untrained, student)
            )
        assert after < 0.9 * before


if __name__ == "__main__":
    pytest.main([__file__])
