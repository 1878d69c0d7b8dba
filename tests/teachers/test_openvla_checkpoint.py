# Copyright (c) the torchrl_rpd authors.
#
# This source code is licensed under the MIT license found in the
# LICENSE file in the root directory of this source tree.
"""Loading: layout, names, refusals, memory."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

import openvla_tiny as tiny
import pytest
import torch

pytest.importorskip("transformers")
pytest.importorskip("tokenizers")

from torchrl_rpd.teachers.openvla import OpenVLATeacher, write_tiny_checkpoint
from torchrl_rpd.teachers.openvla._config import OpenVLAConfig, read_config
from torchrl_rpd.teachers.openvla._model import OpenVLAModel
from torchrl_rpd.teachers.openvla._vision import unused_tensors

ROOT = Path(__file__).parents[2]


@pytest.fixture
def folder(tmp_path):
    return tiny.write_checkpoint(tmp_path / "openvla")


def save(folder: Path, tensors: dict[str, torch.Tensor]) -> None:
    from safetensors.torch import save_file

    save_file(tensors, folder / "model.safetensors")


def shard(folder: Path, names: list[list[str]]) -> None:
    """Replaces the single file by shards with the given tensors, and their index."""
    from safetensors.torch import save_file

    (folder / "model.safetensors").unlink()
    weight_map = {}
    for i, part in enumerate(names, 1):
        file = f"model-{i:05}-of-{len(names):05}.safetensors"
        save_file({name: tiny.weights()[name] for name in part}, folder / file)
        weight_map.update(dict.fromkeys(part, file))
    index = {"metadata": {}, "weight_map": weight_map}
    (folder / "model.safetensors.index.json").write_text(json.dumps(index))


class TestPublishedLayout:
    """The full-size network, on the meta device, against names written out here."""

    @staticmethod
    def block(prefix: str, dim: int, mlp: int, scale: bool) -> dict[str, tuple]:
        shapes = {
            "norm1.weight": (dim,),
            "norm1.bias": (dim,),
            "attn.qkv.weight": (3 * dim, dim),
            "attn.qkv.bias": (3 * dim,),
            "attn.proj.weight": (dim, dim),
            "attn.proj.bias": (dim,),
            "norm2.weight": (dim,),
            "norm2.bias": (dim,),
            "mlp.fc1.weight": (mlp, dim),
            "mlp.fc1.bias": (mlp,),
            "mlp.fc2.weight": (dim, mlp),
            "mlp.fc2.bias": (dim,),
        }
        if scale:
            shapes |= {"ls1.scale_factor": (dim,), "ls2.scale_factor": (dim,)}
        return {f"{prefix}.{name}": shape for name, shape in shapes.items()}

    def published(self) -> dict[str, tuple]:
        shapes: dict[str, tuple] = {}
        dino, siglip = "vision_backbone.featurizer", "vision_backbone.fused_featurizer"
        for tower, dim in ((dino, 1024), (siglip, 1152)):
            shapes[f"{tower}.pos_embed"] = (1, 256, dim)
            shapes[f"{tower}.patch_embed.proj.weight"] = (dim, 3, 14, 14)
            shapes[f"{tower}.patch_embed.proj.bias"] = (dim,)
            shapes[f"{tower}.norm.weight"] = shapes[f"{tower}.norm.bias"] = (dim,)
        shapes[f"{dino}.cls_token"] = (1, 1, 1024)
        shapes[f"{dino}.reg_token"] = (1, 4, 1024)
        for i in range(24):
            shapes |= self.block(f"{dino}.blocks.{i}", 1024, 4096, scale=True)
        for i in range(27):
            shapes |= self.block(f"{siglip}.blocks.{i}", 1152, 4304, scale=False)
        pool = f"{siglip}.attn_pool"
        shapes[f"{pool}.latent"] = (1, 1, 1152)
        for name, out, into in (
            ("q", 1152, 1152),
            ("kv", 2304, 1152),
            ("proj", 1152, 1152),
            ("mlp.fc1", 4304, 1152),
            ("mlp.fc2", 1152, 4304),
        ):
            shapes[f"{pool}.{name}.weight"] = (out, into)
            shapes[f"{pool}.{name}.bias"] = (out,)
        shapes[f"{pool}.norm.weight"] = shapes[f"{pool}.norm.bias"] = (1152,)
        for name, out, into in (
            ("fc1", 8704, 2176),
            ("fc2", 4096, 8704),
            ("fc3", 4096, 4096),
        ):
            shapes[f"projector.{name}.weight"] = (out, into)
            shapes[f"projector.{name}.bias"] = (out,)
        llama = "language_model.model"
        shapes[f"{llama}.embed_tokens.weight"] = (32064, 4096)
        shapes[f"{llama}.norm.weight"] = (4096,)
        shapes["language_model.lm_head.weight"] = (32064, 4096)
        for i in range(32):
            layer = f"{llama}.layers.{i}"
            for name in "qkvo":
                shapes[f"{layer}.self_attn.{name}_proj.weight"] = (4096, 4096)
            for name in ("gate", "up"):
                shapes[f"{layer}.mlp.{name}_proj.weight"] = (11008, 4096)
            shapes[f"{layer}.mlp.down_proj.weight"] = (4096, 11008)
            for name in ("input_layernorm", "post_attention_layernorm"):
                shapes[f"{layer}.{name}.weight"] = (4096,)
        return shapes

    def test_names_and_shapes(self):
        published = self.published()
        # 343 + 342 tensors of the towers, 6 of the projector, 32 * 9 + 3 of Llama
        assert len(published) == 982
        unused = unused_tensors(OpenVLAConfig().towers)
        used = {k: v for k, v in published.items() if not k.startswith(unused)}
        with torch.device("meta"):
            model = OpenVLAModel(OpenVLAConfig())
        assert {k: tuple(v.shape) for k, v in model.state_dict().items()} == used
        # nothing hides outside of the state_dict
        assert not list(model.buffers())

    def test_sizes(self):
        with torch.device("meta"):
            model = OpenVLAModel(OpenVLAConfig())

        def millions(module):
            return sum(p.numel() for p in module.parameters()) / 1e6

        towers = model.vision_backbone
        # One block of 12.6 M and 15.2 M less than the towers of 303.2 M and 427.7 M,
        # and no pooling head (15.2 M).
        assert millions(towers.featurizer) == pytest.approx(290.6, abs=0.05)
        assert millions(towers.fused_featurizer) == pytest.approx(397.2, abs=0.05)
        assert millions(model) == pytest.approx(7498.2, abs=0.05)

    def test_llama_settings_are_pinned(self):
        with torch.device("meta"):
            config = OpenVLAModel(OpenVLAConfig()).language_model.config
        assert config.rms_norm_eps == 1e-6
        assert config.num_key_value_heads == 32
        assert config.hidden_act == "silu"
        assert not config.attention_bias
        assert not config.tie_word_embeddings
        assert OpenVLAConfig().llama["rope_theta"] == 10000.0
        assert config._attn_implementation == "sdpa"


class TestWeights:
    def test_shards_give_the_same(self, folder):
        whole = tiny.load(folder).model.state_dict()
        names = sorted(tiny.weights())
        shard(folder, [names[::3], names[1::3], names[2::3]])
        sharded = tiny.load(folder).model.state_dict()
        assert whole.keys() == sharded.keys()
        assert all(torch.equal(whole[name], sharded[name]) for name in whole)

    def test_are_those_of_the_file(self, folder):
        model = tiny.load(folder).model
        for name, tensor in model.state_dict().items():
            assert torch.equal(tensor, tiny.weights()[name])

    def test_let_go_of_the_file(self, folder):
        teacher = tiny.load(folder)
        (folder / "model.safetensors").write_bytes(b"")
        weights = teacher.model.language_model.lm_head.weight
        assert torch.equal(weights, tiny.weights()["language_model.lm_head.weight"])

    def test_dtype(self, folder):
        assert tiny.load(folder)._weight.dtype == torch.float32  # torch_dtype
        tiny.edit(folder / "config.json", torch_dtype="bfloat16")
        assert tiny.load(folder)._weight.dtype == torch.bfloat16
        assert tiny.load(folder, dtype=torch.float64)._weight.dtype == torch.float64

    def test_frozen(self, folder):
        teacher = tiny.load(folder)
        assert not teacher.training
        assert not any(p.requires_grad for p in teacher.parameters())

    def test_unused_ones_are_not_read(self, folder):
        tensors = dict(tiny.weights())
        prefixes = unused_tensors(read_config(folder).towers)
        unused = [name for name in tensors if name.startswith(prefixes)]
        # two last blocks of 14 and 12, two norms of 2, a pooling head of 13
        assert len(unused) == 14 + 12 + 2 * 2 + 13
        for name in unused:
            tensors[name] = torch.zeros(1)  # of a shape that fits nowhere
        save(folder, tensors)
        tiny.load(folder)
        save(folder, {k: v for k, v in tensors.items() if k not in unused})
        tiny.load(folder)

    def test_missing_and_unknown_names(self, folder):
        tensors = dict(tiny.weights())
        tensors["language_model.lora_A"] = tensors.pop("projector.fc1.bias")
        save(folder, tensors)
        with pytest.raises(ValueError, match=r"1 missing.*fc1\.bias.*1 unknown.*lora"):
            tiny.load(folder)

    def test_wrong_shape(self, folder):
        tensors = dict(tiny.weights())
        tensors["projector.fc1.bias"] = torch.zeros(3)
        save(folder, tensors)
        with pytest.raises(ValueError, match=r"projector.fc1.bias of shape \[3\]"):
            tiny.load(folder)

    def test_missing_shard(self, folder):
        names = sorted(tiny.weights())
        shard(folder, [names[::2], names[1::2]])
        (folder / "model-00002-of-00002.safetensors").unlink()
        with pytest.raises(FileNotFoundError, match="model-00002-of-00002"):
            tiny.load(folder)

    def test_pickled_weights_are_not_read(self, folder):
        (folder / "model.safetensors").rename(folder / "pytorch_model.bin")
        with pytest.raises(FileNotFoundError, match="safetensors alone"):
            tiny.load(folder)


class TestRefusals:
    @pytest.mark.parametrize(
        ("name", "value"),
        [
            ("model_type", "prismatic"),
            ("arch_specifier", "no-align+gelu-mlp"),
            ("vision_backbone_id", "siglip-vit-so400m"),
            ("timm_model_ids", ["vit_so400m_patch14_siglip_224"]),
            ("timm_override_act_layers", ["quick_gelu", None]),
            ("use_fused_vision_backbone", False),
            ("image_resize_strategy", "letterbox"),
            ("image_sizes", [384, 384]),
            ("llm_backbone_id", "vicuna-v15-7b"),
            ("n_action_bins", 128),
        ],
    )
    def test_other_architecture(self, folder, name, value):
        tiny.edit(folder / "config.json", **{name: value})
        with pytest.raises(ValueError) as error:
            tiny.load(folder)
        assert repr(value) in str(error.value)
        assert name in str(error.value)

    def test_nothing_said(self, folder):
        tiny.edit(folder / "config.json", vision_backbone_id=None)
        with pytest.raises(ValueError, match="has nothing for 'vision_backbone_id'"):
            tiny.load(folder)

    @pytest.mark.parametrize(
        ("name", "value"),
        [
            ("interpolations", ["bilinear", "bicubic"]),
            ("input_sizes", [[3, 384, 384], [3, 224, 224]]),
            ("tvf_do_letterbox", True),
        ],
    )
    def test_other_images(self, folder, name, value):
        tiny.edit(folder / "preprocessor_config.json", **{name: value})
        with pytest.raises(ValueError, match=r"preprocessor_config\.json"):
            tiny.load(folder)

    @pytest.mark.parametrize(
        ("name", "value"),
        [
            ("model_type", "mistral"),
            ("rope_scaling", {"type": "linear", "factor": 2.0}),
            ("num_key_value_heads", 2),
            ("head_dim", 8),
            ("hidden_act", "gelu"),
            ("attention_bias", True),
            ("rope_theta", 500000.0),
            ("sliding_window", 4096),
        ],
    )
    def test_other_language_model(self, folder, name, value):
        text = json.loads((folder / "config.json").read_text())["text_config"]
        tiny.edit(folder / "config.json", text_config={**text, name: value})
        with pytest.raises(ValueError, match=name):
            tiny.load(folder)

    def test_other_prompt(self, folder):
        renamed = folder.rename(folder.with_name("openvla-v01-7b"))
        with pytest.raises(ValueError, match="v01"):
            tiny.load(renamed)

    def test_other_prompt_under_another_name(self, folder, monkeypatch):
        # A snapshot of the Hub lies in a folder that is named by its commit.
        from torchrl_rpd.teachers.openvla import _teacher

        monkeypatch.setattr(_teacher, "resolve_checkpoint", lambda *a, **k: folder)
        with pytest.raises(ValueError, match="v01"):
            OpenVLATeacher.from_pretrained("openvla/openvla-v01-7b")

    @pytest.mark.parametrize(
        "name", ["config.json", "preprocessor_config.json", "tokenizer.json"]
    )
    def test_missing_file(self, folder, name):
        (folder / name).unlink()
        with pytest.raises(FileNotFoundError, match=name):
            tiny.load(folder)


OTHER = {"action": {"q01": [-2.0] * 7, "q99": [2.0] * 7, "mask": [True] * 7}}


class TestStatistics:
    def test_file_wins_over_config(self, folder):
        tiny.edit(folder / "config.json", norm_stats={"other": OTHER})
        tiny.load(folder, unnorm_key="maniskill_human:7.0.0")
        (folder / "dataset_statistics.json").unlink()
        assert tiny.load(folder).decoder.tokenizer.norm_low.tolist() == [-2.0] * 7

    def test_several_must_be_chosen_from(self, folder):
        tiny.edit(folder / "dataset_statistics.json", other=OTHER)
        with pytest.raises(ValueError, match=r"\['maniskill_human:7.0.0', 'other'\]"):
            tiny.load(folder)
        teacher = tiny.load(folder, unnorm_key="other")
        assert teacher.decoder.tokenizer.norm_high.tolist() == [2.0] * 7

    def test_unknown_lists_what_there_is(self, folder):
        with pytest.raises(KeyError, match=r"maniskill_human:7\.0\.0"):
            tiny.load(folder, unnorm_key="bridge_orig")

    def test_none_at_all(self, folder):
        (folder / "dataset_statistics.json").write_text("{}")
        with pytest.raises(ValueError, match="no statistics"):
            tiny.load(folder)

    def test_not_usable(self, folder):
        broken = {"action": {**OTHER["action"], "mask": [True] * 6}}
        (folder / "dataset_statistics.json").write_text(json.dumps({"a": broken}))
        with pytest.raises(ValueError, match="'mask': 6"):
            tiny.load(folder)


class TestTinyCheckpoint:
    def test_loads_and_depends_on_the_image(self, tmp_path):
        teacher = OpenVLATeacher.from_pretrained(write_tiny_checkpoint(tmp_path))
        black, white = torch.zeros(2, 3, 64, 64, dtype=torch.uint8).unbind()
        tokens = teacher.tokens(torch.stack([black, white + 255]), ["push"] * 2).tokens
        assert (tokens >= 31744).all()
        assert (tokens < 32000).all()
        assert not torch.equal(*tokens)

    def test_seed(self, tmp_path):
        heads = [
            OpenVLATeacher.from_pretrained(
                write_tiny_checkpoint(tmp_path / str(i), seed=seed)
            )._weight
            for i, seed in enumerate((0, 0, 1))
        ]
        assert torch.equal(heads[0], heads[1])
        assert not torch.equal(heads[0], heads[2])


def test_import_needs_no_transformers():
    code = (
        "import sys\n"
        "import torchrl_rpd.teachers.openvla\n"
        "for name in ('transformers', 'tokenizers', 'huggingface_hub', 'PIL'):\n"
        "    assert name not in sys.modules, name\n"
    )
    environment = dict(os.environ, PYTHONPATH=str(ROOT))
    subprocess.run([sys.executable, "-c", code], env=environment, check=True)


def test_says_which_extra_is_missing(folder, monkeypatch):
    monkeypatch.setitem(sys.modules, "tokenizers", None)
    with pytest.raises(ImportError, match=r"torchrl_rpd\[openvla\]"):
        tiny.load(folder)


MEASURE_LOADING = """
import json, re, sys, warnings
from pathlib import Path
import torch
from torchrl_rpd.teachers.openvla import OpenVLATeacher
warnings.simplefilter("ignore")
folder, warm_up = map(Path, sys.argv[1:3])
options = {} if sys.argv[3] == "as saved" else {"dtype": getattr(torch, sys.argv[3])}
OpenVLATeacher.from_pretrained(warm_up)  # imports
def memory(entry):  # (getrusage counts what the parent of this process has used)
    status = Path("/proc/self/status").read_text()
    return 1024 * int(re.search(entry + r":\\s+(\\d+) kB", status)[1])
before = memory("VmRSS")
teacher = OpenVLATeacher.from_pretrained(folder, **options)
peak = memory("VmHWM")
model = sum(p.numel() * p.element_size() for p in teacher.parameters())
print(json.dumps({"beyond": peak - before - model, "model": model}))
"""


@pytest.mark.skipif(
    not Path("/proc/self/status").exists(), reason="reads the memory from /proc"
)
@pytest.mark.parametrize(
    "dtype", ["as saved", pytest.param("float32", marks=pytest.mark.slow)]
)
def test_peak_memory(tmp_path, dtype):
    """Beside the model itself, never more than 1.15 times the largest shard."""
    from safetensors.torch import save_file

    from torchrl_rpd.teachers.openvla._tiny import random_model

    folder = write_tiny_checkpoint(tmp_path / "large")
    (folder / "model.safetensors").unlink()
    text = json.loads((folder / "config.json").read_text())["text_config"]
    text |= {"hidden_size": 768, "intermediate_size": 2048, "num_hidden_layers": 6}
    tiny.edit(folder / "config.json", text_config=text, torch_dtype="bfloat16")
    model = random_model(read_config(folder), dtype=torch.bfloat16)
    # Three shards, filled one after the other as save_pretrained does.
    tensors, files, sizes = model.state_dict(), {}, [0, 0, 0]
    for name, tensor in tensors.items():
        i = sizes.index(min(sizes))
        files[name] = f"model-{i}.safetensors"
        sizes[i] += tensor.numel() * tensor.element_size()
    for file in set(files.values()):
        save_file({n: tensors[n] for n in files if files[n] == file}, folder / file)
    index = {"weight_map": files}
    (folder / "model.safetensors.index.json").write_text(json.dumps(index))
    assert max(sizes) > 45e6  # so that a few MB of anything else do not matter

    warm_up = write_tiny_checkpoint(tmp_path / "small")
    done = subprocess.run(
        [sys.executable, "-c", MEASURE_LOADING, str(folder), str(warm_up), dtype],
        env=dict(os.environ, PYTHONPATH=str(ROOT)),
        capture_output=True,
        text=True,
    )
    assert done.returncode == 0, done.stderr[-2000:]
    measured = json.loads(done.stdout)
    assert measured["model"] == sum(sizes) * (2 if dtype == "float32" else 1)
    assert measured["beyond"] <= 1.15 * max(sizes), (measured, sizes)


if __name__ == "__main__":
    pytest.main([__file__])
