# Copyright (c) the torchrl_rpd authors.
#
# This source code is licensed under the MIT license found in the
# LICENSE file in the root directory of this source tree.
"""Reads the pictures that an image teacher looks at, and says what is wrong with them."""

from __future__ import annotations

import torch
from tensordict import TensorDictBase
from tensordict.utils import NestedKey
from torch import Tensor


def read_images(
    tensordict: TensorDictBase,
    key: NestedKey,
    *,
    teacher: str,
    window: int = 1,
    advice: str = "image_key=",
) -> Tensor:
    """Pictures of all rows, in flat windows.

    Args:
        tensordict (TensorDictBase): batch ``[*B]``.
        key (NestedKey): uint8 ``[*B, 3, H, W]``, or ``[*B, window, 3, H, W]`` with a
            ``window`` above 1.

    Keyword Args:
        teacher (str): who asks, for error messages.
        window (int): how many time steps. Defaults to ``1``.
        advice (str): the argument that names the entry. Defaults to ``"image_key="``.

    Returns:
        uint8 ``[n, window, 3, H, W]``; a view where the layout allows one.

    Raises:
        KeyError: if there is no tensor under ``key``.
        TypeError: if it is not uint8.
        ValueError: if it is of another shape.

    Examples:
        >>> from tensordict import TensorDict
        >>> images = torch.zeros(4, 2, 3, 8, 9, dtype=torch.uint8)
        >>> td = TensorDict({"observation": {"image": images}}, [4, 2])
        >>> read_images(td, ("observation", "image"), teacher="Mine").shape
        torch.Size([8, 1, 3, 8, 9])
    """
    images = read_tensor(tensordict, key, teacher=teacher, what="images", advice=advice)
    check_uint8(images, f"the entry {key!r}", teacher=teacher)
    batch_size = tensordict.batch_size
    lead = [*batch_size] if window == 1 else [*batch_size, window]
    if list(images.shape[:-3]) != lead or images.shape[-3] != 3:
        raise ValueError(
            f"{teacher} got the entry {key!r} of shape {list(images.shape)}; expected "
            f"{[*lead, 3, 'H', 'W']} (channels first)."
        )
    return images.reshape(-1, window, *images.shape[-3:])


def check_uint8(images: Tensor, what: str, *, teacher: str) -> None:
    """Refuses pictures that are scaled already."""
    if images.dtype != torch.uint8:
        raise TypeError(
            f"{teacher} takes uint8 images in [0, 255]; {what} is {images.dtype}."
        )


def read_tensor(
    tensordict: TensorDictBase, key: NestedKey, *, teacher: str, what: str, advice: str
) -> Tensor:
    """An entry that a teacher needs, or an error that says how to name another one."""
    value = tensordict.get(key, None)
    if not isinstance(value, Tensor):
        found = sorted(tensordict.keys(True, True), key=str)
        raise KeyError(
            f"{teacher} reads {what} from {key!r}, which is missing or no tensor; found "
            f"{found}. Use an environment that has it, or name the right entry with "
            f"{advice}."
        )
    return value
