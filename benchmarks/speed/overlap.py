# Copyright (c) the torchrl_rpd authors.
#
# This source code is licensed under the MIT license found in the
# LICENSE file in the root directory of this source tree.
"""Collecting and labelling one after the other, and at the same time.

The teacher works on another device: here it waits, without load, for as long as a step of
the environments takes: the case in which overlap gains most. It is shown the pictures of 16
environments at once, as an object of this process and behind TorchRL's ``InferenceServer``
(a thread of this process; it shares Python's lock with the collector). A turn is a batch of
50 steps with a student of pictures, and includes every label that was asked for in it.
"""

from __future__ import annotations

import statistics
import time
from collections.abc import Callable, Iterator
from contextlib import ExitStack
from typing import Any

import torch
from tensordict import TensorDictBase
from torchrl.collectors import Collector
from torchrl.envs import EnvBase, TransformedEnv
from torchrl.modules.inference_server import InferenceServer

from benchmarks.speed._noise import NoiseEnv
from benchmarks.speed._turns import Row, in_turns, ratios
from torchrl_rpd.students import ActorCritic, cnn_actor_critic
from torchrl_rpd.teachers.inference import InferenceTeacher, ServableTeacher
from torchrl_rpd.transforms import TeacherActionTransform

ENVS, STEPS, SIDE = 16, 50, 128
IMAGE = ("observation", "image")
CHUNK = ("vla_action", "chunk")
Turn = Callable[[], TensorDictBase]


class Elsewhere:
    """A teacher whose time passes on another device.

    Args:
        seconds (float): per question, of whatever number of rows.
    """

    in_keys = (IMAGE,)
    out_keys = (CHUNK,)

    def __init__(self, seconds: float) -> None:
        self.seconds = seconds

    def __call__(self, tensordict: TensorDictBase) -> TensorDictBase:
        """Zeros."""
        time.sleep(self.seconds)
        return tensordict.set(CHUNK, torch.zeros(*tensordict.shape, 1, 7))


def batches(
    env: EnvBase, student: ActorCritic, **kwargs: Any
) -> Iterator[TensorDictBase]:
    """What a run collects, without end."""
    return iter(
        Collector(
            env,
            student.actor,
            frames_per_batch=ENVS * STEPS,
            total_frames=-1,
            return_same_td=True,
            auto_register_policy_transforms=False,
            **kwargs,
        )
    )


def collecting(student: ActorCritic) -> Turn:
    """A batch without a teacher."""
    collector = batches(NoiseEnv(ENVS, (3, SIDE, SIDE)), student)
    return lambda: next(collector)


def labelling(teacher: Any) -> Turn:
    """The labels alone, of as many frames that are there already."""
    label = TeacherActionTransform(teacher, low=-1.0, high=1.0)
    frames = NoiseEnv(ENVS, (3, SIDE, SIDE)).rollout(STEPS).unbind(-1)
    return lambda: torch.stack([label(step).select("teacher_mask") for step in frames])


def both(student: ActorCritic, teacher: Any, *, deferred: bool) -> Turn:
    """A labelled batch."""
    label = TeacherActionTransform(teacher, deferred=deferred)
    env = TransformedEnv(NoiseEnv(ENVS, (3, SIDE, SIDE)), label)
    collector = batches(env, student, postproc=label if deferred else None)

    def turn() -> TensorDictBase:
        batch: TensorDictBase = next(collector)
        assert label.stats()[
            "queries"
        ]  # waits for the labels of the next batch's roots
        assert bool(batch["teacher_mask"].all())
        return batch

    return turn


def rows(*, device: torch.device, rounds: int = 5) -> list[Row]:
    """Both teachers, against what takes longer: collecting or labelling."""
    torch.manual_seed(0)
    student = cnn_actor_critic(SIDE, 7)
    collect = collecting(student)
    # A step and the teacher take equally long, as far as this machine can tell.
    seconds = min(in_turns({"collect": collect}, rounds=2)["collect"]) / STEPS
    with ExitStack() as stack:
        server = stack.enter_context(
            InferenceServer(
                ServableTeacher(lambda: Elsewhere(seconds)),
                max_batch_size=ENVS,
                min_batch_size=ENVS,
            )
        )
        teachers = {
            "a teacher in this process": Elsewhere(seconds),
            "behind an InferenceServer": InferenceTeacher(
                server.client(), in_keys=[IMAGE]
            ),
        }
        turns: dict[str, Turn] = {"collect": collect}
        for name, teacher in teachers.items():
            turns[f"{name}: label"] = labelling(teacher)
            turns[f"{name}: deferred"] = both(student, teacher, deferred=True)
            turns[f"{name}: in turn"] = both(student, teacher, deferred=False)
        times = in_turns(turns, rounds=rounds)
    found = []
    for name in teachers:
        label, overlapped, in_turn = (
            times[f"{name}: {kind}"] for kind in ("label", "deferred", "in turn")
        )
        larger = [max(pair) for pair in zip(times["collect"], label, strict=True)]
        each = [
            statistics.median(t) for t in (times["collect"], label, overlapped, in_turn)
        ]
        found += [
            Row(
                f"Collecting and labelling at once / the longer one, {name}",
                ratios(overlapped, larger),
                at_most=1.15,
                note="collecting {:.2f} s, labelling {:.2f} s, both {:.2f} s".format(
                    *each
                ),
            ),
            Row(
                f"Collecting and labelling in turn / at once, {name}",
                ratios(in_turn, overlapped),
                note=f"in turn {each[3]:.2f} s",
            ),
        ]
    return found
