# Copyright (c) the torchrl_rpd authors.
#
# This source code is licensed under the MIT license found in the
# LICENSE file in the root directory of this source tree.
"""Garbage collection around simulations that are built, rebuilt or closed."""

from __future__ import annotations

import gc
from collections.abc import Iterator
from contextlib import contextmanager


@contextmanager
def one_collection() -> Iterator[None]:
    """Makes the full collections within cheap, and does one at the end.

    ManiSkill collects all garbage each time it builds or closes a simulation, a fifth of a
    second with PyTorch loaded, and sixteen of them are built and closed together and
    rebuilt at every evaluation and checkpoint. Within, it passes over what existed before.
    A process that has frozen objects itself (``gc.freeze``) is left alone.
    """
    if gc.get_freeze_count():
        yield
        return
    gc.freeze()
    try:
        yield
    finally:
        gc.unfreeze()
        gc.collect()
