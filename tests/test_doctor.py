# Copyright (c) the torchrl_rpd authors.
#
# This source code is licensed under the MIT license found in the
# LICENSE file in the root directory of this source tree.
"""The report on an installation, with made-up installations."""

from __future__ import annotations

import subprocess
import sys
from importlib import metadata

import pytest

from torchrl_rpd import doctor

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


def test_from_a_folder(monkeypatch):
    def nothing(name):
        raise metadata.PackageNotFoundError(name)

    monkeypatch.setattr(doctor.metadata, "version", nothing)
    monkeypatch.setattr(doctor.metadata, "requires", nothing)
    text, healthy = doctor.report()
    assert healthy
    assert "only imported from a folder" in text


def test_every_extra_is_explained():
    try:
        names = metadata.metadata("torchrl_rpd").get_all("Provides-Extra")
    except metadata.PackageNotFoundError:
        pytest.skip("needs an installed package: pip install -e .")
    assert set(names) - {"all"} <= set(doctor.EXTRAS)


def test_the_command():
    done = subprocess.run(
        [sys.executable, "-m", "torchrl_rpd.doctor"],
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.returncode == 0, done.stdout + done.stderr
    assert "Devices\n  [ok] CPU:" in done.stdout


if __name__ == "__main__":
    pytest.main([__file__])
