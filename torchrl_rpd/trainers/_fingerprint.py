# Copyright (c) the torchrl_rpd authors.
#
# This source code is licensed under the MIT license found in the
# LICENSE file in the root directory of this source tree.
"""The configuration of a run, in a form that is stored and compared."""

from __future__ import annotations

import json
from collections.abc import Iterator, Mapping
from pathlib import PurePath
from typing import Any

_ABSENT = "(absent)"


def fingerprint(config: Mapping[str, Any]) -> dict[str, Any]:
    """A configuration as it will be read back from JSON.

    Raises:
        TypeError: for values that JSON does not know.

    Examples:
        >>> fingerprint({"hidden": (64, 64), "out": PurePath("runs")})
        {'hidden': [64, 64], 'out': 'runs'}
    """
    try:
        out: dict[str, Any] = json.loads(json.dumps(dict(config), default=_encode))
    except (TypeError, ValueError) as error:
        raise TypeError(
            "The configuration of a run is stored as JSON: give numbers, strings, lists "
            f"and dictionaries of them ({error})."
        ) from error
    return out


def differences(old: Mapping[str, Any], new: Mapping[str, Any]) -> list[str]:
    """What differs, one line per field: ``"name: old -> new"``.

    Examples:
        >>> differences({"lr": 0.1, "net": {"width": 64}}, {"net": {"width": 32}})
        ['lr: 0.1 -> (absent)', 'net.width: 64 -> 32']
    """
    before, after = dict(_fields(old)), dict(_fields(new))
    return [
        f"{name}: {_show(before, name)} -> {_show(after, name)}"
        for name in dict.fromkeys([*before, *after])
        if name not in before or name not in after or before[name] != after[name]
    ]


def _fields(config: Mapping[str, Any], prefix: str = "") -> Iterator[tuple[str, Any]]:
    for name, value in config.items():
        if isinstance(value, Mapping) and value:
            yield from _fields(value, f"{prefix}{name}.")
        else:
            yield f"{prefix}{name}", value


def _show(fields: Mapping[str, Any], name: str) -> str:
    return repr(fields[name]) if name in fields else _ABSENT


def _encode(value: object) -> str:
    if isinstance(value, PurePath):
        return str(value)
    raise TypeError(f"got {type(value).__name__}")
