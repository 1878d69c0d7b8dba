# Copyright (c) the torchrl_rpd authors.
#
# This source code is licensed under the MIT license found in the
# LICENSE file in the root directory of this source tree.
"""What has to work once the wheel is installed, without any extra.

Run by ``.ci/check-wheel`` with the interpreter of an environment that holds the wheel and
what the wheel itself requires.
"""

from __future__ import annotations

import importlib
import pkgutil
import re
import subprocess
import sys
from importlib import metadata
from pathlib import Path

PACKAGE = "torchrl_rpd"
# Modules of the extras, where they are called otherwise than what is installed.
BROUGHT_ALONG = {"hydra", "omegaconf", "sapien"}


def optional_modules() -> set[str]:
    """The modules that the extras bring and that may be missing."""
    names = {
        re.split(r"[^\w.-]", line)[0]
        for line in metadata.requires(PACKAGE) or []
        if "extra ==" in line
    }
    return {name.replace("-", "_") for name in names} | BROUGHT_ALONG


def missing_modules(error: BaseException | None) -> set[str]:
    """What could not be found, in an error or in those that led to it."""
    names = set()
    while error is not None:
        if isinstance(error, ModuleNotFoundError):
            names.add((error.name or "").partition(".")[0])
        error = error.__cause__ or error.__context__
    return names


def import_everything() -> tuple[int, int]:
    """Imports every module; only a module of an extra may be missing, not a package.

    Returns:
        how many were imported, and how many need an extra.
    """
    package = importlib.import_module(PACKAGE)
    place = Path(str(package.__file__))
    assert place.is_relative_to(sys.prefix), f"{place} is not the installed wheel"
    optional = optional_modules()
    imported, optional_ones = 0, 0
    for info in pkgutil.walk_packages(package.__path__, f"{PACKAGE}."):
        try:
            importlib.import_module(info.name)
            imported += 1
        except ImportError as error:
            if info.ispkg or not missing_modules(error) & optional:
                raise
            optional_ones += 1
    return imported, optional_ones


def data_files() -> int:
    """Counts the files of the wheel that are no code, and misses the expected ones."""
    files = [str(file) for file in metadata.files(PACKAGE) or []]
    for wanted in (
        f"{PACKAGE}/py.typed",
        f"{PACKAGE}/teachers/pocket/pocket_vla.safetensors",
        "hydra_plugins/",  # the extra 'hydra' finds our nodes by it
    ):
        assert any(file.startswith(wanted) for file in files), f"{wanted} is missing"
    return sum(
        file.startswith(f"{PACKAGE}/") and not file.endswith((".py", ".pyc"))
        for file in files
    )


def shipped_teacher() -> None:
    """A teacher whose weights are part of the package gives actions."""
    import torch
    from tensordict import TensorDict

    from torchrl_rpd.teachers import PocketVLATeacher

    images = torch.zeros(2, 3, 128, 128, dtype=torch.uint8)
    labelled = PocketVLATeacher("PushCube-v1")(
        TensorDict({("observation", "image"): images}, [2])
    )
    assert labelled["vla_action", "chunk"].isfinite().all()


def one_update() -> float:
    """Transform, collector, value targets and loss of one RPD update.

    Returns:
        the largest change of a weight.
    """
    import torch
    from torchrl.collectors import Collector
    from torchrl.envs import TransformedEnv

    sys.path.append(str(Path(__file__).resolve().parents[1] / "tests"))
    toy_envs = importlib.import_module("toy_envs")

    from torchrl_rpd.objectives import DistillPPOLoss, FiniteHorizonGAE
    from torchrl_rpd.students import mlp_actor_critic
    from torchrl_rpd.transforms import TeacherActionTransform

    torch.manual_seed(0)
    teacher = TeacherActionTransform(
        lambda td: (-td["observation"]).clamp(-1, 1), in_keys=["observation"]
    )
    env = TransformedEnv(toy_envs.ReachEnv(8), teacher)
    student = mlp_actor_critic(2, 2, num_cells=(32,))
    loss = DistillPPOLoss(student.actor, student.critic, distill_coeff=1.0)
    gae = FiniteHorizonGAE(gamma=0.9, lmbda=0.9, value_network=student.value_network)
    weights = [weight.detach().clone() for weight in loss.parameters()]
    optimizer = torch.optim.Adam(loss.parameters(), lr=1e-3)
    (batch,) = Collector(
        env,
        student.actor,
        frames_per_batch=64,
        total_frames=64,
        auto_register_policy_transforms=False,
    )
    frames = gae(batch.copy()).reshape(-1)
    assert frames["teacher_mask"].all()
    out = loss(frames)
    sum(value for key, value in out.items() if key.startswith("loss_")).backward()
    optimizer.step()
    changes = [
        float((new.detach() - old).abs().max())
        for new, old in zip(loss.parameters(), weights, strict=True)
    ]
    assert all(change > 0 for change in changes), changes
    return max(changes)


def doctor() -> int:
    """Runs the doctor.

    Returns:
        the number of extras that it reports as missing.
    """
    done = subprocess.run(
        [sys.executable, "-m", f"{PACKAGE}.doctor"],
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.returncode == 0, done.stdout + done.stderr
    return done.stdout.count("[missing]")


def main() -> None:
    """Prints what was found in one line; any failure is a traceback."""
    imported, optional = import_everything()
    files = data_files()
    shipped_teacher()
    one_update()
    missing = doctor()
    versions = ", ".join(
        f"{name} {metadata.version(name)}"
        for name in ("torch", "torchrl", "tensordict")
    )
    print(
        f"smoke test: {versions}: {imported} modules imported, {optional} need an extra, "
        f"{files} data files, one update, doctor names {missing} extras to install"
    )


if __name__ == "__main__":
    main()
