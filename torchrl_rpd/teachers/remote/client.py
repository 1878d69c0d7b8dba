# Copyright (c) the torchrl_rpd authors.
#
# This source code is licensed under the MIT license found in the
# LICENSE file in the root directory of this source tree.
"""A teacher that is asked over a websocket."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any, Literal, TypedDict, get_args

import torch
from tensordict import TensorDictBase, unravel_key
from tensordict.nn import TensorDictModuleBase
from tensordict.utils import NestedKey
from torch import Tensor
from torchrl.data import Composite
from torchrl.data.vla.schema import ACTION_CHUNK_KEY, IMAGE_KEY, INSTRUCTION_KEY

from torchrl_rpd.teachers._instructions import read_instructions
from torchrl_rpd.teachers.remote._answers import (
    BadRequest,
    InvalidAnswer,
    read_answer,
)
from torchrl_rpd.teachers.remote._channel import Channel
from torchrl_rpd.teachers.remote._errors import TeacherError, TeacherMismatch
from torchrl_rpd.teachers.remote._info import PROMPT, TeacherInfo, key_of, wire_name
from torchrl_rpd.teachers.remote._requests import Request, arrange, requests

__all__ = ["OnError", "RemoteStats", "RemoteTeacher"]

OnError = Literal["raise", "mask"]
_PAD_MASK = "timestep_pad_mask"


class RemoteStats(TypedDict):
    """Counts of one :class:`RemoteTeacher` in one process, since it was built there."""

    rows: int
    requests: int
    failed_rows: int
    failed_requests: int
    retries: int
    connections: int


class RemoteTeacher(TensorDictModuleBase):
    r"""A teacher that a server elsewhere answers for.

    In another process, another environment or on another machine: one of ours
    (``python -m torchrl_rpd.teachers.serve``), or any server of OpenPI's websocket
    policy protocol (https://github.com/Physical-Intelligence/openpi). For
    :class:`~torchrl_rpd.transforms.TeacherActionTransform` it is a teacher like any
    other.

    On construction it connects and reads what the server says about itself
    (:attr:`info`); whatever contradicts what was asked for is a
    :class:`TeacherMismatch` that names both sides. Servers that take batches get all
    rows of a call in one message (in several, where they limit the rows or the size);
    plain OpenPI servers get one row per message, ``pipeline`` of them ahead of the
    answers.

    **When no answer comes** within ``timeout``, or the connection breaks, the
    connection is dropped (a late answer is never taken for another request's), made
    again, and the unanswered requests are repeated, ``retries`` times in a row without
    an answer. A server that comes back must describe the same teacher as before. What
    happens then, or when the server answers with an error of its teacher or with
    something that is no answer (both are not repeated), is a choice:

    - ``on_error="raise"``: :class:`TeacherUnavailable`, or :class:`TeacherError`.
    - ``on_error="mask"``: the chunks of those rows are NaN, which the transform masks
      out and counts (``non_finite``): labels are zeros with mask False, never an old
      one. So that a dead server does not stop the run at each step, it is then left
      alone for ``cooldown`` seconds, or for as long as the failed attempts took if that
      is longer, and tried once after that, until it answers. The first failure is
      logged as a warning; ``teacher/labelled`` against ``teacher/frames`` of
      :class:`~torchrl_rpd.trainers.LogTeacher` is the coverage.

    A request that the server does not understand (``BadRequest``) and another teacher at
    the same address raise in both cases: they do not get better. So does a server that
    is not there on construction.

    It can be used from several threads (one request at a time) and goes to other
    processes, pickled (with address, options and token) or forked, where it makes a
    connection of its own. In workers, give the transform
    ``teacher_factory=functools.partial(RemoteTeacher, address, ...)``.

    Args:
        address (str): ``"ws://host:port"``, or ``"wss://..."`` for TLS.

    Keyword Args:
        instruction (str, optional): what every row is told. Defaults to ``None``: each
            row's own, from ``instruction_key``, where the server reads one.
        in_keys (sequence or dict of NestedKey, optional): what is sent: entries of the
            tensordict, under their own names joined with "/"
            (``("observation", "image")`` is ``"observation/image"``, the instruction is
            ``"prompt"``), or a dict from entries to the server's names. Images are
            uint8 ``[*B, 3, H, W]``. Defaults to ``None``: what the server says it
            reads, and ``("observation", "image")`` with the instruction where it says
            nothing.
        instruction_key (NestedKey): text. Defaults to ``"language_instruction"``.
        std_key (NestedKey): where a standard deviation goes, if the server sends one.
            Defaults to ``"teacher_std"``.
        token (str, optional): for servers that ask for one; sent as
            ``Authorization: Bearer``, in the clear over ``ws://``.
        timeout (float): seconds for one answer. Models that compile at the first
            request need more for it. Defaults to ``60.0``.
        connect_timeout (float): seconds for a connection, and again for what the server
            says first. Defaults to ``10.0``.
        retries (int): how often a request is repeated. Defaults to ``3``.
        backoff (float): seconds before the second attempt, doubled for each further one
            (up to 30 s), of which a random half is left out. Defaults to ``0.5``.
        on_error ("raise" or "mask"): see above. Defaults to ``"raise"``.
        cooldown (float): see above. Defaults to ``30.0``.
        pipeline (int): how many requests are sent ahead of their answers. Defaults to
            ``8``.
        action_dim (int, optional): what the server must say, or send where it says
            nothing. The transform compares it with the env's action too.
        chunk_size (int, optional): likewise: actions of a chunk.
        action_convention (str, optional): what the server must say.
        model (str, optional): what the server must say.

    Attributes:
        info: a :class:`TeacherInfo`, what the server says.
        action_dim: entries of an action, None if nobody knows yet.
        chunk_size: actions of a chunk, likewise.
        history_window: how many observations of an env it is shown at once.
        history_keys: of which entries.

    Raises:
        ImportError: naming the extra to install.
        TeacherMismatch: if the server is not what was asked for, refusing its protocol,
            model, action dimension, convention, chunk length, entries or image size.
        TeacherUnavailable: if there is no server, or it refuses the token.
        ValueError: for options out of range; with ``on_error="mask"`` also if nobody
            says the shape of the chunks, which masked rows need.

    Examples:
        >>> import torch
        >>> from tensordict import TensorDict
        >>> from torchrl_rpd.teachers import RemoteTeacher, ScriptedTeacher
        >>> from torchrl_rpd.teachers.remote import TeacherServer
        >>> server = TeacherServer(ScriptedTeacher("PushCube-v1"), port=0)
        >>> with server.running():
        ...     teacher = RemoteTeacher(server.address, action_dim=7)
        ...     frames = TensorDict({"observation": torch.rand(3, 35)}, [3])
        ...     chunk = teacher(frames)["vla_action", "chunk"]
        ...     teacher.close()
        >>> chunk.shape
        torch.Size([3, 1, 7])
    """

    def __init__(
        self,
        address: str,
        *,
        instruction: str | None = None,
        in_keys: Sequence[NestedKey] | Mapping[NestedKey, str] | None = None,
        instruction_key: NestedKey = INSTRUCTION_KEY,
        std_key: NestedKey = "teacher_std",
        token: str | None = None,
        timeout: float = 60.0,
        connect_timeout: float = 10.0,
        retries: int = 3,
        backoff: float = 0.5,
        on_error: OnError = "raise",
        cooldown: float = 30.0,
        pipeline: int = 8,
        action_dim: int | None = None,
        chunk_size: int | None = None,
        action_convention: str | None = None,
        model: str | None = None,
    ) -> None:
        super().__init__()
        if on_error not in get_args(OnError):
            raise ValueError(f"on_error must be 'raise' or 'mask', got {on_error!r}.")
        self.on_error = on_error
        self.instruction = instruction
        self._instruction_key = unravel_key(instruction_key)
        self._std_key = unravel_key(std_key)
        self._channel = Channel(
            address,
            token=token,
            timeout=timeout,
            connect_timeout=connect_timeout,
            retries=retries,
            backoff=backoff,
            cooldown=cooldown if on_error == "mask" else None,
            pipeline=pipeline,
        )
        info = self._channel.connect()
        try:
            self.action_dim = self._agree("action_dim", action_dim, info.action_dim)
            self.chunk_size = self._agree("chunk_size", chunk_size, info.action_horizon)
            self._demand("action_convention", action_convention, info.action_convention)
            self._demand("model", model, info.model)
            self._names = self._choose_names(in_keys, info)
            self._check_names(info)
            if on_error == "mask" and None in (self.action_dim, self.chunk_size):
                raise ValueError(
                    f"The server at {address} does not say the shape of its chunks, "
                    "which on_error='mask' needs for rows without an answer: give "
                    "action_dim= and chunk_size=."
                )
        except ValueError:
            self.close()
            raise
        self.history_window = info.history_window
        self.history_keys = [
            key for key, name in self._names.items() if name in info.history_keys
        ]
        self.in_keys = list(self._names)
        if self._reads_text and instruction is None:
            self.in_keys.append(self._instruction_key)
        self.out_keys = [ACTION_CHUNK_KEY]
        if info.writes_std:
            self.out_keys.append(self._std_key)

    # ------------------------------------------------------------------ the handshake
    @property
    def address(self) -> str:
        """Where the server is."""
        return self._channel.address

    @property
    def info(self) -> TeacherInfo:
        """What the server says about itself."""
        assert self._channel.info is not None
        return self._channel.info

    def _agree(self, name: str, wanted: int | None, said: int | None) -> int | None:
        if wanted is not None and said is not None and wanted != said:
            raise TeacherMismatch(
                f"{name}={wanted} was asked for; the server at {self.address} says "
                f"{said}."
            )
        return said if wanted is None else wanted

    def _demand(self, name: str, wanted: str | None, said: str | None) -> None:
        if wanted is not None and wanted != said:
            says = "does not say" if said is None else f"says {said!r}"
            raise TeacherMismatch(
                f"{name}={wanted!r} was asked for; the server at {self.address} {says}."
            )

    def _choose_names(
        self,
        in_keys: Sequence[NestedKey] | Mapping[NestedKey, str] | None,
        info: TeacherInfo,
    ) -> dict[NestedKey, str]:
        """Wire names by entry, without the instruction and the mask of the windows."""
        self._reads_text = self.instruction is not None
        if isinstance(in_keys, Mapping):
            names = {unravel_key(key): name for key, name in in_keys.items()}
        else:
            if in_keys is None:
                said = info.request_keys
                if said is None:
                    said = (wire_name(IMAGE_KEY), PROMPT)
                in_keys = [
                    self._instruction_key if name == PROMPT else key_of(name)
                    for name in said
                ]
            keys = [unravel_key(key) for key in in_keys]
            names = {
                key: PROMPT if key == self._instruction_key else wire_name(key)
                for key in keys
            }
        for key in [key for key, name in names.items() if name == PROMPT]:
            self._instruction_key, self._reads_text = key, True
            del names[key]
        return {key: name for key, name in names.items() if name != _PAD_MASK}

    def _check_names(self, info: TeacherInfo) -> None:
        if info.request_keys is None:
            return
        sent = {*self._names.values(), _PAD_MASK}
        if self._reads_text:
            sent.add(PROMPT)
        missing = sorted(set(info.request_keys) - sent)
        if missing:
            raise TeacherMismatch(
                f"The server at {self.address} reads {missing}, which would not be "
                f"sent; in_keys give {sorted(sent - {_PAD_MASK})}."
            )
        if self.instruction is not None and PROMPT not in info.request_keys:
            raise TeacherMismatch(
                f"An instruction was given; the server at {self.address} reads none, "
                f"only {sorted(info.request_keys)}."
            )

    def check_observation_spec(self, spec: Composite) -> None:
        """Compares what an env shows with what the server takes, before the first step.

        Called by :class:`~torchrl_rpd.transforms.TeacherActionTransform` in an env.

        Raises:
            TeacherMismatch: if the images are of another size than the server takes.
        """
        size = self.info.image_size
        main = spec.get(IMAGE_KEY, None) if IMAGE_KEY in self._names else None
        if size is None or main is None or len(main.shape) < 2:
            return
        shown = tuple(main.shape[-2:])
        if shown != size:
            raise TeacherMismatch(
                f"The env shows images of {shown[0]} x {shown[1]} under {IMAGE_KEY!r}; "
                f"the server at {self.address} takes {size[0]} x {size[1]}. Build the "
                "env with that size."
            )

    # ------------------------------------------------------------------ the answers
    @torch.no_grad()
    def forward(self, tensordict: TensorDictBase) -> TensorDictBase:
        """Writes the chunks ``[*B, H, A]`` float32 and, if there is one, their spread.

        Raises:
            KeyError: if an entry is missing.
            TeacherError: if the server answered with an error.
            TeacherMismatch: if another teacher answers than before.
            TeacherUnavailable: if no answer came.
        """
        batch, rows = tensordict.batch_size, tensordict.batch_size.numel()
        tensors = {
            name: self._read(tensordict, key) for key, name in self._names.items()
        }
        device = next((value.device for value in tensors.values()), None)
        chunk, std = self._ask(tensordict, tensors, rows)
        chunk = chunk.to(tensordict.device or device)
        tensordict.set(ACTION_CHUNK_KEY, chunk.reshape(*batch, *chunk.shape[1:]))
        if std is not None:
            std = std.to(chunk.device)
            tensordict.set(self._std_key, std.reshape(*batch, std.shape[-1]))
        return tensordict

    def _read(self, tensordict: TensorDictBase, key: NestedKey) -> Tensor:
        value = tensordict.get(key, None)
        if not isinstance(value, Tensor):
            found = sorted(tensordict.keys(True, True), key=str)
            raise KeyError(
                f"The teacher at {self.address} is sent {key!r}, which is missing or no "
                f"tensor; found {found}. Name the right entries with in_keys=."
            )
        return value.reshape(-1, *value.shape[tensordict.ndim :])

    def _ask(
        self, tensordict: TensorDictBase, tensors: dict[str, Tensor], rows: int
    ) -> tuple[Tensor, Tensor | None]:
        info = self.info
        texts = None
        if self._reads_text:
            key = self._instruction_key
            texts = read_instructions(tensordict, self.instruction, key)
        windows = {self._names[key] for key in self.history_keys}
        if self.history_window == 1:
            windows = set()
        images = {
            name
            for name, value in tensors.items()
            if value.dtype == torch.uint8 and value.ndim == 4 + (name in windows)
        }
        if self.history_window > 1:
            tensors = {**tensors, _PAD_MASK: self._read(tensordict, _PAD_MASK)}
        arrays, layout = arrange(tensors, images, info.image_layouts)
        first_id = self._channel.take_ids(rows)
        asked = list(
            requests(arrays, texts, layout, info, rows=rows, first_id=first_id)
        )
        self._channel.count(rows=rows)
        answers, failure = self._channel.ask(
            [request.message for request in asked],
            stop_at_error=self.on_error == "raise",
        )
        parts = []
        for request, answer in zip(asked, answers, strict=True):
            try:
                if answer is None:
                    assert failure is not None
                    raise failure
                part = self._understand(answer, request)
            except BadRequest:
                raise
            except (TeacherError, ConnectionError):
                if self.on_error == "raise":
                    raise
                part = self._nothing(request)
            parts.append(part)
        return self._join(parts)

    def _understand(
        self, answer: bytes | str, request: Request
    ) -> tuple[Tensor, Tensor | None]:
        try:
            chunk, std = read_answer(
                answer, request, action_dim=self.action_dim, chunk_size=self.chunk_size
            )
        except InvalidAnswer:
            # Whatever is said on this connection next, it is not trusted.
            self._channel.drop()
            raise
        if self.action_dim is None or self.chunk_size is None:
            self.chunk_size, self.action_dim = chunk.shape[1:]
        return chunk, std

    def _nothing(self, request: Request) -> tuple[Tensor, Tensor | None]:
        """NaN, for rows that were not answered."""
        assert self.action_dim is not None and self.chunk_size is not None
        rows = request.stop - request.start
        self._channel.count(failed_requests=1, failed_rows=rows)
        chunk = torch.full((rows, self.chunk_size, self.action_dim), torch.nan)
        return chunk, chunk[:, 0].clone()

    def _join(
        self, parts: list[tuple[Tensor, Tensor | None]]
    ) -> tuple[Tensor, Tensor | None]:
        if len(parts) == 1:
            return parts[0]
        if not parts:
            return torch.zeros(0, self.chunk_size or 1, self.action_dim or 1), None
        stds = [std for _, std in parts if std is not None]
        return torch.cat([chunk for chunk, _ in parts]), (
            torch.cat(stds) if len(stds) == len(parts) else None
        )

    # ------------------------------------------------------------------ housekeeping
    def stats(self) -> RemoteStats:
        """What was asked and what failed, in this process.

        Returns:
            a dictionary with ``rows`` (asked about), ``requests`` (messages that were
            answered), ``failed_rows`` and ``failed_requests`` (masked), ``retries`` and
            ``connections`` (made, the first one included).
        """
        counts = self._channel.counts
        return RemoteStats(
            rows=counts["rows"],
            requests=counts["requests"],
            failed_rows=counts["failed_rows"],
            failed_requests=counts["failed_requests"],
            retries=counts["retries"],
            connections=counts["connections"],
        )

    def close(self) -> None:
        """Ends the connection; a further question makes another."""
        self._channel.close()

    def __enter__(self) -> RemoteTeacher:
        return self

    def __exit__(self, *args: Any) -> None:
        self.close()

    def __repr__(self) -> str:
        return (
            f"{type(self).__name__}({self.address!r}, model={self.info.model!r}, "
            f"in_keys={self.in_keys}, on_error={self.on_error!r})"
        )
