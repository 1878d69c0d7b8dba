# Copyright (c) the torchrl_rpd authors.
#
# This source code is licensed under the MIT license found in the
# LICENSE file in the root directory of this source tree.
"""Where the time of a whole iteration goes, with the sizes of ``preset=cpu``.

Functions are replaced by ones with a stopwatch; the seconds of what a part calls inside
belong to the part inside.
"""

from __future__ import annotations

import statistics
import time
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import torch
from torchrl.trainers.algorithms import PPOTrainer

from benchmarks.speed._clock import Clock
from benchmarks.speed._noise import NoiseEnv
from benchmarks.speed._runs import (
    World,
    has_simulator,
    picture_world,
    state_world,
    trainer_of,
    zeros,
)
from benchmarks.speed._section import Section
from benchmarks.speed._turns import wait
from torchrl_rpd.teachers import ScriptedTeacher
from torchrl_rpd.transforms import TeacherActionTransform

TASK, ROUNDS = "PickCube-v1", 5
# In the order of the picture.
PARTS = {
    "simulator": "tab:blue",
    "drawing": "navy",
    "adapter": "#9ecae1",
    "policy": "tab:cyan",
    "teacher": "tab:green",
    "collector": "#c7e9c0",
    "advantages": "tab:purple",
    "minibatches": "#fdd0a2",
    "loss": "tab:orange",
    "backward": "tab:red",
    "optimiser": "tab:brown",
    "trainer": "tab:gray",
}
MEANS = {
    "simulator": "ManiSkill's step and reset",
    "drawing": "its pictures",
    "adapter": "its answers as a tensordict",
    "policy": "the student's actions",
    "teacher": "labels, once per frame",
    "collector": "TorchRL's, with the rest of the labelling transform",
    "advantages": "GAE with both critic calls",
    "minibatches": "drawing them from the batch",
    "loss": "forward",
    "backward": "gradients",
    "optimiser": "clipping of the gradients, Adam",
    "trainer": "hooks, logs, everything else",
}


@dataclass(frozen=True)
class Profile:
    """Of one student.

    Args:
        name (str): in words.
        frames (int): of an iteration.
        seconds (dict of str to float): of each part.
    """

    name: str
    frames: int
    seconds: dict[str, float]

    @property
    def total(self) -> float:
        """Seconds of an iteration."""
        return sum(self.seconds.values())


def watched(trainer: PPOTrainer, world: World, clock: Clock) -> None:
    """Has the clock know the parts."""
    env = world.env
    simulators = () if isinstance(env, NoiseEnv) else env._env
    for name in ("step", "reset"):
        clock.watch(env, f"_{name}", "adapter" if simulators else "simulator")
        for simulator in simulators:
            clock.watch(simulator, name, "simulator")
    if simulators and world.state_key != "observation":
        clock.watch(env._observer, "read", "drawing")
    clock.watch(trainer.collector.policy, "forward", "policy")
    clock.watch(trainer, "_process_optim_batch_hook", "minibatches")
    clock.watch(trainer, "compute_loss", "loss")
    clock.watch(torch.Tensor, "backward", "backward")
    clock.watch(
        trainer.optimization_stepper, "_compute_and_clip_grad_norm", "optimiser"
    )
    clock.watch(trainer.optimizer, "step", "optimiser")
    clock.watch(trainer.optimizer, "zero_grad", "optimiser")


def profile(world: World, frames: int, minibatch: int, device: torch.device) -> Profile:
    """Means over the iterations after the first: resets come in some of them only."""

    def now() -> float:
        wait(device)
        return time.perf_counter()

    clock = Clock(now)
    teacher, read = zeros, None
    if world.state_key is not None:
        teacher = ScriptedTeacher(TASK, observation_key=world.state_key)
        read = teacher.in_keys
    label = TeacherActionTransform(
        clock.timed(teacher, "teacher"), in_keys=read, low=-1, high=1
    )
    trainer = trainer_of(
        world,
        frames=frames,
        minibatch=minibatch,
        device=device,
        label=label,
        target_kl=0.3,
        kl_rule="adaptive_lr",
    )
    watched(trainer, world, clock)
    batches = iter(trainer.collector)
    rounds = []
    for _ in range(1 + ROUNDS):
        with clock.part("trainer"):
            with clock.part("collector"):
                batch = next(batches)
            with clock.part("advantages"):
                prepared = trainer._process_batch_hook(batch)
            trainer._pre_steps_log_hook(prepared)
            trainer.optim_steps(prepared)
            trainer._post_steps_hook()
            trainer._post_steps_log_hook(prepared)
        rounds.append(clock.take())
    clock.leave()
    trainer.collector.shutdown()
    return Profile(
        world.name,
        frames,
        {
            part: statistics.mean(found.get(part, 0.0) for found in rounds[1:])
            for part in PARTS
        },
    )


def draw(profiles: Sequence[Profile], file: Path) -> None:
    """A bar of 100 % for each student, its parts in order."""
    import matplotlib

    matplotlib.use("Agg")
    import matplotlib.pyplot as plt

    fig, ax = plt.subplots(
        figsize=(9, 2.4 + 0.9 * len(profiles)), dpi=120, layout="constrained"
    )
    names = [
        f"{p.name.replace(', ', chr(10))}\n{1e3 * p.total / p.frames:.1f} ms per frame"
        for p in profiles
    ]
    left = [0.0] * len(profiles)
    for part, colour in PARTS.items():
        shares = [100 * p.seconds[part] / p.total for p in profiles]
        if not any(shares):
            continue
        bars = ax.barh(names, shares, left=left, color=colour, label=part, height=0.6)
        dark = colour in ("navy", "tab:blue", "tab:purple", "tab:brown", "tab:red")
        for bar, share in zip(bars, shares, strict=True):
            if share >= 3:
                ax.annotate(
                    f"{share:.0f}",
                    (bar.get_x() + bar.get_width() / 2, bar.get_y() + 0.3),
                    ha="center",
                    va="center",
                    fontsize=9,
                    color="white" if dark else "black",
                )
        left = [a + b for a, b in zip(left, shares, strict=True)]
    ax.invert_yaxis()
    ax.set(xlim=(0, 100), xlabel="% of an iteration", title="One whole iteration")
    fig.legend(ncols=6, loc="outside lower center", frameon=False)
    for side in ("top", "right", "left"):
        ax.spines[side].set_visible(False)
    fig.savefig(file)
    plt.close(fig)


def rows(*, device: torch.device) -> Section:
    """The state student, and one that sees pictures where they can be drawn."""
    profiles = [profile(state_world(TASK, 16, device), 800, 100, device)]
    if device.type != "cpu" or has_simulator(device, drawing=True):
        profiles.append(profile(picture_world(TASK, 4, 128, device), 80, 16, device))
    cells = [
        [
            part,
            MEANS[part],
            *(
                f"{1e6 * p.seconds[part] / p.frames:,.0f} us, "
                f"{p.seconds[part] / p.total:.0%}"
                for p in profiles
            ),
        ]
        for part in PARTS
        if any(p.seconds[part] for p in profiles)
    ]
    cells.append(
        [
            "**all**",
            "",
            *(f"{1e6 * p.total / p.frames:,.0f} us" for p in profiles),
        ]
    )
    return Section(
        rows=cells,
        columns=("part", "what it is", *(p.name for p in profiles)),
        text=(
            f"Per frame, means of {ROUNDS} iterations after the first, in one process, "
            "8 epochs. State: 800 frames of 16 environments, minibatches of 100 (an MLP, "
            "`preset=cpu`). Pictures: 80 frames of 4 environments, minibatches of 16 (a "
            "NatureCNN; software rendering). The teacher is the scripted one: what a "
            "network costs in its place, the section on the teacher tells."
        ),
        alt="Shares of the parts of one iteration, a bar for each student.",
        draw=lambda file: draw(profiles, file),
        numbers={p.name: p.seconds for p in profiles},
    )
