# Copyright (c) the torchrl_rpd authors.
#
# This source code is licensed under the MIT license found in the
# LICENSE file in the root directory of this source tree.
"""OpenVLA as a teacher: images and an instruction in, actions out."""

from __future__ import annotations

import os
from collections.abc import Mapping
from pathlib import Path
from typing import Any, Literal

import torch
from tensordict import TensorDict, TensorDictBase
from tensordict.utils import NestedKey
from torch import Tensor
from torchrl.modules.vla import VLAWrapperBase

from torchrl_rpd.teachers._gripper import Gripper, check_gripper, convert_gripper
from torchrl_rpd.teachers._hub import resolve_checkpoint
from torchrl_rpd.teachers._images import read_images
from torchrl_rpd.teachers._instructions import read_instructions
from torchrl_rpd.teachers._resize import PILResize
from torchrl_rpd.teachers.openvla._actions import ActionDecoder, choose_statistics
from torchrl_rpd.teachers.openvla._config import OpenVLAConfig, read_config
from torchrl_rpd.teachers.openvla._graphs import GraphedDecode
from torchrl_rpd.teachers.openvla._load import load_parts
from torchrl_rpd.teachers.openvla._model import NUM_BINS, Decoded, OpenVLAModel
from torchrl_rpd.teachers.openvla._prompt import Prompts
from torchrl_rpd.teachers.openvla._vision import IMAGE_SIZE

_FILES = ("*.json", "*.safetensors")


class OpenVLATeacher(VLAWrapperBase):
    """OpenVLA (https://arxiv.org/abs/2406.09246), batched, as the paper's main teacher.

    Loads the published checkpoint layout as it is and computes in plain PyTorch, with
    Llama's layers from transformers. Actions equal those of the original code: same
    resizing, same prompt, greedy tokens, same un-normalisation. Unlike the original it
    takes batches, and rows with different instructions in one batch; each row gets what
    it gets alone (up to the rounding of the chosen dtype).

    Reads images ``[*B, 3, H, W]`` uint8 of any size, in the keys of TorchRL's VLA
    schema; writes ``("vla_action", "chunk")``, ``[*B, 1, A]`` float32 (``A`` is 7 in
    the published checkpoints) on the device of the images. The network may be on
    another device than the tensordict. Memoryless and deterministic.

    Built by :meth:`from_pretrained`; the constructor takes the parts.

    Args:
        model (OpenVLAModel): the network.
        prompts (Prompts): the tokenizer.
        statistics (mapping): ``q01``, ``q99`` and ``mask`` of the actions.

    Keyword Args:
        config (OpenVLAConfig): of the network.
        instruction (str, optional): the task in words, for every row. Defaults to
            ``None``: read from ``instruction_key``, row by row.
        gripper ("raw" or "01_to_pm1", optional): ``"raw"`` leaves the gripper as the
            checkpoint has it, as the paper's released code does; ``"01_to_pm1"`` maps
            it by ``2 g - 1``, for checkpoints trained on [0, 1] in ManiSkill's
            [-1, 1]. Defaults to ``"raw"``, with a warning where the statistics say
            [0, 1].
        readout ("greedy" or "mean", optional): what the chunk holds: the most probable
            action (the original), or the mean of each dimension under the token
            distribution. Defaults to ``"greedy"``.
        spread (bool, optional): also write ``("vla_action", "mean")`` and
            ``("vla_action", "std")``, ``[*B, 1, A]`` float32, see the note below.
            Defaults to ``False``.
        min_std (float, optional): lower limit of the standard deviations written. A KL
            against a teacher that is sure of its action is as steep as ``1 / std**2``;
            a bin is 2 / 255 wide where actions are in [-1, 1]. Defaults to ``0.0``:
            exact.
        max_batch_size (int, optional): the most rows in one pass; more are split.
            Bounds the memory. Defaults to ``None``: no limit.
        compile (bool, optional): compile towers and prefill with ``torch.compile``,
            once for each batch size and prompt length. Defaults to ``False``.
        cuda_graph (bool, optional): capture the decoding of each batch size and prompt
            length as a CUDA graph. Defaults to ``False``.
        image_key (NestedKey, optional): Defaults to ``("observation", "image")``.
        instruction_key (NestedKey, optional): Defaults to ``"language_instruction"``.
        action_chunk_key (NestedKey, optional): Defaults to ``("vla_action", "chunk")``.

    Raises:
        KeyError: in the call, if image or instruction are missing.
        torch.OutOfMemoryError: in the call, naming a ``max_batch_size`` to try.
        TypeError: in the call, for images that are not uint8.
        ValueError: for options out of range; in the call, for images of another shape.

    .. note:: Mean and standard deviation are exact sums over the 256 action ids, from
        the same forward pass as the action. Greedy decoding makes every sample equal,
        so the paper's way of estimating a spread (sampling the teacher) gives 0 and its
        KL variant cannot work; this is what it needs. The distribution of dimension
        ``d`` is conditional on the greedy tokens of the dimensions before it, and on
        the token being an action. :class:`~torchrl_rpd.transforms.TeacherActionTransform`
        stores it with ``teacher_std_key="teacher_std"``.

    Examples:
        >>> import tempfile
        >>> import torch
        >>> from tensordict import TensorDict
        >>> from torchrl_rpd.teachers.openvla import (
        ...     OpenVLATeacher,
        ...     write_tiny_checkpoint,
        ... )
        >>> folder = write_tiny_checkpoint(tempfile.mkdtemp())  # random weights
        >>> teacher = OpenVLATeacher.from_pretrained(
        ...     folder, instruction="pick up the cube", spread=True
        ... )
        >>> images = torch.randint(256, (4, 3, 128, 128), dtype=torch.uint8)
        >>> td = TensorDict({"observation": {"image": images}}, [4])
        >>> td = teacher(td)
        >>> td["vla_action", "chunk"].shape, td["vla_action", "std"].shape
        (torch.Size([4, 1, 7]), torch.Size([4, 1, 7]))
    """

    def __init__(
        self,
        model: OpenVLAModel,
        prompts: Prompts,
        statistics: Mapping[str, Any],
        *,
        config: OpenVLAConfig,
        instruction: str | None = None,
        gripper: Gripper = "raw",
        readout: Literal["greedy", "mean"] = "greedy",
        spread: bool = False,
        min_std: float = 0.0,
        max_batch_size: int | None = None,
        compile: bool = False,
        cuda_graph: bool = False,
        image_key: NestedKey = ("observation", "image"),
        instruction_key: NestedKey = "language_instruction",
        action_chunk_key: NestedKey | None = None,
    ) -> None:
        if readout not in ("greedy", "mean"):
            raise ValueError(f"readout must be 'greedy' or 'mean', got {readout!r}.")
        if min_std < 0:
            raise ValueError(f"min_std must be at least 0, got {min_std}.")
        if max_batch_size is not None and max_batch_size < 1:
            raise ValueError(
                f"max_batch_size must be at least 1, got {max_batch_size}."
            )
        check_gripper(gripper, statistics)
        decoder = ActionDecoder(statistics, vocab_size=config.vocab_size)
        super().__init__(
            model,
            action_dim=decoder.action_dim,
            chunk_size=1,
            use_state=False,
            image_key=image_key,
            wrist_image_key=None,
            instruction_key=instruction_key,
            action_chunk_key=action_chunk_key,
            # a plain tensordict, which has room for mean and std
            return_vla_action_container=False,
        )
        self.instruction = instruction
        self.gripper: Gripper = gripper
        self.readout = readout
        self.spread = spread
        self.min_std = min_std
        self.max_batch_size = max_batch_size
        self.decoder = decoder
        self.resize = PILResize(IMAGE_SIZE, "bicubic")
        self._prompts = prompts
        for name in ("means", "stds"):
            values = torch.tensor(getattr(config, name)).reshape(-1, 1, 1)
            self.register_buffer(f"_{name}", values, persistent=False)
        self._patches, self._prefill = model.patches, model.prefill
        if compile:
            self._patches = torch.compile(model.patches, dynamic=False)
            self._prefill = torch.compile(model.prefill, dynamic=False)
        self._decode = GraphedDecode(model) if cuda_graph else model.decode
        self._update_keys()

    _means: Tensor
    _stds: Tensor
    out_keys: list[NestedKey]
    instruction: str | None = None
    spread: bool = False

    @classmethod
    def from_pretrained(
        cls,
        path: str | os.PathLike[str],
        *,
        instruction: str | None = None,
        unnorm_key: str | None = None,
        dtype: torch.dtype | None = None,
        device: torch.device | str = "cpu",
        revision: str | None = None,
        cache_dir: str | os.PathLike[str] | None = None,
        local_files_only: bool | None = None,
        **kwargs: Any,
    ) -> OpenVLATeacher:
        """Loads a checkpoint in the published layout.

        Weights go shard by shard from safetensors to ``device`` in ``dtype``. Nothing
        of the checkpoint is executed: no remote code, no pickle. What is implemented is
        the architecture of ``openvla/openvla-7b`` and its fine-tunings; anything else is
        refused with what was found.

        Args:
            path (str or path): a local folder, or a Hub id, e.g.
                ``"openvla/openvla-7b"``.

        Keyword Args:
            instruction (str, optional): the task in words, for every row. Defaults to
                ``None``: read row by row.
            unnorm_key (str, optional): which training set's statistics un-normalise the
                actions. Defaults to ``None``: the only one there is.
            dtype (torch.dtype, optional): of the weights. Defaults to ``None``: the
                checkpoint's own, bfloat16 for the published ones.
            device (device, optional): of the weights. Defaults to ``"cpu"``.
            revision (str, optional): branch, tag or commit on the Hub; pin one.
            cache_dir (path, optional): instead of the Hub's usual cache.
            local_files_only (bool, optional): never ask the network.
            **kwargs: see :class:`OpenVLATeacher`.

        Raises:
            FileNotFoundError: if the checkpoint, or a part of it, cannot be found.
            ImportError: if transformers or tokenizers are missing.
            KeyError: if there are no statistics ``unnorm_key``.
            ValueError: for a checkpoint of another kind, or an ``unnorm_key`` that is
                not clear.

        Examples:
            >>> import tempfile
            >>> from torchrl_rpd.teachers.openvla import (
            ...     OpenVLATeacher,
            ...     write_tiny_checkpoint,
            ... )
            >>> folder = write_tiny_checkpoint(tempfile.mkdtemp())
            >>> teacher = OpenVLATeacher.from_pretrained(folder)
            >>> teacher.in_keys
            [('observation', 'image'), 'language_instruction']
        """
        folder = resolve_checkpoint(
            path,
            revision=revision,
            allow_patterns=_FILES,
            cache_dir=cache_dir,
            local_files_only=local_files_only,
        )
        config = read_config(folder, Path(path).name)
        _, statistics = choose_statistics(config.norm_stats, unnorm_key, str(path))
        device = torch.device(device)
        model, prompts = load_parts(
            folder,
            config,
            action_dim=len(statistics["q01"]),
            dtype=dtype,
            device=device,
        )
        teacher = cls(
            model,
            prompts,
            statistics,
            config=config,
            instruction=instruction,
            **kwargs,
        )
        return teacher.requires_grad_(False).eval().to(device)

    @torch.no_grad()
    def forward(
        self,
        tensordict: TensorDictBase,
        *,
        tensordict_out: TensorDictBase | None = None,
        **kwargs: Any,
    ) -> TensorDictBase:
        """Writes the actions for every row of ``tensordict``."""
        images = read_images(
            tensordict, self.tensor_keys.image, teacher="OpenVLATeacher"
        ).squeeze(1)
        instructions = read_instructions(
            tensordict, self.instruction, self.tensor_keys.instruction
        )
        batch_size = tensordict.batch_size
        entries = self._answer(images, instructions)
        out = TensorDict(
            {
                key: value.to(images.device).reshape(*batch_size, 1, self.action_dim)
                for key, value in entries.items()
            },
            batch_size=batch_size,
            device=tensordict.device,
        )
        return self._output_tensordict(tensordict, out, tensordict_out)

    def pixels(self, images: Tensor) -> Tensor:
        """Images ``[n, 3, H, W]`` uint8 to what the towers see, ``[n, 6, 224, 224]``."""
        resized = self.resize(images).to(torch.float32).div_(255)
        pixels = torch.cat([resized, resized], -3)
        pixels.sub_(self._means).div_(self._stds)
        return pixels.to(self._weight.dtype)

    def tokens(self, images: Tensor, instructions: list[str]) -> Decoded:
        """Action tokens and their logits for images ``[n, 3, H, W]`` uint8.

        Raises:
            torch.OutOfMemoryError: naming a ``max_batch_size`` to try.
        """
        device = self._weight.device
        if not instructions:
            nothing = torch.zeros(0, self.action_dim, dtype=torch.long, device=device)
            return Decoded(nothing, nothing.new_zeros(0, self.action_dim, NUM_BINS))
        limit = self.max_batch_size or len(instructions)
        parts = []
        for start in range(0, len(instructions), limit):
            rows = slice(start, start + limit)
            try:
                pixels = self.pixels(images[rows].to(device, non_blocking=True))
                state = self._prefill(
                    self._patches(pixels),
                    self._prompts.batch(instructions[rows], device),
                    num_tokens=self.action_dim,
                )
                decoded = self._decode(state, num_tokens=self.action_dim)
            except torch.OutOfMemoryError as error:
                self.model.cache.release()
                raise self._out_of_memory(len(instructions[rows])) from error
            # (a captured graph gives its memory again at the next call)
            parts.append((decoded.tokens.clone(), decoded.logits.clone()))
        return Decoded(*(torch.cat(tensors) for tensors in zip(*parts, strict=True)))

    def _answer(self, images: Tensor, instructions: list[str]) -> dict[Any, Tensor]:
        decoded = self.tokens(images, instructions)
        chunk_key = self.tensor_keys.action_chunk
        if not (self.spread or self.readout == "mean"):
            action = self.decoder(decoded.tokens.cpu())
            return {chunk_key: convert_gripper(self.gripper, action)}
        # Together to the host: one synchronisation, whatever is asked for.
        moments = self.decoder.moments(decoded.logits)
        tokens, mean, std = torch.stack([decoded.tokens.double(), *moments]).cpu()
        mean, std = self.decoder.unnormalise(mean, std)
        mean = convert_gripper(self.gripper, mean)
        action = convert_gripper(self.gripper, self.decoder(tokens.long()))
        entries = {chunk_key: mean if self.readout == "mean" else action}
        if self.spread:
            entries[self._field("mean")] = mean
            std = convert_gripper(self.gripper, std, is_std=True)
            entries[self._field("std")] = std.clamp_min(self.min_std)
        return entries

    def _field(self, name: str) -> NestedKey:
        return self._vla_field_key(self.tensor_keys.vla_action, name)

    def _update_keys(self) -> None:
        super()._update_keys()
        if self.instruction is not None:
            self.in_keys = [self.tensor_keys.image]
        if self.spread:
            self.out_keys = [*self.out_keys, self._field("mean"), self._field("std")]

    @property
    def _weight(self) -> Tensor:
        return self.model.projector.fc1.weight

    def _out_of_memory(self, rows: int) -> torch.OutOfMemoryError:
        if rows == 1:
            advice = "not even one image fits: use a smaller dtype or a larger device"
        else:
            advice = f"try max_batch_size={rows // 2}"
        return torch.OutOfMemoryError(
            f"OpenVLATeacher ran out of memory on {self._weight.device} with {rows} "
            f"images in one pass; {advice}."
        )
