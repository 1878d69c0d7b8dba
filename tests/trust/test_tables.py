# Copyright (c) the torchrl_rpd authors.
#
# This source code is licensed under the MIT license found in the
# LICENSE file in the root directory of this source tree.
"""Every test that docs/faults.md and docs/security.md name is there."""

from __future__ import annotations

import re
from collections.abc import Iterator
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]
# A file, with or without its folder; names of tests in it.
TOKEN = re.compile(r"`(?:([\w/]+\.py))?(?:::)?((?:(?:Test|test_)\w+(?:::)?)*)[^`]*`")


def named(page: str) -> Iterator[tuple[Path, str]]:
    """Files and names; a name without a file is of the page's own."""
    own = ROOT / "tests" / "trust" / f"test_{Path(page).stem}.py"
    for line in (ROOT / "docs" / page).read_text().splitlines():
        for match in TOKEN.finditer(line):
            path, names = match[1], match[2]
            if path is not None and "test_" not in path:
                continue
            file = own
            if path is not None:
                (file,) = ROOT.glob(path if "/" in path else f"tests/**/{path}")
                yield file, ""
            yield from ((file, name) for name in names.split("::") if name)


@pytest.mark.parametrize("page", ["faults.md", "security.md", "determinism.md"])
def test_every_test_that_is_named_exists(page):
    found = list(named(page))
    assert len(found) >= 1
    for file, name in found:
        defined = rf"^\s*(def|class) {name}\b" if name else ""
        assert re.search(defined, file.read_text(), re.MULTILINE), (file, name)


def test_a_name_that_is_not_there_would_be_found():
    pairs = set(named("faults.md"))
    assert (ROOT / "tests/trust/test_faults.py", "test_server_gone") in pairs
    assert (ROOT / "tests/envs/test_modes.py", "TestRenderBackend") in pairs


if __name__ == "__main__":
    pytest.main([__file__])
