# Copyright (c) the torchrl_rpd authors.
#
# This source code is licensed under the MIT license found in the
# LICENSE file in the root directory of this source tree.
"""N iterations equal N/2, a new start and N/2 more, bit for bit."""

from __future__ import annotations

import os
import shutil
import signal
from functools import partial

import pytest
import torch
from resumable import (
    NoisyTeacher,
    Run,
    StreamEnv,
    assert_same,
    assert_same_batches,
    contents,
)
from tensordict import TensorDict
from torch.optim.lr_scheduler import MultiStepLR
from torchrl.envs import Transform
from toy_envs import ReachEnv

from torchrl_rpd.trainers import CheckpointHook, EvaluationHook


class PlanningTeacher:
    """Plans 3 actions from the last two observations."""

    history_window = 2
    history_keys = ("observation",)
    in_keys = ("observation",)
    out_keys = (("vla_action", "chunk"),)

    def __call__(self, td):
        before, now = td["observation"].unbind(1)
        plan = torch.stack([-now, before - now, now + before], 1)
        return td.set(("vla_action", "chunk"), plan)


VARIANTS = {
    "query_fraction": {"label": {"query_fraction": 0.5}},
    "chunks_and_history": {
        "teacher": PlanningTeacher(),
        "label": {"replan_interval": 3},
    },
    # Off after the first batch: it must not be asked again after the new start.
    "teacher_switched_off": {"coeff_frames": 40},
    # As preset=pixels: the rate of the second half is another.
    "lr_scheduler": {
        "scheduler": partial(MultiStepLR, milestones=[1, 3], gamma=0.1),
        "kl_rule": "stop",
    },
    # Without streams the environment is given a new seed at each checkpoint.
    "no_streams": {"env": ReachEnv},
}


def start(directory, variant, **kwargs):
    arguments = dict(VARIANTS[variant])
    if "env" in arguments:
        arguments["env"] = arguments["env"](4)
    return Run(directory, **arguments, **kwargs)


@pytest.mark.parametrize("variant", VARIANTS)
def test_stopped_and_started_again(variant, tmp_path):
    whole = start(tmp_path / "whole", variant).train()
    half = start(tmp_path / "halves", variant, stop_after=2).train()
    assert half.trainer.collected_frames == 2 * half.frames_per_batch
    before = contents(half.hook.latest())["loss_module"]
    # The process's generators are elsewhere at the second start.
    torch.rand(7)
    rest = start(tmp_path / "halves", variant, env_seed=99).train()
    assert sorted(rest.recorder.batches) == [88, 132]
    assert_same_batches(whole.recorder, half.recorder)
    assert_same_batches(whole.recorder, rest.recorder)
    assert_same(whole.hook.latest(), rest.hook.latest())
    # Not by chance: something was learnt in the second half, and labelled in the first.
    after = contents(rest.hook.latest())["loss_module"]
    assert any(not torch.equal(before[key], after[key]) for key in before)
    assert whole.recorder.batches[0]["teacher_mask"].any()


def test_every_env_starts_anew_at_a_checkpoint(tmp_path):
    """With its next seed, and with nothing left of the episodes before."""
    run = Run(tmp_path).train()
    seeds = StreamEnv().seeds
    seeds.restart(3)
    # 4 environments in 22 steps of episodes of 8 steps: the collector's first reset, then
    # one after 8 and 16 steps; the checkpoint is the fourth reset.
    fourth = [[seeds.draw(row) for _ in range(4)][-1] for row in range(4)]
    batch = run.recorder.batches[88][:, 0]
    for row, seed in enumerate(fourth):
        point = torch.rand(2, generator=torch.Generator().manual_seed(seed))
        assert torch.equal(batch["observation"][row], point)
    assert batch["step_count"].flatten().tolist() == [0] * 4
    ids = batch["collector", "traj_ids"]
    assert not torch.isin(ids, run.recorder.batches[44]["collector", "traj_ids"]).any()
    # In between, episodes go on from batch to batch.
    assert run.recorder.batches[44]["step_count"][:, 0].flatten().tolist() == [3] * 4


def test_evaluations_go_on(tmp_path):
    """Those before the stop are kept, those after it are of an environment anew."""

    def evaluated(directory, **kwargs):
        run = Run(tmp_path / directory, **kwargs)
        run.evaluation = EvaluationHook(
            StreamEnv(2), run.student.actor, interval=run.frames_per_batch, episodes=2
        )
        run.evaluation.register(run.trainer)
        return run.train().evaluation.history

    whole = evaluated("whole")
    evaluated("halves", stop_after=2)
    rest = evaluated("halves")
    assert [frames for frames, _ in rest] == [44, 88, 132, 176]
    # The start of an episode, and with it the return, depends on those before it.
    assert len({result.episode_return for _, result in whole}) == 4
    for (_, ours), (_, theirs) in zip(whole, rest, strict=True):
        assert ours.episode_return == theirs.episode_return
        assert torch.equal(ours.episodes["length"], theirs.episodes["length"])


def test_a_complete_run_is_not_trained_further(tmp_path):
    done = Run(tmp_path).train()
    again = Run(tmp_path)
    assert again.hook.resume() and again.hook.resume()
    again.train()
    assert not again.recorder.batches
    assert again.trainer.collected_frames == done.trainer.collected_frames == 176
    assert torch.equal(
        again.student.observation_norm.mean, done.student.observation_norm.mean
    )


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT])
def test_a_signal_ends_the_run_with_a_checkpoint(number, tmp_path):
    usual = signal.getsignal(number)
    run = Run(tmp_path)
    run.trainer.register_op("post_steps", lambda: os.kill(os.getpid(), number))
    run.train()
    assert run.hook.stopped_by == number.name
    assert run.hook.latest().name == "checkpoint-000000000044"  # not only every 88
    assert signal.getsignal(number) is usual
    rest = Run(tmp_path).train()
    assert rest.hook.stopped_by is None
    assert sorted(rest.recorder.batches) == [44, 88, 132]


def test_state_of_a_teachers_own_generator():
    from torchrl_rpd.transforms import TeacherActionTransform

    frames = TensorDict({"observation": torch.zeros(3, 2)}, [3])
    label = TeacherActionTransform(NoisyTeacher(), low=-1.0, high=1.0)
    label(frames)
    state = label.state_dict()
    expected = label(frames)["teacher_action"]
    assert not torch.equal(expected, label(frames)["teacher_action"])
    other = TeacherActionTransform(teacher_factory=NoisyTeacher, low=-1.0, high=1.0)
    assert "teacher_rng" not in other.state_dict()["_extra_state"]  # builds nothing
    other.load_state_dict(state)
    assert torch.equal(other(frames)["teacher_action"], expected)
    with pytest.raises(ValueError, match="generator was saved"):
        TeacherActionTransform(lambda td: td["observation"]).load_state_dict(state)


def test_progress_bar_goes_on(tmp_path):
    Run(tmp_path, stop_after=2).train()
    rest = Run(tmp_path)
    rest.trainer.progress_bar = True
    rest.train()
    assert rest.trainer._pbar.n == 176
    assert rest.trainer._pbar.initial == 88


@pytest.mark.maniskill
class TestManiSkill:
    def test_resumed_from_a_copy_of_the_half_way_checkpoint(self, tmp_path):
        compare_halves(tmp_path, num_envs=2)

    @pytest.mark.slow
    def test_with_worker_processes(self, tmp_path):
        compare_halves(tmp_path, num_envs=1, num_workers=2)


class FollowTheTeacher(Transform):
    """The student's action only disturbs the teacher's: the hand gets to the cube."""

    def _inv_call(self, td):
        return td.set("action", td["teacher_action"] + 0.3 * td["action"])


def compare_halves(tmp_path, **num):
    """As after kill -9 some time after the checkpoint: later ones do not exist.

    PhysX remembers contacts: without the rebuilding of the simulations at the
    checkpoint, the second half of the uninterrupted run is another one.
    """
    from torchrl_rpd.envs import ManiSkillEnv
    from torchrl_rpd.teachers import ScriptedTeacher

    def run(directory, seed):
        return Run(
            directory,
            env=ManiSkillEnv("PickCube-v1", fast_controller=True, **num),
            env_seed=seed,
            teacher=ScriptedTeacher("PickCube-v1", jitter=0.1, cube_offset_std=0.003),
            after=FollowTheTeacher(),
            steps=24,
            batches=2,
            every=1,
        ).train()

    whole = run(tmp_path / "whole", 3)
    name = "checkpoint-000000000048"
    shutil.copytree(tmp_path / "whole" / name, tmp_path / "resumed" / name)
    rest = run(tmp_path / "resumed", 99)
    assert sorted(rest.recorder.batches) == [48]
    assert_same_batches(whole.recorder, rest.recorder)
    assert_same(whole.hook.latest(), rest.hook.latest())


def test_the_hook_wants_a_positive_interval(tmp_path):
    with pytest.raises(ValueError, match="every is at least 1"):
        CheckpointHook(tmp_path, every=0, config={})


if __name__ == "__main__":
    pytest.main([__file__])
