# Copyright (c) the torchrl_rpd authors.
#
# This source code is licensed under the MIT license found in the
# LICENSE file in the root directory of this source tree.
"""How a teacher is held and called, so that it never becomes part of an env."""

from __future__ import annotations

import os
from collections.abc import Callable, Sequence
from typing import Any

import torch
from tensordict import TensorDictBase, is_tensor_collection, unravel_key
from tensordict.utils import NestedKey
from torch import nn

ACTION_CHUNK_KEY: tuple[str, ...] = ("vla_action", "chunk")
STD_KEYS: tuple[NestedKey, ...] = ("teacher_std", ("vla_action", "std"))

# What a teacher may be: a module on tensordicts, or a function of one.
Teacher = Callable[[TensorDictBase], Any]


def _rebuild_handle(payload: bytes, always_finite: bool) -> TeacherHandle:
    import cloudpickle

    factory = cloudpickle.loads(payload)
    return TeacherHandle(factory=factory, always_finite=always_finite)


class TeacherHandle:
    """Holds one teacher, frozen, outside the module tree of whoever uses it.

    A plain object and not an :class:`~torch.nn.Module`: assigned to a module it adds
    no parameters, no ``state_dict`` entries, and it is not moved by ``.to()``. Copies
    (shallow and deep) share the teacher. Only a handle made from a factory works in
    another process, pickled or forked: the teacher is built again there.

    Args:
        teacher (callable, optional): the teacher itself.

    Keyword Args:
        factory (callable, optional): takes no argument and returns the teacher; called
            at the first use of the teacher.
        always_finite (bool): whether NaN in its answers is an error, which a teacher
            whose ``on_error`` is ``"mask"`` contradicts. Defaults to ``False``.

    Raises:
        ValueError: if not exactly one of both is given, or for that contradiction.
        TypeError: if either is not callable.
        RuntimeError: on pickling an in-process teacher, or using one after a fork.

    Examples:
        >>> import torch
        >>> from tensordict import TensorDict
        >>> handle = TeacherHandle(lambda td: td["observation"][:, :2])
        >>> chunk, std = handle(TensorDict({"observation": torch.ones(3, 4)}, [3]))
        >>> chunk.shape, std
        (torch.Size([3, 1, 2]), None)
    """

    def __init__(
        self,
        teacher: Teacher | None = None,
        *,
        factory: Callable[[], Teacher] | None = None,
        always_finite: bool = False,
    ) -> None:
        if (teacher is None) == (factory is None):
            raise ValueError(
                "Exactly one of teacher and teacher_factory is needed, got "
                f"{'neither' if teacher is None else 'both'}."
            )
        if factory is not None and not callable(factory):
            raise TypeError(
                "teacher_factory must be a callable without arguments that returns the "
                f"teacher, got {type(factory).__name__}."
            )
        self.crossed_process = False
        self._factory = factory
        self._process = os.getpid()
        self._always_finite = always_finite
        self._teacher = None if teacher is None else self._take(teacher)

    @property
    def in_process(self) -> bool:
        """Whether the teacher was handed over as an object (and cannot be pickled)."""
        return self._factory is None

    @property
    def name(self) -> str:
        """A name of the teacher for error messages; builds nothing."""
        if self._teacher is None:
            return f"the teacher of {_name(self._factory)}"
        return _name(self._teacher)

    @property
    def teacher(self) -> Teacher:
        """The teacher; built by the factory at the first access in each process."""
        if self._process != os.getpid():  # forked: weights and locks of the parent
            if self._factory is None:
                raise self._stays_here()
            self._teacher, self._process = None, os.getpid()
        if self._teacher is None:
            assert self._factory is not None
            # Building a network draws random weights: kept away from the global
            # generator, so that the student samples the same with every placement.
            with torch.random.fork_rng(devices=[]):
                self._teacher = self._take(self._factory())
        return self._teacher

    def _take(self, teacher: Any) -> Teacher:
        if self._always_finite and getattr(teacher, "on_error", None) == "mask":
            raise ValueError(
                f"{_name(teacher)} with on_error='mask' answers NaN when it cannot be "
                "reached, which on_non_finite='raise' makes an error. Use "
                "on_non_finite='mask' (the default), or on_error='raise'."
            )
        return _freeze(teacher)

    def get_rng_state(self) -> torch.Tensor | None:
        """The state of a stochastic teacher's own generator, None where it has none.

        Such a teacher has methods ``get_rng_state`` and ``set_rng_state``, or an
        attribute ``generator`` (:class:`torch.Generator`).
        """
        if self._teacher is None or self._process != os.getpid():
            return None  # not built yet: it has drawn nothing
        generator = _generator(self._teacher)
        if generator is None:
            return None
        get, _ = generator
        return get()

    def set_rng_state(self, state: torch.Tensor) -> None:
        """Has the teacher's generator go on from what :meth:`get_rng_state` returned.

        Raises:
            ValueError: if it has none.
        """
        generator = _generator(self.teacher)
        if generator is None:
            raise ValueError(
                f"A state of the teacher's generator was saved, but {self.name} has none."
            )
        _, set_state = generator
        set_state(state.cpu())

    @property
    def in_keys(self) -> list[NestedKey] | None:
        """The keys that the teacher says it reads, None where it says nothing."""
        keys = getattr(self.teacher, "in_keys", None)
        return [unravel_key(key) for key in keys] if keys else None

    @property
    def history_window(self) -> int:
        """How many observations the teacher wants to be shown, 1 if it says nothing."""
        return getattr(self.teacher, "history_window", None) or 1

    @property
    def history_keys(self) -> list[NestedKey]:
        """The entries of which it wants a history; empty if it says nothing."""
        return list(getattr(self.teacher, "history_keys", None) or ())

    def __call__(
        self, scratch: TensorDictBase
    ) -> tuple[torch.Tensor, torch.Tensor | None]:
        """Asks the teacher about the rows of a flat tensordict.

        Args:
            scratch (TensorDictBase): batch ``[n]``; the teacher may set entries in it,
                but not change the tensors that are there.

        Returns:
            the action chunk ``[n, H, A]`` (``H`` is 1 for a teacher of single actions)
            and the standard deviation ``[n, A]`` of its first action, or None.

        Raises:
            KeyError: if the teacher's output has no action.
            TypeError: if the teacher returned neither a tensor nor a tensordict.
            ValueError: if the action's shape is wrong.
        """
        teacher = self.teacher
        device = _single_device(teacher)
        if device is not None and device != scratch.device:
            scratch = scratch.to(device)
        with torch.no_grad():
            out = teacher(scratch)
        if isinstance(out, torch.Tensor):
            return self._check(out, scratch, "returned", chunk=False), None
        if not is_tensor_collection(out):
            raise TypeError(
                f"{self.name} returned {type(out).__name__}; expected a tensor [n, A] "
                "or a tensordict."
            )
        key = self._action_key(out)
        action = out.get(key, None)
        if action is None:
            raise KeyError(
                f"{self.name} wrote no {key!r}; found {_keys(out)} in what it returned."
            )
        chunk = self._check(
            action, scratch, f"wrote under {key!r}", chunk=key == ACTION_CHUNK_KEY
        )
        return chunk, self._read_std(out, chunk)

    def _action_key(self, out: TensorDictBase) -> NestedKey:
        declared = getattr(self.teacher, "out_keys", None) or (ACTION_CHUNK_KEY,)
        keys = [unravel_key(key) for key in declared]
        if ACTION_CHUNK_KEY in keys:
            return ACTION_CHUNK_KEY
        keys = [key for key in keys if key not in STD_KEYS]
        if len(keys) != 1:
            raise KeyError(
                f"{self.name} has the out_keys {keys}: which one is the action? "
                f"Expected {ACTION_CHUNK_KEY!r} among them, or a single key. Wrap it, "
                "e.g. teacher=lambda td: policy(td)['action']."
            )
        return keys[0]

    def _check(
        self, action: Any, scratch: TensorDictBase, what: str, *, chunk: bool
    ) -> torch.Tensor:
        rows = scratch.batch_size[0]
        shape = tuple(getattr(action, "shape", ()))
        if (
            not isinstance(action, torch.Tensor)
            or len(shape) != 2 + chunk
            or shape[0] != rows
            or 0 in shape[1:]
        ):
            expected = f"[{rows}, H, A]" if chunk else f"[{rows}, A]"
            hint = "" if chunk else f" (chunks go under the key {ACTION_CHUNK_KEY!r})"
            raise ValueError(
                f"{self.name} {what} {type(action).__name__} of shape {list(shape)} "
                f"for {rows} rows; expected an action of shape {expected}{hint}."
            )
        return action if chunk else action.unsqueeze(1)

    def _read_std(
        self, out: TensorDictBase, chunk: torch.Tensor
    ) -> torch.Tensor | None:
        for key in STD_KEYS:
            std = out.get(key, None)
            if std is not None:
                break
        else:
            return None
        if std.shape == chunk.shape:
            std = std[:, 0]
        if std.shape != chunk[:, 0].shape:
            raise ValueError(
                f"{self.name} wrote a standard deviation of shape {list(std.shape)} "
                f"under {key!r}; expected {list(chunk[:, 0].shape)}."
            )
        return std

    def __copy__(self) -> TeacherHandle:
        return self

    def __deepcopy__(self, memo: dict[int, Any]) -> TeacherHandle:
        return self

    def __reduce__(self) -> tuple[Any, ...]:
        if self._factory is None:
            raise self._stays_here()
        import cloudpickle

        # lambdas and closures are the usual factories, plain pickle refuses them
        payload = cloudpickle.dumps(self._factory)
        self.crossed_process = True
        return _rebuild_handle, (payload, self._always_finite)

    def _stays_here(self) -> RuntimeError:
        return RuntimeError(
            f"{self.name} lives in the process that made it and does not travel to "
            "another one. Put TeacherActionTransform outside the ParallelEnv (or use "
            "it as the collector's postproc), or give teacher_factory= instead of "
            "teacher= so that every process builds its own."
        )


def _freeze(teacher: Any) -> Teacher:
    if not callable(teacher):
        raise TypeError(
            "A teacher is a TensorDict module or a callable that maps a tensordict to "
            f"an action tensor, got {type(teacher).__name__}."
        )
    if isinstance(teacher, nn.Module):
        teacher.requires_grad_(False).eval()
    return teacher


def _single_device(teacher: Teacher) -> torch.device | None:
    """Where a module lives; None for functions and modules spread over devices."""
    if not isinstance(teacher, nn.Module):
        return None
    devices = {p.device for p in teacher.parameters()}
    return devices.pop() if len(devices) == 1 else None


def _generator(
    teacher: Any,
) -> tuple[Callable[[], torch.Tensor], Callable[[torch.Tensor], object]] | None:
    """How to read and set the generator of a stochastic teacher."""
    get = getattr(teacher, "get_rng_state", None)
    set_state = getattr(teacher, "set_rng_state", None)
    if get is None or set_state is None:
        generator = getattr(teacher, "generator", None)
        if not isinstance(generator, torch.Generator):
            return None
        get, set_state = generator.get_state, generator.set_state
    return get, set_state


def _keys(td: TensorDictBase) -> Sequence[NestedKey]:
    return sorted(td.keys(True, True), key=str)


def _name(obj: Any) -> str:
    return getattr(obj, "__qualname__", type(obj).__name__)
