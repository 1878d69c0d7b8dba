# Copyright (c) the torchrl_rpd authors.
#
# This source code is licensed under the MIT license found in the
# LICENSE file in the root directory of this source tree.
"""What the package offers, and a warning for each name that the reference lacks."""

from __future__ import annotations

import importlib
import pkgutil
import re
from collections.abc import Iterable
from pathlib import Path
from types import ModuleType
from typing import TYPE_CHECKING, Any

import torchrl_rpd

if TYPE_CHECKING:  # tests use this module without Sphinx
    from sphinx.application import Sphinx
    from sphinx.environment import BuildEnvironment

REFERENCE = Path(__file__).parents[1] / "reference"

# Modules deeper than a sub-package whose names are public, but not imported by it: they
# need an extra.
DEEPER = ("torchrl_rpd.teachers.inference", "torchrl_rpd.teachers.ray_actor")


def public_modules() -> list[ModuleType]:
    """The package, its sub-packages at every depth, its top-level modules."""
    found = [torchrl_rpd]
    for info in pkgutil.walk_packages(torchrl_rpd.__path__, "torchrl_rpd."):
        parts = info.name.split(".")
        if any(part.startswith("_") for part in parts):
            continue
        if info.ispkg or len(parts) == 2 or info.name in DEEPER:
            found.append(importlib.import_module(info.name))
    return found


def public_names() -> dict[str, object]:
    """Full name to object: `__all__`, or what a module without it defines."""
    names: dict[str, object] = {}
    for module in public_modules():
        offered = getattr(module, "__all__", None)
        if offered is None:
            offered = [
                name
                for name, value in vars(module).items()
                if not name.startswith("_")
                and getattr(value, "__module__", None) == module.__name__
            ]
        for name in offered:
            if not name.startswith("__"):
                names[f"{module.__name__}.{name}"] = getattr(module, name)
    return names


def listed_names(*, data: bool = True) -> set[str]:
    """What the pages of docs/reference list, by full name; constants too, or not."""
    found = set()
    for page in REFERENCE.glob("*.rst"):
        module, inside = "", False
        for line in page.read_text().splitlines():
            if match := re.match(r"\.\. currentmodule:: (\S+)", line):
                module = match[1]
            elif data and (match := re.match(r"\.\. py:data:: (\S+)", line)):
                found.add(f"{module}.{match[1]}")
            if line.startswith(".. "):
                inside = line.startswith(".. autosummary::")
            elif inside and (match := re.match(r"   (\w+)$", line)):
                found.add(f"{module}.{match[1]}")
    return found


def resolve(path: str) -> object | None:
    """The object of a dotted name, or None."""
    module, _, name = path.rpartition(".")
    try:
        return getattr(importlib.import_module(module), name, None)
    except ImportError:
        return None


def missing_names(documented: Iterable[str]) -> list[str]:
    """Public names of which no name in `documented` is the same object."""
    there = {id(value) for path in documented if (value := resolve(path)) is not None}
    return sorted(
        name for name, value in public_names().items() if id(value) not in there
    )


def _check(app: Sphinx, env: BuildEnvironment) -> None:
    from sphinx.util import logging

    logger = logging.getLogger(__name__)
    documented = [
        name
        for name in env.domaindata["py"]["objects"]
        if name.startswith("torchrl_rpd.")
    ]
    for name in missing_names(documented):
        logger.warning("public, but not in docs/reference: %s", name)


def _remove_stale_stubs(app: Sphinx) -> None:
    """Autosummary writes a page for each listed name, and leaves old ones."""
    listed = listed_names(data=False)  # constants stand in the pages themselves
    for stub in (REFERENCE / "generated").glob("*.rst"):
        if stub.stem not in listed:
            stub.unlink()


def _signature(
    app: Sphinx,
    what: str,
    name: str,
    obj: object,
    options: object,
    signature: str | None,
    annotation: str | None,
) -> tuple[str | None, str | None] | None:
    """Metaclasses of TorchRL hide what a constructor takes: ask the constructor."""
    if what != "class" or not (signature or "").startswith("(*args, "):
        return None
    from sphinx.util.inspect import signature as signature_of
    from sphinx.util.inspect import stringify_signature

    try:
        own = signature_of(obj.__init__, bound_method=True)  # type: ignore[misc]
    except (TypeError, ValueError):
        return None
    return stringify_signature(own, show_annotation=False), annotation


def setup(app: Sphinx) -> dict[str, Any]:
    """Before autosummary writes its stubs; and checks at the end of reading."""
    app.connect("builder-inited", _remove_stale_stubs, priority=100)
    app.connect("autodoc-process-signature", _signature)
    app.connect("env-check-consistency", _check)
    return {"parallel_read_safe": True, "parallel_write_safe": True}
