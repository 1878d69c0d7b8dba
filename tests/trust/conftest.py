# Copyright (c) the torchrl_rpd authors.
#
# This source code is licensed under the MIT license found in the
# LICENSE file in the root directory of this source tree.
"""examples/rpd.py on toys, in this process."""

from __future__ import annotations

import importlib.util
from collections.abc import Callable, Iterator
from pathlib import Path
from types import ModuleType

import pytest
from faulty_parts import ROOT, WORDS
from hydra import compose, initialize_config_dir


@pytest.fixture(scope="session")
def rpd() -> Iterator[ModuleType]:
    """The script, as a module that leaves this process's threads alone."""
    spec = importlib.util.spec_from_file_location(
        "rpd_that_fails", ROOT / "examples" / "rpd.py"
    )
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    module.set_learner_threads = lambda **_: None
    return module


@pytest.fixture(scope="session")
def start(rpd: ModuleType) -> Callable[..., Path]:
    """Starts the command; the same arguments go on from a checkpoint."""

    def start(folder: Path, *words: str) -> Path:
        place = [f"runs={folder.parent}", f"name={folder.name}"]
        with initialize_config_dir(str(ROOT / "examples" / "conf"), version_base="1.3"):
            cfg = compose("config", overrides=[*WORDS, *words, *place])
        rpd.main(cfg)
        return folder

    return start


@pytest.fixture(scope="session")
def undisturbed(start, tmp_path_factory) -> Path:
    """A run in which nothing goes wrong."""
    return start(tmp_path_factory.mktemp("runs") / "undisturbed")


@pytest.fixture
def fault(monkeypatch) -> Callable[[str, str], None]:
    """Has the teacher do harm once there is a file."""

    def plan(name: str, after: object) -> None:
        monkeypatch.setenv("FAULT", name)
        monkeypatch.setenv("FAULT_AFTER", str(after))

    return plan
