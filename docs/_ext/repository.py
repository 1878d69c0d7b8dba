# Copyright (c) the torchrl_rpd authors.
#
# This source code is licensed under the MIT license found in the
# LICENSE file in the root directory of this source tree.
"""Pages that live elsewhere in the repository, and links to it.

Results are written by `benchmarks/`. Each of them becomes a page that includes the
file, so that the site cannot differ from it. Links of Markdown pages are those of a
repository page: one to a result or to a tutorial's script becomes one to its page here;
one to another source file is left to MyST, which offers the file; one to a folder becomes
its name.
"""

from __future__ import annotations

import re
import sys
from pathlib import Path
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:  # tests use this module without Sphinx
    from sphinx.application import Sphinx

ROOT = Path(__file__).resolve().parents[2]
RESULTS = ROOT / "benchmarks" / "results"


def _heading_levels(text: str) -> list[int]:
    """Levels of the headings outside of code blocks."""
    levels, fenced = [], False
    for line in text.splitlines():
        if line.startswith("```"):
            fenced = not fenced
        elif not fenced and (match := re.match(r"(#+) ", line)):
            levels.append(len(match[1]))
    return levels


def _page_name(path: Path) -> str:
    """Of a result's page under results/generated."""
    return path.relative_to(RESULTS).with_suffix("").as_posix().replace("/", "-")


def result_pages() -> dict[str, str]:
    """Name under results/generated to the text of the page, for every committed result."""
    pages = {}
    for path in sorted([*RESULTS.glob("*.md"), *RESULTS.glob("study/*.md")]):
        levels = _heading_levels(path.read_text())
        title = path.stem.replace("_", " ").capitalize()
        lines: list[str] = []
        if not levels or levels[0] != 1:
            # A table without a title of its own; no level may be skipped above it.
            lines += [f"# {title}", ""]
            for level in range(2, levels[0] if levels else 2):
                lines += [f"{'#' * level} Numbers", ""]
        inside = path.relative_to(ROOT).as_posix()
        lines += [
            f"```{{include}} ../../../{inside}",
            ":relative-docs: ../",
            ":relative-images:",
            "```",
            "",
            f"*This page is the file `{inside}`.*",
        ]
        pages[_page_name(path)] = "\n".join(lines) + "\n"
    return pages


def study_page() -> str:
    """What of the study has run, counted from the committed files."""
    sys.path.insert(0, str(ROOT))
    from benchmarks.study import GROUPS, todo

    lines = [
        "# Study: what has run",
        "",
        "Counted from `benchmarks/results/study` when this page was built; a run with",
        "other settings than `benchmarks/study_groups.py` has now does not count.",
        "`python -m benchmarks.study --plan` lists what is missing.",
        "",
        "| group | what | runs |",
        "|---|---|---|",
    ]
    for name, group in GROUPS.items():
        total = len(group.arms) * len(group.seeds)
        done = total - len(todo([name], None))
        page = RESULTS / "study" / f"{name}.md"
        label = f"[{name}](study-{name}.md)" if page.exists() else f"`{name}`"
        state = "all" if done == total else "planned" if not done else "begun"
        lines.append(f"| {label} | {group.title} | {state}: {done} of {total} |")
    return "\n".join(lines) + "\n"


def write_result_pages(app: Sphinx) -> None:
    """Before sources are found; files that did not change are left alone."""
    folder = Path(app.srcdir) / "results" / "generated"
    folder.mkdir(parents=True, exist_ok=True)
    pages = {**result_pages(), "study-runs": study_page()}
    for path in folder.glob("*.md"):
        if path.stem not in pages:
            path.unlink()
    for name, text in pages.items():
        path = folder / f"{name}.md"
        if not path.exists() or path.read_text() != text:
            path.write_text(text)


# A link to a file of the repository: neither an address, nor a place on the page.
_LINK = re.compile(r"(?<!!)\[([^\]]*)\]\(((?![a-z]+:|[/#])[^)#\s]+)(#[^)\s]*)?\)")


def rewrite_links(text: str, folder: Path, srcdir: Path) -> str:
    """Links from a page in ``folder``, of the repository, to what the site has."""

    def replace(match: re.Match[str]) -> str:
        label, target, anchor = match[1], match[2], match[3] or ""
        path = (folder / target).resolve()
        if path == RESULTS / "study":
            return f"[{label}](/results/generated/study-runs.md)"
        if path.is_dir():
            return label
        if path.suffix == ".md" and path.is_relative_to(RESULTS):
            return f"[{label}](/results/generated/{_page_name(path)}.md{anchor})"
        if path.suffix == ".py" and path.parent == srcdir / "tutorials":
            return f"[{label}](/auto_tutorials/{path.stem}.rst)"
        if path.suffix == ".md" and path.is_relative_to(srcdir):
            return f"[{label}](/{path.relative_to(srcdir).as_posix()}{anchor})"
        return match[0]

    return _LINK.sub(replace, text)


def _read(app: Sphinx, docname: str, source: list[str]) -> None:
    path = Path(app.env.doc2path(docname))
    if path.suffix == ".md":
        source[0] = rewrite_links(source[0], path.parent, Path(app.srcdir))


def _included(app: Sphinx, relative: Path, parent: str, source: list[str]) -> None:
    path = (Path(app.srcdir) / relative).resolve()
    source[0] = rewrite_links(source[0], path.parent, Path(app.srcdir))


def setup(app: Sphinx) -> dict[str, Any]:
    """Connects both."""
    app.connect("builder-inited", write_result_pages)
    app.connect("source-read", _read)
    app.connect("include-read", _included)
    return {"parallel_read_safe": True, "parallel_write_safe": True}
