# Copyright (c) the torchrl_rpd authors.
#
# This source code is licensed under the MIT license found in the
# LICENSE file in the root directory of this source tree.
"""Where in an env the transform may stand, and whose action box it takes."""

from __future__ import annotations

import pytest
import torch
from counting_env import CountingEnv, RecordingTeacher, assert_labels_belong
from tensordict import TensorDictBase
from torchrl.data import Bounded, Composite
from torchrl.envs import (
    Compose,
    RandomTruncationTransform,
    StepCounter,
    TerminateTransform,
    TransformedEnv,
)
from torchrl.envs.transforms import Transform

from torchrl_rpd.transforms import TeacherActionTransform


class Ends(Transform):
    """Ends every episode at once, and says so in its out_keys."""

    def __init__(self) -> None:
        super().__init__(in_keys=["done"], out_keys=["done"])

    def _call(self, next_tensordict: TensorDictBase) -> TensorDictBase:
        return next_tensordict


@pytest.mark.parametrize(
    "ends",
    [
        lambda: StepCounter(3),
        lambda: TerminateTransform(lambda td: td["observation"][..., 2:] > 1),
        Ends,
    ],
    ids=["StepCounter", "TerminateTransform", "Ends"],
)
def test_what_ends_episodes_comes_first(ends: type) -> None:
    label = TeacherActionTransform(RecordingTeacher())
    env = TransformedEnv(CountingEnv(), Compose(label, ends()))
    with pytest.raises(ValueError, match=r"ends episodes and comes after .*first"):
        env.reset()
    env = TransformedEnv(CountingEnv(), ends())
    env.append_transform(TeacherActionTransform(RecordingTeacher()))
    assert_labels_belong(env.rollout(4, break_when_any_done=False))


def test_random_truncation_comes_first() -> None:
    label = TeacherActionTransform(RecordingTeacher())
    late = RandomTruncationTransform(1, 3)
    env = TransformedEnv(CountingEnv(), Compose(StepCounter(), label, late))
    with pytest.raises(ValueError, match="RandomTruncationTransform ends episodes"):
        env.reset()


def test_a_counter_that_ends_nothing_may_follow() -> None:
    label = TeacherActionTransform(RecordingTeacher())
    env = TransformedEnv(CountingEnv(), Compose(label, StepCounter()))
    assert_labels_belong(env.rollout(4, break_when_any_done=False))


def test_entries_that_are_there_are_not_written_over() -> None:
    first = TeacherActionTransform(RecordingTeacher())
    second = TeacherActionTransform(RecordingTeacher())
    env = TransformedEnv(CountingEnv(), Compose(first, second))
    with pytest.raises(ValueError, match=r"has \['teacher_action', 'teacher_mask'\]"):
        env.reset()
    second = TeacherActionTransform(
        RecordingTeacher(),
        teacher_action_key=("second", "action"),
        teacher_mask_key=("second", "mask"),
    )
    env = TransformedEnv(
        CountingEnv(), Compose(TeacherActionTransform(RecordingTeacher()), second)
    )
    frames = env.rollout(4, break_when_any_done=False)
    assert torch.equal(frames["second", "action"], frames["teacher_action"])


class HalfActions(Transform):
    """From outside, actions lie in half the box."""

    def __init__(self) -> None:
        super().__init__(in_keys_inv=["action"], out_keys_inv=["action"])

    def _inv_call(self, tensordict: TensorDictBase) -> TensorDictBase:
        return tensordict.set("action", 2 * tensordict["action"])

    def transform_input_spec(self, input_spec: Composite) -> Composite:
        box = Bounded(-0.5, 0.5, (3, 2))
        input_spec["full_action_spec"]["action"] = box
        return input_spec


@pytest.mark.parametrize("position", [0, 1])
def test_labels_are_in_the_convention_of_the_student(position: int) -> None:
    label = TeacherActionTransform(lambda td: torch.full((3, 2), 0.8))
    chain = [HalfActions()]
    chain.insert(position, label)
    env = TransformedEnv(CountingEnv(), Compose(*chain))
    assert torch.equal(env.reset()["teacher_action"], torch.full((3, 2), 0.5))
    assert env.action_spec.is_in(env.reset()["teacher_action"])


def test_an_env_without_done_is_named() -> None:
    label = TeacherActionTransform(RecordingTeacher())
    env = TransformedEnv(CountingEnv(), label)
    root = env.rand_action(env.reset())
    with pytest.raises(KeyError, match="root entry 'done'"):
        label._step(root, root.exclude("done"))


if __name__ == "__main__":
    pytest.main([__file__])
