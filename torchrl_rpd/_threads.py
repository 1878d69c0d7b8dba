# Copyright (c) the torchrl_rpd authors.
#
# This source code is licensed under the MIT license found in the
# LICENSE file in the root directory of this source tree.
"""Thread counts of workers and learner."""

from __future__ import annotations

import os


def available_cpus() -> int:
    """The number of CPU cores that this process may run on."""
    if hasattr(os, "sched_getaffinity"):
        return len(os.sched_getaffinity(0))
    return os.cpu_count() or 1


def set_learner_threads(num_workers: int = 1) -> int:
    """Gives the learner the cores that the simulation workers leave over.

    With more threads than free cores, the OpenMP threads of a small minibatch spin
    against the simulators: a training on 2 cores was measured up to 8 times slower.
    Children that are started afterwards inherit one thread each.

    Args:
        num_workers (int): number of processes that step simulators at the same time.

    Returns:
        the number of threads that was set (at least 1).

    Examples:
        >>> import torch
        >>> before = torch.get_num_threads()
        >>> set_learner_threads(num_workers=10_000)
        1
        >>> torch.set_num_threads(before)
    """
    # Here: `python -m torchrl_rpd.doctor` imports this module, and is to report a torch
    # that cannot be imported.
    import torch

    for name in ("OMP_NUM_THREADS", "MKL_NUM_THREADS", "OPENBLAS_NUM_THREADS"):
        os.environ[name] = "1"
    threads = max(1, available_cpus() - num_workers)
    torch.set_num_threads(threads)
    return threads
