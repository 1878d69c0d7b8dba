# Copyright (c) the torchrl_rpd authors.
#
# This source code is licensed under the MIT license found in the
# LICENSE file in the root directory of this source tree.
r"""Serves a teacher to clients elsewhere, until SIGTERM or Ctrl-C.

    python -m torchrl_rpd.teachers.serve scripted --task PickCube-v1 --option jitter=0.1
    python -m torchrl_rpd.teachers.serve openvla --path openvla/openvla-7b \
        --unnorm-key bridge_orig --device cuda
    python -m torchrl_rpd.teachers.serve octo --path rail-berkeley/octo-base-1.5 \
        --unnorm-key bridge_dataset --option num_samples=10
    python -m torchrl_rpd.teachers.serve my_package.teachers:make --option width=64

Prints one line when clients can connect. The token that clients must send is read from
``--token-file`` or the environment variable ``TORCHRL_RPD_TOKEN``, never from the
command line, which every user of a machine can read.
"""

from __future__ import annotations

import argparse
import ast
import asyncio
import functools
import importlib
import os
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any, NoReturn

import torch

__all__ = ["main"]

_PROG = "python -m torchrl_rpd.teachers.serve"
_TOKEN = "TORCHRL_RPD_TOKEN"
_DTYPES = ("float32", "bfloat16", "float16")
# What is handed to the maker of a teacher, where it was given.
_MAKING = ("path", "task", "instruction", "unnorm_key", "device", "dtype")
_FOR_SCRIPTED = ("task",)
_FOR_CHECKPOINTS = ("path", "instruction", "unnorm_key", "device", "dtype")


def main(arguments: Sequence[str] | None = None) -> int:
    """The command line.

    Args:
        arguments (sequence of str, optional): Defaults to those of the process.

    Returns:
        0 if every request that was accepted was answered, 1 if the teacher was still at
        work when the time to stop was over.

    Raises:
        SystemExit: with code 2 and one sentence, for what cannot be served.

    Examples:
        >>> from torchrl_rpd.teachers.serve import main
        >>> main(["--help"])
        Traceback (most recent call last):
            ...
        SystemExit: 0
    """
    args = _parser().parse_args(arguments)
    try:
        server = _server(args)
    except Exception as error:  # of a checkpoint, a device, somebody's factory
        _give_up(error)
    ready = functools.partial(_announce, server)
    try:
        answered = asyncio.run(server.serve_forever(ready=ready, timeout=args.grace))
    except OSError as error:  # the port is taken
        _give_up(error)
    return 0 if answered else 1


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        prog=_PROG,
        description=__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    add = parser.add_argument
    add("teacher", help="scripted, openvla, octo, or module:factory")
    teacher = parser.add_argument_group("the teacher").add_argument
    teacher("--path", help="a checkpoint: a folder or a Hub id")
    teacher("--task", help="scripted: which task, e.g. PickCube-v1")
    teacher("--instruction", help="the same for every row; by default each row's own")
    teacher("--unnorm-key", help="whose statistics un-normalise the actions")
    teacher("--device", help="e.g. cuda")
    teacher("--dtype", choices=_DTYPES, help="of the weights")
    teacher(
        "--option",
        action="append",
        default=[],
        metavar="NAME=VALUE",
        help="another keyword argument of the teacher (or factory); may be repeated",
    )
    server = parser.add_argument_group("the server").add_argument
    server("--host", default="127.0.0.1", help="by default this machine only")
    server("--port", type=int, default=8000, help="0 chooses a free one; 8000")
    server("--max-batch", type=int, default=32, help="rows in one call; 32")
    server(
        "--max-wait", type=float, default=0.005, help="seconds for others to ask; 0.005"
    )
    server("--max-megabytes", type=int, default=256, help="of a message; 256")
    server("--token-file", type=Path, help=f"by default ${_TOKEN}, else no token")
    server("--grace", type=float, default=30.0, help="seconds to stop within; 30")
    return parser


def _server(args: argparse.Namespace) -> Any:
    from torchrl_rpd.teachers.remote.server import TeacherServer

    token = _token(args.token_file)
    teacher = _teacher(args)
    return TeacherServer(
        teacher,
        host=args.host,
        port=args.port,
        max_batch=args.max_batch,
        max_wait=args.max_wait,
        max_message_bytes=args.max_megabytes * 2**20,
        token=token,
        model=_model(args),
    )


def _announce(server: Any) -> None:
    sys.stdout.write(f"serving {server.info.model} on {server.address}\n")
    sys.stdout.flush()


def _teacher(args: argparse.Namespace) -> Any:
    given = {name: value for name in _MAKING if (value := getattr(args, name))}
    if "dtype" in given:
        given["dtype"] = getattr(torch, given["dtype"])
    options = dict(map(_option, args.option))
    if ":" in args.teacher:
        return _made(args.teacher, {**given, **options})
    if args.teacher not in ("scripted", "openvla", "octo"):
        raise ValueError(
            f"There is no teacher {args.teacher!r}; there are scripted, openvla, octo "
            "and module:factory."
        )
    needed = "task" if args.teacher == "scripted" else "path"
    if needed not in given:
        raise ValueError(f"The teacher {args.teacher} needs --{needed}.")
    takes = _FOR_SCRIPTED if args.teacher == "scripted" else _FOR_CHECKPOINTS
    for name in given:
        if name not in takes:
            flag = name.replace("_", "-")
            raise ValueError(f"The teacher {args.teacher} takes no --{flag}.")
    if args.teacher == "scripted":
        from torchrl_rpd.teachers.scripted import ScriptedTeacher

        return ScriptedTeacher(given["task"], **options)
    path = given.pop("path")
    if args.teacher == "openvla":
        from torchrl_rpd.teachers.openvla import OpenVLATeacher

        return OpenVLATeacher.from_pretrained(path, **given, **options)
    from torchrl_rpd.teachers.octo import OctoTeacher

    return OctoTeacher.from_pretrained(path, **given, **options)


def _made(name: str, options: dict[str, Any]) -> Any:
    """What the callable at ``module:factory`` returns."""
    module_name, _, factory_name = name.partition(":")
    try:
        factory: Any = importlib.import_module(module_name)
        for part in factory_name.split("."):
            factory = getattr(factory, part)
    except (AttributeError, ImportError, ValueError) as error:
        raise ValueError(
            f"{name} cannot be imported: {_sentence(error)} (the current folder is "
            "searched as well)"
        ) from error
    try:
        return factory(**options)
    except Exception as error:  # of somebody else's making
        raise ValueError(
            f"{name} raised {type(error).__name__}: {_sentence(error)}"
        ) from error


def _model(args: argparse.Namespace) -> str | None:
    """What clients are told: None for a teacher that names itself."""
    if args.teacher == "scripted":
        return None
    details = []
    if args.path:
        folder = Path(args.path).expanduser()
        local = folder.exists() or folder.is_absolute()
        # Where a folder lies is nobody else's business.
        details.append(folder.resolve().name if local else args.path)
    if args.unnorm_key:
        details.append(args.unnorm_key)
    return f"{args.teacher}({', '.join(details)})" if details else args.teacher


def _option(text: str) -> tuple[str, Any]:
    name, equals, value = text.partition("=")
    if not equals or not name.isidentifier():
        raise ValueError(f"--option {text}: expected NAME=VALUE.")
    try:
        return name, ast.literal_eval(value)
    except (SyntaxError, ValueError):
        return name, value


def _token(file: Path | None) -> str | None:
    if file is None:
        return os.environ.get(_TOKEN) or None
    try:
        token = file.expanduser().read_text().strip()
    except OSError as error:
        raise ValueError(f"--token-file {file}: {error.strerror}.") from error
    if not token:
        raise ValueError(f"--token-file {file} is empty.")
    return token


def _sentence(error: BaseException) -> str:
    reason = error.args[0] if isinstance(error, KeyError) and error.args else error
    return " ".join(str(reason).split()) or type(error).__name__


def _give_up(error: BaseException) -> NoReturn:
    sys.stderr.write(f"{_PROG}: error: {_sentence(error)}\n")
    raise SystemExit(2)


if __name__ == "__main__":
    sys.exit(main())
