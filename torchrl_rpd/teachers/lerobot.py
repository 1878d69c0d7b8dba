# Copyright (c) the torchrl_rpd authors.
#
# This source code is licensed under the MIT license found in the
# LICENSE file in the root directory of this source tree.
"""LeRobot policies (SmolVLA, pi0, ACT, ...) as teachers."""

from __future__ import annotations

import importlib
import os
from collections.abc import Callable, Mapping
from contextlib import nullcontext
from typing import Any

import torch
from tensordict import TensorDictBase
from tensordict.utils import NestedKey
from torch import Tensor
from torchrl.data.vla.schema import IMAGE_KEY, INSTRUCTION_KEY, STATE_KEY
from torchrl.modules.vla import LeRobotPolicyWrapper

from torchrl_rpd.teachers._draws import OwnDraws
from torchrl_rpd.teachers._hub import resolve_checkpoint
from torchrl_rpd.teachers._images import read_images, read_tensor
from torchrl_rpd.teachers._instructions import read_instructions

__all__ = ["LeRobotTeacher"]

_NAME = "LeRobotTeacher"

_STATE = "observation.state"
_EMPTY_CAMERA = "empty_camera"  # LeRobot's name for a camera that a policy fills in


class LeRobotTeacher(OwnDraws, LeRobotPolicyWrapper):
    """A LeRobot policy with its pre- and post-processor, as a teacher.

    :class:`~torchrl.modules.vla.LeRobotPolicyWrapper` calls the policy alone; what
    LeRobot saves beside it (renaming, tokens, normalisation, and back) is called here
    around it, so that the chunk is in the units of the data the policy was trained on.
    Load one with :meth:`from_pretrained`.

    **lerobot needs an environment of its own** (Python 3.12 and an older torch than
    this package is tested with). There, serve the teacher with
    ``python -m torchrl_rpd.teachers.serve module:factory``, and use
    :class:`~torchrl_rpd.teachers.RemoteTeacher` where you train: docs/lerobot.md.

    .. warning::
        Tested on a stand-in with the call surface of lerobot 0.5.0 to 0.6.1, not with
        lerobot itself. Run :func:`~torchrl_rpd.teachers.check_teacher` first.

    SmolVLA and pi0 draw noise from torch's global generators. Here they do so from a
    seed of the teacher's own, and the global ones are left as they were. A batch is
    drawn at once: splitting it changes the draws.

    Args:
        policy (lerobot's PreTrainedPolicy): anything with ``predict_action_chunk`` and
            a LeRobot ``config``.
        preprocessor (callable): LeRobot batch -> what the policy reads.
        postprocessor (callable): chunk ``[n, H, A]`` of the policy -> un-normalised.

    Keyword Args:
        instruction (str, optional): see :meth:`from_pretrained`, as all that follow.
        cameras (mapping of str to NestedKey, optional): Defaults to ``None``.
        state_key (NestedKey): Defaults to ``("observation", "state")``.
        instruction_key (NestedKey): Defaults to ``"language_instruction"``.
        seed (int): Defaults to ``0``.

    Raises:
        ValueError: for a policy that reads what one frame does not show (several time
            steps, an environment state), or cameras that do not fit it.

    Examples:
        >>> from types import SimpleNamespace
        >>> import torch
        >>> from tensordict import TensorDict
        >>> from torchrl_rpd.teachers.lerobot import LeRobotTeacher
        >>> class Policy:  # a stand-in; from_pretrained loads real ones
        ...     config = SimpleNamespace(
        ...         n_obs_steps=1, chunk_size=2, device="cpu", use_amp=False,
        ...         image_features={"observation.images.top": None},
        ...         robot_state_feature=None, env_state_feature=None,
        ...         action_feature=SimpleNamespace(shape=(7,)),
        ...     )
        ...     def predict_action_chunk(self, batch):
        ...         light = batch["observation.images.top"].mean((1, 2, 3))
        ...         return light[:, None, None].expand(-1, 2, 7)
        >>> teacher = LeRobotTeacher(
        ...     Policy(), lambda batch: batch, lambda chunk: 10 * chunk,
        ...     instruction="push the cube",
        ... )
        >>> teacher.in_keys
        [('observation', 'image')]
        >>> images = torch.full((3, 3, 8, 8), 255, dtype=torch.uint8)
        >>> frames = teacher(TensorDict({("observation", "image"): images}, [3]))
        >>> frames["vla_action", "chunk"][0, :, 0]
        tensor([10., 10.])
    """

    gripper = "raw"  # as the policy gives it; a server says so to its clients

    def __init__(
        self,
        policy: Any,
        preprocessor: Callable[[dict[str, Any]], dict[str, Any]],
        postprocessor: Callable[[Tensor], Tensor],
        *,
        instruction: str | None = None,
        cameras: Mapping[str, NestedKey] | None = None,
        state_key: NestedKey = STATE_KEY,
        instruction_key: NestedKey = INSTRUCTION_KEY,
        seed: int = 0,
    ) -> None:
        config = policy.config
        _check_inputs(config)
        self.instruction = instruction
        self.cameras = _choose_cameras(config, cameras)
        super().__init__(
            policy,
            action_dim=config.action_feature.shape[0],
            chunk_size=_chunk_size(config),
            use_state=config.robot_state_feature is not None,
            image_key=next(iter(self.cameras.values())),
            state_key=state_key,
            instruction_key=instruction_key,
        )
        self.preprocessor, self.postprocessor = preprocessor, postprocessor
        self._generator = torch.Generator().manual_seed(seed)

    @classmethod
    def from_pretrained(
        cls,
        path_or_repo: str | os.PathLike[str],
        *,
        instruction: str | None = None,
        cameras: Mapping[str, NestedKey] | None = None,
        state_key: NestedKey = STATE_KEY,
        instruction_key: NestedKey = INSTRUCTION_KEY,
        seed: int = 0,
        device: torch.device | str | None = None,
        revision: str | None = None,
        cache_dir: str | os.PathLike[str] | None = None,
        local_files_only: bool | None = None,
    ) -> LeRobotTeacher:
        """Loads policy, pre- and post-processor the way lerobot 0.5 and later does.

        The policy's class is found by the type in its configuration; the processors
        are the pipelines saved beside it (``policy_preprocessor.json`` and
        ``policy_postprocessor.json``; lerobot tells how to migrate older checkpoints).

        Args:
            path_or_repo (str or path): a folder as lerobot saves it
                (``.../pretrained_model``), or a Hub id such as
                ``"lerobot/smolvla_base"``.

        Keyword Args:
            instruction (str, optional): what every row is told; ``""`` for a policy
                that reads no text (ACT). Defaults to ``None``: each row's own, from
                ``instruction_key``.
            cameras (mapping of str to NestedKey, optional): which entry of the
                tensordict is shown as which image feature of the policy, e.g.
                ``{"observation.images.top": ("observation", "image")}``; images are
                uint8 ``[*B, 3, H, W]``, and reach LeRobot as float32 in [0, 1]. What a
                policy does without a camera that is left out is its own affair: SmolVLA
                and pi0 have a place for it, ACT raises. Defaults to ``None``:
                ``("observation", "image")`` for a policy with a single camera.
            state_key (NestedKey): read as ``observation.state``, in the order and units
                of the policy's data, where the policy has a state. Defaults to
                ``("observation", "state")``.
            instruction_key (NestedKey): text, read where ``instruction`` is None.
                Defaults to ``"language_instruction"``.
            seed (int): of the draws of a stochastic policy. Defaults to ``0``.
            device (torch.device or str, optional): of policy and preprocessor. Defaults
                to what lerobot chooses.
            revision (str, optional): of a Hub repository; pin a commit.
            cache_dir (path, optional): instead of the Hub's usual cache.
            local_files_only (bool, optional): do not ask the network for the
                checkpoint. (Tokenizers and backbones that it names are lerobot's to
                find; ``HF_HUB_OFFLINE=1`` holds for them, too.)

        Raises:
            FileNotFoundError: if the checkpoint is not there.
            ImportError: without lerobot, saying what to do.
            ValueError: see the class; or for a checkpoint that is only an adapter.

        Examples:
            >>> from torchrl_rpd.teachers.lerobot import LeRobotTeacher
            >>> try:  # where lerobot is installed, the folder is what is missing
            ...     LeRobotTeacher.from_pretrained("./no-such-folder")
            ... except (FileNotFoundError, ImportError):
            ...     print("not here")
            not here
        """
        base, factory = _import_lerobot()
        # One snapshot, so that policy and processors are of the same commit.
        folder = resolve_checkpoint(
            path_or_repo,
            revision=revision,
            cache_dir=cache_dir,
            local_files_only=local_files_only,
        )
        config = base.from_pretrained(folder)
        if config.use_peft:
            raise ValueError(
                f"{path_or_repo} is an adapter of another policy (use_peft). Merge the "
                "two and save them as one checkpoint first."
            )
        config.pretrained_path = folder  # as lerobot's own commands do
        if device is not None:
            config.device = str(device)
        policy = factory.get_policy_class(config.type).from_pretrained(
            folder, config=config
        )
        preprocessor, postprocessor = factory.make_pre_post_processors(
            config,
            pretrained_path=str(folder),
            # as saved, it names the device that the policy was trained on
            preprocessor_overrides={"device_processor": {"device": str(config.device)}},
        )
        return cls(
            policy,
            preprocessor,
            postprocessor,
            instruction=instruction,
            cameras=cameras,
            state_key=state_key,
            instruction_key=instruction_key,
            seed=seed,
        ).eval()

    def _update_keys(self) -> None:
        super()._update_keys()
        keys = [*self.cameras.values()]
        if self.use_state:
            keys.append(self.tensor_keys.state)
        if self.instruction is None:
            keys.append(self.tensor_keys.instruction)
        self.in_keys = keys

    # ------------------------------------------------------------------ the answers
    @torch.no_grad()
    def forward(
        self,
        tensordict: TensorDictBase,
        *,
        tensordict_out: TensorDictBase | None = None,
        **kwargs: Any,
    ) -> TensorDictBase:
        """Writes the un-normalised chunk ``[*B, H, A]``, float32.

        Raises:
            KeyError: if an image, the state or an instruction is missing.
            TypeError: if images are not uint8.
            ValueError: for images, a state or an answer of a wrong shape.
        """
        return super().forward(tensordict, tensordict_out=tensordict_out, **kwargs)

    def _predict(self, tensordict: TensorDictBase) -> Tensor:
        flat = super()._predict(tensordict)
        return flat.reshape(*tensordict.batch_size, flat.shape[-1])

    def _to_lerobot_batch(self, tensordict: TensorDictBase) -> dict[str, Any]:
        device = torch.device(self.policy.config.device)
        batch: dict[str, Any] = {
            name: _read_pixels(tensordict, key, device)
            for name, key in self.cameras.items()
        }
        if self.use_state:
            batch[_STATE] = self._read_state(tensordict, device)
        batch["task"] = read_instructions(
            tensordict, self.instruction, self.tensor_keys.instruction
        )
        return batch

    def _read_state(self, tensordict: TensorDictBase, device: torch.device) -> Tensor:
        key, config = self.tensor_keys.state, self.policy.config
        state = read_tensor(
            tensordict, key, teacher=_NAME, what="the state", advice="state_key="
        )
        state = state.reshape(tensordict.numel(), -1)
        width = config.robot_state_feature.shape[0]
        # SmolVLA and pi0 have a largest width and pad what is shorter.
        padded = width == getattr(config, "max_state_dim", None)
        if state.shape[1] != width and not (padded and state.shape[1] < width):
            raise ValueError(
                f"{key!r} has {state.shape[1]} entries in a row; this policy reads "
                f"{width}, in the order of the data it was trained on."
            )
        # A copy: some policies change their input in place.
        return state.to(device, torch.float32, copy=True)

    def _call_policy(self, batch: dict[str, Any]) -> Tensor:
        config = self.policy.config
        device = torch.device(config.device)
        cuda = device.type == "cuda"
        seed = int(torch.randint(2**62, (), generator=self._generator))
        with torch.random.fork_rng(devices=[device] if cuda else []):
            torch.default_generator.manual_seed(seed)
            if cuda:
                with torch.cuda.device(device):
                    torch.cuda.manual_seed(seed)
            precision = torch.autocast(device.type) if config.use_amp else nullcontext()
            with precision:
                chunk = self.policy.predict_action_chunk(self.preprocessor(batch))
        # Whole chunks, as lerobot's own rollouts do: what turns relative actions into
        # absolute ones knows about the time dimension.
        return self.postprocessor(chunk).float()


def _import_lerobot() -> tuple[Any, Any]:
    """``PreTrainedConfig`` and the module ``lerobot.policies.factory``."""
    try:
        # (importing the factory registers the types of all policies)
        factory = importlib.import_module("lerobot.policies.factory")
        configs = importlib.import_module("lerobot.configs.policies")
    except ModuleNotFoundError as error:
        # A lerobot that is there but lacks something of its own says so itself.
        if error.name is None or error.name.split(".")[0] != "lerobot":
            raise
        raise ImportError(
            "LeRobotTeacher needs lerobot 0.5 or later, in an environment of its own "
            "(Python 3.12, an older torch): pip install 'lerobot>=0.5' "
            "'torchrl_rpd[remote]' there, serve the teacher with `python -m "
            "torchrl_rpd.teachers.serve module:factory`, and use "
            "RemoteTeacher('ws://host:port') here. See docs/lerobot.md."
        ) from error
    return configs.PreTrainedConfig, factory


def _check_inputs(config: Any) -> None:
    """Refuses policies that cannot be asked about one frame."""
    if config.n_obs_steps != 1:
        raise ValueError(
            f"This policy reads n_obs_steps={config.n_obs_steps} time steps at once; "
            "LeRobotTeacher shows one (SmolVLA, pi0, pi0.5, ACT)."
        )
    if config.env_state_feature is not None:
        raise ValueError(
            "This policy reads observation.environment_state, which this teacher has "
            "no place for: use a policy of images (and the robot's state)."
        )
    if config.action_feature is None:
        raise ValueError("The policy's configuration has no feature 'action'.")


def _choose_cameras(
    config: Any, cameras: Mapping[str, NestedKey] | None
) -> dict[str, NestedKey]:
    names = [name for name in config.image_features if _EMPTY_CAMERA not in name]
    if cameras is None and len(names) == 1:
        return {names[0]: IMAGE_KEY}
    unknown = sorted(set(cameras or ()) - set(names))
    if not cameras or unknown:
        problem = (
            f"does not know {unknown}" if unknown else "does not say which is which"
        )
        raise ValueError(
            f"This policy has the cameras {names} and {problem}: map each to an image of "
            "yours, e.g. cameras={'observation.images.top': ('observation', 'image')}."
        )
    return dict(cameras)


def _chunk_size(config: Any) -> int:
    # (not every policy calls it by the same name)
    length = getattr(config, "chunk_size", None)
    return config.n_action_steps if length is None else length


def _read_pixels(
    tensordict: TensorDictBase, key: NestedKey, device: torch.device
) -> Tensor:
    """One camera's images ``[n, 3, H, W]``, float32 in [0, 1]."""
    images = read_images(tensordict, key, teacher=_NAME, advice="cameras=").squeeze(1)
    # uint8 travels to the device: a quarter of the floats
    pixels = images.to(device, non_blocking=True)
    contiguous = torch.contiguous_format
    return pixels.to(torch.float32, memory_format=contiguous).div_(255)
