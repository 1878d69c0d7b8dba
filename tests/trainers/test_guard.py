# Copyright (c) the torchrl_rpd authors.
#
# This source code is licensed under the MIT license found in the
# LICENSE file in the root directory of this source tree.
"""A run that stops at the first number that is none, and says where it was."""

from __future__ import annotations

import math

import pytest
import torch
from tensordict import TensorDict
from torchrl.collectors import Collector
from torchrl.envs import Compose, StepCounter, TransformedEnv
from toy_envs import ReachEnv

from torchrl_rpd.objectives import DistillPPOLoss, FiniteHorizonGAE
from torchrl_rpd.students import mlp_actor_critic
from torchrl_rpd.trainers import NonFiniteError, NumericalGuard, make_ppo_trainer
from torchrl_rpd.trainers import guard as module
from torchrl_rpd.transforms import TeacherActionTransform

PER_BATCH = 8 * 8


class BadReward(ReachEnv):
    """Gives a reward of NaN to one env from its tenth step on."""

    steps = 0

    def _step(self, td):
        out = super()._step(td)
        self.steps += 1
        if self.steps >= 10:
            out["reward"][3] = math.nan
        return out


def trainer_of(env, guard, *, lr=3e-3, label=None, **kwargs):
    """RPD on the toy."""
    torch.manual_seed(0)
    label = label or (lambda td: (-5 * td["observation"]).clamp(-1, 1))
    teacher = TeacherActionTransform(label)
    env = TransformedEnv(env, Compose(StepCounter(), teacher))
    student = mlp_actor_critic(2, 2, num_cells=(16,))
    loss = DistillPPOLoss(student.actor, student.critic, distill_coeff=0.1)
    trainer = make_ppo_trainer(
        collector=Collector(
            env,
            student.actor,
            frames_per_batch=PER_BATCH,
            total_frames=4 * PER_BATCH,
            auto_register_policy_transforms=False,
        ),
        loss_module=loss,
        optimizer=torch.optim.Adam(loss.parameters(), lr=lr),
        gae=FiniteHorizonGAE(gamma=0.9, lmbda=0.9, value_network=student.critic),
        total_frames=4 * PER_BATCH,
        minibatch_size=32,
        num_epochs=2,
        target_kl=None,
        progress_bar=False,
        **kwargs,
    )
    guard.register(trainer)
    return trainer


class TestBatches:
    def test_a_reward(self, tmp_path):
        trainer = trainer_of(BadReward(8), NumericalGuard(tmp_path))
        weights = [p.clone() for p in trainer.loss_module.parameters()]
        with pytest.raises(NonFiniteError, match="next/reward in") as error:
            trainer.train()
        # The tenth step is in the second batch of eight; the first one was learned from.
        assert error.value.frames == 2 * PER_BATCH
        after = list(trainer.loss_module.parameters())
        assert all(p.isfinite().all() for p in after)
        assert any(not torch.equal(a, b) for a, b in zip(weights, after, strict=True))
        saved = TensorDict.load_memmap(error.value.path)
        assert saved["next", "reward"][3].isnan().sum() == 7  # steps 10 to 16
        assert saved["next", "reward"][:3].isfinite().all()

    def test_which_entries_and_how_many_rows(self, tmp_path):
        td = TensorDict(
            {
                "action": torch.tensor([[0.0, math.inf], [0.0, 0.0], [math.nan, 1.0]]),
                "teacher_action": torch.full((3, 2), math.nan),
                "teacher_mask": torch.tensor([[False], [True], [False]]),
                "observation": torch.full((3, 2), math.nan),  # not looked at
            },
            [3],
        )
        with pytest.raises(NonFiniteError) as error:
            NumericalGuard(tmp_path).check(td, frames=5)
        assert "after 5 frames: action in 2, teacher_action in 1 of 3 rows" in str(
            error.value
        )

    def test_unlabelled_rows_may_hold_anything(self, tmp_path):
        td = TensorDict(
            teacher_action=torch.full((3, 2), math.nan),
            teacher_mask=torch.zeros(3, 1, dtype=torch.bool),
            batch_size=[3],
        )
        NumericalGuard(tmp_path).check(td, frames=0)
        assert not list(tmp_path.iterdir())


class TestMasking:
    def test_rows_are_left_out_and_counted(self, tmp_path, monkeypatch):
        told = []
        monkeypatch.setattr(module.logger, "warning", told.append)
        guard = NumericalGuard(tmp_path, on_non_finite="mask", min_ess=None)
        trainer = trainer_of(BadReward(8), guard)
        seen = []
        trainer.loss_module.register_forward_pre_hook(
            lambda _, args: seen.append(args[0])
        )
        trainer.train()
        assert trainer.collected_frames == 4 * PER_BATCH
        # One env of eight, 8 steps each. NaN from its tenth step on: the advantage of
        # the ninth, which is of an episode that ends at step 16, is spoilt as well.
        assert trainer._log_dict["guard/masked_rows"] == [8, 8, 8]
        rows = [minibatch.numel() for minibatch in seen]
        assert sum(rows[:4]) == 2 * 64  # the first batch, two epochs
        assert sum(rows[4:]) == 3 * 2 * (64 - 8)
        assert all(m["advantage"].isfinite().all() for m in seen)
        assert all(p.isfinite().all() for p in trainer.loss_module.parameters())
        # Told once, with the first such batch.
        assert len(told) == 1
        assert "next/reward in 7" in told[0]
        (path,) = tmp_path.iterdir()
        assert TensorDict.load_memmap(path)["next", "reward"][3].isnan().sum() == 7

    def test_a_batch_without_a_finite_row_stops(self, tmp_path):
        class NoReward(ReachEnv):
            def _step(self, td):
                out = super()._step(td)
                return out.set("reward", out["reward"] * math.nan)

        guard = NumericalGuard(tmp_path, on_non_finite="mask")
        with pytest.raises(NonFiniteError, match="every row of a minibatch"):
            trainer_of(NoReward(8), guard).train()


class TestLosses:
    @pytest.mark.parametrize("choice", ["stop", "mask"])
    def test_a_loss_stops_before_its_step(self, choice, tmp_path):
        guard = NumericalGuard(tmp_path, on_non_finite=choice)
        trainer = trainer_of(ReachEnv(8), guard)
        inner = trainer.loss_module.loss_critic

        def broken(td):
            out = inner(td)
            return (out[0] * math.nan, *out[1:])

        trainer.loss_module.loss_critic = broken
        before = [p.clone() for p in trainer.loss_module.parameters()]
        with pytest.raises(NonFiniteError, match="loss_critic of a minibatch") as error:
            trainer.train()
        after = trainer.loss_module.parameters()
        assert all(torch.equal(a, b) for a, b in zip(before, after, strict=True))
        assert TensorDict.load_memmap(error.value.path).batch_size == (32,)


class TestCollapse:
    def test_a_policy_that_jumps(self, tmp_path, monkeypatch):
        told = []
        monkeypatch.setattr(module.logger, "warning", told.append)
        trainer_of(ReachEnv(8), NumericalGuard(tmp_path), lr=1.0).train()
        assert told
        assert "effective sample size" in told[-1] or "KL" in told[-1]
        assert not list(tmp_path.iterdir())  # the run went on

    def test_told_when_it_begins(self, tmp_path, monkeypatch):
        told, logged = [], []
        monkeypatch.setattr(module.logger, "warning", told.append)
        guard = NumericalGuard(tmp_path, max_kl=2.0)
        trainer = trainer_of(ReachEnv(8), guard)
        for kl in (5.0, 5.0, 0.1, 5.0):
            trainer._log_dict["kl_k3"].append(kl)
            trainer.collected_frames += PER_BATCH
            logged.append("guard/collapse" in (guard._log(TensorDict()) or {}))
        assert logged == [True, True, False, True]
        first, again = told
        assert f"after {PER_BATCH} frames" in first
        assert f"after {4 * PER_BATCH} frames" in again

    def test_a_steady_one(self, tmp_path, monkeypatch):
        told = []
        monkeypatch.setattr(module.logger, "warning", told.append)
        trainer = trainer_of(ReachEnv(8), NumericalGuard(tmp_path), lr=1e-4)
        trainer.train()
        assert not told
        assert "guard/collapse" not in trainer._log_dict


@pytest.mark.parametrize(
    "limits",
    [
        {"max_kl": 0.0},
        {"max_kl": math.nan},
        {"min_ess": 1.5},
        {"on_non_finite": "ignore"},
    ],
)
def test_limits(tmp_path, limits):
    with pytest.raises(ValueError, match="must"):
        NumericalGuard(tmp_path, **limits)


if __name__ == "__main__":
    pytest.main([__file__])
