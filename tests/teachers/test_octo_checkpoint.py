# Copyright (c) the torchrl_rpd authors.
#
# This source code is licensed under the MIT license found in the
# LICENSE file in the root directory of this source tree.
"""Checkpoints of Octo are read whole, or refused with a reason."""

from __future__ import annotations

import copy
import hashlib
import json
import subprocess
import sys
from typing import ClassVar

import pytest
import torch
from octo_checkpoint import DATA, SHA256, STEP, recipe_arrays, write_checkpoint

from torchrl_rpd.teachers.octo import OctoTeacher, write_random_checkpoint
from torchrl_rpd.teachers.octo._checkpoint import choose_statistics, load_checkpoint
from torchrl_rpd.teachers.octo._config import OctoConfig
from torchrl_rpd.teachers.octo._model import OctoModel
from torchrl_rpd.teachers.octo._msgpack import read_arrays, write_arrays
from torchrl_rpd.teachers.octo._weights import array_shapes, fit, to_state_dict
from torchrl_rpd.teachers.octo.convert import convert, main
from torchrl_rpd.teachers.octo.random_checkpoint import random_config

msgpack = pytest.importorskip("msgpack")
pytest.importorskip("transformers")

CONFIG = json.loads((DATA / "config.json").read_text())


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    return write_checkpoint(tmp_path_factory.mktemp("octo"))


def tiny_config() -> OctoConfig:
    shapes = {name: tuple(array.shape) for name, array in recipe_arrays().items()}
    return fit(OctoConfig.from_json(CONFIG), shapes)


class TestArrays:
    def test_all_are_read_bit_for_bit(self, folder):
        file = folder / str(STEP) / "default" / "checkpoint"
        # The file is what flax and orbax wrote, so this is the original's format.
        assert hashlib.sha256(file.read_bytes()).hexdigest() == SHA256
        arrays, want = read_arrays(file), recipe_arrays()
        assert arrays.keys() == want.keys()
        assert len(arrays) == 126
        for name, array in arrays.items():
            assert array.dtype == torch.float32
            assert torch.equal(array, want[name]), name

    def test_large_arrays_come_in_pieces(self, tmp_path):
        array = torch.arange(30, dtype=torch.int32).reshape(2, 3, 5)
        write_arrays(tmp_path / "file", {"a/b": array}, max_chunk_bytes=28)
        # 28 bytes are 7 of the 30 numbers: five pieces, the last of 2.
        raw = msgpack.unpackb((tmp_path / "file").read_bytes())
        assert len(raw["a"]["b"]["chunks"]) == 5
        assert torch.equal(read_arrays(tmp_path / "file")["a/b"], array)

    @pytest.mark.parametrize(
        "array",
        [
            torch.tensor([1.5, -2.0], dtype=torch.bfloat16),
            torch.tensor([True, False]),
            torch.zeros(0, 3),
            torch.tensor(7, dtype=torch.uint8),
        ],
        ids=["bfloat16", "bool", "empty", "scalar"],
    )
    def test_dtypes_and_shapes(self, tmp_path, array):
        write_arrays(tmp_path / "file", {"x": array})
        read = read_arrays(tmp_path / "file")["x"]
        assert read.dtype == array.dtype
        assert read.shape == array.shape
        assert torch.equal(read, array)

    @pytest.mark.parametrize(
        ("content", "message"),
        [
            (b"\x81\xa1a", "no flax msgpack checkpoint"),
            (b"not msgpack at all", "no flax msgpack checkpoint"),
            (msgpack.packb({"a": "PLACEHOLDER://a"}), "PLACEHOLDER.*sharded"),
            (
                msgpack.packb({"a": msgpack.ExtType(3, b"")}),
                "extension 3 is not an array",
            ),
            (
                msgpack.packb(
                    {"a": msgpack.ExtType(1, msgpack.packb(([2], "float32", b"1234")))}
                ),
                "4 bytes for an array",
            ),
            (
                msgpack.packb(
                    {"a": msgpack.ExtType(1, msgpack.packb(([1], "object", b"1234")))}
                ),
                "'object' are not supported",
            ),
        ],
        ids=["truncated", "garbage", "sharded", "extension", "short", "object"],
    )
    def test_bad_files(self, tmp_path, content, message):
        (tmp_path / "checkpoint").write_bytes(content)
        with pytest.raises(ValueError, match=message):
            read_arrays(tmp_path / "checkpoint")


class TestAccounting:
    def test_every_array_is_used_once(self):
        arrays = recipe_arrays()
        state = to_state_dict(arrays, tiny_config())
        assert array_shapes(tiny_config()).keys() == arrays.keys()
        count = sum(array.numel() for array in arrays.values())
        assert sum(tensor.numel() for tensor in state.values()) == count

    @pytest.mark.parametrize(
        ("change", "message"),
        [
            (
                lambda a: a.pop("heads_action/diffusion_model/time_preprocess/kernel"),
                "missing: heads_action",
            ),
            (
                lambda a: a.update({"heads_value/bias": torch.zeros(1)}),
                "not used by any part of the model: heads_value/bias",
            ),
            (
                lambda a: a.update(
                    {"octo_transformer/obs_primary_projection/bias": torch.zeros(3)}
                ),
                r"obs_primary_projection/bias \(3,\), expected \(48,\)",
            ),
        ],
        ids=["missing", "left over", "shape"],
    )
    def test_misfits_are_named(self, change, message):
        arrays = dict(recipe_arrays())
        change(arrays)
        with pytest.raises(ValueError, match=message):
            to_state_dict(arrays, tiny_config())

    def test_camera_without_arrays_is_left_out(self, tmp_path):
        # Fine-tuned without a wrist camera: config.json still names it.
        write_checkpoint(tmp_path)
        arrays = {k: v for k, v in recipe_arrays().items() if "wrist" not in k}
        write_arrays(tmp_path / str(STEP) / "default" / "checkpoint", arrays)
        teacher = OctoTeacher.from_pretrained(tmp_path)
        assert list(teacher.model.stems) == ["primary"]
        with pytest.raises(ValueError, match="no wrist camera"):
            OctoTeacher.from_pretrained(tmp_path, wrist_image_key="wrist")

    def test_kernels_are_standardised(self):
        state = to_state_dict(recipe_arrays(), tiny_config())
        kernel = state["stems.primary.convs.1.weight"]
        assert kernel.shape == (96, 32, 3, 3)
        assert kernel.mean((1, 2, 3)).abs().max() < 1e-6
        spread = kernel.std((1, 2, 3), correction=0)
        # The raw one has a standard deviation of 0.06: 0.06 / (0.06 + 1e-5).
        torch.testing.assert_close(spread, torch.full((96,), 0.9998), rtol=0, atol=1e-4)


class TestPublishedSizes:
    """octo-small-1.5 and octo-base-1.5, built without memory."""

    # Counted in the published octo-small-1.5: 136,670,604 in all, 27,042,060 without
    # T5, in 267 arrays. octo-base-1.5: 27,042,060 with the transformer's width doubled
    # gives the 93M of Octo's README (see the sum below).
    def test_small(self):
        config = random_config("small")
        shapes = array_shapes(config)
        text = {name: shape for name, shape in shapes.items() if "hf_model" in name}
        assert len(shapes) - len(text) == 267
        assert self.count(text) == 109_628_544
        assert self.count(shapes) == 136_670_604
        self.check_modules(config, 136_670_604)

    def test_base(self):
        config = random_config("base")
        d, mlp, layers = 768, 3072, 12
        block = (
            4 * d * d + 4 * d + 2 * d * mlp + mlp + d + 4 * d
        )  # attention, MLP, norms
        transformer = layers * block + 2 * d
        stems = 2 * 1_058_048
        projections = 2 * (512 * d + d) + 768 * d + d
        positions = 10 * (256 + 64 + 1) * d + 16 * d
        head = (
            *(16, 32 * 64 + 64, 64 * 32 + 32),  # time
            (32 + d + 28) * 256 + 256,
            3 * (2 * 256 + 256 * 1024 + 1024 + 1024 * 256 + 256),
            256 * 28 + 28,
        )
        policy = transformer + stems + projections + positions + sum(head)
        # Octo's README: 93M.
        assert round(policy / 1e6) == 93
        assert self.count(array_shapes(config)) == policy + 109_628_544
        self.check_modules(config, policy + 109_628_544)

    @staticmethod
    def count(shapes) -> int:
        return sum(torch.Size(shape).numel() for shape in shapes.values())

    @staticmethod
    def check_modules(config, count):
        with torch.device("meta"):
            model = OctoModel(config)
            arrays = {
                name: torch.empty(shape) for name, shape in array_shapes(config).items()
            }
            state = to_state_dict(arrays, config)
        assert sum(parameter.numel() for parameter in model.parameters()) == count
        tied = "text_encoder.encoder.embed_tokens.weight"
        shapes = {k: v.shape for k, v in model.state_dict().items() if k != tied}
        assert {k: v.shape for k, v in state.items()} == shapes


def _set(path, value):
    def change(config):
        *parents, leaf = path.split("/")
        node = config
        for parent in parents:
            node = node[parent]
        node[leaf] = value

    return change


class TestRefusals:
    @pytest.mark.parametrize(
        ("change", "message"),
        [
            (_set("model/use_correct_attention", False), "use_correct_attention=False"),
            (_set("model/repeat_task_tokens", False), "repeat_task_tokens=False"),
            (
                _set("model/heads/action/kwargs/use_map", True),
                "heads.action.use_map=True",
            ),
            (_set("model/heads/action/name", "L1ActionHead"), "L1ActionHead"),
            (_set("model/heads/action/name", "MSEActionHead"), "MSEActionHead"),
            (_set("model/readouts", {"action": 4}), "readouts={'action': 4}"),
            (
                _set(
                    "model/observation_tokenizers/primary/kwargs/use_token_learner",
                    True,
                ),
                "observation_tokenizers.primary.use_token_learner=True",
            ),
            (
                _set(
                    "model/observation_tokenizers/primary/kwargs/task_film_keys",
                    ["language_instruction"],
                ),
                "primary.task_film_keys",
            ),
            (
                _set(
                    "model/observation_tokenizers/wrist/kwargs/task_stack_keys",
                    ["image_primary"],
                ),
                r"wrist stacks \['image_wrist'\] and the goals \['image_primary'\]",
            ),
            (
                _set(
                    "model/observation_tokenizers/primary/kwargs/encoder/name",
                    "ResNet26FILM",
                ),
                "encoder=ResNet26FILM",
            ),
            (
                _set(
                    "model/observation_tokenizers/primary/kwargs/encoder/kwargs",
                    {"use_film": True},
                ),
                "encoder.use_film=True",
            ),
            (
                _set(
                    "model/observation_tokenizers/proprio",
                    {"name": "LowdimObsTokenizer", "kwargs": {}},
                ),
                "observation_tokenizers.proprio",
            ),
            (
                _set("model/task_tokenizers/language/kwargs/encoder", "distilbert"),
                "distilbert",
            ),
            (
                _set("model/transformer_kwargs/add_position_embedding", True),
                "add_position",
            ),
            (_set("text_processor/name", "MuseEmbedding"), "MuseEmbedding"),
            (
                _set(
                    "dataset_kwargs",
                    {"x": [{"action_proprio_normalization_type": "bounds"}]},
                ),
                "action_proprio_normalization_type",
            ),
        ],
        ids=lambda value: value if isinstance(value, str) else "",
    )
    def test_by_name(self, change, message):
        config = copy.deepcopy(CONFIG)
        change(config)
        with pytest.raises(ValueError, match=message):
            OctoConfig.from_json(config)

    def test_all_at_once(self):
        config = copy.deepcopy(CONFIG)
        config["model"]["use_correct_attention"] = False
        config["model"]["repeat_task_tokens"] = False
        with pytest.raises(ValueError, match=r"use_correct.*repeat_task_tokens"):
            OctoConfig.from_json(config)

    def test_old_name_of_the_horizon(self):
        config = copy.deepcopy(CONFIG)
        head = config["model"]["heads"]["action"]["kwargs"]
        head["pred_horizon"] = head.pop("action_horizon")
        assert OctoConfig.from_json(config).head.action_horizon == 4


class TestFolder:
    def test_last_step_unless_told(self, tmp_path):
        write_checkpoint(tmp_path)
        arrays = {k: v.clone() for k, v in recipe_arrays().items()}
        arrays["octo_transformer/obs_primary_projection/bias"].zero_()
        write_arrays(tmp_path / "999" / "default" / "checkpoint", arrays)
        assert load_checkpoint(tmp_path).step == 1000
        early = load_checkpoint(tmp_path, 999)
        assert early.step == 999
        assert not early.state["projections.primary.bias"].any()
        with pytest.raises(FileNotFoundError, match=r"\[999, 1000\], not step 5"):
            load_checkpoint(tmp_path, 5)

    def test_sharded_layout(self, tmp_path):
        write_checkpoint(tmp_path)
        (tmp_path / str(STEP) / "default" / "checkpoint").unlink()
        (tmp_path / str(STEP) / "default" / "manifest.ocdbt").touch()
        with pytest.raises(FileNotFoundError, match=r"manifest\.ocdbt.*OCDBT"):
            load_checkpoint(tmp_path)

    def test_no_checkpoint(self, tmp_path):
        with pytest.raises(FileNotFoundError, match=r"config\.json"):
            load_checkpoint(tmp_path)
        for name in ("config.json", "dataset_statistics.json"):
            (tmp_path / name).write_text((DATA / name).read_text())
        with pytest.raises(FileNotFoundError, match="no saved step"):
            load_checkpoint(tmp_path)


class TestStatistics:
    FLAT: ClassVar = json.loads((DATA / "dataset_statistics.json").read_text())
    KEYED: ClassVar = {
        "bridge": FLAT,
        "viola": {**FLAT, "action": {**FLAT["action"], "n": 1}},
    }

    def test_flat(self):
        assert choose_statistics(self.FLAT, None) == self.FLAT["action"]
        with pytest.raises(ValueError, match="have no keys"):
            choose_statistics(self.FLAT, "viola")

    def test_keyed(self):
        assert choose_statistics(self.KEYED, "viola")["n"] == 1
        for wrong in (None, "kuka"):
            with pytest.raises(ValueError, match=r"\['bridge', 'viola'\]"):
                choose_statistics(self.KEYED, wrong)

    def test_only_one_key(self):
        assert choose_statistics({"a": self.FLAT}, None) == self.FLAT["action"]

    def test_unnorm_key_reaches_the_actions(self, tmp_path):
        write_checkpoint(tmp_path)
        other = copy.deepcopy(self.FLAT)
        other["action"]["mean"] = [m + 1 for m in other["action"]["mean"]]
        file = tmp_path / "dataset_statistics.json"
        file.write_text(json.dumps({"a": self.FLAT, "b": other}))
        images = torch.zeros(1, 1, 256, 256, 3, dtype=torch.uint8)
        ids = torch.zeros(1, 16, dtype=torch.int64)
        a, b = (
            OctoTeacher.from_pretrained(tmp_path, unnorm_key=key).sample_chunk(
                images, ids, ids + 1, torch.ones(1, 1)
            )
            for key in "ab"
        )
        # The gripper, the last of seven, is not un-normalised.
        want = torch.tensor([1.0, 1, 1, 1, 1, 1, 0]).expand(1, 4, 7)
        torch.testing.assert_close(b - a, want, rtol=0, atol=1e-5)


class TestCopy:
    def test_same_answers_without_msgpack(self, folder, tmp_path, monkeypatch):
        convert(folder, tmp_path / "copy")
        # None: importing it raises.
        monkeypatch.setitem(sys.modules, "msgpack", None)
        copied = load_checkpoint(tmp_path / "copy")
        monkeypatch.undo()
        original = load_checkpoint(folder)
        assert copied.config == original.config
        assert (copied.step, copied.statistics) == (STEP, original.statistics)
        assert copied.state.keys() == original.state.keys()
        for name, tensor in copied.state.items():
            assert torch.equal(tensor, original.state[name]), name

    def test_missing_msgpack_names_the_extra(self, folder, monkeypatch):
        monkeypatch.setitem(sys.modules, "msgpack", None)
        with pytest.raises(ImportError, match=r"torchrl_rpd\[octo\]"):
            load_checkpoint(folder)

    def test_command(self, tmp_path):
        source = write_random_checkpoint(tmp_path / "source", layout="msgpack")
        main([str(source), str(tmp_path / "copy")])
        assert (tmp_path / "copy" / "tokenizer.json").exists()
        teacher = OctoTeacher.from_pretrained(tmp_path / "copy", instruction="push")
        assert teacher.chunk_size == 4
        with pytest.raises(FileExistsError, match="already"):
            main([str(source), str(tmp_path / "copy")])
        with pytest.raises(FileNotFoundError, match="holds step 1000, not step 3"):
            load_checkpoint(tmp_path / "copy", 3)

    def test_foreign_safetensors(self, folder, tmp_path):
        from safetensors.torch import save_file

        convert(folder, tmp_path / "copy")
        save_file({"x": torch.zeros(1)}, str(tmp_path / "copy" / "model.safetensors"))
        with pytest.raises(ValueError, match="format None"):
            load_checkpoint(tmp_path / "copy")


def test_import_is_light():
    code = (
        "import sys, torchrl_rpd.teachers.octo;"
        "print([m for m in ('transformers', 'tokenizers', 'msgpack', 'PIL')"
        " if m in sys.modules])"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True)
    assert done.stdout.strip() == "[]", done.stderr


if __name__ == "__main__":
    pytest.main([__file__])
