# Copyright (c) the torchrl_rpd authors.
#
# This source code is licensed under the MIT license found in the
# LICENSE file in the root directory of this source tree.
"""Instructions in text form become T5's hidden states, once per distinct text."""

from __future__ import annotations

import os
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from torchrl_rpd.teachers._hub import require, resolve_checkpoint

# A run has a handful of instructions; a set this large is a mistake that must not fill
# the memory.
_MAX_TEXTS = 4096

# The name in Octo's config.json is a short form that the Hub redirects.
_OWNER = "google-t5"


def find_tokenizer(source: str | os.PathLike[str], **hub: Any) -> Path:
    """The ``tokenizer.json`` of a file, folder or Hub id; see :func:`load_tokenizer`."""
    file = Path(source)
    if file.is_file():
        return file
    name = os.fspath(source)
    if "/" not in name and not file.is_dir():
        name = f"{_OWNER}/{name}"
    try:
        folder = resolve_checkpoint(
            name, allow_patterns="tokenizer.json", extra="octo", **hub
        )
    except FileNotFoundError as error:
        raise FileNotFoundError(
            f"Octo reads its instructions with the tokenizer of {source}, which is not "
            f"at hand: {error} Or give tokenizer=: a tokenizer.json, or a folder that "
            "holds one (beside the checkpoint it is found unasked)."
        ) from error
    file = folder / "tokenizer.json"
    if not file.exists():
        raise FileNotFoundError(
            f"There is no {file.name} in {file.parent}. T5's fast tokenizer has one "
            "(AutoTokenizer.from_pretrained('t5-base').save_pretrained(...) writes it)."
        )
    return file


def load_tokenizer(
    source: str | os.PathLike[str], length: int, **hub: Any
) -> Callable[[Sequence[str]], tuple[Tensor, Tensor]]:
    """A T5 tokenizer that pads and truncates as Octo's ``HFTokenizer`` does.

    Args:
        source (str or path): a ``tokenizer.json``, a folder that holds one, or a Hub id
            (``"t5-base"``).
        length (int): number of tokens, end mark and padding included.
        **hub: ``cache_dir`` and ``local_files_only`` of
            :func:`~torchrl_rpd.teachers._hub.resolve_checkpoint`.

    Returns:
        a function from texts to ``input_ids`` and ``attention_mask``, int64
        ``[n, length]``.

    Raises:
        FileNotFoundError: if there is no ``tokenizer.json``.
        ImportError: if tokenizers is not installed.
    """
    tokenizers = require("tokenizers", extra="octo")
    file = find_tokenizer(source, **hub)
    tokenizer = tokenizers.Tokenizer.from_file(str(file))
    tokenizer.no_padding()
    pad = tokenizer.token_to_id("<pad>")
    end = tokenizer.token_to_id("</s>")
    if pad is None or end is None or tokenizer.encode("a").ids[-1] != end:
        raise ValueError(
            f"{file} is no T5 tokenizer: it lacks <pad> or does not end texts by </s>."
        )
    tokenizer.enable_truncation(length)
    tokenizer.enable_padding(length=length, pad_id=pad, pad_token="<pad>")

    def encode(texts: Sequence[str]) -> tuple[Tensor, Tensor]:
        rows = tokenizer.encode_batch(list(texts))
        ids = torch.tensor([row.ids for row in rows])
        return ids, torch.tensor([row.attention_mask for row in rows])

    return encode


class TextCache:
    """Hidden states by text; each distinct text is encoded once.

    Args:
        encode (callable): maps a list of distinct texts to ``[n, T, D]``.

    Examples:
        >>> import torch
        >>> asked = []
        >>> def encode(texts):
        ...     asked.extend(texts)
        ...     return torch.tensor([[[float(len(text))]] for text in texts])
        >>> cache = TextCache(encode)
        >>> states, rows = cache(["push", "pick up", "push"])
        >>> states[rows].flatten().tolist()
        [4.0, 7.0, 4.0]
        >>> _ = cache(["pick up"])
        >>> asked
        ['push', 'pick up']
    """

    def __init__(self, encode: Callable[[list[str]], Tensor]) -> None:
        self._encode = encode
        self._known: dict[str, Tensor] = {}

    def __call__(self, texts: Sequence[str]) -> tuple[Tensor, Tensor]:
        """Hidden states of the distinct texts, and which of them each row has."""
        distinct = {text: i for i, text in enumerate(dict.fromkeys(texts))}
        new = [text for text in distinct if text not in self._known]
        if new:
            if len(self._known) + len(new) > _MAX_TEXTS:
                self._known.clear()
                new = list(distinct)
            self._known.update(zip(new, self._encode(new), strict=True))
        states = torch.stack([self._known[text] for text in distinct])
        return states, torch.tensor([distinct[text] for text in texts])
