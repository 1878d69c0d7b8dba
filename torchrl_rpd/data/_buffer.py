# Copyright (c) the torchrl_rpd authors.
#
# This source code is licensed under the MIT license found in the
# LICENSE file in the root directory of this source tree.
"""Demonstrations in a replay buffer of TorchRL's, with the VLA schema."""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from tensordict import TensorDict, TensorDictBase
from torchrl._utils import logger
from torchrl.data import (
    ImmutableDatasetWriter,
    LazyMemmapStorage,
    LazyTensorStorage,
    TensorDictReplayBuffer,
)
from torchrl.data.vla import (
    ACTION_CHUNK_KEY,
    ACTION_IS_PAD_KEY,
    ACTION_KEY,
    STATE_KEY,
    RobotDatasetMetadata,
)
from torchrl.envs.transforms import ActionChunkTransform

from torchrl_rpd.data._hdf5 import BrokenEpisode
from torchrl_rpd.data._spread import spread
from torchrl_rpd.data.instructions import InstructionTransform

_SKIPPED_TOLD = 3


@dataclass(frozen=True)
class DemoInfo:
    """Where an episode of demonstrations comes from.

    Args:
        source (str): file and group, or file and number.
        instruction (str): what was to be done.
        length (int): number of actions.
        seed (int, optional): the simulator's episode seed, where the source tells it.
        success (bool, optional): whether it succeeded, where the source tells it.
        task_id (str, optional): the simulator's task, where the source tells it.

    Examples:
        >>> from torchrl_rpd.data import DemoInfo
        >>> DemoInfo("push.h5:traj_0", "push the cube", length=11, seed=3).seed
        3
    """

    source: str
    instruction: str
    length: int
    seed: int | None = None
    success: bool | None = None
    task_id: str | None = None


@dataclass(frozen=True)
class SkippedDemo:
    """An episode that was left out.

    Args:
        source (str): file and group, or file and number.
        reason (str): a few words, the same for all episodes with the same defect.
        detail (str): what was found.

    Examples:
        >>> from torchrl_rpd.data import SkippedDemo
        >>> SkippedDemo("push.h5:traj_4", "NaN in actions", "7 values").reason
        'NaN in actions'
    """

    source: str
    reason: str
    detail: str


Item = tuple[DemoInfo, TensorDictBase] | SkippedDemo


class Demos(TensorDictReplayBuffer):
    """Whole episodes in one storage, read only; see its subclasses.

    Args:
        items: the episodes, ``[T]`` tensordicts without episode and frame numbers.

    Keyword Args:
        capacity (int): no fewer than the rows of all of them.
        metadata (dict): what :class:`~torchrl.data.vla.RobotDatasetMetadata` is told
            beside the statistics.
        chunk_size (int, optional): writes action chunks of so many actions.
        scratch_dir (path, optional): keeps the rows in memory-mapped files there.
        transform (Transform, optional): applied to each sampled batch.
        **kwargs: passed to :class:`~torchrl.data.TensorDictReplayBuffer`.
    """

    def __init__(
        self,
        items: Iterator[Item],
        *,
        capacity: int,
        metadata: dict[str, Any],
        chunk_size: int | None = None,
        scratch_dir: str | Path | None = None,
        transform: Callable[[TensorDictBase], TensorDictBase] | None = None,
        **kwargs: Any,
    ) -> None:
        if chunk_size is not None and chunk_size < 1:
            raise ValueError(f"chunk_size must be at least 1, got {chunk_size}.")
        storage = (
            LazyTensorStorage(max(1, capacity))
            if scratch_dir is None
            else LazyMemmapStorage(
                max(1, capacity), scratch_dir=str(scratch_dir), existsok=True
            )
        )
        #: What each episode is, in the order of their numbers.
        self.episodes: list[DemoInfo] = []
        #: The episodes that were left out.
        self.skipped: list[SkippedDemo] = []
        #: The different instructions; ``instruction_index`` points into this list.
        self.instructions: list[str] = []
        self._starts = [0]
        chunk = None if chunk_size is None else ActionChunkTransform(chunk_size)
        shapes: dict[Any, torch.Size] | None = None
        for item in items:
            if isinstance(item, SkippedDemo):
                self.skipped.append(item)
                continue
            info, rows = item
            found = {k: v.shape[1:] for k, v in rows.items(True, True)}
            shapes = found if shapes is None else shapes
            _check_alike(shapes, found, info.source, self.episodes)
            self._number(info, rows)
            if chunk is not None:
                rows = _with_chunks(chunk, rows)
            start, stop = self._starts[-1], self._starts[-1] + info.length
            storage.set(range(start, stop), rows)
            self.episodes.append(info)
            self._starts.append(stop)
        self._tell_skipped()
        super().__init__(
            storage=storage,
            writer=ImmutableDatasetWriter(),
            transform=InstructionTransform(self.instructions),
            **kwargs,
        )
        if transform is not None:
            self.append_transform(transform)
        self._actions = spread(self._rows(0, self._starts[-1]).get(ACTION_KEY))
        #: TorchRL's record of the data set: action statistics, cameras, control rate.
        self.metadata: RobotDatasetMetadata = _metadata(self._actions, metadata)

    @property
    def skipped_by_reason(self) -> dict[str, int]:
        """How many episodes were left out, by reason."""
        return dict(Counter(item.reason for item in self.skipped).most_common())

    def episode(self, index: int) -> TensorDictBase:
        """One whole episode, ``[T]``, its rows in order, with its instruction.

        Args:
            index (int): its number, in [0, ``len(episodes)``).
        """
        if not 0 <= index < len(self.episodes):
            raise IndexError(
                f"There are {len(self.episodes)} episodes, asked: {index}."
            )
        rows = self._rows(self._starts[index], self._starts[index + 1]).clone()
        return InstructionTransform(self.instructions)(rows)

    def statistics(self) -> dict[str, Any]:
        """What OpenVLA and Octo keep as ``dataset_statistics.json``, for one data set.

        Returns:
            ``action`` and, where there is a state, ``proprio``, each with mean, std
            (of the population), min, max, q01 and q99 of every dimension; the mask of
            the actions is False for the last dimension, the gripper, which those
            models leave as it is; ``num_transitions`` and ``num_trajectories``.
        """
        rows = self._rows(0, self._starts[-1])
        numbers: dict[str, Any] = {"action": dict(self._actions)}
        dims = len(self._actions["mean"])
        numbers["action"]["mask"] = [True] * (dims - 1) + [dims != 7]
        state = rows.get(STATE_KEY, None)
        if state is not None:
            numbers["proprio"] = spread(state)
        numbers["num_transitions"] = self._starts[-1]
        numbers["num_trajectories"] = len(self.episodes)
        return numbers

    def _rows(self, start: int, stop: int) -> TensorDictBase:
        return self._storage[start:stop]

    def _number(self, info: DemoInfo, rows: TensorDictBase) -> None:
        """Says which row of which episode each is, and what its instruction is."""
        if info.instruction not in self.instructions:
            self.instructions.append(info.instruction)
        index = self.instructions.index(info.instruction)
        rows.set("instruction_index", torch.full((info.length, 1), index))
        rows.set("episode", torch.full((info.length,), len(self.episodes)))
        rows.set("frame", torch.arange(info.length))

    def _tell_skipped(self) -> None:
        if not self.skipped:
            if not self.episodes:
                raise ValueError("There is no episode to read.")
            return
        first = "; ".join(
            f"{s.source}: {s.reason} ({s.detail})" for s in self.skipped[:_SKIPPED_TOLD]
        )
        text = (
            f"{len(self.skipped)} of {len(self.skipped) + len(self.episodes)} episodes "
            f"were left out, by reason: {self.skipped_by_reason}. The first: {first}"
        )
        if not self.episodes:
            raise ValueError(f"No episode can be used. {text}")
        logger.warning(text)


def skipped(source: str, error: BrokenEpisode) -> SkippedDemo:
    """The record of a broken episode."""
    detail = str(error).removeprefix(error.reason).removeprefix(": ")
    return SkippedDemo(source, error.reason, detail)


def episode_rows(
    *,
    observation: dict[str, torch.Tensor],
    action: torch.Tensor,
    terminated: bool,
    reward: torch.Tensor | None,
    success: torch.Tensor | None,
) -> TensorDictBase:
    """The rows of one episode in the VLA schema.

    The next observations are not kept: they are the following rows, and would double
    the pictures.
    """
    length = action.shape[0]
    done = torch.zeros(length, 1, dtype=torch.bool)
    done[-1] = True
    following = {
        "done": done,
        "terminated": done & terminated,
        "truncated": done & (not terminated),
    }
    if reward is not None:
        following["reward"] = reward.reshape(length, 1).float()
    if success is not None:
        following["success"] = success.reshape(length, 1).bool()
    return TensorDict(
        {
            "observation": TensorDict(observation, [length]),
            ACTION_KEY: action,
            "next": TensorDict(following, [length]),
        },
        [length],
    )


def _with_chunks(chunk: ActionChunkTransform, rows: TensorDictBase) -> TensorDictBase:
    # A window is the whole episode, so that no chunk reaches into another one.
    window = chunk(TensorDict({ACTION_KEY: rows[ACTION_KEY].unsqueeze(0)}, [1]))
    rows.set(ACTION_CHUNK_KEY, window[ACTION_CHUNK_KEY].squeeze(0))
    return rows.set(ACTION_IS_PAD_KEY, window[ACTION_IS_PAD_KEY].squeeze(0))


def _check_alike(
    first: dict[Any, torch.Size],
    found: dict[Any, torch.Size],
    source: str,
    episodes: list[DemoInfo],
) -> None:
    """Rows of one storage have the same entries of the same shapes."""
    if first == found:
        return
    for key in dict.fromkeys([*first, *found]):
        if first.get(key) != found.get(key):
            there, here = (
                "missing" if s is None else list(s)
                for s in (first.get(key), found.get(key))
            )
            raise ValueError(
                f"{key} is {there} in {episodes[0].source} and {here} in {source}: the "
                "rows of one replay buffer are alike. Read the files separately, or "
                "choose what they share with cameras=... and state=... (state=None "
                "leaves it out)."
            )


def _metadata(
    numbers: dict[str, list[float]], known: dict[str, Any]
) -> RobotDatasetMetadata:
    return RobotDatasetMetadata(
        action_dim=len(numbers["mean"]),
        action_mean=torch.tensor(numbers["mean"]),
        action_std=torch.tensor(numbers["std"]),
        action_low=torch.tensor(numbers["min"]),
        action_high=torch.tensor(numbers["max"]),
        **known,
    )
