# Copyright (c) the torchrl_rpd authors.
#
# This source code is licensed under the MIT license found in the
# LICENSE file in the root directory of this source tree.
"""ManiSkill's demonstrations, ours and downloaded ones, as a replay buffer."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

from tensordict import TensorDictBase

from torchrl_rpd.data._buffer import Demos, Item
from torchrl_rpd.data._trajectories import (
    CameraChoice,
    Selection,
    TrajectoryFile,
    entries_of,
)

_CONTROL_FREQ = 20.0  # Hz, ManiSkill's default
_POSE_NAMES = ("x", "y", "z", "rx", "ry", "rz", "gripper")


class ManiSkillDemos(Demos):
    """A replay buffer of demonstrations in ManiSkill's trajectory files.

    Reads the HDF5 and JSON files that ``examples/collect_demos.py``, ManiSkill's
    ``RecordEpisode`` and ``replay_trajectory`` write, and those that ManiSkill offers for
    download. The rows have TorchRL's VLA schema (``torchrl.data.vla``):

    - ``("observation", "image")`` uint8 ``[3, H, W]``, ``"wrist_image"`` for the hand
      camera and ``"<name>_image"`` for others; ``("observation", "state")`` float32
      ``[D]``.
    - ``action`` float32 ``[A]``, as recorded (for ``pd_ee_delta_pose`` in [-1, 1]); of
      a recording with noise (:func:`record_demos`) what was intended.
    - ``language_instruction``, put in when a batch is sampled; stored is
      ``instruction_index`` ``[1]`` int64.
    - ``("vla_action", "chunk")`` float32 ``[H, A]`` and ``action_is_pad`` bool ``[H]``
      if ``chunk_size`` is given: this action and the following ones of the episode, the
      last one repeated where it has ended, and marked.
    - ``episode`` and ``frame`` int64 ``[]``; ``("next", "done")``, ``"terminated"``,
      ``"truncated"`` ``[1]`` bool, ``"reward"`` and ``"success"`` ``[1]`` where
      recorded. An episode is done at its last row only. Next observations are not
      stored.

    Episodes that cannot be used are left out, and counted by reason in
    ``skipped_by_reason``: ``"no success"``, ``"no such group"``, ``"missing data"``,
    ``"wrong length"``, ``"truncated data"``, ``"unreadable data"``,
    ``"NaN in actions"``, ``"NaN in the state"``, ``"no RGB pictures"``,
    ``"no plain numbers"`` (nothing is ever unpickled), ``"link to elsewhere"``,
    ``"not in the JSON"``.

    Args:
        paths (path or sequence of paths): HDF5 files, or folders, in which all of them
            are read.

    Keyword Args:
        cameras (str, sequence of str or mapping, optional): the cameras to read, by
            their names in the file, or which camera fills which entry
            (``{"image": "human"}``). An empty list reads none. Defaults to all.
        state (str or sequence of str, optional): what the state is made of: paths under
            ``obs``, joined in this order, e.g. ``["agent/qpos", "extra/tcp_pose"]``.
            ``"auto"`` is ``"agent/qpos"`` where there is one, else the flat state;
            ``None`` is no state. Default: ``"auto"``.
        instruction (str or mapping of str to str, optional): the instruction, or those
            of each task id. Defaults to the episode's own and then to the task table's.
        control_mode (str, optional): the control mode that the actions must have;
            ``None`` for any, as long as it is one. Default: ``"pd_ee_delta_pose"``.
        success_only (bool): leaves out episodes that failed, or do not tell.
            Default: ``True``.
        intended (bool): where a recording disturbed what was executed, reads what was
            intended, which is what there is to learn. Default: ``True``.
        chunk_size (int, optional): length of the action chunks. Defaults to none.
        batch_size (int, optional): rows of a sample.
        scratch_dir (path, optional): keeps the rows in memory-mapped files in this
            folder. Defaults to main memory.
        transform (Transform, optional): applied to each sampled batch, after the
            instructions are in.
        **kwargs: passed to :class:`~torchrl.data.TensorDictReplayBuffer`, e.g.
            ``sampler`` or ``prefetch``.

    Attributes:
        episodes (list of DemoInfo): source, instruction, length and seed of each.
        skipped (list of SkippedDemo): what was left out, and why.
        instructions (list of str): the different instructions.
        metadata (RobotDatasetMetadata): action statistics, cameras, control rate.

    Raises:
        FileNotFoundError: if a file or its JSON is missing.
        ValueError: if a file cannot be opened at all, has other actions than asked for,
            lacks a camera or a state, or no episode is left.

    Examples:
        >>> import json, tempfile
        >>> from pathlib import Path
        >>> import h5py, numpy as np  # h5py comes with mani_skill
        >>> from torchrl_rpd.data import ManiSkillDemos
        >>> folder = Path(tempfile.mkdtemp())
        >>> with h5py.File(folder / "push.h5", "w") as file:
        ...     trajectory = file.create_group("traj_0")
        ...     trajectory["actions"] = np.zeros((4, 7), np.float32)
        ...     trajectory["obs"] = np.ones((5, 35), np.float32)
        ...     trajectory["success"] = np.array([False, False, False, True])
        >>> described = {
        ...     "env_info": {"env_id": "PushCube-v1"},
        ...     "episodes": [
        ...         {"episode_id": i, "episode_seed": i, "elapsed_steps": 4,
        ...          "control_mode": "pd_ee_delta_pose", "success": True}
        ...         for i in range(2)
        ...     ],
        ... }
        >>> _ = (folder / "push.json").write_text(json.dumps(described))
        >>> demos = ManiSkillDemos(folder, chunk_size=2, batch_size=3)
        >>> len(demos), demos.skipped_by_reason
        (4, {'no such group': 1})
        >>> rows = demos.sample()
        >>> rows["observation", "state"].shape, rows["vla_action", "chunk"].shape
        (torch.Size([3, 35]), torch.Size([3, 2, 7]))
        >>> rows["language_instruction"]
        'push the cube away from the robot base'
        >>> demos.metadata.action_mean.shape
        torch.Size([7])
    """

    def __init__(
        self,
        paths: str | Path | Sequence[str | Path],
        *,
        cameras: CameraChoice = None,
        state: str | Sequence[str] | None = "auto",
        instruction: str | Mapping[str, str] | None = None,
        control_mode: str | None = "pd_ee_delta_pose",
        success_only: bool = True,
        intended: bool = True,
        chunk_size: int | None = None,
        batch_size: int | None = None,
        scratch_dir: str | Path | None = None,
        transform: Callable[[TensorDictBase], TensorDictBase] | None = None,
        **kwargs: Any,
    ) -> None:
        files: list[TrajectoryFile] = []
        try:
            for path in _files(paths):
                files.append(TrajectoryFile(path))
            mode = _one_control_mode(files, control_mode)
            # What only some of the files tell has no place in rows that are alike.
            outcomes = frozenset.intersection(*(file.outcomes() for file in files))
            selections = [
                Selection(
                    *_select(file, cameras, state),
                    instruction,
                    success_only,
                    outcomes,
                    intended,
                )
                for file in files
            ]
            super().__init__(
                _items(files, selections),
                capacity=sum(file.steps() for file in files),
                metadata=_described(files, selections, mode),
                chunk_size=chunk_size,
                scratch_dir=scratch_dir,
                transform=transform,
                batch_size=batch_size,
                **kwargs,
            )
        finally:
            for file in files:
                file.close()


def _files(paths: str | Path | Sequence[str | Path]) -> list[Path]:
    found: list[Path] = []
    for path in [paths] if isinstance(paths, str | Path) else paths:
        path = Path(path)
        if not path.is_dir():
            found.append(path)
            continue
        # What a recording under way has in its folder of parts is not whole yet.
        inside = [
            file
            for file in sorted(path.rglob("*.h5"))
            if not any(part.endswith(".parts") for part in file.parts)
        ]
        if not inside:
            raise FileNotFoundError(f"There is no .h5 file in {path}.")
        found += inside
    if not found:
        raise ValueError("Name at least one file or folder of demonstrations.")
    return found


def _items(
    files: Sequence[TrajectoryFile], selections: Sequence[Selection]
) -> Iterator[Item]:
    for file, selection in zip(files, selections, strict=True):
        yield from file.iterate(selection)


def _one_control_mode(
    files: Sequence[TrajectoryFile], wanted: str | None
) -> str | None:
    modes: dict[str, str] = {}
    for file in files:
        for mode in file.control_modes():
            modes.setdefault(mode, file.path.name)
            if wanted is not None and mode != wanted:
                raise ValueError(
                    f"The actions in {file.path} are {mode}, not {wanted}. Convert them: "
                    f"python -m mani_skill.trajectory.replay_trajectory --traj-path "
                    f"{file.path} -c {wanted} -o rgb --save-traj; or ask for "
                    f"control_mode={mode!r}."
                )
    if len(modes) > 1:
        raise ValueError(
            f"The control modes differ, and with them the meaning of actions: {modes}."
        )
    return next(iter(modes), wanted)


def _select(
    file: TrajectoryFile, cameras: CameraChoice, state: str | Sequence[str] | None
) -> tuple[dict[str, str], tuple[str, ...]]:
    """The cameras by their entries, and the paths of the state."""
    available, numbers = file.observed()
    try:
        chosen = entries_of(available, cameras)
    except ValueError as error:
        raise ValueError(
            f"{file.path}: {error}{_how_to_draw(file, available)}"
        ) from None
    if state is None:
        paths: tuple[str, ...] = ()
    elif state == "auto":
        found = [p for p in ("agent/qpos", "state", "") if p in numbers]
        paths = tuple(found[:1])
    else:
        paths = (state,) if isinstance(state, str) else tuple(state)
        if missing := sorted(set(paths) - set(numbers)):
            raise ValueError(
                f"{file.path} has no {missing} under obs. There is: "
                f"{['(flat state)' if n == '' else n for n in numbers] or 'nothing'}."
            )
    if file.entries and not chosen and not paths:
        raise ValueError(
            f"{file.path} holds no observations that were asked for."
            + _how_to_draw(file, available)
        )
    return chosen, paths


def _how_to_draw(file: TrajectoryFile, available: Sequence[str]) -> str:
    if available:
        return ""
    return (
        f" It was recorded with obs_mode={file.env_kwargs.get('obs_mode')!r}. Add "
        "pictures: python -m mani_skill.trajectory.replay_trajectory --traj-path "
        f"{file.path} -o rgb --save-traj (with -c pd_ee_delta_pose for these actions)."
    )


def _described(
    files: Sequence[TrajectoryFile],
    selections: Sequence[Selection],
    control_mode: str | None,
) -> dict[str, Any]:
    tasks = dict.fromkeys(str(f.task_id) for f in files if f.task_id is not None)
    entries = dict.fromkeys(entry for s in selections for entry in s.cameras)
    rates = {
        float((f.env_kwargs.get("sim_config") or {}).get("control_freq", _CONTROL_FREQ))
        for f in files
    }
    pose = control_mode in ("pd_ee_delta_pose", "pd_ee_target_delta_pose")
    return {
        "dataset_id": "maniskill:" + "+".join(tasks or ["unknown"]),
        "embodiment_id": (files[0].env_kwargs.get("robot_uids") or "panda"),
        "action_names": _POSE_NAMES if pose else None,
        "action_space": "eef_delta" if pose else "unknown",
        # The fingers' target: they stop anywhere between open and closed.
        "gripper_mode": "continuous" if pose else "unknown",
        "control_frequency_hz": rates.pop() if len(rates) == 1 else None,
        "camera_keys": tuple(("observation", entry) for entry in entries),
        "source_url": "https://github.com/haosulab/ManiSkill",
    }
