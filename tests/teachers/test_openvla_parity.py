# Copyright (c) the torchrl_rpd authors.
#
# This source code is licensed under the MIT license found in the
# LICENSE file in the root directory of this source tree.
"""OpenVLATeacher against what OpenVLA's own code computed."""

from __future__ import annotations

import openvla_tiny as tiny
import pytest
import torch
from tensordict import NonTensorStack, TensorDict

pytest.importorskip("transformers")
pytest.importorskip("tokenizers")

FIRST = [tiny.INSTRUCTIONS[0]] * 6
SETS = [
    pytest.param("images", "", tiny.INSTRUCTIONS, id="one instruction each"),
    pytest.param("images_small", "_small", tiny.INSTRUCTIONS, id="small images"),
    pytest.param("images", "_first_instruction", FIRST, id="one task"),
]


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    return tiny.write_checkpoint(tmp_path_factory.mktemp("openvla"))


@pytest.fixture(scope="module")
def teacher(folder):
    return tiny.load(folder, spread=True)


def frames(kind: str, instructions: list[str]) -> TensorDict:
    return TensorDict(
        {
            "observation": {"image": tiny.images(kind)},
            "language_instruction": NonTensorStack(*instructions),
        },
        [6],
    )


@pytest.mark.parametrize(("kind", "suffix", "instructions"), SETS)
class TestRecorded:
    """Float32, mixed prompts in one batch; the original saw one row at a time."""

    def test_tokens(self, teacher, kind, suffix, instructions):
        tokens = teacher.tokens(tiny.images(kind), instructions).tokens
        assert torch.equal(tokens, tiny.expected()["tokens" + suffix])

    def test_actions(self, teacher, kind, suffix, instructions):
        out = teacher(frames(kind, instructions))
        torch.testing.assert_close(
            out["vla_action", "chunk"].squeeze(1).double(),
            tiny.expected()["actions" + suffix],
            rtol=0,
            atol=1e-6,
        )

    def test_batch_is_what_single_rows_are(self, teacher, kind, suffix, instructions):
        images = tiny.images(kind)
        together = teacher.tokens(images, instructions)
        for row, instruction in enumerate(instructions):
            alone = teacher.tokens(images[row : row + 1], [instruction])
            assert torch.equal(together.tokens[row], alone.tokens[0])
            torch.testing.assert_close(
                together.logits[row], alone.logits[0], rtol=0, atol=2e-4
            )


@pytest.mark.parametrize(("kind", "suffix", "instructions"), [SETS[0], SETS[2]])
def test_recorded_logits(teacher, kind, suffix, instructions):
    # Logits of up to 33: 1e-4 is a few units in the last place of their float32 sums,
    # and depends on how a row is summed up; so as the original did it, row by row.
    images = tiny.images(kind)
    expected = tiny.expected()["action_logits" + suffix]
    for row, instruction in enumerate(instructions):
        alone = teacher.tokens(images[row : row + 1], [instruction])
        torch.testing.assert_close(alone.logits[0], expected[row], rtol=0, atol=1e-4)


def test_prompts(teacher):
    for instruction, ids in zip(tiny.INSTRUCTIONS, tiny.PROMPT_IDS, strict=True):
        assert teacher._prompts.ids(instruction) == [*ids, 29871]


def test_prompt_is_lower_case(teacher):
    upper = teacher._prompts.ids(tiny.INSTRUCTIONS[0].upper())
    assert upper[:-1] == tiny.PROMPT_IDS[0]


def test_padding_goes_between_image_and_prompt(teacher):
    short, long = FIRST[0], tiny.INSTRUCTIONS[1]
    batch = teacher._prompts.batch([short, long], torch.device("cpu"))
    # 24 and 30 ids with the boundary: 6 of padding after BOS.
    assert batch.padding.tolist() == [6, 0]
    assert batch.ids[0].tolist() == [1, *[32000] * 6, *tiny.PROMPT_IDS[0][1:], 29871]
    assert batch.ids[1].tolist() == [*tiny.PROMPT_IDS[1], 29871]


def test_order_of_rows_does_not_matter(teacher):
    images, order = tiny.images(), [5, 2, 0, 3, 1, 4]
    mixed = [tiny.INSTRUCTIONS[i] for i in order]
    tokens = teacher.tokens(images[order], mixed).tokens
    assert torch.equal(tokens, tiny.expected()["tokens"][order])


class TestSpread:
    """Moments against loops over the recorded logits, in plain Python arithmetic."""

    @staticmethod
    def moments(logits: torch.Tensor) -> tuple[float, float]:
        """Mean and std of the bin centre, of one dimension's 256 logits."""
        # id 31744 + w decodes to bin 255 - w, of which there are only 255 (the first
        # two ids share the highest); bin i has the centre -1 + (2 i + 1) / 255.
        centres = [-1 + (2 * min(255 - w, 254) + 1) / 255 for w in range(256)]
        weights = [torch.exp(v - logits.max()).item() for v in logits.double()]
        total = sum(weights)
        mean = sum(w * c for w, c in zip(weights, centres, strict=True)) / total
        variance = (
            sum(w * (c - mean) ** 2 for w, c in zip(weights, centres, strict=True))
            / total
        )
        return mean, variance**0.5

    def test_mean_and_std(self, teacher):
        out = teacher(frames("images", tiny.INSTRUCTIONS))
        q01 = [-0.61, -0.316, -0.133, -0.113, -0.751, -0.83]
        q99 = [0.684, 0.535, 0.848, 0.753, 0.102, 0.786]
        for row in range(6):
            for dim in range(7):
                logits = tiny.expected()["action_logits"][row, dim]
                mean, std = self.moments(logits)
                if dim < 6:
                    width = q99[dim] - q01[dim]
                    mean, std = q01[dim] + (mean + 1) / 2 * width, std * width / 2
                got = out["vla_action"][row, 0]
                assert got["mean"][dim].item() == pytest.approx(mean, abs=1e-4)
                assert got["std"][dim].item() == pytest.approx(std, abs=1e-4)
        # Every sample of a greedy decoder is the same; this is not 0.
        assert (out["vla_action", "std"] > 0).all()
        assert out["vla_action", "std"].median() > 0.05

    def test_greedy_action_does_not_change(self, folder, teacher):
        plain = tiny.load(folder)
        out = plain(frames("images", FIRST))
        assert set(out["vla_action"].keys()) == {"chunk"}
        with_spread = teacher(frames("images", FIRST))
        assert torch.equal(
            out["vla_action", "chunk"], with_spread["vla_action", "chunk"]
        )

    def test_floor(self, folder, teacher):
        std = teacher(frames("images", FIRST))["vla_action", "std"]
        floored = tiny.load(folder, spread=True, min_std=0.1)
        out = floored(frames("images", FIRST))["vla_action", "std"]
        assert torch.equal(out, std.clamp_min(0.1))
        assert (std < 0.1).any()

    def test_mean_as_the_action(self, folder, teacher):
        mean = tiny.load(folder, readout="mean")
        out = mean(frames("images", FIRST))
        expected = teacher(frames("images", FIRST))["vla_action", "mean"]
        assert torch.equal(out["vla_action", "chunk"], expected)


class TestBfloat16:
    def test_runs_and_agrees(self, folder):
        teacher = tiny.load(folder, dtype=torch.bfloat16)
        assert {p.dtype for p in teacher.parameters()} == {torch.bfloat16}
        out = teacher.tokens(tiny.images(), tiny.INSTRUCTIONS)
        same = (out.tokens == tiny.expected()["tokens"]).float().mean()
        # 8 bits of mantissa flip some of the close decisions of a random network.
        assert same > 0.7
        for row, instruction in enumerate(tiny.INSTRUCTIONS):
            alone = teacher.tokens(tiny.images()[row : row + 1], [instruction])
            agree = alone.tokens[0] == out.tokens[row]
            assert agree.float().mean() > 0.7


@pytest.mark.gpu
@pytest.mark.parametrize("options", [{}, {"cuda_graph": True}, {"compile": True}])
def test_gpu(folder, options):
    """*Not run where there is no CUDA device.*"""
    teacher = tiny.load(folder, device="cuda", **options)
    for _ in range(3):  # captured, replayed, replayed
        for kind, suffix, instructions in (s.values for s in SETS):
            tokens = teacher.tokens(tiny.images(kind), instructions).tokens
            assert torch.equal(tokens.cpu(), tiny.expected()["tokens" + suffix])


@pytest.mark.slow
def test_compiled(folder):
    teacher = tiny.load(folder, compile=True)
    tokens = teacher.tokens(tiny.images(), tiny.INSTRUCTIONS).tokens
    assert torch.equal(tokens, tiny.expected()["tokens"])


if __name__ == "__main__":
    pytest.main([__file__])
