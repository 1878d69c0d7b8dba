# Copyright (c) the torchrl_rpd authors.
#
# This source code is licensed under the MIT license found in the
# LICENSE file in the root directory of this source tree.
"""The table of published checkpoints."""

from __future__ import annotations

import dataclasses

import pytest

from torchrl_rpd.teachers import CHECKPOINTS


def test_what_the_released_code_names():
    rows = {
        key: (c.name, c.kind, c.step, c.unnorm_key) for key, c in CHECKPOINTS.items()
    }
    assert rows == {
        "openvla": (
            "Juelg/openvla-7b-finetuned-maniskill",
            "openvla",
            40_000,
            "maniskill_human:7.0.0",
        ),
        "octo": ("Juelg/octo-base-1.5-finetuned-maniskill", "octo", None, None),
    }


@pytest.mark.parametrize("checkpoint", CHECKPOINTS.values(), ids=lambda c: c.kind)
def test_every_row_is_complete(checkpoint):
    assert checkpoint.image_size == (256, 256)
    assert "{instruction}" in checkpoint.prompt
    assert "gripper" in checkpoint.notes
    with pytest.raises(dataclasses.FrozenInstanceError):
        checkpoint.step = 1


def test_prompt():
    text = CHECKPOINTS["openvla"].prompt.format(instruction="push the ball")
    assert text == "In: What action should the robot take to push the ball?\nOut:"


if __name__ == "__main__":
    pytest.main([__file__])
