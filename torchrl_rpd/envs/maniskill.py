# Copyright (c) the torchrl_rpd authors.
#
# This source code is licensed under the MIT license found in the
# LICENSE file in the root directory of this source tree.
"""ManiSkill3 environments for TorchRL."""

from __future__ import annotations

from collections.abc import Mapping
from functools import partial
from typing import Any, Literal

from torchrl.envs import ParallelEnv
from torchrl.envs.common import _EnvPostInit

from torchrl_rpd._threads import available_cpus
from torchrl_rpd.envs._build import (
    Size,
    camera_settings,
    check_task,
    choose_sim_backend,
    make,
    with_pose,
)
from torchrl_rpd.envs._garbage import one_collection
from torchrl_rpd.envs._plan import Plan
from torchrl_rpd.envs._rendering import choose_render_backend
from torchrl_rpd.envs._scene import TEACHER_CAMERA, SceneChanges
from torchrl_rpd.envs._unwrap import require_mani_skill
from torchrl_rpd.envs._views import CameraArgument, ObsMode
from torchrl_rpd.envs._workers import in_worker
from torchrl_rpd.envs.cameras import CAMERA_VIEWS
from torchrl_rpd.envs.tasks import TASKS
from torchrl_rpd.envs.wrapper import ManiSkillWrapper

RewardMode = Literal["normalized_dense", "dense", "sparse", "none"]


class _ManiSkillEnvMeta(_EnvPostInit):
    """Returns a ParallelEnv when ``num_workers > 1``."""

    def __call__(cls, *args: Any, num_workers: int = 1, **kwargs: Any) -> Any:
        if num_workers < 1:
            raise ValueError(f"num_workers must be at least 1, got {num_workers}.")
        if num_workers == 1:
            return super().__call__(*args, **kwargs)
        require_mani_skill()
        # use_buffers=False: with buffers, ParallelEnv's parent spin-polls a whole core
        # while it waits for the simulators.
        return ParallelEnv(
            num_workers,
            partial(in_worker, cls, *args, **kwargs),
            use_buffers=False,
            metadata_from_workers=True,
            num_threads=max(1, available_cpus() - num_workers),
            num_sub_threads=1,
        )


class ManiSkillEnv(ManiSkillWrapper, metaclass=_ManiSkillEnvMeta):
    """Builds ManiSkill3 environments and wraps them for TorchRL.

    State observations need no graphics driver: where no Vulkan device is found, what the
    task builders ask of the renderer is left out, and observations stay the same. What is
    observed, and under which keys, is told by :class:`ManiSkillWrapper`. A picture is
    drawn only if somebody asked for it. The first environment of a process that draws
    takes seconds to build, because SAPIEN compiles its shaders; it drops them when the last
    one is closed.

    Args:
        task_id (str): id of a registered ManiSkill task, e.g. ``"PickCube-v1"``; those of
            the paper are in :data:`~torchrl_rpd.envs.TASKS`.

    Keyword Args:
        num_envs (int): number of environments simulated in one process. Default: ``1``.
        num_workers (int): number of processes, each with ``num_envs`` environments. For
            more than one the result is a :class:`~torchrl.envs.ParallelEnv` of batch size
            ``[num_workers, num_envs]``; guard the script with
            ``if __name__ == "__main__":``. Several processes that draw in software are
            fastest with ``LP_NUM_THREADS=0`` in their environment. Default: ``1``.
        obs_mode (str): ``"state"``, ``"state_dict"``, ``"rgb"``, ``"depth"``, ``"rgbd"``,
            or pictures and state joined by ``"+"``. Default: ``"state"``.
        control_mode (str): the controller and with it the meaning of the actions, all in
            [-1, 1] for the delta modes. Default: ``"pd_ee_delta_pose"``: 3 translations
            of at most 0.1 m and 3 rotations of at most 0.1 rad per step, and the gripper
            (1 open, -1 closed; PushT-v1's robot has none).
        reward_mode (str): ``"normalized_dense"`` (at most 1), ``"dense"``, ``"sparse"``
            (1 at success) or ``"none"``. Default: ``"normalized_dense"``.
        camera (str or sequence of str, optional): ``"main"``, ``"hand"``, ``"human"``
            (the paper's view: it shows the goal that is hidden from the sensors), a
            changed human view of :data:`~torchrl_rpd.envs.CAMERA_VIEWS` such as
            ``"human_moved"``, or names of cameras. Only these are drawn. Defaults to all
            sensor cameras.
        image_size (int or (int, int), optional): side, or height and width, of the
            pictures in pixels. Defaults to ManiSkill's sizes (128 for its own tasks) and
            256 for the human camera.
        sensor_configs (dict, optional): ManiSkill's settings of the sensor cameras, for
            all or by camera name, e.g.
            ``{"base_camera": {"pose": [x, y, z, qw, qx, qy, qz], "fov": 1.0}}``. Instead
            of a pose, ``eye`` and ``target`` (metres) say where a camera is and looks.
        human_render_camera_configs (dict, optional): the same for the human camera, whose
            name is ``"render_camera"`` in ManiSkill's own tasks. Changed views start
            from the task's own camera, and are overridden by their names.
        extra_cameras (dict, optional): cameras to add to the scene, by name, each with a
            ``pose`` (or ``eye`` and ``target``) and what else is to differ from 128 x 128
            pixels and a field of view of 1 rad.
        teacher_camera (str, optional): one camera whose picture is written to
            ``teacher_image`` for an image teacher, whatever the student observes;
            ``"human"`` is the view that the paper's teachers know, and goes with a
            student of a changed view as well.
        teacher_image_size (int or (int, int), optional): size of the teacher's picture
            of a human view. Defaults to 256. Where the student has the same view in
            another size, a camera called ``"teacher_camera"`` draws it.
        from_pixels (bool): if ``True``, writes the human camera's picture to ``pixels``,
            for videos. Default: ``False``.
        language_instruction (bool or str): a text to write to ``language_instruction``
            at every step; ``True`` takes the task's from the task table.
            Default: ``False``.
        ignore_terminations (bool): if ``True``, success ends no episode, only the time
            limit does. Default: ``False``.
        sim_backend (str): ``"physx_cpu"``; ``"physx_cuda"`` (*not run here*), where one
            ManiSkill environment simulates all ``num_envs`` scenes on a GPU; or
            ``"auto"``: CUDA if torch finds it and ``fast_controller`` is off.
        render_backend (str): ``"cpu"``, ``"gpu"``, ``"none"``, or ``"auto"``: none if no
            picture is asked for, else a GPU that can draw (its pictures are copied to
            the host where the CPU simulates; *not run here*), else software. The attribute
            ``render_backend`` tells what was chosen.
        fast_controller (bool): if ``True``, computes the targets of the end-effector
            controller without its 150 small tensor operations, and grasp queries only
            where both fingers touch the object: about twice the steps per second, equal
            up to rounding (1e-6) until contacts amplify it. Default: ``False``: bit for
            bit ManiSkill.
        light_visuals (bool): if ``True``, the robot is drawn as its collision shapes,
            with 2 % of the triangles: several times the steps per second with software
            rendering (``python -m benchmarks.light_visuals``). It moves as the stock
            robot does, bit for bit, but looks simpler, which a teacher trained on the
            stock look may mind. Default: ``False``.
        max_episode_steps (int, optional): time limit. Defaults to the task's own.
        **kwargs: passed to ``gym.make``, e.g. ``robot_uids``, ``sim_config`` or
            ``reconfiguration_freq`` (rebuild the scene at every so many resets).

    Raises:
        ImportError: if ManiSkill is missing.
        ValueError: if the task is unknown, does not have the reward mode, or has no such
            camera.
        RuntimeError: if pictures are asked for and nothing can draw them; the message
            says what to install.

    Examples:
        >>> from torchrl_rpd.envs import ManiSkillEnv
        >>> env = ManiSkillEnv("PickCube-v1", num_envs=2, reward_mode="sparse")
        >>> _ = env.set_seed(0)
        >>> rollout = env.rollout(5)
        >>> rollout["observation"].shape, rollout["action"].shape
        (torch.Size([2, 5, 42]), torch.Size([2, 5, 7]))
        >>> rollout["episode_seed"][0, 0]  # reset(seed=0) gives this episode again
        tensor([0])
        >>> env.render_backend  # nothing is drawn for states
        'none'
    """

    def __init__(
        self,
        task_id: str,
        *,
        num_envs: int = 1,
        obs_mode: str = "state",
        control_mode: str = "pd_ee_delta_pose",
        reward_mode: RewardMode = "normalized_dense",
        camera: CameraArgument = None,
        image_size: Size | None = None,
        sensor_configs: Mapping[str, Any] | None = None,
        human_render_camera_configs: Mapping[str, Any] | None = None,
        extra_cameras: Mapping[str, Mapping[str, Any]] | None = None,
        teacher_camera: str | None = None,
        teacher_image_size: Size | None = None,
        from_pixels: bool = False,
        language_instruction: bool | str = False,
        ignore_terminations: bool = False,
        sim_backend: str = "auto",
        render_backend: str = "auto",
        fast_controller: bool = False,
        light_visuals: bool = False,
        max_episode_steps: int | None = None,
        **kwargs: Any,
    ) -> None:
        require_mani_skill()
        if num_envs < 1:
            raise ValueError(f"num_envs must be at least 1, got {num_envs}.")
        mode = ObsMode.parse(obs_mode)
        sim_backend = choose_sim_backend(sim_backend, fast_controller=fast_controller)
        check_task(task_id, reward_mode)
        instruction = _instruction(task_id, language_instruction)

        plan = Plan.of(
            mode,
            camera,
            image_size=image_size,
            teacher_camera=teacher_camera,
            teacher_image_size=teacher_image_size,
        )
        added = {n: with_pose(c) for n, c in (extra_cameras or {}).items()}
        if taken := sorted(set(added) & set(CAMERA_VIEWS)):
            raise ValueError(
                f"extra_cameras: {taken} are human views. Use other names."
            )
        if added and not plan.sensor_textures:
            raise ValueError(
                f"extra_cameras={sorted(added)} would not be drawn: observe them with "
                "obs_mode='rgb' and a camera that is not 'human' alone, or show one to "
                "the teacher with teacher_camera."
            )
        sensor_settings = camera_settings(image_size, sensor_configs)
        for name, config in added.items():
            if "pose" not in config:
                raise ValueError(
                    f"extra_cameras: {name!r} needs a pose, or eye and target."
                )
            sensor_settings.setdefault(name, config)
        human_settings = plan.human_settings(human_render_camera_configs)

        needed_by = (
            f"obs_mode={obs_mode!r}"
            if mode.textures
            else f"teacher_camera={teacher_camera!r}"
            if teacher_camera is not None
            else "from_pixels=True"
            if from_pixels
            else None
        )
        build = partial(
            make,
            task_id,
            obs_mode=mode.of_mani_skill(plan.sensor_textures),
            control_mode=control_mode,
            reward_mode=reward_mode,
            sim_backend=sim_backend,
            render_backend=choose_render_backend(render_backend, needed_by),
            changes=SceneChanges(
                sensors=plan.sensors if plan.sensor_textures else None,
                extra_cameras={n: c["pose"] for n, c in added.items()},
                human_views=plan.changed_views,
                teacher_view=plan.teacher_view,
                light_visuals=light_visuals,
            ),
            sensor_configs=sensor_settings,
            human_render_camera_configs=human_settings,
            **kwargs,
        )
        if sim_backend == "physx_cpu":
            with one_collection():
                envs = [build(num_envs=1) for _ in range(num_envs)]
        else:
            envs = [build(num_envs=num_envs)]
        if fast_controller:
            from torchrl_rpd.envs._fast_controller import use_fast_controller
            from torchrl_rpd.envs._fast_grasp import use_fast_grasp

            for env in envs:
                use_fast_controller(env.unwrapped)
                use_fast_grasp(env.unwrapped)
        super().__init__(
            envs,
            obs_mode=obs_mode,
            camera=camera,
            teacher_camera=TEACHER_CAMERA if plan.teacher_view else teacher_camera,
            from_pixels=from_pixels,
            language_instruction=instruction,
            ignore_terminations=ignore_terminations,
            max_episode_steps=max_episode_steps,
        )


def _instruction(task_id: str, wanted: bool | str) -> str | None:
    """The text to write, None for none."""
    if isinstance(wanted, str):
        return wanted
    if wanted and task_id not in TASKS:
        raise ValueError(
            f"The task table has no instruction for {task_id}: pass the text itself, "
            "language_instruction='...'."
        )
    return TASKS[task_id].instruction if wanted else None
