# Copyright (c) the torchrl_rpd authors.
#
# This source code is licensed under the MIT license found in the
# LICENSE file in the root directory of this source tree.
"""Asks a teacher about rows, the way that TeacherActionTransform does, and rewinds it."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import torch
from tensordict import TensorDictBase, is_tensor_collection, unravel_key
from tensordict.utils import NestedKey
from torch import Tensor, nn
from torchrl.data.vla import ACTION_CHUNK_KEY

__all__ = ["PAD_MASK_KEY", "Questioner"]

PAD_MASK_KEY = "timestep_pad_mask"
_STD_KEYS: tuple[NestedKey, ...] = ("teacher_std", ("vla_action", "std"))
_MEAN_KEY: NestedKey = ("vla_action", "mean")
# Entries that are no observation, for a teacher that does not say what it reads.
_NOT_OBSERVED = (
    *("action", "collector", "done", "next", "reward", "terminated", "truncated"),
    *("_reset", "_step", "teacher_action", "teacher_mask", "teacher_std"),
)


class Questioner:
    """Holds a teacher and how to ask it.

    Args:
        teacher (callable): a TensorDict module, or a function of a tensordict.

    Keyword Args:
        in_keys (sequence of NestedKey, optional): what it reads; its own by default.
        action_transform (callable, optional): raw actions ``[n, A']`` -> ``[n, A]``.
        rewind (callable, optional): puts a stochastic teacher back to one state; by
            default through the teacher's generator, where it has one.

    Examples:
        >>> from tensordict import TensorDict
        >>> ask = Questioner(lambda td: 2 * td["observation"])
        >>> ask(TensorDict({"observation": torch.ones(3, 2)}, [3])).shape
        torch.Size([3, 1, 2])
    """

    def __init__(
        self,
        teacher: Callable[[TensorDictBase], Any],
        *,
        in_keys: Sequence[NestedKey] | None = None,
        action_transform: Callable[[Tensor], Tensor] | None = None,
        rewind: Callable[[], object] | None = None,
    ) -> None:
        if not callable(teacher):
            raise TypeError(
                "A teacher is a TensorDict module or a callable that maps a tensordict "
                f"to an action tensor, got {type(teacher).__name__}."
            )
        self.teacher: Any = teacher
        self.name = getattr(teacher, "__qualname__", type(teacher).__name__)
        keys = in_keys if in_keys is not None else getattr(teacher, "in_keys", None)
        self.in_keys = [unravel_key(key) for key in keys] if keys else None
        self.window: int = getattr(teacher, "history_window", None) or 1
        history = getattr(teacher, "history_keys", None) or ()
        self.history_keys = [unravel_key(key) for key in history]
        self.finite = True
        self._transform = action_transform
        self._rewind = rewind if rewind is not None else _own_rewind(teacher)

    def rewind(self) -> None:
        """Puts a stochastic teacher back to where it was at the start."""
        if self._rewind is not None:
            self._rewind()

    def __call__(self, rows: TensorDictBase, *, rewind: bool = True) -> Tensor:
        """The action chunks ``[n, H, A]`` for rows ``[n]``, on the CPU, float32."""
        if rewind:
            self.rewind()
        scratch = rows.copy()
        device = _single_device(self.teacher)
        if device is not None and device != scratch.device:
            scratch = scratch.to(device)
        with torch.no_grad():
            raw = self._read(self.teacher(scratch), rows.batch_size[0])
        self.finite &= bool(raw.isfinite().all())
        actions = raw.flatten(0, 1)
        if self._transform is not None:
            actions = self._transform(actions)
        return actions.unflatten(0, raw.shape[:2]).to("cpu", torch.float32)

    def observed(self, tensordict: TensorDictBase) -> TensorDictBase:
        """What the teacher reads of ``tensordict``, without its windows."""
        keys = self.in_keys
        if keys is None:
            return tensordict.exclude(*_NOT_OBSERVED)
        there = tensordict.keys(include_nested=True)
        wanted = [key for key in keys if key != PAD_MASK_KEY or key in there]
        missing = [key for key in wanted if key not in there]
        if missing:
            found = sorted(there, key=str)
            raise KeyError(
                f"{self.name} reads {missing}, which is not there; found {found}. Name "
                "the right entries with in_keys=, or use an environment that has them."
            )
        if self.window > 1 and PAD_MASK_KEY in there:
            wanted.append(PAD_MASK_KEY)
        return tensordict.select(*wanted)

    def _read(self, out: Any, rows: int) -> Tensor:
        where = "returned"
        if is_tensor_collection(out):
            key = self._action_key()
            where, out = f"wrote under {key!r}", out.get(key, None)
            chunk = key == ACTION_CHUNK_KEY
        else:
            chunk = False
        shape = list(getattr(out, "shape", ()))
        if (
            not isinstance(out, Tensor)
            or len(shape) != 2 + chunk
            or shape[0] != rows
            or 0 in shape
        ):
            raise ValueError(
                f"{self.name} {where} {type(out).__name__} of shape {shape} for {rows} "
                f"rows; expected [{rows}, A], or chunks [{rows}, H, A] under "
                f"{ACTION_CHUNK_KEY!r}."
            )
        return out if chunk else out.unsqueeze(1)

    def _action_key(self) -> NestedKey:
        declared = getattr(self.teacher, "out_keys", None) or (ACTION_CHUNK_KEY,)
        keys = [unravel_key(key) for key in declared]
        if ACTION_CHUNK_KEY in keys:
            return ACTION_CHUNK_KEY
        keys = [key for key in keys if key not in (*_STD_KEYS, _MEAN_KEY)]
        if len(keys) != 1:
            raise KeyError(
                f"{self.name} has the out_keys {keys}: which one is the action? "
                f"Expected {ACTION_CHUNK_KEY!r} among them, or a single key."
            )
        return keys[0]


def _own_rewind(teacher: Any) -> Callable[[], object] | None:
    """How to rewind a teacher with a generator of its own; None without one."""
    holder = teacher
    if not (hasattr(holder, "get_rng_state") and hasattr(holder, "set_rng_state")):
        holder = getattr(teacher, "generator", None)
        if isinstance(holder, torch.Generator):
            generator, start = holder, holder.get_state()
            return lambda: generator.set_state(start)
        return None
    state = holder.get_rng_state()
    return lambda: holder.set_rng_state(state)


def _single_device(teacher: Any) -> torch.device | None:
    """Where a module lives; None for functions and modules spread over devices."""
    if not isinstance(teacher, nn.Module):
        return None
    devices = {p.device for p in teacher.parameters()}
    return devices.pop() if len(devices) == 1 else None
