# Copyright (c) the torchrl_rpd authors.
#
# This source code is licensed under the MIT license found in the
# LICENSE file in the root directory of this source tree.
"""From instructions to rows of token ids."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any, NamedTuple

import torch
from torch import Tensor

from torchrl_rpd.teachers._hub import require

# Llama's token of a lone word boundary. The model was trained with it before the action.
_BOUNDARY = 29871
_MOST_BATCHES = 64


class PromptBatch(NamedTuple):
    """Prompts of ``B`` rows, ready for the image to go in after the first token.

    Attributes:
        ids (torch.Tensor): int64 ``[B, 1 + T]``: BOS, padding, the rest of the prompt.
        padding (torch.Tensor, optional): int64 ``[B]``, how many ids after BOS are
            padding; None where no row has any.
    """

    ids: Tensor
    padding: Tensor | None


class Prompts:
    """Tokenises instructions as OpenVLA was trained with them.

    Uses the checkpoint's ``tokenizer.json`` as it is: transformers 5 rebuilds Llama
    tokenizers, and the ids differ around special tokens. Every instruction is tokenised
    once, and every mixture of instructions is put on the device once.

    Args:
        file (path): the ``tokenizer.json``.

    Keyword Args:
        bos_token_id (int): the first token.
        pad_token_id (int): fills up shorter prompts.
        most_tokens (int): a longer prompt is refused.

    Raises:
        FileNotFoundError: if there is no such file.
        ImportError: if tokenizers is not installed.
    """

    def __init__(
        self, file: Path, *, bos_token_id: int, pad_token_id: int, most_tokens: int
    ) -> None:
        if not file.is_file():
            raise FileNotFoundError(
                f"{file.parent} holds no {file.name}; OpenVLATeacher needs the fast "
                "tokenizer's file (the published checkpoints have it)."
            )
        self._tokenizer: Any = require("tokenizers").Tokenizer.from_file(str(file))
        self._tokenizer.no_truncation()
        self._tokenizer.no_padding()
        self._bos, self._pad = bos_token_id, pad_token_id
        self._most_tokens = most_tokens
        self._ids: dict[str, list[int]] = {}
        self._batches: dict[tuple[tuple[str, ...], torch.device], PromptBatch] = {}

    def ids(self, instruction: str) -> list[int]:
        """The ids of one prompt, the boundary token last.

        Raises:
            ValueError: if the prompt is too long for the model.
        """
        if instruction not in self._ids:
            text = (
                f"In: What action should the robot take to {instruction.lower()}?\nOut:"
            )
            encoded = self._tokenizer.encode(text, add_special_tokens=False).ids
            ids = [self._bos, *encoded]
            if ids[-1] != _BOUNDARY:
                ids.append(_BOUNDARY)
            if len(ids) > self._most_tokens:
                raise ValueError(
                    f"An instruction of {len(ids)} tokens is too long, the model takes "
                    f"{self._most_tokens} beside the image: {instruction[:80]!r}..."
                )
            self._ids[instruction] = ids
        return self._ids[instruction]

    def batch(self, instructions: Sequence[str], device: torch.device) -> PromptBatch:
        """Prompts for the rows of a batch, padded to the longest among them."""
        rows = len(instructions)
        kinds = set(instructions)
        # Rows of one task share one row of memory, whatever the size of the batch.
        wanted = tuple(kinds) if len(kinds) == 1 else tuple(instructions)
        batch = self._batches.get((wanted, device))
        if batch is None:
            while len(self._batches) >= _MOST_BATCHES:
                self._batches.pop(next(iter(self._batches)))
            batch = self._build(wanted, device)
            self._batches[wanted, device] = batch
        if len(kinds) == 1:
            return PromptBatch(batch.ids.expand(rows, -1), None)
        return batch

    def _build(self, instructions: Sequence[str], device: torch.device) -> PromptBatch:
        prompts = [self.ids(instruction) for instruction in instructions]
        longest = max(map(len, prompts))
        padding = [longest - len(prompt) for prompt in prompts]
        # Not before BOS: the patches belong directly after it, in every row.
        ids = torch.tensor(
            [
                [prompt[0], *[self._pad] * pad, *prompt[1:]]
                for prompt, pad in zip(prompts, padding, strict=True)
            ]
        )
        pads = torch.tensor(padding).to(device) if any(padding) else None
        return PromptBatch(ids.to(device), pads)
