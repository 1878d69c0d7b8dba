# Copyright (c) the torchrl_rpd authors.
#
# This source code is licensed under the MIT license found in the
# LICENSE file in the root directory of this source tree.
"""OpenVLA is trained on what it decodes, and comes back from disk as it was."""

from __future__ import annotations

import copy
import json
import sys
import warnings

import pytest
import torch
from finetune_data import TEXTS, buffer, demonstrations
from openvla_tiny import INSTRUCTIONS, expected, images, weights, write_checkpoint
from tensordict import NonTensorStack, TensorDict

from torchrl_rpd.finetune import (
    OpenVLATokenLoss,
    accumulate,
    action_statistics,
    add_lora,
    export_openvla,
    load_openvla,
    merged_weight,
)
from torchrl_rpd.teachers.openvla import OpenVLATeacher

pytest.importorskip("transformers")
pytest.importorskip("tokenizers")

KEY = "my_demos"
# Of the recorded checkpoint: its actions are worked out by hand below.
STATISTICS = {
    "action": {
        "q01": [-1.0, -0.5, 0.0, -1.0, -1.0, -1.0, -1.0],
        "q99": [1.0, 0.5, 2.0, 1.0, 1.0, 1.0, 1.0],
        "mask": [True] * 6 + [False],
    }
}


def trained(module) -> dict[str, torch.Tensor]:
    return {n: p for n, p in module.named_parameters() if p.requires_grad}


def gradients(module) -> dict[str, torch.Tensor]:
    return {n: p.grad.clone() for n, p in trained(module).items() if p.grad is not None}


@pytest.fixture(scope="module")
def base(tmp_path_factory):
    return write_checkpoint(tmp_path_factory.mktemp("openvla") / "base")


@pytest.fixture(scope="module")
def data():
    return demonstrations(4)


def adapted(base, data, **kwargs) -> OpenVLATokenLoss:
    pytest.importorskip("peft")
    torch.manual_seed(1)
    teacher = load_openvla(base, action_statistics(data["action"]))
    add_lora(teacher, rank=8, **kwargs)
    return OpenVLATokenLoss(teacher)


@pytest.fixture(scope="module")
def memorised(base, data):
    """Adapters trained on four frames, and the metrics of every step."""
    loss = adapted(base, data)
    loss.train()
    before = {n: p.clone() for n, p in loss.named_parameters() if not p.requires_grad}
    parameters = list(trained(loss).values())
    optimizer = torch.optim.AdamW(parameters, lr=6e-3, weight_decay=0.0)
    demos = buffer(data, 4)
    history = []
    for _ in range(45):
        history.append(accumulate(loss, demos.sample()))
        torch.nn.utils.clip_grad_norm_(parameters, 1.0)
        optimizer.step()
        optimizer.zero_grad()
    return loss.eval(), torch.stack(history), before


def frames(data) -> TensorDict:
    return data.select(("observation", "image"), "language_instruction").clone()


class TestLoss:
    def test_logits_are_those_of_the_original(self, base):
        # The recorded logits stand before each greedy token: teacher forcing with
        # these tokens gives them again, in a batch of different prompts.
        loss = OpenVLATokenLoss(load_openvla(base, STATISTICS))
        teacher = loss.teacher
        with torch.no_grad():
            pixels = teacher.pixels(images())
            logits = loss._logits(pixels, INSTRUCTIONS, expected()["tokens"].long())
        assert logits.shape == (6, 8, 32064)
        found = logits[:, :7, 31744:32000]
        torch.testing.assert_close(
            found, expected()["action_logits"], atol=2e-4, rtol=0
        )

    def test_mean_over_tokens_and_the_end(self, base):
        loss = OpenVLATokenLoss(load_openvla(base, STATISTICS))
        tokens = expected()["tokens"].long()
        # The inverse of the tokens: bin centres, in the statistics' units.
        actions = loss.teacher.decoder(tokens)
        rows = TensorDict(
            {
                "observation": {"image": images()},
                "language_instruction": NonTensorStack(*INSTRUCTIONS),
                "action": actions,
            },
            [6],
        )
        with torch.no_grad():
            found = loss(rows)
            logits = loss._logits(
                loss.teacher.pixels(images()), INSTRUCTIONS, tokens
            ).double()
        labels = torch.cat([tokens, torch.full((6, 1), 2)], 1)  # </s> is 2
        chosen = logits.gather(2, labels.unsqueeze(-1)).squeeze(-1)
        by_hand = (logits.exp().sum(-1).log() - chosen).mean()
        torch.testing.assert_close(found["loss_tokens"].double(), by_hand)
        # These tokens are the most probable action; not all of the whole vocabulary.
        share = (logits[:, :7].argmax(-1) == tokens).double().mean()
        torch.testing.assert_close(found["token_accuracy"].double(), share)

    def test_actions_become_the_tokens_that_decode_to_them(self, base):
        teacher = load_openvla(base, STATISTICS)
        encode = teacher.decoder.tokenizer.encode
        # Dimension 1 has [-0.5, 0.5]: 0.25 is 0.5 in [-1, 1]. Bin edges are
        # -1 + 2 i / 255: 0.5 lies behind i = 191 (0.498), so 192 edges are below and
        # the id is 32000 - 192 = 31808. Dimension 2 has [0, 2]: 5 is clipped to 1, the
        # 256th edge: 31744. Dimension 0: -1 is the first edge: 31999. The gripper is
        # taken as it is: 0 lies behind i = 127 (-0.0039): 128 edges, 31872.
        action = torch.tensor([[-1.0, 0.25, 5.0, 0.0, 0.0, 0.0, 0.0]])
        assert encode(action)[0, [0, 1, 2, 6]].tolist() == [31999, 31808, 31744, 31872]
        ids = torch.arange(31745, 32000).unsqueeze(1).expand(-1, 7)
        assert torch.equal(encode(teacher.decoder(ids)), ids)

    def test_rows_do_not_see_each_other(self, base, data):
        loss = OpenVLATokenLoss(load_openvla(base, STATISTICS))
        tokens = torch.full((2, 7), 31900)
        pixels = loss.teacher.pixels(data["observation", "image"][:2])
        with torch.no_grad():
            both = loss._logits(pixels, list(TEXTS), tokens)
            alone = loss._logits(pixels[:1], [TEXTS[0]], tokens[:1])
        # The shorter prompt is padded beside the longer one.
        torch.testing.assert_close(both[:1], alone, atol=1e-4, rtol=0)


class TestGradients:
    def test_parts_add_up_to_the_whole(self, base, data):
        loss = adapted(base, data)
        sample = buffer(data, 4).sample()
        whole = accumulate(loss, sample)
        want = gradients(loss)
        loss.zero_grad()
        parts = accumulate(loss, sample, micro_batch_size=3)  # three rows, then one
        found = gradients(loss)
        assert want.keys() == found.keys()
        for name in want:
            torch.testing.assert_close(found[name], want[name], atol=1e-5, rtol=1e-3)
        for name, value in whole.items():
            torch.testing.assert_close(parts[name], value, atol=1e-5, rtol=1e-4)

    def test_layers_computed_again_give_the_same(self, base, data):
        loss = adapted(base, data)
        sample = data[:2]
        accumulate(loss, sample)
        want = gradients(loss)
        loss.zero_grad()
        loss.checkpoint_layers = True
        accumulate(loss, sample)
        for name, gradient in gradients(loss).items():
            torch.testing.assert_close(gradient, want[name])

    def test_full_reaches_every_weight_that_is_used(self, base, data):
        teacher = load_openvla(base, STATISTICS, trainable=True)
        loss = OpenVLATokenLoss(teacher)
        out = accumulate(loss, data[:1], autocast=torch.bfloat16)
        assert out["loss_tokens"].isfinite()
        missing = trained(loss).keys() - gradients(loss).keys()
        assert missing == set()

    def test_batches_that_cannot_be(self, base, data):
        loss = OpenVLATokenLoss(load_openvla(base, STATISTICS))
        with pytest.raises(ValueError, match="batch is empty"):
            accumulate(loss, data[:0])
        with pytest.raises(ValueError, match="micro_batch_size"):
            accumulate(loss, data, micro_batch_size=0)


class TestLora:
    def test_only_adapters_are_trained(self, memorised):
        loss, _, before = memorised
        assert all(".lora_" in name for name in trained(loss))
        # 2 towers of 2 blocks of 4 layers, 3 of the projector, 2 of Llama with 7.
        assert len(trained(loss)) == 2 * (2 * 2 * 4 + 3 + 2 * 7)
        assert not any("lm_head" in name or "embed" in name for name in trained(loss))
        now = dict(loss.named_parameters())
        assert all(torch.equal(now[name], value) for name, value in before.items())

    def test_nothing_changes_before_the_first_step(self, base, data):
        loss = adapted(base, data)
        plain = load_openvla(base, action_statistics(data["action"]))
        want = plain(frames(data))["vla_action", "chunk"]
        found = loss.teacher(frames(data))["vla_action", "chunk"]
        assert torch.equal(found, want)

    def test_merged_by_hand(self, memorised):
        model = memorised[0].teacher.model
        name = "language_model.model.layers.1.mlp.up_proj"
        layer = model.get_submodule(name)
        lora_a, lora_b = layer.lora_A["default"].weight, layer.lora_B["default"].weight
        # alpha = min(rank, 16) = 8 = rank: the adapters' output counts once.
        want = weights()[f"{name}.weight"] + (lora_b @ lora_a).detach()
        found = merged_weight(model, f"{name}.weight")
        torch.testing.assert_close(found, want)
        assert not torch.equal(found, weights()[f"{name}.weight"])

    def test_refused(self, base, data, monkeypatch):
        loss = adapted(base, data)
        with pytest.raises(ValueError, match="adapters already"):
            add_lora(loss.teacher)
        plain = load_openvla(base, STATISTICS)
        with pytest.raises(ValueError, match="rank"):
            add_lora(plain, rank=0)
        monkeypatch.setitem(sys.modules, "peft", None)
        with pytest.raises(ImportError, match=r"torchrl_rpd\[finetune\]"):
            add_lora(plain)


class TestMemory:
    def test_loss_falls_and_tokens_are_memorised(self, memorised, data):
        loss, history, _ = memorised
        assert history["loss_tokens"][-1] < 0.2 * history["loss_tokens"][0]
        with torch.no_grad():
            out = loss(data)
        assert out["token_accuracy"] > 0.95
        assert out["action_l1"] < 0.02

    def test_the_teacher_does_what_was_shown(self, memorised, data):
        # Greedy decoding without the true tokens before; frames 0 and 1 are told apart
        # by their instructions alone.
        found = memorised[0].teacher(frames(data))["vla_action", "chunk"][:, 0]
        spans = torch.tensor(action_statistics(data["action"])["action"]["q99"])
        spans = spans - torch.tensor(action_statistics(data["action"])["action"]["q01"])
        spans[6] = 2.0  # not normalised
        error = (found - data["action"]).abs() / spans
        # Half a bin is 1/510 of the span; what lies outside of the quantiles is clipped
        # (they are 3 % of the way from the extremes to the next of four values).
        assert (error < 0.03).double().mean() > 0.95


@pytest.fixture(scope="module")
def export(memorised, base, data, tmp_path_factory):
    return export_openvla(
        memorised[0].teacher,
        tmp_path_factory.mktemp("export") / "tuned",
        base=base,
        statistics=action_statistics(data["action"]),
        unnorm_key=KEY,
    )


class TestExport:
    def test_reloaded_gives_the_same_actions(self, memorised, export, data):
        teacher = OpenVLATeacher.from_pretrained(export, unnorm_key=KEY, spread=True)
        live = memorised[0].teacher
        pixels = data["observation", "image"]
        texts = data["language_instruction"]
        texts = texts if isinstance(texts, list) else texts.tolist()
        with torch.no_grad():
            found, want = teacher.tokens(pixels, texts), live.tokens(pixels, texts)
        assert torch.equal(found.tokens, want.tokens)
        # W x + B A x and (W + B A) x are rounded differently.
        torch.testing.assert_close(found.logits, want.logits, atol=2e-3, rtol=0)
        assert torch.equal(
            teacher(frames(data))["vla_action", "chunk"],
            live(frames(data))["vla_action", "chunk"],
        )

    def test_layout_is_the_base_models(self, export, base, data):
        names = {path.name for path in base.iterdir()}
        assert {path.name for path in export.iterdir()} == names
        own = json.loads((export / "dataset_statistics.json").read_text())
        assert own == {KEY: action_statistics(data["action"])}
        config = json.loads((export / "config.json").read_text())
        before = json.loads((base / "config.json").read_text())
        assert config["norm_stats"][KEY] == own[KEY]
        assert config["norm_stats"].keys() - {KEY} == before["norm_stats"].keys()
        del config["norm_stats"], before["norm_stats"]
        assert config == before
        safetensors = pytest.importorskip("safetensors")
        with safetensors.safe_open(str(export / "model.safetensors"), "pt") as file:
            assert file.metadata() == {"format": "pt"}
            found = {name: file.get_tensor(name) for name in file.keys()}
        assert found.keys() == weights().keys()
        same = {name for name, tensor in found.items() if tensor.equal(weights()[name])}
        # Not built, or not adapted: as they were.
        assert "vision_backbone.featurizer.blocks.2.mlp.fc1.weight" in same
        assert "language_model.lm_head.weight" in same
        assert "language_model.model.layers.0.self_attn.q_proj.weight" not in same

    def test_shards_stay_shards(self, base, tmp_path):
        from safetensors.torch import save_file

        sharded = write_checkpoint(tmp_path / "base")
        (sharded / "model.safetensors").unlink()
        (sharded / "README.md").write_text("the base model's card")
        names = sorted(weights())
        halves = {"a.safetensors": names[::2], "b.safetensors": names[1::2]}
        for file, half in halves.items():
            tensors = {name: weights()[name].to(torch.bfloat16) for name in half}
            save_file(tensors, sharded / file)
        index = {name: file for file, half in halves.items() for name in half}
        (sharded / "model.safetensors.index.json").write_text(
            json.dumps({"weight_map": index})
        )
        teacher = load_openvla(sharded, STATISTICS, dtype=torch.float32)
        out = export_openvla(
            teacher,
            tmp_path / "tuned",
            base=sharded,
            statistics=STATISTICS,
            unnorm_key=KEY,
        )
        assert not (out / "README.md").exists()  # it is another model now
        for file in halves:
            assert (out / file).read_bytes()[-1000:] == (sharded / file).read_bytes()[
                -1000:
            ]
        again = OpenVLATeacher.from_pretrained(out, dtype=torch.float32)
        for name, tensor in teacher.model.state_dict().items():
            assert torch.equal(again.model.state_dict()[name], tensor), name

    def test_refused(self, memorised, base, export, tmp_path):
        teacher = memorised[0].teacher
        settings = {"base": base, "statistics": STATISTICS, "unnorm_key": KEY}
        with pytest.raises(FileExistsError, match="not empty"):
            export_openvla(teacher, export, **settings)
        with pytest.raises(ValueError, match="unnorm_key"):
            export_openvla(teacher, tmp_path / "a", **{**settings, "unnorm_key": ""})
        # An export that fails leaves nothing behind.
        broken = write_checkpoint(tmp_path / "broken")
        (broken / "model.safetensors").write_bytes(b"broken")
        with pytest.raises(Exception, match=r"(?i)header"):
            export_openvla(teacher, tmp_path / "b", **{**settings, "base": broken})
        assert not list(tmp_path.glob("b*.part"))
        assert not (tmp_path / "b").exists()


class TestErrors:
    @pytest.mark.parametrize("name", ["q01", "q99", "mask"])
    def test_statistics_missing(self, base, name):
        statistics = copy.deepcopy(STATISTICS)
        del statistics["action"][name]
        with pytest.raises(ValueError, match=rf"missing are \['{name}'\]"):
            load_openvla(base, statistics)

    def test_statistics_of_actions_alone(self, base):
        with pytest.raises(ValueError, match="under 'action'"):
            load_openvla(base, STATISTICS["action"])

    @pytest.mark.parametrize(
        ("change", "error", "words"),
        [
            ({"action": torch.zeros(4, 8)}, ValueError, "has 8 action dimensions"),
            ({"action": None}, KeyError, "demonstrated actions from 'action'"),
            ({"language_instruction": None}, KeyError, "language_instruction"),
        ],
    )
    def test_samples(self, base, data, change, error, words):
        loss = OpenVLATokenLoss(load_openvla(base, STATISTICS))
        rows = data.clone()
        for key, value in change.items():
            rows.pop(key) if value is None else rows.set(key, value)
        with pytest.raises(error, match=words):
            loss(rows)

    def test_other_keys(self, base, data):
        loss = OpenVLATokenLoss(load_openvla(base, STATISTICS))
        loss.set_keys(action="expert")
        assert loss.in_keys[-1] == "expert"
        rows = data[:1].clone().rename_key_("action", "expert")
        with torch.no_grad():
            assert loss(rows)["loss_tokens"].isfinite()


@pytest.mark.gpu
def test_bfloat16_on_cuda(base, data, tmp_path):
    pytest.importorskip("peft")
    statistics = action_statistics(data["action"])
    torch.manual_seed(0)
    teacher = load_openvla(base, statistics, dtype=torch.bfloat16, device="cuda")
    add_lora(teacher, rank=8)
    loss = OpenVLATokenLoss(teacher, checkpoint_layers=True)
    parameters = list(trained(loss).values())
    assert {p.dtype for p in parameters} == {torch.float32}
    optimizer = torch.optim.AdamW(parameters, lr=6e-3, weight_decay=0.0)
    demos = buffer(data, 4)
    for _ in range(80):
        out = accumulate(
            loss, demos.sample(), micro_batch_size=2, autocast=torch.bfloat16
        )
        torch.nn.utils.clip_grad_norm_(parameters, 1.0)
        optimizer.step()
        optimizer.zero_grad()
    assert out["token_accuracy"] > 0.9
    folder = export_openvla(
        teacher, tmp_path / "tuned", base=base, statistics=statistics, unnorm_key=KEY
    )
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        again = OpenVLATeacher.from_pretrained(folder, device="cuda")
    assert again(frames(data))["vla_action", "chunk"].shape == (4, 1, 7)


if __name__ == "__main__":
    pytest.main([__file__])
