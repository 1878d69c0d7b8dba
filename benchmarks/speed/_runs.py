# Copyright (c) the torchrl_rpd authors.
#
# This source code is licensed under the MIT license found in the
# LICENSE file in the root directory of this source tree.
"""Small runs: simulators where there are any, else noise; the released updates."""

from __future__ import annotations

import importlib.util
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from tensordict import NestedKey, TensorDictBase
from torchrl.collectors import Collector
from torchrl.envs import EnvBase
from torchrl.objectives import ClipPPOLoss
from torchrl.trainers.algorithms import PPOTrainer

from benchmarks.speed._noise import NoiseEnv
from torchrl_rpd.objectives import DistillPPOLoss, FiniteHorizonGAE
from torchrl_rpd.students import ActorCritic, cnn_actor_critic, mlp_actor_critic
from torchrl_rpd.trainers import make_ppo_trainer

# Entries of an observation, as the scripted teacher reads them.
STATE = {"PushCube-v1": 35, "PickCube-v1": 42}
NOISE = "noise instead of a simulator"
CLIP, CRITIC, NORM, LR = 0.2, 0.25, 0.5, 3e-4


@dataclass(frozen=True)
class World:
    """What is collected from, and who acts in it.

    Args:
        name (str): in words.
        env (EnvBase): the simulators.
        student (callable): builds one, always the same.
        state_key (NestedKey, optional): what the scripted teacher reads.
    """

    name: str
    env: EnvBase
    student: Callable[[], ActorCritic]
    state_key: NestedKey | None = None


def zeros(tensordict: TensorDictBase) -> torch.Tensor:
    """A teacher that costs nothing."""
    return torch.zeros(tensordict.shape[0], 7, device=tensordict.device)


def has_simulator(device: torch.device, *, drawing: bool = False) -> bool:
    """Whether ManiSkill steps (and draws) here; on a GPU machine noise has to do."""
    if device.type != "cpu" or importlib.util.find_spec("mani_skill") is None:
        return False
    if not drawing:
        return True
    from torchrl_rpd.envs._rendering import can_draw

    return can_draw("cpu")


def state_world(task: str, num_envs: int, device: torch.device) -> World:
    """A student that sees the state."""
    if has_simulator(device):
        from torchrl_rpd.envs import ManiSkillEnv

        env: EnvBase = ManiSkillEnv(task, num_envs=num_envs, fast_controller=True)
        name = f"{task}, state"
    else:
        env, name = NoiseEnv(num_envs, (STATE[task],)), f"{NOISE}, state"
    return World(name, env, lambda: mlp_actor_critic(STATE[task], 7), "observation")


def picture_world(task: str, num_envs: int, size: int, device: torch.device) -> World:
    """A student that sees the picture of ManiSkill's camera for people."""
    if has_simulator(device, drawing=True):
        from torchrl_rpd.envs import ManiSkillEnv

        env: EnvBase = ManiSkillEnv(
            task,
            num_envs=num_envs,
            obs_mode="rgb+state",
            camera="human",
            image_size=size,
            fast_controller=True,
            light_visuals=True,
        )
        name, state_key = f"{task}, pictures of {size}x{size}", ("observation", "state")
    else:
        env = NoiseEnv(num_envs, (3, size, size))
        name, state_key = f"{NOISE}, pictures of {size}x{size}", None
    return World(name, env, lambda: cnn_actor_critic(size, 7), state_key)


def trainer_of(
    world: World,
    *,
    frames: int,
    minibatch: int,
    device: torch.device,
    label: Any = None,
    epochs: int = 8,
    loss_class: type[ClipPPOLoss] = DistillPPOLoss,
    value_chunk_size: int | None = None,
    **kwargs: Any,
) -> PPOTrainer:
    """The trainer of a run whose every batch has ``frames``; it starts from one seed."""
    torch.manual_seed(0)
    world.env.set_seed(0)
    student = world.student()
    for module in (student.actor, student.critic, student.value_network):
        module.to(device)
    loss = loss_class(
        student.actor,
        student.critic,
        clip_epsilon=CLIP,
        entropy_bonus=False,
        loss_critic_type="l2",
        critic_coeff=CRITIC,
        normalize_advantage=True,
    )
    collector = Collector(
        world.env,
        student.actor,
        frames_per_batch=frames,
        total_frames=-1,
        policy_device=device,
        env_device="cpu",
        storing_device=device,
        postproc=label,
        return_same_td=True,
        auto_register_policy_transforms=False,
    )
    return make_ppo_trainer(
        collector=collector,
        loss_module=loss,
        optimizer=torch.optim.Adam(loss.parameters(), lr=LR, eps=1e-5),
        gae=FiniteHorizonGAE(
            gamma=0.8,
            lmbda=0.9,
            value_network=student.value_network,
            value_chunk_size=value_chunk_size,
        ),
        total_frames=frames,
        minibatch_size=minibatch,
        num_epochs=epochs,
        clip_norm=NORM,
        drop_keys=[("next", "observation")],
        progress_bar=False,
        log_actions=False,
        log_rewards=False,
        **kwargs,
    )
