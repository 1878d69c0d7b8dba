# Copyright (c) the torchrl_rpd authors.
#
# This source code is licensed under the MIT license found in the
# LICENSE file in the root directory of this source tree.
"""Convention, clipping and sanity of labels."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from counting_env import CountingEnv
from tensordict import TensorDict
from torchrl.envs import TransformedEnv

from torchrl_rpd.transforms import TeacherActionTransform
from torchrl_rpd.transforms._stats import TeacherStats

NAN, INF = float("nan"), float("inf")


def run(raw: list[list[float]], **kwargs: Any) -> tuple[TensorDict, TeacherStats]:
    """Labels ``raw`` as if a teacher had said it, and what was counted."""
    label = TeacherActionTransform(lambda td: torch.tensor(raw), **kwargs)
    out = label(TensorDict({"observation": torch.zeros(len(raw), 1)}, [len(raw)]))
    return out, label.stats()


def test_gripper_map_then_clip() -> None:
    # gripper 2g - 1: 1 -> 1, 0.25 -> -0.5, 1.2 -> 1.4 -> 1; arm: 0.5, -2 -> -1, 3 -> 1
    def to_env(raw: torch.Tensor) -> torch.Tensor:
        return torch.cat([raw[:, :1], 2 * raw[:, 1:] - 1], -1)

    out, stats = run(
        [[0.5, 1.0], [-2.0, 0.25], [3.0, 1.2]],
        action_transform=to_env,
        low=[-1.0, -1.0],
        high=[1.0, 1.0],
    )
    expected = torch.tensor([[0.5, 1.0], [-1.0, -0.5], [1.0, 1.0]])
    torch.testing.assert_close(out["teacher_action"], expected)
    assert stats["clipped"] == 2  # rows, not entries
    assert stats["labelled"] == 3


def test_limits_on_the_border_are_not_clipped() -> None:
    _, stats = run([[1.0], [-1.0], [0.0]], low=-1.0, high=1.0)
    assert stats["clipped"] == 0


def test_one_sided_limit_and_no_limit() -> None:
    out, stats = run([[5.0], [-5.0]], low=-1.0)
    assert out["teacher_action"].flatten().tolist() == [5.0, -1.0]
    assert stats["clipped"] == 1
    out, stats = run([[5.0], [-5.0]])
    assert out["teacher_action"].flatten().tolist() == [5.0, -5.0]
    assert stats["clipped"] == 0


def test_arguments_replace_the_box_of_the_env() -> None:
    label = TeacherActionTransform(lambda td: torch.full((3, 2), 0.8), high=0.5)
    root = TransformedEnv(CountingEnv(), label).reset()
    assert torch.equal(root["teacher_action"], torch.full((3, 2), 0.5))
    assert label.stats()["clipped"] == 3


def test_non_finite_labels_are_masked_and_counted() -> None:
    # an infinity must not pass as "clipped to the border"
    out, stats = run(
        [[0.1, 0.2], [NAN, 0.0], [0.3, INF], [-INF, 9.0], [9.0, 0.0]],
        low=-1.0,
        high=1.0,
    )
    assert out["teacher_mask"].flatten().tolist() == [True, False, False, False, True]
    expected = torch.tensor(
        [[0.1, 0.2], [0.0, 0.0], [0.0, 0.0], [0.0, 0.0], [1.0, 0.0]]
    )
    assert torch.equal(out["teacher_action"], expected)
    assert (stats["non_finite"], stats["labelled"], stats["clipped"]) == (3, 2, 1)
    assert stats["queries"] == 5


def test_no_ops_are_masked_and_counted() -> None:
    # The last entry, the gripper's, does not count: 3-4-5 in units of 1e-4.
    out, stats = run(
        [
            [0.0, 0.0, 1.0],
            [3e-4, 4e-4, -1.0],
            [2.9e-4, 4e-4, 0.5],
            [NAN, 0.0, 0.0],
            [9.0, 0.0, 0.0],
        ],
        low=-1.0,
        high=1.0,
        no_op_norm=4.99e-4,
    )
    assert out["teacher_mask"].flatten().tolist() == [False, True, False, False, True]
    assert not out["teacher_action"][[0, 2, 3]].any()
    counts = (stats["no_ops"], stats["non_finite"], stats["labelled"], stats["clipped"])
    assert counts == (2, 1, 2, 1)


def test_a_no_op_is_no_reason_to_raise() -> None:
    out, stats = run([[0.0, 1.0]], no_op_norm=1e-4, on_non_finite="raise")
    assert not out["teacher_mask"].any() and stats["no_ops"] == 1


def test_no_op_norm_needs_more_than_a_gripper() -> None:
    with pytest.raises(ValueError, match=r"one entry.*no_op_norm=None"):
        run([[0.5]], no_op_norm=1e-4)


@pytest.mark.parametrize("norm", [0.0, -1.0])
def test_no_op_norm_out_of_range(norm: float) -> None:
    with pytest.raises(ValueError, match="no_op_norm"):
        run([[0.0, 1.0]], no_op_norm=norm)


def test_a_comparison_in_the_transform_does_not_hide_nan() -> None:
    out, stats = run(
        [[NAN], [0.7]],
        action_transform=lambda raw: torch.where(raw > 0.5, 1.0, -1.0),
    )
    assert out["teacher_mask"].flatten().tolist() == [False, True]
    assert stats["non_finite"] == 1


def test_the_transform_itself_may_break_a_label() -> None:
    out, _ = run([[0.0], [0.5]], action_transform=lambda raw: raw / raw)
    assert out["teacher_mask"].flatten().tolist() == [False, True]


def test_raise_names_rows_and_teacher() -> None:
    with pytest.raises(ValueError, match=r"lambda.*not finite in 2 of 3 rows.*'mask'"):
        run([[NAN], [0.0], [INF]], on_non_finite="raise")
    _, stats = run([[1.0]], on_non_finite="raise")
    assert stats["labelled"] == 1


def test_action_transform_may_change_the_width_but_not_the_rows() -> None:
    out, _ = run([[1.0, 2.0, 3.0]], action_transform=lambda raw: raw[:, :2])
    assert out["teacher_action"].tolist() == [[1.0, 2.0]]
    with pytest.raises(ValueError, match=r"made \[2\] out of \[2, 1\]"):
        run([[1.0], [2.0]], action_transform=lambda raw: raw[:, 0])


if __name__ == "__main__":
    pytest.main([__file__])
