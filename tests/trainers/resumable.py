# Copyright (c) the torchrl_rpd authors.
#
# This source code is licensed under the MIT license found in the
# LICENSE file in the root directory of this source tree.
"""Small RPD runs that can be stopped and started again, and how to compare them."""

from __future__ import annotations

import random
from collections.abc import Callable
from pathlib import Path

import numpy as np
import torch
from tensordict import TensorDict
from torchrl.checkpoint import Checkpoint
from torchrl.collectors import Collector
from torchrl.envs import Compose, RewardSum, StepCounter, Transform, TransformedEnv
from torchrl.trainers import TrainerHookBase
from toy_envs import ReachEnv

from torchrl_rpd.envs._seeds import EpisodeSeeds
from torchrl_rpd.objectives import DistillPPOLoss, FiniteHorizonGAE
from torchrl_rpd.students import mlp_actor_critic
from torchrl_rpd.trainers import (
    CheckpointHook,
    DistillCoeffSchedule,
    LogTeacher,
    ObservationNormUpdate,
    make_ppo_trainer,
)
from torchrl_rpd.transforms import TeacherActionTransform


class StreamEnv(ReachEnv):
    """ReachEnv with the seed streams of ManiSkillWrapper.

    Like a simulator it has a past that no state_dict holds: every episode starts a
    little beside where its seed says, unless a state was loaded.
    """

    def __init__(self, num_envs: int = 4) -> None:
        super().__init__(num_envs)
        self.seeds = EpisodeSeeds(num_envs)
        self.past = 0.0

    def _reset(self, tensordict=None):
        mask = self._mask(tensordict)
        for row in mask.flatten().nonzero().flatten().tolist():
            generator = torch.Generator().manual_seed(self.seeds.draw(row))
            self.point[row] = torch.rand(2, generator=generator) + self.past
        self.past += 1e-3
        self.time = torch.where(mask.squeeze(-1), 0, self.time)
        return TensorDict(self._observe(), self.batch_size)

    def _set_seed(self, seed):
        self.seeds.restart(seed)

    def state_dict(self, *args, **kwargs):
        return {"episode_seeds": self.seeds.state_dict()}

    def load_state_dict(self, state_dict, **kwargs):
        self.seeds.load_state_dict(state_dict["episode_seeds"])
        self.past = 0.0


class NoisyTeacher:
    """Errs by noise from a generator of its own."""

    def __init__(self) -> None:
        self.generator = torch.Generator().manual_seed(0)

    def __call__(self, td):
        noise = torch.randn(td.shape[0], 2, generator=self.generator)
        return -td["observation"] + 0.3 * noise


class Recorder(TrainerHookBase):
    """Keeps every collected batch, by the frames before it."""

    def __init__(self) -> None:
        self.batches = {}

    def __call__(self, batch):
        self.batches[self.trainer.collected_frames] = batch.clone()

    def register(self, trainer, name="recorder"):
        self.trainer = trainer
        trainer.register_op("batch_process", self)

    def state_dict(self):
        return {}

    def load_state_dict(self, state_dict):
        pass


class Run:
    """One start of the command: builds everything from the same arguments."""

    def __init__(
        self,
        directory: Path,
        *,
        env=None,
        env_seed: int = 3,
        teacher=None,
        label: dict | None = None,
        after: Transform | None = None,
        coeff_frames: int | None = None,
        batches: int = 4,
        every: int = 2,  # batches
        steps: int = 11,  # per batch: episodes are under way at its end
        stop_after: int | None = None,
        config: dict | None = None,
        keep_last: int = 9,
        scheduler: Callable | None = None,
        kl_rule: str = "adaptive_lr",
        **trainer_kwargs,
    ) -> None:
        for seed in (random.seed, np.random.seed, torch.manual_seed):
            seed(0)
        env = StreamEnv() if env is None else env
        self.frames_per_batch = env.batch_size.numel() * steps
        total = batches * self.frames_per_batch
        self.teacher = TeacherActionTransform(
            NoisyTeacher() if teacher is None else teacher, **(label or {})
        )
        transforms = [StepCounter(), RewardSum(), self.teacher]
        env = TransformedEnv(env, Compose(*transforms, *([after] if after else [])))
        env.set_seed(env_seed)
        self.student = mlp_actor_critic(
            env.observation_spec["observation"].shape[-1],
            env.action_spec.shape[-1],
            num_cells=(16,),
            log_std_init=-0.5,
        )
        self.loss = DistillPPOLoss(
            self.student.actor, self.student.critic, normalize_advantage=True
        )
        optimizer = torch.optim.Adam(self.loss.parameters(), lr=3e-3)
        if scheduler is not None:
            trainer_kwargs["lr_scheduler"] = scheduler(optimizer)
        self.trainer = make_ppo_trainer(
            collector=Collector(
                env,
                self.student.actor,
                frames_per_batch=self.frames_per_batch,
                total_frames=total,
                auto_register_policy_transforms=False,
            ),
            loss_module=self.loss,
            optimizer=optimizer,
            gae=FiniteHorizonGAE(
                gamma=0.9, lmbda=0.9, value_network=self.student.critic
            ),
            total_frames=total,
            minibatch_size=15,
            num_epochs=2,
            target_kl=0.02,
            kl_rule=kl_rule,
            progress_bar=False,
            **trainer_kwargs,
        )
        DistillCoeffSchedule(
            self.loss,
            kind="linear",
            init=1.0,
            end_frames=coeff_frames or total,
            transform=self.teacher,
        ).register(self.trainer)
        LogTeacher(self.teacher).register(self.trainer)
        self.hook = CheckpointHook(
            directory,
            every=every * self.frames_per_batch,
            config=config or {"lr": 3e-3},
            keep_last=keep_last,
        )
        # Not the last one on purpose: what follows it must be saved as well.
        self.hook.register(self.trainer)
        ObservationNormUpdate(self.student.observation_norm).register(self.trainer)
        self.recorder = Recorder()
        self.recorder.register(self.trainer)
        if stop_after is not None:
            self.trainer.register_op("post_steps", self._stop)
            self.stop_at = stop_after * self.frames_per_batch

    def _stop(self):
        if self.trainer.collected_frames >= self.stop_at:
            self.trainer.request_stop()

    def train(self):
        self.trainer.train()
        return self


def contents(path: Path) -> dict:
    """Everything that a checkpoint holds, but for the wall clock."""
    out = {}
    for name, record in Checkpoint.manifest(path)["components"].items():
        file = path / record["path"] / "state.pt"
        out[name] = dict(_leaves(torch.load(file, weights_only=True)))
    return out


def _leaves(value, path=()):
    if isinstance(value, dict):
        items = value.items()
    elif isinstance(value, list | tuple):
        items = enumerate(value)
    else:
        yield path, value
        return
    for key, item in items:
        if key != "seconds":
            yield from _leaves(item, (*path, key))


def assert_same(a: Path, b: Path) -> None:
    """Two checkpoints hold the same, bit for bit."""
    left, right = contents(a), contents(b)
    assert left.keys() == right.keys()
    for name in left:
        assert left[name].keys() == right[name].keys(), name
        for key, value in left[name].items():
            other = right[name][key]
            same = (
                torch.equal(value, other)
                if isinstance(value, torch.Tensor)
                else value == other
            )
            assert same, (name, key, value, other)


def assert_same_batches(a: Recorder, b: Recorder) -> None:
    """What was collected in both runs is the same, bit for bit."""
    assert b.batches
    for frames, batch in b.batches.items():
        same = a.batches[frames] == batch
        differ = [key for key, value in same.items(True, True) if not value.all()]
        assert not differ, (frames, differ)
