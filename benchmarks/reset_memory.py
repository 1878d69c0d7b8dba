# Copyright (c) the torchrl_rpd authors.
#
# This source code is licensed under the MIT license found in the
# LICENSE file in the root directory of this source tree.
"""Resident memory over many resets: the slope must be flat.

python -m benchmarks.reset_memory
"""

from __future__ import annotations

import argparse
from pathlib import Path

import torch

from torchrl_rpd import set_learner_threads
from torchrl_rpd.envs import ManiSkillEnv

_PAGE = 4096


def resident_mib() -> float:
    """Resident set size of this process in MiB (Linux)."""
    pages = int(Path("/proc/self/statm").read_text().split()[1])
    return pages * _PAGE / 2**20


def slope(task: str, resets: int, warm_up: int) -> float:
    """MiB per 100 resets, by least squares after the warm-up."""
    env = ManiSkillEnv(task)
    env.set_seed(0)
    sizes = []
    for index in range(warm_up + resets):
        env.rollout(2)
        if index >= warm_up:
            sizes.append(resident_mib())
    env.close()
    y = torch.tensor(sizes, dtype=torch.float64)
    x = torch.arange(resets, dtype=torch.float64)
    x = x - x.mean()
    per_reset = (x * (y - y.mean())).sum() / x.square().sum()
    print(f"{task}: {sizes[0]:.1f} -> {sizes[-1]:.1f} MiB in {resets} resets")
    return 100 * per_reset.item()


def main() -> None:
    """Prints the slopes and fails over 1 MiB per 100 resets."""
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--tasks", nargs="+", default=["PickCube-v1", "PushCube-v1"])
    parser.add_argument("--resets", type=int, default=500)
    parser.add_argument("--warm-up", type=int, default=100)
    args = parser.parse_args()
    set_learner_threads()
    slopes = {task: slope(task, args.resets, args.warm_up) for task in args.tasks}
    for task, value in slopes.items():
        print(f"{task}: {value:+.3f} MiB per 100 resets")
    if max(slopes.values()) >= 1.0:
        raise SystemExit("memory grows by 1 MiB or more per 100 resets")


if __name__ == "__main__":
    main()
