# Copyright (c) the torchrl_rpd authors.
#
# This source code is licensed under the MIT license found in the
# LICENSE file in the root directory of this source tree.
"""What happens to garbage while simulations are rebuilt."""

from __future__ import annotations

import gc
import weakref

import pytest

from torchrl_rpd.envs._garbage import one_collection


class _Cycle:
    """Only a garbage collection frees it."""

    def __init__(self) -> None:
        self.me = self


def _dropped() -> weakref.ref[_Cycle]:
    """An object that nothing but itself holds."""
    return weakref.ref(_Cycle())


@pytest.fixture(autouse=True)
def _by_hand():
    gc.disable()
    yield
    gc.unfreeze()
    gc.enable()


def test_older_garbage_waits_for_the_end():
    old = _dropped()
    with one_collection():
        young = _dropped()
        gc.collect()
        assert young() is None, "what is made within is freed as ever"
        assert old() is not None, "what is older costs nothing"
    assert old() is None
    assert gc.get_freeze_count() == 0


def test_ends_after_an_error_too():
    with pytest.raises(RuntimeError, match="no simulator"), one_collection():
        raise RuntimeError("no simulator")
    assert gc.get_freeze_count() == 0


def test_leaves_a_frozen_process_alone():
    gc.freeze()
    frozen = gc.get_freeze_count()
    with one_collection():
        assert gc.get_freeze_count() == frozen
    assert gc.get_freeze_count() == frozen


if __name__ == "__main__":
    pytest.main([__file__])
