# Copyright (c) the torchrl_rpd authors.
#
# This source code is licensed under the MIT license found in the
# LICENSE file in the root directory of this source tree.
"""An env and teachers in which every label tells which observation it belongs to."""

from __future__ import annotations

import functools
from collections.abc import Sequence

import torch
from tensordict import TensorDict, TensorDictBase
from torchrl.data import Bounded, Categorical, Composite, Unbounded
from torchrl.envs import Compose, EnvBase, RewardSum, TransformedEnv

from torchrl_rpd.transforms import TeacherActionTransform

ACTION_DIM = 2


class CountingEnv(EnvBase):
    """Observation ``(env, episode, step)``; episodes of different lengths per env.

    Env ``i`` needs ``lengths[i] + episode % 2`` steps; odd episodes end by termination,
    even ones by truncation. Only the rows of ``_reset`` are reset.
    """

    def __init__(
        self,
        lengths: Sequence[int] = (2, 3, 5),
        batch_size: Sequence[int] | None = None,
        first_id: int = 0,
        text: bool = False,
    ) -> None:
        batch_size = [len(lengths)] if batch_size is None else list(batch_size)
        super().__init__(batch_size=torch.Size(batch_size))
        self.text = text
        shape = self.batch_size
        self.lengths = torch.tensor(lengths).reshape(shape)
        self.ids = first_id + torch.arange(len(lengths)).reshape(shape)
        self.episode = torch.full(shape, -1)
        self.step_count = torch.zeros(shape, dtype=torch.int64)
        self.over = torch.ones(shape, dtype=torch.bool)
        self.observation_spec = Composite(
            observation=Unbounded((*shape, 3)), shape=shape
        )
        self.action_spec = Bounded(-1.0, 1.0, (*shape, ACTION_DIM))
        self.reward_spec = Unbounded((*shape, 1))
        flag = Categorical(2, shape=(*shape, 1), dtype=torch.bool)
        self.full_done_spec = Composite(
            done=flag, terminated=flag.clone(), truncated=flag.clone(), shape=shape
        )

    def _observe(self) -> torch.Tensor:
        return torch.stack([self.ids, self.episode, self.step_count], -1).float()

    def _reset(self, tensordict: TensorDictBase | None = None) -> TensorDictBase:
        mask = None if tensordict is None else tensordict.get("_reset", None)
        if mask is None:
            mask = torch.ones(self.batch_size, dtype=torch.bool)
        mask = mask.reshape(self.batch_size)
        self.episode = torch.where(mask, self.episode + 1, self.episode)
        self.step_count = torch.where(mask, 0, self.step_count)
        self.over = self.over & ~mask
        over = self.over.unsqueeze(-1)
        return TensorDict(
            {
                "observation": self._observe(),
                "done": over,
                "terminated": over.clone(),
                "truncated": torch.zeros_like(over),
            },
            self.batch_size,
        )

    def _step(self, tensordict: TensorDictBase) -> TensorDictBase:
        moves = tensordict.get("_step", None)
        if moves is None:
            moves = torch.ones(self.batch_size, dtype=torch.bool)
        moves = moves.reshape(self.batch_size)
        assert not (self.over & moves).any(), "stepped after the end of an episode"
        self.step_count = self.step_count + moves.long()
        self.over = self.step_count >= self.lengths + self.episode % 2
        over, odd = self.over.unsqueeze(-1), (self.episode % 2 == 1).unsqueeze(-1)
        return TensorDict(
            {
                "observation": self._observe(),
                "reward": torch.ones(*self.batch_size, 1),
                "done": over,
                "terminated": over & odd,
                "truncated": over & ~odd,
            },
            self.batch_size,
        )

    def _set_seed(self, seed: int | None) -> None:
        pass


def label_of(observation: torch.Tensor) -> torch.Tensor:
    """The label that belongs to an observation: one of its own for every one.

    Below 100 envs, episodes and steps: (env 1e4 + episode 1e2 + step) / 1e6 < 1.
    """
    code = observation @ torch.tensor([1e4, 1e2, 1.0])
    return torch.stack([code / 1e6, -code / 2e6], -1)


class RecordingTeacher:
    """Gives :func:`label_of` and writes down every row that it was asked about."""

    def __init__(self) -> None:
        self.calls: list[torch.Tensor] = []

    def __call__(self, tensordict: TensorDictBase) -> torch.Tensor:
        assert tensordict.ndim == 1 and not torch.is_grad_enabled()
        observation = tensordict["observation"]
        self.calls.append(observation.clone())
        return label_of(observation)

    @property
    def asked(self) -> list[tuple[int, ...]]:
        """Every ``(env, episode, step)`` that was asked about, in order."""
        return [tuple(map(int, row)) for call in self.calls for row in call.tolist()]


def assert_labels_belong(frames: TensorDictBase) -> None:
    """Every root is labelled, with the label of the observation beside it."""
    assert frames["teacher_mask"].all()
    torch.testing.assert_close(
        frames["teacher_action"], label_of(frames["observation"]), rtol=0, atol=1e-9
    )


def windows_of(
    observation: torch.Tensor, window: int
) -> tuple[torch.Tensor, torch.Tensor]:
    """The last observations ``[*B, W, 3]`` up to each, and which of them are real.

    By the definition: place ``j`` of ``W`` holds step ``t - (W - 1) + j`` of the same
    episode, and step 0 where that is negative.
    """
    steps = observation[..., 2:] - (window - 1) + torch.arange(window)
    same = observation[..., None, :2].expand(*steps.shape, 2)
    return torch.cat([same, steps.clamp(min=0).unsqueeze(-1)], -1), steps >= 0


def label_of_window(windows: torch.Tensor, real: torch.Tensor) -> torch.Tensor:
    """A label that depends on every place of the window and of its mask, ``[*B, 2]``."""
    places = torch.arange(1.0, windows.shape[-2] + 1)
    signed = torch.where(real, windows[..., 2] + 1, -windows[..., 2] - 10)
    sums = (places * signed).sum(-1, keepdim=True) / 1e4
    return torch.cat([label_of(windows[..., -1, :])[..., :1], sums], -1)


class LookingBack:
    """Labels by :func:`label_of_window`; says which window it wants to be shown."""

    history_keys = ("observation",)

    def __init__(self, window: int, in_keys: Sequence[str] | None = None) -> None:
        self.history_window = window
        if in_keys is not None:
            self.in_keys = in_keys
        self.rows = 0

    def __call__(self, tensordict: TensorDictBase) -> torch.Tensor:
        windows, real = tensordict["observation"], tensordict["timestep_pad_mask"]
        self.rows += len(windows)
        assert windows.shape == (*tensordict.batch_size, self.history_window, 3)
        assert real.shape == windows.shape[:2] and real.dtype == torch.bool
        return label_of_window(windows, real)


def make_worker(first_id: int = 0) -> CountingEnv:
    """Two envs for one worker; here, where worker processes can import it."""
    return CountingEnv((2, 3), first_id=first_id)


def make_worker_with_teacher() -> TransformedEnv:
    """The same with a teacher of its own."""
    return TransformedEnv(
        make_worker(), TeacherActionTransform(teacher_factory=RecordingTeacher)
    )


def make_worker_with_chain() -> TransformedEnv:
    """Nested keys, and a teacher that looks back, as the second of two transforms."""
    label = TeacherActionTransform(
        teacher_factory=functools.partial(LookingBack, 3),
        teacher_action_key=("teacher", "action"),
        teacher_mask_key=("teacher", "mask"),
    )
    return TransformedEnv(CountingEnv((4, 5)), Compose(RewardSum(), label))
