# Copyright (c) the torchrl_rpd authors.
#
# This source code is licensed under the MIT license found in the
# LICENSE file in the root directory of this source tree.
"""Every example that a reader may copy runs, and every public name has one."""

from __future__ import annotations

import doctest
import importlib
import inspect
import os
import pkgutil
import re
import subprocess
import sys
from pathlib import Path
from typing import NamedTuple

import pytest
from public_api import public_names

import torchrl_rpd

ROOT = Path(__file__).parents[1]
README = ROOT / "README.md"
SHELL_OR_TEXT = {"bash", "console", "text", "bibtex"}

MODULES = [
    importlib.import_module(info.name)
    for info in pkgutil.walk_packages(torchrl_rpd.__path__, "torchrl_rpd.")
]


def markers(source: str) -> list[pytest.MarkDecorator]:
    """What an example needs, from what it mentions."""
    needs_maniskill = re.search(r"ManiSkill(Env|Wrapper)\(|mani_skill", source)
    return [pytest.mark.maniskill] if needs_maniskill else []


class Block(NamedTuple):
    line: int
    language: str
    source: str


def blocks(text: str) -> list[Block]:
    """The fenced blocks of a Markdown text, with the line each starts at."""
    fence = re.compile(r"^```([^\n]*)\n(.*?)^```$", re.MULTILINE | re.DOTALL)
    return [
        Block(text.count("\n", 0, m.start()) + 1, m[1].strip(), m[2])
        for m in fence.finditer(text)
    ]


README_BLOCKS = blocks(README.read_text()) if README.exists() else []


class TestReadme:
    def test_blocks(self):
        text = "a\n```python\nx = 1\n```\n\n```bash\nmake\n```\n"
        assert blocks(text) == [
            Block(2, "python", "x = 1\n"),
            Block(6, "bash", "make\n"),
        ]

    @pytest.mark.parametrize("block", README_BLOCKS, ids=lambda b: f"line{b.line}")
    def test_only_python_that_runs(self, block):
        # "python no-run", "py" or an unnamed block would escape the test below.
        assert block.language in {"python"} | SHELL_OR_TEXT

    @pytest.mark.parametrize(
        "block",
        [
            pytest.param(b, id=f"line{b.line}", marks=markers(b.source))
            for b in README_BLOCKS
            if b.language == "python"
        ],
    )
    def test_runs(self, block, tmp_path):
        # As a reader runs it: a script, so that worker processes can import it.
        script = tmp_path / "readme.py"
        script.write_text("\n" * block.line + block.source)
        done = subprocess.run(
            [sys.executable, str(script)],
            cwd=tmp_path,
            env=dict(os.environ, PYTHONPATH=str(ROOT)),
            capture_output=True,
            text=True,
            timeout=300,
        )
        assert done.returncode == 0, done.stderr[-3000:]


def docstring_examples() -> list:
    """All docstrings with examples, of all modules, as pytest parameters."""
    finder = doctest.DocTestFinder()
    found = {
        test.name: test
        for module in [torchrl_rpd, *MODULES]
        for test in finder.find(module)
        if test.examples
    }
    return [
        pytest.param(test, id=name, marks=markers(test.docstring))
        for name, test in sorted(found.items())
    ]


@pytest.mark.parametrize("example", docstring_examples())
def test_docstring_example(example):
    report: list[str] = []
    runner = doctest.DocTestRunner(
        optionflags=doctest.ELLIPSIS | doctest.NORMALIZE_WHITESPACE, verbose=False
    )
    failed, attempted = runner.run(example, out=report.append)
    assert attempted
    assert not failed, "".join(report)


def public_objects() -> list:
    """Classes and functions among what the reference has to list."""
    return [
        pytest.param(value, id=name)
        for name, value in sorted(public_names().items())
        if inspect.isclass(value) or inspect.isroutine(value)
    ]


@pytest.mark.parametrize("public", public_objects())
def test_public_name_has_example(public):
    # An inherited docstring does not count.
    doc = inspect.cleandoc(public.__doc__ or "")
    assert doc, "no docstring"
    assert re.search(r"^Examples:\n(.*\n)*\s+>>> ", doc, re.MULTILINE), (
        "no `Examples:` section with `>>>`"
    )


@pytest.mark.parametrize(
    "package", [torchrl_rpd, *(m for m in MODULES if hasattr(m, "__path__"))]
)
def test_package_says_what_is_public(package):
    assert hasattr(package, "__all__")
    for name in package.__all__:
        assert hasattr(package, name)


if __name__ == "__main__":
    pytest.main([__file__])
