# Copyright (c) the torchrl_rpd authors.
#
# This source code is licensed under the MIT license found in the
# LICENSE file in the root directory of this source tree.
"""Octo is trained by the loss of its diffusion head, and comes back as it was."""

from __future__ import annotations

import copy
import hashlib
import json
import math

import pytest
import torch
from finetune_data import buffer, demonstrations
from octo_checkpoint import SHA256, expected, recipe_arrays, write_checkpoint
from octo_checkpoint import STEP as RECORDED_STEP
from small_octo import STEP, write_small_octo
from tensordict import TensorDict

from torchrl_rpd.finetune import (
    OctoDiffusionLoss,
    accumulate,
    action_statistics,
    export_octo,
    load_octo,
    weight_decay_groups,
)
from torchrl_rpd.finetune._octo import TrainableStem
from torchrl_rpd.teachers.octo import OctoTeacher
from torchrl_rpd.teachers.octo._msgpack import read_arrays
from torchrl_rpd.teachers.octo.convert import convert

pytest.importorskip("msgpack")
pytest.importorskip("transformers")

UNIT = {"action": {"mean": [0.0] * 7, "std": [1.0] * 7, "mask": [True] * 6 + [False]}}


def gradients(module) -> dict[str, torch.Tensor]:
    return {
        name: p.grad.clone()
        for name, p in module.named_parameters()
        if p.grad is not None
    }


@pytest.fixture(scope="module")
def base(tmp_path_factory):
    return write_small_octo(tmp_path_factory.mktemp("octo") / "base")


@pytest.fixture(scope="module")
def data():
    return demonstrations(4)


@pytest.fixture
def loss(base, data):
    teacher = load_octo(base, action_statistics(data["action"]))
    return OctoDiffusionLoss(teacher, num_noise=3)


@pytest.fixture(scope="module")
def recorded(tmp_path_factory):
    """The checkpoint that the original saved, and what it computed with it."""
    return write_checkpoint(tmp_path_factory.mktemp("recorded") / "octo")


class TestLoss:
    def test_with_the_noise_that_the_original_predicted(self, recorded, monkeypatch):
        # The demonstration is the data set's mean (0 once normalised), so what is shown
        # to the head is the noise times sqrt(1 - alpha_bar): noise is chosen such that
        # it is what was recorded, and the original's prediction for it is known.
        want = expected()
        noisy = want["eps_noisy_actions"][:, :, 0].transpose(0, 1)  # [3 rows, 3 levels]
        eps = want["eps"][:, :, 0].transpose(0, 1).double()
        steps = want["eps_steps"].expand(3, 3)
        bar = (1 - want["betas"].double()).cumprod(0)[steps].unsqueeze(2)
        noise = (noisy.double() / (1 - bar).sqrt()).float()
        by_hand = (eps - noise).square().mean() * 7
        teacher = load_octo(recorded, UNIT)
        loss = OctoDiffusionLoss(teacher, padded_chunks=False, num_noise=3)
        ids, mask = want["input_ids"].long(), want["attention_mask"].long()
        with torch.no_grad():
            text = loss.teacher.model.encode_text(ids, mask)
        monkeypatch.setattr(
            loss.teacher, "_texts", lambda texts: (text, torch.arange(3))
        )
        rows = TensorDict(
            {
                "observation": {"image": want["images"][:, 0].permute(0, 3, 1, 2)},
                "language_instruction": "not looked at",
                "vla_action": {"chunk": torch.zeros(3, 4, 7)},
                "diffusion_noise": noise,
                "diffusion_step": steps,
            },
            [3],
        )
        with torch.no_grad():
            found = loss(rows)["loss_diffusion"]
        torch.testing.assert_close(found.double(), by_hand, rtol=1e-4, atol=0)

    def test_by_hand(self, loss, data, monkeypatch):
        # A head that always answers 0: what remains is noise, levels and the mask.
        monkeypatch.setattr(
            loss.teacher.model.head, "eps", lambda readout, noisy, level: 0 * noisy
        )
        rows = loss.draw(data)
        found = loss(rows)["loss_diffusion"]
        noise = rows["diffusion_noise"].unflatten(-1, (4, 7))
        assert noise.shape == (4, 3, 4, 7)
        # Row 0 has 4 real actions, the last three 3, 2 and 1.
        total = sum(
            noise[row, :, : 4 - row].square().mean(0).sum().double() for row in range(4)
        )
        torch.testing.assert_close(found.double(), total / (4 + 3 + 2 + 1))
        assert loss.terms(data) == 10

    def test_noisy_actions(self, loss, data, monkeypatch):
        shown = []

        def eps(readout, noisy, level):
            shown.append((noisy, level))
            return 0 * noisy

        monkeypatch.setattr(loss.teacher.model.head, "eps", eps)
        rows = loss.draw(data)
        rows["diffusion_step"][:] = torch.tensor([0, 9, 19])
        rows["vla_action", "chunk"] = rows["vla_action", "chunk"].clone()
        rows["vla_action", "chunk"][0, 0, 0] = 1e6
        loss(rows)
        ((noisy, level),) = shown
        assert torch.equal(level, rows["diffusion_step"])
        numbers = action_statistics(data["action"])["action"]
        for k, t in enumerate((0, 9, 19)):
            # alpha_bar_t of the cosine schedule is f(t + 1) / f(0) with
            # f(t) = cos((t / 20 + 0.008) / 1.008 * pi / 2)^2, as far as no beta is
            # clipped (the last one is, at 0.999).
            f = [
                math.cos((x / 20 + 0.008) / 1.008 * math.pi / 2) ** 2
                for x in (t + 1, 0)
            ]
            bar = f[0] / f[1]
            if t == 19:
                before = math.cos((19 / 20 + 0.008) / 1.008 * math.pi / 2) ** 2 / f[1]
                bar = before * (1 - 0.999)
            action = data["vla_action", "chunk"][2, 1].double()
            normal = (action - torch.tensor(numbers["mean"])) / torch.tensor(
                numbers["std"]
            )
            normal[6] = action[6]
            noise = rows["diffusion_noise"][2, k].unflatten(-1, (4, 7))[1].double()
            want = math.sqrt(bar) * normal + math.sqrt(1 - bar) * noise
            found = noisy[2, k].unflatten(-1, (4, 7))[1].double()
            torch.testing.assert_close(found, want, rtol=1e-3, atol=1e-4)
            # What is far outside is clipped to 5.
            noise = rows["diffusion_noise"][0, k, 0].double()
            want = math.sqrt(bar) * 5 + math.sqrt(1 - bar) * noise
            torch.testing.assert_close(
                noisy[0, k, 0].double(), want, rtol=1e-3, atol=1e-4
            )

    def test_longer_chunks_are_cut(self, loss, data):
        rows = loss.draw(data)
        longer = rows.clone()
        chunk, pad = rows["vla_action", "chunk"], rows["action_is_pad"]
        longer["vla_action"] = TensorDict({"chunk": torch.cat([chunk, chunk], 1)}, [4])
        longer["action_is_pad"] = torch.cat([pad, ~pad], 1)
        with torch.no_grad():
            assert loss(longer)["loss_diffusion"] == loss(rows)["loss_diffusion"]

    def test_nothing_valid(self, loss, data):
        rows = data.clone()
        rows["action_is_pad"][:] = True
        out = accumulate(loss, rows)
        assert out["loss_diffusion"] == 0
        assert all((g == 0).all() for g in gradients(loss).values())

    @pytest.mark.parametrize(
        ("change", "error", "words"),
        [
            ({("vla_action", "chunk"): torch.zeros(4, 4, 6)}, ValueError, "6 action"),
            (
                {("vla_action", "chunk"): torch.zeros(4, 3, 7)},
                ValueError,
                "chunks of 4",
            ),
            ({"vla_action": None}, KeyError, "demonstrated actions"),
            ({"action_is_pad": None}, KeyError, "padded_chunks=False"),
            ({("observation", "image"): torch.zeros(4, 3, 64, 64)}, TypeError, "uint8"),
        ],
    )
    def test_samples_that_cannot_be(self, loss, data, change, error, words):
        rows = data.clone()
        for key, value in change.items():
            rows.pop(key) if value is None else rows.set(key, value)
        with pytest.raises(error, match=words):
            loss(rows)


class TestNetwork:
    def test_answers_as_the_teacher_that_does_not_train(self, recorded):
        # Kernels are standardised at every call instead of once.
        teacher = OctoTeacher.from_pretrained(recorded, instruction=None)
        trainable = load_octo(recorded, UNIT)
        images = expected()["images"][:, :1].permute(0, 1, 4, 2, 3)
        text = torch.randn(1, 16, teacher.model.config.text.d_model)
        with torch.no_grad():
            found = trainable.model.readouts({"primary": images}, text)
            want = teacher.model.readouts({"primary": images}, text)
        torch.testing.assert_close(found, want, atol=2e-5, rtol=0)

    def test_kernels_are_those_before_standardisation(self, recorded):
        stem = load_octo(recorded, UNIT).model.stems["primary"]
        assert isinstance(stem, TrainableStem)
        source = next(
            array
            for name, array in recipe_arrays().items()
            if "tokenizers_primary" in name and name.endswith("StdConv_1/kernel")
        )
        assert torch.equal(stem.convs[1].weight, source.permute(3, 2, 0, 1))

    def test_gradient_of_the_stem(self):
        # In double precision against finite differences: nothing in place is lost.
        torch.manual_seed(0)
        stem = TrainableStem(goal_stacked=False).double()
        images = torch.randint(256, (1, 3, 16, 16), dtype=torch.uint8)
        weight = stem.convs[3].weight
        weighting = torch.randn(1, 1, 512, dtype=torch.float64)

        def value() -> torch.Tensor:
            return (stem(images) * weighting).sum()

        (gradient,) = torch.autograd.grad(value(), weight)
        direction = torch.randn_like(weight)
        step = 1e-5
        with torch.no_grad():
            weight += step * direction
            above = value()
            weight -= 2 * step * direction
            below = value()
        found = ((above - below) / (2 * step)).item()
        assert found == pytest.approx((gradient * direction).sum().item(), rel=1e-4)

    def test_what_is_trained(self, base, data):
        statistics = action_statistics(data["action"])
        full = load_octo(base, statistics)
        names = {n for n, p in full.model.named_parameters() if p.requires_grad}
        assert not any(name.startswith("text_encoder") for name in names)
        loss = OctoDiffusionLoss(full)
        accumulate(loss, data)
        reached = {name.removeprefix("teacher.model.") for name in gradients(loss)}
        assert reached == names
        head = load_octo(base, statistics, trained="head")
        names = {n for n, p in head.model.named_parameters() if p.requires_grad}
        assert {name.split(".")[0] for name in names} == {"head"}
        loss = OctoDiffusionLoss(head).train()
        assert loss.training
        assert not head.model.text_encoder.training  # it has dropout

    def test_decay(self, base):
        teacher = load_octo(base, UNIT)
        kernels, rest = weight_decay_groups(teacher.model, 0.01)
        of = {id(p): name for name, p in teacher.model.named_parameters()}
        decayed = {of[id(p)] for p in kernels["params"]}
        kept = {of[id(p)] for p in rest["params"]}
        # As "kernel" in the names of the original's arrays.
        assert {"head.frequencies", "head.input.weight"} <= decayed
        assert "stems.primary.convs.0.weight" in decayed
        assert {
            "readout_position",
            "transformer.norm.weight",
            "head.input.bias",
        } <= kept
        assert "positions.primary" in kept

    def test_dropout_is_refused_loudly(self, base, tmp_path):
        import shutil

        folder = shutil.copytree(base, tmp_path / "dropout")
        config = json.loads((folder / "config.json").read_text())
        config["model"]["transformer_kwargs"]["dropout_rate"] = 0.1
        (folder / "config.json").write_text(json.dumps(config))
        with pytest.warns(UserWarning, match=r"dropout.*0\.1"):
            load_octo(folder, UNIT)

    def test_refused(self, base):
        with pytest.raises(ValueError, match="trained must be one of"):
            load_octo(base, UNIT, trained="lora")
        for name in ("mean", "std", "mask"):
            statistics = copy.deepcopy(UNIT)
            del statistics["action"][name]
            with pytest.raises(ValueError, match=rf"missing are \['{name}'\]"):
                load_octo(base, statistics)
        with pytest.raises(ValueError, match="window_size=1"):
            OctoDiffusionLoss(load_octo(base, UNIT, window_size=2))
        with pytest.raises(ValueError, match="num_noise"):
            OctoDiffusionLoss(load_octo(base, UNIT), num_noise=0)


class TestGradients:
    def test_parts_add_up_to_the_whole(self, loss, data):
        # Three rows, then one: of the ten valid actions, the parts have nine and one.
        sample = loss.draw(data)
        loss.draw = lambda batch: sample
        whole = accumulate(loss, data)
        want = gradients(loss)
        loss.zero_grad()
        parts = accumulate(loss, data, micro_batch_size=3)
        found = gradients(loss)
        assert want.keys() == found.keys()
        for name in want:
            torch.testing.assert_close(
                found[name], want[name], rtol=1e-3, atol=1e-4, msg=name
            )
        torch.testing.assert_close(parts["loss_diffusion"], whole["loss_diffusion"])

    def test_noise_is_drawn_for_the_whole_batch(self, loss, data):
        torch.manual_seed(3)
        whole = accumulate(loss, data)
        torch.manual_seed(3)
        parts = accumulate(loss, data, micro_batch_size=2)
        torch.testing.assert_close(parts["loss_diffusion"], whole["loss_diffusion"])

    def test_bfloat16_is_near(self, loss, data):
        sample = loss.draw(data)
        with torch.no_grad():
            want = loss(sample)["loss_diffusion"]
            with torch.autocast("cpu", dtype=torch.bfloat16):
                found = loss(sample)["loss_diffusion"]
        assert found.dtype == torch.float32
        assert found != want  # the transformer did compute in bfloat16
        torch.testing.assert_close(found, want, rtol=0.05, atol=0)


class TestExport:
    def test_untrained_is_the_originals_file_byte_for_byte(self, recorded, tmp_path):
        folder = export_octo(
            load_octo(recorded, UNIT),
            tmp_path / "same",
            base=recorded,
            statistics=UNIT,
            step=RECORDED_STEP,
        )
        file = folder / str(RECORDED_STEP) / "default" / "checkpoint"
        assert hashlib.sha256(file.read_bytes()).hexdigest() == SHA256

    @pytest.fixture
    def tuned(self, loss, data):
        """A few steps: every trained weight has moved."""
        loss.train()
        optimizer = torch.optim.AdamW(weight_decay_groups(loss, 0.01), lr=1e-3)
        for _ in range(3):
            accumulate(loss, data)
            optimizer.step()
            optimizer.zero_grad()
        return loss.eval().teacher

    @pytest.mark.parametrize("layout", ["msgpack", "safetensors"])
    def test_reloaded_gives_the_same_actions(self, tuned, base, data, tmp_path, layout):
        statistics = {**action_statistics(data["action"]), "num_trajectories": 1}
        folder = export_octo(
            tuned,
            tmp_path / "tuned",
            base=base,
            statistics=statistics,
            step=3,
            unnorm_key="my_demos",
            layout=layout,
        )
        teacher = OctoTeacher.from_pretrained(folder, unnorm_key="my_demos")
        rows = data.select(("observation", "image"), "language_instruction")
        # The generators are equally seeded, and draw for the first time.
        found = teacher(rows.clone())["vla_action", "chunk"]
        want = tuned(rows.clone())["vla_action", "chunk"]
        torch.testing.assert_close(found, want, atol=1e-5, rtol=1e-5)
        own = json.loads((folder / "dataset_statistics.json").read_text())["my_demos"]
        assert own["num_transitions"] == 4
        assert own["num_trajectories"] == 1
        assert own["action"]["p01"] == statistics["action"]["q01"]
        assert "q01" not in own["action"]
        config = json.loads((folder / "config.json").read_text())
        before = json.loads((base / "config.json").read_text())
        assert config == {**before, "window_size": 1}
        assert (folder / "example_batch.msgpack").read_bytes() == b"not read here"

    def test_every_trained_array_has_moved(self, tuned, base, tmp_path):
        folder = export_octo(
            tuned, tmp_path / "tuned", base=base, statistics=UNIT, step=3
        )
        before = read_arrays(base / str(STEP) / "default" / "checkpoint")
        after = read_arrays(folder / "3" / "default" / "checkpoint")
        assert before.keys() == after.keys()
        same = {name for name in before if torch.equal(before[name], after[name])}
        # The text encoder alone. (A key's bias shifts all of a softmax's inputs by the
        # same, so its gradient is rounding noise, if anything.)
        text = {name for name in before if "/hf_model/" in name}
        assert text <= same
        assert all(name.endswith("key/bias") for name in same - text)
        # Without a name, as the original's fine-tuned checkpoints: no unnorm_key needed.
        assert OctoTeacher.from_pretrained(folder).action_dim == 7

    def test_from_a_converted_copy(self, base, tmp_path):
        copy_of = convert(base, tmp_path / "copy")
        teacher = load_octo(copy_of, UNIT)
        want = load_octo(base, UNIT)
        images = torch.randint(256, (1, 1, 3, 64, 64), dtype=torch.uint8)
        text = torch.randn(1, 16, 16)
        with torch.no_grad():
            found = teacher.model.readouts({"primary": images}, text)
            # Standardised twice: 1e-5 of the kernels.
            torch.testing.assert_close(
                found,
                want.model.readouts({"primary": images}, text),
                atol=2e-3,
                rtol=0,
            )

    def test_refused(self, base, tmp_path):
        teacher = load_octo(base, UNIT)
        settings = {"base": base, "statistics": UNIT, "step": 1}
        with pytest.raises(ValueError, match="layout"):
            export_octo(teacher, tmp_path / "a", **settings, layout="pickle")
        with pytest.raises(ValueError, match="step"):
            export_octo(teacher, tmp_path / "a", **{**settings, "step": -1})
        with pytest.raises(FileExistsError, match="not empty"):
            export_octo(teacher, base, **settings)


def fit(loss, demos, steps: int, lr: float, **kwargs) -> torch.Tensor:
    parameters = [p for p in loss.parameters() if p.requires_grad]
    optimizer = torch.optim.AdamW(weight_decay_groups(loss, 0.0), lr=lr)
    loss.train()
    history = []
    for _ in range(steps):
        out = accumulate(loss, demos.sample(), **kwargs)
        torch.nn.utils.clip_grad_norm_(parameters, 1.0)
        optimizer.step()
        optimizer.zero_grad()
        history.append(out["loss_diffusion"])
    loss.eval()
    return torch.stack(history)


def test_loss_falls(base, data):
    torch.manual_seed(0)
    teacher = load_octo(base, action_statistics(data["action"]))
    history = fit(OctoDiffusionLoss(teacher, num_noise=32), buffer(data, 4), 15, 1e-3)
    assert history[-5:].mean() < 0.7 * history[:3].mean()


@pytest.mark.slow
def test_demonstrations_are_memorised(base, data):
    torch.manual_seed(0)
    teacher = load_octo(base, action_statistics(data["action"]))
    loss = OctoDiffusionLoss(teacher, num_noise=128)
    demos = buffer(data, 4)
    history = torch.cat([fit(loss, demos, 200, 3e-3), fit(loss, demos, 60, 5e-4)])
    # Guessing 0 costs 7: the variance of the noise, times the dimensions.
    assert history[-10:].mean() < 0.3
    rows = data.select(("observation", "image"), "language_instruction")
    draws = [teacher(rows.clone())["vla_action", "chunk"] for _ in range(4)]
    real = ~data["action_is_pad"]
    want = data["vla_action", "chunk"][real]
    error = torch.stack([(draw[real] - want).abs() for draw in draws])
    # Actions are between -1 and 1; a stranger's would be off by 2/3 on average.
    assert error.mean() < 0.06


@pytest.mark.gpu
def test_bfloat16_on_cuda(base, data, tmp_path):
    statistics = action_statistics(data["action"])
    torch.manual_seed(0)
    teacher = load_octo(base, statistics, device="cuda")
    loss = OctoDiffusionLoss(teacher, num_noise=32)
    history = fit(
        loss,
        buffer(data, 4),
        40,
        1e-3,
        micro_batch_size=2,
        autocast=torch.bfloat16,
    )
    assert history[-5:].mean() < 0.7 * history[:3].mean()
    folder = export_octo(
        teacher, tmp_path / "tuned", base=base, statistics=statistics, step=40
    )
    assert OctoTeacher.from_pretrained(folder, device="cuda").action_dim == 7


if __name__ == "__main__":
    pytest.main([__file__])
