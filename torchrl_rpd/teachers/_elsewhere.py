# Copyright (c) the torchrl_rpd authors.
#
# This source code is licensed under the MIT license found in the
# LICENSE file in the root directory of this source tree.
"""What teachers have in common that answer from another thread, process or machine."""

from __future__ import annotations

import abc
from collections.abc import Sequence
from typing import Literal

import torch
from tensordict import TensorDict, TensorDictBase, unravel_key
from tensordict.nn import TensorDictModuleBase
from tensordict.utils import NestedKey
from torchrl._utils import logger as torchrl_logger
from torchrl.data.vla import ACTION_CHUNK_KEY

from torchrl_rpd.teachers.remote import TeacherUnavailable

__all__ = ["STD_KEYS", "OnError", "TeacherElsewhere"]

OnError = Literal["raise", "mask"]
STD_KEYS: tuple[NestedKey, ...] = ("teacher_std", ("vla_action", "std"))
# Written by TeacherActionTransform for teachers that look back.
_PAD_MASK_KEY = "timestep_pad_mask"


class TeacherElsewhere(TensorDictModuleBase, abc.ABC):
    """Flattens the batch, sends what is read, and decides about rows without an answer.

    Keyword Args:
        in_keys (sequence of NestedKey, optional): what is sent; None for everything.
        timeout (float): seconds until a question counts as unanswered.
        on_error ("raise" or "mask"): what becomes of its rows.
        action_dim (int, optional): ``A``, if known before the first answer.
        chunk_size (int): ``H``, until the first answer tells it.
    """

    def __init__(
        self,
        *,
        in_keys: Sequence[NestedKey] | None,
        timeout: float,
        on_error: OnError,
        action_dim: int | None,
        chunk_size: int,
    ) -> None:
        super().__init__()
        if not timeout > 0:
            raise ValueError(f"timeout must be above 0 seconds, got {timeout}.")
        if on_error not in ("raise", "mask"):
            raise ValueError(f"on_error must be 'raise' or 'mask', got {on_error!r}.")
        self.in_keys = [unravel_key(key) for key in in_keys or ()]
        self.out_keys = [ACTION_CHUNK_KEY]
        self.timeout = timeout
        self.on_error = on_error
        self.action_dim = action_dim
        self.chunk_size = chunk_size
        self._was_gone = False

    @abc.abstractmethod
    def _ask(self, rows: TensorDictBase) -> TensorDictBase:
        """Answers rows ``[n]``.

        Raises:
            TeacherUnavailable: if nobody answers.
        """

    @torch.no_grad()
    def forward(self, tensordict: TensorDictBase) -> TensorDictBase:
        """Writes the chunk, and the spread of a teacher that has one, ``[*B, ...]``."""
        rows = tensordict.reshape(-1)
        if self.in_keys:
            rows = rows.select(*self.in_keys, _PAD_MASK_KEY, strict=False)
        try:
            answer = self._ask(rows)
        except TeacherUnavailable as error:
            answer = self._without_answer(rows, error)
        else:
            self._remember(answer)
        for key, value in answer.items(True, True):
            shape = (*tensordict.batch_size, *value.shape[1:])
            tensordict.set(key, value.reshape(shape))
        return tensordict

    def _remember(self, answer: TensorDictBase) -> None:
        chunk = answer.get(ACTION_CHUNK_KEY, None)
        if chunk is None or chunk.ndim != 3:
            found = sorted(answer.keys(True, True), key=str)
            raise KeyError(
                f"The served teacher gave no {ACTION_CHUNK_KEY!r} of shape [n, H, A]; "
                f"found {found}. Serve ServableTeacher(teacher_factory)."
            )
        self.chunk_size, self.action_dim = chunk.shape[1:]
        if self._was_gone:
            torchrl_logger.info("%s: the teacher answers again", type(self).__name__)
            self._was_gone = False

    def _without_answer(
        self, rows: TensorDictBase, error: TeacherUnavailable
    ) -> TensorDictBase:
        if self.on_error == "raise":
            raise error
        if self.action_dim is None:
            raise TeacherUnavailable(
                f"{error} (to go on with on_error='mask' before a first answer has told "
                "the shape of the chunks, give action_dim= and chunk_size=)"
            ) from error
        if not self._was_gone:
            torchrl_logger.warning("Rows go without labels from here on: %s", error)
            self._was_gone = True
        # NaN and not zero: a label that nobody gave must not look like one.
        chunk = torch.full((len(rows), self.chunk_size, self.action_dim), torch.nan)
        nothing = {ACTION_CHUNK_KEY: chunk, STD_KEYS[0]: chunk[:, 0].clone()}
        return TensorDict(nothing, [len(rows)])
