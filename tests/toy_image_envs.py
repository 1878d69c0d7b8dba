# Copyright (c) the torchrl_rpd authors.
#
# This source code is licensed under the MIT license found in the
# LICENSE file in the root directory of this source tree.
"""An environment that shows images, in the keys of the package, without a simulator."""

from __future__ import annotations

import torch
from tensordict import TensorDict, TensorDictBase
from torchrl.data import Binary, Bounded, Composite, Unbounded
from torchrl.envs import EnvBase


class SpotEnv(EnvBase):
    """A bright spot on a dark picture is to be moved to the centre.

    ``("observation", "image")`` is uint8 ``[*B, 3, size, size]``; the spot fills a
    square of a quarter of the side. ``("observation", "state")`` is its position,
    ``[*B, 2]`` in [-1, 1]. The action moves it by 0.3 per unit; the reward is minus the
    distance. Episodes take 6 steps, env ``i`` starting in its ``i``-th, so that they end
    one after another.
    """

    def __init__(self, num_envs: int, size: int = 36) -> None:
        super().__init__(batch_size=torch.Size([num_envs]))
        shape = self.batch_size
        self.size = size
        flag = Binary(1, shape=(*shape, 1), dtype=torch.bool)
        self.observation_spec = Composite(
            observation=Composite(
                image=Bounded(0, 255, (*shape, 3, size, size), dtype=torch.uint8),
                state=Unbounded((*shape, 2)),
                shape=shape,
            ),
            success=flag.clone(),
            shape=shape,
        )
        self.action_spec = Bounded(-1.0, 1.0, (*shape, 2))
        self.reward_spec = Unbounded((*shape, 1))
        self.full_done_spec = Composite(
            done=flag.clone(),
            terminated=flag.clone(),
            truncated=flag.clone(),
            shape=shape,
        )
        self.generator = torch.Generator().manual_seed(0)
        self.spot = torch.zeros(*shape, 2)
        self.time = -torch.arange(num_envs) % 6

    def _observe(self) -> dict:
        # Pixel centres in [-1, 1]; the spot is where both coordinates are near.
        axis = torch.linspace(-1, 1, self.size)
        near = (axis - self.spot.unsqueeze(-1)).abs() < 0.25
        spot = near[:, 1, :, None] & near[:, 0, None, :]
        image = torch.where(spot, 255, 20).to(torch.uint8)
        return {
            "observation": TensorDict(
                {
                    "image": image.unsqueeze(1).expand(-1, 3, -1, -1).clone(),
                    "state": self.spot.clone(),
                },
                self.batch_size,
            ),
            "success": self.spot.norm(dim=-1, keepdim=True) < 0.2,
        }

    def _reset(self, tensordict: TensorDictBase | None = None) -> TensorDictBase:
        mask = None if tensordict is None else tensordict.get("_reset", None)
        if mask is None:
            mask = torch.ones(*self.batch_size, 1, dtype=torch.bool)
        else:
            self.time = torch.where(mask.squeeze(-1), 0, self.time)
        fresh = 2 * torch.rand(*self.batch_size, 2, generator=self.generator) - 1
        self.spot = torch.where(mask, fresh, self.spot)
        return TensorDict(self._observe(), self.batch_size)

    def _step(self, tensordict: TensorDictBase) -> TensorDictBase:
        self.spot = (self.spot + 0.3 * tensordict["action"].clamp(-1, 1)).clamp(-1, 1)
        self.time = self.time + 1
        end = (self.time >= 6).unsqueeze(-1)
        return TensorDict(
            {
                **self._observe(),
                "reward": -self.spot.norm(dim=-1, keepdim=True),
                "done": end,
                "truncated": end.clone(),
                "terminated": torch.zeros_like(end),
            },
            self.batch_size,
        )

    def _set_seed(self, seed: int | None) -> None:
        if seed is not None:
            self.generator.manual_seed(seed)


def spot_teacher(tensordict: TensorDictBase) -> torch.Tensor:
    """Looks at the picture alone and pushes the spot to the centre: ``[n, 2]``."""
    image = tensordict["observation", "image"][:, 0].float() - 20
    axis = torch.linspace(-1, 1, image.shape[-1])
    mass = image.sum((-1, -2)).clamp_min(1)
    x = (image.sum(-2) * axis).sum(-1) / mass
    y = (image.sum(-1) * axis).sum(-1) / mass
    return (-torch.stack([x, y], -1) / 0.3).clamp(-1, 1)
