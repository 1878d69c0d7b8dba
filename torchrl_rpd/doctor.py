# Copyright (c) the torchrl_rpd authors.
#
# This source code is licensed under the MIT license found in the
# LICENSE file in the root directory of this source tree.
"""What is installed here, what is missing, and what that disables.

    python -m torchrl_rpd.doctor

Paste its output into a report of a problem. The exit code is 1 if a package that is always
needed is missing, of a version that is not supported or cannot be imported, or if
something is installed that is known to break the rest; else 0.
"""

from __future__ import annotations

import importlib
import platform
import sys
import tomllib
from collections.abc import Iterator
from dataclasses import dataclass
from importlib import metadata
from pathlib import Path

from packaging.requirements import Requirement

from torchrl_rpd import __version__

__all__ = ["EXTRAS", "Finding", "report"]

_PACKAGE = "torchrl_rpd"
#: What each optional extra is for, in the order in which they are shown.
EXTRAS = {
    "maniskill": "ManiSkillEnv, ScriptedTeacher's tasks, the examples",
    "openvla": "OpenVLATeacher",
    "octo": "OctoTeacher",
    "hydra": "torchrl_rpd.configs, examples/rpd.py",
    "remote": "RemoteTeacher, TeacherServer",
    "ray": "RayTeacher, examples/rpd_ray.py",
    "finetune": "LoRA in examples/finetune_vla.py",
    "rlds": "reading RLDS back with its own library",
    "wandb": "WandbLogger",
    "tensorboard": "TensorboardLogger",
    "plot": "pictures of examples/demo.py and examples/report.py",
    "docs": "make docs",
    "dev": "tests and checks",
}


@dataclass(frozen=True)
class Finding:
    """One line of the report.

    Args:
        state (str): ``"ok"``, ``"missing"``, ``"wrong"`` (version) or ``"note"``.
        what (str): the package, extra or device.
        detail (str): its version, or what is disabled and what to do.

    Examples:
        >>> from torchrl_rpd.doctor import Finding
        >>> print(Finding("missing", "ray", "pip install 'torchrl_rpd[ray]'"))
        [missing] ray: pip install 'torchrl_rpd[ray]'
    """

    state: str
    what: str
    detail: str

    def __str__(self) -> str:
        return f"[{self.state}] {self.what}: {self.detail}"


def _version(name: str) -> str | None:
    try:
        return metadata.version(name)
    except metadata.PackageNotFoundError:
        return None


def _requirements() -> list[Requirement]:
    try:
        return [Requirement(text) for text in metadata.requires(_PACKAGE) or []]
    except metadata.PackageNotFoundError:
        return _clone_requirements(Path(__file__).parents[1] / "pyproject.toml")


def _clone_requirements(file: Path) -> list[Requirement]:
    """The requirements of a clone that is imported without being installed."""
    if not file.is_file():
        return []
    project = tomllib.loads(file.read_text()).get("project", {})
    if project.get("name") != _PACKAGE:  # somebody else's, above a copied folder
        return []
    texts = list(project["dependencies"])
    for extra, wanted in project["optional-dependencies"].items():
        texts += [f"{text}; extra == '{extra}'" for text in wanted]
    return [Requirement(text) for text in texts]


def _check(requirement: Requirement) -> Finding:
    found = _version(requirement.name)
    if found is None:
        return Finding("missing", requirement.name, f"wanted {requirement}")
    # Local parts such as 2.13.0+cpu, and release candidates, count as the version.
    if not requirement.specifier.contains(found, prereleases=True):
        return Finding("wrong", f"{requirement.name} {found}", f"wanted {requirement}")
    return Finding("ok", requirement.name, found)


def _applies(requirement: Requirement, extra: str) -> bool:
    return requirement.marker is None or requirement.marker.evaluate({"extra": extra})


def required() -> Iterator[Finding]:
    """The packages that are always needed."""
    requirements = _requirements()
    if _version(_PACKAGE) is None:
        yield Finding(
            "note",
            _PACKAGE,
            "is not installed, only imported from a folder: pip install -e . there",
        )
    for requirement in requirements:
        if _applies(requirement, ""):
            yield _check(requirement)


def importable() -> Iterator[Finding]:
    """What is installed, always needed, and broken: of another torch, or half removed."""
    for name in ("torch", "tensordict", "torchrl"):
        if _version(name) is None:
            continue
        try:
            importlib.import_module(name)
        except Exception as error:  # whatever a broken binary raises
            reason = f"{type(error).__name__}: {error}".splitlines()[0]
            yield Finding(
                "wrong",
                name,
                f"cannot be imported ({reason}). Disabled: everything. Install torch, "
                "then this package, in a new environment",
            )


def extras() -> Iterator[Finding]:
    """The optional parts: complete, or what is missing and what that disables."""
    requirements = [r for r in _requirements() if not _applies(r, "")]
    for extra, use in EXTRAS.items():
        wanted = [r for r in requirements if _applies(r, extra)]
        if not wanted:
            continue
        findings = [_check(r) for r in wanted]
        bad = [f for f in findings if f.state != "ok"]
        if not bad:
            versions = ", ".join(f"{f.what} {f.detail}" for f in findings)
            yield Finding("ok", extra, versions)
            continue
        state = "wrong" if any(f.state == "wrong" for f in bad) else "missing"
        names = ", ".join(f"{f.what} ({f.detail})" for f in bad)
        yield Finding(
            state,
            extra,
            f"{names}. Disabled: {use}. pip install '{_PACKAGE}[{extra}]'",
        )


def devices() -> Iterator[Finding]:
    """Where tensors can live, and how many cores this process may use."""
    import torch

    from torchrl_rpd._threads import available_cpus

    yield Finding(
        "ok",
        "CPU",
        f"{available_cpus()} cores, {torch.get_num_threads()} torch threads",
    )
    if not torch.cuda.is_available():
        yield Finding(
            "note",
            "CUDA",
            f"none that torch {torch.__version__} can use. Disabled: simulation on a GPU; "
            "the published OpenVLA and Octo are too slow to label with",
        )
    for index in range(torch.cuda.device_count()):
        properties = torch.cuda.get_device_properties(index)
        memory = properties.total_memory / 2**30
        yield Finding("ok", f"cuda:{index}", f"{properties.name}, {memory:.0f} GiB")


def renderer() -> Iterator[Finding]:
    """Whether pictures can be drawn; asked in child processes."""
    if _version("mani_skill") is None:
        yield Finding(
            "note", "pictures", "not asked: SAPIEN comes with the extra maniskill"
        )
        return
    from torchrl_rpd.envs._rendering import can_draw

    kinds = {
        "cuda": ("GPU Vulkan", "drawing on a GPU"),
        "cpu": ("software Vulkan", "drawing without a GPU"),
    }
    for device, (name, use) in kinds.items():
        if can_draw(device):
            yield Finding("ok", name, "SAPIEN can draw")
        else:
            yield Finding("missing", name, f"Disabled: {use}")
    if not any(map(can_draw, kinds)):
        yield Finding(
            "note",
            "pictures",
            "disabled: cameras, teachers and students that see (states work). Install "
            "Mesa 24.3 or newer, package mesa-vulkan-drivers, or the GPU driver with its "
            "Vulkan part",
        )


def traps() -> Iterator[Finding]:
    """What is known to go wrong with what is installed."""
    if _version("torchvision") is not None:
        try:
            importlib.import_module("torchvision")
        except Exception as error:  # whatever a broken binary raises
            yield Finding(
                "wrong",
                "torchvision",
                f"does not fit this torch ({error}). Disabled: OpenVLATeacher and what "
                "else needs transformers. pip uninstall torchvision, or install the one "
                "of this torch",
            )


def report() -> tuple[str, bool]:
    """The whole report, and whether what is always needed is there.

    Returns:
        the text, and False if a required package is missing, of a wrong version or
        broken.

    Examples:
        >>> from torchrl_rpd.doctor import report
        >>> text, healthy = report()
        >>> text.splitlines()[0].startswith("torchrl_rpd ")
        True
    """
    broken = list(importable())
    needed = [*required(), *broken]
    usable = not broken and _version("torch") is not None
    sections = {
        "Always needed": needed,
        "Extras": list(extras()),
        "Devices": list(devices()) if usable else [],
        "Renderer": list(renderer()) if usable else [],
        "Known to go wrong": list(traps()) if usable else [],
    }
    lines = [
        f"{_PACKAGE} {_version(_PACKAGE) or f'{__version__} (not installed)'}, "
        f"Python {platform.python_version()}, {platform.platform()}"
    ]
    for title, findings in sections.items():
        if findings:
            lines += ["", title, *(f"  {finding}" for finding in findings)]
    decisive = [*needed, *sections["Known to go wrong"]]
    return "\n".join(lines), not any(f.state in ("missing", "wrong") for f in decisive)


def main() -> None:
    """Prints the report."""
    text, healthy = report()
    sys.stdout.write(text + "\n")
    sys.exit(0 if healthy else 1)


if __name__ == "__main__":
    main()
