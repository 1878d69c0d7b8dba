# Copyright (c) the torchrl_rpd authors.
#
# This source code is licensed under the MIT license found in the
# LICENSE file in the root directory of this source tree.
"""The arrays of an Octo checkpoint, and how each becomes a tensor of our modules."""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Callable, Iterable, Iterator, Mapping
from typing import NamedTuple

import torch
from torch import Tensor

from torchrl_rpd.teachers.octo._config import OctoConfig, T5Config
from torchrl_rpd.teachers.octo._stem import FEATURES, WIDTHS

_ROOT = "octo_transformer"
_BLOCKS = f"{_ROOT}/BlockTransformer_0/Transformer_0"
_T5 = f"{_ROOT}/task_tokenizers_language/hf_model"
_HEAD = "heads_action/diffusion_model"

# Octo's StdConv (vit_encoders.py) standardises its kernel at every call.
_STD_EPS = 1e-5


class Rule(NamedTuple):
    """One tensor of ours, and the array or arrays that it is made of."""

    target: str
    sources: Mapping[str, tuple[int, ...]]
    convert: Callable[..., Tensor]


def to_state_dict(
    arrays: Mapping[str, Tensor], config: OctoConfig
) -> dict[str, Tensor]:
    """Turns a checkpoint's arrays into the ``state_dict`` of :class:`OctoModel`.

    Raises:
        ValueError: if arrays are missing, left over or of another shape than the
            configuration implies.
    """
    table = list(rules(config))
    expected = {name: shape for rule in table for name, shape in rule.sources.items()}
    found = {name: tuple(array.shape) for name, array in arrays.items()}
    problems = [
        *_list("missing", expected.keys() - found.keys()),
        *_list("not used by any part of the model", found.keys() - expected.keys()),
        *_list(
            "of another shape than config.json implies",
            (
                f"{name} {found[name]}, expected {expected[name]}"
                for name in sorted(expected.keys() & found.keys())
                if found[name] != expected[name]
            ),
        ),
    ]
    if problems:
        raise ValueError(
            "The checkpoint's arrays do not fit its config.json: " + "; ".join(problems)
        )
    return {
        rule.target: rule.convert(*(arrays[name] for name in rule.sources)).contiguous()
        for rule in table
    }


def fit(config: OctoConfig, shapes: Mapping[str, tuple[int, ...]]) -> OctoConfig:
    """Completes a configuration with the sizes that only the arrays tell.

    A camera that config.json names but that was absent in (fine-)tuning has no arrays;
    it is left out, as the original does.
    """
    try:
        image_size = {
            camera: 16 * math.isqrt(shapes[f"{_ROOT}/obs_{camera}_pos_embedding"][2])
            for camera in config.goal_stacked
            if camera == "primary" or f"{_ROOT}/obs_{camera}_pos_embedding" in shapes
        }
        vocab_size, d_model = shapes[f"{_T5}/shared/embedding"]
        block = f"{_T5}/encoder/block/0/layer"
        bias = f"{block}/0/SelfAttention/relative_attention_bias/embedding"
        buckets, heads = shapes[bias]
        inner = shapes[f"{block}/0/SelfAttention/q/kernel"][1]
        d_ff = shapes[f"{block}/1/DenseReluDense/wi/kernel"][1]
    except KeyError as error:
        raise ValueError(
            f"The checkpoint has no array {error}: it is no Octo 1.5 model with a "
            "primary camera and a T5 text encoder."
        ) from None
    layers = {
        name.removeprefix(f"{_T5}/encoder/block/").split("/")[0]
        for name in shapes
        if name.startswith(f"{_T5}/encoder/block/")
    }
    return dataclasses.replace(
        config,
        image_size=image_size,
        text=T5Config(
            d_model=d_model,
            d_kv=inner // heads,
            d_ff=d_ff,
            num_layers=len(layers),
            num_heads=heads,
            vocab_size=vocab_size,
            relative_attention_num_buckets=buckets,
        ),
    )


def array_shapes(config: OctoConfig) -> dict[str, tuple[int, ...]]:
    """Name and shape of every array of a checkpoint with this configuration."""
    return {
        name: shape for rule in rules(config) for name, shape in rule.sources.items()
    }


def rules(config: OctoConfig) -> Iterator[Rule]:
    """Every tensor of :class:`OctoModel`, in the order of its modules."""
    yield from _text_encoder(config.text)
    width, horizon = config.width, config.max_horizon
    yield from _dense(
        f"{_ROOT}/task_language_projection",
        "text_projection",
        config.text.d_model,
        width,
    )
    yield _first(
        f"{_ROOT}/task_language_pos_embedding",
        "text_position",
        (1, config.text_length, width),
    )
    for camera, pixels in config.image_size.items():
        stem = f"{_ROOT}/observation_tokenizers_{camera}/SmallStem16_0"
        channels = 6 if config.goal_stacked[camera] else 3
        yield from _stem(stem, f"stems.{camera}", channels)
        yield from _dense(
            f"{_ROOT}/obs_{camera}_projection", f"projections.{camera}", FEATURES, width
        )
        yield _first(
            f"{_ROOT}/obs_{camera}_pos_embedding",
            f"positions.{camera}",
            (1, horizon, (pixels // 16) ** 2, width),
        )
    yield _first(
        f"{_ROOT}/readout_action_pos_embedding",
        "readout_position",
        (1, horizon, 1, width),
    )
    for layer in range(config.num_layers):
        yield from _block(config, layer)
    yield from _norm(f"{_BLOCKS}/encoder_norm", "transformer.norm", width)
    yield from _head(config)


def _block(config: OctoConfig, layer: int) -> Iterator[Rule]:
    source, target = f"{_BLOCKS}/encoderblock_{layer}", f"transformer.blocks.{layer}"
    width, heads = config.width, config.num_heads
    size = width // heads
    attention = f"{source}/MultiHeadDotProductAttention_0"
    yield from _norm(f"{source}/LayerNorm_0", f"{target}.norm1", width)
    for name, parts in (("query", ("query",)), ("key_value", ("key", "value"))):
        yield Rule(
            f"{target}.{name}.weight",
            {f"{attention}/{part}/kernel": (width, heads, size) for part in parts},
            lambda *arrays: torch.cat([a.flatten(1).T for a in arrays]),
        )
        yield Rule(
            f"{target}.{name}.bias",
            {f"{attention}/{part}/bias": (heads, size) for part in parts},
            lambda *arrays: torch.cat([a.flatten() for a in arrays]),
        )
    yield Rule(
        f"{target}.out.weight",
        {f"{attention}/out/kernel": (heads, size, width)},
        lambda array: array.flatten(0, 1).T,
    )
    yield _same(f"{attention}/out/bias", f"{target}.out.bias", (width,))
    yield from _norm(f"{source}/LayerNorm_1", f"{target}.norm2", width)
    yield from _dense(
        f"{source}/MlpBlock_0/Dense_0", f"{target}.up", width, config.mlp_dim
    )
    yield from _dense(
        f"{source}/MlpBlock_0/Dense_1", f"{target}.down", config.mlp_dim, width
    )


def _stem(source: str, target: str, channels: int) -> Iterator[Rule]:
    for i, width in enumerate(WIDTHS):
        yield Rule(
            f"{target}.convs.{i}.weight",
            {f"{source}/StdConv_{i}/kernel": (3, 3, channels, width)},
            lambda kernel: _to_oihw(_standardise(kernel)),
        )
        yield _same(f"{source}/StdConv_{i}/bias", f"{target}.convs.{i}.bias", (width,))
        yield from _norm(f"{source}/GroupNorm_{i}", f"{target}.norms.{i}", width)
        channels = width
    yield Rule(
        f"{target}.embedding.weight",
        {f"{source}/embedding/kernel": (1, 1, channels, FEATURES)},
        _to_oihw,
    )
    yield _same(f"{source}/embedding/bias", f"{target}.embedding.bias", (FEATURES,))


def _head(config: OctoConfig) -> Iterator[Rule]:
    head = config.head
    actions = head.action_dim * head.action_horizon
    time, hidden = head.time_dim, head.hidden_dim
    yield _same(f"{_HEAD}/time_preprocess/kernel", "head.frequencies", (time // 2, 1))
    yield from _dense(f"{_HEAD}/cond_encoder/Dense_0", "head.time_up", time, 2 * time)
    yield from _dense(f"{_HEAD}/cond_encoder/Dense_1", "head.time_down", 2 * time, time)
    net = f"{_HEAD}/reverse_network"
    inputs = time + config.width + actions
    yield from _dense(f"{net}/Dense_0", "head.input", inputs, hidden)
    for i in range(head.num_blocks):
        source, target = f"{net}/MLPResNetBlock_{i}", f"head.blocks.{i}"
        yield from _norm(f"{source}/LayerNorm_0", f"{target}.norm", hidden)
        yield from _dense(f"{source}/Dense_0", f"{target}.up", hidden, 4 * hidden)
        yield from _dense(f"{source}/Dense_1", f"{target}.down", 4 * hidden, hidden)
    yield from _dense(f"{net}/Dense_1", "head.output", hidden, actions)


def _text_encoder(t5: T5Config) -> Iterator[Rule]:
    inner = t5.num_heads * t5.d_kv
    yield _same(
        f"{_T5}/shared/embedding",
        "text_encoder.shared.weight",
        (t5.vocab_size, t5.d_model),
    )
    for i in range(t5.num_layers):
        source = f"{_T5}/encoder/block/{i}/layer"
        target = f"text_encoder.encoder.block.{i}.layer"
        linears = {
            "0/SelfAttention/q": (t5.d_model, inner),
            "0/SelfAttention/k": (t5.d_model, inner),
            "0/SelfAttention/v": (t5.d_model, inner),
            "0/SelfAttention/o": (inner, t5.d_model),
            "1/DenseReluDense/wi": (t5.d_model, t5.d_ff),
            "1/DenseReluDense/wo": (t5.d_ff, t5.d_model),
        }
        for name, shape in linears.items():
            yield Rule(
                f"{target}.{name.replace('/', '.')}.weight",
                {f"{source}/{name}/kernel": shape},
                lambda kernel: kernel.T,
            )
        if i == 0:
            bias = "SelfAttention/relative_attention_bias"
            yield _same(
                f"{source}/0/{bias}/embedding",
                f"{target}.0.{bias.replace('/', '.')}.weight",
                (t5.relative_attention_num_buckets, t5.num_heads),
            )
        for j in range(2):
            yield _same(
                f"{source}/{j}/layer_norm/weight",
                f"{target}.{j}.layer_norm.weight",
                (t5.d_model,),
            )
    yield _same(
        f"{_T5}/encoder/final_layer_norm/weight",
        "text_encoder.encoder.final_layer_norm.weight",
        (t5.d_model,),
    )


def _dense(source: str, target: str, inputs: int, outputs: int) -> Iterator[Rule]:
    kernel = {f"{source}/kernel": (inputs, outputs)}
    yield Rule(f"{target}.weight", kernel, lambda array: array.T)
    yield _same(f"{source}/bias", f"{target}.bias", (outputs,))


def _norm(source: str, target: str, width: int) -> Iterator[Rule]:
    yield _same(f"{source}/scale", f"{target}.weight", (width,))
    yield _same(f"{source}/bias", f"{target}.bias", (width,))


def _same(source: str, target: str, shape: tuple[int, ...]) -> Rule:
    return Rule(target, {source: shape}, lambda array: array)


def _first(source: str, target: str, shape: tuple[int, ...]) -> Rule:
    """Without the leading dimension of 1."""
    return Rule(target, {source: shape}, lambda array: array.squeeze(0))


def _to_oihw(kernel: Tensor) -> Tensor:
    return kernel.permute(3, 2, 0, 1)


def _standardise(kernel: Tensor) -> Tensor:
    """Once, at loading: the weights of a teacher do not change."""
    centred = kernel - kernel.mean((0, 1, 2))
    return centred / (centred.std((0, 1, 2), correction=0) + _STD_EPS)


def _list(what: str, names: Iterable[str]) -> Iterator[str]:
    found = sorted(names)
    if found:
        more = f" and {len(found) - 3} more" if len(found) > 3 else ""
        yield f"{what}: {', '.join(found[:3])}{more}"
