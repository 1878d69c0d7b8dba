# Copyright (c) the torchrl_rpd authors.
#
# This source code is licensed under the MIT license found in the
# LICENSE file in the root directory of this source tree.
"""What the losses have in common, and gradients of a batch that does not fit at once."""

from __future__ import annotations

import abc
from dataclasses import dataclass

import torch
from tensordict import TensorDict, TensorDictBase
from tensordict.utils import NestedKey
from torch import Tensor
from torchrl.data.vla.schema import (
    ACTION_CHUNK_KEY,
    ACTION_IS_PAD_KEY,
    ACTION_KEY,
    IMAGE_KEY,
    INSTRUCTION_KEY,
)
from torchrl.objectives import LossModule


class FinetuneLoss(LossModule, abc.ABC):
    """A loss on samples of demonstrations that trains the network inside a teacher.

    The teacher that it is given is at any time what the network has become: call it to
    see what it does, export it to keep it. Image and text reach the network through the
    teacher's own code, so what is trained is what will be asked.

    Reads TorchRL's VLA schema (``set_keys`` renames): ``("observation", "image")``
    uint8 ``[*B, 3, H, W]``, ``"language_instruction"``, and the actions in the data
    set's own units. Only parameters that require a gradient are trained.

    .. note:: TorchRL's ``BCLoss`` compares what an actor returns with the action.
        Neither model returns what it is trained on: OpenVLA's prediction of a token is
        conditional on the tokens before it that the demonstration had, and Octo's head
        predicts the noise that was added to the demonstration. ``DiffusionBCLoss``
        wants an actor of TorchRL's ``DiffusionActor`` with vector observations, has no
        masks and another noise schedule.

    Examples:
        >>> from torchrl_rpd.finetune import FinetuneLoss, OpenVLATokenLoss
        >>> issubclass(OpenVLATokenLoss, FinetuneLoss)
        True
    """

    @dataclass
    class _AcceptedKeys:
        """Keys of a sample.

        Attributes:
            image: uint8 ``[*B, 3, H, W]``, any size.
            instruction: text, one for each row or one for all.
            action: ``[*B, A]`` float.
            action_chunk: ``[*B, H, A]`` float: this step's action and those after it.
            action_is_pad: bool ``[*B, H]``: which of them lie behind the episode's end.
            noise: what :meth:`OctoDiffusionLoss.draw` writes, as the next one.
            noise_level: int64 ``[*B, S]``.
        """

        image: NestedKey = IMAGE_KEY
        instruction: NestedKey = INSTRUCTION_KEY
        action: NestedKey = ACTION_KEY
        action_chunk: NestedKey = ACTION_CHUNK_KEY
        action_is_pad: NestedKey = ACTION_IS_PAD_KEY
        noise: NestedKey = "diffusion_noise"
        noise_level: NestedKey = "diffusion_step"

    tensor_keys: _AcceptedKeys
    default_keys = _AcceptedKeys

    def draw(self, tensordict: TensorDictBase) -> TensorDictBase:
        """Draws what is random for all rows together; by default nothing is.

        Parts of the batch then give the gradients of the whole.
        """
        return tensordict

    @abc.abstractmethod
    def terms(self, tensordict: TensorDictBase) -> Tensor:
        """Over how many terms the loss of these rows is a mean, a float scalar."""

    def _forward_value_estimator_keys(self, **kwargs: NestedKey) -> None:
        pass

    def _read_actions(
        self, tensordict: TensorDictBase, key: NestedKey, action_dim: int
    ) -> Tensor:
        """Actions ``[*B, ..., A]``, checked."""
        name = type(self).__name__
        actions = tensordict.get(key, None)
        if not isinstance(actions, Tensor):
            found = sorted(tensordict.keys(True, True), key=str)
            raise KeyError(
                f"{name} reads the demonstrated actions from {key!r}, which is missing; "
                f"found {found}. set_keys names another entry."
            )
        if actions.shape[-1] != action_dim:
            raise ValueError(
                f"{name}: {key!r} has {actions.shape[-1]} action dimensions, this model "
                f"and its statistics have {action_dim}. Demonstrations for it are in "
                "the control mode 'pd_ee_delta_pose' (7 dimensions)."
            )
        return actions


def accumulate(
    loss_module: FinetuneLoss,
    batch: TensorDictBase,
    *,
    micro_batch_size: int | None = None,
    autocast: torch.dtype | None = None,
) -> TensorDict:
    """Adds the gradients of a batch, computed a few rows at a time.

    Every part counts by the terms in its mean, so the gradients are those of the whole
    batch (up to rounding), also where rows have different numbers of valid actions.

    Args:
        loss_module (FinetuneLoss): the loss.
        batch (TensorDictBase): ``[B]``, a sample of the replay buffer.

    Keyword Args:
        micro_batch_size (int, optional): rows at a time. Bounds the memory. Defaults to
            ``None``: all.
        autocast (torch.dtype, optional): compute in this dtype where ``torch.autocast``
            deems it safe, ``torch.bfloat16`` for the published models. Defaults to
            ``None``: in the dtype of the weights.

    Returns:
        what the loss returned, detached, averaged over the batch.

    Raises:
        ValueError: for an empty batch or a ``micro_batch_size`` under 1.

    Examples:
        >>> import tempfile
        >>> import torch
        >>> from tensordict import TensorDict
        >>> from torchrl_rpd.finetune import (
        ...     OctoDiffusionLoss,
        ...     accumulate,
        ...     action_statistics,
        ...     load_octo,
        ... )
        >>> from torchrl_rpd.teachers.octo import write_random_checkpoint
        >>> chunk = 2 * torch.rand(4, 4, 7) - 1
        >>> batch = TensorDict(
        ...     {
        ...         "observation": {"image": torch.zeros(4, 3, 256, 256).byte()},
        ...         "language_instruction": "push the cube",
        ...         "vla_action": {"chunk": chunk},
        ...         "action_is_pad": torch.zeros(4, 4, dtype=torch.bool),
        ...     },
        ...     [4],
        ... )
        >>> folder = write_random_checkpoint(tempfile.mkdtemp())
        >>> loss = OctoDiffusionLoss(load_octo(folder, action_statistics(chunk)))
        >>> out = accumulate(loss, batch, micro_batch_size=2)
        >>> sorted(out.keys())
        ['loss_diffusion']
    """
    rows = batch.batch_size.numel()
    if not rows:
        raise ValueError("The batch is empty: there is nothing to learn from.")
    size = rows if micro_batch_size is None else micro_batch_size
    if size < 1:
        raise ValueError(f"micro_batch_size must be at least 1, got {size}.")
    batch = loss_module.draw(batch.reshape(-1))
    parts = batch.split(size)
    terms = torch.stack([loss_module.terms(part) for part in parts])
    shares = terms / terms.sum().clamp_min(1)
    device = next(loss_module.parameters()).device.type
    total: TensorDict | None = None
    for part, share in zip(parts, shares, strict=True):
        with torch.autocast(device, dtype=autocast, enabled=autocast is not None):
            out = loss_module(part)
        weighted = out * share.to(out[loss_module.out_keys[0]].device)
        weighted[loss_module.out_keys[0]].backward()
        weighted = weighted.detach()
        total = weighted if total is None else total + weighted
    assert total is not None
    return total
