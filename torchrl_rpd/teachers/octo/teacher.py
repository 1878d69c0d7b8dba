# Copyright (c) the torchrl_rpd authors.
#
# This source code is licensed under the MIT license found in the
# LICENSE file in the root directory of this source tree.
"""Octo as a teacher: batched PyTorch inference from the published JAX checkpoint."""

from __future__ import annotations

import os
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from tensordict import TensorDict, TensorDictBase
from tensordict.utils import NestedKey
from torch import Tensor
from torchrl.data.vla.schema import IMAGE_KEY, INSTRUCTION_KEY
from torchrl.modules.vla.common import VLAWrapperBase

from torchrl_rpd.teachers._draws import OwnDraws
from torchrl_rpd.teachers._gripper import Gripper, check_gripper, convert_gripper
from torchrl_rpd.teachers._images import check_uint8, read_images
from torchrl_rpd.teachers._instructions import read_instructions
from torchrl_rpd.teachers.octo._checkpoint import (
    Normalisation,
    choose_statistics,
    find_checkpoint,
    load_checkpoint,
)
from torchrl_rpd.teachers.octo._lanczos import lanczos_resize
from torchrl_rpd.teachers.octo._language import TextCache, load_tokenizer
from torchrl_rpd.teachers.octo._model import OctoModel

# PyTorch's CPU generator fills normal samples in blocks of 16: rows of whole blocks are
# the same whether they are drawn together or one after the other.
_BLOCK = 16


class OctoTeacher(OwnDraws, VLAWrapperBase):
    r"""Octo 1.5 (https://arxiv.org/abs/2405.12213) as a teacher.

    The paper's second teacher, without JAX: octo-small-1.5, octo-base-1.5 and their
    fine-tunes are read as they are published (one flax msgpack file) and computed in
    PyTorch, a batch at a time. Images and text go through the transformer once; the
    diffusion head then turns its readout into a chunk of four actions in 20 denoising
    steps. Build one with :meth:`from_pretrained`.

    **It is stochastic.** The head draws a new action chunk at every call, from a seeded
    generator of the teacher's own (torch's global one is neither read nor moved), in
    the order of the rows; splitting a batch (``max_batch_size`` of the transform) does
    not change the draws, but which rows are asked about does. The paper takes one draw
    per frame. With ``num_samples=N`` the same transformer pass gives ``N`` draws; their
    mean is the action, their population standard deviation (as in the released code)
    is written as ``teacher_std``.

    :class:`~torchrl_rpd.transforms.TeacherActionTransform` asks once per frame and
    stores the answer, where the released code draws anew in every minibatch of every
    epoch. For the ``mse`` distance this leaves the expected gradient as it is, since
    the gradient is linear in the label, and changes its variance only: the epochs of
    one iteration share the draw's error instead of averaging it. Larger ``num_samples``
    reduce that variance (by ``1 / N``) at the cost of the small head alone. For the
    other distances the expected gradient depends on the number of draws as well: the
    mean of many is not distributed like one.

    A :class:`~torchrl_rpd.transforms.TeacherActionTransform` keeps the generator's state
    in its ``state_dict``, so that a resumed run draws the same.

    Args:
        model (OctoModel): the network.
        statistics (mapping): ``mean``, ``std`` and perhaps ``mask`` of the actions.

    Keyword Args:
        tokenize (callable): maps texts to ``input_ids`` and ``attention_mask``.
        instruction (str, optional): see :meth:`from_pretrained`, as all that follow.
        num_samples (int): Defaults to ``1``.
        window_size (int): Defaults to ``1``.
        seed (int): Defaults to ``0``.
        gripper ("raw" or "01_to_pm1"): Defaults to ``"raw"``.
        image_key (NestedKey): Defaults to ``("observation", "image")``.
        wrist_image_key (NestedKey, optional): Defaults to ``None``.
        instruction_key (NestedKey): Defaults to ``"language_instruction"``.
        std_key (NestedKey): Defaults to ``"teacher_std"``.

    Attributes:
        history_window: how many observations of an env it is shown at once.
        history_keys: of which entries.

    Examples:
        >>> import tempfile
        >>> import torch
        >>> from tensordict import TensorDict
        >>> from torchrl_rpd.teachers.octo import OctoTeacher, write_random_checkpoint
        >>> folder = write_random_checkpoint(tempfile.mkdtemp())  # random weights
        >>> teacher = OctoTeacher.from_pretrained(
        ...     folder, instruction="pick up the cube", num_samples=4
        ... )
        >>> teacher.in_keys, teacher.out_keys
        ([('observation', 'image')], [('vla_action', 'chunk'), 'teacher_std'])
        >>> images = torch.randint(256, (2, 3, 256, 256), dtype=torch.uint8)
        >>> frames = teacher(TensorDict({("observation", "image"): images}, [2]))
        >>> frames["vla_action", "chunk"].shape
        torch.Size([2, 4, 7])
        >>> bool((frames["teacher_std"] > 0).all())
        True
    """

    @dataclass
    class _AcceptedKeys(VLAWrapperBase._AcceptedKeys):
        """The keys of the base class, and two more.

        Attributes:
            teacher_std: ``[*B, A]`` standard deviation of the first action.
            timestep_pad_mask: ``[*B, W]`` bool, False before the episode's start.
        """

        teacher_std: NestedKey = "teacher_std"
        timestep_pad_mask: NestedKey = "timestep_pad_mask"

    def __init__(
        self,
        model: OctoModel,
        statistics: Mapping[str, Any],
        *,
        tokenize: Callable[[Sequence[str]], tuple[Tensor, Tensor]],
        instruction: str | None = None,
        num_samples: int = 1,
        window_size: int = 1,
        seed: int = 0,
        gripper: Gripper = "raw",
        image_key: NestedKey = IMAGE_KEY,
        wrist_image_key: NestedKey | None = None,
        instruction_key: NestedKey = INSTRUCTION_KEY,
        std_key: NestedKey = "teacher_std",
    ) -> None:
        head, config = model.head.config, model.config
        if not 1 <= window_size <= config.window_size:
            raise ValueError(
                f"window_size must be in [1, {config.window_size}] (what this model was "
                f"trained on), got {window_size}."
            )
        if wrist_image_key is not None and "wrist" not in config.image_size:
            raise ValueError(
                "wrist_image_key is given, but this checkpoint has no wrist camera."
            )
        if len(statistics["mean"]) != head.action_dim:
            raise ValueError(
                f"The statistics are of {len(statistics['mean'])} action dimensions, "
                f"the model has {head.action_dim}."
            )
        check_gripper(gripper, statistics)
        self.instruction = instruction
        super().__init__(
            model,
            action_dim=head.action_dim,
            chunk_size=head.action_horizon,
            use_state=False,
            image_key=image_key,
            wrist_image_key=wrist_image_key,
            instruction_key=instruction_key,
            num_samples=num_samples,
        )
        self.gripper = gripper
        self.history_window = window_size
        self.normalisation = Normalisation(statistics)
        self._generator = torch.Generator().manual_seed(seed)
        self._tokenize = tokenize
        self._texts = TextCache(self._encode)
        self.set_keys(teacher_std=std_key)
        if instruction is not None:
            # A missing tokenizer shows now, not in the first step of a run.
            self._texts([instruction])

    @classmethod
    def from_pretrained(
        cls,
        path_or_repo: str | os.PathLike[str],
        *,
        instruction: str | None = None,
        step: int | None = None,
        unnorm_key: str | None = None,
        num_samples: int = 1,
        window_size: int = 1,
        seed: int = 0,
        gripper: Gripper = "raw",
        dtype: torch.dtype = torch.float32,
        device: torch.device | str | None = None,
        tokenizer: str | os.PathLike[str] | None = None,
        revision: str | None = None,
        cache_dir: str | os.PathLike[str] | None = None,
        local_files_only: bool | None = None,
        image_key: NestedKey = IMAGE_KEY,
        wrist_image_key: NestedKey | None = None,
        instruction_key: NestedKey = INSTRUCTION_KEY,
        std_key: NestedKey = "teacher_std",
    ) -> OctoTeacher:
        """Loads a checkpoint as Octo saves it, or a copy converted from one.

        Args:
            path_or_repo (str or path): a folder, or a Hub id such as
                ``"rail-berkeley/octo-base-1.5"``. A copy written by
                ``python -m torchrl_rpd.teachers.octo.convert`` loads faster.

        Keyword Args:
            instruction (str, optional): what every row is told; T5 reads it once.
                Defaults to ``None``: each row's own, from ``instruction_key``, every
                distinct text read once.
            step (int, optional): which saved step. Defaults to the last one.
            unnorm_key (str, optional): which data set's statistics undo the
                normalisation of the actions. Needed for a pretrained model, which has
                those of many; not used for a fine-tuned one.
            num_samples (int): draws per frame; see the class. Defaults to ``1``, as in
                the paper.
            window_size (int): observations shown at once, at most what the model was
                trained on (2). More than 1 needs
                :class:`~torchrl_rpd.transforms.TeacherActionTransform` in an env, which
                keeps the history, or the windows in the tensordict. Defaults to ``1``,
                as in the paper.
            seed (int): of the generator that the head draws from. Defaults to ``0``.
            gripper ("raw" or "01_to_pm1"): ``"raw"`` writes the last action dimension
                as the model gives it, ``"01_to_pm1"`` maps it by ``2 g - 1``. A warning
                tells where the statistics speak against the choice. Defaults to
                ``"raw"``, as in the paper's released code.
            dtype (torch.dtype): of the transformer. Image stems, text encoder and
                diffusion head are cheap and compute in float32 (on CUDA, PyTorch runs
                the stems' convolutions in TF32 unless
                ``torch.backends.cudnn.allow_tf32`` is False). Defaults to
                ``torch.float32``, which is what the original uses.
            device (torch.device or str, optional): Defaults to the CPU.
            tokenizer (str or path, optional): a T5 ``tokenizer.json``, a folder that
                holds one, or a Hub id. Defaults to the one beside the checkpoint, else
                the one that config.json names (``t5-base``, from the Hub). Looked for
                when the first instruction is read.
            revision (str, optional): of a Hub repository; pin a commit.
            cache_dir (path, optional): instead of the Hub's usual cache.
            local_files_only (bool, optional): never ask the network.
            image_key (NestedKey): main camera, uint8 ``[*B, 3, H, W]`` of any size
                (resized to 256x256 by Lanczos as in Octo's own wrapper), or
                ``[*B, W, 3, H, W]`` with ``window_size`` above 1. Defaults to
                ``("observation", "image")``.
            wrist_image_key (NestedKey, optional): hand camera, likewise (128x128).
                Defaults to ``None``: left out, as in the paper.
            instruction_key (NestedKey): text, read where ``instruction`` is None.
                Defaults to ``"language_instruction"``.
            std_key (NestedKey): where the spread goes with ``num_samples`` above 1.
                Defaults to ``"teacher_std"``.

        Raises:
            FileNotFoundError: if something is not there.
            ImportError: naming the extra to install.
            ValueError: for a model that is not covered (naming why), arrays that do not
                fit the configuration, or options out of range.

        Examples:
            >>> import tempfile
            >>> from torchrl_rpd.teachers.octo import OctoTeacher
            >>> from torchrl_rpd.teachers.octo import write_random_checkpoint
            >>> folder = write_random_checkpoint(tempfile.mkdtemp())
            >>> teacher = OctoTeacher.from_pretrained(folder)
            >>> teacher.in_keys
            [('observation', 'image'), 'language_instruction']
        """
        hub = {"cache_dir": cache_dir, "local_files_only": local_files_only}
        folder = find_checkpoint(path_or_repo, step=step, revision=revision, **hub)
        checkpoint = load_checkpoint(folder, step)
        config = checkpoint.config
        model = OctoModel.from_state_dict(config, checkpoint.state).to_dtype(dtype)
        if tokenizer is None:
            beside = (folder / "tokenizer.json").exists()
            tokenizer = folder if beside else config.tokenizer_name
        teacher = cls(
            model.to(device),
            choose_statistics(checkpoint.statistics, unnorm_key),
            tokenize=_LazyTokenizer(tokenizer, config.text_length, hub),
            instruction=instruction,
            num_samples=num_samples,
            window_size=window_size,
            seed=seed,
            gripper=gripper,
            image_key=image_key,
            wrist_image_key=wrist_image_key,
            instruction_key=instruction_key,
            std_key=std_key,
        )
        return teacher.to(device).eval()

    @property
    def history_keys(self) -> list[NestedKey]:
        """The images; what a transform shows as a window."""
        keys = self.tensor_keys
        wrist = [] if keys.wrist_image is None else [keys.wrist_image]
        return [keys.image, *wrist]

    def _update_keys(self) -> None:
        self.in_keys = list(self.history_keys)
        if self.instruction is None:
            self.in_keys.append(self.tensor_keys.instruction)
        self.out_keys = [self.tensor_keys.action_chunk]
        if self.num_samples > 1:
            self.out_keys.append(self.tensor_keys.teacher_std)

    # ------------------------------------------------------------------ the answers
    @torch.no_grad()
    def forward(
        self,
        tensordict: TensorDictBase,
        *,
        tensordict_out: TensorDictBase | None = None,
        **kwargs: Any,
    ) -> TensorDictBase:
        """Writes a chunk ``[*B, 4, 7]`` and, with several draws, their spread.

        Raises:
            KeyError: if an image, the window's mask or an instruction is missing.
            TypeError: if images are not uint8.
            ValueError: for images of a wrong shape.
        """
        batch = tensordict.batch_size
        keys = self.tensor_keys
        images = {"primary": self._read_images(tensordict, keys.image)}
        if keys.wrist_image is not None:
            images["wrist"] = self._read_images(tensordict, keys.wrist_image)
        mask = self._read_mask(tensordict)
        text, rows = self._texts(
            read_instructions(tensordict, self.instruction, keys.instruction)
        )
        readout = self._read_out(images, text, rows, mask)
        draws = self._draw(readout, num_samples=self.num_samples)
        out = TensorDict({}, batch_size=batch, device=draws.device)
        chunk = draws.mean(0).reshape(*batch, self.chunk_size, self.action_dim)
        self._set_action(out, chunk=chunk)
        if self.num_samples > 1:
            std = draws[:, :, 0].std(0, correction=0)
            out.set(keys.teacher_std, std.reshape(*batch, self.action_dim))
        return self._output_tensordict(tensordict, out, tensordict_out)

    @torch.no_grad()
    def sample_chunk(
        self,
        images: Tensor,
        input_ids: Tensor,
        attention_mask: Tensor,
        timestep_pad_mask: Tensor,
        initial_noise: Tensor | None = None,
        step_noise: Tensor | None = None,
        *,
        wrist_images: Tensor | None = None,
    ) -> Tensor:
        """The original's ``sample_actions``: tokens in, noise at will, a chunk out.

        Args:
            images (Tensor): main camera, uint8 ``[B, W, H, W', 3]``.
            input_ids (Tensor): tokens of the instructions, int64 ``[B, T]``.
            attention_mask (Tensor): which of them are no padding, ``[B, T]``.
            timestep_pad_mask (Tensor): bool ``[B, W]``, False for padded time steps.
            initial_noise (Tensor, optional): standard normal ``[*S, B, W, H * A]`` that
                the denoising starts from. Defaults to a draw of the teacher's
                generator, with ``S`` its ``num_samples`` if that is above 1.
            step_noise (Tensor, optional): standard normal
                ``[steps, *S, B, W, H * A]``; entry ``i`` is added in the ``i``-th step.
                Defaults to a draw likewise.

        Keyword Args:
            wrist_images (Tensor, optional): hand camera, like ``images``.

        Returns:
            un-normalised actions ``[*S, B, H, A]`` of the last time step.
        """
        given = {"primary": images, "wrist": wrist_images}
        device = self.model.readout_position.device
        shown = {
            camera: torch.as_tensor(value).movedim(-1, -3)
            for camera, value in given.items()
            if value is not None
        }
        for camera, value in shown.items():
            what = f"what the {camera} camera saw"
            check_uint8(value, what, teacher="OctoTeacher")
            if value.ndim != 5 or value.shape[-3] != 3:
                raise ValueError(
                    f"OctoTeacher got, as {what}, {list(value.movedim(-3, -1).shape)}; "
                    "expected [B, W, height, width, 3]."
                )
        text = self.model.encode_text(
            torch.as_tensor(input_ids).to(device),
            torch.as_tensor(attention_mask).to(device),
        )
        mask = torch.as_tensor(timestep_pad_mask)
        readout = self._read_out(shown, text, None, mask)
        # Each time step is denoised for itself, and only the last one is wanted.
        last = [
            None if noise is None else torch.as_tensor(noise)[..., -1, :].to(device)
            for noise in (initial_noise, step_noise)
        ]
        several = self.num_samples > 1 and initial_noise is None and step_noise is None
        return self._draw(
            readout,
            num_samples=self.num_samples if several else None,
            initial=last[0],
            noise=last[1],
        )

    def _read_out(
        self,
        images: Mapping[str, Tensor],
        text: Tensor,
        rows: Tensor | None,
        timestep_pad_mask: Tensor | None,
    ) -> Tensor:
        """One pass of the transformer: the last time step's readout, ``[B, D]``."""
        device = self.model.readout_position.device
        sizes = self.model.config.image_size
        resized = {
            camera: lanczos_resize(value.to(device, non_blocking=True), sizes[camera])
            for camera, value in images.items()
        }
        if rows is not None:
            rows = None if text.shape[0] == 1 else rows.to(device)
        if timestep_pad_mask is not None:
            timestep_pad_mask = timestep_pad_mask.to(device)
        readouts = self.model.readouts(
            resized, text.to(device), rows, timestep_pad_mask
        )
        return readouts[:, -1, 0]

    def _draw(
        self,
        readout: Tensor,
        *,
        num_samples: int | None,
        initial: Tensor | None = None,
        noise: Tensor | None = None,
    ) -> Tensor:
        """Un-normalised chunks ``[*S, B, H, A]``, denoised from given or new noise."""
        steps = self.model.head.config.diffusion_steps
        if initial is None or noise is None:
            given = initial if noise is None else noise[0]
            alone = () if num_samples is None else (num_samples,)
            shape = alone if given is None else tuple(given.shape[:-2])
            drawn = self._noise(steps + 1, shape, readout)
            initial = drawn[0] if initial is None else initial
            noise = drawn[1:] if noise is None else noise
        flat = self.model.head.sample(readout, initial, noise)
        chunk = flat.unflatten(-1, (self.chunk_size, self.action_dim))
        return convert_gripper(self.gripper, self.normalisation(chunk))

    def _noise(self, count: int, shape: tuple[int, ...], like: Tensor) -> Tensor:
        """Standard normal ``[count, *S, B, H * A]``, drawn row by row on the CPU.

        On the CPU so that the draws are the same whatever computes the rest.
        """
        rows, width = like.shape[0], self.chunk_size * self.action_dim
        samples = torch.Size(shape).numel()
        needed = count * samples * width
        drawn = torch.randn(
            rows, -(-needed // _BLOCK) * _BLOCK, generator=self._generator
        )
        drawn = drawn[:, :needed].unflatten(1, (count, *shape, width))
        return drawn.movedim(0, -2).to(like.device)

    # ------------------------------------------------------------------ what it reads
    def _encode(self, texts: Sequence[str]) -> Tensor:
        device = self.model.readout_position.device
        input_ids, attention_mask = self._tokenize(texts)
        with torch.no_grad():
            return self.model.encode_text(
                input_ids.to(device), attention_mask.to(device)
            )

    def _read_images(self, tensordict: TensorDictBase, key: NestedKey) -> Tensor:
        """Flat windows ``[n, W, 3, H, W']`` of one camera."""
        return read_images(
            tensordict, key, teacher="OctoTeacher", window=self.history_window
        )

    def _read_mask(self, tensordict: TensorDictBase) -> Tensor | None:
        if self.history_window == 1:
            return None
        key = self.tensor_keys.timestep_pad_mask
        mask = tensordict.get(key, None)
        if not isinstance(mask, Tensor):
            raise KeyError(
                f"OctoTeacher with window_size={self.history_window} reads windows of "
                f"images and their mask {key!r}, which is missing. "
                "TeacherActionTransform in an env keeps and writes both; on single "
                "frames use window_size=1."
            )
        return mask.reshape(-1, self.history_window)


class _LazyTokenizer:
    """Looks for the tokenizer when the first text is read."""

    def __init__(
        self, source: str | os.PathLike[str], length: int, hub: Mapping[str, Any]
    ) -> None:
        self._source, self._length, self._hub = source, length, hub
        self._tokenize: Callable[[Sequence[str]], tuple[Tensor, Tensor]] | None = None

    def __call__(self, texts: Sequence[str]) -> tuple[Tensor, Tensor]:
        if self._tokenize is None:
            self._tokenize = load_tokenizer(self._source, self._length, **self._hub)
        return self._tokenize(texts)
