# Copyright (c) the torchrl_rpd authors.
#
# This source code is licensed under the MIT license found in the
# LICENSE file in the root directory of this source tree.
"""An environment that shows images, in the keys of the package, without a simulator."""

from __future__ import annotations

import torch
from tensordict import TensorDict, TensorDictBase
from torchrl.data import Bounded, Composite, Unbounded
from toy_envs import PointEnv


class SpotEnv(PointEnv):
    """A bright spot on a dark picture is to be moved to the centre.

    ``("observation", "image")`` is uint8 ``[*B, 3, size, size]``; the spot fills a
    square of a quarter of the side. ``("observation", "state")`` is its position,
    ``[*B, 2]`` in [-1, 1]. Episodes take 6 steps, env ``i`` starting in its ``i``-th,
    so that they end one after another.
    """

    gain, horizon, near = 0.3, 6, 0.2

    def __init__(self, num_envs: int, size: int = 36) -> None:
        self.size = size
        image = Bounded(0, 255, (num_envs, 3, size, size), dtype=torch.uint8)
        state = Unbounded((num_envs, 2))
        observation = Composite(image=image, state=state, shape=(num_envs,))
        super().__init__(num_envs, observation=observation)

    def _picture(self) -> TensorDictBase:
        # Pixel centres in [-1, 1]; the spot is where both coordinates are near.
        axis = torch.linspace(-1, 1, self.size)
        near = (axis - self.point.unsqueeze(-1)).abs() < 0.25
        spot = near[:, 1, :, None] & near[:, 0, None, :]
        image = torch.where(spot, 255, 20).to(torch.uint8)
        image = image.unsqueeze(1).expand(-1, 3, -1, -1).clone()
        state = self.point.clone()
        return TensorDict({"image": image, "state": state}, self.batch_size)

    def _reset(self, tensordict: TensorDictBase | None = None) -> TensorDictBase:
        out = super()._reset(tensordict)
        if tensordict is None or "_reset" not in tensordict.keys():
            self.time = -torch.arange(len(self.time)) % self.horizon
        return out

    def _move(self, displacement: torch.Tensor) -> torch.Tensor:
        return (self.point + displacement).clamp(-1, 1)


def spot_teacher(tensordict: TensorDictBase) -> torch.Tensor:
    """Looks at the picture alone and pushes the spot to the centre: ``[n, 2]``."""
    image = tensordict["observation", "image"][:, 0].float() - 20
    axis = torch.linspace(-1, 1, image.shape[-1])
    mass = image.sum((-1, -2)).clamp_min(1)
    x = (image.sum(-2) * axis).sum(-1) / mass
    y = (image.sum(-1) * axis).sum(-1) / mass
    return (-torch.stack([x, y], -1) / 0.3).clamp(-1, 1)
