# Copyright (c) the torchrl_rpd authors.
#
# This source code is licensed under the MIT license found in the
# LICENSE file in the root directory of this source tree.
"""What a worker process does before it builds its environment."""

from __future__ import annotations

import signal
from collections.abc import Callable
from typing import Any


def in_worker(build: Callable[..., Any], *args: Any, **kwargs: Any) -> Any:
    """Calls ``build`` in a worker process that leaves Ctrl-C to the main one.

    A terminal sends SIGINT to every process of a command. A worker that dies of it takes
    the batch under way with it, which the main process wants to finish and save; it ends
    its workers itself.

    Examples:
        >>> from functools import partial
        >>> from torchrl.envs import GymEnv
        >>> make = partial(in_worker, GymEnv, "Pendulum-v1")  # for ParallelEnv(2, make)
    """
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    return build(*args, **kwargs)
