# Copyright (c) the torchrl_rpd authors.
#
# This source code is licensed under the MIT license found in the
# LICENSE file in the root directory of this source tree.
"""Student networks: actor and critic as TensorDict modules."""

from __future__ import annotations

import json
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from tensordict import NestedKey
from tensordict.nn import AddStateIndependentNormalScale, TensorDictModule
from torch import nn
from torchrl.modules import MLP, IndependentNormal, ProbabilisticActor, ValueOperator

_FORMAT = "torchrl_rpd.student/1"


class RunningObservationNorm(nn.Module):
    """Normalises observations by the mean and variance of those seen so far.

    The statistics are buffers, so that they are saved with the student. They change only
    in :meth:`update`, never in :meth:`forward`: the log-probabilities of a rollout and of
    the updates that use it must come from the same normalisation.

    Args:
        dim (int): observation dimension ``D``.

    Keyword Args:
        eps (float): added to the variance. Default: ``1e-5``.
        clip (float): bound of the normalised values. Default: ``10.0``.

    Examples:
        >>> import torch
        >>> norm = RunningObservationNorm(1)
        >>> norm.update(torch.tensor([[1.0], [3.0]]))
        >>> norm(torch.tensor([[2.0], [3.0]])).round(decimals=3).flatten().tolist()
        [0.0, 1.0]
    """

    mean: torch.Tensor
    var: torch.Tensor
    count: torch.Tensor

    def __init__(self, dim: int, *, eps: float = 1e-5, clip: float = 10.0) -> None:
        super().__init__()
        self.eps = eps
        self.clip = clip
        self.register_buffer("mean", torch.zeros(dim))
        self.register_buffer("var", torch.ones(dim))
        self.register_buffer("count", torch.zeros((), dtype=torch.float64))

    def forward(self, observation: torch.Tensor) -> torch.Tensor:
        """Normalises ``[*B, D]`` observations."""
        normalised = (observation - self.mean) * (self.var + self.eps).rsqrt()
        return normalised.clamp(-self.clip, self.clip)

    @torch.no_grad()
    def update(self, observation: torch.Tensor) -> None:
        """Adds ``[*B, D]`` observations to the statistics (Chan et al., 1979)."""
        rows = observation.reshape(-1, observation.shape[-1]).double()
        n = rows.shape[0]
        total = self.count + n
        delta = rows.mean(0) - self.mean
        m2 = (
            self.var.double() * self.count
            + rows.var(0, unbiased=False) * n
            + delta.square() * (self.count * n / total)
        )
        # In place: the loss's functional parameters refer to the same buffers.
        self.mean.add_((delta * (n / total)).to(self.mean.dtype))
        self.var.copy_(m2 / total)
        self.count.copy_(total)


@dataclass
class ActorCritic:
    """A student: actor, critic and what is needed to build them again.

    Attributes:
        actor: writes ``loc``, ``scale``, ``action`` and ``action_log_prob``.
        critic: writes ``state_value`` ``[*B, 1]``.
        observation_norm: the running statistics shared by both, or None.
        config: the arguments of the builder, JSON-able.
        metadata: free text fields that are saved with the student.

    Examples:
        >>> from torchrl_rpd.students import mlp_actor_critic
        >>> student = mlp_actor_critic(observation_dim=42, action_dim=7)
        >>> student.actor.in_keys, student.critic.out_keys
        (['observation'], ['state_value'])
        >>> student.config["log_std_init"]
        -0.5
    """

    actor: ProbabilisticActor
    critic: ValueOperator
    observation_norm: RunningObservationNorm | None
    config: dict[str, Any]
    metadata: dict[str, Any] = field(default_factory=dict)

    def save(self, path: str | Path, **metadata: Any) -> None:
        """Writes weights, statistics and the builder's arguments as safetensors.

        Args:
            path: file to write; missing folders are made.
            **metadata: JSON-able facts to keep beside the weights, e.g. the task.

        Examples:
            >>> import tempfile, pathlib
            >>> from torchrl_rpd.students import ActorCritic, mlp_actor_critic
            >>> student = mlp_actor_critic(4, 2)
            >>> file = pathlib.Path(tempfile.mkdtemp()) / "student.safetensors"
            >>> student.save(file, task="PickCube-v1")
            >>> ActorCritic.load(file).metadata
            {'task': 'PickCube-v1'}
        """
        from safetensors.torch import save_model

        path = Path(path)
        path.parent.mkdir(parents=True, exist_ok=True)
        header = {
            "format": _FORMAT,
            "config": json.dumps(self.config),
            "metadata": json.dumps({**self.metadata, **metadata}),
        }
        # Written beside and moved: a run that is killed here leaves the old file whole.
        partial = path.with_name(path.name + ".part")
        save_model(self._container(), str(partial), metadata=header)
        partial.replace(path)

    @staticmethod
    def load(path: str | Path) -> ActorCritic:
        """Builds the student that :meth:`save` wrote.

        Raises:
            ValueError: if the file is no student of this package.
        """
        from safetensors import safe_open
        from safetensors.torch import load_model

        with safe_open(str(path), framework="pt") as file:
            header = file.metadata() or {}
        if header.get("format") != _FORMAT:
            raise ValueError(
                f"{path} holds no student that ActorCritic.save wrote (format "
                f"{header.get('format')!r}, expected {_FORMAT!r})."
            )
        student = mlp_actor_critic(**json.loads(header["config"]))
        student.metadata = json.loads(header["metadata"])
        load_model(student._container(), str(path))
        return student

    def _container(self) -> nn.Module:
        return nn.ModuleDict({"actor": self.actor, "critic": self.critic})


def mlp_actor_critic(
    observation_dim: int,
    action_dim: int,
    *,
    num_cells: Sequence[int] = (256, 256),
    log_std_init: float = -0.5,
    normalize_observation: bool = True,
    observation_key: NestedKey = "observation",
) -> ActorCritic:
    """Builds an MLP student for state observations.

    Actor and critic are separate tanh networks with orthogonal weights. The action
    distribution is a diagonal normal without bounds, as in the paper's code: the
    environment clips the action, the log-probability is the unclipped action's. Its
    standard deviation does not depend on the observation.

    Args:
        observation_dim (int): ``D`` of the ``[*B, D]`` float32 observation.
        action_dim (int): ``A`` of the ``[*B, A]`` float32 action.

    Keyword Args:
        num_cells (sequence of int): widths of the hidden layers. Default: ``(256, 256)``.
        log_std_init (float): initial log standard deviation, in action units. Default:
            ``-0.5``, the paper's code.
        normalize_observation (bool): if ``True`` (default), both networks see
            observations normalised by running statistics, see
            :class:`RunningObservationNorm`.
        observation_key (NestedKey): where the observation is read. Default:
            ``"observation"``.

    Returns:
        an :class:`ActorCritic`.

    Examples:
        >>> import torch
        >>> from tensordict import TensorDict
        >>> from torchrl_rpd.students import mlp_actor_critic
        >>> student = mlp_actor_critic(42, 7)
        >>> td = student.actor(TensorDict(observation=torch.zeros(3, 42), batch_size=[3]))
        >>> td["action"].shape, td["action_log_prob"].shape
        (torch.Size([3, 7]), torch.Size([3]))
        >>> student.critic(td)["state_value"].shape
        torch.Size([3, 1])
    """
    # A nested key comes back from JSON as a list.
    if not isinstance(observation_key, str):
        observation_key = tuple(observation_key)
    norm = RunningObservationNorm(observation_dim) if normalize_observation else None

    def head(out_features: int, last_gain: float) -> list[nn.Module]:
        mlp = MLP(
            in_features=observation_dim,
            out_features=out_features,
            num_cells=list(num_cells),
            activation_class=nn.Tanh,
        )
        linears = [m for m in mlp.modules() if isinstance(m, nn.Linear)]
        for layer in linears:
            gain = last_gain if layer is linears[-1] else 2**0.5
            nn.init.orthogonal_(layer.weight, gain)
            nn.init.zeros_(layer.bias)
        return [norm, mlp] if norm is not None else [mlp]

    actor = ProbabilisticActor(
        TensorDictModule(
            nn.Sequential(
                *head(action_dim, 0.01),
                AddStateIndependentNormalScale(action_dim, init_value=log_std_init),
            ),
            in_keys=[observation_key],
            out_keys=["loc", "scale"],
        ),
        in_keys=["loc", "scale"],
        distribution_class=IndependentNormal,
        return_log_prob=True,
    )
    critic = ValueOperator(nn.Sequential(*head(1, 1.0)), in_keys=[observation_key])
    config = {
        "observation_dim": observation_dim,
        "action_dim": action_dim,
        "num_cells": list(num_cells),
        "log_std_init": log_std_init,
        "normalize_observation": normalize_observation,
        "observation_key": (
            observation_key
            if isinstance(observation_key, str)
            else list(observation_key)
        ),
    }
    return ActorCritic(actor, critic, norm, config)
