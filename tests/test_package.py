# Copyright (c) the torchrl_rpd authors.
#
# This source code is licensed under the MIT license found in the
# LICENSE file in the root directory of this source tree.
"""The package as it is shipped: imports, versions, files."""

from __future__ import annotations

import os
import pkgutil
import re
import subprocess
import sys
import tomllib
from importlib.metadata import version
from pathlib import Path

import pytest

import torchrl_rpd

ROOT = Path(__file__).parents[1]
PROJECT = tomllib.loads((ROOT / "pyproject.toml").read_text())


def tracked_files() -> list[Path]:
    """What a clone holds (and what would be added to it)."""
    listed = subprocess.run(
        ["git", "ls-files", "--cached", "--others", "--exclude-standard"],
        cwd=ROOT,
        capture_output=True,
        text=True,
    )
    if listed.returncode != 0:
        pytest.skip("needs a git checkout")
    files = [ROOT / line for line in listed.stdout.splitlines()]
    return [path for path in files if path.exists()]


class TestImport:
    # Every package of the extras, and what they bring along that could be used by
    # mistake. Torch brings its own NumPy bindings, hence NumPy is not one of them.
    OPTIONAL = (
        "accelerate",
        "google_crc32c",
        "gym",
        "gymnasium",
        "h5py",
        "huggingface_hub",
        "hydra",
        "lerobot",
        "mani_skill",
        "matplotlib",
        "msgpack",
        "omegaconf",
        "peft",
        "PIL",
        "ray",
        "safetensors",
        "sapien",
        "scipy",
        "tokenizers",
        "torchvision",
        "transformers",
        "wandb",
        "websockets",
    )

    def test_core_needs_only_torchrl(self):
        packages = ["torchrl_rpd"] + [
            info.name
            for info in pkgutil.walk_packages(torchrl_rpd.__path__, "torchrl_rpd.")
            if info.ispkg
        ]
        # None in sys.modules makes `import x` raise ModuleNotFoundError and tells
        # importlib.util.find_spec, with which TorchRL looks around, that x is absent.
        code = (
            "import importlib, sys\n"
            f"for name in {self.OPTIONAL!r}: sys.modules[name] = None\n"
            f"for name in {packages!r}: importlib.import_module(name)\n"
        )
        done = subprocess.run(
            [sys.executable, "-c", code],
            env=dict(os.environ, PYTHONPATH=str(ROOT)),
            capture_output=True,
            text=True,
        )
        assert done.returncode == 0, done.stderr[-2000:]

    def test_import_is_silent_and_leaves_torch_alone(self):
        code = (
            "import torch\n"
            "threads, state = torch.get_num_threads(), torch.get_rng_state()\n"
            "import torchrl_rpd\n"
            "assert torch.get_num_threads() == threads\n"
            "assert torch.equal(torch.get_rng_state(), state)\n"
        )
        done = subprocess.run(
            [sys.executable, "-c", code],
            env=dict(os.environ, PYTHONPATH=str(ROOT)),
            capture_output=True,
            text=True,
        )
        assert done.returncode == 0, done.stderr[-2000:]
        assert done.stdout == ""


class TestLayers:
    """objectives, transforms, envs and teachers never import one another."""

    LAYERS = ("objectives", "transforms", "envs", "teachers")

    @pytest.mark.parametrize("layer", LAYERS)
    def test_does_not_import_its_neighbours(self, layer):
        others = "|".join(
            name for name in (*self.LAYERS, "trainers", "evaluation") if name != layer
        )
        statement = re.compile(
            rf"^\s*(from|import)\s+(torchrl_rpd|\.)\.({others})\b"
            rf"|^\s*from\s+(torchrl_rpd|\.\.)\s+import\s+.*\b({others})\b",
            re.MULTILINE,
        )
        for path in (ROOT / "torchrl_rpd" / layer).rglob("*.py"):
            # Examples in docstrings may show how the layers meet.
            code = re.sub(r'""".*?"""', "", path.read_text(), flags=re.DOTALL)
            assert not statement.search(code), path


class TestMetadata:
    def test_one_version(self):
        expected = PROJECT["project"]["version"]
        assert torchrl_rpd.__version__ == expected
        changelog = (ROOT / "CHANGELOG.md").read_text()
        newest = re.search(r"^## \[(\d[^\]]*)\]", changelog, re.MULTILINE)
        assert newest is not None
        assert newest[1] == expected
        citation = (ROOT / "CITATION.cff").read_text()
        assert re.search(r"^version: (.*)$", citation, re.MULTILINE)[1] == expected

    def test_typed(self):
        assert (Path(torchrl_rpd.__file__).parent / "py.typed").exists()
        package_data = PROJECT["tool"]["setuptools"]["package-data"]["*"]
        # What is no code and is not named here would be missing in the wheel.
        suffixes = {
            f"*{path.suffix}"
            for path in tracked_files()
            if path.is_relative_to(ROOT / "torchrl_rpd") and path.suffix != ".py"
        }
        assert suffixes - {"*.typed"} <= set(package_data)
        assert "py.typed" in package_data

    def test_every_folder_is_a_package(self):
        # find_packages leaves out folders without __init__.py.
        for path in (ROOT / "torchrl_rpd").rglob("*.py"):
            assert (path.parent / "__init__.py").exists(), path

    def test_all_extras(self):
        extras = PROJECT["project"]["optional-dependencies"]
        (everything,) = extras["all"]
        listed = re.search(r"\[(.*)\]", everything)[1].split(",")
        assert set(listed) == set(extras) - {"all"}

    def test_make_installs_every_extra(self):
        makefile = (ROOT / "Makefile").read_text()
        installed = re.search(r"^EXTRAS := (.*)$", makefile, re.MULTILINE)[1]
        # Ray comes with `make test-all`.
        extras = set(PROJECT["project"]["optional-dependencies"])
        assert set(installed.split(",")) == extras - {"all", "ray"}


class TestConstraints:
    LINES = (ROOT / "constraints.txt").read_text().splitlines()

    def test_torch_first(self):
        # The Makefile reads this line and installs it before everything else.
        assert re.fullmatch(r"torch==\d+\.\d+\.\d+", self.LINES[0])

    def test_exact_public_versions(self):
        pins = [line for line in self.LINES if not line.startswith("#")]
        for pin in pins:
            assert re.fullmatch(r"[A-Za-z0-9._-]+==[A-Za-z0-9._]+", pin), pin
        names = [pin.split("==")[0].lower().replace("_", "-") for pin in pins]
        assert len(set(names)) == len(names)

    def test_every_requirement_is_pinned(self):
        project = PROJECT["project"]
        wanted = list(project["dependencies"])
        for extra, texts in project["optional-dependencies"].items():
            wanted += [] if extra == "all" else texts
        names = {re.split(r"[^\w.-]", text)[0] for text in wanted}
        pinned = {line.split("==")[0] for line in self.LINES}

        def normal(names):
            return {re.sub(r"[-_.]+", "-", name).lower() for name in names}

        assert normal(names) <= normal(pinned)

    @pytest.mark.parametrize("name", ["tensordict", "torchrl"])
    def test_core_is_what_is_tested(self, name):
        assert f"{name}=={version(name)}" in self.LINES


class TestFiles:
    def test_readme_is_short(self):
        assert len((ROOT / "README.md").read_text().splitlines()) <= 120

    def test_reports_of_problems_ask_for_the_doctor(self):
        templates = list((ROOT / ".github" / "ISSUE_TEMPLATE").glob("*.yml"))
        assert len(templates) >= 2
        for path in templates:
            assert "python -m torchrl_rpd.doctor" in path.read_text(), path

    def test_citation_names_the_paper(self):
        citation = (ROOT / "CITATION.cff").read_text()
        for words in ("2503.05833", "Jülg", "Burgard", "Walter", "RL Experts"):
            assert words in citation

    def test_contributing_names_what_is_there(self):
        """Files, commands and tests that are named exist."""
        text = (ROOT / "CONTRIBUTING.md").read_text()
        makefile = (ROOT / "Makefile").read_text()
        for target in re.findall(r"\bmake ([a-z][a-z-]+)`", text):
            assert f"\n{target}:" in makefile, target
        package = ROOT / "torchrl_rpd"
        for name in re.findall(r"`([\w./]+(?:\.py|/))`", text):
            folders = (ROOT, package, *(ROOT / "tests").iterdir())
            places = [folder / name for folder in folders]
            places += [p / name for p in package.iterdir() if p.is_dir()]
            assert any(place.exists() for place in places), name

    def test_headers(self):
        header = (
            "# Copyright (c) the torchrl_rpd authors.\n"
            "#\n"
            "# This source code is licensed under the MIT license found in the\n"
            "# LICENSE file in the root directory of this source tree.\n"
        )
        missing = [
            str(path.relative_to(ROOT))
            for path in tracked_files()
            if path.suffix == ".py" and not path.read_text().startswith(header)
        ]
        assert missing == []

    def test_no_machine_in_files(self):
        # Neither package indices nor absolute paths: both differ from place to place.
        hosts = "|".join(("py" + "pi", "python" + "hosted", "whl/" + "cpu"))
        folders = "|".join(("work", "opt", "home", "root", "Users", "mnt"))
        pattern = re.compile(
            rf"({hosts})|file://|(?<![\w.~/)-])/({folders})/", re.IGNORECASE
        )
        found = []
        for path in tracked_files():
            if path == Path(__file__):
                continue
            try:
                text = path.read_text()
            except UnicodeDecodeError:  # pictures, weights
                continue
            found += [
                f"{path.relative_to(ROOT)}: {m[0]}" for m in pattern.finditer(text)
            ]
        assert found == []


if __name__ == "__main__":
    pytest.main([__file__])
