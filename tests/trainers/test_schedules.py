# Copyright (c) the torchrl_rpd authors.
#
# This source code is licensed under the MIT license found in the
# LICENSE file in the root directory of this source tree.
"""Schedules that follow the student's own success, floors, and the teacher's leave."""

from __future__ import annotations

import pytest
import torch
from resumable import Run as Resumable
from resumable import assert_same, assert_same_batches
from tensordict import TensorDict
from torchrl.collectors import Collector
from torchrl.envs import Compose, RewardSum, TransformedEnv
from toy_envs import CoinEnv, ReachEnv

from torchrl_rpd.objectives import DistillPPOLoss, FiniteHorizonGAE
from torchrl_rpd.students import mlp_actor_critic
from torchrl_rpd.trainers import (
    DistillCoeffSchedule,
    LogTeacher,
    make_ppo_trainer,
    return_ratio_coeff,
)
from torchrl_rpd.transforms import TeacherActionTransform

FRAMES = 64  # per batch: 4 environments, 16 steps, 2 episodes of each


@pytest.fixture
def loss():
    student = mlp_actor_critic(2, 2, num_cells=(4,))
    return DistillPPOLoss(student.actor, student.critic)


@pytest.fixture
def teacher():
    return TeacherActionTransform(lambda td: -td["observation"])


def ended(*scores, key="episode_reward"):
    """A batch of one frame of each env: every episode ends, with these scores."""
    score = torch.tensor(scores, dtype=torch.float32).view(-1, 1, 1)
    done = torch.ones_like(score).bool()
    return TensorDict({"next": {key: score, "done": done}}, [len(scores), 1])


def course(schedule, *batches, frames=0):
    """The coefficient in the loss after each of the batches."""
    out = []
    for batch in batches:
        schedule.observe(batch)
        schedule.set(frames)
        out.append(round(float(schedule.loss.distill_coeff), 6))
    return out


class TestReturnRatio:
    def test_by_hand(self):
        # max(1 - student / teacher, 0), of a teacher with a return of 20.
        assert return_ratio_coeff(0, 20) == 1.0
        assert return_ratio_coeff(5, 20) == 0.75  # 1 - 5/20
        assert return_ratio_coeff(20, 20) == 0.0
        assert return_ratio_coeff(30, 20) == 0.0  # 1 - 1.5 < 0
        assert return_ratio_coeff(-5, 20) == 1.0  # 1.25, bounded
        # 0.5 + (4.5 - 0.5) * 0.75
        assert return_ratio_coeff(5, 20, init=4.5, end=0.5) == 3.5

    def test_follows_the_measurements(self, loss):
        schedule = DistillCoeffSchedule(
            loss, kind="return_ratio", init=2.0, teacher_score=10.0, score_episodes=3
        )
        assert course(
            schedule,
            ended(1, 3),  # two episodes are no measurement
            ended(5, 7),  # four are: mean 4, 2 * (1 - 0.4)
            ended(9),
            ended(9, 9),  # since the last one: 9, 2 * (1 - 0.9)
            ended(12, 12, 12),
            ended(0, 0, 0),  # a student that gets worse is helped again
        ) == [2.0, 1.2, 1.2, 0.2, 0.0, 2.0]

    def test_first_value_before_start_frames(self, loss):
        schedule = DistillCoeffSchedule(
            loss,
            kind="return_ratio",
            init=1.0,
            teacher_score=10.0,
            score_episodes=1,
            start_frames=100,
        )
        assert course(schedule, ended(5), frames=99) == [1.0]
        assert course(schedule, ended(5), frames=100) == [0.5]

    def test_keeps_asking_at_zero(self, loss, teacher):
        schedule = DistillCoeffSchedule(
            loss,
            kind="return_ratio",
            init=1.0,
            teacher_score=1.0,
            score_episodes=1,
            transform=teacher,
        )
        assert course(schedule, ended(2)) == [0.0]
        assert teacher.enabled

    def test_reads_scores_where_episodes_end(self, loss):
        """[2 environments, 3 steps]: three ends, with 4, 6 and 8."""
        schedule = DistillCoeffSchedule(
            loss,
            kind="return_ratio",
            init=1.0,
            teacher_score=10.0,
            score_key=("info", "score"),
            score_episodes=3,
        )
        score = torch.tensor([[9.0, 4.0, 9.0], [6.0, 9.0, 8.0]]).unsqueeze(-1)
        done = torch.tensor([[0, 1, 0], [1, 0, 1]]).bool().unsqueeze(-1)
        batch = TensorDict({"next": {"info": {"score": score}, "done": done}}, [2, 3])
        # 1 - (4 + 6 + 8) / 3 / 10
        assert course(schedule, batch) == [0.4]


class TestSwitchOff:
    def schedule(self, loss, **kwargs):
        return DistillCoeffSchedule(
            loss,
            **{
                "init": 1.0,
                "switch_off_score": 0.6,
                "switch_off_rises": 2,
                "score_key": "success",
                "score_episodes": 4,
                **kwargs,
            },
        )

    def run(self, schedule, *successes):
        """Batches of 4 episodes of which so many succeed."""
        batches = [ended(*[1] * n, *[0] * (4 - n), key="success") for n in successes]
        return course(schedule, *batches)

    def test_for_good(self, loss, teacher):
        schedule = self.schedule(loss, transform=teacher)
        # 0.25, 0.5, 0.75: two rises, and 0.75 is enough.
        assert self.run(schedule, 1, 2) == [1.0, 1.0]
        assert teacher.enabled
        assert self.run(schedule, 3, 0, 0) == [0.0, 0.0, 0.0]
        assert not teacher.enabled

    def test_not_under_the_score(self, loss):
        """A student that rises, but not high enough; then one that stays at the top."""
        schedule = self.schedule(loss)
        assert self.run(schedule, 0, 1, 2, 2, 2) == [1.0] * 5
        assert self.run(schedule, 4) == [0.0]

    def test_not_after_a_fall(self, loss):
        # 3 of 4, but 4 -> 3 within the last three; then 3, 3, 4.
        schedule = self.schedule(loss)
        assert self.run(schedule, 4, 3, 3) == [1.0] * 3
        assert self.run(schedule, 4) == [0.0]

    def test_failures_do_not_count_as_a_trend(self, loss):
        assert self.run(self.schedule(loss), *[0] * 6) == [1.0] * 6

    def test_one_batch_is_one_measurement(self, loss):
        """However many episodes end in it, they are of the same policy."""
        schedule = self.schedule(loss)
        assert course(schedule, ended(*[1] * 100, key="success")) == [1.0]
        assert course(schedule, ended(*[1] * 100, key="success")) == [1.0]
        assert course(schedule, ended(*[1] * 100, key="success")) == [0.0]

    def test_ends_every_kind(self, loss):
        for kind in (
            {"kind": "linear", "end": 1.0, "end_frames": 9},
            {"kind": "cosine", "end": 1.0, "end_frames": 9},
            {"kind": "return_ratio", "end": 1.0, "teacher_score": 0.5},
        ):
            schedule = self.schedule(loss, floor=0.5, **kind)
            assert self.run(schedule, 3, 3, 3) == [1.0, 1.0, 0.0]

    def test_booleans(self, loss):
        schedule = self.schedule(loss, switch_off_rises=1, score_episodes=2)
        after = {
            "success": torch.ones(2, 1, 1).bool(),
            "done": torch.ones(2, 1, 1).bool(),
        }
        batch = TensorDict({"next": after}, [2, 1])
        assert course(schedule, batch, batch) == [1.0, 0.0]


class TestFloor:
    def test_of_a_line(self, loss, teacher):
        schedule = DistillCoeffSchedule(
            loss,
            kind="linear",
            init=1.0,
            end_frames=100,
            floor=0.25,
            transform=teacher,
        )
        values = [round(schedule.coefficient(f), 6) for f in (0, 50, 75, 80, 100, 999)]
        assert values == [1.0, 0.5, 0.25, 0.25, 0.25, 0.25]
        schedule.set(999)
        assert teacher.enabled

    def test_of_a_cosine(self, loss):
        schedule = DistillCoeffSchedule(
            loss, kind="cosine", init=1.0, end_frames=100, floor=0.5
        )
        # Half of the way the cosine is at 0.5.
        assert schedule.coefficient(25) == pytest.approx(0.853553, abs=1e-6)
        assert [round(schedule.coefficient(f), 6) for f in (50, 75)] == [0.5, 0.5]

    def test_of_a_ratio(self, loss):
        schedule = DistillCoeffSchedule(
            loss,
            kind="return_ratio",
            init=1.0,
            teacher_score=10.0,
            floor=0.25,
            score_episodes=1,
        )
        assert course(schedule, ended(5), ended(8), ended(99)) == [0.5, 0.25, 0.25]


class TestTeacherLeaves:
    @pytest.mark.parametrize(
        ("kwargs", "frames", "leaves"),
        [
            ({"init": 0.0}, 0, True),
            ({"init": 0.0, "kind": "linear", "end": 1.0, "end_frames": 9}, 0, False),
            ({"init": 1.0, "kind": "linear", "end_frames": 9}, 8, False),
            ({"init": 1.0, "kind": "linear", "end_frames": 9}, 9, True),
            ({"init": 1.0, "kind": "cosine", "end_frames": 9}, 9, True),
            ({"init": 0.0, "kind": "return_ratio", "teacher_score": 1.0}, 0, True),
        ],
    )
    def test_where_zero_is_for_good(self, loss, teacher, kwargs, frames, leaves):
        schedule = DistillCoeffSchedule(loss, transform=teacher, **kwargs)
        schedule.set(frames)
        assert teacher.enabled is not leaves


class Run:
    """A small run on a toy environment, with the schedule under test."""

    def __init__(self, batches=6, fraction=1.0, env=None, **schedule):
        torch.manual_seed(0)
        self.teacher = TeacherActionTransform(
            lambda td: torch.zeros(td.shape[0], 2), query_fraction=fraction
        )
        env = ReachEnv(4) if env is None else env
        observed = env.observation_spec["observation"].shape[-1]
        env = TransformedEnv(env, Compose(RewardSum(), self.teacher))
        student = mlp_actor_critic(observed, 2, num_cells=(8,), log_std_init=-1.0)
        self.loss = DistillPPOLoss(student.actor, student.critic)
        self.trainer = make_ppo_trainer(
            collector=Collector(
                env,
                student.actor,
                frames_per_batch=FRAMES,
                total_frames=batches * FRAMES,
                auto_register_policy_transforms=False,
            ),
            loss_module=self.loss,
            optimizer=torch.optim.Adam(self.loss.parameters(), lr=1e-3),
            gae=FiniteHorizonGAE(gamma=0.9, lmbda=0.9, value_network=student.critic),
            total_frames=batches * FRAMES,
            minibatch_size=32,
            num_epochs=1,
            target_kl=None,
            progress_bar=False,
        )
        self.schedule = DistillCoeffSchedule(
            self.loss, init=1.0, transform=self.teacher, **schedule
        )
        self.schedule.register(self.trainer)
        LogTeacher(self.teacher).register(self.trainer)
        self.trainer.train()

    def log(self, key):
        return self.trainer._log_dict[key]


class TestInTheTrainer:
    def test_queries_end_with_the_switch(self):
        """Any return is over -100: off with the third measurement, of 16 episodes each."""
        run = Run(
            batches=8,
            switch_off_score=-100.0,
            switch_off_rises=1,
            score_episodes=16,
        )
        coefficients = run.log("schedule/distill_coeff")
        off = coefficients.index(0.0)
        # 8 episodes end per batch: there are measurements after every second one.
        assert off % 2 == 1
        assert off >= 3
        assert coefficients == [1.0] * off + [0.0] * (8 - off)
        # The frames so far, and the roots that the next batch begins with.
        queries = run.log("teacher/queries")
        assert queries[off] == queries[-1] == (off + 1) * FRAMES + 4
        assert run.schedule.off
        assert float(run.loss.distill_coeff) == 0.0

    def test_ratio_of_returns(self):
        """Episodes of 2 and 10 steps in turn, with 1 per step: a known return.

        Two environments end theirs at step 2, 12, 14, 24, 26, 36, 38, 48, the other two
        at 10, 12, 22, 24, 34, 36, 46, 48; the return is 2 where the last was 10.
        """
        run = Run(
            batches=3,
            env=CoinEnv(4),
            kind="return_ratio",
            teacher_score=10.0,
            score_episodes=8,
        )
        # Steps 1-16: 2 * (2 + 10 + 2) + 2 * (10 + 2) = 52 in 10 episodes; 17-32:
        # 4 * (10 + 2) = 48 in 8; 33-48: 2 * (10 + 2 + 10) + 2 * (10 + 2 + 10 + 2) = 92
        # in 14.
        scores = [52 / 10, 48 / 8, 92 / 14]
        assert run.log("schedule/score") == pytest.approx(scores)
        assert run.log("schedule/distill_coeff") == pytest.approx(
            [0.48, 0.4, 0.342857], abs=1e-6
        )
        assert float(run.loss.distill_coeff) == pytest.approx(0.342857, abs=1e-6)

    def test_a_fifth_of_the_frames(self):
        stats = Run(fraction=0.2).teacher.stats()
        assert stats["queries"] < stats["frames"]
        # A binomial with 388 draws: the mean is 77.6, the standard deviation 7.9.
        assert abs(stats["queries"] - 0.2 * stats["frames"]) < 4 * 7.9

    def test_no_score_where_none_is_needed(self):
        assert Run(batches=1).log("schedule/score") == []

    def test_score_that_is_not_there(self, loss):
        schedule = DistillCoeffSchedule(
            loss, kind="return_ratio", init=1.0, teacher_score=1.0
        )
        with pytest.raises(KeyError, match="RewardSum"):
            schedule.observe(ended(1, key="success"))


class TestState:
    def test_round_trip(self, loss):
        kwargs = {
            "init": 1.0,
            "kind": "return_ratio",
            "teacher_score": 10.0,
            "switch_off_score": 7.0,
            "switch_off_rises": 1,
            "score_episodes": 3,
        }
        first = DistillCoeffSchedule(loss, **kwargs)
        # A measurement of 4, and two episodes towards the next one.
        assert course(first, ended(3, 4, 5), ended(7, 7)) == [0.6, 0.6]
        second = DistillCoeffSchedule(loss, **kwargs)
        second.load_state_dict(first.state_dict())
        assert second.coefficient(0) == first.coefficient(0) == 0.6
        # 7, 7 and 10 make 8: risen, and over 7.
        assert course(second, ended(10)) == [0.0]
        third = DistillCoeffSchedule(loss, **kwargs)
        third.load_state_dict(second.state_dict())
        assert course(third, ended(0, 0, 0)) == [0.0]

    @pytest.mark.parametrize("stop_after", [2, 3])
    def test_stopped_and_started_again(self, tmp_path, monkeypatch, stop_after):
        """Bit for bit, with the switch before or after the stop."""

        def switched(loss, **kwargs):
            return DistillCoeffSchedule(
                loss,
                init=1.0,
                switch_off_score=-100.0,
                switch_off_rises=1,
                score_episodes=6,
                transform=kwargs["transform"],
            )

        monkeypatch.setattr("resumable.DistillCoeffSchedule", switched)

        def run(directory, **kwargs):
            return Resumable(tmp_path / directory, batches=5, every=1, **kwargs).train()

        whole = run("whole", stop_after=None)
        run("halves", stop_after=stop_after)
        rest = run("halves")
        assert_same_batches(whole.recorder, rest.recorder)
        assert_same(whole.hook.latest(), rest.hook.latest())
        log = whole.trainer._log_dict["schedule/distill_coeff"]
        assert log[0] == 1.0


class TestRefusals:
    @pytest.mark.parametrize(
        ("kwargs", "match"),
        [
            ({"kind": "ratio"}, "kind is one of"),
            ({"floor": -1.0}, "not negative"),
            ({"floor": 2.0}, "over the first value"),
            ({"kind": "return_ratio"}, r"teacher_score.*evaluate"),
            ({"kind": "return_ratio", "teacher_score": 0.0}, "teacher_score"),
            ({"kind": "return_ratio", "teacher_score": -3.0}, "teacher_score"),
            ({"switch_off_rises": 0}, "at least 1"),
            ({"score_episodes": 0}, "at least 1"),
        ],
    )
    def test_arguments(self, loss, kwargs, match):
        with pytest.raises(ValueError, match=match):
            DistillCoeffSchedule(loss, **{"init": 1.0, **kwargs})


if __name__ == "__main__":
    pytest.main([__file__])
