# Copyright (c) the torchrl_rpd authors.
#
# This source code is licensed under the MIT license found in the
# LICENSE file in the root directory of this source tree.
"""Decides which rows get a label, and obtains it."""

from __future__ import annotations

import copy
from collections.abc import Sequence
from typing import Any

import torch
from tensordict import TensorDictBase
from tensordict.utils import NestedKey

from torchrl_rpd.transforms._box import ActionBox
from torchrl_rpd.transforms._chunk_cache import ChunkCache
from torchrl_rpd.transforms._deferred import LabelQueue
from torchrl_rpd.transforms._history import HistoryWindow
from torchrl_rpd.transforms._labels import LabelRules
from torchrl_rpd.transforms._query import TeacherQuery
from torchrl_rpd.transforms._scatter import LabelKeys, scatter_labels, write_nothing
from torchrl_rpd.transforms._stats import QueryStats
from torchrl_rpd.transforms._tickets import redeem_tickets, write_tickets


class Shared:
    """What a labeller and its clones (TorchRL makes them unasked) have in common.

    Args:
        seed (int): of the generator that draws which rows are asked about.
        deferred (bool): whether labels of envs are made in the background.
    """

    def __init__(self, seed: int, deferred: bool) -> None:
        # In shared memory, for processes that are forked.
        self._enabled = torch.ones((), dtype=torch.bool).share_memory_()
        self.stats = QueryStats()
        self.generator = torch.Generator().manual_seed(seed)
        self.queue = LabelQueue() if deferred else None

    def finish(self) -> None:
        """Waits for what is under way in the background."""
        if self.queue is not None:
            self.queue.drain()

    @property
    def enabled(self) -> bool:
        """Whether the teacher is asked at all."""
        return bool(self._enabled)

    @enabled.setter
    def enabled(self, value: bool) -> None:
        self._enabled.fill_(bool(value))


class Labeller:
    """Labels rows of a tensordict, with what it remembers of the envs they come from.

    Args:
        ask (TeacherQuery): how the teacher is asked.
        rules (LabelRules): what becomes of its answers.
        keys (LabelKeys): where they go.

    Keyword Args:
        query_fraction (float): the probability with which a row is asked about.
        always_query_key (NestedKey, optional): rows that are asked about in any case.
        replan_interval (int): for how many steps of an env a chunk is followed.
        history_window (int, optional): how many observations of an env the teacher is
            shown; None for as many as it says.
        history_keys (sequence of NestedKey, optional): of which entries; likewise.
        seed (int): see :class:`Shared`.

    Raises:
        ValueError: for contradicting or out-of-range arguments.
    """

    def __init__(
        self,
        ask: TeacherQuery,
        rules: LabelRules,
        keys: LabelKeys,
        *,
        query_fraction: float,
        always_query_key: NestedKey | None,
        replan_interval: int,
        history_window: int | None,
        history_keys: Sequence[NestedKey] | None,
        seed: int,
    ) -> None:
        if not 0.0 <= query_fraction <= 1.0:
            raise ValueError(f"query_fraction must be in [0, 1], got {query_fraction}.")
        if replan_interval < 1:
            raise ValueError(
                f"replan_interval must be at least 1, got {replan_interval}."
            )
        if replan_interval > 1 and (query_fraction < 1 or keys.std is not None):
            raise ValueError(
                "replan_interval > 1 goes with neither query_fraction < 1 nor "
                "teacher_std_key: a chunk is one plan that is followed as a whole."
            )
        if history_window is not None and history_window < 1:
            raise ValueError(
                f"history_window must be at least 1, got {history_window}."
            )
        self.shared = Shared(seed, deferred=keys.ticket is not None)
        self.query_fraction = query_fraction
        self.always_query_key = always_query_key
        self.replan_interval = replan_interval
        self._ask = ask
        self._rules = rules
        self._keys = keys
        self._history_window = history_window
        self._history_keys = history_keys
        self._start_over()

    def _start_over(self) -> None:
        interval = self.replan_interval
        self._cache = ChunkCache(interval) if interval > 1 else None
        self._history: HistoryWindow | None = None
        self._history_known = False  # it takes the teacher to know
        self._num_envs: int | None = None
        self._loaded: dict[str, Any] = {}
        # Of every env the highest ticket whose label was fetched.
        self._fetched = torch.zeros(0, dtype=torch.int64)

    def clone(self) -> Labeller:
        """One for other envs, with the same teacher, switch and counters."""
        out = copy.copy(self)
        out._start_over()
        return out

    @property
    def converts(self) -> bool:
        """Whether the teacher's actions are converted to those of the env."""
        return self._rules.action_transform is not None

    # ------------------------------------------------------------------ which rows
    def label_env(
        self,
        tensordict: TensorDictBase,
        candidates: torch.Tensor,
        box: ActionBox,
        *,
        observed: torch.Tensor | None,
        fresh: bool,
    ) -> TensorDictBase:
        """Labels what envs have just shown.

        Args:
            tensordict (TensorDictBase): ``[*B]``; written into.
            candidates (torch.Tensor): which rows to label, bool ``[*B]``.
            box (ActionBox): the env's.

        Keyword Args:
            observed (torch.Tensor, optional): which rows show something new, bool
                ``[*B]``; None for all.
            fresh (bool): whether episodes start in these rows.

        Raises:
            RuntimeError: if the number of envs changed and something is remembered.
        """
        num_envs = tensordict.batch_size.numel()
        self._begin(num_envs)
        self.shared.stats.see(candidates)
        if not self.shared.enabled:
            # Nobody looks: what comes later has a gap here.
            self.shared.finish()
            self._forget()
            write_nothing(tensordict, self._keys, candidates, box)
            if self._keys.ticket is not None:
                write_tickets(tensordict, self._keys.ticket, None, candidates.device)
            return tensordict
        history = self._resolve_history()
        if self.shared.queue is None:
            return self._label(tensordict, candidates, observed, box, fresh)
        also = () if history is None else history.keys
        return self._defer(
            self.shared.queue, tensordict, candidates, observed, box, fresh, also
        )

    def _defer(
        self,
        queue: LabelQueue,
        tensordict: TensorDictBase,
        candidates: torch.Tensor,
        observed: torch.Tensor | None,
        box: ActionBox,
        fresh: bool,
        also: Sequence[NestedKey],
    ) -> TensorDictBase:
        """Writes tickets; what is seen now is labelled in the background."""
        # Built here: that draws from the global generator, as whoever steps the envs.
        _ = self._ask.handle.teacher
        # Copies of all: an env may show its next picture in the same memory.
        seen = self._ask.observed(tensordict, also).clone()
        if self.query_fraction < 1.0 and self.always_query_key is not None:
            seen.set(self.always_query_key, self._always(tensordict).clone())
        rows = candidates.clone()
        shown = rows if observed is candidates else observed
        if shown is not None and shown is not rows:
            shown = shown.clone()

        def work() -> TensorDictBase:
            labelled = self._label(seen, rows, shown, box, fresh)
            return labelled.select(*self._keys.of_labels).reshape(-1)

        tickets = queue.submit(work, self._fetched, candidates.device)
        write_nothing(tensordict, self._keys, candidates, box)
        assert self._keys.ticket is not None
        return write_tickets(tensordict, self._keys.ticket, tickets, candidates.device)

    def redeem(self, tensordict: TensorDictBase) -> TensorDictBase:
        """Replaces the tickets of frames by their labels; written into.

        Raises:
            RuntimeError: see :meth:`LabelQueue.fetch`.
        """
        assert self.shared.queue is not None and self._keys.ticket is not None
        return redeem_tickets(
            tensordict, self._keys.ticket, self._keys.of_labels, self.shared.queue
        )

    def _label(
        self,
        tensordict: TensorDictBase,
        candidates: torch.Tensor,
        observed: torch.Tensor | None,
        box: ActionBox,
        fresh: bool,
    ) -> TensorDictBase:
        num_envs, history = tensordict.batch_size.numel(), self._history
        rows = _indices(candidates)
        if history is not None:
            if observed is None:
                observed_rows = torch.arange(num_envs)
            else:
                observed_rows = rows if observed is candidates else _indices(observed)
            history.record(tensordict, observed_rows, fresh=fresh)
            complete = history.complete(rows)
            self.shared.stats.incomplete += rows.numel() - int(complete.sum())
            rows = rows[complete]
        rows = self._draw(tensordict, rows)
        if not rows.numel():
            return write_nothing(tensordict, self._keys, candidates, box)
        if self._cache is None:
            action, std = self._fresh_answers(tensordict, rows, history)
            return self._write(tensordict, candidates, rows, action, std, box)
        move = self._cache.start if fresh else self._cache.advance
        due = move(rows, num_envs)
        if due.numel():
            self._cache.store(
                due, self._ask(tensordict, due, self.shared.stats, history)[0]
            )
        action = self._cache.read(rows)
        return self._write(tensordict, candidates, rows, action, None, box)

    def label_frames(
        self, tensordict: TensorDictBase, candidates: torch.Tensor, box: ActionBox
    ) -> TensorDictBase:
        """Labels frames without an order, ``[*B]``; written into.

        Raises:
            ValueError: if labels depend on the steps before.
        """
        if self.replan_interval > 1:
            raise ValueError(
                "replan_interval > 1 follows each env step by step and needs the "
                "transform in the env; on stored frames use replan_interval=1."
            )
        self.shared.finish()
        self.shared.stats.see(candidates)
        if not self.shared.enabled:
            return write_nothing(tensordict, self._keys, candidates, box)
        history = self._resolve_history()
        if history is not None:
            raise ValueError(
                f"The teacher ({self._ask.handle.name}) is shown the last "
                f"{history.window} observations of {history.keys}: history follows "
                "each env step by step and needs the transform in the env, "
                "TransformedEnv(env, TeacherActionTransform(...)). On stored frames "
                "(postproc, replay buffer, plain tensordict) use a teacher without "
                "history, or history_window=1 if it copes with that."
            )
        rows = self._draw(tensordict, _indices(candidates))
        if not rows.numel():
            return write_nothing(tensordict, self._keys, candidates, box)
        action, std = self._fresh_answers(tensordict, rows, None)
        return self._write(tensordict, candidates, rows, action, std, box)

    def _draw(self, tensordict: TensorDictBase, rows: torch.Tensor) -> torch.Tensor:
        if self.query_fraction == 1.0:
            return rows
        chance = torch.rand(rows.numel(), generator=self.shared.generator)
        drawn = chance < self.query_fraction
        if self.always_query_key is not None:
            drawn |= self._always(tensordict).reshape(-1).cpu()[rows]
        return rows[drawn]

    def _always(self, tensordict: TensorDictBase) -> torch.Tensor:
        assert self.always_query_key is not None
        wanted: torch.Tensor | None = tensordict.get(self.always_query_key, None)
        if wanted is None:
            raise KeyError(
                f"always_query_key={self.always_query_key!r} is not there; found "
                f"{sorted(tensordict.keys(True, True), key=str)}. Place what "
                "writes it, e.g. JumpStartTransform, before this transform."
            )
        return wanted

    # ------------------------------------------------------------------ answers
    def _fresh_answers(
        self,
        tensordict: TensorDictBase,
        rows: torch.Tensor,
        history: HistoryWindow | None,
    ) -> tuple[torch.Tensor, torch.Tensor | None]:
        chunk, std = self._ask(tensordict, rows, self.shared.stats, history)
        if self._keys.std is None:
            return chunk[:, 0], None
        if std is None:
            raise KeyError(
                f"teacher_std_key={self._keys.std!r} asks for a standard deviation, "
                f"but the teacher ({self._ask.handle.name}) writes neither "
                "'teacher_std' nor ('vla_action', 'std')."
            )
        return chunk[:, 0], std

    def _write(
        self,
        tensordict: TensorDictBase,
        candidates: torch.Tensor,
        rows: torch.Tensor,
        raw: torch.Tensor,
        std: torch.Tensor | None,
        box: ActionBox,
    ) -> TensorDictBase:
        device, name = candidates.device, self._ask.handle.name
        labels = self._rules(raw.to(device), std, box.to(device), name=name)
        self.shared.stats.emit(labels.usable, labels.clipped, labels.no_op)
        return scatter_labels(tensordict, self._keys, rows, labels)

    # ------------------------------------------------------------------ memory
    def _resolve_history(self) -> HistoryWindow | None:
        """The windows, if the teacher looks back; asks it at the first call."""
        if self._history_known:
            return self._history
        handle = self._ask.handle
        window, keys = self._history_window, self._history_keys
        if window is None:
            window = handle.history_window
        if window > 1:
            keys = handle.history_keys if keys is None else list(keys)
            if not keys:
                raise ValueError(
                    f"history_window={window} needs history_keys=: the teacher "
                    f"({handle.name}) does not say of which entries it is shown the "
                    "history."
                )
            self._history = HistoryWindow(window, keys)
            self._history.load(self._loaded.get("history", {}))
        self._history_known, self._loaded = True, {}
        return self._history

    def _begin(self, num_envs: int) -> None:
        """Holds the number of envs; memory from a state_dict counts from here on."""
        if self._num_envs is None:
            if int(self._loaded.get("num_envs", num_envs)) != num_envs:
                self._loaded = {}
            if self._cache is not None:
                self._cache.load(self._loaded.get("chunks", {}))
            self._fetched = torch.zeros(num_envs, dtype=torch.int64)
        elif self._num_envs != num_envs and (
            self._cache is not None
            or self._history is not None
            or self.shared.queue is not None
        ):
            raise RuntimeError(
                f"The transform follows {self._num_envs} environments (chunks, history "
                f"or deferred labels), but {num_envs} were stepped. An env whose batch "
                "size changes from step to step needs replan_interval=1, "
                "deferred=False and a teacher without history."
            )
        self._num_envs = num_envs

    def _forget(self) -> None:
        if self._cache is not None:
            self._cache.invalidate()
        if self._history is not None:
            self._history.forget()
        self._loaded = {}

    def state(self) -> dict[str, Any]:
        """Chunks and history of the envs, for a ``state_dict``."""
        if self._num_envs is None:
            return self._loaded
        history = self._loaded.get("history", {})
        return {
            "num_envs": self._num_envs,
            "chunks": {} if self._cache is None else self._cache.state(),
            "history": history if self._history is None else self._history.state(),
        }

    def load(self, state: dict[str, Any]) -> None:
        """Takes over what :meth:`state` returned, before the first step.

        Later, the envs are in the middle of episodes that are not the saved ones (or
        those, if they were restored as well; nothing tells): what is remembered is then
        given up, so that no label can be stale.
        """
        if self._num_envs is None:
            self._loaded = state
        else:
            self._forget()


def _indices(mask: torch.Tensor) -> torch.Tensor:
    """Flat indices of the True entries, on the CPU: one synchronisation."""
    return mask.reshape(-1).cpu().nonzero().squeeze(-1)
