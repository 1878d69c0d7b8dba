# Copyright (c) the torchrl_rpd authors.
#
# This source code is licensed under the MIT license found in the
# LICENSE file in the root directory of this source tree.
"""Octo trained by the loss of its diffusion head."""

from __future__ import annotations

import json
import os
import warnings
from collections.abc import Iterator, Mapping
from typing import Any, ClassVar, Literal, get_args

import torch
from tensordict import TensorDict, TensorDictBase
from torch import Tensor
from torch.nn import functional as F

from torchrl_rpd.finetune._base import FinetuneLoss
from torchrl_rpd.finetune._statistics import of_actions
from torchrl_rpd.teachers._images import read_images
from torchrl_rpd.teachers._instructions import read_instructions
from torchrl_rpd.teachers.octo import OctoTeacher
from torchrl_rpd.teachers.octo._checkpoint import (
    WEIGHTS,
    _array_file,
    find_checkpoint,
    load_checkpoint,
)
from torchrl_rpd.teachers.octo._model import OctoModel
from torchrl_rpd.teachers.octo._msgpack import read_arrays
from torchrl_rpd.teachers.octo._stem import SmallStem16
from torchrl_rpd.teachers.octo._weights import _standardise, _to_oihw, rules
from torchrl_rpd.teachers.octo.teacher import _LazyTokenizer

Trained = Literal["full", "head"]


class TrainableStem(SmallStem16):
    """The image stem with the kernels before their standardisation.

    The original standardises them at every call (its ``StdConv``), and trains what is
    behind. A teacher holds them standardised, once and for all.
    """

    def _tokens(self, images: Tensor) -> Tensor:
        # In float32 also under autocast: the norms subtract large means.
        with torch.autocast(images.device.type, enabled=False):
            x = images.to(self.embedding.weight.dtype) / 127.5 - 1.0
            if self.goal_channels:
                x = F.pad(x, (0, 0, 0, 0, 0, self.goal_channels), value=-1.0)
            conv: Any
            for conv, norm in zip(self.convs, self.norms, strict=True):
                kernel = standardise(conv.weight)
                x = F.conv2d(x, kernel, conv.bias, stride=2, padding=1)
                x = F.relu(norm(x))
            return self.embedding(x).flatten(2).transpose(1, 2)


def standardise(weight: Tensor) -> Tensor:
    """Kernels ``[O, I, 3, 3]`` as Octo's StdConv uses them."""
    return _to_oihw(_standardise(weight.permute(2, 3, 1, 0)))


def load_octo(
    path: str | os.PathLike[str],
    statistics: Mapping[str, Any],
    *,
    step: int | None = None,
    trained: Trained = "full",
    device: torch.device | str | None = None,
    tokenizer: str | os.PathLike[str] | None = None,
    revision: str | None = None,
    cache_dir: str | os.PathLike[str] | None = None,
    local_files_only: bool | None = None,
    **kwargs: Any,
) -> OctoTeacher:
    """A published Octo, its weights ready to be trained, with other statistics.

    Weights are float32, as in the original. The text encoder stays as it is, as the
    published configurations have it (``frozen_keys``); no dropout, likewise.

    Args:
        path (str or path): folder or Hub id of the checkpoint to start from.
        statistics (mapping): of the demonstrations, with ``mean``, ``std`` and ``mask``
            under ``"action"``: ``demos.statistics()``, or :func:`action_statistics`.

    Keyword Args:
        step (int, optional): which saved step. Defaults to the last one.
        trained ("full" or "head"): all but the text encoder, or only the diffusion head
            (the original's ``head_only``). Defaults to ``"full"``.
        device (device, optional): Defaults to the CPU.
        tokenizer (str or path, optional): as in ``OctoTeacher.from_pretrained``, as all
            that follow.
        revision (str, optional): of a Hub repository; pin a commit.
        cache_dir (path, optional): instead of the Hub's usual cache.
        local_files_only (bool, optional): never ask the network.
        **kwargs: of :class:`~torchrl_rpd.teachers.octo.OctoTeacher`.

    Raises:
        FileNotFoundError: if something is not there.
        ValueError: for a model that is not covered, or without the statistics.

    .. note:: A copy written by ``python -m torchrl_rpd.teachers.octo.convert`` holds the
        stems' kernels standardised, without the scale that they had. Standardising them
        again changes them by 1e-5 of their size, and they train at that scale: start
        from the published layout where the original's run is to be repeated.

    Examples:
        >>> import tempfile
        >>> import torch
        >>> from torchrl_rpd.finetune import action_statistics, load_octo
        >>> from torchrl_rpd.teachers.octo import write_random_checkpoint
        >>> folder = write_random_checkpoint(tempfile.mkdtemp())
        >>> statistics = action_statistics(2 * torch.rand(50, 7) - 1)
        >>> teacher = load_octo(folder, statistics, trained="head")
        >>> names = [n for n, p in teacher.model.named_parameters() if p.requires_grad]
        >>> {name.split(".")[0] for name in names}
        {'head'}
    """
    if trained not in get_args(Trained):
        raise ValueError(
            f"trained must be one of {get_args(Trained)}, got {trained!r}."
        )
    action = of_actions(statistics, ("mean", "std", "mask"), "Octo")
    hub = {"cache_dir": cache_dir, "local_files_only": local_files_only}
    folder = find_checkpoint(path, step=step, revision=revision, **hub)
    checkpoint = load_checkpoint(folder, step)
    config = checkpoint.config
    _warn_of_dropout(json.loads((folder / "config.json").read_text()))
    model = OctoModel.from_state_dict(config, checkpoint.state)
    if not (folder / WEIGHTS).exists():
        arrays = read_arrays(_array_file(folder, checkpoint.step))
        for rule in rules(config):
            if is_standardised(rule.sources):
                (source,) = rule.sources
                model.get_parameter(rule.target).data = _to_oihw(
                    arrays[source]
                ).contiguous()
    for camera, stem in model.stems.items():
        trainable = TrainableStem(config.goal_stacked[camera])
        trainable.load_state_dict(stem.state_dict())
        model.stems[camera] = trainable
    model.requires_grad_(trained == "full")
    model.head.requires_grad_(True)
    model.text_encoder.requires_grad_(False)
    if tokenizer is None:
        beside = (folder / "tokenizer.json").exists()
        tokenizer = folder if beside else config.tokenizer_name
    teacher = OctoTeacher(
        model.to(device),
        action,
        tokenize=_LazyTokenizer(tokenizer, config.text_length, hub),
        **kwargs,
    )
    return teacher.to(device).eval()


def is_standardised(sources: Mapping[str, Any]) -> bool:
    """Whether a rule of the checkpoint's arrays is about a kernel of a StdConv."""
    return any("/StdConv_" in name and name.endswith("kernel") for name in sources)


def _warn_of_dropout(config: Mapping[str, Any]) -> None:
    asked = {name: rate for name, rate in _dropout(config) if rate}
    if asked:
        warnings.warn(
            f"config.json asks for dropout in training ({asked}), which is not applied: "
            "the published Octo 1.5 models have none.",
            stacklevel=3,
        )


def _dropout(tree: Any) -> Iterator[tuple[str, Any]]:
    if isinstance(tree, Mapping):
        for name, value in tree.items():
            if name.endswith("dropout_rate"):
                yield name, value
            yield from _dropout(value)


class OctoDiffusionLoss(FinetuneLoss):
    r"""The noise that Octo's head predicts in noisy demonstrations, squared error.

    As ``DiffusionActionHead.loss`` of the original: normalised chunks
    ``(a - mean) / (std + 1e-8)`` (the gripper as it is), clipped to 5, become
    :math:`\sqrt{\bar\alpha_t} a + \sqrt{1 - \bar\alpha_t} \epsilon` with a cosine
    schedule and a step ``t`` drawn for each row; the loss is the mean of
    :math:`(\hat\epsilon - \epsilon)^2` over all actions that are not padding, times the
    number of action dimensions.

    Reads ``("vla_action", "chunk")`` ``[*B, H, A]`` with at least the model's horizon
    of 4, and ``"action_is_pad"`` bool ``[*B, H]``. The original's mask lets the first
    repeated action behind an episode's end count (``chunk_act_obs`` is off by that
    much); here the buffer's mask decides. One frame for each row, as in the original's
    fine-tuning (``window_size=1``). Returns ``loss_diffusion``.

    Args:
        teacher (OctoTeacher): from :func:`load_octo`; its network is trained.

    Keyword Args:
        padded_chunks (bool): whether chunks may reach behind an episode's end, so that
            there is a mask to read. Defaults to ``True``.
        num_noise (int): draws of noise for each frame, from one pass of the transformer
            (the original's ``n_diffusion_samples``). Defaults to ``1``, as published.

    Raises:
        KeyError: in the call, if images, instructions, actions or mask are missing.
        TypeError: in the call, for images that are not uint8.
        ValueError: for a teacher that is shown more than one frame; in the call, for
            actions of another dimension or chunks that are too short.

    Examples:
        >>> import tempfile
        >>> import torch
        >>> from tensordict import TensorDict
        >>> from torchrl_rpd.finetune import (
        ...     OctoDiffusionLoss,
        ...     action_statistics,
        ...     load_octo,
        ... )
        >>> from torchrl_rpd.teachers.octo import write_random_checkpoint
        >>> folder = write_random_checkpoint(tempfile.mkdtemp())
        >>> chunk = 2 * torch.rand(2, 4, 7) - 1
        >>> teacher = load_octo(folder, action_statistics(chunk))
        >>> loss = OctoDiffusionLoss(teacher, padded_chunks=False)
        >>> batch = TensorDict(
        ...     {
        ...         "observation": {"image": torch.zeros(2, 3, 256, 256).byte()},
        ...         "language_instruction": "push the cube",
        ...         "vla_action": {"chunk": chunk},
        ...     },
        ...     [2],
        ... )
        >>> loss(batch)["loss_diffusion"].shape
        torch.Size([])
    """

    out_keys: ClassVar[list[str]] = ["loss_diffusion"]
    signal: Tensor
    spread: Tensor

    def __init__(
        self, teacher: OctoTeacher, *, padded_chunks: bool = True, num_noise: int = 1
    ) -> None:
        super().__init__()
        if num_noise < 1:
            raise ValueError(f"num_noise must be at least 1, got {num_noise}.")
        if teacher.history_window != 1:
            raise ValueError(
                "OctoDiffusionLoss trains on single frames; load the model with "
                f"window_size=1, not {teacher.history_window}."
            )
        self.teacher = teacher
        self.padded_chunks = padded_chunks
        self.num_noise = num_noise
        self.head = teacher.model.head.config
        kept = (1.0 - teacher.model.head.betas()).cumprod(0)
        device = teacher.model.readout_position.device
        self.register_buffer("signal", kept.sqrt().to(device), persistent=False)
        self.register_buffer("spread", (1 - kept).sqrt().to(device), persistent=False)

    @property
    def in_keys(self) -> list[Any]:
        """What is read of a sample."""
        keys = self.tensor_keys
        found = [*self.teacher.history_keys[1:], keys.instruction, keys.action_chunk]
        if self.padded_chunks:
            found.append(keys.action_is_pad)
        return [keys.image, *found]

    def train(self, mode: bool = True) -> OctoDiffusionLoss:
        """Training mode, in which the text encoder, which is not trained, never is."""
        super().train(mode)
        self.teacher.model.text_encoder.eval()
        return self

    def draw(self, tensordict: TensorDictBase) -> TensorDictBase:
        """A copy with noise ``[*B, S, H * A]`` and its levels ``[*B, S]``, S draws a row.

        From torch's global generator on the CPU, whatever computes the rest.
        """
        shape = (*tensordict.batch_size, self.num_noise)
        width = self.head.action_horizon * self.head.action_dim
        level = torch.randint(self.head.diffusion_steps, shape)
        noise = torch.randn(*shape, width)
        out = tensordict.copy()
        out.set(self.tensor_keys.noise, noise.to(tensordict.device))
        out.set(self.tensor_keys.noise_level, level.to(tensordict.device))
        return out

    def terms(self, tensordict: TensorDictBase) -> Tensor:
        """The rows' actions that are not padding."""
        return self._valid(tensordict).sum().float()

    def forward(self, tensordict: TensorDictBase) -> TensorDict:
        """The loss of a batch ``[*B]``; draws the noise unless :meth:`draw` did."""
        keys, teacher = self.tensor_keys, self.teacher
        if tensordict.get(keys.noise, None) is None:
            tensordict = self.draw(tensordict)
        images = {"primary": self._images(tensordict, keys.image)}
        wrist = teacher.tensor_keys.wrist_image
        if wrist is not None:
            images["wrist"] = self._images(tensordict, wrist)
        texts = read_instructions(tensordict, None, keys.instruction)
        readout = teacher._read_out(images, *teacher._texts(texts), None)
        device = readout.device
        actions = self._chunks(tensordict).to(device).unsqueeze(1)
        shape = (actions.shape[0], self.num_noise)
        noise = tensordict.get(keys.noise).reshape(*shape, -1).to(device)
        level = tensordict.get(keys.noise_level).reshape(shape).to(device)
        with torch.autocast(device.type, enabled=False):
            signal, spread = self.signal[level, None], self.spread[level, None]
            noisy = signal * actions + spread * noise
            readout = readout.float().unsqueeze(1)
            guess = teacher.model.head.eps(readout, noisy, level)
            squared = (guess - noise).square().mean(1)
        squared = squared.unflatten(1, (-1, self.head.action_dim))
        valid = self._valid(tensordict).to(device).unsqueeze(-1)
        # A mean over valid steps and all dimensions, times the number of dimensions.
        total = torch.where(valid, squared, 0.0).sum()
        return TensorDict({"loss_diffusion": total / valid.sum().clamp_min(1)})

    def _images(self, tensordict: TensorDictBase, key: Any) -> Tensor:
        return read_images(tensordict, key, teacher="OctoDiffusionLoss")

    def _chunks(self, tensordict: TensorDictBase) -> Tensor:
        """Normalised chunks ``[n, H * A]``, clipped as the sampling clips them."""
        key, head = self.tensor_keys.action_chunk, self.head
        chunk = self._read_actions(tensordict, key, head.action_dim)
        if chunk.ndim < 2 or chunk.shape[-2] < head.action_horizon:
            raise ValueError(
                f"OctoDiffusionLoss trains on chunks of {head.action_horizon} actions; "
                f"{key!r} is {list(chunk.shape)}. ActionChunkTransform, or the reader of "
                "the demonstrations, makes longer ones."
            )
        norm = self.teacher.normalisation
        chunk = chunk[..., : head.action_horizon, :].flatten(0, -3).to(norm.mean)
        normal = (chunk - norm.mean) / (norm.std + 1e-8)
        chunk = torch.where(norm.mask, normal, chunk)
        return chunk.clamp(-head.max_action, head.max_action).flatten(1)

    def _valid(self, tensordict: TensorDictBase) -> Tensor:
        """Bool ``[n, H]``, False for actions behind the end of an episode."""
        key, horizon = self.tensor_keys.action_is_pad, self.head.action_horizon
        if not self.padded_chunks:
            return torch.ones(tensordict.batch_size.numel(), horizon, dtype=torch.bool)
        padded = tensordict.get(key, None)
        if not isinstance(padded, Tensor):
            raise KeyError(
                f"OctoDiffusionLoss reads from {key!r} which actions of a chunk lie "
                "behind the end of the episode; it is missing. If none does: "
                "OctoDiffusionLoss(..., padded_chunks=False)."
            )
        return ~padded[..., :horizon].reshape(-1, horizon)
