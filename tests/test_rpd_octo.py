# Copyright (c) the torchrl_rpd authors.
#
# This source code is licensed under the MIT license found in the
# LICENSE file in the root directory of this source tree.
"""Octo, ManiSkill's pictures, the loss and the trainer together."""

from __future__ import annotations

import pytest
from vla_run import INSTRUCTION, minibatches_of_a_run, run_example

from torchrl_rpd.teachers.octo import OctoTeacher, write_random_checkpoint
from torchrl_rpd.transforms import TeacherActionTransform

pytestmark = [pytest.mark.maniskill, pytest.mark.render]


@pytest.mark.parametrize(
    ("window", "samples"), [(1, 1), (2, 3)], ids=["paper", "history and spread"]
)
def test_a_few_iterations(tmp_path, window, samples):
    pytest.importorskip("transformers")
    octo = OctoTeacher.from_pretrained(
        write_random_checkpoint(tmp_path),
        instruction=INSTRUCTION,
        window_size=window,
        num_samples=samples,
    )
    spread = samples > 1
    teacher = TeacherActionTransform(
        octo, teacher_std_key="teacher_std" if spread else None
    )
    seen = minibatches_of_a_run(
        teacher, distill_type="kl" if spread else "mse", minibatch_size=8
    )
    for data in seen:
        assert data["teacher_action"].abs().amax(-1).gt(0).all()
        assert data["teacher_action"].unique().numel() > 4
        if spread:
            assert data["teacher_std"].gt(0).all()


def test_example(tmp_path):
    pytest.importorskip("transformers")
    out = str(tmp_path / "log")
    run_example("rpd_octo.py", "--task", "PushCube-v1", "--out", out)


if __name__ == "__main__":
    pytest.main([__file__])
