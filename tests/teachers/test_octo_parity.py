# Copyright (c) the torchrl_rpd authors.
#
# This source code is licensed under the MIT license found in the
# LICENSE file in the root directory of this source tree.
"""The port computes what Octo's own code computed."""

from __future__ import annotations

import pytest
import torch
from octo_checkpoint import expected, write_checkpoint

from torchrl_rpd.teachers.octo import OctoTeacher

pytest.importorskip("msgpack")
pytest.importorskip("transformers")

ONE_STEP = torch.ones(3, 1, dtype=torch.bool)


@pytest.fixture(scope="module")
def teacher(tmp_path_factory):
    return OctoTeacher.from_pretrained(
        write_checkpoint(tmp_path_factory.mktemp("octo"))
    )


def readouts(teacher, window: int) -> torch.Tensor:
    e = expected()
    images = e["images"][:, :window].movedim(-1, -3)
    text = teacher.model.encode_text(e["input_ids"], e["attention_mask"])
    mask = e["pad_mask_window2"] if window == 2 else None
    with torch.no_grad():
        return teacher.model.readouts({"primary": images}, text, timestep_pad_mask=mask)


def sample(teacher, case: str, rows=slice(None)) -> torch.Tensor:
    e = expected()
    window = 2 if case == "window2" else 1
    mask = e["pad_mask_window2"] if window == 2 else ONE_STEP
    return teacher.sample_chunk(
        e["images"][rows, :window],
        e["input_ids"][rows],
        e["attention_mask"][rows],
        mask[rows],
        e[f"x0_{case}"][..., rows, :, :],
        e[f"noise_{case}"][..., rows, :, :],
    )


@pytest.mark.parametrize("window", [1, 2])
def test_readouts(teacher, window):
    got, want = readouts(teacher, window), expected()[f"readout_window{window}"]
    torch.testing.assert_close(got, want, rtol=0, atol=1e-5)


def test_padding_of_the_first_step_is_seen(teacher):
    # Otherwise the test of window 2 would pass without its mask: rows 0 to 2 of the
    # recording have padded and full windows.
    mask = expected()["pad_mask_window2"]
    assert not mask[:, 0].all() and mask[:, 0].any() and mask[:, 1].all()
    padded = ~mask[:, 0]
    e = expected()
    images = e["images"].movedim(-1, -3)
    text = teacher.model.encode_text(e["input_ids"], e["attention_mask"])
    with torch.no_grad():
        ignored = teacher.model.readouts({"primary": images}, text)
        hidden = images.clone()
        hidden[padded, 0] = 0
        black = teacher.model.readouts(
            {"primary": hidden}, text, timestep_pad_mask=mask
        )
    want = e["readout_window2"]
    assert (ignored - want)[padded].abs().max() > 1e-2
    # What a padded step shows does not matter to the last step.
    torch.testing.assert_close(black[:, 1], want[:, 1], rtol=0, atol=1e-5)


def test_betas(teacher):
    betas = teacher.model.head.betas()
    torch.testing.assert_close(betas, expected()["betas"], rtol=0, atol=1e-6)


def test_eps(teacher):
    e = expected()
    time = e["eps_steps"][:, None, None]
    got = teacher.model.head.eps(
        e["readout_window1"][:, :, 0], e["eps_noisy_actions"], time
    )
    torch.testing.assert_close(got, e["eps"], rtol=0, atol=1e-4)


@pytest.mark.parametrize(
    ("case", "atol"), [("window1", 1e-3), ("window2", 5e-3), ("samples", 1e-3)]
)
def test_chunks(teacher, case, atol):
    got, want = sample(teacher, case), expected()[f"actions_{case}"]
    assert got.shape == want.shape
    torch.testing.assert_close(got, want, rtol=0, atol=atol)
    # The clip at 5 must not be all that is compared.
    assert want.unique().numel() > want.numel() // 2


@pytest.mark.parametrize("case", ["window1", "window2", "samples"])
def test_batch_equals_single(teacher, case):
    together = sample(teacher, case)
    alone = [sample(teacher, case, slice(row, row + 1)) for row in range(3)]
    torch.testing.assert_close(torch.cat(alone, -3), together, rtol=0, atol=1e-3)


def test_bfloat16_stays_close(teacher, tmp_path):
    half = OctoTeacher.from_pretrained(write_checkpoint(tmp_path), dtype=torch.bfloat16)
    want = expected()["readout_window1"]
    error = (readouts(half, 1) - want).abs().mean() / want.abs().mean()
    assert 1e-4 < error < 0.03
    assert half.model.head.input.weight.dtype == torch.float32


@pytest.mark.gpu
def test_on_a_gpu(tmp_path, monkeypatch):
    monkeypatch.setattr(torch.backends.cudnn, "allow_tf32", False)
    teacher = OctoTeacher.from_pretrained(write_checkpoint(tmp_path), device="cuda")
    for case, atol in (("window1", 1e-3), ("window2", 5e-3), ("samples", 1e-3)):
        got, want = sample(teacher, case).cpu(), expected()[f"actions_{case}"]
        torch.testing.assert_close(got, want, rtol=0, atol=atol)


def test_transformer_runs_once(teacher, monkeypatch):
    calls = []
    transformer = teacher.model.transformer
    forward = transformer.forward
    monkeypatch.setattr(
        transformer, "forward", lambda *args: calls.append(1) or forward(*args)
    )
    assert sample(teacher, "samples").shape[0] == 4
    assert len(calls) == 1


if __name__ == "__main__":
    pytest.main([__file__])
