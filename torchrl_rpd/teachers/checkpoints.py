# Copyright (c) the torchrl_rpd authors.
#
# This source code is licensed under the MIT license found in the
# LICENSE file in the root directory of this source tree.
"""The published checkpoints of the paper's teachers."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

__all__ = ["CHECKPOINTS", "Checkpoint"]


@dataclass(frozen=True)
class Checkpoint:
    """A published teacher, and how the paper's released code asks it.

    Args:
        name (str): id on the Hugging Face Hub.
        kind (str): ``"openvla"`` or ``"octo"``: which teacher class loads it.
        step (int, optional): of the fine-tuning, as the released code names it; None
            for the last one that was saved.
        unnorm_key (str, optional): which statistics undo the normalisation of its
            actions; None where there is one set only.
        image_size (tuple of int): height and width of the pictures that the released
            code shows it: the human render camera's. The teachers resize them further.
        chunk_size (int): actions per answer; the paper takes the first.
        prompt (str): what becomes of the instruction.
        notes (str): what else has to be known.

    Source: released code of the paper, commit 10becdf. The checkpoints themselves were
    *not loaded here*: neither their statistics nor the range of their gripper is known.

    Examples:
        >>> from torchrl_rpd.teachers import CHECKPOINTS
        >>> CHECKPOINTS["openvla"].unnorm_key
        'maniskill_human:7.0.0'
        >>> [checkpoint.name for checkpoint in CHECKPOINTS.values()]
        ['Juelg/openvla-7b-finetuned-maniskill', 'Juelg/octo-base-1.5-finetuned-maniskill']
    """

    name: str
    kind: Literal["openvla", "octo"]
    step: int | None
    unnorm_key: str | None
    image_size: tuple[int, int]
    chunk_size: int
    prompt: str
    notes: str


_GRIPPER = (
    "The authors' evaluation maps the gripper by 2 g - 1, their distillation does not: "
    "look at the statistics, and choose gripper= (check_teacher warns)."
)

#: The fine-tuned teachers of the paper, by kind.
CHECKPOINTS: dict[str, Checkpoint] = {
    "openvla": Checkpoint(
        name="Juelg/openvla-7b-finetuned-maniskill",
        kind="openvla",
        step=40_000,
        unnorm_key="maniskill_human:7.0.0",
        image_size=(256, 256),
        chunk_size=1,
        prompt="In: What action should the robot take to {instruction}?\nOut:",
        notes="Greedy decoding: deterministic. The instruction is put in lower case. "
        + _GRIPPER,
    ),
    "octo": Checkpoint(
        name="Juelg/octo-base-1.5-finetuned-maniskill",
        kind="octo",
        step=None,
        unnorm_key=None,
        image_size=(256, 256),
        chunk_size=4,
        prompt="{instruction}",
        notes="Stochastic: a diffusion sample, one per frame in the paper. No history "
        "(window_size=1), no wrist camera. The first public commit of the released code "
        "names step 60,000, later ones none. " + _GRIPPER,
    ),
}
