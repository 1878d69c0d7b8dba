# Copyright (c) the torchrl_rpd authors.
#
# This source code is licensed under the MIT license found in the
# LICENSE file in the root directory of this source tree.
"""The docs site's sources: nothing public is missing, code and links are alive."""

from __future__ import annotations

import ast
import doctest
import importlib
import re
from pathlib import Path

import public_api
import pytest
import repository

ROOT = Path(__file__).parents[1]
DOCS = ROOT / "docs"
PAGES = sorted(
    [*DOCS.glob("*.md"), DOCS / "results/index.md", DOCS / "reference/index.md"]
)
TUTORIALS = sorted((DOCS / "tutorials").glob("*.py"))


class TestReference:
    def test_every_public_name_is_there(self):
        assert public_api.missing_names(public_api.listed_names()) == []

    def test_a_missing_name_is_found(self):
        there = public_api.listed_names() - {"torchrl_rpd.objectives.DistillPPOLoss"}
        missing = public_api.missing_names(there)
        assert missing == ["torchrl_rpd.objectives.DistillPPOLoss"]

    def test_nothing_else_is_there(self):
        gone = [n for n in public_api.listed_names() if public_api.resolve(n) is None]
        assert gone == []


def python_blocks() -> list:
    """Code of the Markdown pages, and the tutorials."""
    fence = re.compile(r"^```python\n(.*?)^```$", re.MULTILINE | re.DOTALL)
    found = [
        pytest.param(
            match[1],
            id=f"{page.stem}-line{page.read_text().count(chr(10), 0, match.start()) + 1}",
        )
        for page in PAGES
        for match in fence.finditer(page.read_text())
    ]
    return found + [pytest.param(p.read_text(), id=p.stem) for p in TUTORIALS]


@pytest.mark.parametrize("source", python_blocks())
def test_code_is_of_this_package(source):
    if ">>> " in source:
        test = doctest.DocTestParser().get_doctest(source, {}, "page", None, 0)
        flags = doctest.ELLIPSIS | doctest.NORMALIZE_WHITESPACE
        report: list[str] = []
        doctest.DocTestRunner(optionflags=flags).run(test, out=report.append)
        assert not report, "".join(report)
        return
    for node in ast.walk(ast.parse(source)):
        # What is imported from here exists: the rest needs what the page talks about.
        if isinstance(node, ast.ImportFrom) and (node.module or "").startswith(
            "torchrl_rpd"
        ):
            module = importlib.import_module(node.module)
            for alias in node.names:
                assert hasattr(module, alias.name), f"{node.module}.{alias.name}"


@pytest.mark.parametrize("page", PAGES, ids=lambda p: str(p.relative_to(DOCS)))
def test_links_work_in_the_repository(page):
    text = re.sub(r"^```.*?^```$", "", page.read_text(), flags=re.MULTILINE | re.DOTALL)
    for target in re.findall(r"\]\(((?![a-z]+:|#)[^)#\s]+)", text):
        assert (page.parent / target).exists(), target


def test_links_are_rewritten_for_the_site():
    def here(text):
        return repository.rewrite_links(text, DOCS, DOCS)

    assert here("[a](../benchmarks/results/pocket_vla.md)") == (
        "[a](/results/generated/pocket_vla.md)"
    )
    assert here("[a](../benchmarks/results/study)") == (
        "[a](/results/generated/study-runs.md)"
    )
    assert here("[a](tasks.md#notes)") == "[a](/tasks.md#notes)"
    assert (
        here("[a](tutorials/1_first_run.py)") == "[a](/auto_tutorials/1_first_run.rst)"
    )
    assert here("see [tests](../tests/envs).") == "see tests."
    untouched = (
        "[a](https://x.org) [b](#c) [d](../examples/rpd.py) ![e](images/demo.png)"
    )
    assert here(untouched) == untouched


def test_every_committed_result_has_a_page():
    pages = repository.result_pages()
    for path in (ROOT / "benchmarks" / "results").rglob("*.md"):
        inside = path.relative_to(ROOT).as_posix()
        assert sum(f"../../../{inside}\n" in text for text in pages.values()) == 1


def test_headings_of_results_leave_no_level_out():
    assert repository._heading_levels("# a\n```\n# no\n```\n### b\n") == [1, 3]
    # demo_full.md begins at the third level: a title and a section come before it.
    page = repository.result_pages()["demo_full"]
    assert page.startswith("# Demo full\n\n## Numbers\n\n```{include}")


def test_every_page_is_in_a_toctree():
    listed = set()
    for page in PAGES:
        for block in re.findall(
            r"^```\{toctree\}\n(.*?)^```", page.read_text(), re.M | re.S
        ):
            for line in block.splitlines():
                if line and not line.startswith(":"):
                    listed.add(
                        (page.parent / line.lstrip("/")).relative_to(DOCS).as_posix()
                    )
    pages = {page.relative_to(DOCS).with_suffix("").as_posix() for page in PAGES}
    assert pages - listed == {"index"}


@pytest.mark.parametrize("path", TUTORIALS, ids=lambda p: p.stem)
def test_tutorials_say_what_they_ran(path):
    title, _, text = ast.get_docstring(ast.parse(path.read_text())).partition("\n")
    assert title and "**What this page ran** while the site was built" in text
    assert f"/auto_tutorials/{path.stem}" in (DOCS / "tutorials.md").read_text()


if __name__ == "__main__":
    pytest.main([__file__])
