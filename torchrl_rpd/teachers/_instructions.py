# Copyright (c) the torchrl_rpd authors.
#
# This source code is licensed under the MIT license found in the
# LICENSE file in the root directory of this source tree.
"""What a language-conditioned teacher is told, row by row."""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from typing import Any

from tensordict import NonTensorData, TensorDictBase
from tensordict.utils import NestedKey


def read_instructions(
    tensordict: TensorDictBase,
    instruction: str | None,
    key: NestedKey = "language_instruction",
) -> list[str]:
    """One instruction for each row of a batch.

    Args:
        tensordict (TensorDictBase): batch ``[*B]``, any number of batch dimensions.
        instruction (str, optional): the same for every row; the tensordict is then not
            looked at.
        key (NestedKey): where the rows' own instructions are: one text for all rows, or
            non-tensor data (or nested lists) of shape ``[*B]``. Defaults to
            ``"language_instruction"``.

    Returns:
        as many texts as the batch has rows, in row-major order of ``[*B]``.

    Raises:
        KeyError: if ``instruction`` is None and the tensordict has no ``key``.
        TypeError: if an instruction is not text.
        ValueError: if there is not one for each row.

    Examples:
        >>> from tensordict import NonTensorStack, TensorDict
        >>> frames = TensorDict(
        ...     {"language_instruction": NonTensorStack("push", "pull")}, [2]
        ... )
        >>> read_instructions(frames, None)
        ['push', 'pull']
        >>> read_instructions(frames, "lift")
        ['lift', 'lift']
    """
    rows = tensordict.batch_size.numel()
    if instruction is not None:
        return [instruction] * rows
    value = tensordict.get(key, None)
    if value is None:
        raise KeyError(
            f"This teacher was built without an instruction, and there is no {key!r} to "
            f"read one per row from; found {sorted(tensordict.keys(), key=str)}. Give "
            "instruction='...', or have the environment write it."
        )
    if isinstance(value, NonTensorData):
        value = value.data
    elif hasattr(value, "tolist"):
        value = value.tolist()
    texts = [value] * rows if isinstance(value, str) else list(_leaves(value))
    for text in texts:
        if not isinstance(text, str):
            raise TypeError(
                f"{key!r} holds {type(text).__name__}; expected text, one for each row."
            )
    if len(texts) != rows:
        raise ValueError(
            f"{key!r} holds {len(texts)} instructions for {rows} rows "
            f"{list(tensordict.batch_size)}."
        )
    return texts


def _leaves(value: Any) -> Iterator[Any]:
    if isinstance(value, Iterable) and not isinstance(value, str | bytes):
        for item in value:
            yield from _leaves(item)
    else:
        yield value
