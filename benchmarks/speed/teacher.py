# Copyright (c) the torchrl_rpd authors.
#
# This source code is licensed under the MIT license found in the
# LICENSE file in the root directory of this source tree.
"""A teacher that labels a batch once, and one that is asked in every minibatch.

The first way is this package's; the second is the released algorithm's, which asks inside
each minibatch of all epochs, once the minibatch has passed the target KL. Everything else
is the same, seeds included, so that both are the same run. The teachers are OpenVLA with a
few small layers, which looks at the student's pictures, and the scripted teacher with so
many milliseconds of sleep per frame.
"""

from __future__ import annotations

import importlib.util
import statistics
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import torch
from tensordict import TensorDictBase
from torch import Tensor
from torch import distributions as d

from benchmarks.speed._runs import World, picture_world, state_world, trainer_of
from benchmarks.speed._section import Section
from benchmarks.speed._turns import Row, in_turns, ratios
from torchrl_rpd.objectives import DistillPPOLoss
from torchrl_rpd.teachers import ScriptedTeacher
from torchrl_rpd.transforms import TeacherActionTransform

TASK, ENVS, ROUNDS, TARGET_KL = "PushCube-v1", 4, 5, 0.2
SLEEPS = (0.0005, 0.003)  # seconds per frame
EPOCHS = 8


class SlowTeacher:
    """Another teacher that takes so much longer for each frame."""

    def __init__(self, teacher: Callable[[TensorDictBase], Any], seconds: float):
        self.teacher = teacher
        self.seconds = seconds
        self.in_keys = teacher.in_keys  # type: ignore[attr-defined]

    def __call__(self, tensordict: TensorDictBase) -> Any:
        """The other's answer."""
        time.sleep(self.seconds * tensordict.shape[0])
        return self.teacher(tensordict)


class AskingLoss(DistillPPOLoss):
    """Asks about each minibatch that the target KL lets pass, as the released code."""

    def ask(self, label: TeacherActionTransform, target_kl: float | None) -> None:
        """Whom, and up to which KL."""
        self._asked = [label]  # in a list: no module of this one
        self._target_kl = target_kl

    def _distill(
        self, tensordict: TensorDictBase, log_weight: Tensor, dist: d.Distribution
    ) -> dict[str, Tensor]:
        k3 = (log_weight.expm1() - log_weight).mean()
        if self._target_kl is None or float(k3.detach()) <= self._target_kl:
            tensordict = self._asked[0](tensordict)
        else:  # no step follows
            tensordict = tensordict.copy()
            tensordict["teacher_action"] = torch.zeros_like(tensordict["action"])
        return super()._distill(tensordict, log_weight, dist)


@dataclass(frozen=True)
class Case:
    """A teacher and what it is asked about.

    Args:
        name (str): of the teacher.
        teacher (callable): the teacher.
        worlds (pair of World): the same twice: each way has its own.
        frames (int): of a batch.
        minibatch (int): rows.
        stopping (pair of int): both, of runs with a KL stop, which only many updates of
            one batch come to.
        runs (list of Run): what has been made of it. They are kept: a collector that is
            thrown away closes its environment, which the next run goes on with.
    """

    name: str
    teacher: Callable[[TensorDictBase], Any]
    worlds: Sequence[World]
    frames: int
    minibatch: int
    stopping: tuple[int, int] = (0, 0)
    runs: list[Run] = field(default_factory=list)


class Run:
    """Iterations of a run, and what each asked of the teacher."""

    def __init__(
        self, case: Case, *, again: bool, target_kl: float | None, device: torch.device
    ) -> None:
        self.label = TeacherActionTransform(case.teacher, low=-1, high=1)
        self.again = again
        self.trainer = trainer_of(
            case.worlds[again],
            frames=case.frames,
            minibatch=case.minibatch,
            device=device,
            epochs=EPOCHS,
            loss_class=AskingLoss if again else DistillPPOLoss,
            target_kl=target_kl,
        )
        if again:
            self.trainer.loss_module.ask(self.label, target_kl)
        self.batches = iter(self.trainer.collector)
        self.asked: list[dict[str, float]] = []
        case.runs.append(self)

    def learn(self, batch: TensorDictBase) -> None:
        """Labels (or not yet), advantages, and the updates of all epochs."""
        torch.manual_seed(len(self.asked))
        if not self.again:
            batch = self.label(batch)
        self.trainer.optim_steps(self.trainer._process_batch_hook(batch))
        self.trainer._post_steps_hook()
        found = self.label.pop_stats()
        steps = self.trainer.optimization_stepper.summary(planned=1)["optim_steps"]
        self.asked.append(
            {
                "queries": found["queries"] / batch.numel(),
                "seconds": found["seconds"] / batch.numel(),
                "steps": steps,
            }
        )

    def iterate(self) -> None:
        """A whole iteration, with its frames."""
        torch.manual_seed(1000 + len(self.asked))
        self.learn(next(self.batches))

    def figures(self, name: str) -> list[float]:
        """Of each round; the one before does not count."""
        return [asked[name] for asked in self.asked[1:]]


def before(case: Case, *, device: torch.device) -> list[Row]:
    """Frames collected beforehand, no KL stop: queries, and seconds of the teacher."""
    ours, released = (
        Run(case, again=again, target_kl=None, device=device) for again in (False, True)
    )
    batch = next(ours.batches).clone()
    sides = {
        "ours": lambda: ours.learn(batch),
        "released": lambda: released.learn(batch),
    }
    in_turns(sides, rounds=ROUNDS, device=device)
    rows = []
    for what, name, limit, scale, unit in (
        ("queries", "queries", float(EPOCHS), 1, ""),
        ("seconds", "seconds", 6.0, 1000, " ms"),
    ):
        figures = released.figures(name), ours.figures(name)
        each = [f"{scale * statistics.median(f):.2f}" for f in figures]
        rows.append(
            Row(
                f"{case.name}: the teacher's {what}, frames collected beforehand",
                ratios(*figures),
                at_least=limit,
                note=f"{each[0]} and {each[1]}{unit} per frame",
            )
        )
    return rows


def whole(
    case: Case, target_kl: float | None, *, device: torch.device
) -> tuple[Row, dict[str, Any]]:
    """Iterations with their collection: the row, and the point on the curve."""
    ours, released = (
        Run(case, again=again, target_kl=target_kl, device=device)
        for again in (False, True)
    )
    seconds = in_turns(
        {"ours": ours.iterate, "released": released.iterate},
        rounds=ROUNDS,
        device=device,
    )
    spent = {name: sum(times) / ROUNDS / case.frames for name, times in seconds.items()}
    asked = statistics.mean(ours.figures("seconds"))
    other = spent["ours"] - asked
    queries = statistics.mean(released.figures("queries"))
    found = ratios(seconds["released"], seconds["ours"])
    stop = "no KL stop" if target_kl is None else f"KL stop at {target_kl}"
    steps = [statistics.mean(run.figures("steps")) for run in (released, ours)]
    ratio = spent["released"] / spent["ours"]
    row = Row(
        f"{case.name}: whole iterations, {stop}",
        found,
        note=f"{ratio:.2f} in all; teacher {1000 * asked:.2f} ms, everything else "
        f"{1000 * other:.2f} ms per frame; {queries:.2f} and "
        f"{statistics.mean(ours.figures('queries')):.2f} queries per frame, "
        f"{steps[0]:.0f} and {steps[1]:.0f} updates; {case.worlds[0].name}, "
        f"{case.frames} frames in minibatches of {case.minibatch}",
    )
    return row, {
        "name": case.name,
        "stop": target_kl is not None,
        "share": asked / other,
        "queries": queries,
        "ratio": ratio,
        "rounds": found,
        "queries_of_rounds": released.figures("queries"),
    }


def expected(share: float, queries: float) -> float:
    """Released over ours, teachers being as fast in minibatches as in batches.

    Args:
        share (float): the teacher's seconds for a frame over all others of this frame.
        queries (float): of the released way per frame.
    """
    return (1 + queries * share) / (1 + share)


def draw(points: Sequence[dict[str, Any]], file: Path) -> None:
    """The measured ratios, on the curves that they should be on."""
    import matplotlib

    matplotlib.use("Agg")
    import matplotlib.pyplot as plt

    fig, ax = plt.subplots(figsize=(8, 4.8), dpi=120, layout="constrained")
    shares = torch.logspace(-2.3, 2, 200).tolist()
    # Of the scripted teacher, whose runs differ little; OpenVLA's is another.
    stopped = statistics.mean(
        p["queries"] for p in points if p["stop"] and p["name"].startswith("scripted")
    )
    colours = {False: "tab:blue", True: "tab:orange"}
    for stop, queries in ((False, float(EPOCHS)), (True, stopped)):
        curve = [expected(share, queries) for share in shares]
        ax.plot(shares, curve, color=colours[stop], lw=1.5, zorder=1)
        ax.axhline(queries, color=colours[stop], ls=":", lw=1, zorder=0)
        ax.annotate(
            f"{f'KL stop at {TARGET_KL}' if stop else 'no KL stop'}: "
            f"{queries:.1f} queries per frame, the limit",
            (0.0053, queries),
            xytext=(0, -12 if stop else 4),
            textcoords="offset points",
            color=colours[stop],
            fontsize=9,
        )
    ax.axhline(1, color="tab:gray", ls=":", lw=1, zorder=0)
    names = list(dict.fromkeys(p["name"] for p in points))
    markers = dict(zip(names, "osD^v", strict=False))
    for point in points:
        colour, at = colours[point["stop"]], (point["share"], point["ratio"])
        ax.plot(*at, markers[point["name"]], color=colour, ms=8, mec="white", zorder=2)
        if point["stop"] and abs(point["queries"] - stopped) > 1:
            ax.annotate(
                f"{point['queries']:.1f} queries",
                at,
                xytext=(-8, 6),
                ha="right",
                textcoords="offset points",
                color=colour,
                fontsize=9,
            )
    for name, marker in markers.items():
        ax.plot([], [], marker, color="dimgray", label=name)
    ax.legend(loc="lower right", fontsize=9, frameon=False)
    ax.set(
        xscale="log",
        xlim=(0.005, 100),
        ylim=(0, EPOCHS + 1),
        xlabel="teacher's seconds for a frame / all other seconds for a frame",
        ylabel="asked in every minibatch / labelled once",
        title="How much longer a whole run takes that asks in every minibatch",
    )
    ax.grid(alpha=0.25)
    fig.savefig(file)
    plt.close(fig)


def cases(device: torch.device) -> list[Case]:
    """All teachers that can be built here."""
    found = []
    if importlib.util.find_spec("transformers") is not None:
        from benchmarks.throughput_openvla import build

        openvla = build(device=device, dtype=torch.float32, tiny=True)
        pictures = tuple(picture_world(TASK, ENVS, 64, device) for _ in range(2))
        found.append(Case("tiny OpenVLA", openvla, pictures, 48, 12, (48, 4)))
    states = tuple(state_world(TASK, ENVS, device) for _ in range(2))
    for seconds in SLEEPS:
        slow = SlowTeacher(ScriptedTeacher(TASK), seconds)
        name = f"scripted, {1000 * seconds:g} ms of sleep"
        found.append(Case(name, slow, states, 128, 32, (256, 16)))
    return found


def rows(*, device: torch.device) -> Section:
    """Everything about asking once."""
    found = cases(device)
    lines = []
    for case in (found[0], found[-2]):
        lines += before(case, device=device)
    points = []
    for target_kl in (None, TARGET_KL):
        for case in found:
            if target_kl is not None:
                frames, minibatch = case.stopping
                case = replace(case, frames=frames, minibatch=minibatch)
            row, point = whole(case, target_kl, device=device)
            lines.append(row)
            points.append(point)
    for env in {world.env for case in found for world in case.worlds}:
        env.close(raise_if_closed=False)
    stopped = [each for p in points if p["stop"] for each in p["queries_of_rounds"]]
    text = (
        "Released way / labelled once; in turns, the same frames and updates. With $s$ "
        "the teacher's seconds for a frame over all other seconds of that frame "
        "(simulator, student, updates) and $q$ the queries per frame of the released "
        "way, a run takes $(1 + qs) / (1 + s)$ times as long: 1 where the teacher costs "
        f"nothing, $q$ where it costs everything. $q$ is {EPOCHS} without a KL stop. "
        "With one it is as many as the epochs that are gone through, here between "
        f"{min(stopped):.1f} and {max(stopped):.1f} in an iteration (the second to sixth "
        "of a run); below 1, asking late asks less, since once per frame labels frames "
        "that no update comes to. Dotted: the limits. Points above their curve: many "
        "questions about few frames cost more than one about all. A large teacher's "
        "point lies to the right: divide its seconds for a frame by all others of your "
        "run."
    )
    return Section(
        rows=[row.cells for row in lines],
        text=text,
        alt="Seconds of a run that asks in every minibatch over those of a run that "
        "labels each frame once, against the teacher's share.",
        draw=lambda file: draw(points, file),
        numbers={"points": points},
    )
