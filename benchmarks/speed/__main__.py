# Copyright (c) the torchrl_rpd authors.
#
# This source code is licensed under the MIT license found in the
# LICENSE file in the root directory of this source tree.
"""Measures and writes the page.

    python -m benchmarks.speed                    # everything that can run here
    python -m benchmarks.speed update adapter     # only these sections

Sections that have not been measured this time keep their figures. On a GPU machine without
a simulator, ``python -m benchmarks.speed update --device cuda --out FILE``.
"""

from __future__ import annotations

import argparse
import importlib
import json
from pathlib import Path
from typing import Any

import torch
from torchrl._utils import logger

from benchmarks._results import write_json
from benchmarks.machine import machine_line
from benchmarks.speed._section import Section, markdown
from torchrl_rpd import set_learner_threads

OUT = Path(__file__).parents[1] / "results" / "speed.json"
TITLES = {
    "adapter": "The adapter and plain ManiSkill",
    "update": "The updates of a batch",
    "memory": "The memory of an iteration",
    "teacher": "The teacher: once per frame and once per update",
    "overlap": "Collecting and labelling at the same time",
    "learning": "Steps and seconds to 90 % success",
    "growth": "How cost grows",
    "profile": "Where an iteration's time goes",
}


def measure(section: str, device: torch.device) -> Section:
    """One section; most are rows of ratios."""
    module = importlib.import_module(f"benchmarks.speed.{section}")
    found = module.rows(device=device)
    if isinstance(found, Section):
        return found
    return Section([row.cells for row in found])


def page(results: dict[str, Any]) -> str:
    """Markdown."""
    lines = [
        "# Speed",
        "",
        "Ratios of seconds, measured in turns: median of the rounds [lowest, highest]; "
        "where there is no ratio, the table says what it is. What is compared stands in "
        "the modules of `benchmarks/speed`.",
        "",
    ]
    for section, title in TITLES.items():
        if section not in results:
            continue
        lines += [f"## {title}", "", *markdown(results[section])]
    return "\n".join([*lines, "Command: `python -m benchmarks.speed`.", ""])


def main() -> None:
    """Parses the arguments and measures."""
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("sections", nargs="*", help=", ".join(TITLES))
    parser.add_argument("--device", default="cpu")
    parser.add_argument("--out", type=Path, default=OUT)
    args = parser.parse_args()
    if unknown := set(args.sections) - set(TITLES):
        parser.error(f"{sorted(unknown)} is none of {list(TITLES)}")
    set_learner_threads()
    logger.setLevel("WARNING")
    results = json.loads(args.out.read_text()) if args.out.exists() else {}
    for section in args.sections or TITLES:
        found = measure(section, torch.device(args.device))
        for cells in found.rows:
            print(" | ".join(cells), flush=True)
        results[section] = {**found.stored(), "machine": machine_line()}
        if found.draw is not None:
            picture = args.out.with_name(f"{args.out.stem}_{section}.png")
            found.draw(picture)
            results[section]["picture"] = [found.alt, picture.name]
        write_json(args.out, results)
    args.out.with_suffix(".md").write_text(page(results))
    print(f"wrote {args.out.with_suffix('.md')}")


if __name__ == "__main__":
    main()
