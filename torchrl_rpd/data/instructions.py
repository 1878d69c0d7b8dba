# Copyright (c) the torchrl_rpd authors.
#
# This source code is licensed under the MIT license found in the
# LICENSE file in the root directory of this source tree.
"""Instructions by number: many rows, few texts."""

from __future__ import annotations

from collections.abc import Sequence

from tensordict import NonTensorData, NonTensorStack, TensorDictBase
from tensordict.utils import NestedKey
from torchrl.data.vla import INSTRUCTION_KEY
from torchrl.envs import Transform


class InstructionTransform(Transform):
    """Writes the instruction of each sampled row, from its number.

    A replay buffer of demonstrations has many rows and few different instructions. It
    stores one integer for each row; the texts are put in when a batch is sampled.

    Args:
        instructions (sequence of str): the texts, by their numbers.

    Keyword Args:
        in_key (NestedKey): numbers, ``[N, 1]`` or ``[N]`` integers. Defaults to
            ``"instruction_index"``.
        out_key (NestedKey): where the texts go: one for all rows if there is only one
            text, else one for each row. Defaults to ``"language_instruction"``.

    Examples:
        >>> import torch
        >>> from tensordict import TensorDict
        >>> from torchrl_rpd.data import InstructionTransform
        >>> transform = InstructionTransform(["push the cube", "pull the cube"])
        >>> rows = TensorDict({"instruction_index": torch.tensor([[1], [0], [1]])}, [3])
        >>> transform(rows).get("language_instruction").tolist()
        ['pull the cube', 'push the cube', 'pull the cube']
    """

    def __init__(
        self,
        instructions: Sequence[str],
        *,
        in_key: NestedKey = "instruction_index",
        out_key: NestedKey = INSTRUCTION_KEY,
    ) -> None:
        super().__init__(in_keys=[in_key], out_keys=[out_key])
        self.instructions = list(instructions)

    def forward(self, tensordict: TensorDictBase) -> TensorDictBase:
        """Writes the texts."""
        key, out_key = self.in_keys[0], self.out_keys[0]
        shape = tensordict.batch_size
        if len(self.instructions) == 1 or not shape:
            index = 0 if not shape.numel() else int(tensordict.get(key).flatten()[0])
            text = NonTensorData(self.instructions[index], batch_size=shape)
            return tensordict.set(out_key, text)
        numbers = tensordict.get(key).reshape(shape).flatten(0, -1).tolist()
        # One object for each text: a row costs a reference. On the rows' device, because
        # tensordict would otherwise move each row's text there.
        device = tensordict.device
        texts = [NonTensorData(text, device=device) for text in self.instructions]
        rows = NonTensorStack(*[texts[i] for i in numbers])
        return tensordict.set(out_key, rows.reshape(shape) if len(shape) > 1 else rows)
