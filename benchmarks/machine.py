# Copyright (c) the torchrl_rpd authors.
#
# This source code is licensed under the MIT license found in the
# LICENSE file in the root directory of this source tree.
"""What a number was measured on."""

from __future__ import annotations

import contextlib
import platform
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any

import torch

from torchrl_rpd._threads import available_cpus

PACKAGES = ("torch", "torchrl", "tensordict", "mani_skill", "sapien", "numpy")


def machine(*also: str) -> dict[str, Any]:
    """Processor, Python and versions of the packages that matter and are there.

    Args:
        also (str): further packages that matter to a benchmark.
    """
    cpu = platform.processor() or platform.machine()
    if Path("/proc/cpuinfo").exists():
        for line in Path("/proc/cpuinfo").read_text().splitlines():
            if line.startswith("model name"):
                cpu = line.split(":", 1)[1].strip()
                break
    return {
        "cpu": cpu,
        "cores": available_cpus(),
        "python": platform.python_version(),
        "cuda": torch.cuda.is_available(),
        **_versions(*PACKAGES, *also),
    }


def machine_line(*also: str) -> str:
    """The same in one line."""
    return ", ".join(f"{key} {value}" for key, value in machine(*also).items())


def _versions(*packages: str) -> dict[str, str]:
    found = {}
    for package in packages:
        with contextlib.suppress(PackageNotFoundError):
            found[package] = version(package)
    return found
