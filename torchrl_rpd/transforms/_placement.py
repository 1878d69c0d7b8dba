# Copyright (c) the torchrl_rpd authors.
#
# This source code is licensed under the MIT license found in the
# LICENSE file in the root directory of this source tree.
"""Where a teacher transform stands, and where it must not."""

from __future__ import annotations

from typing import Any, NoReturn

from torchrl.envs import EnvBase
from torchrl.envs.transforms import Compose, StepCounter, Transform

from torchrl_rpd.transforms.jump_start import JumpStartTransform

# They end episodes and declare no out_keys (and not every TorchRL 0.14 has them).
_ENDS_EPISODES = {"RandomTruncationTransform", "TerminateTransform"}
_END_KEYS = {"done", "terminated", "truncated"}


def enclosing_env(transform: Transform) -> EnvBase | None:
    """The env around a transform; the property ``container`` raises without one."""
    holder: Any = transform
    while holder is not None and not isinstance(holder, EnvBase):
        reference = holder.__dict__.get("_container")
        holder = None if reference is None else reference()
    return holder


def check_placement(transform: Transform) -> None:
    """Refuses an order in which terminal observations would be labelled.

    Raises:
        ValueError: if a transform that ends episodes comes after ``transform``.
    """
    chain = getattr(enclosing_env(transform), "transform", None)
    after = False
    for other in chain if isinstance(chain, Compose) else ():
        if after and _ends_episodes(other):
            name = type(other).__name__
            raise ValueError(
                f"{name} ends episodes and comes after {type(transform).__name__}, "
                "which would ask about, and label, terminal observations. Put the "
                f"{name} first."
            )
        after = after or other is transform


def refuse_jump_start(transform: Transform) -> None:
    """Raises a ``ValueError`` if the teacher's labels are acted on in the same env."""
    chain = getattr(enclosing_env(transform), "transform", None)
    others = chain.modules() if isinstance(chain, Compose) else ()
    if any(isinstance(other, JumpStartTransform) for other in others):
        raise ValueError(
            "JumpStartTransform acts on the teacher's label in the step it is asked for, "
            "and deferred=True has it later. Use TeacherActionTransform(..., "
            "deferred=False)."
        )


def _ends_episodes(transform: Transform) -> bool:
    if isinstance(transform, StepCounter):
        return transform.max_steps is not None
    if any(cls.__name__ in _ENDS_EPISODES for cls in type(transform).__mro__):
        return True
    keys = transform.out_keys or ()
    return any((k if isinstance(k, str) else k[-1]) in _END_KEYS for k in keys)


def refuse_native_autoreset(env: EnvBase | None) -> None:
    """Raises a ``RuntimeError`` if ``env`` resets itself within a step."""
    if env is not None and env.__dict__.get("_torchrl_native_autoreset", False):
        raise_native_autoreset()


def raise_native_autoreset() -> NoReturn:
    """Says why native auto-reset is no place for a teacher."""
    raise RuntimeError(
        "TeacherActionTransform does not work with native auto-reset: such an env "
        "replaces the terminal observation by the first one of the next episode, and "
        "RPD bootstraps from the terminal one. Build the env with "
        "native_autoreset=False."
    )
