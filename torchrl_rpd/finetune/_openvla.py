# Copyright (c) the torchrl_rpd authors.
#
# This source code is licensed under the MIT license found in the
# LICENSE file in the root directory of this source tree.
"""OpenVLA trained by cross-entropy on action tokens."""

from __future__ import annotations

import os
from collections.abc import Mapping
from pathlib import Path
from typing import Any, ClassVar

import torch
from tensordict import TensorDict, TensorDictBase
from torch import Tensor
from torch.nn import functional as F
from torch.utils.checkpoint import checkpoint
from torchrl.data.vla import VocabTailActionTokenizer

from torchrl_rpd.finetune._base import FinetuneLoss
from torchrl_rpd.finetune._statistics import of_actions
from torchrl_rpd.teachers._hub import resolve_checkpoint
from torchrl_rpd.teachers._images import read_images
from torchrl_rpd.teachers._instructions import read_instructions
from torchrl_rpd.teachers.openvla import OpenVLATeacher
from torchrl_rpd.teachers.openvla._config import read_config
from torchrl_rpd.teachers.openvla._load import load_parts
from torchrl_rpd.teachers.openvla._model import NUM_BINS
from torchrl_rpd.teachers.openvla._vision import NUM_PATCHES


def load_openvla(
    path: str | os.PathLike[str],
    statistics: Mapping[str, Any],
    *,
    dtype: torch.dtype | None = None,
    device: torch.device | str = "cpu",
    trainable: bool = False,
    revision: str | None = None,
    cache_dir: str | os.PathLike[str] | None = None,
    local_files_only: bool | None = None,
    **kwargs: Any,
) -> OpenVLATeacher:
    """A published OpenVLA with the statistics of other demonstrations.

    Args:
        path (str or path): folder or Hub id of the checkpoint to start from.
        statistics (mapping): of the demonstrations, with ``q01``, ``q99`` and ``mask``
            under ``"action"``: ``demos.statistics()``, or :func:`action_statistics`.

    Keyword Args:
        dtype (torch.dtype, optional): of the weights. Defaults to ``None``: the
            checkpoint's own, bfloat16 for the published ones, as the original trains
            its adapters. Use float32 to train all weights: bfloat16 loses small steps.
        device (device): of the weights. Defaults to ``"cpu"``.
        trainable (bool): whether all weights require gradients. Defaults to ``False``:
            none does, :func:`add_lora` comes next.
        revision (str, optional): branch, tag or commit on the Hub; pin one.
        cache_dir (path, optional): instead of the Hub's usual cache.
        local_files_only (bool, optional): never ask the network.
        **kwargs: of :class:`~torchrl_rpd.teachers.openvla.OpenVLATeacher`.

    Raises:
        FileNotFoundError: if the checkpoint, or a part of it, cannot be found.
        ValueError: for a checkpoint of another kind, or without the statistics.

    Examples:
        >>> import tempfile
        >>> import torch
        >>> from torchrl_rpd.finetune import action_statistics, load_openvla
        >>> from torchrl_rpd.teachers.openvla import write_tiny_checkpoint
        >>> folder = write_tiny_checkpoint(tempfile.mkdtemp())
        >>> demonstrated = 2 * torch.rand(50, 7) - 1
        >>> teacher = load_openvla(folder, action_statistics(demonstrated))
        >>> teacher.action_dim
        7
    """
    action = of_actions(statistics, ("q01", "q99", "mask"), "OpenVLA")
    folder = resolve_checkpoint(
        path,
        revision=revision,
        cache_dir=cache_dir,
        local_files_only=local_files_only,
    )
    config = read_config(folder, Path(path).name)
    device = torch.device(device)
    model, prompts = load_parts(
        folder,
        config,
        action_dim=len(action["q01"]),
        dtype=dtype,
        device=device,
    )
    teacher = OpenVLATeacher(model, prompts, action, config=config, **kwargs)
    return teacher.requires_grad_(trainable).eval().to(device)


class OpenVLATokenLoss(FinetuneLoss):
    """Cross-entropy of the demonstrated action's tokens, as OpenVLA was trained.

    A row reads ``[BOS, image, prompt, action tokens, EOS]``; the loss is the mean over
    the tokens of the action and the EOS behind them, and over the rows, each predicted
    from what stands before it (``RLDSBatchTransform`` and ``vla-scripts/finetune.py``
    of the original). Prompt, image and bins are those of the teacher: what it decodes
    is the inverse of what is trained.

    Two small differences to the original's data pipeline. It resizes by Lanczos to
    224 pixels, this as the teacher does (Pillow's bicubic). A dimension that never
    changes it replaces by 0, also the gripper, whose constant is then lost; here the
    number stays, and decodes to itself.

    Reads one action for each image, ``"action"`` ``[*B, A]``. Returns ``loss_tokens``
    and, detached, ``token_accuracy`` (share of action tokens that are the most probable
    of the whole vocabulary, given the true ones before them) and ``action_l1`` (mean
    distance in the normalised units [-1, 1]).

    Args:
        teacher (OpenVLATeacher): from :func:`load_openvla`; its network is trained.

    Keyword Args:
        checkpoint_layers (bool): compute the language model's layers again in the
            backward pass instead of keeping their activations: about a third slower,
            a fraction of the memory. Defaults to ``False``.

    Raises:
        KeyError: in the call, if images, instructions or actions are missing.
        TypeError: in the call, for images that are not uint8.
        ValueError: in the call, for actions of another dimension.

    Examples:
        >>> import tempfile
        >>> import torch
        >>> from tensordict import TensorDict
        >>> from torchrl_rpd.finetune import (
        ...     OpenVLATokenLoss,
        ...     action_statistics,
        ...     load_openvla,
        ... )
        >>> from torchrl_rpd.teachers.openvla import write_tiny_checkpoint
        >>> folder = write_tiny_checkpoint(tempfile.mkdtemp())
        >>> batch = TensorDict(
        ...     {
        ...         "observation": {"image": torch.zeros(2, 3, 64, 64).byte()},
        ...         "language_instruction": "push the cube",
        ...         "action": 2 * torch.rand(2, 7) - 1,
        ...     },
        ...     [2],
        ... )
        >>> teacher = load_openvla(folder, action_statistics(batch["action"]))
        >>> loss = OpenVLATokenLoss(teacher)
        >>> sorted(loss(batch).keys())
        ['action_l1', 'loss_tokens', 'token_accuracy']
    """

    out_keys: ClassVar[list[str]] = ["loss_tokens", "token_accuracy", "action_l1"]

    def __init__(
        self, teacher: OpenVLATeacher, *, checkpoint_layers: bool = False
    ) -> None:
        super().__init__()
        self.teacher = teacher
        self.checkpoint_layers = checkpoint_layers
        vocab_size = teacher.model.vocab_size
        self._bins = VocabTailActionTokenizer(NUM_BINS, full_vocab_size=vocab_size)
        self._end = int(teacher.model.language_model.config.eos_token_id)

    @property
    def in_keys(self) -> list[Any]:
        """What is read of a sample."""
        keys = self.tensor_keys
        return [keys.image, keys.instruction, keys.action]

    def terms(self, tensordict: TensorDictBase) -> Tensor:
        """The rows' tokens, the end included."""
        return torch.tensor(
            float(tensordict.batch_size.numel() * (self.teacher.action_dim + 1))
        )

    def forward(self, tensordict: TensorDictBase) -> TensorDict:
        """The loss of a batch ``[*B]``."""
        teacher, keys = self.teacher, self.tensor_keys
        device = teacher.model.projector.fc1.weight.device
        images = read_images(tensordict, keys.image, teacher="OpenVLATokenLoss")
        texts = read_instructions(tensordict, None, keys.instruction)
        actions = self._read_actions(tensordict, keys.action, teacher.action_dim)
        tokens = teacher.decoder.tokenizer.encode(actions.flatten(0, -2).float())
        tokens = tokens.to(device)
        pixels = teacher.pixels(images.squeeze(1).to(device, non_blocking=True))
        logits = self._logits(pixels, texts, tokens).float()
        labels = torch.cat([tokens, torch.full_like(tokens[:, :1], self._end)], 1)
        loss = F.cross_entropy(logits.flatten(0, 1), labels.flatten())
        with torch.no_grad():
            guess = logits[:, :-1].argmax(-1)
            accuracy = (guess == tokens).float().mean()
            distance = self._bins.decode(guess) - self._bins.decode(tokens)
        return TensorDict(
            {
                "loss_tokens": loss,
                "token_accuracy": accuracy,
                "action_l1": distance.abs().mean(),
            }
        )

    def _logits(self, pixels: Tensor, texts: list[str], tokens: Tensor) -> Tensor:
        """Logits ``[B, A + 1, V]`` of the tokens and of the end behind them."""
        model = self.teacher.model
        llama = model.language_model.model
        ids, lengths = self._rows(texts, tokens)
        text = llama.embed_tokens(ids)
        patches = model.patches(pixels)
        hidden = torch.cat([text[:, :1], patches.to(text), text[:, 1:]], 1)
        positions = torch.arange(hidden.shape[1], device=hidden.device)
        rope = model._rope(positions.unsqueeze(0), hidden.dtype)
        for layer in llama.layers:
            if self.checkpoint_layers and torch.is_grad_enabled():
                hidden = checkpoint(_layer, layer, hidden, rope, use_reentrant=False)
            else:
                hidden = _layer(layer, hidden, rope)
        # Only where an action or the end is predicted: logits of the whole vocabulary
        # at every position would take most of the memory.
        first = (lengths + NUM_PATCHES - 1).unsqueeze(-1)
        where = first + torch.arange(tokens.shape[1] + 1, device=hidden.device)
        where = where.unsqueeze(-1).expand(-1, -1, hidden.shape[-1])
        return model.language_model.lm_head(llama.norm(hidden.gather(1, where)))

    def _rows(self, texts: list[str], tokens: Tensor) -> tuple[Tensor, Tensor]:
        """Prompts with the action's tokens behind them, and the prompts' lengths.

        Padded on the right, as in the original's training: nothing looks ahead, so no
        mask is needed, and every row gets what it gets alone.
        """
        prompts = [self.teacher._prompts.ids(text) for text in texts]
        lengths = torch.tensor([len(prompt) for prompt in prompts])
        width = int(lengths.max()) + tokens.shape[1]
        ids = torch.full((len(prompts), width), self._end)
        for row, prompt in zip(ids, prompts, strict=True):
            row[: len(prompt)] = torch.tensor(prompt)
        ids, lengths = ids.to(tokens.device), lengths.to(tokens.device)
        behind = lengths.unsqueeze(-1) + torch.arange(
            tokens.shape[1], device=tokens.device
        )
        return ids.scatter(1, behind, tokens), lengths


def _layer(layer: Any, hidden: Tensor, rope: tuple[Tensor, Tensor]) -> Tensor:
    out: Tensor = layer(
        hidden, attention_mask=None, position_embeddings=rope, use_cache=False
    )
    return out
