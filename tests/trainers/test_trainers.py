# Copyright (c) the torchrl_rpd authors.
#
# This source code is licensed under the MIT license found in the
# LICENSE file in the root directory of this source tree.
"""The stock trainer with the hooks of this package."""

from __future__ import annotations

import math

import pytest
import torch
from tensordict import TensorDict
from torch.nn.utils import parameters_to_vector
from torchrl.collectors import Collector
from torchrl.envs import Compose, StepCounter, TransformedEnv
from torchrl.trainers.algorithms import PPOTrainer
from toy_envs import ReachEnv

from torchrl_rpd.evaluation import evaluate
from torchrl_rpd.objectives import DistillPPOLoss, FiniteHorizonGAE
from torchrl_rpd.students import mlp_actor_critic
from torchrl_rpd.trainers import (
    DistillCoeffSchedule,
    EvaluationHook,
    LogEpisodes,
    LogTeacher,
    ObservationNormUpdate,
    OnPolicyMinibatches,
    TargetKLStepper,
    distill_coeff_at,
    make_ppo_trainer,
)
from torchrl_rpd.transforms import TeacherActionTransform

FRAMES = 128  # per batch: 8 environments, 16 steps


def steer(td):
    """A teacher that errs by a constant: it stops at (0.3, 0)."""
    goal = torch.tensor([0.3, 0.0])
    return ((goal - td["observation"]) / 0.2).clamp(-1, 1)


def halved(optimizer):
    """The learning rate of each batch is half of the one before."""
    return torch.optim.lr_scheduler.ExponentialLR(optimizer, 0.5)


class Run:
    """A small RPD run on a toy environment."""

    def __init__(self, batches=3, coeff=1.0, seed=0, scheduler=None, **kwargs):
        torch.manual_seed(seed)
        self.teacher = TeacherActionTransform(steer, in_keys=["observation"])
        env = TransformedEnv(ReachEnv(8), Compose(StepCounter(), self.teacher))
        env.set_seed(seed)
        self.student = mlp_actor_critic(2, 2, num_cells=(32,), log_std_init=-1.0)
        self.loss = DistillPPOLoss(
            self.student.actor,
            self.student.critic,
            distill_coeff=coeff,
            entropy_bonus=False,
            normalize_advantage=True,
        )
        collector = Collector(
            env,
            self.student.actor,
            frames_per_batch=FRAMES,
            total_frames=batches * FRAMES,
            auto_register_policy_transforms=False,
        )
        self.gae_calls = 0
        gae = FiniteHorizonGAE(gamma=0.9, lmbda=0.9, value_network=self.student.critic)

        def counted(td):
            self.gae_calls += 1
            return gae(td)

        kwargs.setdefault("target_kl", None)
        kwargs.setdefault("num_epochs", 4)
        self.optimizer = torch.optim.Adam(self.loss.parameters(), lr=3e-3)
        if scheduler is not None:
            kwargs["lr_scheduler"] = scheduler(self.optimizer)
        self.trainer = make_ppo_trainer(
            collector=collector,
            loss_module=self.loss,
            optimizer=self.optimizer,
            gae=counted,
            total_frames=batches * FRAMES,
            minibatch_size=30,  # 5 per epoch, the last of 8 rows
            progress_bar=False,
            **kwargs,
        )

    def log(self, key):
        return self.trainer._log_dict[key]


def test_every_epoch_of_every_batch_is_trained():
    run = Run(batches=3)
    steps = []
    original = run.optimizer.step
    run.optimizer.step = lambda *a, **k: (steps.append(1), original(*a, **k))[1]
    run.trainer.train()
    assert isinstance(run.trainer, PPOTrainer)
    assert len(steps) == 3 * 4 * 5
    assert run.gae_calls == 3  # once per batch, not per epoch
    assert run.log("optim_steps") == [20.0, 20.0, 20.0]
    assert run.log("ppo_active") == run.log("distill_active") == [1.0] * 3
    assert run.trainer.collected_frames == 3 * FRAMES


def test_rpd_ends_better_than_its_teacher():
    """The teacher stops 0.3 beside the goal; the reward takes the student on."""
    teacher = evaluate(ReachEnv(8), steer, episodes=64)
    run = Run(batches=60, coeff=1.0)
    DistillCoeffSchedule(
        run.loss, kind="linear", init=1.0, end=0.0, end_frames=30 * FRAMES
    ).register(run.trainer)
    ObservationNormUpdate(run.student.observation_norm).register(run.trainer)
    run.trainer.train()
    student = evaluate(ReachEnv(8), run.student.actor, episodes=64)
    assert teacher.success_at_end.mean == 0.0
    assert student.success_at_end.mean > 0.5
    assert student.episode_return.mean > teacher.episode_return.mean


@pytest.mark.slow  # a minute of compilation
def test_compiled_updates_are_the_same_but_for_rounding():
    weights = []
    for compiled in (False, True):
        torch.manual_seed(0)
        run = Run(batches=2, compile=compiled)
        names = set(run.loss.state_dict())
        run.trainer.train()
        assert set(run.loss.state_dict()) == names
        weights.append(parameters_to_vector(run.student.actor.parameters()))
    torch.testing.assert_close(*weights, rtol=1e-3, atol=1e-4)


def test_imitation_alone_becomes_the_teacher():
    run = Run(batches=30, loss_components=["loss_distill"])
    before = {n: p.clone() for n, p in run.student.critic.named_parameters()}
    run.trainer.train()
    for name, parameter in run.student.critic.named_parameters():
        assert torch.equal(parameter, before[name])
    assert run.log("ppo_active") == [0.0] * 30
    assert run.log("distill_error")[-1] < 0.25 * run.log("distill_error")[0]
    assert evaluate(ReachEnv(8), run.student.actor, episodes=8).success_at_end.mean == 0


def test_same_seed_same_parameters():
    parameters = []
    for seed in (0, 0, 1):
        run = Run(batches=2, seed=seed)
        run.trainer.train()
        parameters.append(torch.cat([p.flatten() for p in run.loss.parameters()]))
    first, again, other = parameters
    assert torch.equal(first, again)
    assert not torch.equal(first, other)


class TestTargetKL:
    def test_stop_ends_the_batch_before_the_step(self):
        """At this learning rate the second minibatch is over any target."""
        run = Run(batches=2, target_kl=1e-6, kl_rule="stop")
        run.trainer.train()
        assert run.log("optim_steps") == [1.0, 1.0]
        assert run.log("ppo_active") == [1 / 20] * 2
        assert run.log("distill_active") == [1 / 20] * 2

    def test_distill_only_goes_on_without_ppo(self):
        run = Run(batches=2, target_kl=1e-6, kl_rule="distill_only")
        run.trainer.train()
        assert run.log("optim_steps") == [20.0, 20.0]
        assert run.log("distill_active") == [1.0, 1.0]
        assert run.log("ppo_active")[0] < 0.5

    def test_adaptive_lr_keeps_both_terms(self):
        run = Run(batches=3, target_kl=1e-3, kl_rule="adaptive_lr")
        run.trainer.train()
        assert run.log("ppo_active") == run.log("distill_active") == [1.0] * 3
        assert run.log("lr")[-1] < 3e-3
        free = Run(batches=3)
        free.trainer.train()
        assert run.log("kl_k3")[0] < 0.5 * free.log("kl_k3")[0]

    def test_adaptive_lr_by_hand(self):
        stepper = TargetKLStepper(0.1, rule="adaptive_lr", min_lr=0.5)
        optimizer = torch.optim.SGD([torch.zeros(1)], lr=1.5)
        rates = []
        for kl in (0.21, 0.1, 0.21, 0.21, 0.21, 0.04, 0.04, 0.04):
            stepper._adapt(optimizer, kl)
            rates.append(round(optimizer.param_groups[0]["lr"], 4))
        # /1.5, in between, /1.5, floor, floor, then *1.5 up to where it started
        assert rates == [1.0, 1.0, 0.6667, 0.5, 0.5, 0.75, 1.125, 1.5]

    @pytest.mark.parametrize("rule", ["stop", "adaptive_lr"])
    def test_annealing_by_hand(self, rule):
        """Half of the way: full; then a line to 0 at the end."""
        stepper = TargetKLStepper(0.1, rule=rule, anneal_from=0.5)
        optimizer = torch.optim.SGD([torch.zeros(1)], lr=2.0)
        rates = []
        for progress in (0.2, 0.5, 0.75, 0.9, 1.0):
            stepper._anneal(optimizer, progress)
            rates.append(round(optimizer.param_groups[0]["lr"], 4))
        assert rates == [2.0, 2.0, 1.0, 0.4, 0.0]

    def test_annealing_bounds_what_adapts(self):
        stepper = TargetKLStepper(0.1, rule="adaptive_lr", anneal_from=0.0)
        optimizer = torch.optim.SGD([torch.zeros(1)], lr=2.0)
        stepper._anneal(optimizer, 0.5)  # bound 1.0
        stepper._adapt(optimizer, 0.3)  # far: / 1.5
        stepper._anneal(optimizer, 0.5)
        assert optimizer.param_groups[0]["lr"] == pytest.approx(2 / 3)
        stepper._adapt(optimizer, 0.01)
        stepper._adapt(optimizer, 0.01)  # near: * 1.5 twice
        stepper._anneal(optimizer, 0.5)
        assert optimizer.param_groups[0]["lr"] == 1.0

    def test_learning_rate_ends_at_zero(self):
        run = Run(batches=4, anneal_from=0.5)
        run.trainer.train()
        assert run.log("lr") == pytest.approx([3e-3, 3e-3, 1.5e-3, 0.0])

    def test_torchrls_scheduler_steps_once_per_batch(self):
        run = Run(batches=3, scheduler=halved)
        run.trainer.train()
        # The rate after each batch, of which the first had 3e-3.
        assert run.log("lr") == pytest.approx([1.5e-3, 0.75e-3, 0.375e-3])

    def test_means_are_over_all_minibatches(self):
        run = Run(batches=1)
        seen = []
        forward = run.loss.forward

        def recorded(td):
            out = forward(td)
            seen.append(out["loss_critic"].item())
            return out

        run.loss.forward = recorded
        run.trainer.train()
        assert len(seen) == 20
        assert run.log("loss_critic")[0] == pytest.approx(sum(seen) / 20, rel=1e-5)

    @pytest.mark.parametrize(
        ("kwargs", "match"),
        [
            ({"rule": "none"}, "rule is"),
            ({"target_kl": 0.0}, "positive"),
            ({"anneal_from": 1.0}, "anneal_from"),
        ],
    )
    def test_refusals(self, kwargs, match):
        with pytest.raises(ValueError, match=match):
            TargetKLStepper(**{"target_kl": 0.1, **kwargs})


class TestSchedule:
    def test_the_released_cosine(self):
        """0.5 * cos(pi * step / max) + 0.5."""
        for step in (0, 10, 50, 77, 100):
            assert distill_coeff_at(
                step, kind="cosine", init=1.0, end=0.0, start_frames=0, end_frames=100
            ) == pytest.approx(0.5 * math.cos(math.pi * step / 100) + 0.5)

    def test_linear_with_a_plateau(self):
        at = {"kind": "linear", "init": 2.0, "end": 0.5}
        values = [
            distill_coeff_at(f, start_frames=10, end_frames=20, **at)
            for f in (0, 10, 15, 20, 99)
        ]
        assert values == [2.0, 2.0, 1.25, 0.5, 0.5]

    def test_teacher_is_asked_no_more_at_zero(self):
        run = Run(batches=6)
        DistillCoeffSchedule(
            run.loss,
            kind="linear",
            init=1.0,
            end=0.0,
            end_frames=3 * FRAMES,
            transform=run.teacher,
        ).register(run.trainer)
        LogTeacher(run.teacher).register(run.trainer)
        run.trainer.train()
        # The coefficient is 2/3, 1/3 and 0 for the first three batches; the frame that
        # the third batch ends with has been labelled for the fourth.
        queries = run.log("teacher/queries")
        assert queries[2] == queries[-1] == 3 * FRAMES + 8
        assert not run.teacher.enabled
        assert float(run.loss.distill_coeff) == 0.0

    @pytest.mark.parametrize(
        "kwargs",
        [
            {"kind": "quadratic", "init": 1.0},
            {"init": -1.0},
            {"kind": "linear", "init": 1.0},
            {"kind": "cosine", "init": 1.0, "start_frames": 5, "end_frames": 5},
        ],
    )
    def test_refusals(self, kwargs):
        with pytest.raises(ValueError, match=r"kind|negative|end_frames"):
            DistillCoeffSchedule(Run().loss, **kwargs)


def test_minibatches_are_drawn_from_the_batch_itself():
    """Pictures fill the memory: there is no second copy of them."""
    data = OnPolicyMinibatches(lambda td: td, 4)
    batch = TensorDict(x=torch.zeros(2, 5), batch_size=[2, 5])
    data.prepare(batch)
    batch["x"].fill_(7)
    assert (data.sample(batch)["x"] == 7).all()


def test_minibatches_are_permutations_of_the_batch():
    data = OnPolicyMinibatches(lambda td: td, 4, drop_keys=["big"])
    batch = TensorDict(
        {"x": torch.arange(10).reshape(2, 5), "big": torch.zeros(2, 5)},
        batch_size=[2, 5],
    )
    data.prepare(batch)
    orders = []
    for _ in range(2):
        rows = []
        with pytest.raises(StopIteration):
            while True:
                minibatch = data.sample(batch)
                assert "big" not in minibatch
                rows += minibatch["x"].tolist()
        assert sorted(rows) == list(range(10))
        orders.append(rows)
    assert orders[0] != orders[1]
    # An epoch that was left in the middle leaves nothing for the next batch.
    data.sample(batch)
    data.prepare(batch.apply(lambda x: x + 100))
    rows = [x for _ in range(3) for x in data.sample(batch)["x"].tolist()]
    assert sorted(rows) == list(range(100, 110))
    assert "big" in batch


def test_statistics_change_after_the_updates_only():
    run = Run(batches=2, num_epochs=1)
    ObservationNormUpdate(run.student.observation_norm).register(run.trainer)
    ratios = []
    forward = run.loss.forward

    def recorded(td):
        out = forward(td)
        ratios.append(out["kl_k3"].item())
        return out

    run.loss.forward = recorded
    run.trainer.train()
    # The first minibatch of each batch sees the policy that collected it.
    assert ratios[0] == pytest.approx(0.0, abs=1e-6)
    assert ratios[5] == pytest.approx(0.0, abs=1e-6)
    assert run.student.observation_norm.count == 2 * FRAMES


def test_logged_episodes_and_evaluations():
    run = Run(batches=4)
    LogEpisodes().register(run.trainer)
    hook = EvaluationHook(
        ReachEnv(4), run.student.actor, interval=2 * FRAMES, episodes=8
    )
    hook.register(run.trainer)
    run.trainer.train()
    assert run.log("train/episodes") == [16] * 4
    assert run.log("train/episode_length") == [8.0] * 4
    assert [frames for frames, _ in hook.history] == [2 * FRAMES, 4 * FRAMES]
    assert run.log("eval/length") == [8.0, 8.0]


def test_two_trainers_do_not_share_their_counters():
    first = Run(batches=2)
    first.trainer.train()
    last_log = dict(first.trainer._last_log)
    second = Run(batches=1)
    assert first.trainer.collected_frames == 2 * FRAMES
    assert first.trainer._last_log == last_log
    assert second.trainer.collected_frames == 0


class TestRefusals:
    def test_arguments_that_are_set(self):
        with pytest.raises(TypeError, match="optim_steps_per_batch"):
            Run(optim_steps_per_batch=5)

    def test_two_courses_of_one_learning_rate(self):
        with pytest.raises(ValueError, match=r"anneal_from=0\.5 and lr_scheduler"):
            Run(anneal_from=0.5, scheduler=halved)
        with pytest.raises(ValueError, match="adaptive_lr' and lr_scheduler"):
            Run(target_kl=0.1, kl_rule="adaptive_lr", scheduler=halved)

    def test_optimiser_of_other_parameters(self):
        run = Run()
        with pytest.raises(ValueError, match=r"loss_module.parameters"):
            make_ppo_trainer(
                collector=run.trainer.collector,
                loss_module=run.loss,
                optimizer=torch.optim.Adam(run.student.actor.parameters()),
                gae=lambda td: td,
                total_frames=1,
                minibatch_size=1,
            )

    def test_sample_before_prepare(self):
        with pytest.raises(RuntimeError, match="prepare"):
            OnPolicyMinibatches(lambda td: td, 4).sample(TensorDict())

    def test_intervals(self):
        with pytest.raises(ValueError, match="interval"):
            EvaluationHook(ReachEnv(), lambda td: td, interval=0)
        with pytest.raises(ValueError, match="minibatch_size"):
            OnPolicyMinibatches(lambda td: td, 0)


if __name__ == "__main__":
    pytest.main([__file__])
