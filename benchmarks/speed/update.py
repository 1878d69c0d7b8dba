# Copyright (c) the torchrl_rpd authors.
#
# This source code is licensed under the MIT license found in the
# LICENSE file in the root directory of this source tree.
"""The updates of a batch: beside ClipPPOLoss, and beside a loop in plain torch.

Ours is what a run does: TorchRL's trainer with the hooks of ``make_ppo_trainer``. The loop
in plain torch is what ManiSkill's baseline does with the same networks, minibatches and
logged numbers, written down here.
"""

from __future__ import annotations

import statistics
from collections.abc import Callable, Sequence
from dataclasses import dataclass

import torch
from tensordict import TensorDictBase
from torch import Tensor, nn
from torchrl.objectives import ClipPPOLoss
from torchrl.trainers.algorithms import PPOTrainer

from benchmarks.speed._noise import NoiseEnv
from benchmarks.speed._runs import CLIP, CRITIC, LR, NORM, World, trainer_of, zeros
from benchmarks.speed._turns import Row, in_turns, ratios
from torchrl_rpd.objectives import DistillPPOLoss
from torchrl_rpd.students import ActorCritic, cnn_actor_critic, mlp_actor_critic
from torchrl_rpd.transforms import TeacherActionTransform


def trainer_over_noise(
    case: Case,
    *,
    loss_class: type[ClipPPOLoss],
    device: torch.device,
    compile: bool | dict[str, str] = False,
) -> PPOTrainer:
    """A trainer of one epoch, whose labels are zeros."""
    env = NoiseEnv(case.rows // 50, case.shape)
    return trainer_of(
        World(case.name, env, lambda: student_of(case)),
        frames=case.rows,
        minibatch=case.minibatch,
        device=device,
        label=TeacherActionTransform(zeros, low=-1, high=1),
        epochs=1,
        loss_class=loss_class,
        value_chunk_size=1,
        compile=compile,
        target_kl=None,
    )


def epoch_of(trainer: PPOTrainer, batch: TensorDictBase) -> Callable[[], None]:
    """One epoch as the trainer makes it, its hooks and log included.

    The batch is prepared once: the advantages are no part of it.
    """
    prepared = trainer._process_batch_hook(batch)
    return lambda: trainer.optim_steps(prepared)


class Plain:
    """Networks of the same sizes in plain torch, and the loop over minibatches."""

    def __init__(self, shape: Sequence[int], device: torch.device) -> None:
        self.log_std = nn.Parameter(torch.full((7,), -0.5, device=device))
        self.picture = len(shape) == 3
        if self.picture:
            side = shape[-1] // 8 - 4
            self.encoder: nn.Module = nn.Sequential(
                nn.Conv2d(3, 32, 8, stride=4),
                nn.ReLU(),
                nn.Conv2d(32, 64, 4, stride=2),
                nn.ReLU(),
                nn.Conv2d(64, 64, 3),
                nn.ReLU(),
                nn.Flatten(),
                nn.Linear(64 * side * side, 256),
                nn.ReLU(),
            ).to(device)
        else:
            self.encoder = nn.Identity()
        self.actor, self.critic = (
            self._head(shape, outputs).to(device) for outputs in (7, 1)
        )
        networks = (self.encoder, self.actor, self.critic)
        self.parameters = [self.log_std, *(p for n in networks for p in n.parameters())]
        self.adam = torch.optim.Adam(self.parameters, lr=LR, eps=1e-5)

    def _head(self, shape: Sequence[int], outputs: int) -> nn.Sequential:
        if self.picture:
            return nn.Sequential(
                nn.Linear(256, 512), nn.ReLU(), nn.Linear(512, outputs)
            )
        return nn.Sequential(
            nn.Linear(shape[0], 256),
            nn.Tanh(),
            nn.Linear(256, 256),
            nn.Tanh(),
            nn.Linear(256, outputs),
        )

    def epoch(self, data: dict[str, Tensor], minibatch: int) -> dict[str, float]:
        """Updates once on every row; what is logged is read at the end."""
        rows = len(data["action"])
        order = torch.randperm(rows, device=data["action"].device)
        sums: dict[str, Tensor] = {}
        for start in range(0, rows, minibatch):
            chosen = order[start : start + minibatch]
            part = {name: value[chosen] for name, value in data.items()}
            observation = part["observation"]
            if self.picture:
                observation = observation.float() / 255
            features = self.encoder(observation)
            mean, std = self.actor(features), self.log_std.exp()
            normal = torch.distributions.Normal(mean, std)
            log_ratio = normal.log_prob(part["action"]).sum(-1) - part["log_prob"]
            ratio = log_ratio.exp()
            advantage = part["advantage"]
            advantage = (advantage - advantage.mean()) / (advantage.std() + 1e-8)
            clipped = ratio.clamp(1 - CLIP, 1 + CLIP)
            policy = torch.max(-advantage * ratio, -advantage * clipped).mean()
            value = (self.critic(features).squeeze(-1) - part["target"]).square().mean()
            error = (mean - part["label"]).square().mean()
            loss = policy + CRITIC * value + error
            self.adam.zero_grad()
            loss.backward()
            nn.utils.clip_grad_norm_(self.parameters, NORM)
            self.adam.step()
            with torch.no_grad():
                logged = {
                    "policy": policy.detach(),
                    "value": value.detach(),
                    "error": error.detach(),
                    "kl": ((ratio - 1) - log_ratio).mean(),
                    "clipped": ((ratio - 1).abs() > CLIP).float().mean(),
                }
            for name, number in logged.items():
                sums[name] = sums.get(name, 0) + number
        return {name: float(number) for name, number in sums.items()}


@dataclass(frozen=True)
class Case:
    """A network and its batch."""

    name: str
    shape: tuple[int, ...]
    rows: int
    minibatch: int
    limit: float = 1.05  # of the ratio to plain torch


MLP = Case("MLP, minibatch 133", (42,), 6400, 133, 1.6)
CNN = Case("NatureCNN, 128x128, minibatch 128", (3, 128, 128), 400, 128)
LARGE = Case("NatureCNN, 256x256, minibatch 128", (3, 256, 256), 1600, 128)


def student_of(case: Case) -> ActorCritic:
    """With as many weights as the plain one."""
    if len(case.shape) == 3:
        return cnn_actor_critic(case.shape[-1], 7)
    return mlp_actor_critic(case.shape[0], 7, normalize_observation=False)


Side = tuple[str, type[ClipPPOLoss], bool | dict[str, str]]
SIDES: tuple[Side, ...] = (
    ("ours", DistillPPOLoss, False),
    ("compiled", DistillPPOLoss, True),
    ("ClipPPOLoss", ClipPPOLoss, False),
)
ON_GPU: Side = ("CUDA graphs", DistillPPOLoss, {"mode": "reduce-overhead"})


def compare(case: Case, *, device: torch.device, rounds: int) -> list[Row]:
    """Epochs of both losses and of the plain loop, in turns."""
    sides = {}
    on_cpu = device.type == "cpu"
    for name, loss_class, compiled in (*SIDES, *(() if on_cpu else (ON_GPU,))):
        trainer = trainer_over_noise(
            case, loss_class=loss_class, device=device, compile=compiled
        )
        batch = next(iter(trainer.collector))
        sides[name] = epoch_of(trainer, batch)
    plain = Plain(case.shape, device)
    prepared = trainer._process_batch_hook(batch).reshape(-1)
    picture = len(case.shape) == 3
    key = ("observation", "image") if picture else "observation"
    data = {
        "observation": prepared[key],
        "action": prepared["action"],
        "log_prob": prepared["action_log_prob"],
        "advantage": prepared["advantage"].squeeze(-1),
        "target": prepared["value_target"].squeeze(-1),
        "label": prepared["teacher_action"],
    }
    data = {name: value.clone() for name, value in data.items()}
    sides["plain"] = lambda: plain.epoch(data, case.minibatch)
    seconds = in_turns(sides, rounds=rounds, device=device)
    ms = {name: 1e3 * statistics.median(times) for name, times in seconds.items()}
    bars = {"ours": ("an epoch", case.limit), "compiled": ("compile=True", 1.0)}
    if not on_cpu:
        bars["CUDA graphs"] = ("compile={'mode': 'reduce-overhead'}", 1.0)
    return [
        Row(
            f"{case.name}: DistillPPOLoss / ClipPPOLoss, same trainer",
            ratios(seconds["ours"], seconds["ClipPPOLoss"]),
            at_most=1.05,
            note=f"{ms['ours']:,.0f} and {ms['ClipPPOLoss']:,.0f} ms",
        ),
        *(
            Row(
                f"{case.name}: {what} / a loop in plain torch",
                ratios(seconds[name], seconds["plain"]),
                at_most=limit,
                note=f"{ms[name]:,.0f} and {ms['plain']:,.0f} ms",
            )
            for name, (what, limit) in bars.items()
        ),
    ]


def rows(*, device: torch.device, rounds: int = 7) -> list[Row]:
    """Everything about updates."""
    cases = (MLP, LARGE) if device.type == "cuda" else (MLP, CNN)
    return [
        row for case in cases for row in compare(case, device=device, rounds=rounds)
    ]
