# Copyright (c) the torchrl_rpd authors.
#
# This source code is licensed under the MIT license found in the
# LICENSE file in the root directory of this source tree.
"""A student: actor and critic together, and its file."""

from __future__ import annotations

import json
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from tensordict import NestedKey
from tensordict.nn import ProbabilisticTensorDictSequential, TensorDictModuleBase
from torch import nn

from torchrl_rpd._safetensors import read_header, written_whole
from torchrl_rpd.students.normalisation import RunningObservationNorm

__all__ = ["ActorCritic"]

_FORMAT = "torchrl_rpd.student/1"

# Every builder enters itself here, by the name that its students' files hold.
BUILDERS: dict[str, Callable[..., ActorCritic]] = {}


def key_from_json(key: NestedKey | list[str]) -> NestedKey:
    """Returns a key that may have been a nested one before it was written as JSON."""
    return key if isinstance(key, str) else tuple(key)


def key_to_json(key: NestedKey) -> str | list[str]:
    """Returns what :func:`key_from_json` understands."""
    return key if isinstance(key, str) else list(key)


@dataclass
class ActorCritic:
    """A student: actor, critic and what is needed to build them again.

    Attributes:
        actor: writes ``loc``, ``scale``, ``action`` and ``action_log_prob``.
        critic: writes ``state_value`` ``[*B, 1]``: the loss's critic. Where actor and
            critic share an encoder, it is the head alone, which reads what the actor
            has just encoded.
        observation_norm: the running statistics shared by both, or None.
        config: the arguments of the builder, JSON-able.
        metadata: free text fields that are saved with the student.
        builder: the name of the function that builds it.
        value_network: writes ``state_value`` from the observation alone: for GAE.
            Defaults to ``critic``, which is the same where nothing is shared.

    Examples:
        >>> from torchrl_rpd.students import mlp_actor_critic
        >>> student = mlp_actor_critic(observation_dim=42, action_dim=7)
        >>> student.actor.in_keys, student.critic.out_keys
        (['observation'], ['state_value'])
        >>> student.config["log_std_init"]
        -0.5
        >>> student.value_network is student.critic
        True
    """

    actor: ProbabilisticTensorDictSequential
    critic: TensorDictModuleBase
    observation_norm: RunningObservationNorm | None
    config: dict[str, Any]
    metadata: dict[str, Any] = field(default_factory=dict)
    builder: str = "mlp_actor_critic"
    value_network: TensorDictModuleBase = None

    def __post_init__(self) -> None:
        if self.value_network is None:
            self.value_network = self.critic

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
            "builder": self.builder,
            "config": json.dumps(self.config),
            "metadata": json.dumps({**self.metadata, **metadata}),
        }
        with written_whole(path) as partial:
            save_model(self._container(), partial, metadata=header)

    @staticmethod
    def load(path: str | Path) -> ActorCritic:
        """Builds the student that :meth:`save` wrote.

        Raises:
            ValueError: if the file is no student of this package, or one that this
                version cannot build.
        """
        from safetensors.torch import load_model

        header = read_header(path)
        if header.get("format") != _FORMAT:
            raise ValueError(
                f"{path} holds no student that ActorCritic.save wrote (format "
                f"{header.get('format')!r}, expected {_FORMAT!r})."
            )
        # Files of the first version name no builder.
        builder = header.get("builder", "mlp_actor_critic")
        if builder not in BUILDERS:
            raise ValueError(
                f"{path} holds a student of {builder!r}, which this version of the "
                f"package does not have (it has {sorted(BUILDERS)})."
            )
        try:
            student = BUILDERS[builder](**json.loads(header["config"]))
            student.metadata = json.loads(header["metadata"])
        except (KeyError, TypeError, ValueError) as error:
            raise ValueError(
                f"{path} does not say how to build its student "
                f"({type(error).__name__}: {error})."
            ) from error
        load_model(student._container(), str(path))
        return student

    def _container(self) -> nn.Module:
        return nn.ModuleDict({"actor": self.actor, "critic": self.critic})
