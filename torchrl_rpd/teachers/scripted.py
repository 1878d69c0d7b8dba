# Copyright (c) the torchrl_rpd authors.
#
# This source code is licensed under the MIT license found in the
# LICENSE file in the root directory of this source tree.
"""A teacher that needs no weights: controllers from privileged state, with flaws."""

from __future__ import annotations

from collections.abc import Sequence
from typing import ClassVar

import torch
from tensordict import NestedKey, TensorDictBase
from tensordict.nn import TensorDictModuleBase
from torch import Tensor

from torchrl_rpd.teachers._controllers import CONTROLLERS
from torchrl_rpd.teachers._flaws import Flaws
from torchrl_rpd.teachers._layout import LAYOUTS

__all__ = ["ScriptedTeacher"]


class ScriptedTeacher(TensorDictModuleBase):
    """Closed-loop controllers from privileged state, with chosen imperfections.

    Stands in for a Vision-Language-Action model where a run must be cheap, exact and
    reproducible: it reads the simulator's state, needs no weights, and errs only as
    asked. Tasks (:attr:`TASKS`): ``PushCube-v1``, ``PullCube-v1``, ``PickCube-v1``,
    ``StackCube-v1``, ``LiftPegUpright-v1`` and ``RollBall-v1`` of ManiSkill 3, and of
    the hold-outs with the tool as a distractor ``PullCubeToolDistractor-v1`` and
    ``PokeCubeDistractor-v1``; with the Panda arm, state observations and the control
    mode ``pd_ee_delta_pose``. The control mode cannot be seen in the data: in any other
    mode these actions mean something else and the teacher fails. How often it succeeds:
    ``benchmarks/results/scripted_success.md``; a third of PokeCubeDistractor's starts
    are out of its reach.

    The teacher is memoryless and a pure function of its inputs. Noise is a hash of
    ``(seed, observation)``, an episode's offset a hash of ``(seed, episode_seed)``:
    labels do not depend on the batch, the process or the order of the calls, torch's
    generators are neither read nor moved, and the module has no state to save.

    Flaws are off by default and combine in this order: offsets (what it sees),
    ``blind_region``, ``laziness``, ``jitter``, ``gripper_chatter``, ``random_action``.

    Args:
        task_id (str): one of :attr:`TASKS`.

    Keyword Args:
        seed (int): seeds every random flaw. Defaults to ``0``.
        jitter (float): standard deviation of Gaussian noise added to the six arm
            dimensions at each step, in action units (1 is 0.1 m or 0.1 rad); the sum
            is clipped to [-1, 1]. In [0, inf). Defaults to ``0.0``.
        gripper_chatter (float): probability, at each step, that a closing command
            (below 0) becomes "open" (+1). In [0, 1]. Defaults to ``0.0``.
        random_action (float): probability, at each step, that the whole action is
            replaced by one uniform in [-1, 1]. In [0, 1]. Defaults to ``0.0``.
        laziness (float): share of every arm command that is left out: the arm
            dimensions are multiplied by ``1 - laziness``. In [0, 1). Defaults to
            ``0.0``.
        cube_offset (sequence of float): constant (x, y, z) by which the cube (in
            LiftPegUpright the peg, in RollBall the ball) is seen displaced, metres,
            world frame. Defaults to ``(0, 0, 0)``.
        goal_offset (sequence of float): the same for the goal (in StackCube: the place
            above cube B; in LiftPegUpright only the height counts; in
            PullCubeToolDistractor the place 0.53 m from the robot's base, towards the
            cube). Defaults to ``(0, 0, 0)``.
        cube_offset_std (float or sequence of float): standard deviation, in metres, of
            a further displacement of the cube that is redrawn per episode from
            N(0, std) on each axis. One float holds for x and y, with the height seen
            right; three are x, y and z. Defaults to ``0.0``.
        goal_offset_std (float or sequence of float): the same for the goal. Defaults
            to ``0.0``.
        blind_region (((float, float), (float, float)), optional): a box
            ``((x_low, x_high), (y_low, y_high))``, metres, world frame, lower bounds
            inside, infinite bounds allowed. While the cube's true centre lies in it,
            the teacher does nothing: arm still, gripper open. Defaults to ``None``.
        observation_key (NestedKey): flat state, ``[*B, D]`` float32 with the task's
            ``D`` (35, 35, 42, 48, 32, 44, 39, 54). Defaults to ``"observation"``.
        episode_seed_key (NestedKey): ``[*B, 1]`` int64, constant within an episode.
            Read only where an offset is redrawn per episode. Defaults to
            ``"episode_seed"``.
        action_key (NestedKey): where to write the action, ``[*B, 1, 7]`` float32 in
            [-1, 1]: three of position, three of rotation (0 but in the two tasks with a
            distractor, where the hand tilts to reach further), the gripper (+1 open, -1
            closed; in between the fingers stop on their way). Defaults to
            ``("vla_action", "chunk")``.

    Attributes:
        TASKS (tuple of str): the ids of the tasks for which there is a controller.

    Raises:
        ValueError: for an unknown task, a flaw outside its range, or (in the call) an
            observation of another size than the task's.
        KeyError: in the call, when an offset is redrawn per episode and the tensordict
            has no ``episode_seed``.

    Examples:
        >>> import torch
        >>> from tensordict import TensorDict
        >>> from torchrl_rpd.teachers import ScriptedTeacher
        >>> teacher = ScriptedTeacher("PickCube-v1", cube_offset_std=0.016)
        >>> teacher.in_keys
        ['observation', 'episode_seed']
        >>> observation = torch.zeros(2, 42)
        >>> observation[:, 19:22] = torch.tensor([0.0, 0.0, 0.2])  # the hand
        >>> observation[:, 29:32] = torch.tensor([0.05, 0.0, 0.02])  # the cube
        >>> td = TensorDict(
        ...     {
        ...         "observation": observation,
        ...         "episode_seed": torch.tensor([[7], [8]]),
        ...     },
        ...     [2],
        ... )
        >>> chunk = teacher(td)["vla_action", "chunk"]
        >>> chunk.shape
        torch.Size([2, 1, 7])
        >>> bool((chunk[:, 0, 0] > 0).all())  # towards the cube
        True
        >>> bool((chunk[0] == chunk[1]).all())  # each episode has its own error
        False
    """

    TASKS: ClassVar[tuple[str, ...]] = tuple(CONTROLLERS)

    def __init__(
        self,
        task_id: str,
        *,
        seed: int = 0,
        jitter: float = 0.0,
        gripper_chatter: float = 0.0,
        random_action: float = 0.0,
        laziness: float = 0.0,
        cube_offset: Sequence[float] = (0.0, 0.0, 0.0),
        goal_offset: Sequence[float] = (0.0, 0.0, 0.0),
        cube_offset_std: float | Sequence[float] = 0.0,
        goal_offset_std: float | Sequence[float] = 0.0,
        blind_region: tuple[tuple[float, float], tuple[float, float]] | None = None,
        observation_key: NestedKey = "observation",
        episode_seed_key: NestedKey = "episode_seed",
        action_key: NestedKey = ("vla_action", "chunk"),
    ) -> None:
        super().__init__()
        if task_id not in CONTROLLERS:
            raise ValueError(
                f"ScriptedTeacher has no controller for task {task_id!r}; it has: "
                + ", ".join(sorted(self.TASKS))
            )
        self.task_id = task_id
        self._layout = LAYOUTS[task_id]
        self._controller = CONTROLLERS[task_id]
        self._flaws = Flaws(
            seed=seed,
            jitter=jitter,
            gripper_chatter=gripper_chatter,
            random_action=random_action,
            laziness=laziness,
            cube_offset=cube_offset,
            goal_offset=goal_offset,
            cube_offset_std=cube_offset_std,
            goal_offset_std=goal_offset_std,
            blind_region=blind_region,
        )
        self._observation_key = observation_key
        self._episode_seed_key = episode_seed_key
        self._action_key = action_key
        self.in_keys = [observation_key]
        if self._flaws.per_episode:
            self.in_keys.append(episode_seed_key)
        self.out_keys = [action_key]

    @torch.no_grad()
    def forward(self, tensordict: TensorDictBase) -> TensorDictBase:
        """Write the action for every row of ``tensordict``."""
        observation = self._observation(tensordict)
        # float64 keeps rounding, and with it the batch size, out of the labels
        scene = self._layout.scene(observation.to(torch.float64))
        seen = self._flaws.see(scene, self._episode_seed(tensordict, observation))
        action = self._flaws.act(self._controller(seen), scene, observation)
        return tensordict.set(self._action_key, action.to(torch.float32).unsqueeze(-2))

    def __repr__(self) -> str:
        flaws = {"seed": self._flaws.seed, **self._flaws.active()}
        items = ", ".join(f"{name}={value}" for name, value in flaws.items())
        return f"{type(self).__name__}({self.task_id!r}, {items})"

    def _observation(self, tensordict: TensorDictBase) -> Tensor:
        observation = tensordict.get(self._observation_key, None)
        if not isinstance(observation, Tensor):
            raise KeyError(
                f"ScriptedTeacher reads flat state from {self._observation_key!r}, "
                "which is missing or no tensor; use an environment with "
                "obs_mode='state' or set observation_key"
            )
        if observation.shape[-1] != self._layout.size:
            raise ValueError(
                f"{self.task_id} has a flat state of size {self._layout.size} "
                f"({self._layout.names}); {self._observation_key!r} has shape "
                f"{tuple(observation.shape)}"
            )
        return observation

    def _episode_seed(
        self, tensordict: TensorDictBase, observation: Tensor
    ) -> Tensor | None:
        if not self._flaws.per_episode:
            return None
        episode_seed = tensordict.get(self._episode_seed_key, None)
        if not isinstance(episode_seed, Tensor):
            raise KeyError(
                f"this ScriptedTeacher redraws an offset per episode and needs "
                f"{self._episode_seed_key!r} ([*B, 1] int64), which the environment "
                "must provide (ManiSkillEnv does)"
            )
        shape = (*observation.shape[:-1], 1)
        if episode_seed.shape != shape or episode_seed.is_floating_point():
            raise ValueError(
                f"{self._episode_seed_key!r} must be integers of shape {shape}, got "
                f"{episode_seed.dtype} of shape {tuple(episode_seed.shape)}"
            )
        return episode_seed.to(torch.int64)
