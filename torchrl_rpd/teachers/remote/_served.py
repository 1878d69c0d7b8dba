# Copyright (c) the torchrl_rpd authors.
#
# This source code is licensed under the MIT license found in the
# LICENSE file in the root directory of this source tree.
"""The teacher behind a server: what it says about itself, and how it is asked."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import numpy as np
import torch
from tensordict import TensorDictBase, is_tensor_collection, unravel_key
from tensordict.utils import NestedKey
from torch import Tensor, nn
from torchrl.data.vla import ACTION_CHUNK_KEY

import torchrl_rpd
from torchrl_rpd.teachers._questioner import (
    _STD_KEYS,
    PAD_MASK_KEY,
    Questioner,
    _single_device,
)
from torchrl_rpd.teachers.openvla import OpenVLATeacher
from torchrl_rpd.teachers.remote._info import (
    IMAGE_LAYOUTS,
    PROTOCOL,
    TeacherInfo,
    wire_name,
)
from torchrl_rpd.teachers.scripted import ScriptedTeacher

__all__ = ["ServedTeacher"]

_GRIPPERS = {
    "raw": "un-normalised, gripper as the model gives it",
    "01_to_pm1": "un-normalised, gripper mapped by 2 g - 1",
}
_SCRIPTED = "ManiSkill's pd_ee_delta_pose, [-1, 1], gripper 1 open and -1 closed"


class ServedTeacher(Questioner):
    """A teacher that is asked batch by batch, frozen, with what it says about itself.

    Args:
        teacher (callable): a TensorDict module, or a function of a tensordict.

    Keyword Args:
        model (str, optional): its name. Defaults to what it calls itself.
        action_dim (int, optional): entries of an action. Defaults to its attribute
            ``action_dim``, unknown without one.
        action_horizon (int, optional): actions of a chunk. Defaults to its attribute
            ``chunk_size``, unknown without one.
        action_convention (str, optional): Defaults to what is known of our teachers.

    Examples:
        >>> from tensordict import TensorDict
        >>> served = ServedTeacher(lambda td: td["observation"][:, :2], action_dim=2)
        >>> actions, std = served.answer(TensorDict({"observation": torch.ones(3, 4)}, [3]))
        >>> actions.shape, std, served.info().action_dim
        ((3, 1, 2), None, 2)
    """

    def __init__(
        self,
        teacher: Callable[[TensorDictBase], Any],
        *,
        model: str | None = None,
        action_dim: int | None = None,
        action_horizon: int | None = None,
        action_convention: str | None = None,
    ) -> None:
        super().__init__(teacher)
        if isinstance(teacher, nn.Module):
            teacher.requires_grad_(False).eval()
        scripted = isinstance(teacher, ScriptedTeacher)
        own_dim = 7 if scripted else getattr(teacher, "action_dim", None)
        single = scripted or self._action_key() != ACTION_CHUNK_KEY
        own_horizon = 1 if single else getattr(teacher, "chunk_size", None)
        convention = _SCRIPTED if scripted else None
        convention = convention or _GRIPPERS.get(getattr(teacher, "gripper", ""))
        self.model = model or (repr(teacher) if scripted else self.name)
        self.action_dim = action_dim or own_dim
        self.action_horizon = action_horizon or own_horizon
        self.action_convention = action_convention or convention

    @property
    def required(self) -> list[NestedKey] | None:
        """The entries that a question must hold; None if it does not say."""
        if self.in_keys is None:
            return None
        mask = [PAD_MASK_KEY] if self.window > 1 else []
        return list(dict.fromkeys([*self.in_keys, *mask]))

    @property
    def image_keys(self) -> list[NestedKey]:
        """The entries that it says are images."""
        keys = getattr(self.teacher, "tensor_keys", None)
        named = (getattr(keys, name, None) for name in ("image", "wrist_image"))
        return [unravel_key(key) for key in named if key is not None]

    def info(self, **also: Any) -> TeacherInfo:
        """The metadata, to which the server adds its own."""
        required = self.required
        deterministic = None if self._rewind is None else False
        if isinstance(self.teacher, ScriptedTeacher | OpenVLATeacher):
            deterministic = True
        declared = [unravel_key(k) for k in getattr(self.teacher, "out_keys", ())]
        size = getattr(self.teacher, "image_size", None)
        return TeacherInfo(
            protocol=PROTOCOL,
            server=f"torchrl_rpd {torchrl_rpd.__version__}",
            model=self.model,
            action_dim=self.action_dim,
            action_horizon=self.action_horizon,
            action_convention=self.action_convention,
            image_size=(size, size) if isinstance(size, int) else size,
            image_layouts=IMAGE_LAYOUTS,
            batch=True,
            request_keys=None if required is None else tuple(map(wire_name, required)),
            history_window=self.window,
            history_keys=tuple(map(wire_name, self.history_keys)),
            writes_std=any(key in _STD_KEYS for key in declared),
            deterministic=deterministic,
            **also,
        )

    @torch.no_grad()
    def answer(self, td: TensorDictBase) -> tuple[np.ndarray, np.ndarray | None]:
        """Actions ``[n, H, A]`` and their standard deviation ``[n, A]`` for rows ``[n]``.

        Raises:
            ValueError: if what the teacher wrote is not of these shapes.
        """
        device = _single_device(self.teacher)
        if device is not None:
            td = td.to(device)
        out = self.teacher(td)
        chunk = self._read(out, td.batch_size[0])
        expected = (self.action_horizon, self.action_dim)
        for size, wanted in zip(chunk.shape[1:], expected, strict=True):
            if wanted is not None and size != wanted:
                raise ValueError(
                    f"{self.name} answered {list(chunk.shape)}; it is served with "
                    f"action_horizon={expected[0]} and action_dim={expected[1]}."
                )
        return _numbers(chunk), self._read_std(out, chunk)

    def _read_std(self, out: Any, chunk: Tensor) -> np.ndarray | None:
        if not is_tensor_collection(out):
            return None
        stds = [std for key in _STD_KEYS if (std := out.get(key, None)) is not None]
        if not stds:
            return None
        std = stds[0][:, 0] if stds[0].shape == chunk.shape else stds[0]
        if std.shape != chunk[:, 0].shape:
            raise ValueError(
                f"{self.name} wrote a standard deviation of shape {list(std.shape)} "
                f"for actions {list(chunk.shape)}."
            )
        return _numbers(std)


def _numbers(tensor: Tensor) -> np.ndarray:
    # A copy: a teacher may write its next answer into the same memory.
    return tensor.contiguous().to("cpu", torch.float32, copy=True).numpy()
