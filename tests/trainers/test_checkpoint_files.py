# Copyright (c) the torchrl_rpd authors.
#
# This source code is licensed under the MIT license found in the
# LICENSE file in the root directory of this source tree.
"""What is written, what survives a kill in the middle of it, and what is refused."""

from __future__ import annotations

import multiprocessing
import os
import random
import signal
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
from resumable import Run, assert_same, contents
from torchrl.checkpoint import Checkpoint, CheckpointError

from torchrl_rpd.trainers import CheckpointHook
from torchrl_rpd.trainers._fingerprint import differences, fingerprint

# The test's process has imported everything that a run needs.
fork = multiprocessing.get_context("fork")


def train(directory, crash=None, **kwargs):
    """A whole start of the command, in a process of its own."""
    torch.set_num_threads(1)
    if crash is not None:
        crash()
    Run(directory, **kwargs).train()


def in_process(*args, kill_after=None, **kwargs):
    process = fork.Process(target=train, args=args, kwargs=kwargs)
    process.start()
    if kill_after is not None:
        process.join(kill_after)
        process.kill()
    process.join()
    return process.exitcode


def names(directory):
    return sorted(path.name for path in Path(directory).iterdir())


@pytest.fixture(scope="module")
def whole(tmp_path_factory):
    """A run that nobody disturbs: four batches, a checkpoint after each."""
    return Run(tmp_path_factory.mktemp("whole"), every=1).train()


def die():
    os.kill(os.getpid(), signal.SIGKILL)


def crash_in_the_middle_of_a_file():
    """The second checkpoint's third component is cut off."""
    save, calls = torch.save, []

    def cut_off(state, file):
        save(state, file)
        # The whole name: the random end of another one may hold the same digits.
        if "checkpoint-000000000088." in str(file):
            calls.append(file)
        if len(calls) == 3:
            os.truncate(file, os.path.getsize(file) // 2)
            die()

    torch.save = cut_off


def crash_before_it_is_published():
    crash_at_rename(lambda source: "000088.stage" in str(source))


def crash_while_the_first_one_is_removed():
    """keep_last=1: the second is there, the first is being deleted."""
    crash_at_rename(lambda source: str(source).endswith("000044"))


def crash_at_rename(due):
    replace = os.replace

    def replace_or_die(source, destination):
        if due(source):
            die()
        replace(source, destination)

    os.replace = replace_or_die


@pytest.mark.parametrize(
    ("crash", "last_good"),
    [
        (crash_in_the_middle_of_a_file, 44),
        (crash_before_it_is_published, 44),
        (crash_while_the_first_one_is_removed, 88),
    ],
)
def test_killed_while_it_writes(crash, last_good, whole, tmp_path):
    arguments = {"every": 1, "keep_last": 1}
    assert in_process(tmp_path, crash, **arguments) == -signal.SIGKILL
    again = Run(tmp_path, **arguments)
    assert again.hook.resume()
    assert again.trainer.collected_frames == last_good
    # What the kill left behind is gone.
    assert all(not name.startswith(".") for name in names(tmp_path))
    again.train()
    assert_same(whole.hook.latest(), again.hook.latest())
    assert names(tmp_path) == ["checkpoint-000000000176"]


@pytest.mark.slow
def test_killed_at_twenty_random_moments(whole, tmp_path):
    chance = random.Random(0)
    kills, frames = 0, 0
    while kills < 20:
        # From before the first checkpoint to after a few.
        code = in_process(
            tmp_path, kill_after=chance.uniform(0.2, 1.5), every=1, batches=200
        )
        if code == 0:
            break
        kills += 1
        latest = CheckpointHook(tmp_path, every=1, config={}).latest()
        if latest is not None:
            contents(latest)  # it can be read
            assert Checkpoint.manifest(latest)["metadata"]["collected_frames"] >= frames
            frames = Checkpoint.manifest(latest)["metadata"]["collected_frames"]
    assert kills == 20
    assert frames > 0
    assert in_process(tmp_path, every=1, batches=200) == 0
    undisturbed = Run(tmp_path / "undisturbed", every=1, batches=200).train()
    resumed = Run(tmp_path, every=1, batches=200)
    assert resumed.hook.latest().name == undisturbed.hook.latest().name
    assert_same(undisturbed.hook.latest(), resumed.hook.latest())


def test_what_is_written(whole):
    path = whole.hook.latest()
    manifest = Checkpoint.manifest(path)
    assert manifest["metadata"] == {
        "collected_frames": 176,
        "optim_steps": whole.trainer._optim_count,
        "config": {"lr": 3e-3, "checkpoint_every": 44, "total_frames": 176},
    }
    saved = set(manifest["components"])
    assert {"collector", "loss_module", "optimizer", "trainer_state"} <= saved
    # The batch is of no use after its updates, and the policy is the loss's.
    assert not saved & {"replay_buffer", "policy", "logger"}
    files = {f for r in manifest["components"].values() for f in r["files"]}
    assert files == {"state.pt"}


def test_a_few_checkpoints_are_kept(tmp_path):
    Run(tmp_path, every=1, keep_last=2).train()
    assert names(tmp_path) == [f"checkpoint-000000000{f}" for f in (132, 176)]


class Payload:
    """Pickle would call this."""

    def __reduce__(self):
        return os.abort, ()


@pytest.mark.parametrize("file", ["state.pt", "state/other.pickle"])
def test_nothing_is_unpickled(file, tmp_path):
    run = Run(tmp_path, stop_after=2).train()
    path = run.hook.latest()
    record = Checkpoint.manifest(path)["components"]["loss_module"]
    (path / record["path"] / "state.pt").unlink()
    evil = path / record["path"] / file
    evil.parent.mkdir(exist_ok=True)
    torch.save({"weight": Payload()}, evil)
    with pytest.raises(CheckpointError, match="loss_module"):
        Run(tmp_path).hook.resume()


def test_another_configuration_is_refused(tmp_path):
    old = {"lr": 3e-3, "teacher": {"jitter": 0.3, "hidden": (8, 8)}, "gone": 1}
    run = Run(tmp_path, stop_after=2, config=old).train()
    frames = run.trainer.collected_frames
    new = {"lr": 1e-3, "teacher": {"jitter": 0.3, "hidden": [8, 16]}, "added": "x"}
    other = Run(tmp_path, config=new, every=1)
    with pytest.raises(ValueError) as refused:
        other.trainer.train()
    text = str(refused.value)
    for line in (
        "lr: 0.003 -> 0.001",
        "teacher.hidden: [8, 8] -> [8, 16]",
        "gone: 1 -> (absent)",
        "added: (absent) -> 'x'",
        "checkpoint_every: 88 -> 44",
    ):
        assert f"\n  {line}\n" in text
    assert "jitter" not in text
    assert "total_frames" not in text
    # Nothing was touched: the old command goes on.
    assert other.trainer.collected_frames == 0
    again = Run(tmp_path, config=old)
    assert again.hook.resume() and again.trainer.collected_frames == frames


def test_other_hooks_are_refused(tmp_path):
    Run(tmp_path, stop_after=2).train()
    other = Run(tmp_path)
    other.trainer.register_module("later", other.recorder)
    with pytest.raises(ValueError, match=r"trainer_module\.later: only in this run"):
        other.hook.resume()


def test_a_trainer_that_cannot_be_resumed_is_refused(tmp_path):
    hook = CheckpointHook(tmp_path, every=1, config={})
    collector = SimpleNamespace()
    elsewhere = SimpleNamespace(
        checkpoint=None, save_trainer_file=None, collector=collector
    )
    with pytest.raises(TypeError, match="num_workers"):
        hook.register(elsewhere)
    saves = SimpleNamespace(checkpoint=None, save_trainer_file="x.pt")
    with pytest.raises(ValueError, match="saves checkpoints already"):
        hook.register(saves)


def test_envs_without_streams_are_named(tmp_path, caplog):
    from toy_envs import ReachEnv

    Run(tmp_path / "a")
    assert "seed" not in caplog.text
    Run(tmp_path / "b", env=ReachEnv(4))
    assert "ReachEnv does not keep its episodes' seeds" in caplog.text


class TestFingerprint:
    def test_is_what_json_reads_back(self):
        config = {"a": (1, 2), "path": Path("x/y"), "none": None, "inner": {"b": 0.1}}
        assert fingerprint(config) == {
            "a": [1, 2],
            "path": "x/y",
            "none": None,
            "inner": {"b": 0.1},
        }

    def test_refuses_what_json_does_not_know(self):
        with pytest.raises(TypeError, match="got Tensor"):
            fingerprint({"x": torch.zeros(2)})

    def test_differences(self):
        old = {"a": 1, "b": {"c": 2, "d": {"e": [1]}}, "f": {}, "g": 1}
        new = {"a": 1, "b": {"c": 3, "d": {"e": [1]}}, "f": {"x": 1}, "g": 1.5}
        assert differences(old, new) == [
            "b.c: 2 -> 3",
            "f: {} -> (absent)",
            "g: 1 -> 1.5",
            "f.x: (absent) -> 1",
        ]
        assert differences(old, old) == []


if __name__ == "__main__":
    pytest.main([__file__])
