# Copyright (c) the torchrl_rpd authors.
#
# This source code is licensed under the MIT license found in the
# LICENSE file in the root directory of this source tree.
"""What a run of examples/rpd.py does when something around it fails: docs/faults.md."""

from __future__ import annotations

import contextlib
import errno
import importlib.util
import json
import multiprocessing
import os
import random
import resource
import signal
import subprocess
import sys
import time
import uuid
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from faulty_parts import PATHS, ROOT, WORDS, Teacher, processes_with, wait_for
from resumable import Run, assert_same
from torchrl.checkpoint import CheckpointError

FIRST = "checkpoints/checkpoint-000000000128"
LAST = "checkpoints/checkpoint-000000000512"
fork = multiprocessing.get_context("fork")


def sentence(start, folder, *words) -> str:
    """What a run that goes wrong says at its end."""
    with pytest.raises(SystemExit) as ended:
        start(folder, *words)
    assert isinstance(ended.value.code, str)  # told on stderr, exit code 1
    assert "Traceback" not in ended.value.code
    return ended.value.code


def assert_goes_on(start, folder, undisturbed, *words) -> None:
    """The same command ends as if nothing had gone wrong, bit for bit."""
    start(folder, *words)
    assert_same(undisturbed / LAST, folder / LAST)
    results = [
        json.loads((f / "results.json").read_text()) for f in (undisturbed, folder)
    ]
    assert results[0]["student"] == results[1]["student"]
    assert not (folder / "traceback.txt").exists()


class TestTeacher:
    def test_raises(self, start, fault, undisturbed, tmp_path):
        folder = tmp_path / "run"
        fault("ill", folder / FIRST)
        said = sentence(start, folder)
        assert said.split("\n") == [
            "rpd.py: TeacherIsIll: a fever of 41",
            f"The same command goes on from {folder / FIRST}.",
            f"(Where it happened: {folder / 'traceback.txt'})",
        ]
        assert "faulty_parts.py" in (folder / "traceback.txt").read_text()
        assert_goes_on(start, folder, undisturbed)

    def test_full_traceback_if_asked_for(self, start, fault, tmp_path, monkeypatch):
        monkeypatch.setenv("HYDRA_FULL_ERROR", "1")
        fault("ill", tmp_path)
        with pytest.raises(Exception, match="a fever of 41"):
            start(tmp_path / "run")

    def test_gives_no_number_once(self, start, fault, tmp_path):
        folder = tmp_path / "run"
        fault("nan", folder / FIRST)
        start(folder)
        results = json.loads((folder / "results.json").read_text())
        assert results["teacher_stats"]["non_finite"] == 1

    def test_wrong_action_dimension(self, start, fault, tmp_path):
        fault("wide", tmp_path)
        said = sentence(start, tmp_path / "run", "check_teacher=true")
        assert "4" in said and "2" in said
        fault("wide", tmp_path / "later" / FIRST)
        said = sentence(start, tmp_path / "later")
        assert "gives actions of 4 entries; expected 2" in said

    def test_server_gone(self, start, undisturbed, tmp_path):
        pytest.importorskip("websockets")
        folder = tmp_path / "run"
        with contextlib.closing(__import__("socket").create_server(("", 0))) as free:
            port = free.getsockname()[1]
        words = [
            "teacher=remote",
            "teacher._target_=torchrl_rpd.configs.teachers.connect",
            f"teacher.address=ws://127.0.0.1:{port}",
            "teacher.instruction=null",
            "teacher.in_keys=[observation]",
            "teacher.retries=1",
            "teacher.backoff=0.1",
        ]
        environment = {"FAULT": "kill", "FAULT_AFTER": str(folder / FIRST)}
        server = fork.Process(target=serve, args=(port, environment))
        server.start()
        said = sentence(start, folder, *words)
        server.join()
        assert server.exitcode == -signal.SIGKILL
        assert f"No answer from the teacher at ws://127.0.0.1:{port} after 2" in said
        assert f"The same command goes on from {folder / FIRST}." in said
        server = fork.Process(target=serve, args=(port, {}))
        server.start()
        try:
            start(folder, *words)
        finally:
            server.kill()
            server.join()
        # The labels crossed the wire as they are: but for the configuration, the same.
        ours, theirs = (
            json.loads((f / "results.json").read_text())["student"]
            for f in (folder, undisturbed)
        )
        assert ours == theirs


def serve(port: int, environment: dict[str, str]) -> None:
    """A server in a process of its own, whose teacher may kill it."""
    from torchrl_rpd.teachers.remote import TeacherServer

    os.environ.update(environment)
    with TeacherServer(Teacher(), port=port).running():
        signal.pause()


class TestSignals:
    @pytest.mark.parametrize("name", ["SIGTERM", "SIGINT"])
    def test_in_training(self, name, start, fault, tmp_path, capsys):
        folder = tmp_path / "run"
        number = getattr(signal, name)
        usual = signal.getsignal(number)
        fault(name.lower(), folder / FIRST)
        with pytest.raises(SystemExit) as ended:
            start(folder)
        assert ended.value.code == 128 + number
        assert f"{name}: the same command goes on from here" in capsys.readouterr().out
        # The batch under way is in a checkpoint of its own.
        assert (folder / "checkpoints/checkpoint-000000000256").is_dir()
        assert not (folder / "results.json").exists()
        assert not (folder / "traceback.txt").exists()
        assert signal.getsignal(number) is usual
        start(folder)
        assert "going on at 256 frames" in capsys.readouterr().out
        assert (folder / "results.json").exists()

    @pytest.mark.parametrize("name", ["SIGTERM", "SIGINT"])
    def test_before_training(self, name, start, fault, tmp_path):
        # A shell starts what is in the background with SIGINT ignored.
        usual = signal.signal(signal.SIGINT, signal.default_int_handler)
        try:
            self.stopped_early(name, start, fault, tmp_path)
        finally:
            signal.signal(signal.SIGINT, usual)

    def stopped_early(self, name, start, fault, tmp_path):
        fault(name.lower(), tmp_path)  # while the teacher is evaluated
        with pytest.raises(SystemExit) as ended:
            start(tmp_path / "run")
        assert ended.value.code == 128 + getattr(signal, name)
        assert not (tmp_path / "run" / "checkpoints").exists()


class TestDiskFull:
    @pytest.mark.parametrize(
        "error",
        [
            OSError(errno.ENOSPC, os.strerror(errno.ENOSPC)),
            RuntimeError("PytorchStreamWriter failed writing file data/0: file write"),
        ],
    )
    def test_while_checkpointing(self, error, whole, tmp_path, monkeypatch):
        save, saved = torch.save, []

        def fill_up(state, file, *args, **kwargs):
            saved.append(file)
            save(state, file, *args, **kwargs)
            if "000000000088" in str(file) and len(saved) % 3 == 0:
                os.truncate(file, os.path.getsize(file) // 2)
                raise error

        folder = tmp_path / "full"
        with monkeypatch.context() as patch:
            patch.setattr(torch, "save", fill_up)
            run = Run(folder, every=1)
            with pytest.raises(OSError) as said:
                run.train()
        last = folder / "checkpoint-000000000044"
        assert "The checkpoint at 88 could not be written" in str(said.value)
        assert "MB are free" in str(said.value)
        assert f"it goes on from {last}" in str(said.value)
        # Nothing is left of the half of a file, and nothing is lost of the one before.
        assert [path.name for path in folder.iterdir()] == [last.name]
        rest = Run(folder, every=1).train()
        assert_same(whole.hook.latest(), rest.hook.latest())

    def test_is_a_sentence(self, start, tmp_path, monkeypatch):
        save = torch.save

        def full(state, file, *args, **kwargs):
            if "000000000256" in str(file):
                raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
            save(state, file, *args, **kwargs)

        monkeypatch.setattr(torch, "save", full)
        said = sentence(start, tmp_path / "run")
        assert "No space left on device" in said
        assert said.count(str(tmp_path / "run" / FIRST)) == 1


def cut(path: Path) -> None:
    os.truncate(path, os.path.getsize(path) // 2)


def cut_a_component(checkpoint: Path) -> None:
    cut(max(checkpoint.rglob("state.pt"), key=lambda path: path.stat().st_size))


def empty_a_component(checkpoint: Path) -> None:
    os.truncate(next(checkpoint.rglob("state.pt")), 0)


def remove_a_component(checkpoint: Path) -> None:
    next(checkpoint.rglob("state.pt")).unlink()


def cut_the_manifest(checkpoint: Path) -> None:
    cut(checkpoint / "manifest.json")


def no_manifest(checkpoint: Path) -> None:
    (checkpoint / "manifest.json").unlink()


@pytest.fixture(scope="module")
def whole(tmp_path_factory):
    """A small run of hooks alone, with a checkpoint after each batch."""
    return Run(tmp_path_factory.mktemp("whole"), every=1).train()


class TestBrokenCheckpoint:
    @pytest.mark.parametrize(
        "damage",
        [
            cut_a_component,
            empty_a_component,
            remove_a_component,
            cut_the_manifest,
            no_manifest,
        ],
    )
    def test_the_one_before_is_taken(self, damage, whole, tmp_path, caplog):
        first = Run(tmp_path, every=1, stop_after=3, keep_last=2).train()
        newest = first.hook.latest()
        assert newest.name == "checkpoint-000000000132"
        damage(newest)
        rest = Run(tmp_path, every=1, keep_last=2)
        assert rest.hook.resume()
        assert rest.trainer.collected_frames == 88
        assert f"passed over (delete them):\n  {newest}: " in caplog.text
        rest.train()
        assert sorted(rest.recorder.batches) == [88, 132]
        assert_same(whole.hook.latest(), rest.hook.latest())

    def test_none_can_be_read(self, tmp_path):
        Run(tmp_path, every=1, stop_after=2).train()
        for checkpoint, damage in zip(
            sorted(tmp_path.iterdir()), (cut_a_component, cut_the_manifest), strict=True
        ):
            damage(checkpoint)
        with pytest.raises(CheckpointError) as said:
            Run(tmp_path, every=1).trainer.train()
        for frames in (44, 88):
            assert f"{tmp_path}/checkpoint-{frames:012d}: " in str(said.value)
        assert "delete them to start from the beginning" in str(said.value)

    def test_of_fine_tuning(self, tmp_path, caplog):
        from torchrl.data import LazyTensorStorage, ReplayBuffer

        from torchrl_rpd.finetune import FinetuneCheckpoints, rate_factor

        layer = torch.nn.Linear(2, 2)
        adam = torch.optim.AdamW(layer.parameters())
        checkpoints = FinetuneCheckpoints(
            tmp_path,
            config={},
            module=layer,
            optimizer=adam,
            scheduler=torch.optim.lr_scheduler.LambdaLR(
                adam, rate_factor(total_steps=9)
            ),
            buffer=ReplayBuffer(storage=LazyTensorStorage(4), batch_size=2),
        )
        checkpoints.save(1)
        wanted = layer.weight.detach().clone()
        with torch.no_grad():
            layer.weight += 1
        newest = checkpoints.save(2)
        cut_a_component(newest)
        assert checkpoints.resume() == 1
        assert torch.equal(layer.weight, wanted)
        assert f"passed over (delete them):\n  {newest}: " in caplog.text

    def test_of_another_task(self, start, undisturbed):
        said = sentence(start, undisturbed, "task=push_cube")
        assert "\n  env.task_id: 'PickCube-v1' -> 'PushCube-v1'\n" in said
        assert "start anew in another directory" in said
        # What was there is as it was.
        assert (undisturbed / "results.json").exists()


class TestMissing:
    def test_mani_skill(self, start, tmp_path, monkeypatch):
        monkeypatch.setattr("torchrl_rpd.envs._unwrap.has_mani_skill", False)
        words = ["env._target_=torchrl_rpd.envs.ManiSkillEnv"]
        said = sentence(start, tmp_path / "run", *words)
        assert "pip install 'torchrl_rpd[maniskill]'" in said.split("\n")[0]

    def test_hydra(self, monkeypatch):
        monkeypatch.setitem(sys.modules, "hydra", None)
        spec = importlib.util.spec_from_file_location(
            "without_hydra", ROOT / "examples" / "rpd.py"
        )
        with pytest.raises(SystemExit, match=r"pip install 'torchrl_rpd\[hydra\]'"):
            spec.loader.exec_module(importlib.util.module_from_spec(spec))


class TestWandb:
    def test_unreachable(self, start, tmp_path, monkeypatch, caplog):
        """The run goes on, with files that can be sent later."""
        errors = pytest.importorskip("wandb.errors")
        from unittest.mock import MagicMock

        from torchrl.record.loggers.wandb import WandbLogger

        made = []

        def create(self):
            made.append(self.offline)
            if not self.offline:
                raise errors.CommError("Timed out: connection refused")
            return MagicMock()

        monkeypatch.setattr(WandbLogger, "_create_experiment", create)
        monkeypatch.setenv("WANDB_MODE", "online")  # TorchRL sets and leaves it
        start(
            tmp_path / "run",
            "logger=wandb",
            "frames=128",
            "logger.log_env_packages=false",
        )
        assert made == [False, True]
        assert "the run goes on offline: Timed out" in caplog.text
        assert "wandb sync" in caplog.text
        assert (tmp_path / "run" / "results.json").exists()


class Command:
    """python examples/rpd.py in a process group of its own."""

    def __init__(
        self,
        folder: Path,
        *words: str,
        fault: str | None = None,
        before: Callable[[], object] | None = None,
        **environment: str,
    ) -> None:
        self.folder, self.mark = folder, f"RPD_TEST={uuid.uuid4()}"
        paths = os.pathsep.join(map(str, [ROOT, *PATHS]))
        environment |= {"PYTHONPATH": paths, "OMP_NUM_THREADS": "1"}
        if fault is not None:
            environment |= {"FAULT": fault, "FAULT_AFTER": str(folder / FIRST)}
        name, _, value = self.mark.partition("=")
        done = subprocess.run(
            [
                *(sys.executable, "-W", "ignore", ROOT / "examples" / "rpd.py"),
                *(*WORDS, *words, f"runs={folder.parent}", f"name={folder.name}"),
            ],
            env={**os.environ, **environment, name: value},
            cwd=folder.parent,
            capture_output=True,
            text=True,
            start_new_session=True,
            preexec_fn=before,
            timeout=1200,
        )
        self.code, self.said, self.out = done.returncode, done.stderr, done.stdout
        # Whatever it had started is gone soon after it.
        assert wait_for(lambda: not processes_with(self.mark)), processes_with(
            self.mark
        )


IN_WORKERS = ("env.num_envs=4", "env.num_workers=2")


@pytest.fixture(scope="module")
def command(tmp_path_factory) -> Path:
    """A whole command in which nothing goes wrong."""
    run = Command(tmp_path_factory.mktemp("runs") / "whole", *IN_WORKERS)
    assert run.code == 0, run.said[-3000:]
    return run.folder


@pytest.mark.slow
class TestProcesses:
    """As a whole command, with environments in worker processes; nobody is left over."""

    def goes_on(self, folder: Path, command: Path) -> None:
        again = Command(folder, *IN_WORKERS)
        assert again.code == 0, again.said[-3000:]
        assert "going on at 128 frames" in again.out
        assert_same(command / LAST, folder / LAST)

    @pytest.mark.parametrize(
        ("fault", "sentence"),
        [
            ("ill", "rpd.py: TeacherIsIll: a fever of 41"),
            ("kill_a_worker", "rpd.py: A worker process of the environments died"),
        ],
    )
    def test_one_sentence(self, fault, sentence, command, tmp_path):
        run = Command(tmp_path / "run", *IN_WORKERS, fault=fault)
        assert run.code == 1
        assert "Traceback" not in run.said, run.said
        assert sentence in run.said
        assert f"The same command goes on from {run.folder / FIRST}." in run.said
        self.goes_on(run.folder, command)

    def test_killed(self, command, tmp_path):
        run = Command(tmp_path / "run", *IN_WORKERS, fault="kill")
        assert run.code == -signal.SIGKILL
        self.goes_on(run.folder, command)

    @pytest.mark.parametrize(
        ("fault", "code"), [("sigterm", 143), ("sigint", 130), ("ctrl_c", 130)]
    )
    def test_stopped(self, fault, code, tmp_path):
        run = Command(tmp_path / "run", *IN_WORKERS, fault=fault)
        assert run.code == code, run.said[-3000:]
        assert "Traceback" not in run.said, run.said
        assert (run.folder / "checkpoints/checkpoint-000000000256").is_dir()
        again = Command(run.folder, *IN_WORKERS)
        assert again.code == 0
        assert "going on at 256 frames" in again.out

    def test_workers_that_cannot_be_built(self, tmp_path):
        run = Command(tmp_path / "run", "env._target_=faulty_parts.no_env")
        assert run.code == 1
        last = run.said.strip().splitlines()[-2:]
        assert last[0] == (
            "rpd.py: ValueError: There is no camera 'ceiling'; choose from main, human."
        )
        assert "Traceback" not in run.said.partition("rpd.py: ")[2]

    def test_files_may_not_be_as_large(self, tmp_path):
        """A disk that is full, or a quota: here a limit on the size of a file."""
        start = Command(tmp_path / "run", "frames=128")
        assert start.code == 0
        sizes = [file.stat().st_size for file in start.folder.rglob("state.pt")]
        limit = max(sizes) // 2

        def lower() -> None:
            resource.setrlimit(resource.RLIMIT_FSIZE, (limit, limit))

        run = Command(tmp_path / "other", before=lower)
        assert run.code == 1
        assert "rpd.py: OSError: The checkpoint at 128 could not be written" in run.said
        assert "Traceback" not in run.said
        assert not list((run.folder / "checkpoints").iterdir())

    def test_wandb_unreachable(self, tmp_path):
        pytest.importorskip("wandb")
        run = Command(
            tmp_path / "run",
            "logger=wandb",
            "frames=128",
            WANDB_BASE_URL="http://127.0.0.1:9",
            WANDB_API_KEY="0" * 40,
            WANDB_INIT_TIMEOUT="5",
        )
        assert run.code == 0, run.said[-3000:]
        # TorchRL's logger writes to either.
        assert "cannot be reached, the run goes on offline" in run.said + run.out
        assert list(tmp_path.glob("wandb/offline-run-*/run-*.wandb"))
        assert (run.folder / "results.json").exists()


def cpu_seconds(pid: int) -> float:
    """What a process has computed so far: a clock that other processes do not slow."""
    with contextlib.suppress(OSError):
        fields = Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()
        return sum(map(int, fields[11:13])) / os.sysconf("SC_CLK_TCK")
    return float("inf")


def in_child(start, folder) -> None:
    torch.set_num_threads(1)
    start(folder)
    os._exit(0)


@pytest.mark.slow
def test_killed_at_twenty_random_moments(start, undisturbed, tmp_path):
    """kill -9, from the first checks to the final evaluation; then the same command."""
    folder, chance = tmp_path / "run", random.Random(0)
    kills, starts, frames = 0, 0, 0
    while kills < 20:
        starts += 1
        assert starts < 60
        process = fork.Process(target=in_child, args=(start, folder))
        process.start()
        moment = chance.uniform(0.05, 0.9)
        while process.is_alive() and cpu_seconds(process.pid) < moment:
            time.sleep(0.002)
        process.kill()
        process.join()
        kills += process.exitcode == -signal.SIGKILL
        there = sorted((folder / "checkpoints").glob("checkpoint-*"))
        if there:
            now = int(there[-1].name[-12:])
            assert now >= frames  # no checkpoint is ever lost
            frames = now
        if (folder / "results.json").exists():
            # The whole run has survived: once more, until there were 20 kills.
            assert_same(undisturbed / LAST, folder / LAST)
            folder, frames = tmp_path / f"run{starts}", 0
    process = fork.Process(target=in_child, args=(start, folder))
    process.start()
    process.join()
    assert process.exitcode == 0
    assert_same(undisturbed / LAST, folder / LAST)
    assert wait_for(lambda: not multiprocessing.active_children())


if __name__ == "__main__":
    pytest.main([__file__])
