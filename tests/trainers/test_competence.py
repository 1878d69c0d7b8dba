# Copyright (c) the torchrl_rpd authors.
#
# This source code is licensed under the MIT license found in the
# LICENSE file in the root directory of this source tree.
"""Where the teacher is able to do the task, from its own episodes."""

from __future__ import annotations

import pytest
import torch
from resumable import assert_same
from tensordict import TensorDict
from torch import nn
from torchrl.collectors import Collector
from torchrl.envs import Compose, StepCounter, TransformedEnv
from toy_envs import ReachEnv

from torchrl_rpd.objectives import DistillPPOLoss, FiniteHorizonGAE
from torchrl_rpd.students import mlp_actor_critic
from torchrl_rpd.trainers import (
    CheckpointHook,
    CompetenceMask,
    OwnStepsAdvantage,
    make_ppo_trainer,
)
from torchrl_rpd.transforms import JumpStartTransform, TeacherActionTransform


def episodes(first, success, *, teachers, length=4):
    """One row of episodes: the observation is each one's first, then noise."""
    count = len(first)
    steps = torch.arange(length).repeat(count).reshape(1, -1, 1)
    observation = torch.rand(1, count * length, first.shape[1]) - 0.5
    observation[:, ::length] = first
    done = steps == length - 1
    won = torch.as_tensor(success).repeat_interleave(length).reshape(1, -1, 1)
    # Success is seen in the middle of the episode.
    return TensorDict(
        observation=observation,
        step_count=steps,
        teacher_episode=torch.full_like(done, teachers),
        teacher_mask=torch.ones_like(done),
        next=TensorDict(
            success=won & (steps == 1), done=done, batch_size=done.shape[:2]
        ),
        batch_size=done.shape[:2],
    )


def scenes(count, seed=0):
    """Two numbers that matter and ten that do not; it is blind for half of the first."""
    generator = torch.Generator().manual_seed(seed)
    first = torch.rand(count, 12, generator=generator) * 2 - 1
    return first, first[:, 0] < 0


def kept(mask, first, success):
    frames = mask(episodes(first, success, teachers=False))
    per_episode = frames["teacher_mask"].reshape(len(first), -1)
    # All of an episode, or nothing.
    assert torch.equal(per_episode.all(-1), per_episode.any(-1))
    return per_episode.all(-1)


class TestCompetenceMask:
    def test_learns_where_the_teacher_is_blind(self):
        mask = CompetenceMask(lambda td: td)
        for part in range(4):
            frames = mask(episodes(*scenes(64, seed=part), teachers=True))
            assert frames["teacher_mask"].all()
        assert mask.teacher_success is None
        first, able = scenes(400, seed=9)
        labels = kept(mask, first, torch.zeros(400, dtype=torch.bool))
        assert mask.teacher_success == pytest.approx(0.5, abs=0.1)
        assert labels[able].float().mean() > 0.9
        assert labels[~able].float().mean() < 0.3

    def test_chance_is_no_blindness(self):
        mask = CompetenceMask(lambda td: td)
        generator = torch.Generator().manual_seed(1)
        luck = torch.rand(256, generator=generator) < 0.5
        mask(episodes(scenes(256)[0], luck, teachers=True))
        first, _ = scenes(400, seed=9)
        assert kept(mask, first, luck.new_zeros(400)).float().mean() > 0.8

    @pytest.mark.parametrize("outcome", [True, False])
    def test_one_outcome_masks_nothing(self, outcome):
        mask = CompetenceMask(lambda td: td)
        first, _ = scenes(64)
        mask(episodes(first, torch.full((64,), outcome), teachers=True))
        assert kept(mask, first, torch.zeros(64, dtype=torch.bool)).all()

    def test_students_episodes_teach_it_nothing(self):
        mask = CompetenceMask(lambda td: td)
        first, able = scenes(64)
        assert kept(mask, first, able).all()
        assert mask.teacher_success is None

    def test_episodes_across_batches(self):
        """Frames belong to the episode that began in an earlier batch."""
        first, able = scenes(256)
        whole, parts = CompetenceMask(lambda td: td), CompetenceMask(lambda td: td)
        frames = episodes(first, able, teachers=True)
        whole(frames.clone())
        # 1,024 frames, in batches of 6: an episode has 4.
        for batch in frames.split(6, 1):
            parts(batch.clone())
        later = episodes(*scenes(64, seed=5), teachers=False)
        expected = whole(later.clone())["teacher_mask"]
        found = [parts(batch.clone())["teacher_mask"] for batch in later.split(6, 1)]
        assert torch.equal(torch.cat(found, 1), expected)
        assert 0.2 < expected.float().mean() < 0.8

    def test_what_is_masked_already_stays_so(self):
        mask = CompetenceMask(lambda td: td)
        frames = episodes(*scenes(8), teachers=False)
        frames["teacher_mask"][:, ::2] = False
        assert mask(frames)["teacher_mask"].float().mean() == 0.5

    def test_the_estimator_sees_who_acted(self):
        seen = []
        mask = CompetenceMask(lambda td: seen.append(td["teacher_mask"].clone()) or td)
        first, able = scenes(256)
        mask(episodes(first, able, teachers=True))
        frames = mask(episodes(first, able, teachers=False))
        assert seen[-1].all() and not frames["teacher_mask"].all()

    def test_leaves_the_global_generator_alone(self):
        mask = CompetenceMask(lambda td: td)
        teachers = episodes(*scenes(64), teachers=True)
        students = episodes(*scenes(64), teachers=False)
        torch.manual_seed(0)
        mask(teachers)
        mask(students)
        drawn = torch.rand(1)
        torch.manual_seed(0)
        assert torch.equal(drawn, torch.rand(1))

    def test_pictures(self):
        generator = torch.Generator().manual_seed(0)
        dark = torch.rand(128, generator=generator) < 0.5
        pictures = torch.randint(
            100, (128, 3, 36, 36), generator=generator, dtype=torch.uint8
        )
        pictures[~dark] += 100
        steps = torch.zeros(1, 128, 1, dtype=torch.int64)
        flags = torch.ones(1, 128, 1, dtype=torch.bool)

        def frames(teachers):
            return TensorDict(
                pixels=pictures.unsqueeze(0),
                step_count=steps,
                teacher_episode=flags & teachers,
                teacher_mask=flags.clone(),
                next=TensorDict(
                    success=dark.reshape(1, -1, 1), done=flags, batch_size=[1, 128]
                ),
                batch_size=[1, 128],
            )

        mask = CompetenceMask(lambda td: td, observation_key="pixels")
        mask(frames(True))
        labels = mask(frames(False))["teacher_mask"].flatten()
        assert labels[dark].float().mean() > 0.9
        assert labels[~dark].float().mean() < 0.1

    def test_network_of_ones_own(self):
        network = nn.Linear(12, 1)
        mask = CompetenceMask(lambda td: td, network=network, min_ratio=0.9)
        before = network.weight.detach().clone()
        mask(episodes(*scenes(64), teachers=True))
        mask(episodes(*scenes(64), teachers=False))
        assert not torch.equal(network.weight, before)

    def test_observations_without_a_network(self):
        mask = CompetenceMask(lambda td: td)
        frames = episodes(*scenes(8), teachers=True)
        frames["observation"] = frames["observation"].reshape(1, 32, 3, 4)
        mask(frames)
        other = frames.clone()
        other["teacher_episode"] &= False
        with pytest.raises(ValueError, match=r"\(3, 4\).*pass network="):
            mask(other)

    def test_bad_arguments(self):
        with pytest.raises(ValueError, match="min_ratio"):
            CompetenceMask(lambda td: td, min_ratio=0.0)
        frames = episodes(*scenes(8), teachers=True).exclude("step_count")
        with pytest.raises(KeyError, match=r"step_count.*StepCounter"):
            CompetenceMask(lambda td: td)(frames)


class Halved(ReachEnv):
    """Success is to come near the origin; the teacher stands still on one side."""

    def _step(self, tensordict):
        out = super()._step(tensordict)
        near = out["observation"].norm(dim=-1, keepdim=True) < 0.2
        return out.set("success", near)

    def _reset(self, tensordict=None):
        out = super()._reset(tensordict)
        return out.set("success", torch.zeros(*out.batch_size, 1, dtype=torch.bool))


def steer(td):
    """Towards the origin, but from the right side."""
    action = (-5 * td["observation"]).clamp(-1, 1)
    return torch.where(td["observation"][..., :1] > 0, 0.0, action)


class Run:
    """The teacher's 32 episodes, then RPD."""

    def __init__(self, directory, batches=6, stop_after=None):
        torch.manual_seed(0)
        env = Halved(8)
        jump = JumpStartTransform(fraction=0.0, whole_episodes=32)
        chain = Compose(StepCounter(), jump, TeacherActionTransform(steer))
        whole = TransformedEnv(env, chain)
        whole.set_seed(0)
        student = mlp_actor_critic(2, 2, num_cells=(16,))
        loss = DistillPPOLoss(student.actor, student.critic, distill_coeff=0.1)
        per_batch = 8 * 16
        self.mask = CompetenceMask(
            OwnStepsAdvantage(
                FiniteHorizonGAE(gamma=0.9, lmbda=0.9, value_network=student.critic)
            )
        )
        self.trainer = make_ppo_trainer(
            collector=Collector(
                whole,
                student.actor,
                frames_per_batch=per_batch,
                total_frames=batches * per_batch,
                auto_register_policy_transforms=False,
            ),
            loss_module=loss,
            optimizer=torch.optim.Adam(loss.parameters(), lr=3e-3),
            gae=self.mask,
            total_frames=batches * per_batch,
            minibatch_size=32,
            num_epochs=2,
            progress_bar=False,
        )
        self.mask.register(self.trainer)
        self.hook = CheckpointHook(directory, every=per_batch, config={})
        self.hook.register(self.trainer)
        if stop_after is not None:
            self.stop_at = stop_after * per_batch
            self.trainer.register_op("post_steps", self._stop)

    def _stop(self):
        if self.trainer.collected_frames >= self.stop_at:
            self.trainer.request_stop()


# In the middle of the teacher's episodes, and when the network is there.
@pytest.mark.parametrize("stop_after", [1, 4])
@pytest.mark.filterwarnings("ignore:.*seed:UserWarning")
def test_resumed(stop_after, tmp_path):
    whole = Run(tmp_path / "whole")
    whole.trainer.train()
    Run(tmp_path / "halves", stop_after=stop_after).trainer.train()
    rest = Run(tmp_path / "halves")
    rest.trainer.train()
    assert_same(whole.hook.latest(), rest.hook.latest())
    assert 0.2 < whole.mask.teacher_success < 0.8
    shares = whole.trainer._log_dict["train/competent"]
    assert shares[0] == 1.0 and shares[-1] < 0.9


if __name__ == "__main__":
    pytest.main([__file__])
