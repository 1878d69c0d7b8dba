# Copyright (c) the torchrl_rpd authors.
#
# This source code is licensed under the MIT license found in the
# LICENSE file in the root directory of this source tree.
"""Configuration of the teachers."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any, NoReturn

import torch
from omegaconf import MISSING
from tensordict import TensorDictBase
from torchrl.trainers.algorithms.configs.common import ConfigBase

from torchrl_rpd.configs._plain import as_dtype, with_keys
from torchrl_rpd.teachers import (
    OctoTeacher,
    OpenVLATeacher,
    PocketVLATeacher,
    ScriptedTeacher,
)
from torchrl_rpd.teachers.remote import RemoteTeacher


def _origin() -> list[float]:
    return [0.0, 0.0, 0.0]


@dataclass
class _TeacherConfig(ConfigBase):
    _convert_: str = "all"
    _partial_: bool = False

    def __post_init__(self) -> None:
        """Nothing to set up."""


@dataclass
class ScriptedTeacherConfig(_TeacherConfig):
    """Hydra configuration for :class:`~torchrl_rpd.teachers.ScriptedTeacher`.

    Every argument of the constructor is a field.

    Examples:
        >>> from hydra.utils import instantiate
        >>> from torchrl_rpd.configs import ScriptedTeacherConfig
        >>> config = ScriptedTeacherConfig(task_id="PickCube-v1", cube_offset_std=0.02)
        >>> instantiate(config).in_keys
        ['observation', 'episode_seed']
    """

    task_id: str = MISSING
    seed: int = 0
    jitter: float = 0.0
    gripper_chatter: float = 0.0
    random_action: float = 0.0
    laziness: float = 0.0
    cube_offset: list[float] = field(default_factory=_origin)
    goal_offset: list[float] = field(default_factory=_origin)
    cube_offset_std: Any = 0.0
    goal_offset_std: Any = 0.0
    blind_region: Any = None
    observation_key: Any = "observation"
    episode_seed_key: Any = "episode_seed"
    action_key: Any = field(default_factory=lambda: ["vla_action", "chunk"])
    _target_: str = "torchrl_rpd.configs.teachers.make_scripted"


@dataclass
class OpenVLATeacherConfig(_TeacherConfig):
    """Hydra configuration for ``OpenVLATeacher.from_pretrained``.

    Every argument of it, and of :class:`~torchrl_rpd.teachers.OpenVLATeacher` that it
    passes on, is a field. ``dtype`` is a name such as ``bfloat16``.

    Examples:
        >>> import tempfile
        >>> from hydra.utils import instantiate
        >>> from torchrl_rpd.configs import OpenVLATeacherConfig
        >>> from torchrl_rpd.teachers.openvla import write_tiny_checkpoint
        >>> folder = write_tiny_checkpoint(tempfile.mkdtemp())
        >>> config = OpenVLATeacherConfig(path=str(folder), instruction="pick it up")
        >>> instantiate(config).in_keys
        [('observation', 'image')]
    """

    path: str = MISSING
    instruction: str | None = None
    unnorm_key: str | None = None
    dtype: str | None = None
    device: str = "cpu"
    revision: str | None = None
    cache_dir: str | None = None
    local_files_only: bool | None = None
    gripper: str = "raw"
    readout: str = "greedy"
    spread: bool = False
    min_std: float = 0.0
    max_batch_size: int | None = None
    compile: bool = False
    cuda_graph: bool = False
    image_key: Any = field(default_factory=lambda: ["observation", "image"])
    instruction_key: Any = "language_instruction"
    action_chunk_key: Any = None
    _target_: str = "torchrl_rpd.configs.teachers.load_openvla"


@dataclass
class OctoTeacherConfig(_TeacherConfig):
    """Hydra configuration for ``OctoTeacher.from_pretrained``.

    Every argument of it is a field. ``dtype`` is a name such as ``float32``.

    Examples:
        >>> import tempfile
        >>> from hydra.utils import instantiate
        >>> from torchrl_rpd.configs import OctoTeacherConfig
        >>> from torchrl_rpd.teachers.octo import write_random_checkpoint
        >>> folder = write_random_checkpoint(tempfile.mkdtemp())
        >>> config = OctoTeacherConfig(path_or_repo=str(folder), instruction="pick it up")
        >>> instantiate(config).in_keys
        [('observation', 'image')]
    """

    path_or_repo: str = MISSING
    instruction: str | None = None
    step: int | None = None
    unnorm_key: str | None = None
    num_samples: int = 1
    window_size: int = 1
    seed: int = 0
    gripper: str = "raw"
    dtype: str = "float32"
    device: str | None = None
    tokenizer: str | None = None
    revision: str | None = None
    cache_dir: str | None = None
    local_files_only: bool | None = None
    image_key: Any = field(default_factory=lambda: ["observation", "image"])
    wrist_image_key: Any = None
    instruction_key: Any = "language_instruction"
    std_key: Any = "teacher_std"
    _target_: str = "torchrl_rpd.configs.teachers.load_octo"


@dataclass
class PocketVLATeacherConfig(_TeacherConfig):
    """Hydra configuration for :class:`~torchrl_rpd.teachers.PocketVLATeacher`.

    Every argument of the constructor is a field.

    Examples:
        >>> from hydra.utils import instantiate
        >>> from torchrl_rpd.configs import PocketVLATeacherConfig
        >>> instantiate(PocketVLATeacherConfig(task_id="PushCube-v1")).chunk_size
        4
    """

    task_id: str | None = None
    instruction: str | None = None
    path: str | None = None
    device: str = "cpu"
    image_key: Any = field(default_factory=lambda: ["observation", "image"])
    instruction_key: Any = "language_instruction"
    _target_: str = "torchrl_rpd.configs.teachers.load_pocket"


@dataclass
class RemoteTeacherConfig(_TeacherConfig):
    """Hydra configuration for :class:`~torchrl_rpd.teachers.RemoteTeacher`.

    Every argument of the constructor is a field. ``in_keys`` is a list of keys, or a
    mapping from entries that are not nested to the server's names. The connection is
    made when the node is instantiated.

    Examples:
        >>> from torchrl_rpd.configs import RemoteTeacherConfig
        >>> RemoteTeacherConfig(address="ws://localhost:8000").on_error
        'raise'
    """

    address: str = MISSING
    instruction: str | None = None
    in_keys: Any = None
    instruction_key: Any = "language_instruction"
    std_key: Any = "teacher_std"
    token: str | None = None
    timeout: float = 60.0
    connect_timeout: float = 10.0
    retries: int = 3
    backoff: float = 0.5
    on_error: str = "raise"
    cooldown: float = 30.0
    pipeline: int = 8
    action_dim: int | None = None
    chunk_size: int | None = None
    action_convention: str | None = None
    model: str | None = None
    _target_: str = "torchrl_rpd.configs.teachers.connect"


def make_scripted(**kwargs: Any) -> ScriptedTeacher:
    """Builds the teacher of a :class:`ScriptedTeacherConfig`."""
    keys = ("observation_key", "episode_seed_key", "action_key")
    return ScriptedTeacher(**with_keys(kwargs, single=keys))


def load_openvla(*, dtype: str | None = None, **kwargs: Any) -> OpenVLATeacher:
    """Loads the teacher of an :class:`OpenVLATeacherConfig`."""
    keys = ("image_key", "instruction_key", "action_chunk_key")
    kwargs = with_keys(kwargs, single=keys)
    return OpenVLATeacher.from_pretrained(dtype=as_dtype(dtype), **kwargs)


def load_octo(*, dtype: str = "float32", **kwargs: Any) -> OctoTeacher:
    """Loads the teacher of an :class:`OctoTeacherConfig`."""
    keys = ("image_key", "wrist_image_key", "instruction_key", "std_key")
    kwargs = with_keys(kwargs, single=keys)
    return OctoTeacher.from_pretrained(dtype=as_dtype(dtype) or torch.float32, **kwargs)


def load_pocket(**kwargs: Any) -> PocketVLATeacher:
    """Loads the teacher of a :class:`PocketVLATeacherConfig`."""
    return PocketVLATeacher(
        **with_keys(kwargs, single=("image_key", "instruction_key"))
    )


def connect(*, in_keys: Any = None, **kwargs: Any) -> RemoteTeacher:
    """Connects to the teacher of a :class:`RemoteTeacherConfig`."""
    kwargs = with_keys(kwargs, single=("instruction_key", "std_key"))
    if not isinstance(in_keys, Mapping):
        in_keys = with_keys({"in_keys": in_keys}, several=("in_keys",))["in_keys"]
    return RemoteTeacher(in_keys=in_keys, **kwargs)


def no_teacher(tensordict: TensorDictBase) -> NoReturn:
    """Stands where a control has no teacher: PPO alone asks nobody."""
    raise RuntimeError(
        "This run has no teacher, but a label was asked for: the schedule of the "
        "distillation coefficient has to be constant 0."
    )
