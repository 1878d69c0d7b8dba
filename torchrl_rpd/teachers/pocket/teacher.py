# Copyright (c) the torchrl_rpd authors.
#
# This source code is licensed under the MIT license found in the
# LICENSE file in the root directory of this source tree.
"""The pocket VLA as a teacher, with the weights that come with the package."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch
from tensordict import TensorDictBase
from tensordict.utils import NestedKey

from torchrl_rpd.teachers.pocket.model import PocketVLA, read_sizes

__all__ = ["POCKET_INSTRUCTIONS", "PocketVLATeacher"]

#: The tasks that the shipped weights were trained on, and what they were told there.
POCKET_INSTRUCTIONS = {
    "PickCube-v1": "pick up the cube",
    "PullCube-v1": "pull the cube towards the robot base",
    "PushCube-v1": "push the cube away from the robot base",
    "StackCube-v1": "stack the red cube on the green cube",
}

_WEIGHTS = Path(__file__).with_name("pocket_vla.safetensors")


class PocketVLATeacher(PocketVLA):
    """A small VLA that was trained on this package's own demonstrations.

    Its weights (4 MB) come with the package, so that RPD from pictures, with a language-
    conditioned teacher that often fails, can be tried on any machine. One set of weights
    for all four tasks: the instruction chooses. How it was trained and how often it
    succeeds: docs/pocket_vla.md.

    It was shown ManiSkill's human view of 128x128 pixels with the light robot:
    ``ManiSkillEnv(task, camera="human", image_size=128, light_visuals=True)``, or with
    another student's view ``teacher_camera="human", teacher_image_size=128``. Memoryless
    and deterministic.

    Args:
        task_id (str, optional): one of :data:`POCKET_INSTRUCTIONS`, whose instruction is
            then given in every row.

    Keyword Args:
        instruction (str, optional): your own words in its place. Without both, each row
            is told what is under ``instruction_key``.
        path (str or path, optional): a file of your own training, instead of the
            package's.
        device (device, optional): of the weights. Defaults to ``"cpu"``.
        image_key (NestedKey, optional): ``[*B, 3, H, W]`` uint8. Defaults to
            ``("observation", "image")``; with ``teacher_camera`` it is
            ``"teacher_image"``.
        instruction_key (NestedKey, optional): Defaults to ``"language_instruction"``.

    Raises:
        FileNotFoundError: if there is no such file.
        ValueError: for a task that it was not trained on, or another kind of file.

    Examples:
        >>> import torch
        >>> from tensordict import TensorDict
        >>> from torchrl_rpd.teachers import PocketVLATeacher
        >>> teacher = PocketVLATeacher("PushCube-v1")
        >>> images = torch.zeros(2, 3, 128, 128, dtype=torch.uint8)
        >>> td = teacher(TensorDict({("observation", "image"): images}, [2]))
        >>> td["vla_action", "chunk"].shape
        torch.Size([2, 4, 7])
    """

    def __init__(
        self,
        task_id: str | None = None,
        *,
        instruction: str | None = None,
        path: str | Path | None = None,
        device: torch.device | str = "cpu",
        image_key: NestedKey = ("observation", "image"),
        instruction_key: NestedKey = "language_instruction",
    ) -> None:
        from safetensors.torch import load_model

        if task_id is not None and instruction is None:
            if task_id not in POCKET_INSTRUCTIONS:
                raise ValueError(
                    f"The pocket VLA was not trained on {task_id!r}, only on "
                    f"{', '.join(POCKET_INSTRUCTIONS)}. Give instruction='...' to try it "
                    "all the same."
                )
            instruction = POCKET_INSTRUCTIONS[task_id]
        file = _WEIGHTS if path is None else Path(path)
        config, self.metadata = read_sizes(file)
        super().__init__(
            **config,
            instruction=instruction,
            image_key=image_key,
            instruction_key=instruction_key,
        )
        load_model(self, str(file))
        self.requires_grad_(False).eval().to(device)

    @torch.no_grad()
    def forward(self, tensordict: TensorDictBase, **kwargs: Any) -> TensorDictBase:
        """Writes the actions for every row, in [-1, 1], where the pictures are."""
        return super().forward(tensordict, **kwargs)

    def _predict(self, tensordict: TensorDictBase) -> torch.Tensor:
        images = tensordict.get(self.tensor_keys.image, None)
        actions = super()._predict(tensordict).clamp(-1.0, 1.0)
        return actions if images is None else actions.to(images.device)
