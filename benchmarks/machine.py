# Copyright (c) the torchrl_rpd authors.
#
# This source code is licensed under the MIT license found in the
# LICENSE file in the root directory of this source tree.
"""What a number was measured on."""

from __future__ import annotations

import platform
from importlib.metadata import version
from pathlib import Path
from typing import Any

import torch

from torchrl_rpd._threads import available_cpus

PACKAGES = ("torch", "torchrl", "tensordict", "mani_skill", "sapien", "numpy")


def machine() -> dict[str, Any]:
    """Processor, Python and versions of the packages that matter."""
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
        **{package: version(package) for package in PACKAGES},
    }


def machine_line() -> str:
    """The same in one line."""
    return ", ".join(f"{key} {value}" for key, value in machine().items())
