# Copyright (c) the torchrl_rpd authors.
#
# This source code is licensed under the MIT license found in the
# LICENSE file in the root directory of this source tree.
"""Refuses a package of which the tests ran too little, or too much is excused.

Reads what ``make test COVERAGE=1`` has measured. At least 92 % of the statements of
``torchrl_rpd`` have to have run; at most 3 % may be excused from that, and each
``# pragma: no cover`` has to say why in its line: ``# pragma: no cover - needs a GPU``.
"""

from __future__ import annotations

import json
import re
import sys
import tempfile
from pathlib import Path
from typing import Any

from coverage import Coverage

ROOT = Path(__file__).resolve().parents[1]
PACKAGE = "torchrl_rpd"
LEAST_COVERED = 92.0  # percent of the statements that are not excused
MOST_EXCUSED = 3.0  # percent of all statements
WORST = 8  # files named in the report

_PRAGMA = re.compile(r"#\s*pragma:\s*no\s*cover(?P<rest>.*)", re.IGNORECASE)
_REASON = re.compile(r"\s*-\s+\w.*\w")


def measured(folder: Path) -> dict[str, Any]:
    """Coverage's own JSON report on the data in ``folder``."""
    # No settings: they could leave out files or lines.
    coverage = Coverage(
        data_file=str(folder / ".coverage"), config_file=False, source_pkgs=[PACKAGE]
    )
    coverage.load()
    with tempfile.TemporaryDirectory() as temporary:
        report = Path(temporary) / "coverage.json"
        coverage.json_report(outfile=str(report), ignore_errors=False)
        return dict(json.loads(report.read_text()))


def pragmas_without_reason(files: list[Path]) -> list[str]:
    """Where lines are excused and nobody says why."""
    found = []
    for path in files:
        for number, line in enumerate(path.read_text().splitlines(), start=1):
            pragma = _PRAGMA.search(line)
            if pragma and not _REASON.match(pragma["rest"]):
                found.append(f"{path.relative_to(ROOT)}:{number}")
    return found


def judge(report: dict[str, Any], files: list[Path]) -> tuple[str, list[str]]:
    """The line to print, and what is wrong.

    Args:
        report: Coverage's JSON report.
        files: every file of the package; one that no test imports counts as not run.
    """
    totals = report["totals"]
    statements, excused = totals["num_statements"], totals["excluded_lines"]
    covered = 100 * totals["covered_lines"] / max(1, statements)
    share = 100 * excused / max(1, statements + excused)
    line = (
        f"coverage: {covered:.1f} % of {statements} statements ran "
        f"(at least {LEAST_COVERED:g}), {share:.2f} % excused "
        f"(at most {MOST_EXCUSED:g}), {len(report['files'])} files"
    )
    wrong = []
    if covered < LEAST_COVERED:
        worst = sorted(
            report["files"].items(),
            key=lambda item: -item[1]["summary"]["missing_lines"],
        )
        names = [
            f"{name} ({f['summary']['missing_lines']})" for name, f in worst[:WORST]
        ]
        wrong.append(f"too little ran; statements that did not: {', '.join(names)}")
    if share > MOST_EXCUSED:
        wrong.append("too much is excused")
    seen = {(ROOT / name).resolve() for name in report["files"]}
    # An empty __init__.py has nothing to run.
    unseen = [p for p in files if p not in seen and p.read_text().strip()]
    if unseen:
        wrong.append(f"not measured: {[str(p.relative_to(ROOT)) for p in unseen]}")
    wrong += [
        f"{where}: say why: # pragma: no cover - reason"
        for where in pragmas_without_reason(files)
    ]
    return line, wrong


def main() -> None:
    """Prints what was found; the exit code is 1 if that is not enough."""
    files = sorted((ROOT / PACKAGE).rglob("*.py"))
    line, wrong = judge(measured(ROOT), files)
    print(line)
    if wrong:
        sys.exit("\n".join(wrong))


if __name__ == "__main__":
    main()
