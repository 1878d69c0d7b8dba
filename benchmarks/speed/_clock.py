# Copyright (c) the torchrl_rpd authors.
#
# This source code is licensed under the MIT license found in the
# LICENSE file in the root directory of this source tree.
"""Seconds of named parts of a program, each without the parts inside it."""

from __future__ import annotations

import time
from collections import defaultdict
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any


class Clock:
    """Every second belongs to one part: the innermost that has begun and not ended.

    Args:
        now (callable): the time in seconds.

    Examples:
        >>> times = iter([0.0, 1.0, 3.0, 6.0])
        >>> clock = Clock(lambda: next(times))
        >>> with clock.part("outer"):
        ...     with clock.part("inner"):
        ...         pass
        >>> clock.take()
        {'outer': 4.0, 'inner': 2.0}
    """

    def __init__(self, now: Callable[[], float] = time.perf_counter) -> None:
        self._now = now
        self._seconds: defaultdict[str, float] = defaultdict(float)
        self._open: list[str] = []
        self._since = 0.0
        self._replaced: list[tuple[Any, str, Any, bool]] = []

    def _pass(self) -> None:
        now = self._now()
        if self._open:
            self._seconds[self._open[-1]] += now - self._since
        self._since = now

    @contextmanager
    def part(self, name: str) -> Iterator[None]:
        """What happens inside belongs to this part."""
        self._pass()
        self._open.append(name)
        try:
            yield
        finally:
            self._pass()
            self._open.pop()

    def timed(self, function: Callable[..., Any], name: str) -> Callable[..., Any]:
        """The function, as a part."""

        def call(*args: Any, **kwargs: Any) -> Any:
            with self.part(name):
                return function(*args, **kwargs)

        return call

    def watch(self, owner: Any, attribute: str, name: str) -> None:
        """Makes a method of an object or class a part, until :meth:`leave`."""
        before = getattr(owner, attribute)
        own = attribute in vars(owner)
        self._replaced.append((owner, attribute, before, own))
        setattr(owner, attribute, self.timed(before, name))

    def leave(self) -> None:
        """Puts back what :meth:`watch` has replaced."""
        for owner, attribute, before, own in reversed(self._replaced):
            if own:
                setattr(owner, attribute, before)
            else:
                delattr(owner, attribute)
        self._replaced.clear()

    def take(self) -> dict[str, float]:
        """Seconds of all parts so far, which start again from nothing."""
        out = dict(self._seconds)
        self._seconds.clear()
        return out
