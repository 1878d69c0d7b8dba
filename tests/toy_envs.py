# Copyright (c) the torchrl_rpd authors.
#
# This source code is licensed under the MIT license found in the
# LICENSE file in the root directory of this source tree.
"""Environments with known answers for tests above the simulator."""

from __future__ import annotations

import torch
from tensordict import TensorDict, TensorDictBase
from torchrl.data import Bounded, Categorical, Composite, TensorSpec, Unbounded
from torchrl.envs import EnvBase


class ToyEnv(EnvBase):
    """The specs that all toys share: two actions in [-1, 1], flags, ``[num_envs]``."""

    def __init__(self, num_envs: int, **observation: TensorSpec) -> None:
        super().__init__(batch_size=torch.Size([num_envs]))
        shape = self.batch_size
        flag = Categorical(2, shape=(*shape, 1), dtype=torch.bool)
        self.observation_spec = Composite(
            **observation, success=flag.clone(), shape=shape
        )
        self.action_spec = Bounded(-1.0, 1.0, (*shape, 2))
        self.reward_spec = Unbounded((*shape, 1))
        self.full_done_spec = Composite(
            done=flag.clone(),
            terminated=flag.clone(),
            truncated=flag.clone(),
            shape=shape,
        )
        self.time = torch.zeros(shape, dtype=torch.int64)

    def _mask(self, tensordict: TensorDictBase | None) -> torch.Tensor:
        """Which envs are to be reset, ``[num_envs, 1]``."""
        mask = None if tensordict is None else tensordict.get("_reset", None)
        return torch.ones(*self.batch_size, 1).bool() if mask is None else mask


class PointEnv(ToyEnv):
    """A point is to reach the origin of the plane: reward minus the distance.

    The action is the displacement, times ``gain``.
    """

    gain: float
    horizon: int  # steps of an episode
    near: float  # success is a distance under this

    def __init__(self, num_envs: int, **observation: TensorSpec) -> None:
        super().__init__(num_envs, **observation)
        self.generator = torch.Generator().manual_seed(0)
        self.point = torch.zeros(*self.batch_size, 2)

    def _picture(self) -> torch.Tensor | TensorDictBase:
        return self.point.clone()

    def _observe(self) -> dict[str, torch.Tensor | TensorDictBase]:
        success = self.point.norm(dim=-1, keepdim=True) < self.near
        return {"observation": self._picture(), "success": success}

    def _reset(self, tensordict: TensorDictBase | None = None) -> TensorDictBase:
        mask = self._mask(tensordict)
        fresh = 2 * torch.rand(*self.batch_size, 2, generator=self.generator) - 1
        self.point = torch.where(mask, fresh, self.point)
        self.time = torch.where(mask.squeeze(-1), 0, self.time)
        return TensorDict(self._observe(), self.batch_size)

    def _move(self, displacement: torch.Tensor) -> torch.Tensor:
        return self.point + displacement

    def _step(self, tensordict: TensorDictBase) -> TensorDictBase:
        self.point = self._move(self.gain * tensordict["action"].clamp(-1, 1))
        self.time = self.time + 1
        end = (self.time >= self.horizon).unsqueeze(-1)
        return TensorDict(
            {
                **self._observe(),
                "reward": -self.point.norm(dim=-1, keepdim=True),
                "done": end,
                "truncated": end.clone(),
                "terminated": torch.zeros_like(end),
            },
            self.batch_size,
        )

    def _set_seed(self, seed: int | None) -> None:
        if seed is not None:
            self.generator.manual_seed(seed)


class CoinEnv(ToyEnv):
    """Half of the episodes succeed, after 2 steps; the others fail after 10.

    Env ``i`` alternates: episode ``k`` succeeds where ``i + k`` is even. The reward is 1
    per step.
    """

    def __init__(self, num_envs: int, success_at_end: bool = True) -> None:
        super().__init__(
            num_envs,
            observation=Unbounded((num_envs, 1)),
            episode_seed=Unbounded((num_envs, 1), dtype=torch.int64),
        )
        self.success_at_end = success_at_end
        self.episode = torch.full((num_envs,), -1)

    def _observe(self) -> dict[str, torch.Tensor]:
        return {
            "observation": self.time.unsqueeze(-1).float(),
            "episode_seed": self.episode.unsqueeze(-1).clone(),
        }

    def _reset(self, tensordict: TensorDictBase | None = None) -> TensorDictBase:
        mask = self._mask(tensordict).squeeze(-1)
        self.episode = self.episode + mask.long()
        self.time = torch.where(mask, 0, self.time)
        out = {**self._observe(), "success": torch.zeros_like(mask).unsqueeze(-1)}
        return TensorDict(out, self.batch_size)

    def _step(self, tensordict: TensorDictBase) -> TensorDictBase:
        self.time = self.time + 1
        lucky = (torch.arange(len(self.time)) + self.episode) % 2 == 0
        success = lucky & (self.time >= 2)
        done = torch.where(lucky, self.time >= 2, self.time >= 10)
        if not self.success_at_end:
            # Lucky episodes succeed at step 2 and have lost it again at step 4.
            success = lucky & (self.time == 2)
            done = torch.where(lucky, self.time >= 4, self.time >= 10)
        flag = {"terminated": done & lucky, "truncated": done & ~lucky, "done": done}
        return TensorDict(
            {
                **self._observe(),
                "success": success.unsqueeze(-1),
                "reward": torch.ones(*self.batch_size, 1),
                **{key: value.unsqueeze(-1) for key, value in flag.items()},
            },
            self.batch_size,
        )

    def _set_seed(self, seed: int | None) -> None:
        self.episode = torch.full(self.batch_size, -1 if seed is None else seed - 1)


class ReachEnv(PointEnv):
    """The point itself is observed; episodes of 8 steps."""

    gain, horizon, near = 0.2, 8, 0.1

    def __init__(self, num_envs: int = 8) -> None:
        super().__init__(num_envs, observation=Unbounded((num_envs, 2)))
