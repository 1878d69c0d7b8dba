# Copyright (c) the torchrl_rpd authors.
#
# This source code is licensed under the MIT license found in the
# LICENSE file in the root directory of this source tree.
"""What is installed here, what is missing, and what that disables.

    python -m torchrl_rpd.doctor

Paste its output into a report of a problem. The exit code is 1 if a package that is always
needed is missing or of a version that is not supported, else 0.
"""

from __future__ import annotations

import importlib
import platform
import sys
from collections.abc import Iterator
from dataclasses import dataclass
from importlib import metadata

from packaging.requirements import Requirement

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
        return []


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
    if not requirements:
        yield Finding(
            "note",
            _PACKAGE,
            "is not installed, only imported from a folder: versions are not checked; "
            "pip install -e . there",
        )
    for requirement in requirements:
        if _applies(requirement, ""):
            yield _check(requirement)


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
            f"none that torch {torch.__version__} can use: big teachers need one",
        )
    for index in range(torch.cuda.device_count()):
        properties = torch.cuda.get_device_properties(index)
        memory = properties.total_memory / 2**30
        yield Finding("ok", f"cuda:{index}", f"{properties.name}, {memory:.0f} GiB")


def renderer() -> Iterator[Finding]:
    """Whether pictures can be drawn; asked in child processes."""
    if _version("mani_skill") is None:
        return
    from torchrl_rpd.envs._rendering import can_draw

    for device, name in (("cuda", "GPU"), ("cpu", "software")):
        if can_draw(device):
            yield Finding("ok", f"{name} Vulkan", "SAPIEN can draw")
        else:
            yield Finding("missing", f"{name} Vulkan", "SAPIEN cannot draw with it")
    if not (can_draw("cuda") or can_draw("cpu")):
        yield Finding(
            "note",
            "pictures",
            "disabled (states work): install Mesa 24.3 or newer, package "
            "mesa-vulkan-drivers, or the GPU driver with its Vulkan part",
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
                f"does not fit this torch and breaks transformers ({error}): "
                "pip uninstall torchvision, or install the one of this torch",
            )


def report() -> tuple[str, bool]:
    """The whole report, and whether what is always needed is there.

    Returns:
        the text, and False if a required package is missing or of a wrong version.

    Examples:
        >>> from torchrl_rpd.doctor import report
        >>> text, healthy = report()
        >>> text.splitlines()[0].startswith("torchrl_rpd ")
        True
    """
    needed = list(required())
    sections = {
        "Always needed": needed,
        "Extras": list(extras()),
        "Devices": list(devices()),
        "Renderer": list(renderer()),
        "Known to go wrong": list(traps()),
    }
    lines = [
        f"{_PACKAGE} {_version(_PACKAGE) or '(not installed)'}, "
        f"Python {platform.python_version()}, {platform.platform()}"
    ]
    for title, findings in sections.items():
        if findings:
            lines += ["", title, *(f"  {finding}" for finding in findings)]
    broken = [*needed, *sections["Known to go wrong"]]
    return "\n".join(lines), not any(f.state in ("missing", "wrong") for f in broken)


def main() -> None:
    """Prints the report."""
    text, healthy = report()
    sys.stdout.write(text + "\n")
    sys.exit(0 if healthy else 1)


if __name__ == "__main__":
    main()
