# Copyright (c) the torchrl_rpd authors.
#
# This source code is licensed under the MIT license found in the
# LICENSE file in the root directory of this source tree.
"""What ``.ci/run`` refuses: too little coverage, too many excuses, none explained."""

from __future__ import annotations

import importlib.util
import os
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]
pytest.importorskip("coverage")


@pytest.fixture(scope="module")
def gate():
    """The script, as a module."""
    spec = importlib.util.spec_from_file_location(
        "check_coverage", ROOT / ".ci" / "check_coverage.py"
    )
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


FILE = ROOT / "torchrl_rpd" / "evaluation.py"


def report(*, statements: int, ran: int, excused: int) -> dict:
    """A report of Coverage on one file."""
    return {
        "totals": {
            "num_statements": statements,
            "covered_lines": ran,
            "excluded_lines": excused,
        },
        "files": {
            "torchrl_rpd/evaluation.py": {
                "summary": {"missing_lines": statements - ran}
            }
        },
    }


def test_enough(gate):
    # 920 / 1000 is 92 %; 30 of 1030 excused is 2.91 %.
    line, wrong = gate.judge(report(statements=1000, ran=920, excused=30), [FILE])
    assert wrong == []
    assert "92.0 % of 1000 statements" in line
    assert "2.91 % excused" in line


def test_too_little_names_the_files(gate):
    _, (wrong,) = gate.judge(report(statements=1000, ran=919, excused=0), [FILE])
    assert "torchrl_rpd/evaluation.py (81)" in wrong


def test_too_many_excuses(gate):
    # 31 of 1031 is 3.007 %.
    _, wrong = gate.judge(report(statements=1000, ran=1000, excused=31), [FILE])
    assert wrong == ["too much is excused"]


def test_a_file_that_was_not_measured(gate):
    other = ROOT / "torchrl_rpd" / "doctor.py"
    _, (wrong,) = gate.judge(report(statements=9, ran=9, excused=0), [FILE, other])
    assert "doctor.py" in wrong


def test_excuses_say_why(gate, tmp_path, monkeypatch):
    monkeypatch.setattr(gate, "ROOT", tmp_path)
    file = tmp_path / "file.py"
    mark = "pragma: no " + "cover"
    file.write_text(f"a  # {mark} - needs a GPU\nb  # {mark}\nc  # {mark} -\n")
    assert gate.pragmas_without_reason([file]) == ["file.py:2", "file.py:3"]


@pytest.mark.parametrize("name", ["run", "check-wheel", "install-renderer"])
def test_scripts_can_be_run(name):
    assert os.access(ROOT / ".ci" / name, os.X_OK)


if __name__ == "__main__":
    pytest.main([__file__])
