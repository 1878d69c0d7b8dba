# Copyright (c) the torchrl_rpd authors.
#
# This source code is licensed under the MIT license found in the
# LICENSE file in the root directory of this source tree.
"""PPO beside a teacher that acts: whose advantages count, and for how long."""

from __future__ import annotations

import pytest
import torch
from resumable import assert_same
from tensordict import TensorDict
from torchrl.collectors import Collector
from torchrl.envs import Compose, StepCounter, TransformedEnv
from toy_envs import ReachEnv

from torchrl_rpd.evaluation import evaluate
from torchrl_rpd.objectives import DistillPPOLoss, FiniteHorizonGAE
from torchrl_rpd.students import mlp_actor_critic
from torchrl_rpd.trainers import (
    CheckpointHook,
    JumpStartSchedule,
    OwnStepsAdvantage,
    make_ppo_trainer,
)
from torchrl_rpd.transforms import JumpStartTransform, TeacherActionTransform


def frames(advantage, teachers):
    return TensorDict(
        advantage=torch.tensor(advantage).unsqueeze(-1),
        jump_start=torch.tensor(teachers).unsqueeze(-1),
        teacher_mask=torch.ones(len(advantage), 1, dtype=torch.bool),
        batch_size=[len(advantage)],
    )


class TestOwnStepsAdvantage:
    def test_numbers(self):
        # Of the student: 2, 4, 9. Mean 5, deviations -3, -1, 4, mean square 26 / 3.
        td = frames([100.0, 2.0, 4.0, -50.0, 9.0], [True, False, False, True, False])
        out = OwnStepsAdvantage(lambda td: td)(td)["advantage"].flatten()
        scale = (26 / 3) ** 0.5
        expected = [0.0, -3 / scale, -1 / scale, 0.0, 4 / scale]
        torch.testing.assert_close(out, torch.tensor(expected))

    def test_nobody_but_the_teacher(self):
        td = frames([3.0, 4.0], [True, True])
        assert not OwnStepsAdvantage(lambda td: td)(td)["advantage"].any()

    def test_no_policy_gradient_from_the_teachers_steps(self):
        torch.manual_seed(0)
        student = mlp_actor_critic(3, 2, num_cells=(8,))
        td = student.actor(TensorDict(observation=torch.randn(6, 3), batch_size=[6]))
        td = td.detach()
        td["advantage"] = torch.randn(6, 1)
        td["value_target"] = torch.zeros(6, 1)
        td["teacher_action"] = torch.zeros(6, 2)
        td["teacher_mask"] = torch.ones(6, 1, dtype=torch.bool)
        td["jump_start"] = torch.tensor([[1], [1], [1], [0], [0], [0]]).bool()
        td = OwnStepsAdvantage(lambda td: td)(td)
        loss = DistillPPOLoss(student.actor, student.critic, entropy_bonus=False)

        def gradient(td):
            loss.zero_grad()
            loss(td)["loss_objective"].backward()
            return [p.grad.clone() for p in student.actor.parameters()]

        # What the student would have done in the teacher's steps makes no difference.
        other = td.clone()
        other["action"][:3] += 1.0
        for one, two in zip(gradient(td), gradient(other), strict=True):
            assert torch.equal(one, two)
        other["action"][3:] += 0.1
        assert not all(
            torch.equal(one, two)
            for one, two in zip(gradient(td), gradient(other), strict=True)
        )

    def test_missing(self):
        td = TensorDict(advantage=torch.zeros(2, 1), batch_size=[2])
        with pytest.raises(KeyError, match="JumpStartTransform"):
            OwnStepsAdvantage(lambda td: td)(td)


class TestSchedule:
    def test_numbers(self):
        transform = JumpStartTransform(fraction=0.8)
        hook = JumpStartSchedule(transform, start_frames=100, end_frames=300)
        seen = []
        for now in (0, 100, 150, 200, 300, 1000):
            hook.set(now)
            seen.append(transform.fraction)
        # 0.8 times 1, 1, 3/4, 1/2, 0, 0
        assert seen == pytest.approx([0.8, 0.8, 0.6, 0.4, 0.0, 0.0])

    @pytest.mark.parametrize(("start", "end"), [(5, 5), (-1, 5), (6, 5)])
    def test_range(self, start, end):
        with pytest.raises(ValueError, match="start_frames < end_frames"):
            JumpStartSchedule(JumpStartTransform(), start_frames=start, end_frames=end)


class Run:
    """RPD on the toy, the teacher leading into half of the episodes at first."""

    def __init__(self, directory=None, batches=6, stop_after=None):
        torch.manual_seed(0)
        teacher = TeacherActionTransform(
            lambda td: (-5 * td["observation"]).clamp(-1, 1)
        )
        jump = JumpStartTransform(fraction=0.5, max_steps=8)
        env = TransformedEnv(ReachEnv(8), Compose(StepCounter(), jump, teacher))
        env.set_seed(0)
        self.student = student = mlp_actor_critic(2, 2, num_cells=(16,))
        loss = DistillPPOLoss(student.actor, student.critic, distill_coeff=0.1)
        per_batch = 8 * 16
        self.trainer = make_ppo_trainer(
            collector=Collector(
                env,
                student.actor,
                frames_per_batch=per_batch,
                total_frames=batches * per_batch,
                auto_register_policy_transforms=False,
            ),
            loss_module=loss,
            optimizer=torch.optim.Adam(loss.parameters(), lr=3e-3),
            gae=OwnStepsAdvantage(
                FiniteHorizonGAE(gamma=0.9, lmbda=0.9, value_network=student.critic)
            ),
            total_frames=batches * per_batch,
            minibatch_size=32,
            num_epochs=4,
            progress_bar=False,
        )
        JumpStartSchedule(jump, start_frames=0, end_frames=3 * per_batch).register(
            self.trainer
        )
        self.hook = None
        if directory is not None:
            self.hook = CheckpointHook(directory, every=2 * per_batch, config={})
            self.hook.register(self.trainer)
        if stop_after is not None:
            self.trainer.register_op("post_steps", self._stop)
            self.stop_at = stop_after * per_batch

    def _stop(self):
        if self.trainer.collected_frames >= self.stop_at:
            self.trainer.request_stop()


def test_a_run():
    run = Run(batches=12)
    run.trainer.train()
    shares = run.trainer._log_dict["train/jump_start"]
    assert shares[0] > 0.1
    # Batches of whole episodes: those after the end of the schedule are the student's.
    assert shares[4:] == [0.0] * 8
    start = evaluate(ReachEnv(8), Run().student.actor, episodes=32)
    end = evaluate(ReachEnv(8), run.student.actor, episodes=32)
    assert end.episode_return.mean > start.episode_return.mean + 1.0


@pytest.mark.filterwarnings("ignore:.*seed:UserWarning")
def test_resumed(tmp_path):
    whole = Run(tmp_path / "whole")
    whole.trainer.train()
    Run(tmp_path / "halves", stop_after=2).trainer.train()
    rest = Run(tmp_path / "halves")
    rest.trainer.train()
    assert_same(whole.hook.latest(), rest.hook.latest())


if __name__ == "__main__":
    pytest.main([__file__])
