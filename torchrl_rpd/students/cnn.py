# Copyright (c) the torchrl_rpd authors.
#
# This source code is licensed under the MIT license found in the
# LICENSE file in the root directory of this source tree.
"""Students that see images."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from tensordict import NestedKey
from tensordict.nn import TensorDictModule
from torch import Tensor, nn
from torchrl.modules import (
    ActorValueOperator,
    ConvNet,
    ValueOperator,
)

from torchrl_rpd.students._heads import normal_actor, orthogonal_mlp
from torchrl_rpd.students.actor_critic import (
    BUILDERS,
    ActorCritic,
    key_from_json,
    key_to_json,
)

__all__ = ["NatureCNN", "cnn_actor_critic"]

_KERNELS, _STRIDES, _CHANNELS = (8, 4, 3), (4, 2, 1), (32, 64, 64)
_FEATURES, _HIDDEN = 256, 512
# Written by the encoder and read by the heads; never stored.
_FEATURES_KEY = "features"


class NatureCNN(nn.Module):
    """The image encoder of the released code (Mnih et al., 2015, in RGB).

    Convolutions 3 -> 32 (8x8, stride 4), 32 -> 64 (4x4, stride 2) and 64 -> 64 (3x3,
    stride 1), then one linear layer, each with a ReLU; PyTorch's own initialisation.
    Pixels are divided by 255 here and not before, so that buffers hold one byte and not
    four for each.

    Args:
        image_size (int or tuple of int): height and width, or one number for both; at
            least 36.

    Keyword Args:
        out_features (int): width of the output. Default: ``256``.
        crop (sequence of 4 ints, optional): top, left, height and width in pixels of the
            part of the image that it looks at. Default: ``None``, all of it.

    Raises:
        ValueError: if the image or the crop is too small for the convolutions, the crop
            lies outside, or an image has another shape than it was built for.
        TypeError: if an image is not uint8.

    Examples:
        >>> import torch
        >>> from torchrl_rpd.students import NatureCNN
        >>> encoder = NatureCNN(64)
        >>> encoder(torch.zeros(2, 5, 3, 64, 64, dtype=torch.uint8)).shape
        torch.Size([2, 5, 256])
    """

    def __init__(
        self,
        image_size: int | tuple[int, int],
        *,
        out_features: int = _FEATURES,
        crop: Sequence[int] | None = None,
    ) -> None:
        super().__init__()
        full = (image_size, image_size) if isinstance(image_size, int) else image_size
        self.image_shape = (3, *full)
        rows, columns = _window(full, crop)
        self._window = (..., rows, columns)
        self.convolutions = ConvNet(
            in_features=3,
            num_cells=list(_CHANNELS),
            kernel_sizes=list(_KERNELS),
            strides=list(_STRIDES),
            activation_class=nn.ReLU,
        )
        height, width = rows.stop - rows.start, columns.stop - columns.start
        flat = _CHANNELS[-1] * _convolved(height) * _convolved(width)
        self.linear = nn.Linear(flat, out_features)

    def forward(self, image: Tensor) -> Tensor:
        """Encodes ``[*B, 3, H, W]`` uint8 images as ``[*B, out_features]``."""
        if image.dtype != torch.uint8:
            raise TypeError(
                f"The images are {image.dtype}, not uint8. The encoder scales them "
                "itself: leave out ToTensorImage and the like."
            )
        if image.shape[-3:] != self.image_shape:
            raise ValueError(
                f"The images are {tuple(image.shape[-3:])}, but the encoder was built "
                f"for {self.image_shape}, channels first."
            )
        scaled = (image[self._window] / 255).to(self.linear.weight.dtype)
        return self.linear(self.convolutions(scaled)).relu()


class _Encoder(nn.Module):
    """Features of an image and, where there is one, of the state."""

    def __init__(
        self,
        image_size: int | tuple[int, int],
        crop: Sequence[int] | None,
        state_dim: int | None,
    ) -> None:
        super().__init__()
        self.image = NatureCNN(image_size, crop=crop)
        # As the released code: without activation, PyTorch's own initialisation.
        self.state = None if state_dim is None else nn.Linear(state_dim, _FEATURES)
        self.out_features = _FEATURES if state_dim is None else 2 * _FEATURES

    def forward(self, image: Tensor, state: Tensor | None = None) -> Tensor:
        features = self.image(image)
        if self.state is None or state is None:
            return features
        return torch.cat([features, self.state(state)], -1)


def cnn_actor_critic(
    image_size: int | tuple[int, int],
    action_dim: int,
    *,
    crop: Sequence[int] | None = None,
    state_dim: int | None = None,
    log_std_init: float | Sequence[float] = -0.5,
    image_key: NestedKey = ("observation", "image"),
    state_key: NestedKey = ("observation", "state"),
) -> ActorCritic:
    """Builds the paper's student for images.

    Actor and critic share a :class:`NatureCNN`; each has a head with one hidden layer
    of 512 (ReLU, orthogonal weights, zero biases; the last gain is 0.01 times the
    square root of 2 for the actor and the square root of 2 for the critic). The action
    distribution is a diagonal normal without bounds, whose standard deviation does not
    depend on the observation. With 256x256 images and 7 actions it has 13,188,527
    parameters. Source: ``ppo_rgb_rpd.py`` of the released code.

    The student's ``critic`` is the head alone: it reads the features that the actor
    writes in the same call of the loss, so that the encoder runs once per call and
    learns from both. GAE has only observations and needs ``value_network``. The
    features themselves are not written to the rollout.

    .. note::
        Images fill the memory: 128 envs with 50 steps at 256x256 are 1.26 GB in bytes,
        and four times that as the float32 input of the encoder. Leave those of
        ``"next"`` out of the minibatches (``drop_keys=[("next", "observation")]`` in
        :func:`~torchrl_rpd.trainers.make_ppo_trainer`), let GAE go through some envs at
        a time (``value_chunk_size``, along the first dimension), and have the collector
        yield the rollout itself instead of a copy (``return_same_td=True``).

    Args:
        image_size (int or tuple of int): height and width, or one number for both; at
            least 36. The paper has 256.
        action_dim (int): ``A`` of the ``[*B, A]`` float32 action.

    Keyword Args:
        crop (sequence of 4 ints, optional): top, left, height and width in pixels of the
            part of the image that the student looks at: where the task takes place, in
            as many pixels as there are. A teacher can have the whole of the same
            picture, which is then drawn once. Default: ``None``, all of it.
        state_dim (int, optional): ``D`` of a ``[*B, D]`` float32 state that the student
            sees beside the image (256 more features, linear). Default: ``None``, no
            state, as in the paper.
        log_std_init (float or sequence of float): initial log standard deviation, in
            action units; one number, or one per action dimension (a gripper that opens
            or closes needs more than an arm to try the other). Default: ``-0.5``, the
            paper's code.
        image_key (NestedKey): ``[*B, 3, H, W]`` uint8. Default:
            ``("observation", "image")``.
        state_key (NestedKey): read only with ``state_dim``. Default:
            ``("observation", "state")``.

    Returns:
        an :class:`ActorCritic`.

    Raises:
        ValueError: if images or crop are too small for the convolutions, or the crop
            lies outside.

    Examples:
        >>> import torch
        >>> from tensordict import TensorDict
        >>> from torchrl_rpd.objectives import DistillPPOLoss, FiniteHorizonGAE
        >>> from torchrl_rpd.students import cnn_actor_critic
        >>> student = cnn_actor_critic(64, 7)
        >>> image = torch.randint(256, (4, 3, 64, 64), dtype=torch.uint8)
        >>> td = TensorDict({"observation": {"image": image}}, batch_size=[4])
        >>> sorted(student.actor(td).exclude("observation").keys())
        ['action', 'action_log_prob', 'loc', 'scale']
        >>> student.value_network(td)["state_value"].shape
        torch.Size([4, 1])
        >>> loss = DistillPPOLoss(student.actor, student.critic)
        >>> gae = FiniteHorizonGAE(
        ...     gamma=0.8,
        ...     lmbda=0.9,
        ...     value_network=student.value_network,
        ...     value_chunk_size=4,
        ... )
    """
    image_key, state_key = key_from_json(image_key), key_from_json(state_key)
    encoder = _Encoder(image_size, crop, state_dim)
    common = TensorDictModule(
        encoder,
        in_keys=[image_key] if state_dim is None else [image_key, state_key],
        out_keys=[_FEATURES_KEY],
    )

    def head(out_features: int, last_gain: float) -> nn.Module:
        return orthogonal_mlp(
            encoder.out_features, out_features, [_HIDDEN], nn.ReLU, last_gain
        )

    policy_head = normal_actor(
        [head(action_dim, 0.01 * 2**0.5)], action_dim, log_std_init, _FEATURES_KEY
    )
    value_head = ValueOperator(head(1, 2**0.5), in_keys=[_FEATURES_KEY])
    both = ActorValueOperator(common, policy_head, value_head)
    actor, value_network = both.get_policy_operator(), both.get_value_operator()
    actor.select_out_keys("loc", "scale", "action", "action_log_prob")
    value_network.select_out_keys("state_value")
    config = {
        "image_size": image_size if isinstance(image_size, int) else list(image_size),
        "action_dim": action_dim,
        "crop": None if crop is None else [*crop],
        "state_dim": state_dim,
        "log_std_init": (
            log_std_init if isinstance(log_std_init, int | float) else [*log_std_init]
        ),
        "image_key": key_to_json(image_key),
        "state_key": key_to_json(state_key),
    }
    return ActorCritic(
        actor,
        both.get_value_head(),
        None,
        config,
        builder="cnn_actor_critic",
        value_network=value_network,
    )


BUILDERS["cnn_actor_critic"] = cnn_actor_critic


def _window(full: tuple[int, int], crop: Sequence[int] | None) -> tuple[slice, slice]:
    """Rows and columns of what the convolutions see."""
    if crop is not None and len(crop) != 4:
        raise ValueError(
            f"crop={[*crop]}: give four numbers, top, left, height and width."
        )
    top, left, height, width = (0, 0, *full) if crop is None else crop
    if min(top, left) < 0 or top + height > full[0] or left + width > full[1]:
        raise ValueError(
            f"crop={[top, left, height, width]} (top, left, height, width) does not lie "
            f"in an image of {full[0]} x {full[1]} pixels."
        )
    if min(_convolved(height), _convolved(width)) < 1:
        raise ValueError(
            f"{height} x {width} pixels are too few for the convolutions of NatureCNN: "
            "image_size, or crop if there is one, has at least 36 pixels on both sides."
        )
    return slice(top, top + height), slice(left, left + width)


def _convolved(pixels: int) -> int:
    """How many positions the convolutions leave of ``pixels`` in a row."""
    for kernel, stride in zip(_KERNELS, _STRIDES, strict=True):
        pixels = (pixels - kernel) // stride + 1
    return pixels
