# Copyright (c) the torchrl_rpd authors.
#
# This source code is licensed under the MIT license found in the
# LICENSE file in the root directory of this source tree.
"""A section of the page that is more than rows of ratios."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

RATIO_COLUMNS = ("", "ratio", "bar", "", "")


@dataclass(frozen=True)
class Section:
    """A table, what is to be said of it, and a picture.

    Args:
        rows (sequence of sequence of str): cells.
        columns (sequence of str): their headings. Default: those of ratios.
        text (str): Markdown below the table.
        alt (str): the picture in words.
        draw (callable, optional): writes the picture to a file.
        numbers (dict): what else is kept in the JSON file.
    """

    rows: Sequence[Sequence[str]]
    columns: Sequence[str] = RATIO_COLUMNS
    text: str = ""
    alt: str = ""
    draw: Callable[[Path], None] | None = None
    numbers: dict[str, Any] = field(default_factory=dict)

    def stored(self) -> dict[str, Any]:
        """For the JSON file, without the picture."""
        return {
            "rows": [list(row) for row in self.rows],
            "columns": list(self.columns),
            **({"text": self.text} if self.text else {}),
            **({"numbers": self.numbers} if self.numbers else {}),
        }


def markdown(found: dict[str, Any]) -> list[str]:
    """The lines of a stored section."""
    columns = found.get("columns", RATIO_COLUMNS)
    lines = [f"| {' | '.join(columns)} |", "| --- " * len(columns) + "|"]
    lines += [f"| {' | '.join(cells)} |" for cells in found["rows"]]
    if "text" in found:
        lines += ["", found["text"]]
    if "picture" in found:
        alt, name = found["picture"]
        lines += ["", f"![{alt}]({name})"]
    return [*lines, "", found["machine"] + ".", ""]
