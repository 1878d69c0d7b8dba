# Copyright (c) the torchrl_rpd authors.
#
# This source code is licensed under the MIT license found in the
# LICENSE file in the root directory of this source tree.
"""What a frame costs as one thing grows, and where that stops being constant.

Sizes take turns, like everything on the page. Cost is linear where a frame (or a pixel)
costs the same at the next size.
"""

from __future__ import annotations

import itertools
import statistics
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import partial

import torch
from torchrl.collectors import Collector
from torchrl.envs import EnvBase
from torchrl.envs.utils import RandomPolicy

from benchmarks.speed._noise import NoiseEnv
from benchmarks.speed._runs import World, has_simulator, trainer_of, zeros
from benchmarks.speed._section import Section
from benchmarks.speed._turns import in_turns
from torchrl_rpd.students import cnn_actor_critic, mlp_actor_critic
from torchrl_rpd.transforms import TeacherActionTransform

ROUNDS = 5
CHANGE = 0.25  # of the cost of a unit, from one size to the next: no longer linear
DIMS, STEPS = 42, 8


@dataclass(frozen=True)
class Sweep:
    """One thing that grows.

    Args:
        what (str): in words.
        unit (str): what is counted in ``microseconds``.
        microseconds (dict of int to float): of a unit at each size, sizes ascending.
    """

    what: str
    unit: str
    microseconds: dict[int, float]

    @property
    def cells(self) -> list[str]:
        """Of a Markdown table."""
        figures = ", ".join(f"{n}: {_short(us)}" for n, us in self.microseconds.items())
        return [self.what, f"us per {self.unit}", figures, verdict(self.microseconds)]


def verdict(costs: dict[int, float]) -> str:
    """Which steps change the cost of a unit by more than a quarter.

    Args:
        costs (dict of int to float): of a unit at each size, sizes ascending.

    Examples:
        >>> verdict({1: 8.0, 2: 4.0, 4: 3.9, 8: 4.1})
        '1 to 2: -50 %; linear from 2 on'
        >>> verdict({1: 4.0, 2: 4.1})
        'linear'
        >>> verdict({1: 4.0, 2: 4.0, 4: 6.0})
        'linear up to 2; 2 to 4: +50 %'
    """
    steps = list(itertools.pairwise(costs.items()))
    bends = [
        (index, f"{a} to {b}: {100 * (y / x - 1):+.0f} %")
        for index, ((a, x), (b, y)) in enumerate(steps)
        if abs(y / x - 1) > CHANGE
    ]
    if not bends:
        return "linear"
    first, last = bends[0][0], bends[-1][0]
    said = [text for _, text in bends]
    if first > 0:
        said.insert(0, f"linear up to {steps[first][0][0]}")
    if last < len(steps) - 1:
        said.append(f"linear from {steps[last][1][0]} on")
    return "; ".join(said)


def _short(number: float) -> str:
    return f"{number:,.0f}" if number >= 10 else f"{number:.3g}"


def sweep(
    what: str,
    unit: str,
    sides: dict[int, Callable[[], object]],
    units: dict[int, int],
    device: torch.device,
) -> Sweep:
    """Median microseconds of a unit at each size, which take turns."""
    named = {str(size): function for size, function in sides.items()}
    seconds = in_turns(named, rounds=ROUNDS, device=device)
    costs = {
        size: 1e6 * statistics.median(seconds[str(size)]) / units[size]
        for size in sides
    }
    return Sweep(what, unit, costs)


def iteration(
    world: World, frames: int, minibatch: int, device: torch.device, *, collect: bool
) -> Callable[[], object]:
    """One epoch of a batch; its frames and advantages too, where asked for."""
    trainer = trainer_of(
        world,
        frames=frames,
        minibatch=minibatch,
        device=device,
        label=TeacherActionTransform(zeros, low=-1, high=1),
        epochs=1,
        target_kl=None,
    )
    batches = iter(trainer.collector)
    if collect:
        return lambda: trainer.optim_steps(trainer._process_batch_hook(next(batches)))
    prepared = trainer._process_batch_hook(next(batches))
    return lambda: trainer.optim_steps(prepared)


def vectors(num_envs: int) -> World:
    """Noise for the MLP."""
    return World(
        "noise", NoiseEnv(num_envs, (DIMS,)), lambda: mlp_actor_critic(DIMS, 7)
    )


def pictures(num_envs: int, size: int) -> World:
    """Noise for the NatureCNN."""
    env = NoiseEnv(num_envs, (3, size, size))
    return World("noise", env, lambda: cnn_actor_critic(size, 7))


def environments(
    name: str, make: Callable[[int], EnvBase], sizes: Sequence[int], dev: torch.device
) -> Sweep:
    """Collecting with random actions."""
    collectors, units = {}, {n: n * STEPS for n in sizes}
    for n in sizes:
        env = make(n)
        collectors[n] = Collector(
            env,
            RandomPolicy(env.action_spec),
            frames_per_batch=units[n],
            total_frames=-1,
            auto_register_policy_transforms=False,
        )
    sides: dict[int, Callable[[], object]] = {
        n: partial(next, iter(each)) for n, each in collectors.items()
    }
    what = f"environments in one process: {name}"
    found = sweep(what, "frame", sides, units, dev)
    for collector in collectors.values():
        collector.shutdown()
    return found


def rows(*, device: torch.device) -> Section:
    """Everything that grows."""
    found = []
    sizes = [400 * 2**k for k in range(5)]
    sides = {n: iteration(vectors(16), n, 100, device, collect=True) for n in sizes}
    found.append(
        sweep(
            "frames per batch: noise, 16 environments, MLP, one epoch of minibatches of "
            "100",
            "frame",
            sides,
            {n: n for n in sizes},
            device,
        )
    )
    sizes = [2**k for k in range(5, 10)]
    sides = {n: iteration(vectors(64), 2048, n, device, collect=False) for n in sizes}
    found.append(
        sweep(
            "minibatch: MLP, one epoch of 2,048 frames",
            "frame",
            sides,
            dict.fromkeys(sizes, 2048),
            device,
        )
    )
    sizes = [64, 128, 256]
    sides = {n: iteration(pictures(8, n), 64, 32, device, collect=False) for n in sizes}
    found.append(
        sweep(
            "image size: NatureCNN, one epoch of 64 frames in minibatches of 32",
            "1,000 pixels",
            sides,
            {n: 64 * n * n // 1000 for n in sizes},
            device,
        )
    )
    if has_simulator(device):
        from torchrl_rpd.envs import ManiSkillEnv

        found.append(
            environments(
                "PushCube-v1, state, random actions",
                lambda n: ManiSkillEnv("PushCube-v1", num_envs=n),
                [1, 4, 16, 64],
                device,
            )
        )
    found.append(
        environments(
            "noise, random actions",
            lambda n: NoiseEnv(n, (DIMS,)),
            [1, 4, 16, 64, 256],
            device,
        )
    )
    text = (
        f"Medians of {ROUNDS} rounds. A step that changes the cost of a unit by more than "
        f"{CHANGE:.0%} is named. What a unit costs more at small sizes is the fixed price "
        "of a call: of a minibatch, of a step of the collector."
    )
    return Section(
        rows=[one.cells for one in found],
        columns=("as this grows", "unit", "cost at each size", "linear?"),
        text=text,
        numbers={one.what: one.microseconds for one in found},
    )
