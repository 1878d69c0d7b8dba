# Copyright (c) the torchrl_rpd authors.
#
# This source code is licensed under the MIT license found in the
# LICENSE file in the root directory of this source tree.
"""Checkpoints from which a run goes on exactly as if it had never stopped."""

from __future__ import annotations

import signal
import threading
from collections.abc import Callable, Mapping
from pathlib import Path
from types import FrameType
from typing import Any

from tensordict import TensorDict
from torchrl._utils import logger as torchrl_logger
from torchrl.checkpoint import (
    Checkpoint,
    CheckpointError,
    CheckpointRotation,
    GlobalRNGState,
    StateDictCheckpointAdapter,
)
from torchrl.collectors import Collector
from torchrl.trainers import Trainer, TrainerHookBase

from torchrl_rpd.trainers._episodes import (
    episode_state,
    restart_episodes,
    warn_without_streams,
)
from torchrl_rpd.trainers._fingerprint import differences, fingerprint
from torchrl_rpd.trainers._newest import explained, load_newest, remove_leftovers

# Saved elsewhere (the policy's weights are the loss's), of no use after its batch, and
# belonging to the process (its log goes on by itself).
_NOT_SAVED = frozenset({"policy", "replay_buffer", "logger"})


class CheckpointHook(TrainerHookBase):
    """Saves a run every so many frames, and goes on from there after a crash.

    Start the same command again after ``kill -9``, a full disk or a reboot: at the start
    of ``train()`` the newest checkpoint is loaded, and the run goes on from it. On a CPU
    the result is **bit for bit** that of a run that was never interrupted. Restored are
    weights, optimiser, learning rate and distillation coefficient, observation
    statistics, counters, the state of every hook, all random number generators
    (Python's, NumPy's and torch's global ones, the seed streams of the environments, and
    in a :class:`~torchrl_rpd.transforms.TeacherActionTransform` the one behind
    ``query_fraction`` and that of a stochastic teacher) and its switch and counters.

    The state of a simulator cannot be saved exactly. Instead, every environment is reset
    with its next seed at each checkpoint, **in the uninterrupted run too**, which goes on
    from the file that it has just written. Episodes that were under way are cut off
    there: their frames are in the last batch, their end is not. ManiSkill's simulations
    are rebuilt, since PhysX keeps a trace of earlier contacts (about 0.2 s per
    environment). ``every`` is therefore part of what a run computes; choose it so that
    a checkpoint is rare against the length of an episode, e.g. a tenth of the run.

    On SIGTERM or SIGINT the batch under way is finished and saved, and ``train()``
    returns with :attr:`stopped_by` set; a second signal acts as usual. Going on from
    there loses no frame, but it is one reset more than without the stop.

    TorchRL's :class:`~torchrl.checkpoint.Checkpoint` and ``CheckpointRotation`` write the
    files: under another name first, so that an interrupted write leaves the last
    checkpoint alone. They hold tensors and plain values, read with
    ``torch.load(weights_only=True)``, and JSON: reading one runs no code from it. One
    that cannot be read (cut off, edited) is passed over with a warning, and the run goes
    on from the one before.

    Args:
        directory (path): of this run alone.

    Keyword Args:
        every (int): frames between two checkpoints; each is made at the end of a batch.
        config (mapping): what the run depends on: numbers, strings, lists and
            dictionaries of them. A checkpoint of another configuration is refused.
            ``every`` and the trainer's ``total_frames`` are added.
        keep_last (int): how many checkpoints are kept. Default: ``2``.

    Attributes:
        stopped_by: name of the signal that stopped the run, else ``None``.

    Raises:
        TypeError: if the trainer's collector has worker processes of its own (those of
            the environment, ``ManiSkillEnv(num_workers=...)``, are fine), or if the
            configuration holds something that JSON does not know.
        ValueError: for ``every`` under 1, if the trainer saves checkpoints already, and,
            on resuming, if the checkpoint is of another configuration or other hooks.
        CheckpointError: on resuming, if there are checkpoints and none can be read.
        OSError: during training, if a checkpoint cannot be written: with a disk that is
            full, the last one stays as it is.

    Examples:
        >>> import tempfile
        >>> from torchrl_rpd.trainers import CheckpointHook
        >>> hook = CheckpointHook(
        ...     tempfile.mkdtemp(), every=10_000, config={"lr": 3e-4, "seed": 0}
        ... )
        >>> print(hook.latest())  # nothing was saved so far
        None

        With a trainer of :func:`~torchrl_rpd.trainers.make_ppo_trainer`, as the last of
        the hooks: ``hook.register(trainer)``, then ``trainer.train()``.
    """

    def __init__(
        self,
        directory: str | Path,
        *,
        every: int,
        config: Mapping[str, Any],
        keep_last: int = 2,
    ) -> None:
        if every < 1:
            raise ValueError(f"every is at least 1 frame, got {every}.")
        self.every = every
        self.config = fingerprint(config)
        self.stopped_by: str | None = None
        self._rotation = _Rotation(directory, keep_last=keep_last, saved=self._saved)
        self._loaded: dict[str, Any] = {}
        self._resumed: bool | None = None
        self._handlers: dict[signal.Signals, Any] = {}

    # ------------------------------------------------------------------ the trainer
    def register(self, trainer: Trainer, name: str = "checkpoints") -> None:
        """Has the trainer write its checkpoints here and resume when it starts."""
        if trainer.checkpoint is not None or trainer.save_trainer_file is not None:
            raise ValueError(
                "The trainer saves checkpoints already: build it without checkpoint= and "
                "save_trainer_file=, which CheckpointHook sets."
            )
        if not isinstance(trainer.collector, Collector):
            raise TypeError(
                f"{type(trainer.collector).__name__} steps its environments in processes "
                "that cannot be resumed. Use torchrl.collectors.Collector, and worker "
                "processes below it: ManiSkillEnv(num_workers=...)."
            )
        warn_without_streams(trainer.collector.env)
        self._trainer = trainer
        self.config = {
            **self.config,
            "checkpoint_every": self.every,
            "total_frames": trainer.total_frames,
        }
        trainer.checkpoint = Checkpoint().register_adapter(object, _WeightsOnly())
        trainer.checkpoint_rotation = self._rotation
        trainer.checkpoint_metadata = lambda _: {"config": self.config}
        # The trainer saves when *more* frames than this have passed.
        trainer.save_trainer_interval = self.every - 1
        trainer.register_module(name, self)
        trainer.register_op("setup", self._start)
        trainer.register_op("shutdown", self._stop_listening)

    def _start(self) -> None:
        self.resume()
        bar = getattr(self._trainer, "_pbar", None)
        if bar is not None:
            # The time left is estimated from the frames of this process.
            bar.n = bar.initial = self._trainer.collected_frames
            bar.refresh()
        if threading.current_thread() is threading.main_thread():
            for number in (signal.SIGINT, signal.SIGTERM):
                self._handlers[number] = signal.signal(number, self._stop)

    # ------------------------------------------------------------------ saving
    def latest(self) -> Path | None:
        """The newest checkpoint of the directory."""
        path: Path | None = self._rotation.latest()
        return path

    def state_dict(self) -> dict[str, Any]:
        """Random number generators, and where the environments' seed streams stand."""
        # The collector has closed its environment after the last frame of a run.
        episodes = (
            None if self._complete else episode_state(self._trainer.collector.env)
        )
        return {"rng": GlobalRNGState().state_dict(), "episodes": episodes}

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Takes the state over; it is used once everything else is loaded."""
        self._loaded = state_dict

    def _saved(self, path: Path) -> None:
        """What a resumed run does at this point, the uninterrupted one does as well."""
        if self.stopped_by is None and not self._complete:
            self._go_on_from(path)

    @property
    def _complete(self) -> bool:
        trainer = self._trainer
        return (
            trainer.collected_frames >= trainer.total_frames
            or trainer.collected_frames
            >= trainer.collector.total_frames * trainer.frame_skip
        )

    # ------------------------------------------------------------------ resuming
    def resume(self) -> bool:
        """Goes on from the newest checkpoint; returns whether there was one.

        ``train()`` calls it. Call it before, after all hooks are registered, to know
        the answer; the second call does nothing.

        Raises:
            ValueError: if the checkpoint is of another configuration or other hooks.
            CheckpointError: if there are checkpoints and none can be read.
        """
        if self._resumed is None:
            remove_leftovers(self._rotation)
            path = load_newest(self._rotation, self._check_and_load)
            self._resumed = path is not None
            if path is not None:
                torchrl_logger.info(
                    "Resumed at %d frames from %s", self._trainer.collected_frames, path
                )
        return self._resumed

    def _check_and_load(self, path: Path) -> None:
        self._check(path)
        self._go_on_from(path)

    def _check(self, path: Path) -> None:
        manifest = Checkpoint.manifest(path)
        lines = differences(manifest["metadata"].get("config", {}), self.config)
        saved = set(manifest["components"])
        live = _components(self._trainer.checkpoint)
        lines += [f"{name}: only in the checkpoint" for name in sorted(saved - live)]
        lines += [f"{name}: only in this run" for name in sorted(live - saved)]
        if lines:
            raise ValueError(
                f"{path} was saved by another configuration (checkpoint -> this run):\n  "
                + "\n  ".join(lines)
                + "\nGo on with the old settings, or start anew in another directory."
            )

    def _go_on_from(self, path: Path) -> None:
        trainer = self._trainer
        trainer.checkpoint.load(
            path, components=_components(trainer.checkpoint), map_location="cpu"
        )
        trainer.collector.update_policy_weights_(
            TensorDict.from_module(trainer.loss_module.actor_network)
        )
        GlobalRNGState().load_state_dict(self._loaded["rng"])
        # There is none of a run that was complete: nothing is left to collect.
        if self._loaded["episodes"] is not None:
            restart_episodes(trainer.collector, self._loaded["episodes"])

    # ------------------------------------------------------------------ signals
    def _stop(self, number: int, frame: FrameType | None) -> None:
        self._stop_listening()
        self.stopped_by = signal.Signals(number).name
        torchrl_logger.warning(
            "%s: the run stops with a checkpoint after this batch.", self.stopped_by
        )
        self._trainer.request_stop(self.stopped_by)

    def _stop_listening(self) -> None:
        for number, handler in self._handlers.items():
            # None: it was not set from Python.
            signal.signal(number, signal.SIG_DFL if handler is None else handler)
        self._handlers = {}


def _components(checkpoint: Checkpoint) -> set[str]:
    """What of a trainer's components is saved."""
    return set(checkpoint.components) - _NOT_SAVED


class _Rotation(CheckpointRotation):
    """Leaves components out, and tells when a checkpoint is there.

    The trainer saves after all hooks of a batch, at a point that no hook reaches.
    """

    def __init__(
        self, directory: str | Path, *, keep_last: int, saved: Callable[[Path], None]
    ) -> None:
        super().__init__(directory, keep_last=keep_last)
        self._when_saved = saved

    def save(self, checkpoint: Checkpoint, **kwargs: Any) -> Path:
        with explained(self, kwargs["step"]):
            path: Path = super().save(
                checkpoint, components=_components(checkpoint), **kwargs
            )
        self._when_saved(path)
        return path


class _WeightsOnly(StateDictCheckpointAdapter):
    """One file per component, written by ``torch.save`` and read with ``weights_only``.

    TorchRL's own default, a folder of memory-mapped tensors, unpickles a side file if
    somebody has put one there.
    """

    def __init__(self) -> None:
        super().__init__("torch")

    def load(self, component: Any, path: Path, **kwargs: Any) -> Any:
        if not (path / self.state_torch).is_file():
            raise CheckpointError(f"{path} holds no {self.state_torch}.")
        return super().load(component, path, **kwargs)
