# Copyright (c) the torchrl_rpd authors.
#
# This source code is licensed under the MIT license found in the
# LICENSE file in the root directory of this source tree.
"""Random crops and colours, as both originals augment images in fine-tuning."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from tensordict import TensorDictBase
from tensordict.utils import NestedKey
from torch import Tensor
from torch.nn import functional as F
from torchrl.data.vla.schema import IMAGE_KEY
from torchrl.envs import Transform

from torchrl_rpd.teachers._resize import PILResize
from torchrl_rpd.teachers.octo._lanczos import lanczos_resize

Range = tuple[float, float]


class ImageAugmentation(Transform):
    """Augments the images of a replay buffer's samples, each row for itself.

    In this order, clipped to [0, 1] after each: a crop of ``crop_scale`` of the area
    and ``crop_ratio`` width to height, stretched to the whole (bilinear, corners on
    corners); brightness, contrast around each channel's mean, saturation and hue. The
    operations and ranges are those of both originals (dlimp's ``augment``), and the
    result is uint8, rounded down, as there. Each number is drawn for itself, from
    torch's global generator; the original draws all of one image with one seed, so that
    its crops lie on the diagonal.

    :meth:`openvla` and :meth:`octo` have the published ranges, and resize before they
    augment, to the model's size. Append one to the replay buffer.

    .. note:: OpenVLA's crop is always 90 % of the area. The original's evaluations of
        so trained models on LIBERO crop the centre; OpenVLATeacher (as the paper's code)
        shows the whole image, where everything is 5 % smaller. Octo's crops range to
        the whole image.

    Args:
        resize (callable, optional): uint8 ``[n, 3, H, W]`` to the model's size. Defaults
            to ``None``: as they are.

    Keyword Args:
        crop_scale ((float, float)): Defaults to ``(1.0, 1.0)``: none.
        crop_ratio ((float, float)): Defaults to ``(1.0, 1.0)``.
        brightness (float): the most that is added. Defaults to ``0.0``.
        contrast ((float, float)): factors. Defaults to ``(1.0, 1.0)``.
        saturation ((float, float)): factors. Defaults to ``(1.0, 1.0)``.
        hue (float): the most that is added, 1 being the whole circle. Defaults to
            ``0.0``.
        in_keys (sequence of NestedKey): uint8 ``[*B, 3, H, W]``. Defaults to
            ``("observation", "image")`` alone.

    Examples:
        >>> import torch
        >>> from tensordict import TensorDict
        >>> from torchrl_rpd.finetune import ImageAugmentation
        >>> images = torch.randint(256, (2, 3, 64, 64), dtype=torch.uint8)
        >>> sample = TensorDict({"observation": {"image": images}}, [2])
        >>> sample = ImageAugmentation.octo()(sample)
        >>> sample["observation", "image"].shape, sample["observation", "image"].dtype
        (torch.Size([2, 3, 256, 256]), torch.uint8)
    """

    def __init__(
        self,
        resize: Any = None,
        *,
        crop_scale: Range = (1.0, 1.0),
        crop_ratio: Range = (1.0, 1.0),
        brightness: float = 0.0,
        contrast: Range = (1.0, 1.0),
        saturation: Range = (1.0, 1.0),
        hue: float = 0.0,
        in_keys: Sequence[NestedKey] = (IMAGE_KEY,),
    ) -> None:
        super().__init__(in_keys=list(in_keys), out_keys=list(in_keys))
        self.resize = resize
        self.crop = (crop_scale, crop_ratio)
        self.colours = ((-brightness, brightness), contrast, saturation, (-hue, hue))

    @classmethod
    def openvla(cls, **kwargs: Any) -> ImageAugmentation:
        """As ``RLDSDataset`` of OpenVLA with ``image_aug=True``, at 224 pixels."""
        return cls(
            PILResize(224, "bicubic"),
            crop_scale=(0.9, 0.9),
            brightness=0.2,
            contrast=(0.8, 1.2),
            saturation=(0.8, 1.2),
            hue=0.05,
            **kwargs,
        )

    @classmethod
    def octo(cls, **kwargs: Any) -> ImageAugmentation:
        """As Octo's ``finetune_config.py`` for the main camera, at 256 pixels."""
        return cls(
            _to_256,
            crop_scale=(0.8, 1.0),
            crop_ratio=(0.9, 1.1),
            brightness=0.1,
            contrast=(0.9, 1.1),
            saturation=(0.9, 1.1),
            hue=0.05,
            **kwargs,
        )

    def forward(self, tensordict: TensorDictBase) -> TensorDictBase:
        """Augments the entries ``in_keys``."""
        for key in self.in_keys:
            images = tensordict.get(key)
            if images.dtype != torch.uint8:
                raise TypeError(
                    f"ImageAugmentation takes uint8 images; {key!r} is {images.dtype}."
                )
            flat = images.flatten(0, -4) if images.ndim > 3 else images.unsqueeze(0)
            out = self._augment(flat if self.resize is None else self.resize(flat))
            tensordict.set(key, out.reshape(*images.shape[:-3], *out.shape[-3:]))
        return tensordict

    def _augment(self, images: Tensor) -> Tensor:
        rows = images.shape[0]
        # On the CPU, so that the draws do not depend on where images are.
        draws = torch.rand(8, rows, 1, 1, 1).to(images.device)
        x = self._crop(images.float() / 255, draws[:4])
        shift, contrast, saturation, hue = (
            low + (high - low) * draw
            for (low, high), draw in zip(self.colours, draws[4:], strict=True)
        )
        x = (x + shift).clamp(0, 1)
        mean = x.mean((-2, -1), keepdim=True)
        x = ((x - mean) * contrast + mean).clamp(0, 1)
        h, s, v = _to_hsv(x)
        x = _to_rgb((h + hue[:, 0]) % 1.0, (s * saturation[:, 0]).clamp(0, 1), v)
        return (x.clamp(0, 1) * 255).to(torch.uint8)

    def _crop(self, images: Tensor, draws: Tensor) -> Tensor:
        if self.crop == ((1.0, 1.0), (1.0, 1.0)):
            return images
        area, ratio, down, right = draws.flatten(1)
        (least, most), (narrow, wide) = self.crop
        area = least + (most - least) * area
        ratio = narrow * (wide / narrow) ** ratio  # uniform in its logarithm
        height = (area / ratio).sqrt().clamp(max=1)
        width = (area * ratio).sqrt().clamp(max=1)
        # In affine_grid's units: the image is [-1, 1].
        theta = torch.zeros(images.shape[0], 2, 3, device=images.device)
        theta[:, 0, 0], theta[:, 1, 1] = width, height
        theta[:, 0, 2] = (1 - width) * (2 * right - 1)
        theta[:, 1, 2] = (1 - height) * (2 * down - 1)
        grid = F.affine_grid(theta, list(images.shape), align_corners=True)
        return F.grid_sample(images, grid, padding_mode="border", align_corners=True)


def _to_256(images: Tensor) -> Tensor:
    return lanczos_resize(images, 256)


def _to_hsv(rgb: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """Hue, saturation and value ``[n, H, W]`` in [0, 1] of ``[n, 3, H, W]``."""
    value, most = rgb.max(1)
    spread = value - rgb.amin(1)
    red, green, blue = rgb.unbind(1)
    safe = torch.where(spread > 0, spread, 1.0)
    sectors = torch.stack(
        [(green - blue) / safe, (blue - red) / safe + 2, (red - green) / safe + 4], 1
    )
    hue = sectors.gather(1, most.unsqueeze(1)).squeeze(1) / 6 % 1.0
    saturation = spread / torch.where(value > 0, value, 1.0)
    return hue, saturation, value


def _to_rgb(hue: Tensor, saturation: Tensor, value: Tensor) -> Tensor:
    channels = []
    for offset in (5.0, 3.0, 1.0):
        k = (offset + 6 * hue) % 6
        channels.append(
            value - value * saturation * torch.minimum(k, 4 - k).clamp(0, 1)
        )
    return torch.stack(channels, 1)
