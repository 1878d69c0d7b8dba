# Copyright (c) the torchrl_rpd authors.
#
# This source code is licensed under the MIT license found in the
# LICENSE file in the root directory of this source tree.
"""A vision-language-action model that is small enough to train on two cores."""

from __future__ import annotations

import json
import re
import zlib
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from tensordict import TensorDictBase
from tensordict.utils import NestedKey
from torch import Tensor, nn
from torchrl.modules import MLP
from torchrl.modules.vla import VLAWrapperBase

from torchrl_rpd._safetensors import read_header, written_whole
from torchrl_rpd.teachers._images import read_images
from torchrl_rpd.teachers._instructions import read_instructions
from torchrl_rpd.teachers._resize import PILResize

__all__ = ["PocketVLA"]

_FORMAT = "torchrl_rpd.pocket_vla/2"


class PocketVLA(VLAWrapperBase):
    """Pictures and an instruction in, a chunk of actions out, with a million weights.

    A successor of :class:`~torchrl.modules.vla.TinyVLA` that can be trained to act. Its
    few convolutions keep where things are: the words of the instruction scale and shift
    the channels (FiLM, https://arxiv.org/abs/1709.07871), and each channel is read out as
    the place where it is strongest (spatial softmax, https://arxiv.org/abs/1504.00702)
    and how strong it is there; a small map of all places beside it makes training start
    sooner.
    An instruction is the mean of its words' embeddings, found by hashing the words: no
    tokenizer, and the order of the words does not matter.

    It is a plain module with gradients: train it with
    :class:`~torchrl.objectives.BCLoss`, act with
    :class:`~torchrl_rpd.teachers.PocketVLATeacher`.

    Keyword Args:
        action_dim (int): dimensions of one action. Defaults to ``7``.
        chunk_size (int): actions per answer, the first one for now. Defaults to ``4``.
        image_size (int): side in pixels to which pictures are resized. Defaults to
            ``128``.
        crop (sequence of float): top, left and side of the square that it looks at, as
            shares of the picture. Defaults to ``(0.375, 0.125, 0.625)``: in the human
            view the part of the table where the four tasks take place.
        channels (sequence of int): of the convolutions; the first two halve the
            picture. Defaults to ``(16, 32, 32, 48)``.
        map_channels (int): of the map. Defaults to ``8``.
        text_dim (int): of the words' embeddings. Defaults to ``32``.
        text_vocab (int): rows of the embedding; words may share one. Defaults to
            ``512``.
        hidden_dim (int): width of the last two layers. Defaults to ``256``.
        instruction (str, optional): for every row. Defaults to ``None``: read from
            ``instruction_key``, row by row.
        image_key (NestedKey, optional): ``[*B, 3, H, W]`` uint8. Defaults to
            ``("observation", "image")``.
        instruction_key (NestedKey, optional): Defaults to ``"language_instruction"``.
        action_chunk_key (NestedKey, optional): written, ``[*B, chunk_size, action_dim]``
            float32. Defaults to ``("vla_action", "chunk")``.

    Raises:
        KeyError: in the call, if picture or instruction are missing.
        TypeError: in the call, for pictures that are not uint8.
        ValueError: in the call, for pictures of another shape.

    Examples:
        >>> import torch
        >>> from tensordict import NonTensorStack, TensorDict
        >>> from torchrl_rpd.teachers.pocket import PocketVLA
        >>> model = PocketVLA()
        >>> td = TensorDict(
        ...     {
        ...         "observation": {"image": torch.zeros(2, 3, 64, 64, dtype=torch.uint8)},
        ...         "language_instruction": NonTensorStack("push it", "pull it"),
        ...     },
        ...     [2],
        ... )
        >>> model(td)["vla_action", "chunk"].shape
        torch.Size([2, 4, 7])
    """

    out_keys: list[NestedKey]
    instruction: str | None = None

    def __init__(
        self,
        *,
        action_dim: int = 7,
        chunk_size: int = 4,
        image_size: int = 128,
        crop: Sequence[float] = (0.375, 0.125, 0.625),
        channels: Sequence[int] = (16, 32, 32, 48),
        map_channels: int = 8,
        text_dim: int = 32,
        text_vocab: int = 512,
        hidden_dim: int = 256,
        instruction: str | None = None,
        image_key: NestedKey = ("observation", "image"),
        instruction_key: NestedKey = "language_instruction",
        action_chunk_key: NestedKey | None = None,
    ) -> None:
        super().__init__(
            action_dim=action_dim,
            chunk_size=chunk_size,
            use_state=False,
            image_key=image_key,
            wrist_image_key=None,
            instruction_key=instruction_key,
            action_chunk_key=action_chunk_key,
            # Plain entries: BCLoss reads the prediction under its key.
            return_vla_action_container=False,
        )
        self.instruction = instruction
        self.config: dict[str, Any] = {
            "action_dim": action_dim,
            "chunk_size": chunk_size,
            "image_size": image_size,
            "crop": list(crop),
            "channels": list(channels),
            "map_channels": map_channels,
            "text_dim": text_dim,
            "text_vocab": text_vocab,
            "hidden_dim": hidden_dim,
        }
        self.resize = PILResize(image_size, "bicubic")
        top, left, side = (round(share * image_size) for share in crop)
        if side < 4 or min(top, left) < 0 or max(top, left) + side > image_size:
            raise ValueError(
                f"crop={tuple(crop)} is no part of a picture of {image_size} pixels: top, "
                "left and side are shares of it."
            )
        self._window = (slice(top, top + side), slice(left, left + side))
        self.words = nn.EmbeddingBag(text_vocab, text_dim, mode="mean")
        first, second, *rest = channels
        self.stem = nn.Sequential(
            nn.Conv2d(3, first, 5, stride=2, padding=2),
            nn.ReLU(),
            nn.Conv2d(first, second, 3, stride=2, padding=1),
            nn.ReLU(),
        )
        self.blocks = nn.ModuleList()
        for inputs, outputs in zip([second, *rest], rest, strict=False):
            self.blocks.append(_FiLMBlock(inputs, outputs, text_dim))
        self.map = nn.Conv2d(rest[-1], map_channels, 1)
        cells = ((side + 1) // 2 + 1) // 2
        self.trunk = MLP(
            in_features=3 * rest[-1] + map_channels * cells**2 + text_dim,
            out_features=chunk_size * action_dim,
            num_cells=[hidden_dim, hidden_dim],
            activation_class=nn.ReLU,
        )
        self._update_keys()

    def _predict(self, tensordict: TensorDictBase) -> Tensor:
        images = read_images(
            tensordict, self.tensor_keys.image, teacher=type(self).__name__
        ).squeeze(1)
        texts = read_instructions(
            tensordict, self.instruction, self.tensor_keys.instruction
        )
        flat = self.predict(images, texts)
        return flat.reshape(*tensordict.batch_size, -1)

    def predict(self, images: Tensor, texts: list[str]) -> Tensor:
        """Actions ``[n, chunk_size * action_dim]`` for ``[n, 3, H, W]`` uint8 pictures."""
        weight = self.words.weight
        images = images.to(weight.device)
        if images.shape[-2:] != (self.config["image_size"],) * 2:
            images = self.resize(images)
        text = self._embed(texts)
        images = images[..., self._window[0], self._window[1]]
        features = self.stem(images.to(weight.dtype) / 255 - 0.5)
        for block in self.blocks:
            features = block(features, text)
        everywhere = self.map(features).flatten(1)
        # Convolutions may run in bfloat16; a place needs more digits.
        with torch.autocast(weight.device.type, enabled=False):
            places = _places(features.to(weight.dtype))
            read = [places, everywhere.to(weight.dtype), text.to(weight.dtype)]
            return self.trunk(torch.cat(read, -1))

    def _embed(self, texts: list[str]) -> Tensor:
        # Few texts, many rows: each is taken apart once.
        known = {text: i for i, text in enumerate(dict.fromkeys(texts))}
        device = self.words.weight.device
        ids = [self._word_ids(text) for text in known]
        lengths = torch.tensor([0, *map(len, ids)])
        flat = torch.tensor([i for row in ids for i in row], device=device)
        embedded = self.words(flat, lengths.cumsum(0)[:-1].to(device))
        return embedded[torch.tensor([known[text] for text in texts], device=device)]

    def _word_ids(self, text: str) -> list[int]:
        words = re.findall(r"[a-z0-9]+", text.lower())
        if not words:
            raise ValueError(f"{text!r} is no instruction: it holds no word.")
        return [zlib.crc32(w.encode()) % self.words.num_embeddings for w in words]

    def _update_keys(self) -> None:
        super()._update_keys()
        if self.instruction is not None:
            self.in_keys = [self.tensor_keys.image]

    def save(self, path: str | Path, **metadata: Any) -> None:
        """Writes weights, sizes and ``metadata`` (JSON-able) as safetensors."""
        from safetensors.torch import save_model

        path = Path(path)
        path.parent.mkdir(parents=True, exist_ok=True)
        header = {
            "format": _FORMAT,
            "config": json.dumps(self.config),
            "metadata": json.dumps(metadata),
        }
        with written_whole(path) as partial:
            save_model(self, partial, metadata=header)


class _FiLMBlock(nn.Module):
    """A convolution whose channels are scaled and shifted by the text."""

    def __init__(self, inputs: int, outputs: int, text_dim: int) -> None:
        super().__init__()
        self.convolution = nn.Conv2d(inputs, outputs, 3, padding=1)
        self.norm = nn.GroupNorm(8, outputs)
        self.film = nn.Linear(text_dim, 2 * outputs)

    def forward(self, features: Tensor, text: Tensor) -> Tensor:
        scale, shift = self.film(text)[..., None, None].chunk(2, 1)
        return (self.norm(self.convolution(features)) * (1 + scale) + shift).relu()


def _places(features: Tensor) -> Tensor:
    """Expected x and y of each channel in [-1, 1], and its value there, ``[n, 3 C]``."""
    height, width = features.shape[-2:]
    flat = features.flatten(-2)
    weights = flat.softmax(-1)
    strength = (weights * flat).sum(-1)
    weights = weights.unflatten(-1, (height, width))
    x = torch.linspace(-1, 1, width, device=features.device, dtype=features.dtype)
    y = torch.linspace(-1, 1, height, device=features.device, dtype=features.dtype)
    return torch.cat([weights.sum(-2) @ x, weights.sum(-1) @ y, strength], -1)


def read_sizes(path: str | Path) -> tuple[dict[str, Any], dict[str, Any]]:
    """Sizes and metadata of a file that :meth:`PocketVLA.save` wrote.

    Raises:
        FileNotFoundError: if there is none.
        ValueError: if it is another kind of file.
    """
    path = Path(path)
    if not path.is_file():
        raise FileNotFoundError(
            f"{path} does not exist: examples/train_pocket_vla.py writes one."
        )
    header = read_header(path)
    if header.get("format") != _FORMAT:
        raise ValueError(
            f"{path} holds no pocket VLA (format {header.get('format')!r} instead of "
            f"{_FORMAT!r})."
        )
    try:
        return json.loads(header["config"]), json.loads(header["metadata"])
    except (KeyError, ValueError) as error:
        raise ValueError(
            f"{path} does not say how to build its model "
            f"({type(error).__name__}: {error})."
        ) from error
