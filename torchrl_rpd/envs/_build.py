# Copyright (c) the torchrl_rpd authors.
#
# This source code is licensed under the MIT license found in the
# LICENSE file in the root directory of this source tree.
"""Builds ManiSkill environments, with or without a Vulkan device."""

from __future__ import annotations

import copy
import importlib
import warnings
from collections.abc import Mapping, Sequence
from functools import partial
from typing import Any

import torch

from torchrl_rpd.envs import _vulkan
from torchrl_rpd.envs._scene import SceneChanges, adapted_class
from torchrl_rpd.envs._variants import register_variants

Size = int | tuple[int, int]


def registered_tasks() -> Mapping[str, Any]:
    """ManiSkill's tasks and our variants of them, by id."""
    importlib.import_module("mani_skill.envs")
    register_variants()
    registration = importlib.import_module("mani_skill.utils.registration")
    tasks: Mapping[str, Any] = registration.REGISTERED_ENVS
    return tasks


def check_task(task_id: str, reward_mode: str) -> None:
    """Says what there is instead of an unknown task or reward mode."""
    tasks = registered_tasks()
    spec = tasks.get(task_id)
    if spec is None:
        close = [t for t in tasks if t[:4] == task_id[:4]]
        raise ValueError(
            f"ManiSkill has no task {task_id!r}. Similar names: {sorted(close)}; "
            "all of them: ManiSkillEnv.available_envs."
        )
    supported = spec.cls.SUPPORTED_REWARD_MODES
    if reward_mode not in supported:
        raise ValueError(
            f"{task_id} has no reward_mode={reward_mode!r}. Choose one of "
            f"{sorted(supported)}."
        )


def choose_sim_backend(sim_backend: str, *, fast_controller: bool) -> str:
    """``"physx_cpu"``, or ``"physx_cuda"`` with the device's number if given."""
    if sim_backend == "auto":
        # The fast controller exists for the CPU only.
        on_gpu = torch.cuda.is_available() and not fast_controller
        return "physx_cuda" if on_gpu else "physx_cpu"
    kind, _, number = sim_backend.partition(":")
    if kind in ("physx_cpu", "cpu"):
        return "physx_cpu"
    if kind not in ("physx_cuda", "cuda", "gpu"):
        raise ValueError(
            f"sim_backend={sim_backend!r} is unknown. Use 'auto', 'physx_cpu' or "
            "'physx_cuda'."
        )
    if not torch.cuda.is_available():
        raise ValueError(
            f"sim_backend={sim_backend!r} needs a CUDA device, and torch finds none. Use "
            "'physx_cpu'."
        )
    if fast_controller:
        raise ValueError(
            f"fast_controller=True is for CPU simulation, not sim_backend="
            f"{sim_backend!r}. Use one or the other."
        )
    return f"physx_cuda:{number}" if number else "physx_cuda"


def height_width(size: Size) -> tuple[int, int]:
    """``(height, width)`` of a picture; one number means a square."""
    height, width = (size, size) if isinstance(size, int) else size
    if height < 1 or width < 1:
        raise ValueError(f"The size of a picture is positive, got {size}.")
    return height, width


def camera_settings(
    size: Size | None, overrides: Mapping[str, Any] | None
) -> dict[str, Any]:
    """ManiSkill's settings of all cameras of one kind: a size, and what overrides it."""
    settings: dict[str, Any] = {}
    if size is not None:
        settings["height"], settings["width"] = height_width(size)
    for name, value in (overrides or {}).items():
        # ManiSkill writes to what it is given.
        value = copy.deepcopy(value)
        settings[name] = with_pose(value) if isinstance(value, Mapping) else value
    return with_pose(settings)


def with_pose(config: Mapping[str, Any]) -> dict[str, Any]:
    """A camera's settings with a ``pose`` as SAPIEN has it, if they place the camera.

    It is given as 7 numbers (position, then quaternion with the real part first), as
    ``eye`` and ``target``, or as SAPIEN's own.
    """
    config = dict(config)
    if ("eye" in config) != ("target" in config):
        raise ValueError("A camera needs both eye and target: where it is, and looks.")
    if "eye" in config:
        sapien_utils = importlib.import_module("mani_skill.utils.sapien_utils")
        look_at = sapien_utils.look_at(config.pop("eye"), config.pop("target"))
        config["pose"] = look_at.raw_pose[0].tolist()
    if isinstance(config.get("pose"), Sequence):
        numbers = [float(x) for x in config["pose"]]
        if len(numbers) != 7:
            raise ValueError(
                "The pose of a camera has 7 numbers (x, y, z, then the quaternion w, x, "
                f"y, z), got {len(numbers)}."
            )
        sapien = importlib.import_module("sapien")
        config["pose"] = sapien.Pose(numbers[:3], numbers[3:])
    return config


def make(
    task_id: str,
    *,
    render_backend: str,
    changes: SceneChanges,
    **kwargs: Any,
) -> Any:
    """Builds one ManiSkill environment.

    Args:
        task_id: a registered task.

    Keyword Args:
        render_backend: as ManiSkill understands it; ``"none"`` needs no driver.
        changes: what differs from the task as it is registered.
        **kwargs: passed to ``gym.make``.
    """
    import gymnasium as gym

    if render_backend == "none":
        if _vulkan.has_render_device():
            _vulkan.allow_push_t_without_rendering()
        else:
            _vulkan.use_without_vulkan()
    task: Any = task_id
    if changes.any:
        registered = registered_tasks()[task_id]
        task = copy.copy(gym.spec(task_id))
        task.entry_point = partial(adapted_class(registered.cls), changes=changes)
    with warnings.catch_warnings():
        # gymnasium warns of ManiSkill's batched spaces; the adapter reads the tensors.
        warnings.simplefilter("ignore", UserWarning)
        return gym.make(task, render_backend=render_backend, **kwargs)
