# Copyright (c) the torchrl_rpd authors.
#
# This source code is licensed under the MIT license found in the
# LICENSE file in the root directory of this source tree.
"""Resizing against Pillow, bit for bit."""

from __future__ import annotations

import numpy as np
import pytest
import torch

from torchrl_rpd.teachers._resize import PILResize

Image = pytest.importorskip("PIL.Image")
FILTERS = {"bicubic": Image.Resampling.BICUBIC, "lanczos": Image.Resampling.LANCZOS}


def picture(kind: str, height: int, width: int) -> np.ndarray:
    """``[H, W, 3]`` uint8."""
    generator = np.random.default_rng(0)
    y, x = np.mgrid[:height, :width]
    if kind == "noise":
        return generator.integers(256, size=(height, width, 3), dtype=np.uint8)
    if kind == "black and white":  # overshoots below 0 and above 255
        return generator.integers(2, size=(height, width, 3), dtype=np.uint8) * 255
    if kind == "gradient":
        channels = [255 * y / height, 255 * x / width, 127 + 0 * x]
    elif kind == "edges":
        channels = [255 * (x > width / 3), 255 * (y > height / 2), 255 * (x > y)]
    elif kind == "waves":
        channels = [127 + 120 * np.sin(k * x * y / 50) for k in (1, 2, 3)]
    return np.stack(channels, -1).astype(np.uint8)


def pillow(image: np.ndarray, size: tuple[int, int], filter: str) -> np.ndarray:
    """Width first, then height: what all versions do, whatever the sizes.

    (In one call, Pillow 13 takes the height first where it shrinks much more.)
    """
    height, width = size
    columns = Image.fromarray(image).resize((width, image.shape[0]), FILTERS[filter])
    return np.asarray(columns.resize((width, height), FILTERS[filter]))


def ours(image: np.ndarray, size: tuple[int, int], filter: str) -> np.ndarray:
    planes = torch.from_numpy(image.copy()).permute(2, 0, 1)
    return PILResize(size, filter)(planes).permute(1, 2, 0).numpy()


@pytest.mark.parametrize("filter", FILTERS)
@pytest.mark.parametrize(
    "kind", ["noise", "black and white", "gradient", "edges", "waves"]
)
@pytest.mark.parametrize("before", [256, 128, 224, 96, 301])
def test_equals_pillow_on_square_images(filter, kind, before):
    image = picture(kind, before, before)
    # One call, as the original preprocessing makes it.
    expected = Image.fromarray(image).resize((224, 224), FILTERS[filter])
    np.testing.assert_array_equal(ours(image, (224, 224), filter), np.asarray(expected))


@pytest.mark.parametrize("filter", FILTERS)
@pytest.mark.parametrize(
    ("before", "after"),
    [
        ((240, 320), (224, 224)),  # a camera's usual shape
        ((320, 240), (224, 224)),
        ((224, 300), (224, 224)),  # the height stays
        ((300, 224), (224, 224)),  # the width stays
        ((100, 37), (32, 17)),
        ((7, 5), (64, 31)),  # up, from fewer pixels than a filter has
        ((1, 1), (3, 2)),
        ((97, 3), (5, 97)),
    ],
)
def test_equals_pillow_on_other_shapes(filter, before, after):
    for kind in ("noise", "black and white", "edges"):
        image = picture(kind, *before)
        np.testing.assert_array_equal(
            ours(image, after, filter), pillow(image, after, filter)
        )


def test_by_hand():
    # Two pixels to one: by symmetry both count 1/2; (0 + 255) / 2 = 127.5 rounds up.
    row = torch.tensor([[[0, 255]]], dtype=torch.uint8)
    assert PILResize((1, 1))(row).tolist() == [[[128]]]
    # One pixel to many: only itself, whatever the filter.
    assert PILResize((2, 3), "lanczos")(row[..., 1:]).unique().tolist() == [255]


def test_any_batch_and_any_size_of_it():
    # 12 * 3 planes of 256x256: more than are taken at a time on a CPU.
    images = torch.from_numpy(np.stack([picture("noise", 256, 256)] * 12))
    images = images.permute(0, 3, 1, 2) ^ torch.arange(12).byte().view(-1, 1, 1, 1)
    resize = PILResize(224)
    one_by_one = torch.stack([resize(image) for image in images])
    assert torch.equal(resize(images), one_by_one)
    batched = resize(images.view(4, 3, 3, 256, 256))
    assert torch.equal(batched, one_by_one.view(4, 3, 3, 224, 224))


def test_the_result_is_new_or_the_same():
    image = torch.from_numpy(picture("noise", 8, 8))
    assert PILResize(8)(image.permute(2, 0, 1)).equal(image.permute(2, 0, 1))


def test_has_no_state():
    resize = PILResize(224)
    resize(torch.zeros(3, 256, 256, dtype=torch.uint8))
    assert not resize.state_dict()


@pytest.mark.gpu
@pytest.mark.parametrize("filter", FILTERS)
def test_same_on_a_gpu(filter):
    images = torch.from_numpy(picture("black and white", 256, 256)).permute(2, 0, 1)
    resize = PILResize(224, filter)
    assert torch.equal(resize(images.cuda()).cpu(), resize(images))


@pytest.mark.parametrize(
    ("size", "filter", "words"),
    [
        (0, "bicubic", "at least 1"),
        ((3, 0), "bicubic", "at least 1"),
        (3, "nearest", "bicubic"),
    ],
)
def test_refuses_arguments(size, filter, words):
    with pytest.raises(ValueError, match=words):
        PILResize(size, filter)


def test_refuses_images():
    resize = PILResize(4)
    with pytest.raises(TypeError, match="uint8"):
        resize(torch.zeros(3, 8, 8))
    with pytest.raises(ValueError, match=r"\[\*B, C, H, W\]"):
        resize(torch.zeros(8, 8, dtype=torch.uint8))


if __name__ == "__main__":
    pytest.main([__file__])
