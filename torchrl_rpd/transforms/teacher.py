# Copyright (c) the torchrl_rpd authors.
#
# This source code is licensed under the MIT license found in the
# LICENSE file in the root directory of this source tree.
"""Labels what the student sees with the actions of a teacher."""

from __future__ import annotations

import time
from collections.abc import Callable, Sequence
from typing import Any, Literal, NoReturn

import torch
from tensordict import TensorDictBase, unravel_key
from tensordict.utils import NestedKey
from torchrl.data.tensor_specs import Categorical, Composite, TensorSpec, Unbounded
from torchrl.envs import EnvBase
from torchrl.envs.transforms import Compose, StepCounter, Transform

from torchrl_rpd.transforms._box import ActionBox, Bound
from torchrl_rpd.transforms._chunk_cache import ChunkCache
from torchrl_rpd.transforms._handle import Teacher, TeacherHandle
from torchrl_rpd.transforms._labels import LabelRules
from torchrl_rpd.transforms._stats import QueryStats, TeacherStats

# Root entries that are no observation. A teacher that does not say what it reads gets
# everything else.
_NOT_OBSERVED: tuple[str, ...] = (
    "action",
    "collector",
    "done",
    "next",
    "reward",
    "terminated",
    "truncated",
    "_reset",
    "_step",
)


class _Shared:
    """What a transform and its clones (TorchRL makes them unasked) have in common."""

    def __init__(self, seed: int) -> None:
        self.enabled = True
        self.stats = QueryStats()
        self.generator = torch.Generator().manual_seed(seed)


class TeacherActionTransform(Transform):
    r"""Writes a teacher's action beside every observation that the student learns from.

    Refined Policy Distillation (RPD, https://arxiv.org/abs/2503.05833) pulls the mean
    action of a student towards the action that a large teacher would take in the same
    state. The teacher is asked once per frame, when the frame is collected, and its
    answer is stored with the frame (the released code asks again in every minibatch).

    There are two places to use it:

    - **In an env**, ``TransformedEnv(env, TeacherActionTransform(teacher))``, with
      batches ``[]``, ``[N]`` and ``[W, N]``: a reset asks about the rows that are
      reset, a step about the rows that are not done. Collecting ``F`` frames from ``N``
      envs costs ``F + N`` queries, the ``N`` being labels of roots that are not stored
      yet. Terminal observations (``("next", ...)`` of a done row) are not labelled:
      zeros, and mask False.
    - **As the** ``postproc`` **of a collector**, or called on a tensordict: exactly one
      query per frame, in the largest batches possible. The frames must hold what the
      teacher reads, and it must be memoryless. Frames are always labelled anew, on a
      shallow copy: collectors use one buffer again and again, and a label found there
      belongs to a frame that is gone. Frames masked out by ``("collector", "mask")``
      get none.

    A deterministic teacher without memory gives the same labels in every placement
    (give ``low`` and ``high`` where the env is not there to tell its action box:
    without them, labels of frames are not clipped). Appended to a replay buffer, it
    labels frames when they are added and leaves them as they are when they are sampled.

    The teacher is frozen (a module is set to eval mode, without gradients), is called
    without gradients on a scratch tensordict of rows ``[n]``, and never becomes part of
    the parameters, the ``state_dict`` or a deep copy of the env.

    Args:
        teacher (callable, optional): a TensorDict module that writes
            ``("vla_action", "chunk")`` of shape ``[n, H, A]`` (its first action is the
            label) or has a single out key of shape ``[n, A]``; or a function of a
            tensordict that returns a tensor ``[n, A]``. Exactly one of ``teacher`` and
            ``teacher_factory`` is needed.

    Keyword Args:
        teacher_factory (callable, optional): takes no argument and returns the teacher.
            Called at the first query, in the process that makes it: the only way to
            have the transform inside the workers of a ``SerialEnv`` or ``ParallelEnv``.
            Each worker then builds a teacher of its own.
        in_keys (sequence of NestedKey, optional): what the teacher is given. Defaults
            to the ``in_keys`` of the teacher, and to the whole observation where it has
            none.
        teacher_action_key (NestedKey, optional): where the labels go, ``[*B, A]``
            float32, in the action convention of the env. Defaults to
            ``"teacher_action"``.
        teacher_mask_key (NestedKey, optional): ``[*B, 1]`` bool, True where there is a
            label. Defaults to ``"teacher_mask"``.
        teacher_std_key (NestedKey, optional): where to store the standard deviation of
            a teacher with a spread (one that writes ``"teacher_std"`` or
            ``("vla_action", "std")``), ``[*B, A]`` float32, in the convention of the
            labels: ``action_transform`` is not applied to it. Defaults to ``None``: not
            stored.
        action_key (NestedKey, optional): the env's action, whose spec tells the width
            of the labels and the box to clip to. Defaults to ``"action"``.
        max_batch_size (int, optional): the most rows in one call of the teacher.
            Defaults to ``None``: no limit.
        query_fraction (float, optional): the probability, in ``[0, 1]``, with which a
            frame is labelled at all. Defaults to ``1.0``.
        replan_interval (int, optional): for how many steps a chunk is followed before
            the teacher is asked again; more than 1 needs a chunk teacher and an env
            (not postproc). Labels of later chunk entries were planned from an earlier
            observation, for the teacher's own motion. Defaults to ``1``.
        action_transform (callable, optional): maps raw teacher actions ``[n, A]`` to
            the env's convention, e.g. a gripper from ``[0, 1]`` to ``[-1, 1]``.
        clip_labels (bool, optional): clip labels to the box, and count the rows in
            which something was clipped. Defaults to ``True``.
        low (float or sequence of float, optional): lower end of the box. Defaults to
            that of the env's action spec; without an env, none.
        high (float or sequence of float, optional): upper end, likewise.
        on_non_finite ("mask" or "raise", optional): what to do with labels that hold
            NaN or an infinity: mask out and count, or raise a ``ValueError``. Defaults
            to ``"mask"``.
        seed (int, optional): seed of the generator that ``query_fraction`` draws from
            (torch's global one is left alone; its state is in ``state_dict``). Defaults
            to ``0``.

    Raises:
        ValueError: for contradicting or out-of-range arguments; for labels of a wrong
            shape; in an env, if a ``StepCounter`` that ends episodes comes later.
        KeyError: if the teacher needs a key that is not there.
        RuntimeError: in an env with native auto-reset (it overwrites the terminal
            observations that RPD bootstraps from), with an in-process teacher inside a
            batched env's workers, and on pickling an in-process teacher.

    .. note:: Place it after every transform that changes what the teacher reads or that
        ends episodes, e.g. ``Compose(StepCounter(50), TeacherActionTransform(...))``.

    .. note:: Inside the workers of a ``ParallelEnv`` the transform is reached through
        the env: ``env.transform.set_enabled(False)``, ``env.transform.stats()``.

    Examples:
        >>> import torch
        >>> from tensordict import TensorDict
        >>> from torchrl_rpd.transforms import TeacherActionTransform
        >>> label = TeacherActionTransform(lambda td: 2 * td["observation"], high=1.0)
        >>> frames = TensorDict({"observation": torch.tensor([[0.2], [0.7]])}, [2])
        >>> labelled = label(frames)
        >>> labelled["teacher_action"]  # the second one is clipped
        tensor([[0.4000],
                [1.0000]])
        >>> labelled["teacher_mask"].squeeze(-1)
        tensor([True, True])
        >>> label.stats()["queries"], label.stats()["clipped"]
        (2, 1)
    """

    def __init__(
        self,
        teacher: Teacher | None = None,
        *,
        teacher_factory: Callable[[], Teacher] | None = None,
        in_keys: Sequence[NestedKey] | None = None,
        teacher_action_key: NestedKey = "teacher_action",
        teacher_mask_key: NestedKey = "teacher_mask",
        teacher_std_key: NestedKey | None = None,
        action_key: NestedKey = "action",
        max_batch_size: int | None = None,
        query_fraction: float = 1.0,
        replan_interval: int = 1,
        action_transform: Callable[[torch.Tensor], torch.Tensor] | None = None,
        clip_labels: bool = True,
        low: Bound | None = None,
        high: Bound | None = None,
        on_non_finite: Literal["mask", "raise"] = "mask",
        seed: int = 0,
    ) -> None:
        if max_batch_size is not None and max_batch_size < 1:
            raise ValueError(
                f"max_batch_size must be at least 1, got {max_batch_size}."
            )
        if not 0.0 <= query_fraction <= 1.0:
            raise ValueError(f"query_fraction must be in [0, 1], got {query_fraction}.")
        if replan_interval < 1:
            raise ValueError(
                f"replan_interval must be at least 1, got {replan_interval}."
            )
        if replan_interval > 1 and (query_fraction < 1 or teacher_std_key is not None):
            raise ValueError(
                "replan_interval > 1 goes with neither query_fraction < 1 nor "
                "teacher_std_key: a chunk is one plan that is followed as a whole."
            )
        keys = [teacher_action_key, teacher_mask_key]
        if teacher_std_key is not None:
            keys.append(teacher_std_key)
        handle = TeacherHandle(teacher, factory=teacher_factory)
        super().__init__(
            in_keys=list(in_keys) if in_keys is not None else None, out_keys=keys
        )
        self._handle = handle
        self._in_keys_given = in_keys is not None
        self.teacher_action_key = unravel_key(teacher_action_key)
        self.teacher_mask_key = unravel_key(teacher_mask_key)
        self.teacher_std_key = (
            None if teacher_std_key is None else unravel_key(teacher_std_key)
        )
        self.action_key = unravel_key(action_key)
        self.max_batch_size = max_batch_size
        self.query_fraction = query_fraction
        self.replan_interval = replan_interval
        self._rules = LabelRules(
            action_transform, clip=clip_labels, on_non_finite=on_non_finite
        )
        self._limits = (low, high)
        self._limits_box = ActionBox(None, low, high)
        self._shared = _Shared(seed)
        self._cache = ChunkCache(replan_interval) if replan_interval > 1 else None
        self._env_box: ActionBox | None = None
        self._labels_on_extend = False

    # ------------------------------------------------------------------ switch, counts
    @property
    def enabled(self) -> bool:
        """Whether the teacher is asked; if not, labels are zeros with mask False.

        Raises:
            RuntimeError: on setting it after the transform was sent to other processes,
                where the change would not arrive.
        """
        return self._shared.enabled

    @enabled.setter
    def enabled(self, value: bool) -> None:
        self.set_enabled(value)

    def set_enabled(self, value: bool) -> None:
        """Sets :attr:`enabled`; a method, so that it can be sent to workers.

        Inside a ``ParallelEnv``: ``env.transform.set_enabled(False)``.
        """
        if self._handle.crossed_process:
            raise RuntimeError(
                "This TeacherActionTransform was sent to other processes; setting "
                "enabled here does not reach the copies there. Call "
                "env.transform.set_enabled(...) on the ParallelEnv instead, or put the "
                "transform outside of it."
            )
        if not value and self._cache is not None:
            # positions stand still while nobody is asked
            self._cache.invalidate()
        self._shared.enabled = bool(value)

    def stats(self) -> TeacherStats:
        """The counters since the start or the last :meth:`reset_stats`.

        Returns:
            a dictionary with ``frames`` (rows that could have been labelled),
            ``queries`` (rows that the teacher was asked about), ``calls`` (batches of
            them), ``labelled`` (rows with mask True), ``clipped`` (labelled rows of
            which an entry was clipped), ``non_finite`` (rows masked for that reason)
            and ``seconds`` (wall-clock time in the teacher; on an accelerator the time
            to launch its work).
        """
        return self._shared.stats.read()

    def reset_stats(self) -> None:
        """Sets the counters to zero."""
        self._shared.stats.reset()

    def pop_stats(self) -> TeacherStats:
        """Returns the counters and sets them to zero."""
        stats = self.stats()
        self.reset_stats()
        return stats

    # ------------------------------------------------------------------ in an env
    def _reset(
        self, tensordict: TensorDictBase, tensordict_reset: TensorDictBase
    ) -> TensorDictBase:
        reset = tensordict.get("_reset", None)
        if reset is None:
            reset = self._everything(tensordict_reset)
        rows = reset.reshape(tensordict_reset.batch_size)
        return self._label(tensordict_reset, rows, fresh=True)

    def _step(
        self, tensordict: TensorDictBase, next_tensordict: TensorDictBase
    ) -> TensorDictBase:
        batch_size = next_tensordict.batch_size
        rows = ~next_tensordict.get("done").reshape(batch_size)
        stepped = tensordict.get("_step", None)
        if stepped is None:
            return self._label(next_tensordict, rows)
        # Rows that stand still in this step keep what they have.
        stepped = stepped.reshape(batch_size)
        next_tensordict = self._label(next_tensordict, rows & stepped)
        for key in self.out_keys:
            old = tensordict.get(key, None)
            if old is not None:
                new = next_tensordict.get(key)
                next_tensordict.set(key, torch.where(stepped.unsqueeze(-1), new, old))
        return next_tensordict

    def _reset_on_native_autoreset(
        self, tensordict: TensorDictBase, tensordict_reset: TensorDictBase
    ) -> NoReturn:
        _refuse_native_autoreset()

    def _check_batched_worker_compat(self) -> None:
        if self._handle.in_process:
            raise RuntimeError(
                f"TeacherActionTransform with an in-process teacher "
                f"({self._handle.name}) cannot live inside a SerialEnv/ParallelEnv "
                "worker: one teacher would be asked row by row, or copied to every "
                "process. Place it outside, e.g. TransformedEnv(ParallelEnv(N, "
                "make_env), TeacherActionTransform(teacher)), or give teacher_factory=."
            )

    def transform_observation_spec(self, observation_spec: TensorSpec) -> TensorSpec:
        """Adds the label, its mask and, if asked for, its standard deviation."""
        if not isinstance(observation_spec, Composite):
            raise TypeError(
                "TeacherActionTransform adds entries to a Composite observation spec, "
                f"got {type(observation_spec).__name__}."
            )
        self._check_order()
        width = self._box().width
        shape, device = observation_spec.shape, observation_spec.device
        label = Unbounded(shape=(*shape, width), dtype=torch.float32, device=device)
        observation_spec[self.teacher_action_key] = label
        observation_spec[self.teacher_mask_key] = Categorical(
            2, shape=(*shape, 1), dtype=torch.bool, device=device
        )
        if self.teacher_std_key is not None:
            observation_spec[self.teacher_std_key] = label.clone()
        return observation_spec

    def set_container(self, container: Any) -> None:
        """Enters an env or a Compose; refuses envs with native auto-reset."""
        super().set_container(container)
        env = self._env()
        if env is not None and env.__dict__.get("_torchrl_native_autoreset", False):
            _refuse_native_autoreset()

    def empty_cache(self) -> None:
        """Forgets what was derived from the env's specs."""
        super().empty_cache()
        self._env_box = None

    def clone(self) -> TeacherActionTransform:
        """A copy without parent; teacher, switch and counters are shared with it."""
        out = super().clone()
        out._env_box = None
        if self._cache is not None:
            out._cache = ChunkCache(self.replan_interval)
        return out

    # ------------------------------------------------------------------ outside of one
    def forward(self, tensordict: TensorDictBase) -> TensorDictBase:
        """Labels every frame of a tensordict ``[*B]``, ``[*B, T]`` or any other shape.

        Args:
            tensordict (TensorDictBase): frames; left as they are.

        Returns:
            a shallow copy with the labels.
        """
        if self._labels_on_extend:
            return tensordict
        return self._label_frames(tensordict)

    def _inv_call(self, tensordict: TensorDictBase) -> TensorDictBase:
        if self._env() is not None:
            return tensordict
        # Only replay buffers call this without an env: on extend. What they hold is
        # labelled from now on.
        self._labels_on_extend = True
        return self._label_frames(tensordict)

    def _label_frames(self, tensordict: TensorDictBase) -> TensorDictBase:
        if self.replan_interval > 1:
            raise ValueError(
                "replan_interval > 1 follows each env step by step and needs the "
                "transform in the env; on stored frames use replan_interval=1."
            )
        tensordict = tensordict.copy()
        valid = tensordict.get(("collector", "mask"), None)
        if valid is None:
            valid = self._everything(tensordict)
        return self._label(tensordict, valid.reshape(tensordict.batch_size))

    # ------------------------------------------------------------------ the labels
    def _label(
        self, tensordict: TensorDictBase, candidates: torch.Tensor, fresh: bool = False
    ) -> TensorDictBase:
        """Writes labels into ``tensordict`` for the rows of a bool mask ``[*B]``.

        ``fresh`` says that an episode starts in these rows.
        """
        # The one synchronisation with an accelerator per step: which rows.
        rows = candidates.reshape(-1).nonzero().squeeze(-1)
        self._shared.stats.frames += rows.numel()
        rows = self._draw(rows)
        if not rows.numel():
            return self._write_nothing(tensordict, candidates)
        raw, std = self._answers(tensordict, rows, fresh)
        labels = self._rules(
            raw.to(rows.device),
            std,
            self._box(tensordict).to(rows.device),
            name=self._handle.name,
        )
        self._shared.stats.emit(labels.usable, labels.clipped)
        self._write(tensordict, self.teacher_action_key, labels.action, rows)
        self._write(tensordict, self.teacher_mask_key, labels.usable[:, None], rows)
        if self.teacher_std_key is not None and labels.std is not None:
            self._write(tensordict, self.teacher_std_key, labels.std, rows)
        return tensordict

    def _draw(self, rows: torch.Tensor) -> torch.Tensor:
        if not self._shared.enabled:
            return rows[:0]
        if self.query_fraction == 1.0:
            return rows
        chance = torch.rand(rows.numel(), generator=self._shared.generator)
        drawn = (chance < self.query_fraction).nonzero().squeeze(-1)
        return rows[drawn.to(rows.device)]

    def _answers(
        self, tensordict: TensorDictBase, rows: torch.Tensor, fresh: bool
    ) -> tuple[torch.Tensor, torch.Tensor | None]:
        """Raw actions for ``rows``: asked for, or the next ones of cached chunks."""
        if self._cache is None:
            chunk, std = self._ask(tensordict, rows)
            if self.teacher_std_key is None:
                return chunk[:, 0], None
            if std is None:
                raise KeyError(
                    f"teacher_std_key={self.teacher_std_key!r} asks for a standard "
                    f"deviation, but the teacher ({self._handle.name}) writes neither "
                    "'teacher_std' nor ('vla_action', 'std')."
                )
            return chunk[:, 0], std
        move = self._cache.start if fresh else self._cache.advance
        due = move(rows, tensordict.batch_size.numel())
        if due.numel():
            self._cache.store(due, self._ask(tensordict, due)[0])
        return self._cache.read(rows), None

    def _ask(
        self, tensordict: TensorDictBase, rows: torch.Tensor
    ) -> tuple[torch.Tensor, torch.Tensor | None]:
        scratch = self._observed(tensordict)
        if scratch.ndim != 1:
            scratch = scratch.reshape(-1)
        if rows.numel() < scratch.batch_size[0]:
            scratch = scratch[rows]
        limit = self.max_batch_size or rows.numel()
        batches = [scratch] if rows.numel() <= limit else scratch.split(limit)
        stats = self._shared.stats
        start = time.perf_counter()
        parts = [self._handle(batch) for batch in batches]
        stats.seconds += time.perf_counter() - start
        stats.calls += len(parts)
        stats.queries += rows.numel()
        if len(parts) == 1:
            return parts[0]
        chunks = torch.cat([chunk for chunk, _ in parts])
        stds = [std for _, std in parts if std is not None]
        return chunks, torch.cat(stds) if stds else None

    def _observed(self, tensordict: TensorDictBase) -> TensorDictBase:
        """What the teacher reads, copied so far that it may write into it."""
        keys = self.in_keys if self._in_keys_given else self._handle.in_keys
        if keys is None:
            return tensordict.exclude(*_NOT_OBSERVED, *self.out_keys).copy()
        there = tensordict.keys(include_nested=True)
        missing = [key for key in keys if key not in there]
        if missing:
            raise KeyError(
                f"The teacher ({self._handle.name}) reads {missing}, which is not "
                f"there; found {sorted(there, key=str)}. Name the right entries with "
                "in_keys=, or have the env (or the collector) keep them."
            )
        return tensordict.select(*keys).copy()

    def _write(
        self,
        tensordict: TensorDictBase,
        key: NestedKey,
        values: torch.Tensor,
        rows: torch.Tensor,
    ) -> None:
        """Scatters values ``[n, F]`` of the flat ``rows`` among zeros, ``[*B, F]``."""
        batch_size = tensordict.batch_size
        if rows.numel() < batch_size.numel():
            full = values.new_zeros(batch_size.numel(), values.shape[-1])
            full[rows] = values
            values = full
        tensordict.set(key, values.reshape(*batch_size, values.shape[-1]))

    def _write_nothing(
        self, tensordict: TensorDictBase, like: torch.Tensor
    ) -> TensorDictBase:
        width = self._box(tensordict).width
        if width is None:
            raise RuntimeError(
                "No frame is to be labelled, and nothing tells the width of the labels "
                f"that are to be zero: the frames hold no {self.action_key!r}. Give "
                "low= or high= with one entry per action dimension."
            )
        zeros = torch.zeros(*like.shape, width, device=like.device)
        tensordict.set(self.teacher_action_key, zeros)
        tensordict.set(self.teacher_mask_key, torch.zeros_like(like).unsqueeze(-1))
        if self.teacher_std_key is not None:
            tensordict.set(self.teacher_std_key, zeros.clone())
        return tensordict

    # ------------------------------------------------------------------ shapes, specs
    def _env(self) -> EnvBase | None:
        """The env around this transform; ``container`` raises where there is none."""
        holder: Any = self
        while holder is not None and not isinstance(holder, EnvBase):
            reference = holder.__dict__.get("_container")
            holder = None if reference is None else reference()
        return holder

    def _box(self, tensordict: TensorDictBase | None = None) -> ActionBox:
        """The action box of the env, or what arguments and frames tell about it."""
        if self._env() is not None:
            if self._env_box is None:
                self._env_box = ActionBox.from_spec(
                    self.parent.full_action_spec, self.action_key, *self._limits
                )
            return self._env_box
        action = None if tensordict is None else tensordict.get(self.action_key, None)
        if action is None:
            return self._limits_box
        return ActionBox(action.shape[-1], *self._limits)

    @staticmethod
    def _everything(tensordict: TensorDictBase) -> torch.Tensor:
        device = tensordict.device
        if device is None:
            first = next(iter(tensordict.values(True, True)), None)
            device = getattr(first, "device", None)
        return torch.ones(tensordict.batch_size, dtype=torch.bool, device=device)

    def _check_order(self) -> None:
        chain = getattr(self._env(), "transform", None)
        after = False
        for transform in chain if isinstance(chain, Compose) else ():
            if after and isinstance(transform, StepCounter) and transform.max_steps:
                raise ValueError(
                    "StepCounter(max_steps=...) ends episodes and comes after "
                    "TeacherActionTransform, which would ask about, and label, "
                    "terminal observations. Put the StepCounter first."
                )
            after = after or transform is self

    def __repr__(self) -> str:
        keys = self.in_keys if self._in_keys_given else "those of the teacher"
        return (
            f"{type(self).__name__}({self._handle.name}, in_keys={keys}, "
            f"out_keys={self.out_keys})"
        )

    # ------------------------------------------------------------------ saving
    def get_extra_state(self) -> dict[str, Any]:
        """Generator, counters and chunks, as part of the ``state_dict``."""
        return {
            "generator": self._shared.generator.get_state(),
            "stats": dict(self.stats()),
            "chunks": {} if self._cache is None else self._cache.state(),
        }

    def set_extra_state(self, state: dict[str, Any]) -> None:
        """Takes over what :meth:`get_extra_state` returned."""
        self._shared.generator.set_state(state["generator"].cpu())
        self._shared.stats.load(state["stats"])
        if self._cache is not None:
            self._cache.load(state["chunks"])


def _refuse_native_autoreset() -> NoReturn:
    raise RuntimeError(
        "TeacherActionTransform does not work with native auto-reset: such an env "
        "replaces the terminal observation by the first one of the next episode, and "
        "RPD bootstraps from the terminal one. Build the env with "
        "native_autoreset=False."
    )
