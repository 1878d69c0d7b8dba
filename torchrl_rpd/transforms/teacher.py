# Copyright (c) the torchrl_rpd authors.
#
# This source code is licensed under the MIT license found in the
# LICENSE file in the root directory of this source tree.
"""Labels what the student sees with the actions of a teacher."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any, Literal, NoReturn

import torch
from tensordict import TensorDictBase, unravel_key
from tensordict.utils import NestedKey
from torchrl.data.tensor_specs import Categorical, Composite, TensorSpec, Unbounded

from torchrl_rpd.transforms._base import LabellingTransform
from torchrl_rpd.transforms._box import ActionBox, Bound
from torchrl_rpd.transforms._fit import check_fit
from torchrl_rpd.transforms._handle import Teacher, TeacherHandle
from torchrl_rpd.transforms._labeller import Labeller
from torchrl_rpd.transforms._labels import LabelRules
from torchrl_rpd.transforms._placement import (
    check_placement,
    enclosing_env,
    raise_native_autoreset,
    refuse_jump_start,
    refuse_native_autoreset,
)
from torchrl_rpd.transforms._query import TeacherQuery
from torchrl_rpd.transforms._scatter import LabelKeys


class TeacherActionTransform(LabellingTransform):
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
      get none. Appended to a **replay buffer**, it labels frames when they are added
      and leaves them as they are when they are sampled.

    Or in both, with ``deferred=True``: ``Collector(TransformedEnv(env, transform), ...,
    postproc=transform)``. The env then goes on while one background thread asks the
    teacher, step by step in the same order; the ``postproc`` waits for the rest and
    writes the labels. They are those of ``deferred=False``, memory, ``query_fraction``
    and counters included, if the teacher draws from no global generator. Collecting and
    labelling take as long as the slower of the two, not their sum, where the teacher
    works on another device or machine and leaves Python alone meanwhile.

    A deterministic teacher without memory gives the same labels in every placement
    (give ``low`` and ``high`` where the env is not there to tell its action box:
    without them, labels of frames are not clipped). Teachers that look back
    (``history_window``) or are followed for several steps (``replan_interval``) work in
    an env only. What is remembered of every env for them is exact, whatever the pattern
    of episode ends, and part of the ``state_dict``; where observations were missed
    (while :attr:`enabled` was False, or after loading a state into running episodes)
    rows are not labelled before their history is whole again.

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
            have the transform inside the workers of a ``SerialEnv``, ``ParallelEnv`` or
            collector. Each worker then builds a teacher of its own.
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
        always_query_key (NestedKey, optional): ``[*B, 1]`` bool, written before by
            another transform: frames that are labelled whatever ``query_fraction``
            says, e.g. ``"jump_start"``, where the teacher acts. Defaults to ``None``.
        replan_interval (int, optional): for how many steps a chunk is followed before
            the teacher is asked again; more than 1 needs a chunk teacher and an env
            (not postproc). Labels of later chunk entries were planned from an earlier
            observation, for the teacher's own motion. Defaults to ``1``.
        history_window (int, optional): how many observations the teacher is shown, in
            an env only. With ``W > 1`` each entry of ``history_keys`` is given to it as
            ``[n, W, ...]``, oldest first, next to ``"timestep_pad_mask"``, bool
            ``[n, W]``: False where the window reaches back beyond the start of the
            episode, whose first observation is repeated there. With ``1`` nothing is
            stacked. Defaults to ``None``: the attribute ``history_window`` of the
            teacher, ``1`` where it has none.
        history_keys (sequence of NestedKey, optional): the entries to stack. Defaults
            to ``None``: the attribute ``history_keys`` of the teacher.
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
        no_op_norm (float, optional): labels of which all entries but the last (the
            gripper's) have a smaller Euclidean norm are masked out and counted: where a
            teacher freezes, its label says nothing, and a student that imitates it
            freezes as well. OpenVLA leaves such steps out of its demonstrations, with
            ``1e-4`` (its ``regenerate_libero_dataset.py``, there only if the gripper
            stays as it is, too). Not for teachers that hold the arm still while the
            gripper moves. Defaults to ``None``: every label counts.
        seed (int, optional): seed of the generator that ``query_fraction`` draws from
            (torch's global one is left alone; its state is in ``state_dict``). Give
            every worker its own, or all of them draw the same. Defaults to ``0``.
        deferred (bool, optional): whether the labels of envs are made in the background.
            Until they are fetched, frames have zeros, mask False and a ticket;
            ``("next", ...)`` is then not labelled at all. The transform must be in the
            process of the collector, around its worker processes if there are any. An
            error of the teacher is raised where labels are fetched. Frames from
            elsewhere are labelled at once. Defaults to ``False``.
        teacher_ticket_key (NestedKey, optional): the tickets, ``[*B, 1]`` int64, taken
            out when labels are fetched. Defaults to ``"teacher_ticket"``.

    Raises:
        ValueError: for contradicting or out-of-range arguments; for labels of a wrong
            shape (in an env before the first step, also from what the teacher says of
            itself: ``action_dim``, ``chunk_size``); for stored frames with a teacher
            that looks back or is followed; in an env that has such entries already, or
            in which a transform that ends episodes (``StepCounter``) comes later.
        KeyError: if the teacher needs a key that is not there.
        RuntimeError: in an env with native auto-reset (it overwrites the terminal
            observations that RPD bootstraps from), with an in-process teacher inside a
            batched env's workers, and on sending an in-process teacher to another
            process. With ``deferred=True`` also if the teacher failed, if labels are
            never fetched (:attr:`max_outstanding`) or are those of another transform,
            and inside worker processes.

    .. note:: Place it after every transform that changes what the teacher reads or that
        ends episodes, e.g. ``Compose(StepCounter(50), TeacherActionTransform(...))``.
        Labels are in the action convention of the whole env, in which the student acts,
        also where an action transform comes later.

    .. note:: Inside the workers of a ``ParallelEnv`` the transform is reached through
        the env, ``env.transform.set_enabled(False)``, ``env.transform.stats()``; inside
        those of a collector it is not reached: have it outside to switch it off.

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

        While the teacher is at work, the env goes on:

        >>> from torchrl.collectors import Collector
        >>> from torchrl.envs import TransformedEnv
        >>> from torchrl.testing.mocking_classes import ContinuousActionVecMockEnv
        >>> label = TeacherActionTransform(lambda td: td["observation"], deferred=True)
        >>> env = TransformedEnv(ContinuousActionVecMockEnv(), label)
        >>> collector = Collector(
        ...     env, None, frames_per_batch=6, total_frames=6, postproc=label
        ... )
        >>> [bool(batch["teacher_mask"].all()) for batch in collector]
        [True]
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
        always_query_key: NestedKey | None = None,
        replan_interval: int = 1,
        history_window: int | None = None,
        history_keys: Sequence[NestedKey] | None = None,
        action_transform: Callable[[torch.Tensor], torch.Tensor] | None = None,
        clip_labels: bool = True,
        low: Bound | None = None,
        high: Bound | None = None,
        on_non_finite: Literal["mask", "raise"] = "mask",
        no_op_norm: float | None = None,
        seed: int = 0,
        deferred: bool = False,
        teacher_ticket_key: NestedKey = "teacher_ticket",
    ) -> None:
        keys = LabelKeys(
            unravel_key(teacher_action_key),
            unravel_key(teacher_mask_key),
            None if teacher_std_key is None else unravel_key(teacher_std_key),
            unravel_key(teacher_ticket_key) if deferred else None,
        )
        out_keys = [key for key in keys if key is not None]
        handle = TeacherHandle(
            teacher, factory=teacher_factory, always_finite=on_non_finite == "raise"
        )
        labeller = Labeller(
            TeacherQuery(
                handle,
                in_keys=in_keys,
                not_in_keys=out_keys,
                max_batch_size=max_batch_size,
            ),
            LabelRules(
                action_transform,
                clip=clip_labels,
                on_non_finite=on_non_finite,
                no_op_norm=no_op_norm,
            ),
            keys,
            query_fraction=query_fraction,
            always_query_key=(
                None if always_query_key is None else unravel_key(always_query_key)
            ),
            replan_interval=replan_interval,
            history_window=history_window,
            history_keys=history_keys,
            seed=seed,
        )
        super().__init__(
            handle,
            labeller,
            in_keys=None if in_keys is None else list(in_keys),
            out_keys=out_keys,
        )
        self._in_keys_given = in_keys is not None
        self.teacher_action_key = keys.action
        self.teacher_mask_key = keys.mask
        self.teacher_std_key = keys.std
        self.deferred = deferred
        self.teacher_ticket_key = unravel_key(teacher_ticket_key)
        self.action_key = unravel_key(action_key)
        self._limits = (low, high)
        self._limits_box = ActionBox(None, low, high)
        self._env_box: ActionBox | None = None

    # ------------------------------------------------------------------ in an env
    def _reset(
        self, tensordict: TensorDictBase, tensordict_reset: TensorDictBase
    ) -> TensorDictBase:
        reset = tensordict.get("_reset", None)
        if reset is None:
            reset = _everything(tensordict_reset)
        rows = reset.reshape(tensordict_reset.batch_size)
        return self._labeller.label_env(
            tensordict_reset, rows, self._box(), observed=rows, fresh=True
        )

    def _step(
        self, tensordict: TensorDictBase, next_tensordict: TensorDictBase
    ) -> TensorDictBase:
        batch_size = next_tensordict.batch_size
        done = next_tensordict.get("done", None)
        if done is None:
            raise KeyError(
                "TeacherActionTransform follows the episodes of an env by its root "
                "entry 'done', which this env does not have."
            )
        rows = ~done.reshape(batch_size)
        stepped = tensordict.get("_step", None)
        if stepped is not None:
            stepped = stepped.reshape(batch_size)
            rows = rows & stepped
        next_tensordict = self._labeller.label_env(
            next_tensordict, rows, self._box(), observed=stepped, fresh=False
        )
        if stepped is not None:
            # Rows that stand still in this step keep what they have.
            for key in self.out_keys:
                old = tensordict.get(key, None)
                if old is not None:
                    new = next_tensordict.get(key)
                    kept = torch.where(stepped.unsqueeze(-1), new, old)
                    next_tensordict.set(key, kept)
        return next_tensordict

    def _reset_on_native_autoreset(
        self, tensordict: TensorDictBase, tensordict_reset: TensorDictBase
    ) -> NoReturn:
        raise_native_autoreset()

    def _check_batched_worker_compat(self) -> None:
        if self.deferred:
            raise RuntimeError(
                "TeacherActionTransform(..., deferred=True) cannot live inside a "
                "SerialEnv/ParallelEnv worker: its labels are fetched where the batches "
                "arrive. Place it outside, Collector(TransformedEnv(ParallelEnv(N, "
                "make_env), transform), ..., postproc=transform)."
            )
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
        check_placement(self)
        if self.deferred:
            refuse_jump_start(self)
        there = observation_spec.keys(True, True)
        taken = [key for key in self.out_keys if key in there]
        if taken:
            raise ValueError(
                f"The env has {taken} already, from another TeacherActionTransform or "
                "of its own. Name other entries with teacher_action_key=, "
                "teacher_mask_key= (and teacher_ticket_key=)."
            )
        width = self._box().width
        if self._handle.in_process:
            # (One from a factory is built, and found not to fit, at the first reset.)
            check_fit(
                self._handle.teacher,
                observation_spec,
                width,
                name=self._handle.name,
                converted=self._labeller.converts,
                replan_interval=self.replan_interval,
            )
        shape, device = observation_spec.shape, observation_spec.device
        label = Unbounded(shape=(*shape, width), dtype=torch.float32, device=device)
        observation_spec[self.teacher_action_key] = label
        observation_spec[self.teacher_mask_key] = Categorical(
            2, shape=(*shape, 1), dtype=torch.bool, device=device
        )
        if self.teacher_std_key is not None:
            observation_spec[self.teacher_std_key] = label.clone()
        if self.deferred:
            observation_spec[self.teacher_ticket_key] = Unbounded(
                shape=(*shape, 1), dtype=torch.int64, device=device
            )
        return observation_spec

    def set_container(self, container: Any) -> None:
        """Enters an env or a Compose; refuses envs with native auto-reset."""
        super().set_container(container)
        refuse_native_autoreset(enclosing_env(self))

    def empty_cache(self) -> None:
        """Forgets what was derived from the env's specs."""
        super().empty_cache()
        self._env_box = None

    # ------------------------------------------------------------------ outside of one
    def forward(self, tensordict: TensorDictBase) -> TensorDictBase:
        """Labels every frame of a tensordict ``[*B]``, ``[*B, T]`` or any other shape.

        Args:
            tensordict (TensorDictBase): frames; left as they are.

        Returns:
            a shallow copy with the labels. With ``deferred=True``, frames from its env
            get the labels that were asked for there.
        """
        if self._has_tickets(tensordict):
            return self._labeller.redeem(tensordict.copy())
        if self._labels_on_extend and self.teacher_mask_key in tensordict.keys(True):
            return tensordict
        return self._label_frames(tensordict)

    def _inv_call(self, tensordict: TensorDictBase) -> TensorDictBase:
        if enclosing_env(self) is not None:
            return tensordict
        # Only replay buffers call this without an env: on extend. What they hold is
        # labelled from now on.
        self._labels_on_extend = True
        if self._has_tickets(tensordict):
            return self._labeller.redeem(tensordict.copy())
        return self._label_frames(tensordict)

    def _has_tickets(self, tensordict: TensorDictBase) -> bool:
        return self.deferred and self.teacher_ticket_key in tensordict.keys(True)

    def _label_frames(self, tensordict: TensorDictBase) -> TensorDictBase:
        tensordict = tensordict.copy()
        valid = tensordict.get(("collector", "mask"), None)
        if valid is None:
            valid = _everything(tensordict)
        return self._labeller.label_frames(
            tensordict, valid.reshape(tensordict.batch_size), self._box(tensordict)
        )

    # ------------------------------------------------------------------ width, limits
    def _box(self, tensordict: TensorDictBase | None = None) -> ActionBox:
        """The action box of the env, or what arguments and frames tell about it."""
        env = enclosing_env(self)
        if env is not None:
            if self._env_box is None:
                # Of the whole env and not of the part before this transform: labels
                # stand beside the student's actions, which enter from outside.
                self._env_box = ActionBox.from_spec(
                    env.full_action_spec, self.action_key, *self._limits
                )
            return self._env_box
        action = None if tensordict is None else tensordict.get(self.action_key, None)
        if action is None:
            return self._limits_box
        return ActionBox(action.shape[-1], *self._limits)

    def __repr__(self) -> str:
        keys = self.in_keys if self._in_keys_given else "those of the teacher"
        return (
            f"{type(self).__name__}({self._handle.name}, in_keys={keys}, "
            f"out_keys={self.out_keys})"
        )


def _everything(tensordict: TensorDictBase) -> torch.Tensor:
    device = tensordict.device
    if device is None:
        first = next(iter(tensordict.values(True, True)), None)
        device = getattr(first, "device", None)
    return torch.ones(tensordict.batch_size, dtype=torch.bool, device=device)
