# Copyright (c) the torchrl_rpd authors.
#
# This source code is licensed under the MIT license found in the
# LICENSE file in the root directory of this source tree.
"""What :func:`~torchrl_rpd.teachers.check_teacher` found out."""

from __future__ import annotations

import textwrap
from dataclasses import dataclass
from typing import Literal

__all__ = ["Check", "TeacherCheckError", "TeacherReport"]

Status = Literal["ok", "FAILED", "skipped"]


@dataclass(frozen=True)
class Check:
    """One line of a report.

    Args:
        name (str): which check.
        status (str): ``"ok"``, ``"FAILED"`` or ``"skipped"``.
        detail (str): what was seen, or why the check was skipped.
        advice (str, optional): what to do about a failure. Defaults to ``""``.

    Examples:
        >>> Check("finite", "ok", "56 numbers").status
        'ok'
    """

    name: str
    status: Status
    detail: str
    advice: str = ""


@dataclass(frozen=True)
class TeacherReport:
    """The answers of :func:`~torchrl_rpd.teachers.check_teacher`, one per check.

    Its ``str`` is a short table.

    Args:
        teacher (str): a name of the teacher.
        rows (int): how many observations it was asked about.
        checks (tuple of Check): in the order in which they were made.

    Examples:
        >>> from torchrl_rpd.teachers import TeacherReport
        >>> from torchrl_rpd.teachers.check import Check
        >>> report = TeacherReport(
        ...     "MyTeacher",
        ...     8,
        ...     (
        ...         Check("finite", "ok", "56 numbers"),
        ...         Check("image", "skipped", "reads no image"),
        ...     ),
        ... )
        >>> report.passed, report["image"].status
        (True, 'skipped')
        >>> print(report)
        check_teacher: MyTeacher, 8 observations: passed
          finite       ok      56 numbers
          skipped: image (reads no image)
    """

    teacher: str
    rows: int
    checks: tuple[Check, ...]

    @property
    def failures(self) -> tuple[Check, ...]:
        """The checks that failed."""
        return tuple(check for check in self.checks if check.status == "FAILED")

    @property
    def passed(self) -> bool:
        """Whether no check failed."""
        return not self.failures

    def __getitem__(self, name: str) -> Check:
        """The check of that name."""
        for check in self.checks:
            if check.name == name:
                return check
        raise KeyError(f"no check {name!r}; made: {[c.name for c in self.checks]}")

    def __str__(self) -> str:
        failed = len(self.failures)
        verdict = f"{failed} FAILED" if failed else "passed"
        lines = [f"check_teacher: {self.teacher}, {self.rows} observations: {verdict}"]
        for check in self.checks:
            if check.status != "skipped":
                text = check.detail + (f" -> {check.advice}" if check.advice else "")
                start = f"  {check.name:<12} {check.status:<7}"
                lines += _wrap(start, text, indent=len(start))
        skipped = [
            f"{c.name} ({c.detail})" for c in self.checks if c.status == "skipped"
        ]
        if skipped:
            lines += _wrap("  skipped: ", ", ".join(skipped), indent=4)
        return "\n".join(lines)


def _wrap(start: str, text: str, *, indent: int) -> list[str]:
    return textwrap.wrap(
        text, width=88, initial_indent=start, subsequent_indent=" " * indent
    )


class TeacherCheckError(RuntimeError):
    """Raised by :func:`~torchrl_rpd.teachers.check_teacher`; says what failed.

    Args:
        report (TeacherReport): all checks, also kept as the attribute ``report``.

    Examples:
        >>> from torchrl_rpd.teachers import TeacherCheckError, TeacherReport
        >>> from torchrl_rpd.teachers.check import Check
        >>> bad = Check("finite", "FAILED", "3 of 56 numbers are not finite")
        >>> try:
        ...     raise TeacherCheckError(TeacherReport("MyTeacher", 8, (bad,)))
        ... except TeacherCheckError as error:
        ...     error.report.passed
        False
    """

    def __init__(self, report: TeacherReport) -> None:
        self.report = report
        names = ", ".join(check.name for check in report.failures)
        super().__init__(
            f"the teacher failed: {names}. (raise_on_failure=False returns this report; "
            f"skip=(...) leaves checks out.)\n{report}"
        )
