# Copyright (c) the torchrl_rpd authors.
#
# This source code is licensed under the MIT license found in the
# LICENSE file in the root directory of this source tree.
"""Seeds, threads, and skips that say what would run the test."""

from __future__ import annotations

import functools
import importlib.util
import random
from collections import Counter
from collections.abc import Generator

import numpy as np
import pytest
import torch

# One thread per process: more make the small tensors of these tests slower, and a
# second process (a worker, another test run) slower still.
torch.set_num_threads(1)


@functools.cache
def _reason_to_skip(marker: str) -> str | None:
    """Why tests with this marker cannot run here, or None."""
    if marker == "maniskill" and importlib.util.find_spec("mani_skill") is None:
        return "needs ManiSkill: pip install 'torchrl_rpd[maniskill]'"
    if marker == "render":
        from torchrl_rpd.envs._vulkan import has_render_device

        if not has_render_device():
            return "needs a Vulkan driver: Mesa >= 24.3 (lavapipe) or a GPU's"
    if marker == "gpu" and not torch.cuda.is_available():
        return "needs a CUDA device"
    return None


@pytest.hookimpl(tryfirst=True)  # before a fixture builds a simulation
def pytest_runtest_setup(item: pytest.Item) -> None:
    """Skips what this machine cannot run."""
    for marker in ("maniskill", "render", "gpu"):
        if item.get_closest_marker(marker) and (reason := _reason_to_skip(marker)):
            pytest.skip(reason)


@pytest.fixture(autouse=True)
def _seeds() -> None:
    """Every test starts from the same random state."""
    random.seed(0)
    np.random.seed(0)
    torch.manual_seed(0)


@pytest.hookimpl(wrapper=True, tryfirst=True)  # after pytest's own summary
def pytest_terminal_summary(
    terminalreporter: pytest.TerminalReporter,
) -> Generator[None, None, None]:
    """Closes with how many tests were skipped, and why."""
    yield
    if terminalreporter.config.option.collectonly:
        return
    reasons = Counter(
        report.longrepr[2].removeprefix("Skipped: ")
        for report in terminalreporter.stats.get("skipped", [])
    )
    deselected = len(terminalreporter.stats.get("deselected", []))
    terminalreporter.section("skipped tests")
    for reason, count in reasons.most_common():
        terminalreporter.line(f"{count} skipped: {reason}")
    if deselected:
        terminalreporter.line(f"{deselected} deselected by the marker expression")
    if not reasons and not deselected:
        terminalreporter.line("0 skipped")
