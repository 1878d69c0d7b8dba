# Copyright (c) the torchrl_rpd authors.
#
# This source code is licensed under the MIT license found in the
# LICENSE file in the root directory of this source tree.
"""Catches a teacher that silently went wrong, before it costs a night."""

from __future__ import annotations

from collections.abc import Callable, Collection, Sequence
from typing import Any

import torch
from tensordict import TensorDictBase
from tensordict.utils import NestedKey
from torch import Tensor
from torchrl.data import TensorSpec
from torchrl.envs import EnvBase

from torchrl_rpd.teachers import _rows
from torchrl_rpd.teachers._examination import CHECKS, Examination
from torchrl_rpd.teachers._questioner import Questioner
from torchrl_rpd.teachers._report import Check, TeacherCheckError, TeacherReport

__all__ = ["Check", "TeacherCheckError", "TeacherReport", "check_teacher"]


def check_teacher(
    teacher: Callable[[TensorDictBase], Any],
    env_or_batch: EnvBase | TensorDictBase,
    *,
    rows: int = 8,
    steps: int = 12,
    in_keys: Sequence[NestedKey] | None = None,
    action_key: NestedKey = "action",
    action_spec: TensorSpec | None = None,
    action_transform: Callable[[Tensor], Tensor] | None = None,
    gripper: int | str | None = "auto",
    batch_tolerance: float = 0.01,
    rewind: Callable[[], object] | None = None,
    skip: Collection[str] = (),
    raise_on_failure: bool = True,
) -> TeacherReport:
    """Asks a teacher a few questions that a broken one answers wrongly.

    A teacher that went wrong rarely says so: the published OpenVLA code under newer
    transformers versions ignores the image and returns actions that look fine. The
    checks:

    - ``shape``, ``finite``: actions of the environment's width, no NaN or infinity;
    - ``repeat``: the same input twice gives the same actions;
    - ``batch``: a batch of N equals N batches of 1;
    - ``constant``: different observations give different actions;
    - ``image``: each image matters: all black and all white differ;
    - ``state``: real-valued entries matter: moved ones change the actions;
    - ``instruction``: another instruction changes the actions;
    - ``padding``: with a history, time steps that the mask leaves out do not matter;
    - ``range``, ``saturated``: actions fill the action space: neither mostly outside of
      it, nor tiny, nor all at its limits;
    - ``gripper``: "closed" is -1 and not 0, where the action space is [-1, 1].

    Checks that do not apply (no image among the inputs, no action space known, a
    gripper that never closed) are skipped and say why. Differences between actions are
    measured in half widths of the action space.

    The teacher is asked as it is: in the mode (``train`` or ``eval``) that it is in,
    without gradients, on copies of the rows. One with a history (attributes
    ``history_window`` above 1, ``history_keys``) is shown windows as at an episode's
    start, and ``"timestep_pad_mask"``.

    **Stochastic teachers** pass if they draw from a seeded generator that can be
    rewound: through methods ``get_rng_state`` and ``set_rng_state``, an attribute
    ``generator`` (:class:`torch.Generator`), or ``rewind=``. They are then compared
    draw for draw, and are left as they were. ``batch`` needs draws that are made row by
    row (as :class:`~torchrl_rpd.teachers.octo.OctoTeacher` makes them), else it is
    skipped. One that draws from torch's global generator fails ``repeat``.

    Args:
        teacher (callable): a TensorDict module that writes ``("vla_action", "chunk")``
            ``[n, H, A]`` or has a single out key ``[n, A]``; or a function of a
            tensordict that returns ``[n, A]``.
        env_or_batch (EnvBase or TensorDictBase): an environment of any batch size, or
            observations ``[*B]``. The environment is reset and played for ``steps``
            steps, by the teacher in the first four of its batch and at random in the
            others. It is left in the middle of an episode: use one of your own, or
            (re)set its seed and reset it afterwards.

    Keyword Args:
        rows (int): the most observations to ask about. Defaults to ``8``.
        steps (int): how far to play. Defaults to ``12``: enough to see a hand close.
        in_keys (sequence of NestedKey, optional): what the teacher reads. Defaults to
            its ``in_keys``, and to the whole observation where it has none; then only
            one of ``image`` and ``state`` has to matter.
        action_key (NestedKey): of the environment. Defaults to ``"action"``.
        action_spec (TensorSpec, optional): the action space. Defaults to that of the
            environment; with a tensordict and without it, ``range``, ``saturated`` and
            ``gripper`` are skipped.
        action_transform (callable, optional): what ``TeacherActionTransform`` is given:
            raw actions ``[n, A']`` to ``[n, A]`` in the environment's convention.
        gripper (int, optional): which entry of the action is the gripper, None for no
            gripper. Defaults to ``"auto"``: the last one of 7 or 8.
        batch_tolerance (float): the most by which ``batch`` may differ, in half widths.
            Defaults to ``0.01``: a neighbouring one of OpenVLA's 256 bins, on which
            low-precision weights may fall in another batch.
        rewind (callable, optional): called without arguments to put a stochastic
            teacher back to one and the same state of its generator.
        skip (collection of str): checks to leave out.
        raise_on_failure (bool): raise if a check failed. Defaults to ``True``.

    Returns:
        a :class:`TeacherReport`; ``str`` of it is a short table.

    Raises:
        TeacherCheckError: naming every check that failed and what to do about it.
        KeyError: if the rows lack what the teacher reads, or ``skip`` names no check.
        TypeError: if the teacher cannot be called, or ``env_or_batch`` is neither.
        ValueError: if the teacher's output has no action's shape, or for ``rows`` or
            ``steps`` below 1.

    Examples:
        >>> import torch
        >>> from tensordict import TensorDict
        >>> from torchrl.data import Bounded
        >>> from torchrl_rpd.teachers import check_teacher
        >>> state = torch.rand(8, 3, generator=torch.Generator().manual_seed(0))
        >>> batch = TensorDict({"observation": state}, [8])
        >>> spec = Bounded(-1.0, 1.0, (2,))
        >>> teacher = lambda td: 1 - 2 * td["observation"][:, :2]
        >>> print(check_teacher(teacher, batch, action_spec=spec))
        check_teacher: <lambda>, 8 observations: passed
          shape        ok     chunks of 1 x 2
          finite       ok     16 numbers
          repeat       ok     largest difference 0
          batch        ok     8 rows at once and one by one: largest difference 0
          constant     ok     every entry changes from row to row
          state        ok     moving 'observation' changes the actions by up to 1.1
          range        ok     from -0.8304 to 0.9553
          saturated    ok     0 % of the numbers at the limits
          skipped: image (no image among the inputs), instruction (no text among the
            inputs), padding (no history), gripper (no gripper in actions of 2 entries)
        >>> blind = lambda td: torch.full((td.batch_size[0], 2), 0.5)
        >>> report = check_teacher(blind, batch, raise_on_failure=False)
        >>> [check.name for check in report.failures]
        ['constant', 'state']
    """
    unknown = set(skip) - set(CHECKS)
    if unknown:
        raise KeyError(f"skip names {sorted(unknown)}; checks are {list(CHECKS)}")
    if rows < 1 or steps < 1:
        raise ValueError(f"rows and steps must be at least 1, got {rows} and {steps}.")
    ask = Questioner(
        teacher, in_keys=in_keys, action_transform=action_transform, rewind=rewind
    )
    generator = torch.Generator().manual_seed(0)
    along = None
    if isinstance(env_or_batch, EnvBase):
        if action_spec is None:
            action_spec = env_or_batch.full_action_spec[action_key]
        with torch.no_grad():
            frames, along = _rows.follow(
                env_or_batch,
                ask,
                env_or_batch.full_action_spec[action_key],
                action_key,
                steps=steps,
                rows=rows,
                generator=generator,
            )
    elif isinstance(env_or_batch, TensorDictBase):
        frames = ask.observed(env_or_batch)
    else:
        raise TypeError(
            "check_teacher needs a TorchRL environment or a tensordict of observations, "
            f"got {type(env_or_batch).__name__}."
        )
    examination = Examination(
        ask,
        _rows.windowed(_rows.pick(frames, rows), ask),
        along,
        action_spec,
        gripper=gripper,
        batch_tolerance=batch_tolerance,
        skip=skip,
        generator=generator,
    )
    try:
        report = examination.report()
    finally:
        ask.rewind()
    if raise_on_failure and not report.passed:
        raise TeacherCheckError(report)
    return report
