# Copyright (c) the torchrl_rpd authors.
#
# This source code is licensed under the MIT license found in the
# LICENSE file in the root directory of this source tree.
"""Where a checkpoint lies: a local folder, or a snapshot of the Hugging Face Hub."""

from __future__ import annotations

import importlib
import os
from collections.abc import Sequence
from pathlib import Path
from types import ModuleType


def require(module: str, *, extra: str = "openvla") -> ModuleType:
    """Imports an optional package where it is used.

    Args:
        module (str): name to import, e.g. ``"transformers"``.

    Keyword Args:
        extra (str): the extra of this package that brings it. Defaults to
            ``"openvla"``.

    Raises:
        ImportError: naming the extra to install.

    Examples:
        >>> require("json").__name__
        'json'
    """
    try:
        return importlib.import_module(module)
    except ModuleNotFoundError as error:
        # A package that is there but lacks something of its own says so itself.
        if error.name is None or error.name.split(".")[0] != module.split(".")[0]:
            raise
        package = module.split(".")[0]
        raise ImportError(
            f"This teacher needs {package}: pip install 'torchrl_rpd[{extra}]'"
        ) from error


def resolve_checkpoint(
    path_or_repo: str | os.PathLike[str],
    *,
    revision: str | None = None,
    allow_patterns: str | Sequence[str] | None = None,
    cache_dir: str | os.PathLike[str] | None = None,
    local_files_only: bool | None = None,
    extra: str = "openvla",
) -> Path:
    """Finds the folder of a checkpoint, downloading it where needed.

    Args:
        path_or_repo (str or path): a local folder, used as it is; otherwise a Hub id
            ``"owner/name"``, read from the cache or downloaded by huggingface_hub
            (which is imported only then, and follows ``HF_HOME``, ``HF_HUB_OFFLINE``
            and ``HF_TOKEN``).

    Keyword Args:
        revision (str, optional): branch, tag or commit of the Hub repository. Pin a
            commit: a teacher that changes under the same name changes the results.
            Defaults to the repository's main branch.
        allow_patterns (str or sequence of str, optional): only files that match.
            Defaults to all files.
        cache_dir (path, optional): instead of the Hub's usual cache.
        local_files_only (bool, optional): never ask the network. Defaults to ``None``:
            as the environment says.
        extra (str): the extra of this package that brings huggingface_hub. Defaults to
            ``"openvla"``.

    Returns:
        the folder.

    Raises:
        FileNotFoundError: if it is no folder, not cached, and the Hub cannot be reached
            or does not know it.
        ImportError: if the Hub is needed and huggingface_hub is not installed.
        ValueError: for a ``revision`` of a local folder, which has none.

    Examples:
        >>> import tempfile
        >>> folder = tempfile.mkdtemp()
        >>> str(resolve_checkpoint(folder)) == folder
        True
    """
    text = os.fspath(path_or_repo)
    path = Path(text).expanduser()
    if path.is_dir():
        if revision is not None:
            raise ValueError(
                f"{text} is a local folder and has no revision {revision!r}; revision= "
                "pins a repository of the Hub."
            )
        return path
    if path.exists():
        raise FileNotFoundError(f"{text} is a file; expected a checkpoint's folder.")
    if path.is_absolute() or text.startswith((".", "~")) or text.count("/") != 1:
        raise FileNotFoundError(
            f"There is no folder {text}, and a Hub id would read 'owner/name'."
        )
    hub = require("huggingface_hub", extra=extra)
    try:
        folder = hub.snapshot_download(
            text,
            revision=revision,
            allow_patterns=(
                allow_patterns
                if allow_patterns is None or isinstance(allow_patterns, str)
                else list(allow_patterns)
            ),
            cache_dir=cache_dir,
            local_files_only=bool(local_files_only),
        )
    except OSError as error:  # which all errors of the Hub are
        at = "" if revision is None else f" at revision {revision!r}"
        raise FileNotFoundError(
            f"{text}{at} is no local folder, and the Hub did not give it "
            f"({type(error).__name__}: {_first_line(error)}). Check the name and the "
            "revision; log in where it is private or gated (hf auth login); without a "
            f"network, run `hf download {text}` elsewhere and give the folder, or point "
            "HF_HOME (or cache_dir=) to a cache that holds it."
        ) from error
    return Path(folder)


def _first_line(error: BaseException) -> str:
    lines = str(error).strip().splitlines()
    return lines[0].rstrip(".") if lines else "no reason given"
