# Copyright (c) the torchrl_rpd authors.
#
# This source code is licensed under the MIT license found in the
# LICENSE file in the root directory of this source tree.
"""Memory of an iteration with pictures, beside the rollout's own.

The rollout is what the collector yields: all pictures and those of the next steps. What
comes on top are copies, the activations of GAE and of a minibatch, and the gradients.
"""

from __future__ import annotations

import gc
import json
import os
import subprocess
import sys
from dataclasses import replace
from pathlib import Path

import torch
from tensordict import TensorDictBase

from benchmarks.speed._turns import Row
from benchmarks.speed.update import LARGE, Case, trainer_over_noise
from torchrl_rpd import set_learner_threads
from torchrl_rpd.objectives import DistillPPOLoss

# Minibatch and optimiser take as much of the rollout as in the released configuration:
# 133 of 6,400 pictures of 256x256.
SMALL = Case("NatureCNN, 128x128, minibatch 100", (3, 128, 128), 4800, 100)
STATUS, CLEAR = Path("/proc/self/status"), Path("/proc/self/clear_refs")


def resident(field: str) -> int:
    """Bytes: ``VmRSS`` now, ``VmHWM`` at its highest (Linux)."""
    lines = dict(line.split(":", 1) for line in STATUS.read_text().splitlines())
    return int(lines[field].split()[0]) * 1024


def size(batch: TensorDictBase) -> int:
    """Bytes of its tensors."""
    leaves = batch.values(include_nested=True, leaves_only=True)
    return sum(leaf.numel() * leaf.element_size() for leaf in leaves)


class Peak:
    """The highest memory of this process or device over what there was at first."""

    def __init__(self, device: torch.device) -> None:
        self.device = device
        gc.collect()
        self.before = self._read("VmRSS")

    def _read(self, field: str) -> int:
        if self.device.type != "cuda":
            return resident(field)
        if field == "VmRSS":
            return torch.cuda.memory_allocated(self.device)
        return torch.cuda.max_memory_allocated(self.device)

    def restart(self) -> None:
        """Forgets the highest so far."""
        if self.device.type == "cuda":
            torch.cuda.reset_peak_memory_stats(self.device)
        else:
            CLEAR.write_text("5")

    def highest(self) -> int:
        """Bytes."""
        return self._read("VmHWM") - self.before


def iterate(case: Case, peak: Peak, count: int) -> dict[str, float]:
    """Peaks of the last iteration in rollouts, and the rollout's bytes."""
    trainer = trainer_over_noise(case, loss_class=DistillPPOLoss, device=peak.device)
    batches = iter(trainer.collector)
    for _ in range(count):
        peak.restart()
        batch = next(batches)
        collecting = peak.highest()
        peak.restart()
        trainer.optim_steps(trainer._process_batch_hook(batch))
        updating = peak.highest()
    rollout = size(batch)
    return {
        "collecting": collecting / rollout,
        "updating": updating / rollout,
        "rollout": rollout,
    }


def measure(device: torch.device) -> dict[str, float]:
    """The second iteration; libraries and their workspaces are there before."""
    case = case_of(device)
    iterate(replace(case, rows=2 * case.minibatch // 50 * 50 or 50), Peak(device), 1)
    return iterate(case, Peak(device), 2)


def case_of(device: torch.device) -> Case:
    """The larger one is for GPUs."""
    return LARGE if device.type == "cuda" else SMALL


def rows(*, device: torch.device, rounds: int = 5) -> list[Row]:
    """Each round is a process of its own, which gives freed memory back at once."""
    command = [sys.executable, "-W", "ignore", "-m", __name__, str(device)]
    eager = {"MALLOC_MMAP_THRESHOLD_": "65536", "MALLOC_TRIM_THRESHOLD_": "65536"}
    answers = []
    for _ in range(rounds):
        done = subprocess.run(
            command, check=True, capture_output=True, text=True, env=os.environ | eager
        )
        answers.append(json.loads(done.stdout.splitlines()[-1]))
    name, megabytes = case_of(device).name, answers[0]["rollout"] / 1e6
    return [
        Row(
            f"{name}: peak of advantages and updates / rollout",
            [answer["updating"] for answer in answers],
            at_most=1.3,
            note=f"rollout of {megabytes:,.0f} MB",
        ),
        Row(
            f"{name}: peak of TorchRL's collector / rollout",
            [answer["collecting"] for answer in answers],
        ),
    ]


if __name__ == "__main__":
    set_learner_threads()
    print(json.dumps(measure(torch.device(sys.argv[1]))))
