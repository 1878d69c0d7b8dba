# Copyright (c) the torchrl_rpd authors.
#
# This source code is licensed under the MIT license found in the
# LICENSE file in the root directory of this source tree.
"""Nothing that comes from outside runs code: docs/security.md.

The first half reads the source; the second plants files whose payload would leave a
folder behind, and looks that it is not there.
"""

from __future__ import annotations

import ast
import json
import os
import pickle
import shutil
import struct
from collections.abc import Callable, Iterator
from pathlib import Path

import numpy as np
import pytest
import torch
from faulty_parts import ROOT

SOURCES = sorted(
    file
    for folder in ("torchrl_rpd", "hydra_plugins", "examples", "benchmarks")
    for file in (ROOT / folder).rglob("*.py")
)

# Modules that build objects from bytes, by calling what the bytes say.
PICKLES = {
    *("pickle", "_pickle", "cPickle", "dill", "cloudpickle", "joblib", "shelve"),
    *("marshal", "jsonpickle", "pickletools"),
}
# Where one is used, and on what.
EXCUSED = {
    # A teacher's factory on its way to a worker process that this process has started.
    "torchrl_rpd/transforms/_handle.py": {"cloudpickle"},
}
# Calls that read pickles or run text, by the end of their dotted names.
NEVER = {
    *("eval", "exec", "compile", "__import__", "os.system", "os.popen"),
    *("yaml.unsafe_load", "yaml.full_load", "yaml.load", "read_pickle"),
    # Reads what is beside the tensors with pickle.
    *("load_memmap", "load_memmap_"),
    *("np.loads", "torch.jit.load", "torch.package.PackageImporter"),
}


def dotted(node: ast.AST) -> str:
    """``a.b.c`` of an expression, as far as it is one."""
    if isinstance(node, ast.Attribute):
        return f"{dotted(node.value)}.{node.attr}"
    return node.id if isinstance(node, ast.Name) else ""


def offences(tree: ast.AST) -> Iterator[str]:
    """What must not be in a source file."""
    for node in ast.walk(tree):
        if isinstance(node, ast.Import | ast.ImportFrom):
            names = [alias.name for alias in node.names]
            if isinstance(node, ast.ImportFrom) and not node.level:
                names = [node.module or ""]
            for name in names:
                if name.partition(".")[0] in PICKLES:
                    yield name.partition(".")[0]
        if isinstance(node, ast.Constant) and node.value in PICKLES:
            yield str(node.value)  # importlib.import_module("pickle")
        if not isinstance(node, ast.Call):
            continue
        name = dotted(node.func)
        given = {k.arg: k.value for k in node.keywords}
        last = name.rpartition(".")[2]
        if name in NEVER or (last in NEVER and last not in ("eval", "compile")):
            yield name
        if name in ("torch.load", "torch.serialization.load"):
            safe = given.get("weights_only")
            if not (isinstance(safe, ast.Constant) and safe.value is True):
                yield "torch.load without weights_only=True"
        for word in ("allow_pickle", "trust_remote_code", "shell"):
            value = given.get(word)
            if value is not None and not (
                isinstance(value, ast.Constant) and not value.value
            ):
                yield f"{word}="
        if given.get("weights_only") is not None and "torch.load" not in name:
            value = given["weights_only"]
            if not (isinstance(value, ast.Constant) and value.value is True):
                yield "weights_only=False"


class TestSource:
    def test_nothing_reads_pickles_or_runs_text(self):
        assert len(SOURCES) > 100
        found = {}
        for file in SOURCES:
            name = file.relative_to(ROOT).as_posix()
            bad = set(offences(ast.parse(file.read_text())))
            if bad := bad - EXCUSED.get(name, set()):
                found[name] = bad
        assert not found

    @pytest.mark.parametrize("file", EXCUSED)
    def test_excuses_are_needed(self, file):
        assert set(offences(ast.parse((ROOT / file).read_text()))) == EXCUSED[file]

    @pytest.mark.parametrize(
        "text",
        [
            "import pickle",
            "from dill import loads",
            "importlib.import_module('marshal')",
            "torch.load(path)",
            "torch.load(path, weights_only=False)",
            "torch.load(path, weights_only=safe)",
            "checkpoint.load(path, tensor_load_kwargs=dict(weights_only=False))",
            "np.load(path, allow_pickle=True)",
            "np.load(path, allow_pickle=x)",
            "yaml.load(text)",
            "eval(text)",
            "exec(text)",
            "AutoModel.from_pretrained(name, trust_remote_code=True)",
            "subprocess.run(text, shell=True)",
            "TensorDict.load_memmap(folder)",
            "os.system(text)",
        ],
    )
    def test_would_be_found(self, text):
        assert list(offences(ast.parse(text)))

    @pytest.mark.parametrize(
        "text",
        [
            "torch.load(path, weights_only=True)",
            "np.load(path)",
            "np.load(path, allow_pickle=False)",
            "model.eval()",
            "torch.compile(model)",
            "re.compile('x')",
            "yaml.safe_load(text)",
        ],
    )
    def test_would_be_let_through(self, text):
        assert not list(offences(ast.parse(text)))


class Payload:
    """Pickle would make a folder of this."""

    def __init__(self, trap: Path) -> None:
        self.trap = str(trap)

    def __reduce__(self):
        return os.mkdir, (self.trap,)


@pytest.fixture
def trap(tmp_path) -> Iterator[Path]:
    """What a payload makes, and nobody must."""
    path = tmp_path / "the-payload-ran"
    yield path
    assert not path.exists()


@pytest.fixture
def evil(trap) -> bytes:
    """A pickle, as torch.save, NumPy and Python write them."""
    return pickle.dumps(Payload(trap))


def torch_file(path: Path, trap: Path, *, legacy: bool = False) -> Path:
    torch.save({"w": Payload(trap)}, path, _use_new_zipfile_serialization=not legacy)
    return path


def test_the_payload_works(tmp_path):
    """The tests below could fail."""
    path = tmp_path / "ran"
    pickle.loads(pickle.dumps(Payload(path)))
    assert path.is_dir()
    other = tmp_path / "other"
    torch.load(torch_file(tmp_path / "a.pt", other), weights_only=False)
    assert other.is_dir()


def safetensors_with(path: Path, metadata: dict[str, str]) -> Path:
    from safetensors.torch import save_file

    save_file({"a": torch.zeros(1)}, path, metadata=metadata)
    return path


class TestStudents:
    @pytest.mark.parametrize("kind", ["pickle", "zip", "legacy"])
    def test_a_pickle_of_that_name(self, kind, evil, trap, tmp_path):
        from torchrl_rpd.students import ActorCritic

        file = tmp_path / "student.safetensors"
        if kind == "pickle":
            file.write_bytes(evil)
        else:
            torch_file(file, trap, legacy=kind == "legacy")
        with pytest.raises(ValueError, match="no safetensors file"):
            ActorCritic.load(file)

    @pytest.mark.parametrize(
        "change",
        [
            {"builder": "os.system"},
            {"builder": "__import__"},
            {"builder": "torchrl_rpd.students.mlp_actor_critic"},
            {"config": "__import__('os').mkdir('x')"},
            {"config": '{"_target_": "os.mkdir", "path": "x"}'},
            {"config": "[1, 2]"},
            {"config": None},
            {"metadata": "{"},
            {"format": "torchrl_rpd.student/99"},
        ],
        ids=str,
    )
    def test_odd_metadata(self, change, trap, tmp_path):
        from torchrl_rpd.students import ActorCritic

        header = {
            "format": "torchrl_rpd.student/1",
            "builder": "mlp_actor_critic",
            "config": '{"observation_dim": 4, "action_dim": 2}',
            "metadata": "{}",
            **change,
        }
        header = {k: v for k, v in header.items() if v is not None}
        file = safetensors_with(tmp_path / "student.safetensors", header)
        with pytest.raises(ValueError, match=r"student\.safetensors"):
            ActorCritic.load(file)

    def test_a_header_that_lies(self, tmp_path):
        """Lengths beyond the file, offsets outside, a gigabyte of header."""
        from torchrl_rpd.students import ActorCritic

        file = tmp_path / "student.safetensors"
        entry = {"a": {"dtype": "F32", "shape": [2**40], "data_offsets": [0, 2**42]}}
        header = json.dumps(entry).encode()
        for content in (
            struct.pack("<Q", len(header)) + header,
            struct.pack("<Q", 2**40) + header,
            struct.pack("<Q", len(header)) + header[:-2],
            b"",
        ):
            file.write_bytes(content)
            with pytest.raises(ValueError, match="no safetensors file"):
                ActorCritic.load(file)


@pytest.fixture(scope="module")
def octo(tmp_path_factory) -> Path:
    """A checkpoint as Octo publishes them."""
    pytest.importorskip("msgpack")
    from torchrl_rpd.teachers.octo import write_random_checkpoint

    folder = tmp_path_factory.mktemp("octo") / "base"
    return Path(write_random_checkpoint(folder, layout="msgpack"))


@pytest.fixture(scope="module")
def openvla(tmp_path_factory) -> Path:
    """A checkpoint as OpenVLA is published."""
    pytest.importorskip("transformers")
    from torchrl_rpd.teachers.openvla import write_tiny_checkpoint

    return Path(write_tiny_checkpoint(tmp_path_factory.mktemp("openvla")))


@pytest.fixture(scope="module")
def saved(tmp_path_factory) -> Path:
    """The checkpoints of a small run."""
    from resumable import Run

    folder = tmp_path_factory.mktemp("run") / "run"
    Run(folder, stop_after=2).train()
    return folder


class TestTeachers:
    def octo_array_file(self, folder: Path) -> Path:
        return max(folder.rglob("default/*"), key=lambda path: path.stat().st_size)

    @pytest.mark.parametrize("kind", ["pickle", "zip", "extension", "object"])
    def test_octo(self, kind, octo, evil, trap, tmp_path):
        import msgpack

        from torchrl_rpd.teachers.octo._msgpack import read_arrays

        file = tmp_path / "checkpoint"
        array = msgpack.packb(((1,), "object", evil), use_bin_type=True)
        {
            "pickle": lambda: file.write_bytes(evil),
            "zip": lambda: torch_file(file, trap),
            "extension": lambda: file.write_bytes(
                msgpack.packb({"a": msgpack.ExtType(42, evil)})
            ),
            "object": lambda: file.write_bytes(
                msgpack.packb({"a": msgpack.ExtType(1, array)})
            ),
        }[kind]()
        with pytest.raises(ValueError, match="no flax msgpack checkpoint"):
            read_arrays(file)
        # And where the checkpoint would have it.
        from torchrl_rpd.teachers import OctoTeacher

        folder = Path(shutil.copytree(octo, tmp_path / "octo"))
        shutil.copy(file, self.octo_array_file(folder))
        with pytest.raises(ValueError, match="no flax msgpack checkpoint"):
            OctoTeacher.from_pretrained(folder)

    def test_openvla_that_is_pickled(self, openvla, trap, tmp_path):
        from torchrl_rpd.teachers import OpenVLATeacher

        folder = Path(shutil.copytree(openvla, tmp_path / "openvla"))
        torch_file(folder / "pytorch_model.bin", trap)
        weights = folder / "model.safetensors"
        weights.unlink()
        with pytest.raises(FileNotFoundError, match="safetensors alone"):
            OpenVLATeacher.from_pretrained(folder)
        torch_file(weights, trap)
        with pytest.raises(Exception, match=r"(?i)header|safetensors"):
            OpenVLATeacher.from_pretrained(folder)

    def test_openvla_with_code_of_its_own(self, openvla, trap, tmp_path):
        """The published folders hold modeling_prismatic.py, and config.json names it."""
        from torchrl_rpd.teachers import OpenVLATeacher

        folder = Path(shutil.copytree(openvla, tmp_path / "openvla"))
        code = f"import os\nos.mkdir({str(trap)!r})\n"
        for name in ("modeling_prismatic.py", "configuration_prismatic.py"):
            (folder / name).write_text(code)
        config = json.loads((folder / "config.json").read_text())
        config["auto_map"] = {
            "AutoConfig": "configuration_prismatic.OpenVLAConfig",
            "AutoModelForVision2Seq": "modeling_prismatic.OpenVLAForActionPrediction",
        }
        (folder / "config.json").write_text(json.dumps(config))
        torch_file(folder / "pytorch_model.bin", trap)  # beside the safetensors
        assert OpenVLATeacher.from_pretrained(folder) is not None

    @pytest.mark.parametrize("kind", ["pickle", "zip", "metadata"])
    def test_pocket(self, kind, evil, trap, tmp_path):
        from torchrl_rpd.teachers import PocketVLATeacher

        file = tmp_path / "pocket.safetensors"
        if kind == "pickle":
            file.write_bytes(evil)
        elif kind == "zip":
            torch_file(file, trap)
        else:
            header = {"format": "torchrl_rpd.pocket_vla/1", "config": "os.getcwd()"}
            safetensors_with(file, header)
        with pytest.raises(ValueError, match=r"pocket\.safetensors"):
            PocketVLATeacher("PushCube-v1", path=file)


class TestNetwork:
    def test_frames(self, evil):
        msgpack = pytest.importorskip("msgpack")
        from torchrl_rpd.teachers.remote import MessageError, unpack

        def array(**entries: object) -> bytes:
            whole = {b"__ndarray__": True, b"data": evil, b"shape": [1], **entries}
            return msgpack.packb({"actions": whole})

        for message in (
            evil,
            msgpack.packb({"actions": msgpack.ExtType(1, evil)}),
            msgpack.packb({"actions": msgpack.Timestamp(1)}),
            array(**{"dtype": "|O"}),
            msgpack.packb(
                {
                    "a": {
                        b"__ndarray__": True,
                        b"data": evil,
                        b"dtype": "|O8",
                        b"shape": [1],
                    }
                }
            ),
            msgpack.packb(
                {"a": {b"__npgeneric__": True, b"data": evil, b"dtype": "|O"}}
            ),
            msgpack.packb(
                {
                    "a": {
                        b"__ndarray__": True,
                        b"data": evil,
                        b"dtype": f"|V{len(evil)}",
                        b"shape": [1],
                    }
                }
            ),
        ):
            with pytest.raises(MessageError):
                unpack(message)

    def test_bytes_stay_bytes(self, evil):
        pytest.importorskip("msgpack")
        from torchrl_rpd.teachers.remote import pack, unpack

        assert unpack(pack({"note": evil})) == {"note": evil}


class TestDemonstrations:
    def test_hdf5(self, evil, tmp_path):
        demo_files = pytest.importorskip("demo_files")
        import h5py

        from torchrl_rpd.data import ManiSkillDemos

        path = demo_files.write(tmp_path / "a.h5", (3, 3))
        payload = np.frombuffer(evil, np.uint8)
        with h5py.File(path, "a") as file:
            # Where pickling readers look: attributes, opaque data, objects, references.
            for group in (file, file["traj_1"]):
                group.attrs["metadata"] = payload
                group.attrs["opaque"] = np.void(evil)
            del file["traj_0/actions"]
            file["traj_0/actions"] = np.array([np.void(evil)] * 3)
        demos = ManiSkillDemos(path)
        assert demos.skipped_by_reason == {"no plain numbers": 1}
        with h5py.File(path, "a") as file:
            del file["traj_0/actions"]
            file.create_dataset("traj_0/actions", (3, 7), dtype=h5py.ref_dtype)
        assert ManiSkillDemos(path).skipped_by_reason == {"no plain numbers": 1}

    def test_a_pickle_of_that_name(self, evil, trap, tmp_path):
        demo_files = pytest.importorskip("demo_files")
        from torchrl_rpd.data import ManiSkillDemos

        path = demo_files.write(tmp_path / "a.h5", (3,))
        path.write_bytes(evil)
        with pytest.raises(ValueError, match="cannot be opened as HDF5"):
            ManiSkillDemos(path)
        path = demo_files.write(tmp_path / "b.h5", (3,))
        path.with_suffix(".json").write_bytes(evil)
        with pytest.raises(ValueError, match=r"b\.json"):
            ManiSkillDemos(path)

    def test_tfrecords(self, evil, tmp_path):
        pytest.importorskip("google_crc32c")
        from torchrl_rpd.data import RLDSDemos, _tfrecord

        probe = Path(
            shutil.copytree(ROOT / "tests/data/rlds_probe", tmp_path / "probe")
        )
        (shard,) = probe.glob("*.tfrecord-*")
        records = list(_tfrecord.read_records(shard))
        pictures = _tfrecord.decode_example(records[1])
        name = "steps/observation/image"
        pictures[name] = [evil] * len(pictures[name])
        with open(shard, "wb") as file:
            _tfrecord.write_record(file, evil)
            _tfrecord.write_record(file, _tfrecord.encode_example(pictures))
            _tfrecord.write_record(file, records[2])
        demos = RLDSDemos(probe)
        assert len(demos.episodes) == 1
        assert sum(demos.skipped_by_reason.values()) == 2
        assert demos.skipped_by_reason["unreadable picture"] == 1


class TestOurCheckpoints:
    """Another file: tests/trainers/test_checkpoint_files.py plants more."""

    def plant(self, saved: Path, folder: Path, change: Callable[[Path], None]) -> None:
        from resumable import Run
        from torchrl.checkpoint import CheckpointError

        shutil.copytree(saved, folder)
        (checkpoint,) = folder.iterdir()
        change(checkpoint)
        run = Run(folder)
        with pytest.raises(CheckpointError):
            run.hook.resume()
        assert run.trainer.collected_frames == 0

    @pytest.mark.parametrize("legacy", [False, True])
    def test_every_component(self, legacy, saved, trap, tmp_path):
        def change(checkpoint: Path) -> None:
            for file in checkpoint.rglob("state.pt"):
                torch_file(file, trap, legacy=legacy)

        self.plant(saved, tmp_path / "run", change)

    def test_a_manifest_that_leads_elsewhere(self, saved, trap, tmp_path):
        elsewhere = tmp_path / "elsewhere"
        elsewhere.mkdir()
        torch_file(elsewhere / "state.pt", trap)

        def change(checkpoint: Path) -> None:
            file = checkpoint / "manifest.json"
            manifest = json.loads(file.read_text())
            for record in manifest["components"].values():
                record["path"] = "../../elsewhere"
            file.write_text(json.dumps(manifest))

        self.plant(saved, tmp_path / "run", change)


if __name__ == "__main__":
    pytest.main([__file__])
