# Copyright (c) the torchrl_rpd authors.
#
# This source code is licensed under the MIT license found in the
# LICENSE file in the root directory of this source tree.
"""The hash behind the scripted teacher's noise: right, random and stateless."""

from __future__ import annotations

import math

import pytest
import torch

from torchrl_rpd.teachers import _hash_noise as hn

N = 100_000
MASK = (1 << 64) - 1


def keys(n: int = N, *, seed: int = 0, stream: int = 0) -> torch.Tensor:
    """Keys of the most regular input there is: 0, 1, 2, ..."""
    return hn.hash_rows(torch.arange(n).unsqueeze(-1), seed=seed, stream=stream)


def correlation(x: torch.Tensor, y: torch.Tensor) -> float:
    return float(torch.corrcoef(torch.stack([x.flatten(), y.flatten()]))[0, 1])


# the standard error of a correlation of N independent pairs is 1 / sqrt(N)
CORRELATION = 4.5 / math.sqrt(N)


def test_splitmix64_reference_values():
    """SplitMix64's published first outputs for seed 0."""
    expected = [0xE220A8397B1DCDAF, 0x6E789E6AA1B965F4, 0x06C45D188009454F]
    got = hn._counter(3, torch.zeros(1, dtype=torch.int64)).tolist()
    assert [value & MASK for value in got] == expected


def test_mix_equals_unsigned_arithmetic():
    """Signed, wrapping tensors against Python's unbounded integers."""

    def reference(x: int) -> int:
        x = ((x ^ (x >> 30)) * 0xBF58476D1CE4E5B9) & MASK
        x = ((x ^ (x >> 27)) * 0x94D049BB133111EB) & MASK
        return x ^ (x >> 31)

    values = torch.randint(-(2**63), 2**63 - 1, (500,))
    values[:4] = torch.tensor([0, -1, 2**63 - 1, -(2**63)])
    expected = [reference(v & MASK) for v in values.tolist()]
    assert [v & MASK for v in hn._mix(values).tolist()] == expected
    assert [hn._mix_int(v) & MASK for v in values.tolist()] == expected


def test_uniform_is_uniform():
    u = hn.uniform(keys(), 3)
    assert u.shape == (N, 3) and u.dtype == torch.float64
    assert u.min() >= 0 and u.max() < 1
    for column in u.unbind(-1):
        # mean 1/2 with standard error sqrt(1/12/N) = 0.0009
        assert abs(column.mean() - 0.5) < 0.004
        counts = torch.histc(column, bins=100, min=0.0, max=1.0)
        chi_squared = ((counts - N / 100) ** 2 / (N / 100)).sum()
        # 99 degrees of freedom: mean 99, standard deviation sqrt(2 * 99) = 14
        assert 99 - 4.5 * 14 < chi_squared < 99 + 4.5 * 14


def test_normal_is_normal():
    z = hn.normal(keys(), 3)
    assert z.shape == (N, 3) and bool(z.isfinite().all())
    for column in z.unbind(-1):
        assert abs(column.mean()) < 4.5 / math.sqrt(N)
        # the variance of z**2 is 2, that of z**4 is 96
        assert abs(column.square().mean() - 1) < 4.5 * math.sqrt(2 / N)
        assert abs(column.pow(4).mean() - 3) < 4.5 * math.sqrt(96 / N)
        share = (column.abs() < 1).double().mean()
        assert abs(share - 0.6827) < 0.007


@pytest.mark.parametrize(
    "one,other",
    [
        ((0, 0), (1, 0)),
        ((0, 0), (-1, 0)),
        ((0, 0), (2**40, 0)),
        ((0, 0), (0, 1)),
        # seed and stream are not exchangeable
        ((0, 1), (1, 0)),
    ],
)
def test_seeds_and_streams_are_unrelated(one, other):
    x, y = (
        hn.normal(keys(seed=seed, stream=stream), 1) for seed, stream in (one, other)
    )
    assert abs(correlation(x, y)) < CORRELATION


def test_draws_of_one_key_and_neighbouring_rows_are_unrelated():
    z = hn.normal(keys(), 6)
    off_diagonal = torch.corrcoef(z.T) - torch.eye(6)
    assert off_diagonal.abs().max() < CORRELATION
    assert abs(correlation(z[:-1, 0], z[1:, 0])) < CORRELATION * 1.01


def test_one_flipped_bit_changes_half_of_the_key():
    words = hn.float_words(torch.randn(2000, 42))
    flipped = words.clone()
    flipped[:, 17] ^= 1  # the last bit of one float
    a = hn.hash_rows(words, seed=0, stream=0)
    b = hn.hash_rows(flipped, seed=0, stream=0)
    changed = zip(a.tolist(), b.tolist(), strict=True)
    bits = sum(bin((x ^ y) & MASK).count("1") for x, y in changed)
    # 64 bits, each changed with probability 1/2: 32, standard error 4 / sqrt(2000)
    assert abs(bits / 2000 - 32) < 0.4


def test_order_of_words_and_number_of_words_matter():
    a = hn.hash_rows(torch.tensor([[1, 2], [2, 1]]), seed=0, stream=0)
    b = hn.hash_rows(torch.tensor([[1], [1]]), seed=0, stream=0)
    assert a[0] != a[1] and a[0] != b[0]


def test_a_row_depends_on_itself_only():
    words = hn.float_words(torch.randn(7, 5, 42))
    whole = hn.hash_rows(words, seed=3, stream=1)
    assert whole.shape == (7, 5)
    for i in range(7):
        for j in range(5):
            alone = hn.hash_rows(words[i, j], seed=3, stream=1)
            assert alone == whole[i, j]
            # the order in which rows are stored in memory is no matter either
            assert hn.uniform(alone, 4).equal(hn.uniform(whole.T[j, i], 4))


def test_torch_generator_is_neither_read_nor_moved():
    state = torch.get_rng_state()
    first = hn.normal(keys(10), 3)
    assert torch.get_rng_state().equal(state)
    torch.manual_seed(123)
    assert hn.normal(keys(10), 3).equal(first)


def test_float_words():
    x = torch.tensor([0.0, -0.0, 1.0, -1.0])
    # IEEE 754: 1.0 is 0x3F800000; the sign is the top bit of 32, read as two's
    # complement: -1.0 is 0x3F800000 - 2**31
    expected = [0, 0, 0x3F800000, 0x3F800000 - 2**31]
    assert hn.float_words(x).tolist() == expected
    # slices of a larger tensor are not contiguous
    assert hn.float_words(x.repeat(3, 1)[:, 1:3]).tolist() == [[0, 0x3F800000]] * 3


if __name__ == "__main__":
    pytest.main([__file__])
