# Copyright (c) the torchrl_rpd authors.
#
# This source code is licensed under the MIT license found in the
# LICENSE file in the root directory of this source tree.
"""How results are kept."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any


def write_json(file: Path, results: dict[str, Any]) -> None:
    """Writes beside the old file and moves it in place; missing folders are made."""
    file.parent.mkdir(parents=True, exist_ok=True)
    partial = file.with_suffix(".part")
    partial.write_text(json.dumps(results, indent=1) + "\n")
    partial.replace(file)
