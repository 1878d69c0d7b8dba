# Copyright (c) the torchrl_rpd authors.
#
# This source code is licensed under the MIT license found in the
# LICENSE file in the root directory of this source tree.
"""A package named lerobot with the surface that LeRobotTeacher calls.

lerobot itself needs Python 3.12 and an older torch. Signatures, call order and effects
that a caller can notice follow its tag v0.6.1 (the same in v0.5.0 unless noted):

- ``src/lerobot/configs/policies.py``: ``PreTrainedConfig.from_pretrained``, ``type``,
  ``image_features``, ``robot_state_feature``, ``env_state_feature``,
  ``action_feature``, ``use_peft``, ``use_amp``, ``n_obs_steps``, ``device``;
- ``src/lerobot/policies/factory.py``: ``get_policy_class(name)`` and
  ``make_pre_post_processors(policy_cfg, pretrained_path, pretrained_revision,
  **kwargs)`` (no ``pretrained_revision`` in v0.5.0, so nothing may pass it), with
  ``preprocessor_overrides`` by step;
- ``src/lerobot/policies/pretrained.py``: ``PreTrainedPolicy.from_pretrained``,
  ``predict_action_chunk(batch, **kwargs)``;
- ``src/lerobot/processor/``: pipelines that take batches apart into observation and
  ``task`` (``converters.py``), rename, add batch dimensions in place, tokenize, move,
  normalise by mean and standard deviation (``normalize_processor.py``), add the state
  back to relative actions (``relative_action_processor.py``), and end on the CPU.

Networks are not imitated: the policies here compute what a test can do by hand.
"""

from __future__ import annotations

import json
import sys
from pathlib import Path
from types import ModuleType, SimpleNamespace
from typing import Any

import torch
from torch import Tensor, nn

CHUNK = 3
STATE, ACTION = 2, 2
STATS = {
    "state": {"mean": [0.0, 1.0], "std": [1.0, 0.5]},
    "action": {"mean": [0.5, -1.0], "std": [2.0, 4.0]},
}


# ---------------------------------------------------------------------- configuration
class PreTrainedConfig:
    """``lerobot.configs.policies.PreTrainedConfig``."""

    def __init__(self, type: str, **fields: Any) -> None:
        self.type = type
        defaults = {"n_obs_steps": 1, "use_amp": False, "use_peft": False}
        for name, value in {"device": "cpu", **defaults, **fields}.items():
            setattr(self, name, value)

    def _features(self, kind: str, features: dict) -> dict[str, SimpleNamespace]:
        return {
            name: SimpleNamespace(type=kind, shape=tuple(feature["shape"]))
            for name, feature in features.items()
            if feature["type"] == kind
        }

    @property
    def image_features(self) -> dict[str, SimpleNamespace]:
        return self._features("VISUAL", self.input_features)

    @property
    def robot_state_feature(self) -> SimpleNamespace | None:
        return self._features("STATE", self.input_features).get("observation.state")

    @property
    def env_state_feature(self) -> SimpleNamespace | None:
        return next(iter(self._features("ENV", self.input_features).values()), None)

    @property
    def action_feature(self) -> SimpleNamespace | None:
        return self._features("ACTION", self.output_features).get("action")

    @classmethod
    def from_pretrained(
        cls,
        pretrained_name_or_path: str | Path,
        *,
        force_download: bool = False,
        resume_download: bool | None = None,
        proxies: dict | None = None,
        token: str | bool | None = None,
        cache_dir: str | Path | None = None,
        local_files_only: bool = False,
        revision: str | None = None,
        **policy_kwargs: Any,
    ) -> PreTrainedConfig:
        file = Path(pretrained_name_or_path) / "config.json"
        if not file.exists():
            raise FileNotFoundError(f"config.json not found in {file.parent}")
        return cls(**json.loads(file.read_text()))


# ---------------------------------------------------------------------- policies
class PreTrainedPolicy(nn.Module):
    """``lerobot.policies.pretrained.PreTrainedPolicy``."""

    def __init__(self, config: PreTrainedConfig) -> None:
        super().__init__()
        self.config = config
        self.gain = nn.Parameter(torch.ones(()))
        self.asked: list[dict[str, Any]] = []

    @classmethod
    def from_pretrained(
        cls,
        pretrained_name_or_path: str | Path,
        *,
        config: PreTrainedConfig | None = None,
        revision: str | None = None,
        strict: bool = False,
        **kwargs: Any,
    ) -> PreTrainedPolicy:
        assert config is not None
        policy = cls(config)
        weights = json.loads((Path(pretrained_name_or_path) / "model.json").read_text())
        policy.gain.data.fill_(weights["gain"])
        return policy.to(config.device).eval()


class ACTPolicy(PreTrainedPolicy):
    """Deterministic; reads images and state, no text."""

    @torch.no_grad()
    def predict_action_chunk(self, batch: dict[str, Tensor]) -> Tensor:
        self.eval()
        self.asked.append(batch)
        light = sum(
            batch[key].mean((1, 2, 3)) for key in self.config.image_features
        )  # KeyError without one of them, as in the original
        total = self.gain * light + batch["observation.state"].sum(-1)
        step = torch.arange(CHUNK, dtype=torch.float32)
        return (total[:, None] + step)[..., None].expand(-1, -1, ACTION)


class SmolVLAPolicy(PreTrainedPolicy):
    """Draws noise, reads tokens, fills in missing cameras, changes its state."""

    @torch.no_grad()
    def predict_action_chunk(
        self, batch: dict[str, Tensor], noise: Tensor | None = None, **kwargs: Any
    ) -> Tensor:
        self.eval()
        self.asked.append(batch)
        present = [key for key in self.config.image_features if key in batch]
        if not present:
            raise ValueError("All image features are missing from the batch.")
        state = batch["observation.state"]
        state[:, 0] *= -1  # as _pi_aloha_decode_state does
        rows = state.shape[0]
        if noise is None:
            noise = torch.randn(rows, CHUNK, ACTION)
        told = batch["observation.language.tokens"].float().sum(-1)
        return noise + self.gain * told[:, None, None]


POLICIES = {"act": ACTPolicy, "smolvla": SmolVLAPolicy}


def get_policy_class(name: str) -> type[PreTrainedPolicy]:
    """``lerobot.policies.factory.get_policy_class``."""
    if name not in POLICIES:
        raise ValueError(f"Unknown policy name '{name}'.")
    return POLICIES[name]


# ---------------------------------------------------------------------- processors
class Pipeline:
    """``lerobot.processor.PolicyProcessorPipeline``, loaded."""

    def __init__(self, saved: dict, overrides: dict, partner: Pipeline | None) -> None:
        steps = {step["registry_name"]: step["config"] for step in saved["steps"]}
        unused = set(overrides) - set(steps)
        if unused:
            raise KeyError(f"Override keys {unused} do not match any step")
        self.steps = {
            name: {**config, **overrides.get(name, {})}
            for name, config in steps.items()
        }
        self.state: Tensor | None = None
        self.partner = partner


class Preprocessor(Pipeline):
    def __call__(self, batch: dict[str, Any]) -> dict[str, Any]:
        # (converters.batch_to_transition: nothing else gets through)
        seen = {k: v for k, v in batch.items() if k.startswith("observation.")}
        names = self.steps["rename_observations_processor"]["rename_map"]
        seen = {names.get(key, key): value for key, value in seen.items()}
        self.state = seen.get("observation.state")
        device = self.steps["device_processor"]["device"]
        seen = {key: value.to(device) for key, value in seen.items()}
        if "tokenizer_processor" in self.steps:
            task = batch["task"]
            assert isinstance(task, list), task
            # every text becomes one token: its number of words
            tokens = torch.tensor([[len(text.split())] for text in task])
            seen["observation.language.tokens"] = tokens
        if "observation.state" in seen and "normalizer_processor" in self.steps:
            stats = self.steps["normalizer_processor"]["stats"]["state"]
            mean, std = (torch.tensor(stats[name]) for name in ("mean", "std"))
            seen["observation.state"] = (seen["observation.state"] - mean) / (
                std + 1e-8
            )
        return {"action": None, "next.reward": 0.0, "task": batch.get("task"), **seen}


class Postprocessor(Pipeline):
    def __call__(self, action: Tensor) -> Tensor:
        if not isinstance(action, Tensor):
            raise ValueError(f"Action should be a PolicyAction type got {type(action)}")
        stats = self.steps["unnormalizer_processor"]["stats"]["action"]
        action = action * torch.tensor(stats["std"]) + torch.tensor(stats["mean"])
        if "absolute_actions_processor" in self.steps:
            state = self.partner.state
            action = action + (state[:, None] if action.ndim == 3 else state)
        return action.cpu()


def make_pre_post_processors(
    policy_cfg: PreTrainedConfig,
    pretrained_path: str | None = None,
    **kwargs: Any,
) -> tuple[Preprocessor, Postprocessor]:
    """``lerobot.policies.factory.make_pre_post_processors`` (of v0.5.0)."""
    known = {"preprocessor_overrides", "postprocessor_overrides", "dataset_stats"}
    assert set(kwargs) <= known, kwargs
    folder = Path(pretrained_path)
    saved = [
        json.loads((folder / f"policy_{name}.json").read_text())
        for name in ("preprocessor", "postprocessor")
    ]
    before = Preprocessor(saved[0], kwargs.get("preprocessor_overrides", {}), None)
    after = Postprocessor(saved[1], kwargs.get("postprocessor_overrides", {}), before)
    return before, after


# ---------------------------------------------------------------------- checkpoints
def save(
    folder: Path,
    type: str = "act",
    *,
    cameras: tuple[str, ...] = ("top",),
    relative: bool = False,
    gain: float = 1.0,
    **fields: Any,
) -> Path:
    """A checkpoint as lerobot lays it out (weights and statistics as text)."""
    folder.mkdir(parents=True, exist_ok=True)
    visual = {"type": "VISUAL", "shape": [3, 8, 8]}
    features = {f"observation.images.{name}": visual for name in cameras}
    features["observation.state"] = {"type": "STATE", "shape": [STATE]}
    config = {
        "type": type,
        "chunk_size": CHUNK,
        "n_action_steps": 1,
        "input_features": features,
        "output_features": {"action": {"type": "ACTION", "shape": [ACTION]}},
        **fields,
    }
    before = {
        "rename_observations_processor": {"rename_map": {}},
        "to_batch_processor": {},
        # what it was trained on; nobody can have it here
        "device_processor": {"device": "cuda:7"},
        "normalizer_processor": {"stats": STATS},
    }
    if type == "smolvla":
        before["tokenizer_processor"] = {"max_length": 48}
    after = {"unnormalizer_processor": {"stats": STATS}}
    if relative:
        after["absolute_actions_processor"] = {"enabled": True}
    after["device_processor"] = {"device": "cpu"}
    for name, steps in (("preprocessor", before), ("postprocessor", after)):
        listed = [{"registry_name": k, "config": v} for k, v in steps.items()]
        text = json.dumps({"name": f"policy_{name}", "steps": listed})
        (folder / f"policy_{name}.json").write_text(text)
    (folder / "config.json").write_text(json.dumps(config))
    (folder / "model.json").write_text(json.dumps({"gain": gain}))
    return folder


def install(monkeypatch: Any) -> None:
    """Puts the stand-in where ``import lerobot`` finds it."""
    modules = {
        name: ModuleType(name)
        for name in (
            *("lerobot", "lerobot.configs", "lerobot.configs.policies"),
            *("lerobot.policies", "lerobot.policies.factory"),
        )
    }
    modules["lerobot.configs.policies"].PreTrainedConfig = PreTrainedConfig
    factory = modules["lerobot.policies.factory"]
    factory.get_policy_class = get_policy_class
    factory.make_pre_post_processors = make_pre_post_processors
    for name, module in modules.items():
        monkeypatch.setitem(sys.modules, name, module)
