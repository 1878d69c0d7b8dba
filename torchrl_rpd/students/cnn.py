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
# Squares of more bytes do not add up within an int16.
_LARGEST = 11
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
            least 36 after ``downsample``.

    Keyword Args:
        out_features (int): width of the output. Default: ``256``.
        downsample (int): side of the squares of pixels of which only the mean is seen, so
            that pictures of 128 pixels are seen as 64 for ``2``. Default: ``1``, every
            pixel.

    Raises:
        ValueError: if the image is too small for the convolutions, cannot be divided
            into squares, or has another shape than it was built for.
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
        downsample: int = 1,
    ) -> None:
        super().__init__()
        height, width = _seen(image_size, downsample)
        self.image_shape = (3, height * downsample, width * downsample)
        self.downsample = downsample
        self.convolutions = ConvNet(
            in_features=3,
            num_cells=list(_CHANNELS),
            kernel_sizes=list(_KERNELS),
            strides=list(_STRIDES),
            activation_class=nn.ReLU,
        )
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
        if self.downsample > 1:
            image = _summed(image, self.downsample)
        scaled = (image / (255 * self.downsample**2)).to(self.linear.weight.dtype)
        return self.linear(self.convolutions(scaled)).relu()


class _Encoder(nn.Module):
    """Features of an image and, where there is one, of the state."""

    def __init__(
        self,
        image_size: int | tuple[int, int],
        downsample: int,
        state_dim: int | None,
    ) -> None:
        super().__init__()
        self.image = NatureCNN(image_size, downsample=downsample)
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
    downsample: int = 1,
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
            least 36 after ``downsample``. The paper has 256.
        action_dim (int): ``A`` of the ``[*B, A]`` float32 action.

    Keyword Args:
        downsample (int): side of the squares of pixels of which only the mean is seen.
            With ``2`` pictures of 128 pixels are seen as 64: where the teacher needs
            those of 128, the simulator draws one picture for both, and the
            convolutions cost what they cost with 64. Default: ``1``, every pixel.
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
        ValueError: if the images are too small for the convolutions, or cannot be
            divided into squares.

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
    encoder = _Encoder(image_size, downsample, state_dim)
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
        "downsample": downsample,
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


def _seen(image_size: int | tuple[int, int], downsample: int) -> tuple[int, int]:
    """Height and width of what the convolutions see."""
    height, width = (
        (image_size, image_size) if isinstance(image_size, int) else image_size
    )
    if not 1 <= downsample <= _LARGEST or height % downsample or width % downsample:
        raise ValueError(
            f"Pictures of {height} x {width} pixels cannot be divided into squares of "
            f"downsample={downsample}: use a divisor of both, at most {_LARGEST}."
        )
    height, width = height // downsample, width // downsample
    if min(_convolved(height), _convolved(width)) < 1:
        squares = f" with downsample={downsample}" if downsample > 1 else ""
        raise ValueError(
            f"image_size={image_size}{squares} is too small for the convolutions of "
            "NatureCNN: they need at least 36 pixels on both sides."
        )
    return height, width


def _summed(image: Tensor, side: int) -> Tensor:
    """Sums of the squares of pixels, as int16: several times faster than avg_pool2d."""
    rows = image[..., ::side, :].to(torch.int16)
    for i in range(1, side):
        rows += image[..., i::side, :]
    sums = rows[..., ::side].clone()
    for i in range(1, side):
        sums += rows[..., i::side]
    return sums


def _convolved(pixels: int) -> int:
    """How many positions the convolutions leave of ``pixels`` in a row."""
    for kernel, stride in zip(_KERNELS, _STRIDES, strict=True):
        pixels = (pixels - kernel) // stride + 1
    return pixels
