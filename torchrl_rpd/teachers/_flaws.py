# Copyright (c) the torchrl_rpd authors.
#
# This source code is licensed under the MIT license found in the
# LICENSE file in the root directory of this source tree.
"""Chosen, seeded imperfections of a scripted teacher: wrong views and wrong actions."""

from __future__ import annotations

import math
import operator
from collections.abc import Sequence

import torch
from torch import Tensor

from torchrl_rpd.teachers import _hash_noise
from torchrl_rpd.teachers._layout import Scene

__all__ = ["Flaws"]

Axes = tuple[float, float, float]
Region = tuple[tuple[float, float], tuple[float, float]]

# one stream of numbers per use, so that flaws combine without sharing their draws
_CUBE, _GOAL, _JITTER, _CHATTER, _RANDOM = range(5)


def _axes(name: str, value: float | Sequence[float], *, spread: bool = False) -> Axes:
    if isinstance(value, Sequence):
        axes = tuple(float(v) for v in value)
    elif spread:
        # a cube on a table: its height is known
        axes = (float(value), float(value), 0.0)
    else:
        axes = ()
    if len(axes) != 3 or not all(math.isfinite(v) for v in axes):
        raise ValueError(
            f"{name} must hold three finite numbers (x, y, z) in metres, got {value!r}"
        )
    if spread and min(axes) < 0:
        raise ValueError(f"{name} is a standard deviation (>= 0), got {value!r}")
    return axes


def _probability(name: str, value: float, upper_open: bool = False) -> float:
    if not 0.0 <= value <= 1.0 or (upper_open and value == 1.0):
        interval = "[0, 1)" if upper_open else "[0, 1]"
        raise ValueError(f"{name} must lie in {interval}, got {value!r}")
    return float(value)


def _region(value: Sequence[Sequence[float]]) -> Region:
    try:
        (x_low, x_high), (y_low, y_high) = value
    except (TypeError, ValueError):
        raise ValueError(
            "blind_region must be ((x_low, x_high), (y_low, y_high)) in metres, "
            f"-inf and inf allowed, got {value!r}"
        ) from None
    # written so that NaN fails as well
    if not (x_low < x_high and y_low < y_high):
        raise ValueError(f"blind_region needs low < high on both axes, got {value!r}")
    return (float(x_low), float(x_high)), (float(y_low), float(y_high))


class Flaws:
    """Imperfections, each described in ScriptedTeacher's arguments."""

    def __init__(
        self,
        *,
        seed: int,
        jitter: float,
        gripper_chatter: float,
        random_action: float,
        laziness: float,
        cube_offset: float | Sequence[float],
        goal_offset: float | Sequence[float],
        cube_offset_std: float | Sequence[float],
        goal_offset_std: float | Sequence[float],
        blind_region: Sequence[Sequence[float]] | None,
    ) -> None:
        if not (jitter >= 0 and math.isfinite(jitter)):
            raise ValueError(f"jitter must be finite and >= 0, got {jitter!r}")
        self.seed = operator.index(seed)
        self.jitter = float(jitter)
        self.gripper_chatter = _probability("gripper_chatter", gripper_chatter)
        self.random_action = _probability("random_action", random_action)
        self.laziness = _probability("laziness", laziness, upper_open=True)
        self.cube_offset = _axes("cube_offset", cube_offset)
        self.goal_offset = _axes("goal_offset", goal_offset)
        self.cube_offset_std = _axes("cube_offset_std", cube_offset_std, spread=True)
        self.goal_offset_std = _axes("goal_offset_std", goal_offset_std, spread=True)
        self.blind_region = None if blind_region is None else _region(blind_region)

    @property
    def per_episode(self) -> bool:
        """Whether an offset is redrawn per episode, so that its seed must be known."""
        return any(self.cube_offset_std) or any(self.goal_offset_std)

    def see(self, scene: Scene, episode_seed: Tensor | None) -> Scene:
        """The scene with cube and goal where this teacher believes them to be."""
        cube = self._displaced(
            scene.cube, self.cube_offset, self.cube_offset_std, episode_seed, _CUBE
        )
        goal = self._displaced(
            scene.goal, self.goal_offset, self.goal_offset_std, episode_seed, _GOAL
        )
        return scene._replace(cube=cube, goal=goal)

    def act(self, action: Tensor, scene: Scene, observation: Tensor) -> Tensor:
        """The ``[*B, 7]`` action that is sent, from the intended one.

        ``scene`` is the true scene; ``observation`` is what the noise is hashed from.
        """
        arm, gripper = action[..., :6], action[..., 6:]
        if self.blind_region is not None:
            (x_low, x_high), (y_low, y_high) = self.blind_region
            x, y = scene.cube[..., 0:1], scene.cube[..., 1:2]
            blind = (x >= x_low) & (x < x_high) & (y >= y_low) & (y < y_high)
            arm = torch.where(blind, 0.0, arm)
            gripper = torch.where(blind, 1.0, gripper)
        if self.laziness:
            arm = arm * (1.0 - self.laziness)
        if not (self.jitter or self.gripper_chatter or self.random_action):
            return torch.cat([arm, gripper], -1)
        words = _hash_noise.float_words(observation)
        if self.jitter:
            keys = self._keys(words, _JITTER)
            arm = (arm + self.jitter * _hash_noise.normal(keys, 6)).clamp(-1.0, 1.0)
        if self.gripper_chatter:
            slip = _hash_noise.uniform(self._keys(words, _CHATTER), 1)
            slip = (slip < self.gripper_chatter) & (gripper < 0.0)
            gripper = torch.where(slip, 1.0, gripper)
        action = torch.cat([arm, gripper], -1)
        if self.random_action:
            draws = _hash_noise.uniform(self._keys(words, _RANDOM), 8)
            chosen = draws[..., :1] < self.random_action
            action = torch.where(chosen, 2.0 * draws[..., 1:] - 1.0, action)
        return action

    def active(self) -> dict[str, object]:
        """The flaws that are switched on, by name."""
        return {k: v for k, v in vars(self).items() if k != "seed" and _is_on(v)}

    def _keys(self, words: Tensor, stream: int) -> Tensor:
        return _hash_noise.hash_rows(words, seed=self.seed, stream=stream)

    def _displaced(
        self,
        position: Tensor,
        offset: Axes,
        std: Axes,
        episode_seed: Tensor | None,
        stream: int,
    ) -> Tensor:
        if any(offset):
            position = position + position.new_tensor(offset)
        if any(std):
            assert episode_seed is not None
            draws = _hash_noise.normal(self._keys(episode_seed, stream), 3)
            position = position + draws * draws.new_tensor(std)
        return position


def _is_on(value: object) -> bool:
    return any(value) if isinstance(value, tuple) else bool(value)
