# Copyright (c) the torchrl_rpd authors.
#
# This source code is licensed under the MIT license found in the
# LICENSE file in the root directory of this source tree.
"""The single questions of :func:`~torchrl_rpd.teachers.check_teacher`."""

from __future__ import annotations

from collections.abc import Collection
from typing import Any, NamedTuple

import torch
from tensordict import TensorDictBase
from tensordict.utils import NestedKey
from torch import Tensor
from torchrl.data import TensorSpec

from torchrl_rpd.teachers import _rows
from torchrl_rpd.teachers._questioner import PAD_MASK_KEY, Questioner
from torchrl_rpd.teachers._report import Check, Status, TeacherReport

__all__ = ["CHECKS", "Examination"]

CHECKS = (
    *("shape", "finite", "repeat", "batch", "constant", "image", "state"),
    *("instruction", "padding", "range", "saturated", "gripper"),
)
# What counts as the same answer to the same question: above the rounding of sums in
# another order, below the least step of any teacher (1/128 in OpenVLA's 256 bins).
_SAME = 1e-5
_OTHER_INSTRUCTIONS = (
    "push the ball",
    "lift the peg upright",
    "stack the red cube on the green cube",
)


class Line(NamedTuple):
    """A check without its name."""

    status: Status
    detail: str
    advice: str = ""


def _ok(detail: str) -> Line:
    return Line("ok", detail)


def _skipped(why: str) -> Line:
    return Line("skipped", why)


def _failed(detail: str, advice: str) -> Line:
    return Line("FAILED", detail, advice)


class Examination:
    """One run of the checks; each method returns one line of the report."""

    def __init__(
        self,
        ask: Questioner,
        rows: TensorDictBase,
        along: Tensor | None,
        spec: TensorSpec | None,
        *,
        gripper: int | str | None,
        batch_tolerance: float,
        skip: Collection[str],
        generator: torch.Generator,
    ) -> None:
        self.ask, self.rows, self.skip = ask, rows, skip
        self.generator = generator
        self.batch_tolerance = batch_tolerance
        self.count = rows.batch_size[0]
        self.answer = ask(rows)  # [n, H, A]
        self.width = self.answer.shape[-1]
        self.seen = self.answer.flatten(0, 1)
        if along is not None:
            self.seen = torch.cat([self.seen, along])
        self.spec_width = None if spec is None else spec.shape[-1]
        self.box = None
        self.half = torch.ones(())
        if spec is not None and self.spec_width == self.width:
            low, high = _rows.limits(spec)
            self.box, self.half = (low, high), (high - low) / 2
        if gripper == "auto":
            gripper = -1 if self.width in (7, 8) else None
        if gripper is not None and not (
            isinstance(gripper, int) and -self.width <= gripper < self.width
        ):
            raise ValueError(
                f"gripper must be 'auto', None or an entry of the {self.width} of the "
                f"action, got {gripper!r}."
            )
        self.gripper = gripper
        self.images = _rows.image_keys(rows, ask.history_keys if ask.window > 1 else [])
        self.states = _rows.state_keys(rows, self.images)
        self.texts = _rows.text_keys(rows)
        self.repeatable = True

    def report(self) -> TeacherReport:
        """Makes the checks."""
        lines: dict[str, Line] = {}
        # Last, because the answers to all other questions count.
        for name in sorted(CHECKS, key="finite".__eq__):
            if name in self.skip:
                lines[name] = _skipped("as asked")
            else:
                lines[name] = getattr(self, f"_{name}")()
        checks = tuple(Check(name, *lines[name]) for name in CHECKS)
        return TeacherReport(self.ask.name, self.count, checks)

    def _apart(self, answer: Tensor, other: Tensor | None = None) -> float:
        """The largest difference of two answers, in half widths of the action space."""
        other = self.answer if other is None else other
        gap = ((answer - other) / self.half).abs()
        # where both are NaN, they agree
        gap = torch.where(answer.isnan() & other.isnan(), 0.0, gap)
        return gap.nan_to_num(nan=torch.inf).max().item()

    # ------------------------------------------------------------------ sanity
    def _shape(self) -> Line:
        length = self.answer.shape[1]
        if self.spec_width not in (None, self.width):
            return _failed(
                f"actions of {self.width} entries for an action space of "
                f"{self.spec_width}",
                "bring them to its width with action_transform=, or check the control "
                "mode of the environment",
            )
        return _ok(f"chunks of {length} x {self.width}")

    def _finite(self) -> Line:
        bad = int((~self.seen.isfinite()).sum())
        if self.ask.finite and not bad:
            return _ok(f"{self.seen.numel()} numbers")
        return _failed(
            f"NaN or infinity ({bad} of {self.seen.numel()} numbers)",
            "look at weights, precision (float16 overflows; use bfloat16 or float32) and "
            "un-normalisation",
        )

    def _repeat(self) -> Line:
        gap = self._apart(self.ask(self.rows))
        self.repeatable = gap <= _SAME
        if self.repeatable:
            return _ok(f"largest difference {gap:.2g}")
        return _failed(
            f"the same input twice differs by {gap:.2g}",
            "dropout or other training behaviour: call teacher.eval(); random draws: "
            "give the teacher a seeded generator, and rewind= if check_teacher does not "
            "find it; memory of earlier calls: not for a teacher that is asked row by "
            "row",
        )

    def _batch(self) -> Line:
        if not self.repeatable:
            return _skipped("not decided: see repeat")
        if self.count == 1:
            return _skipped("one row only")
        singles = self.rows.split(1)
        try:
            alone = [self.ask(row, rewind=i == 0) for i, row in enumerate(singles)]
        except (RuntimeError, ValueError) as error:
            return _failed(
                f"a batch of one is refused: {error}",
                "batch statistics: call teacher.eval()",
            )
        gap = self._apart(torch.cat(alone))
        rows = f"{self.count} rows at once and one by one:"
        if gap <= self.batch_tolerance:
            return _ok(f"{rows} largest difference {gap:.2g}")
        self.ask.rewind()
        if self._apart(self.ask(self.rows), self.ask(self.rows, rewind=False)) > _SAME:
            return _skipped("not decided: the draws depend on the size of the batch")
        return _failed(
            f"{rows} they differ by {gap:.2g}",
            "batch statistics: call teacher.eval(); wrong padding of prompts or images: "
            "the teacher mixes rows; coarse rounding: use a higher precision or raise "
            "batch_tolerance",
        )

    def _constant(self) -> Line:
        if self.count == 1:
            return _skipped("one row only")
        if all(_alike(value) for value in self.rows.values(True, True)):
            return _skipped("all observations are the same")
        spread = (self.seen - self.seen[:1]).abs().div(self.half).amax(0)
        still = (spread <= _SAME).nonzero().squeeze(-1).tolist()
        if len(still) == self.width:
            return _failed(
                f"the same action for {self.count} different observations",
                "does the teacher get its input? Compare keys, preprocessing and the "
                "versions of its libraries",
            )
        if still:
            return _ok(f"changes from row to row (entries {still} do not)")
        return _ok("every entry changes from row to row")

    # ------------------------------------------------------------------ inputs matter
    def _image(self) -> Line:
        if not self.images:
            return _skipped("no image among the inputs")
        if not self.repeatable:
            return _skipped("not decided: see repeat")
        # One by one where the teacher reads each of them, else all together.
        together = [[key] for key in self.images]
        if self.ask.in_keys is None:
            together = [self.images]
        gaps = [self._black_and_white(keys) for keys in together]
        blind = [
            key
            for keys, gap in zip(together, gaps, strict=True)
            for key in keys
            if gap <= _SAME
        ]
        if not blind:
            return _ok(f"black and white differ by {min(gaps):.2g}")
        if self.ask.in_keys is None and self.states and self._moved() > _SAME:
            return _skipped(f"does not look at {blind} and does not say that it does")
        return _failed(
            f"black and white give the same actions: {blind}",
            "the image does not reach the network: check keys, preprocessing and the "
            "versions of the teacher's libraries",
        )

    def _black_and_white(self, keys: list[NestedKey]) -> float:
        answers = []
        for white in (False, True):
            rows = self.rows.copy()
            for key in keys:
                picture = rows.get(key)
                most = 255 if picture.dtype == torch.uint8 else 1
                rows.set(key, torch.full_like(picture, most if white else 0))
            answers.append(self.ask(rows))
        return self._apart(*answers)

    def _moved(self) -> float:
        rows = self.rows.copy()
        for key in self.states:
            rows.set(key, _rows.shake(rows.get(key), self.generator))
        return self._apart(self.ask(rows))

    def _state(self) -> Line:
        if not self.states:
            return _skipped("no real numbers among the inputs")
        if not self.repeatable:
            return _skipped("not decided: see repeat")
        gap = self._moved()
        names = ", ".join(map(repr, self.states))
        if gap > _SAME:
            return _ok(f"moving {names} changes the actions by up to {gap:.2g}")
        if self.ask.in_keys is None and self.images:
            return _skipped(f"does not look at {names} and does not say that it does")
        return _failed(
            f"moving {names} changes nothing",
            "the state does not reach the network, or its actions are cut off at the "
            "limits",
        )

    def _instruction(self) -> Line:
        own = getattr(self.ask.teacher, "instruction", None)
        if not self.texts and not isinstance(own, str):
            return _skipped("no text among the inputs")
        if not self.repeatable:
            return _skipped("not decided: see repeat")
        gap = 0.0
        for text in _OTHER_INSTRUCTIONS:
            gap = max(gap, self._apart(self._told(text, own)))
            if gap > _SAME:
                return _ok(f"{text!r} changes the actions by {gap:.2g}")
        return _failed(
            "other instructions change nothing",
            "the text does not reach the network: check the prompt and the tokenizer",
        )

    def _told(self, text: str, own: Any) -> Tensor:
        """The answer under another instruction."""
        rows = self.rows
        for key in self.texts:
            rows = _rows.say(rows, key, text)
        if not isinstance(own, str):
            return self.ask(rows)
        self.ask.teacher.instruction = text
        try:
            return self.ask(rows)
        finally:
            self.ask.teacher.instruction = own

    def _padding(self) -> Line:
        if self.ask.window == 1:
            return _skipped("no history")
        if not self.repeatable:
            return _skipped("not decided: see repeat")
        hidden = ~self.rows.get(PAD_MASK_KEY)
        if not bool(hidden.any()):
            return _skipped("the mask leaves nothing out")
        rows = self.rows.copy()
        for key in self.ask.history_keys:
            value = rows.get(key)
            where = hidden.reshape(*hidden.shape, *[1] * (value.ndim - 2))
            other = 255 - value if value.dtype == torch.uint8 else value + 1
            rows.set(key, torch.where(where, other, value))
        gap = self._apart(self.ask(rows))
        if gap <= self.batch_tolerance:
            return _ok(f"masked time steps change the actions by {gap:.2g}")
        return _failed(
            f"masked time steps change the actions by {gap:.2g}",
            f"the teacher does not heed {PAD_MASK_KEY!r} (True: a real time step)",
        )

    # ------------------------------------------------------------------ action space
    def _arm(self) -> Tensor:
        """Actions without the gripper, from -1 to 1 in the action space."""
        assert self.box is not None
        low, high = self.box
        scaled = (self.seen - (low + high) / 2) / self.half
        keep = torch.ones(self.width, dtype=torch.bool)
        if self.gripper is not None and self.width > 1:
            keep[self.gripper] = False
        return scaled[:, keep].nan_to_num()

    def _range(self) -> Line:
        if self.box is None:
            return _skipped("no action space known: give action_spec=")
        low, high = self.seen.nan_to_num().min(), self.seen.nan_to_num().max()
        found = f"from {low:.4g} to {high:.4g}"
        arm = self._arm().abs()
        outside = (arm > 1.1).any(-1).double().mean().item()
        # Regressed actions overshoot a little, and are clipped; that is no error.
        if arm.max() > 2.0 or outside > 0.25:
            return _failed(
                f"{found}; {outside:.0%} of the actions lie outside of the action space",
                "un-normalise with the statistics of the environment's own data "
                "(unnorm_key), or convert units with action_transform=",
            )
        if arm.max() < 0.01:
            return _failed(
                f"{found}: under 1 % of the action space",
                "metres and radians? Divide by what an action of 1 means, in "
                "action_transform=",
            )
        return _ok(found)

    def _saturated(self) -> Line:
        if self.box is None:
            return _skipped("no action space known: give action_spec=")
        share = (self._arm().abs() >= 0.999).double().mean().item()
        if share < 0.95:
            return _ok(f"{share:.0%} of the numbers at the limits".replace("%", " %"))
        return _failed(
            f"{share:.0%} of the numbers at the limits of the action space",
            "actions in too large a unit, or logits? Look at un-normalisation and "
            "action_transform=",
        )

    def _gripper(self) -> Line:
        if self.gripper is None:
            return _skipped(f"no gripper in actions of {self.width} entries")
        if self.box is None:
            return _skipped("no action space known: give action_spec=")
        low, high = (end[self.gripper].item() for end in self.box)
        if low >= 0:
            return _skipped(f"the action space of the gripper is [{low:g}, {high:g}]")
        values = self.seen[:, self.gripper].nan_to_num() / -low
        found = f"from {values.min():.2g} to {values.max():.2g}"
        if values.min() < -0.1:
            return _ok(found)
        # A closed gripper stays at its value: one number on the way does not count.
        if int((values.abs() <= 0.1).sum()) >= 2:
            return _failed(
                f"{found} in an action space of [{low:g}, {high:g}]: 'closed' seems to "
                "be 0, which is half open there",
                "map it by 2 g - 1: gripper='01_to_pm1' of OpenVLATeacher and "
                "OctoTeacher, or action_transform=",
            )
        return _skipped(f"not decided: it never closed ({found})")


def _alike(value: Any) -> bool:
    """Whether all rows of an entry are the same."""
    if isinstance(value, Tensor):
        return bool((value == value[:1]).all())
    texts = value.tolist() if hasattr(value, "tolist") else [value]
    return not isinstance(texts, list) or all(text == texts[0] for text in texts)
