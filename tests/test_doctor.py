# Copyright (c) the torchrl_rpd authors.
#
# This source code is licensed under the MIT license found in the
# LICENSE file in the root directory of this source tree.
"""The report on an installation, with made-up installations."""

from __future__ import annotations

import subprocess
import sys
import tomllib
from importlib import metadata
from pathlib import Path

import pytest

from torchrl_rpd import doctor

CLONE = Path(doctor.__file__).parents[1] / "pyproject.toml"
REQUIRES = [
    "torch",
    "torchrl<0.15,>=0.14",
    "mani_skill<3.1,>=3.0.1; extra == 'maniskill'",
    "gymnasium>=1.0; extra == 'maniskill'",
    "ray>=2.40; extra == 'ray'",
    "torchrl_rpd[maniskill,ray]; extra == 'all'",
]


@pytest.fixture
def installed(monkeypatch):
    """Versions by name; torchrl_rpd's requirements are those above."""
    versions = {"torchrl_rpd": "0.1.0", "torch": "2.13.0+cpu", "torchrl": "0.14.1"}

    def version(name):
        if name not in versions:
            raise metadata.PackageNotFoundError(name)
        return versions[name]

    monkeypatch.setattr(doctor.metadata, "version", version)
    monkeypatch.setattr(doctor.metadata, "requires", lambda name: REQUIRES)
    return versions


def found(findings):
    """Findings by what they are about."""
    return {finding.what: finding for finding in findings}


def test_all_there(installed):
    installed |= {"mani_skill": "3.0.1", "gymnasium": "1.2.0", "ray": "2.60.0"}
    assert [f.state for f in doctor.required()] == ["ok", "ok"]
    assert found(doctor.extras())["maniskill"].detail == (
        "mani_skill 3.0.1, gymnasium 1.2.0"
    )


def test_a_missing_extra_says_what_it_disables(installed):
    installed["gymnasium"] = "1.2.0"
    extras = found(doctor.extras())
    assert extras["maniskill"].state == "missing"
    assert "Disabled: ManiSkillEnv" in extras["maniskill"].detail
    assert "gymnasium" not in extras["maniskill"].detail
    assert "pip install 'torchrl_rpd[ray]'" in extras["ray"].detail
    # Extras without an entry of their own are no part of the report.
    assert set(extras) == {"maniskill", "ray"}


def test_a_wrong_version(installed):
    installed["torchrl"] = "0.13.2"
    finding = found(doctor.required())["torchrl 0.13.2"]
    assert finding.state == "wrong"
    assert "<0.15,>=0.14" in finding.detail
    assert not doctor.report()[1]


def test_a_missing_package(installed):
    del installed["torchrl"]
    assert found(doctor.required())["torchrl"].state == "missing"
    assert not doctor.report()[1]


def test_from_a_clone(monkeypatch):
    """Not installed: the requirements are those of the clone's pyproject.toml."""
    version = metadata.version

    def others(name):
        if name == "torchrl_rpd":
            raise metadata.PackageNotFoundError(name)
        return version(name)

    def nothing(name):
        raise metadata.PackageNotFoundError(name)

    monkeypatch.setattr(doctor.metadata, "version", others)
    monkeypatch.setattr(doctor.metadata, "requires", nothing)
    required = found(doctor.required())
    assert "only imported from a folder" in required["torchrl_rpd"].detail
    if not CLONE.exists():
        pytest.skip("needs a clone")
    assert required["torchrl"] == doctor.Finding("ok", "torchrl", version("torchrl"))
    assert found(doctor.extras())["dev"].state == "ok"


def test_requirements_of_another_project(tmp_path):
    file = tmp_path / "pyproject.toml"
    assert doctor._clone_requirements(file) == []
    file.write_text('[project]\nname = "another"\ndependencies = ["torch"]\n')
    assert doctor._clone_requirements(file) == []


def test_a_torch_that_cannot_be_imported(installed, monkeypatch):
    real = doctor.importlib.import_module

    def broken(name):
        if name == "torch":
            raise OSError("libcudart.so.13: cannot open shared object file\nmore")
        return real(name)

    monkeypatch.setattr(doctor.importlib, "import_module", broken)
    text, healthy = doctor.report()
    assert not healthy
    assert (
        "[wrong] torch: cannot be imported (OSError: libcudart.so.13: cannot open shared "
        "object file). Disabled: everything."
    ) in text
    assert "Devices" not in text  # nothing that needs it is asked


@pytest.mark.parametrize(
    ("drawing", "states"),
    [
        ({"cuda", "cpu"}, ["ok", "ok"]),
        ({"cpu"}, ["missing", "ok"]),
        (set(), ["missing", "missing", "note"]),
    ],
)
def test_renderer(installed, monkeypatch, drawing, states):
    from torchrl_rpd.envs import _rendering

    installed["mani_skill"] = "3.0.1"
    monkeypatch.setattr(_rendering, "can_draw", lambda device: device in drawing)
    findings = list(doctor.renderer())
    assert [finding.state for finding in findings] == states
    for finding in findings:
        assert finding.state == "ok" or "isabled: " in finding.detail


def test_no_simulator_no_renderer(installed):
    (finding,) = doctor.renderer()
    assert finding.state == "note"
    assert "maniskill" in finding.detail


def test_every_extra_is_explained():
    try:
        names = metadata.metadata("torchrl_rpd").get_all("Provides-Extra")
    except metadata.PackageNotFoundError:
        names = tomllib.loads(CLONE.read_text())["project"]["optional-dependencies"]
    assert set(names) - {"all"} == set(doctor.EXTRAS)


def test_the_command():
    done = subprocess.run(
        [sys.executable, "-m", "torchrl_rpd.doctor"],
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.returncode == 0, done.stdout + done.stderr
    assert "Devices\n  [ok] CPU:" in done.stdout
    for name in ("torch", "tensordict", "torchrl"):
        assert f"[ok] {name}: {metadata.version(name)}\n" in done.stdout


if __name__ == "__main__":
    pytest.main([__file__])
