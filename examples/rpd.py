# Copyright (c) the torchrl_rpd authors.
#
# This source code is licensed under the MIT license found in the
# LICENSE file in the root directory of this source tree.
"""The paper's study as recipes: any task, reward, teacher, student and control.

What is trained stands in ``examples/conf``, a commented tree of Hydra files; the script
builds it, checks the teacher, evaluates it, trains TorchRL's ``PPOTrainer`` and evaluates
the student on episodes that nobody has seen. Everything goes to ``runs/<name>``.

    python examples/rpd.py task=pick_cube reward=dense teacher=scripted student=mlp seed=0
    python examples/rpd.py reward=sparse flaw=goal algo=ppo      # or algo=imitation
    python examples/rpd.py preset=paper teacher=octo --cfg job   # show it, run nothing
    python examples/rpd.py -m seed=0,1,2,3,4 algo=rpd,ppo,imitation

What goes wrong is told in a sentence (docs/faults.md); the exit code is then 1, or 130 and
143 for a run that SIGINT and SIGTERM have stopped: the same command goes on with it.
"""

from __future__ import annotations

import contextlib
import json
import os
import random
import re
import signal
import sys
import time
import traceback
from collections.abc import Iterator
from dataclasses import asdict
from importlib.metadata import version
from pathlib import Path
from typing import Any

try:
    import hydra
except ImportError:
    sys.exit("rpd.py needs Hydra: pip install 'torchrl_rpd[hydra]'")
import numpy as np
import torch
from hydra.errors import InstantiationException
from hydra.utils import instantiate
from omegaconf import DictConfig, OmegaConf
from torchrl._utils import logger as torchrl_logger
from torchrl.record.loggers.common import Logger
from torchrl.record.loggers.wandb import WandbLogger
from torchrl.trainers import Trainer

from torchrl_rpd import set_learner_threads
from torchrl_rpd.envs import TASKS
from torchrl_rpd.evaluation import EvaluationResult, evaluate
from torchrl_rpd.teachers import ScriptedTeacher, check_teacher
from torchrl_rpd.trainers import CheckpointHook, NumericalGuard

# Fresh for everybody: neither the training's nor the learning curve's episodes.
FINAL_SEEDS = 2_000_000


def nonsense(cfg: DictConfig) -> str | None:
    """One sentence on why this cannot be run, before anything is built; or None."""
    task = cfg.env.task_id
    scripted = cfg.labels.startswith("scripted")
    modes = TASKS[task].reward_modes if task in TASKS else [cfg.env.reward_mode]
    if cfg.env.reward_mode not in modes:
        return f"{task} has no reward {cfg.env.reward_mode!r}, only {', '.join(modes)}."
    if scripted and cfg.algo != "ppo" and task not in ScriptedTeacher.TASKS:
        return (
            f"There is no scripted teacher for {task}: choose teacher=openvla or "
            "teacher=octo, algo=ppo, or one of the tasks that have one: "
            f"{', '.join(ScriptedTeacher.TASKS)}."
        )
    batch = cfg.env.num_envs * cfg.env.num_workers * cfg.trainer.steps_per_batch
    if cfg.frames < batch:
        return (
            f"frames={cfg.frames} is less than one batch: {batch} frames of "
            f"{cfg.env.num_workers} x {cfg.env.num_envs} environments."
        )
    schedule = cfg.schedule
    silent = schedule.init == 0 and (schedule.kind == "constant" or schedule.end == 0)
    if cfg.algo == "ppo" and not silent:
        return "algo=ppo has no teacher to ask: leave schedule and its init alone."
    if cfg.algo != "ppo" and silent:
        return (
            f"algo={cfg.algo} with a coefficient of 0 is algo=ppo: say so, or set "
            "schedule.init above 0."
        )
    if cfg.algo == "imitation" and not cfg.teacher_action.query_fraction:
        return "algo=imitation learns from labels alone, and query_fraction=0 has none."
    if cfg.loss.distill_type == "kl" and cfg.algo != "ppo":
        if scripted:
            return "distill_type=kl needs a teacher with a spread: openvla or octo."
        if cfg.teacher_action.teacher_std_key is None:
            return (
                "distill_type=kl needs the teacher's spread in the rollout: set "
                "teacher_action.teacher_std_key=teacher_std, and with teacher=openvla "
                "teacher.spread=true teacher.readout=mean teacher.min_std=0.02, with "
                "teacher=octo teacher.num_samples=10."
            )
    return None


def identity(cfg: DictConfig) -> dict[str, Any]:
    """What the course of the training depends on: a checkpoint of another is refused."""
    whole = OmegaConf.to_container(cfg, resolve=True)
    elsewhere = ("name", "runs", "episodes", "check_teacher", "checkpoint", "logger")
    for name in elsewhere:
        whole.pop(name, None)
    whole["trainer"].pop("logger")
    return whole


def mean(values: list[float]) -> float | None:
    """Average of the logged values."""
    return sum(values) / len(values) if values else None


def numbers(result: EvaluationResult | None) -> dict[str, Any] | None:
    """An evaluation as JSON."""
    if result is None:
        return None
    names = ("success_once", "success_at_end", "episode_return", "length")
    return {name: asdict(getattr(result, name)) for name in names}


def wire_log(trainer: Trainer, cfg: DictConfig) -> None:
    """The progress bar counts frames; the configuration for wandb."""

    def name_unit() -> None:
        if trainer.progress_bar:
            trainer._pbar.unit = " frames"

    trainer.register_op("setup", name_unit)
    if isinstance(trainer.logger, WandbLogger):
        trainer.logger.log_hparams(OmegaConf.to_container(cfg, resolve=True))


def cause_of(error: BaseException) -> BaseException:
    """What went wrong, without Hydra's wrapping."""
    while isinstance(error, InstantiationException) and error.__cause__ is not None:
        error = error.__cause__
    return error


def make_logger(cfg: DictConfig) -> Logger | None:
    """The logger; where wandb cannot be reached, its files are written here."""
    try:
        return instantiate(cfg.logger)
    except InstantiationException as error:
        if type(cause_of(error)).__module__.partition(".")[0] != "wandb":
            raise
        torchrl_logger.warning(
            f"wandb cannot be reached, the run goes on offline: {cause_of(error)}\n"
            f"Send it later: wandb sync {cfg.runs}/wandb/offline-run-*"
        )
        kwargs = {"mode": "offline"}  # WANDB_MODE is not read a second time
        return instantiate(cfg.logger, offline=True, wandb_kwargs=kwargs)


def sentence_on(error: Exception, out: Path) -> str:
    """What went wrong; where it did is written to a file."""
    # Not if that is because the disk is full.
    with contextlib.suppress(OSError):
        (out / "traceback.txt").write_text("".join(traceback.format_exception(error)))
    notes = getattr(error, "__notes__", [])
    error = cause_of(error)
    said = str(error.args[0] if isinstance(error, KeyError) else error).strip()
    if "Traceback (most recent call last)" in said:
        said = said.splitlines()[-1]  # a worker process's own words
    elif isinstance(error, EOFError | BrokenPipeError | ConnectionResetError) or (
        re.search(r"worker \d+ (dead|\(exit code)", said)
    ):
        said = (
            f"A worker process of the environments died ({said}): killed, for want of "
            "memory perhaps, or its simulator crashed."
        )
    else:
        said = f"{type(error).__name__}: {said}"
    where = f"(Where it happened: {out / 'traceback.txt'})"
    return "\n".join([f"rpd.py: {said}", *notes, where])


@contextlib.contextmanager
def in_order(out: Path) -> Iterator[None]:
    """Ends a run that went wrong with a sentence, and one that was stopped with a code."""

    def stop(number: int, frame: Any) -> None:
        sys.exit(128 + number)

    # Before and after training; meanwhile CheckpointHook listens.
    usual = signal.signal(signal.SIGTERM, stop)
    try:
        yield
    except KeyboardInterrupt:
        sys.exit(128 + signal.SIGINT)
    except Exception as error:
        if os.environ.get("HYDRA_FULL_ERROR") == "1":
            raise
        sys.exit(sentence_on(error, out))
    finally:
        signal.signal(signal.SIGTERM, usual)


def close(trainer: Trainer) -> None:
    """Ends worker processes and logs, also those that are broken."""
    evaluation = trainer.parts.evaluation
    ends = [trainer.collector.shutdown, trainer.parts.env.close]
    ends += [evaluation.env.close] if evaluation is not None else []
    # Or the next run of a sweep (-m) would go on in this one's wandb run.
    ends += [trainer.logger.close] if trainer.logger is not None else []
    for end in ends:
        with contextlib.suppress(Exception):  # closed already, or its process is dead
            end()


@hydra.main(config_path="conf", config_name="config", version_base="1.3")
def main(cfg: DictConfig) -> None:
    """Builds, checks, trains and evaluates."""
    if sentence := nonsense(cfg):
        sys.exit(f"rpd.py: {sentence}")
    out = Path(cfg.runs) / cfg.name
    out.mkdir(parents=True, exist_ok=True)
    (out / "traceback.txt").unlink(missing_ok=True)  # of a start before
    OmegaConf.save(cfg, out / "config.yaml", resolve=True)
    set_learner_threads(num_workers=cfg.env.num_workers)
    torchrl_logger.setLevel("WARNING")
    # For whatever a teacher or a reward of somebody's own draws; torch's is the trainer's.
    random.seed(cfg.seed)
    np.random.seed(cfg.seed)
    with in_order(out):
        # 1. Every part of the recipe, and TorchRL's PPOTrainer over them.
        trainer = instantiate(cfg.trainer, logger=make_logger(cfg))
        try:
            run(cfg, trainer, out)
        finally:
            close(trainer)


def run(cfg: DictConfig, trainer: Trainer, out: Path) -> None:
    """Checks, trains and evaluates."""
    wire_log(trainer, cfg)
    student, labels = trainer.parts.student, trainer.parts.teacher_action
    curve = trainer.parts.evaluation

    # 2. The teacher: can it be right, and how good is it? (PPO alone has none.)
    seeds, teacher = FINAL_SEEDS + cfg.seed, None
    if cfg.algo != "ppo":
        # Kept away from the generator that training draws from.
        with torch.random.fork_rng(devices=[]):
            expert = trainer.parts.teacher
            convention = instantiate(cfg.teacher_action.action_transform)
            as_labelled = {"action_transform": convention}
            # PhysX remembers the contacts of the check in the evaluation that follows.
            curve.env.set_seed(seeds)
            if cfg.check_teacher:
                print(check_teacher(expert, curve.env, **as_labelled), flush=True)
            teacher = evaluate(
                curve.env, expert, episodes=cfg.episodes, seeds=seeds, **as_labelled
            )
        print(f"teacher: success {teacher.success_once}", flush=True)

    # 3. Training; it closes the simulators. Killed at any moment, the same command goes on
    # from the last checkpoint.
    NumericalGuard(out / "guard").register(trainer)
    checkpoints = None
    if cfg.checkpoint.every is not None:
        checkpoints = CheckpointHook(
            out / "checkpoints", every=cfg.checkpoint.every, config=identity(cfg)
        )
        checkpoints.register(trainer)
        if checkpoints.resume():
            print(f"going on at {trainer.collected_frames} frames", flush=True)
    start = time.perf_counter()
    try:
        trainer.train()
    except Exception as error:
        last = None if checkpoints is None else checkpoints.latest()
        if last is not None and str(last) not in str(error):
            error.add_note(f"The same command goes on from {last}.")
        raise
    seconds = time.perf_counter() - start

    if checkpoints is not None and checkpoints.stopped_by:
        print(f"{checkpoints.stopped_by}: the same command goes on from here")
        sys.exit(128 + signal.Signals[checkpoints.stopped_by])

    # 4. The student, on the teacher's episodes.
    result = evaluate(curve.env, student.actor, episodes=cfg.episodes, seeds=seeds)
    print(f"student: success {result.success_once}; teacher queries: {labels.stats()}")
    student.save(
        out / "student.safetensors",
        task=cfg.env.task_id,
        reward=cfg.env.reward_mode,
        seed=cfg.seed,
        frames=trainer.collected_frames,
    )
    logged = trainer._log_dict
    results = {
        "algo": cfg.algo,
        "task": cfg.env.task_id,
        "reward": cfg.env.reward_mode,
        "labels": cfg.labels,
        "preset": cfg.preset,
        "seed": cfg.seed,
        "frames": trainer.collected_frames,
        # Of a run that went on: seconds and shares since its last start.
        "resumed": checkpoints is not None and checkpoints.resume(),
        "seconds": seconds,
        "eval_seconds": sum(r.seconds for _, r in curve.history),
        "teacher": numbers(teacher),
        "student": numbers(result),
        "teacher_stats": dict(labels.stats()),
        "curve": [(frames, r.success_once.mean) for frames, r in curve.history],
        "ppo_active": mean(logged.get("ppo_active", [])),
        "distill_active": mean(logged.get("distill_active", [])),
        "versions": {
            name: version(name) for name in ("torch", "torchrl", "tensordict")
        },
    }
    (out / "results.json").write_text(json.dumps(results, indent=1) + "\n")
    print(f"wrote config.yaml, results.json and student.safetensors to {out}")


if __name__ == "__main__":
    main()
