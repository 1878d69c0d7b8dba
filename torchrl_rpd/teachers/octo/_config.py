# Copyright (c) the torchrl_rpd authors.
#
# This source code is licensed under the MIT license found in the
# LICENSE file in the root directory of this source tree.
"""What a checkpoint's config.json says, and what of it is supported."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from typing import Any

# What the released models were trained with; a fine-tuned config.json says its own.
_WINDOW_SIZE = 2

_T5 = ("t5-small", "t5-base", "t5-large")


@dataclass(frozen=True)
class HeadConfig:
    """The diffusion head; the defaults are those of Octo's ``DiffusionActionHead``."""

    action_dim: int = 7
    action_horizon: int = 1
    max_action: float = 5.0
    time_dim: int = 32
    num_blocks: int = 3
    hidden_dim: int = 256
    diffusion_steps: int = 20


@dataclass(frozen=True)
class T5Config:
    """Sizes of the text encoder (config.json only names it); defaults: t5-base."""

    d_model: int = 768
    d_kv: int = 64
    d_ff: int = 3072
    num_layers: int = 12
    num_heads: int = 12
    vocab_size: int = 32128
    relative_attention_num_buckets: int = 32


@dataclass(frozen=True)
class OctoConfig:
    """Everything that decides which tensors there are and how they are used.

    Attributes:
        width: token embedding size.
        num_layers: transformer layers.
        num_heads: attention heads.
        mlp_dim: hidden width of the transformer's MLPs.
        max_horizon: time steps that have a position embedding.
        window_size: time steps that the model was trained on.
        image_size: pixels (height and width) by camera, in the order of the tokens.
        goal_stacked: whether the camera's stem also takes a goal image, by camera.
        text_length: tokens of an instruction, padding included.
        tokenizer_name: Hub id of the tokenizer.
        head: the diffusion head.
        text: the text encoder.
    """

    width: int
    num_layers: int
    num_heads: int
    mlp_dim: int
    max_horizon: int
    goal_stacked: Mapping[str, bool]
    head: HeadConfig
    image_size: Mapping[str, int] = field(
        default_factory=lambda: {"primary": 256, "wrist": 128}
    )
    text: T5Config = field(default_factory=T5Config)
    text_length: int = 16
    tokenizer_name: str = "t5-base"
    window_size: int = _WINDOW_SIZE

    @classmethod
    def from_json(cls, config: Mapping[str, Any]) -> OctoConfig:
        """Reads the content of a config.json.

        Raises:
            ValueError: naming everything in it that is not supported.
        """
        problems: list[str] = []
        model = config["model"]
        cameras = dict(_cameras(model, problems))
        transformer = model["transformer_kwargs"]
        if transformer.get("add_position_embedding", False):
            problems.append("transformer_kwargs.add_position_embedding=True")
        if not model.get("use_correct_attention", False):
            problems.append(
                "use_correct_attention=False (the first octo-base and octo-small of "
                "December 2023; the 1.5 models have True)"
            )
        if not model.get("repeat_task_tokens", False):
            problems.append("repeat_task_tokens=False")
        if model["readouts"] != {"action": 1}:
            problems.append(
                f"readouts={model['readouts']} (supported: {{'action': 1}})"
            )
        head = _head(model["heads"], problems)
        tokenizer, length = _text(config, problems)
        normalisations = set(_find(config, "action_proprio_normalization_type"))
        if normalisations - {"normal", "NormalizationType.NORMAL"}:
            problems.append(
                f"action_proprio_normalization_type={sorted(map(str, normalisations))} "
                "(supported: 'normal')"
            )
        if problems:
            raise ValueError(
                "config.json describes an Octo model that OctoTeacher does not cover: "
                + "; ".join(problems)
                + ". Covered: octo-small-1.5, octo-base-1.5 and fine-tunes of the same "
                "architecture."
            )
        return cls(
            width=model["token_embedding_size"],
            num_layers=transformer["num_layers"],
            num_heads=transformer["num_attention_heads"],
            mlp_dim=transformer["mlp_dim"],
            max_horizon=model["max_horizon"],
            goal_stacked=cameras,
            head=head,
            text_length=length,
            tokenizer_name=tokenizer,
            window_size=int(config.get("window_size", _WINDOW_SIZE)),
        )


def _cameras(
    model: Mapping[str, Any], problems: list[str]
) -> Iterator[tuple[str, bool]]:
    for name, spec in model["observation_tokenizers"].items():
        where = f"observation_tokenizers.{name}"
        if name not in ("primary", "wrist"):
            problems.append(f"{where} (supported: primary, wrist)")
            continue
        if spec["name"] != "ImageTokenizer":
            problems.append(f"{where} is a {spec['name']} (supported: ImageTokenizer)")
            continue
        kwargs = dict(spec["kwargs"])
        key = [f"image_{name}"]
        observed = kwargs.pop("obs_stack_keys", None)
        goal = kwargs.pop("task_stack_keys", [])
        encoder = kwargs.pop("encoder")
        if observed != key or goal not in (key, []):
            problems.append(
                f"{where} stacks {observed} and the goals {goal} (supported: {key})"
            )
        _refuse_set(
            where, kwargs, {"proper_pad_mask": True, "num_tokens": None}, problems
        )
        if encoder["name"] != "SmallStem16":
            problems.append(
                f"{where}.encoder={encoder['name']} (supported: SmallStem16)"
            )
        _refuse_set(f"{where}.encoder", encoder["kwargs"], {}, problems)
        yield name, bool(goal)
    if "primary" not in model["observation_tokenizers"]:
        problems.append("no observation_tokenizers.primary")


def _head(heads: Mapping[str, Any], problems: list[str]) -> HeadConfig:
    if set(heads) != {"action"}:
        problems.append(f"heads={sorted(heads)} (supported: action)")
    spec = heads.get("action", {"name": "no action head", "kwargs": {}})
    if spec["name"] != "DiffusionActionHead":
        problems.append(f"heads.action is a {spec['name']} (supported: Diffusion...)")
        return HeadConfig()
    kwargs = dict(spec["kwargs"])
    # Octo's own shim for its older configurations.
    if "pred_horizon" in kwargs:
        kwargs["action_horizon"] = kwargs.pop("pred_horizon")
    known = {
        key: kwargs.pop(key) for key in HeadConfig.__annotations__ if key in kwargs
    }
    same = {
        "readout_key": "readout_action",
        "use_map": False,
        "use_layer_norm": True,
        # Of training only.
        "dropout_rate": None,
        "loss_type": None,
        "n_diffusion_samples": None,
    }
    _refuse_set("heads.action", kwargs, same, problems)
    return HeadConfig(**known)


def _text(config: Mapping[str, Any], problems: list[str]) -> tuple[str, int]:
    tokenizers = config["model"]["task_tokenizers"]
    if set(tokenizers) != {"language"}:
        problems.append(f"task_tokenizers={sorted(tokenizers)} (supported: language)")
    spec = tokenizers.get("language", {"name": "missing", "kwargs": {}})
    kwargs = dict(spec["kwargs"])
    encoder = str(kwargs.pop("encoder", None))
    if spec["name"] != "LanguageTokenizer" or encoder.split("/")[-1] not in _T5:
        problems.append(
            f"task_tokenizers.language is a {spec['name']} with encoder {encoder} "
            f"(supported: LanguageTokenizer with one of {', '.join(_T5)})"
        )
    same = {"finetune_encoder": None, "proper_pad_mask": True}
    _refuse_set("task_tokenizers.language", kwargs, same, problems)
    processor = config.get("text_processor") or {"name": "None", "kwargs": {}}
    options = dict(processor["kwargs"])
    padding = options.pop("tokenizer_kwargs", {})
    name = str(options.pop("tokenizer_name", encoder))
    if processor["name"] != "HFTokenizer" or options.pop("encode_with_model", False):
        problems.append(
            f"text_processor={processor['name']} (supported: HFTokenizer without "
            "encode_with_model)"
        )
    if padding.get("padding") != "max_length" or not padding.get("truncation"):
        problems.append(f"text_processor.tokenizer_kwargs={padding}")
    return name, int(padding.get("max_length", 16))


def _refuse_set(
    where: str, found: Mapping[str, Any], same: Mapping[str, Any], problems: list[str]
) -> None:
    """Options must have the values in ``same`` (None: any) or be switched off."""
    off: tuple[Any, ...] = (False, None, "none", "default", [], ())
    for key, value in found.items():
        expected = same.get(key, value if value in off else ...)
        if expected is not None and value != expected:
            problems.append(f"{where}.{key}={value!r}")


def _find(tree: Any, key: str) -> Iterator[Any]:
    """Every value under ``key`` anywhere in a JSON tree."""
    if isinstance(tree, Mapping):
        if key in tree:
            yield tree[key]
        tree = list(tree.values())
    if isinstance(tree, list):
        for item in tree:
            yield from _find(item, key)
