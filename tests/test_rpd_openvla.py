# Copyright (c) the torchrl_rpd authors.
#
# This source code is licensed under the MIT license found in the
# LICENSE file in the root directory of this source tree.
"""OpenVLA, ManiSkill's pictures, the loss and the trainer together."""

from __future__ import annotations

import sys

import pytest
import torch
from vla_run import INSTRUCTION, ROOT, minibatches_of_a_run, run_example

from torchrl_rpd.teachers.openvla import OpenVLATeacher, write_tiny_checkpoint
from torchrl_rpd.transforms import TeacherActionTransform

pytestmark = [pytest.mark.maniskill, pytest.mark.render]


@pytest.mark.parametrize("distill_type", ["mse", "kl"])
def test_a_few_iterations(tmp_path, distill_type):
    pytest.importorskip("transformers")
    kl = distill_type == "kl"
    # Fixed for one, read row by row for the other.
    openvla = OpenVLATeacher.from_pretrained(
        write_tiny_checkpoint(tmp_path),
        instruction=None if kl else INSTRUCTION,
        spread=kl,
        readout="mean" if kl else "greedy",
    )
    teacher = TeacherActionTransform(
        openvla, teacher_std_key="teacher_std" if kl else None
    )
    seen = minibatches_of_a_run(
        teacher, distill_type=distill_type, language_instruction=kl
    )
    for data in seen:
        # The label belongs to the picture beside it, whatever batch it was asked in.
        images = data["observation", "image"]
        tokens = openvla.tokens(images, [INSTRUCTION] * len(images))
        if kl:
            assert data["teacher_std"].gt(0).all()
            moments = openvla.decoder.moments(tokens.logits)
            label = openvla.decoder.unnormalise(*moments)[0]
        else:
            label = openvla.decoder(tokens.tokens)
        torch.testing.assert_close(data["teacher_action"], label, atol=1e-4, rtol=0)
    labels = torch.cat([data["teacher_action"] for data in seen])
    assert labels.std(0).gt(0).any()  # depend on the picture


def test_example(tmp_path):
    pytest.importorskip("transformers")
    out = str(tmp_path / "log")
    options = ("--task", "PushCube-v1", "--distill", "kl", "--out", out)
    run_example("rpd_openvla.py", *options)


def test_example_is_the_papers_configuration(monkeypatch):
    """128 environments, 50 steps, the published checkpoint and its statistics."""
    import importlib.util

    spec = importlib.util.spec_from_file_location(
        "rpd_openvla", ROOT / "examples" / "rpd_openvla.py"
    )
    example = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(example)
    monkeypatch.setattr(sys, "argv", ["rpd_openvla.py"])
    args = example.parse()
    assert args.checkpoint == "Juelg/openvla-7b-finetuned-maniskill"
    assert args.unnorm_key == "maniskill_human:7.0.0"
    assert (args.envs, args.steps, args.distill) == (128, 50, "mse")


if __name__ == "__main__":
    pytest.main([__file__])
