# Copyright (c) the torchrl_rpd authors.
#
# This source code is licensed under the MIT license found in the
# LICENSE file in the root directory of this source tree.
"""RLDS data sets: read as TensorFlow Datasets wrote them, and written so that it reads.

``tests/data/rlds_probe`` was written by TensorFlow Datasets 4.9.10. Its episode ``e`` of
0, 1, 2 has ``e + 2`` steps; step ``t`` has action ``(0..6) / 8 + e + t / 16``, state
``(e, t, 0.5)``, a picture that counts ``0..143`` from ``10 e + t`` (PNG, 8 x 6), a grey
one of ``40 e + t`` (JPEG, 4 x 4), and the instructions push, pull, push.
"""

from __future__ import annotations

import json
import os
import shutil
import struct
import subprocess
import sys
from importlib.util import find_spec
from pathlib import Path

import demo_files
import numpy as np
import pytest
import torch

from torchrl_rpd.data import ManiSkillDemos, RLDSDemos, _tfrecord, write_rlds
from torchrl_rpd.data._hdf5 import BrokenEpisode

if not (find_spec("google_crc32c") and find_spec("google.protobuf")):
    pytest.skip(
        "needs google-crc32c and protobuf: pip install 'torchrl_rpd[rlds]'",
        allow_module_level=True,
    )

PROBE = Path(__file__).parents[1] / "data" / "rlds_probe"
SHARD = "probe-train.tfrecord-00000-of-00001"
TFDS_PYTHON = os.environ.get("TFDS_PYTHON") or (
    sys.executable if find_spec("tensorflow_datasets") else None
)


@pytest.fixture
def probe(tmp_path) -> Path:
    """A copy that may be damaged."""
    return Path(shutil.copytree(PROBE, tmp_path / "probe"))


class TestRecords:
    def test_masked_checksum(self):
        # CRC-32C's check value of "123456789" is 0xE3069283. Rotated right by 15 bits:
        # 0xE3069283 >> 15 is 0x1C60D, its low 15 bits 0x1283 << 17 are 0x25060000,
        # together 0x2507C60D; plus 0xA282EAD8 is 0xC78AB0E5.
        assert _tfrecord.masked_crc(b"123456789") == 0xC78AB0E5

    def test_frame(self, tmp_path):
        with open(tmp_path / "a", "wb") as file:
            _tfrecord.write_record(file, b"abc")
        data = (tmp_path / "a").read_bytes()
        assert len(data) == 8 + 4 + 3 + 4
        assert data[:8] == struct.pack("<Q", 3)
        assert data[12:15] == b"abc"
        assert data[15:] == struct.pack("<I", _tfrecord.masked_crc(b"abc"))

    def test_example_on_the_wire(self):
        # Example{1: Features{1: entry{1: "a", 2: Feature{3: Int64List{1: packed 5}}}}}
        feature = b"\x1a\x03\x0a\x01\x05"
        entry = b"\x0a\x01a\x12" + bytes([len(feature)]) + feature
        features = b"\x0a" + bytes([len(entry)]) + entry
        wire = b"\x0a" + bytes([len(features)]) + features
        assert _tfrecord.encode_example({"a": np.array([5])}) == wire
        assert _tfrecord.decode_example(wire)["a"].tolist() == [5]

    def test_example_round_trip(self):
        values = {
            "floats": np.array([[1.5, -2.0], [0.0, 1e-20]], np.float32),
            "numbers": np.array([-1, 2**62]),
            "flags": np.array([True, False]),
            "bytes": [b"", b"\x00\xff"],
        }
        read = _tfrecord.decode_example(_tfrecord.encode_example(values))
        assert read["floats"].tolist() == values["floats"].ravel().tolist()
        assert read["numbers"].tolist() == [-1, 2**62]
        assert read["flags"].tolist() == [1, 0]
        assert read["bytes"] == [b"", b"\x00\xff"]

    def test_no_example(self):
        with pytest.raises(BrokenEpisode, match="no Example"):
            _tfrecord.decode_example(b"\xff\xff\xff")

    def test_absurd_length(self, tmp_path):
        """A length with a right checksum does not ask for more than there is."""
        length = struct.pack("<Q", 2**40)
        crc = struct.pack("<I", _tfrecord.masked_crc(length))
        (tmp_path / "a").write_bytes(length + crc + b"x" * 100)
        (found,) = _tfrecord.read_records(tmp_path / "a")
        assert found.reason == "truncated shard"


class TestReading:
    def test_what_tfds_wrote(self):
        demos = RLDSDemos(PROBE, chunk_size=2, batch_size=4)
        assert len(demos) == 2 + 3 + 4
        # TensorFlow Datasets shuffles the episodes: find each by its state
        found = {
            int(demos.episode(i)["observation", "state"][0, 0]): i for i in range(3)
        }
        for e, text in enumerate(["push", "pull", "push"]):
            i = found[e]
            rows = demos.episode(i)
            length = e + 2
            assert rows.shape == (length,)
            assert demos.episodes[i].instruction == text
            for t in range(length):
                row = rows[t]
                wanted = torch.arange(7) / 8 + e + t / 16
                torch.testing.assert_close(row["action"], wanted)
                assert row["observation", "state"].tolist() == [e, t, 0.5]
                picture = (np.arange(144).reshape(8, 6, 3) + 10 * e + t) % 256
                assert (
                    row["observation", "image"].permute(1, 2, 0).numpy() == picture
                ).all()
                wrist = row["observation", "wrist_image"].int() - (40 * e + t)
                assert wrist.abs().max() <= 2  # JPEG
            ends = [False] * (length - 1) + [True]
            assert rows["next", "done"][:, 0].tolist() == ends
            assert rows["next", "reward"][:, 0].tolist() == [float(x) for x in ends]
            assert rows["next", "terminated"].any() == (e != 1)
            assert rows["next", "truncated"].any() == (e == 1)
        rows = demos.sample()
        assert rows["vla_action", "chunk"].shape == (4, 2, 7)
        assert set(rows.get("language_instruction").tolist()) <= {"push", "pull"}
        assert demos.metadata.dataset_id == "probe"
        assert demos.metadata.action_dim == 7

    def test_choice_of_observations(self):
        rows = RLDSDemos(PROBE, cameras="wrist_image", state=None)[:]
        assert set(rows["observation"].keys()) == {"image"}
        rows = RLDSDemos(PROBE, cameras=[], state=["state", "state"])[:]
        assert rows["observation", "state"].shape[-1] == 6
        assert RLDSDemos(PROBE, instruction="go").instructions == ["go"]

    def test_found_in_a_folder_above(self, probe):
        assert len(RLDSDemos(probe.parent)) == 9
        shutil.copytree(probe, probe.parent / "second")
        with pytest.raises(ValueError, match="several data sets"):
            RLDSDemos(probe.parent)

    def test_what_is_not_there(self, probe):
        with pytest.raises(ValueError, match=r"no split 'val', but \['train'\]"):
            RLDSDemos(probe, split="val")
        with pytest.raises(ValueError, match=r"no pictures \['a'\].*wrist_image"):
            RLDSDemos(probe, cameras="a")
        with pytest.raises(ValueError, match=r"no observations \['b'\].*state"):
            RLDSDemos(probe, state="b")
        info = json.loads((probe / "dataset_info.json").read_text())
        (probe / "dataset_info.json").write_text(
            json.dumps({**info, "fileFormat": "array_record"})
        )
        with pytest.raises(ValueError, match="array_record; only TFRecord"):
            RLDSDemos(probe)


class TestDamage:
    def test_truncated_shard(self, probe):
        shard = probe / SHARD
        shard.write_bytes(shard.read_bytes()[:-5])
        demos = RLDSDemos(probe)
        assert len(demos.episodes) == 2
        assert demos.skipped_by_reason == {"truncated shard": 1}

    def test_shard_cut_between_records(self, probe):
        shard = probe / SHARD
        data = shard.read_bytes()
        (length,) = struct.unpack("<Q", data[:8])
        shard.write_bytes(data[: 12 + length + 4])
        demos = RLDSDemos(probe)
        assert len(demos.episodes) == 1
        assert demos.skipped_by_reason == {"truncated shard": 2}

    def test_damaged_record(self, probe):
        shard = probe / SHARD
        data = bytearray(shard.read_bytes())
        data[100] ^= 1
        shard.write_bytes(data)
        demos = RLDSDemos(probe)
        assert len(demos.episodes) == 2
        assert demos.skipped_by_reason == {"damaged record": 1}

    def test_damaged_length(self, probe):
        shard = probe / SHARD
        data = bytearray(shard.read_bytes())
        (length,) = struct.unpack("<Q", data[:8])
        data[12 + length + 4] ^= 1  # of the second record
        shard.write_bytes(data)
        demos = RLDSDemos(probe)
        assert len(demos.episodes) == 1
        assert demos.skipped_by_reason == {"damaged shard": 2}

    def test_missing_shard(self, probe):
        (probe / SHARD).unlink()
        with pytest.raises(ValueError, match=r"No episode.*'missing shard': 3"):
            RLDSDemos(probe)

    @pytest.mark.parametrize(
        ("name", "value", "reason"),
        [
            ("steps/action", np.zeros(7, np.float32), "wrong length"),
            ("steps/action", np.full(14, np.nan, np.float32), "NaN in actions"),
            ("steps/action", [b"x"], "missing data"),
            ("steps/observation/state", np.zeros(5, np.float32), "wrong length"),
            ("steps/observation/image", [b"GIF89a", b"x"], "unreadable picture"),
            ("steps/language_instruction", [], "missing data"),
        ],
    )
    def test_broken_episode(self, probe, name, value, reason):
        shard = probe / SHARD
        records = [_tfrecord.decode_example(r) for r in _tfrecord.read_records(shard)]
        short = next(r for r in records if len(r["steps/is_first"]) == 2)
        short[name] = value
        with open(shard, "wb") as file:
            for record in records:
                _tfrecord.write_record(file, _tfrecord.encode_example(record))
        demos = RLDSDemos(probe)
        assert [len(demos.episodes), demos.skipped_by_reason] == [2, {reason: 1}]


class TestWriting:
    def test_round_trip(self, tmp_path):
        push = demo_files.write(tmp_path / "push.h5", (3, 5), rewards=True)
        pull = demo_files.write(
            tmp_path / "pull.h5", (2,), task_id="PullCube-v1", rewards=True
        )
        demos = ManiSkillDemos([push, pull])
        target = write_rlds(
            demos, tmp_path / "rlds", name="cubes", episodes_per_shard=2
        )
        assert sorted(p.name for p in target.iterdir()) == [
            "cubes-train.tfrecord-00000-of-00002",
            "cubes-train.tfrecord-00001-of-00002",
            "dataset_info.json",
            "features.json",
        ]
        back = RLDSDemos(tmp_path / "rlds")
        assert back.skipped == []
        assert back.instructions == demos.instructions
        keys = ["action", ("observation", "image"), ("observation", "state")]
        keys += [
            ("next", "reward"),
            ("next", "done"),
            ("next", "terminated"),
            "episode",
        ]
        for key in keys:
            assert torch.equal(back[:][key], demos[:][key]), key

    def test_features_as_tfds_describes_them(self, tmp_path):
        """Every type that both data sets have is described in the same words."""
        path = demo_files.write(tmp_path / "a.h5", (2,))
        target = write_rlds(ManiSkillDemos(path), tmp_path / "rlds")
        ours = json.loads((target / "features.json").read_text())
        theirs = json.loads((PROBE / "features.json").read_text())

        def steps(features):
            found = features["featuresDict"]["features"]["steps"]
            return found["sequence"]["feature"]["featuresDict"]["features"]

        assert ours["pythonClassName"] == theirs["pythonClassName"]
        for name in set(steps(theirs)) - {"observation"}:
            assert steps(ours)[name] == steps(theirs)[name], name
        picture = steps(ours)["observation"]["featuresDict"]["features"]["image"]
        wanted = steps(theirs)["observation"]["featuresDict"]["features"]["image"]
        wanted["image"]["shape"]["dimensions"] = ["4", "6", "3"]
        assert picture == wanted

    def test_refuses_to_overwrite(self, tmp_path):
        demos = ManiSkillDemos(demo_files.write(tmp_path / "a.h5"))
        write_rlds(demos, tmp_path / "rlds")
        with pytest.raises(FileExistsError, match="another version"):
            write_rlds(demos, tmp_path / "rlds")
        with pytest.raises(ValueError, match="three numbers"):
            write_rlds(demos, tmp_path / "rlds", version="2")
        with pytest.raises(ValueError, match="at least 1"):
            write_rlds(demos, tmp_path / "rlds", version="2.0.0", episodes_per_shard=0)


# What the training of OpenVLA and Octo does with a data set: the builder found by its
# name, steps left encoded, metadata beside them; and what everybody else does.
OPEN = """
import json, sys
import numpy as np
import tensorflow_datasets as tfds
folder, name = sys.argv[1:]
out = []
builder = tfds.builder(name, data_dir=folder)
encoded = builder.as_dataset(
    split="train", decoders={"steps": tfds.decode.SkipDecoding()}, shuffle_files=False
)
for plain, raw in zip(builder.as_dataset(split="train"), encoded):
    steps = list(plain["steps"])
    files = raw["steps"]["observation"]["image"].numpy()
    out.append({
        "action": [s["action"].numpy().tolist() for s in steps],
        "image": [s["observation"]["image"].numpy().tolist() for s in steps],
        "state": [s["observation"]["state"].numpy().tolist() for s in steps],
        "text": steps[0]["language_instruction"].numpy().decode(),
        "is_first": [bool(s["is_first"]) for s in steps],
        "is_last": [bool(s["is_last"]) for s in steps],
        "seed": int(plain["episode_metadata"]["episode_seed"]),
        "raw_action": raw["steps"]["action"].numpy().tolist(),
        "png": [bytes(file)[1:4].decode() for file in files],
    })
json.dump(out, open(folder + "/read.json", "w"))
"""


@pytest.mark.slow
@pytest.mark.skipif(
    TFDS_PYTHON is None,
    reason="needs TensorFlow Datasets: set TFDS_PYTHON to an interpreter that has it",
)
def test_opened_by_tensorflow_datasets(tmp_path):
    push = demo_files.write(tmp_path / "push.h5", (3, 5))
    pull = demo_files.write(
        tmp_path / "pull.h5", (2,), task_id="PullCube-v1", first_seed=7
    )
    demos = ManiSkillDemos([push, pull])
    folder = tmp_path / "rlds"
    write_rlds(demos, folder, name="cubes", episodes_per_shard=2)
    done = subprocess.run(
        [TFDS_PYTHON, "-c", OPEN, str(folder), "cubes"],
        capture_output=True,
        text=True,
        env={"PATH": os.environ["PATH"], "TF_CPP_MIN_LOG_LEVEL": "3"},
    )
    assert done.returncode == 0, done.stderr[-2000:]
    read = {e["seed"]: e for e in json.loads((folder / "read.json").read_text())}
    assert sorted(read) == [7, 100, 101]
    for i, info in enumerate(demos.episodes):
        rows, theirs = demos.episode(i), read[info.seed]
        assert theirs["text"] == info.instruction
        assert theirs["action"] == rows["action"].tolist() == theirs["raw_action"]
        pictures = rows["observation", "image"].permute(0, 2, 3, 1)
        assert theirs["image"] == pictures.tolist()
        assert theirs["state"] == rows["observation", "state"].tolist()
        assert theirs["is_first"] == [True] + [False] * (info.length - 1)
        assert theirs["is_last"] == [False] * (info.length - 1) + [True]
        assert theirs["png"] == ["PNG"] * info.length


if __name__ == "__main__":
    pytest.main([__file__])
