# Copyright (c) the torchrl_rpd authors.
#
# This source code is licensed under the MIT license found in the
# LICENSE file in the root directory of this source tree.
"""What examples/rpd.py logs, read back from TorchRL's loggers; docs/metrics.md."""

from __future__ import annotations

import copy
import csv
import functools
import importlib.util
import json
import re
import struct
from collections.abc import Iterator
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest
from hydra import compose, initialize_config_dir
from hydra_toys import OVERRIDES
from omegaconf import DictConfig

ROOT = Path(__file__).parents[1]
PAGE = ROOT / "docs" / "metrics.md"
# 256 frames in batches of 128, evaluated after each.
STEPS = [128, 256]


@functools.cache
def _composed(words: tuple[str, ...]) -> DictConfig:
    conf = str(ROOT / "examples" / "conf")
    with initialize_config_dir(conf, version_base="1.3"):
        return compose("config", overrides=[*OVERRIDES, *words])


@pytest.fixture(scope="module")
def script() -> ModuleType:
    spec = importlib.util.spec_from_file_location(
        "examples_rpd_logging", ROOT / "examples" / "rpd.py"
    )
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    # The number of threads is this process's, not the script's.
    module.set_learner_threads = lambda **_: None
    return module


def train(script: ModuleType, folder: Path, *words: str, name: str = "toy") -> Path:
    """A run on the toy environment; its folder."""
    cfg = copy.deepcopy(_composed(words))
    cfg.runs, cfg.name, cfg.check_teacher = str(folder), name, False
    script.main(cfg)
    return folder / name


def rows_of_csv(out: Path) -> dict[str, list[tuple[int, float]]]:
    """Name -> (frames, value) of each line."""
    files = sorted((out / "scalars").rglob("*.csv"))
    return {
        file.relative_to(out / "scalars").with_suffix("").as_posix(): [
            (int(step), float(value)) for step, value in csv.reader(file.open())
        ]
        for file in files
    }


def records_of_wandb(file: Path) -> Iterator[Any]:
    """The records of a ``.wandb`` file: LevelDB's log format with a header of 7 bytes.

    Blocks of 32 KiB; each chunk has a checksum (4 bytes), a length (2), a type (1: whole,
    2, 3, 4: first, middle and last part). A rest of less than 7 bytes is padding.
    """
    from wandb.proto.wandb_internal_pb2 import Record

    data = file.read_bytes()
    assert data[:4] == b":W&B"
    at, parts = 7, b""
    while at + 7 <= len(data):
        if (left := 32768 - at % 32768) < 7:
            at += left
            continue
        _, length, kind = struct.unpack_from("<IHB", data, at)
        chunk = data[at + 7 : at + 7 + length]
        at += 7 + length
        parts = chunk if kind in (1, 2) else parts + chunk
        if kind in (1, 4):
            record = Record()
            record.ParseFromString(parts)
            yield record


def entry(item: Any) -> tuple[str, Any]:
    """Name and value of one entry of a wandb record."""
    return item.key or "/".join(item.nested_key), json.loads(item.value_json)


@pytest.fixture(scope="module")
def logged(script, tmp_path_factory) -> dict[str, list[tuple[int, float]]]:
    """By CSV, the default."""
    return rows_of_csv(train(script, tmp_path_factory.mktemp("csv")))


class TestCSV:
    def test_steps_are_frames(self, logged):
        # The success rate of batches in which episodes end, all others in every batch.
        for name, rows in logged.items():
            steps = [step for step, _ in rows]
            assert steps == STEPS, name

    def test_values(self, logged):
        # 8 envs: each batch's frames and the roots of the next ones are asked for.
        assert logged["teacher/queries"] == [(128, 136), (256, 264)]
        assert [value for _, value in logged["schedule/distill_coeff"]] == [2.0, 2.0]


class TestPage:
    @staticmethod
    def named() -> set[str]:
        """The names in the first column of the page's tables."""
        cells = re.findall(r"^\| (`.+?`) \| .+ \|$", PAGE.read_text(), re.MULTILINE)
        return {name for cell in cells for name in re.findall(r"`([^`]+)`", cell)}

    def test_every_metric_is_explained(self, logged):
        assert set(logged) - self.named() == set()

    def test_nothing_else_is(self, logged):
        # Rows for settings that the tiny run does not have say which.
        text = PAGE.read_text()
        optional = set(re.findall(r"^\| `([^`]+)` \| \*only", text, re.MULTILINE))
        assert self.named() - optional == set(logged)


class TestTensorBoard:
    def test_read_back(self, script, tmp_path, logged):
        pytest.importorskip("tensorboard")
        from tensorboard.backend.event_processing.event_accumulator import (
            EventAccumulator,
        )

        out = train(script, tmp_path, "logger=tensorboard")
        events = EventAccumulator(str(out))
        events.Reload()
        assert set(events.Tags()["scalars"]) == set(logged)
        for name in ("loss_distill", "eval/return", "teacher/queries"):
            read = [(event.step, event.value) for event in events.Scalars(name)]
            # The same seed, the same run; TensorBoard keeps 32 bits.
            assert read == [(step, pytest.approx(v)) for step, v in logged[name]]


@pytest.mark.slow
class TestWandb:
    def test_offline_runs_of_a_sweep(self, script, tmp_path, monkeypatch, logged):
        pytest.importorskip("wandb")
        monkeypatch.setenv("WANDB_MODE", "offline")  # TorchRL sets and leaves it
        monkeypatch.setenv("WANDB_SILENT", "true")
        words = ("logger=wandb", "logger.offline=true", "logger.project=rpd")
        # Two runs of one process, as in a sweep: two runs at wandb.
        train(script, tmp_path, *words, name="first")
        train(script, tmp_path, *words, name="second")
        files = sorted((tmp_path / "wandb").glob("offline-run-*/run-*.wandb"))
        assert len(files) == 2
        for file, name in zip(files, ("first", "second"), strict=True):
            records = list(records_of_wandb(file))
            run = next(r.run for r in records if r.HasField("run"))
            assert (run.display_name, run.project) == (name, "rpd")
            rows = [
                dict(map(entry, r.history.item))
                for r in records
                if r.HasField("history")
            ]
            names = {key for row in rows for key in row if not key.startswith("_")}
            # TorchRL adds the frames of each group of metrics.
            steps = {f"{n.rpartition('/')[0]}/step".lstrip("/") for n in logged}
            assert names == set(logged) | steps
            for metric in ("loss_distill", "eval/return", "teacher/queries"):
                step = f"{metric.rpartition('/')[0]}/step".lstrip("/")
                read = [(row[step], row[metric]) for row in rows if metric in row]
                assert read == [(s, pytest.approx(v)) for s, v in logged[metric]]
            # The configuration, with the values that were used.
            config = dict(
                entry(item)
                for record in records
                if record.HasField("config")
                for item in record.config.update
            )
            assert config["frames"] == 256
            assert config["value"]["gamma"] == 0.8


class TestProgressBar:
    def test_success_and_time_left(self, script, tmp_path, capsys):
        train(script, tmp_path, "trainer.progress_bar=true")
        bar = capsys.readouterr().err.replace("\r", "\n")
        last = next(line for line in reversed(bar.split("\n")) if "256/256" in line)
        assert re.search(r"train/success_rate: [\d.]+", last)
        assert re.search(r"eval/success_once: [\d.]+", last)
        # elapsed<left
        assert re.search(r"\[\d+:\d\d<\d+:\d\d, ", last)

    def test_of_a_run_that_goes_on(self, script, tmp_path, capsys):
        words = ("trainer.progress_bar=true", "checkpoint.every=128")
        out = train(script, tmp_path, *words)
        # As if it had been killed in its second half.
        last = next((out / "checkpoints").glob("*256"))
        for file in sorted(last.rglob("*"), reverse=True):
            file.rmdir() if file.is_dir() else file.unlink()
        last.rmdir()
        capsys.readouterr()
        train(script, tmp_path, *words)
        captured = capsys.readouterr()
        assert "going on at 128 frames" in captured.out
        # It counts from where the run goes on, not from 0.
        assert " 256/256 " in captured.err


if __name__ == "__main__":
    pytest.main([__file__])
