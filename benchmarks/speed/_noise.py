# Copyright (c) the torchrl_rpd authors.
#
# This source code is licensed under the MIT license found in the
# LICENSE file in the root directory of this source tree.
"""An environment that costs nothing: random observations of a given shape."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from tensordict import TensorDict, TensorDictBase
from torchrl.data import Bounded, Composite, Unbounded
from torchrl.envs import EnvBase


class NoiseEnv(EnvBase):
    """Episodes of 50 steps; nothing in them depends on the actions.

    Args:
        num_envs (int): rows.
        shape (sequence of int): of an observation: a vector of float32, or a picture of
            uint8 ``[3, H, W]`` under ``("observation", "image")``.
    """

    def __init__(self, num_envs: int, shape: Sequence[int]) -> None:
        super().__init__(batch_size=[num_envs])
        self.shown = tuple(shape)
        self.picture = len(self.shown) == 3
        full = (num_envs, *self.shown)
        spec = (
            Bounded(0, 255, full, dtype=torch.uint8)
            if self.picture
            else Unbounded(full)
        )
        if self.picture:
            spec = Composite(image=spec, shape=[num_envs])
        self.observation_spec = Composite(observation=spec, shape=[num_envs])
        self.action_spec = Bounded(-1, 1, (num_envs, 7))
        self.reward_spec = Unbounded((num_envs, 1))
        self.step_number = 0

    def _show(self) -> dict[str, object]:
        full = (*self.batch_size, *self.shown)
        if not self.picture:
            return {"observation": torch.randn(full)}
        image = torch.randint(256, full, dtype=torch.uint8)
        return {"observation": {"image": image}}

    def _reset(self, tensordict: TensorDictBase | None = None) -> TensorDictBase:
        self.step_number = 0
        return TensorDict(self._show(), self.batch_size)

    def _step(self, tensordict: TensorDictBase) -> TensorDictBase:
        self.step_number += 1
        done = torch.full((*self.batch_size, 1), self.step_number % 50 == 0)
        out = {
            **self._show(),
            "reward": torch.rand(*self.batch_size, 1),
            "done": done,
            "truncated": done,
            "terminated": torch.zeros_like(done),
        }
        return TensorDict(out, self.batch_size)

    def _set_seed(self, seed: int | None) -> None:
        if seed is not None:
            torch.manual_seed(seed)
