# Copyright (c) the torchrl_rpd authors.
#
# This source code is licensed under the MIT license found in the
# LICENSE file in the root directory of this source tree.
"""End-effector control of one simulated robot without 150 small tensor operations.

ManiSkill's ``PDEEPoseController`` computes the target pose of the gripper with
batched torch operations. With one environment on the CPU these are 7-number
tensors and their overhead is 60 % of a simulation step. The subclass built here
does the same arithmetic on float32 scalars, operation by operation in the same
order, and leaves the inverse kinematics, the gripper and the physics alone. The
order matters: the inverse-kinematics solver stops at a tolerance, so a target that
differs in its last bit now and then costs or saves an iteration, which moves the
joint targets by 1e-5 rad. With the same order the joint targets are the same.

Call :func:`use_fast_controller` on the unwrapped environment right after
``gym.make``; it stays in place when ManiSkill rebuilds the robot.
"""

from __future__ import annotations

import functools
from typing import TYPE_CHECKING, Any

import numpy as np
import torch

from torchrl_rpd.envs._agent import keep_installed

if TYPE_CHECKING:
    from mani_skill.envs.sapien_env import BaseEnv

_FRAME = "root_translation:root_aligned_body_rotation"
# Up to here |rx| + |ry| + |rz| < pi / 2 (the rotation vector is clipped by norm), so
# that the real part of the step's quaternion is its largest. ManiSkill's matrix ->
# quaternion conversion picks its formula by the largest part: one formula suffices.
_MAX_ROTATION = 0.9

_Scalars = tuple[Any, ...]


def use_fast_controller(env: BaseEnv) -> None:
    """Replaces the end-effector pose controller of one environment by a faster one.

    Only this environment object changes: no ManiSkill class is touched. The new
    controller is installed again whenever the robot is rebuilt
    (``reset(options={"reconfigure": True})``). Calling it twice is harmless.

    Observations equal those of the stock controller bit for bit: every sum and product
    is rounded as there, and roots, sines and norms are torch's own.

    Args:
        env (BaseEnv): an unwrapped ManiSkill environment in CPU simulation whose
            control mode is ``pd_ee_delta_pose`` or has the same properties: deltas
            of the current pose (no virtual target), normalised actions, no
            interpolation, frame ``root_translation:root_aligned_body_rotation``.

    Raises:
        ValueError: if the control mode or the simulation is not covered; the message
            says why.
    """
    keep_installed(env, _install)


def _install(agent: Any) -> None:
    """Swaps the arm's part of the agent's controller, or says why it cannot."""
    from mani_skill.agents.controllers import PDEEPoseController

    fast_class = _fast_controller_class()
    parts = getattr(getattr(agent, "controller", None), "controllers", {})
    for name, stock in parts.items():
        if type(stock) is fast_class:
            return
        if type(stock) is PDEEPoseController:
            reason = _why_not(stock)
            if reason is None:
                # The joints' stiffness and damping were set by the stock controller
                # from the same configuration, so only the algebra changes hands.
                parts[name] = fast_class(
                    stock.config,
                    stock.articulation,
                    stock._control_freq,
                    scene=stock.scene,
                )
                parts[name].reset()
                return
            break
    else:
        mode = getattr(agent, "control_mode", None)
        reason = f"control mode {mode!r} has no end-effector pose controller"
    raise ValueError(
        f"The fast controller cannot be used: {reason}. Use fast_controller=False, or "
        "control_mode='pd_ee_delta_pose' in CPU simulation."
    )


def _why_not(controller: Any) -> str | None:
    """The first property of a stock controller that the fast one lacks, or None."""
    config = controller.config
    checks = (
        (controller.scene.gpu_sim_enabled, "the simulation runs on a GPU"),
        (not config.use_delta, "actions are absolute poses (use_delta=False)"),
        (config.use_target, "actions move a virtual target (use_target=True)"),
        (config.interpolate, "joint targets are interpolated (interpolate=True)"),
        (not config.normalize_action, "actions are not normalised"),
        (config.frame != _FRAME, f"the frame is {config.frame!r}, not {_FRAME!r}"),
        (
            np.abs(config.rot_lower).max() > _MAX_ROTATION,
            f"a step may turn by more than {_MAX_ROTATION} rad",
        ),
    )
    return next((reason for found, reason in checks if found), None)


@functools.cache
def _fast_controller_class() -> type:
    """Builds the subclass on first use, as ManiSkill is an optional dependency."""
    import sapien
    from mani_skill.agents.controllers import PDEEPoseController

    class FastPDEEPoseController(PDEEPoseController):
        """``PDEEPoseController`` for one environment, in plain float32 numbers."""

        def _initialize_joints(self) -> None:
            super()._initialize_joints()
            kinematics = self.kinematics
            self._controlled = kinematics.pmodel_controlled_joint_indices.numpy()
            self._model_joints = kinematics.pmodel_active_joint_indices.numpy()
            self._model_mask = kinematics.qmask.numpy()
            self._arm_joints = self.active_joint_indices.numpy()
            self._sapien_robot = self.articulation._objs[0]
            self._sapien_root = self.root_link._objs[0]
            self._sapien_end = self.ee_link._objs[0]
            self._sapien_joints = [joint._objs[0] for joint in self.joints]

        def _clip_and_scale_action_space(self) -> None:
            super()._clip_and_scale_action_space()
            low, high = self.action_space_low[:3], self.action_space_high[:3]
            self._position_offset = (0.5 * (high + low)).numpy()
            self._position_scale = (0.5 * (high - low)).numpy()

        def set_action(self, action: torch.Tensor) -> None:
            """Sets the joints' drive targets for one ``[1, 6]`` normalised action."""
            self._step = 0
            qpos = self._sapien_robot.qpos
            result, success, _ = self.kinematics.pmodel.compute_inverse_kinematics(
                self.kinematics.end_link_idx,
                sapien.Pose(*self._target(action)),
                initial_qpos=qpos[self._model_joints],
                active_qmask=self._model_mask,
                max_iterations=100,
            )
            start = qpos[self._arm_joints]
            # As in the stock controller: out of reach, the arm holds where it is.
            target = result[self._controlled].astype(np.float32) if success else start
            for index, joint in enumerate(self._sapien_joints):
                joint.drive_target = target[index : index + 1]
            self._start_qpos = torch.from_numpy(start)[None]
            self._target_qpos = torch.from_numpy(target)[None]

        def _target(self, action: torch.Tensor) -> tuple[_Scalars, _Scalars]:
            position = action[0, :3].numpy().clip(-1, 1)
            position = self._position_offset + self._position_scale * position
            rotation = action[:, 3:]
            norm = torch.linalg.norm(rotation, axis=1)
            if norm[0] > 1:
                rotation = rotation * (1 / norm[:, None])
            rotation = rotation * self.config.rot_lower
            delta = _euler_quaternion(
                tuple(torch.cos(rotation)[0].numpy()),
                tuple(torch.sin(rotation)[0].numpy()),
            )
            root, end = self._sapien_root.entity_pose, self._sapien_end.entity_pose
            p, q = _relative_pose(root.p, root.q, end.p, end.q)
            return (
                tuple(a + b for a, b in zip(p, position, strict=True)),
                _versor(_product(delta, q)),
            )

    return FastPDEEPoseController


def _product(a: _Scalars, b: _Scalars) -> _Scalars:
    """Product of two quaternions (real part first)."""
    aw, ax, ay, az = a
    bw, bx, by, bz = b
    return (
        aw * bw - ax * bx - ay * by - az * bz,
        aw * bx + ax * bw + ay * bz - az * by,
        aw * by - ax * bz + ay * bw + az * bx,
        aw * bz + ax * by - ay * bx + az * bw,
    )


def _versor(q: _Scalars) -> _Scalars:
    """The same rotation with a real part that is not negative."""
    return tuple(-x for x in q) if q[0] < 0 else q


def _rotate(q: _Scalars, p: _Scalars) -> _Scalars:
    """Rotates a point by a unit quaternion."""
    w, x, y, z = q
    return _product(_product(q, (np.float32(0.0), *p)), (w, -x, -y, -z))[1:]


def _relative_pose(
    root_p: _Scalars, root_q: _Scalars, p: _Scalars, q: _Scalars
) -> tuple[_Scalars, _Scalars]:
    """Position and quaternion of a pose as seen from the root's."""
    w, x, y, z = root_q
    inverse_q = (w, -x, -y, -z)
    inverse_p = _rotate(inverse_q, tuple(-v for v in root_p))
    rotated = _rotate(inverse_q, tuple(p))
    return (
        tuple(a + b for a, b in zip(inverse_p, rotated, strict=True)),
        _versor(_product(inverse_q, tuple(q))),
    )


def _euler_quaternion(cos: _Scalars, sin: _Scalars) -> _Scalars:
    """Quaternion of R = Rx Ry Rz from the angles' cosines and sines.

    It goes through the matrix as ManiSkill does, whose rounding it repeats; valid
    while the quaternion's real part is its largest.
    """
    (cx, cy, cz), (sx, sy, sz) = cos, sin
    # Rx Ry: one product per entry.
    a00, a01, a02 = cy, np.float32(0.0), sy
    a10, a11, a12 = sx * sy, cx, -sx * cy
    a20, a21, a22 = -cx * sy, sx, cx * cy
    # (Rx Ry) Rz
    m00, m01, m02 = a00 * cz + a01 * sz, a01 * cz - a00 * sz, a02
    m10, m11, m12 = a10 * cz + a11 * sz, a11 * cz - a10 * sz, a12
    m20, m21, m22 = a20 * cz + a21 * sz, a21 * cz - a20 * sz, a22
    # torch's root, as numpy's may differ in the last bit.
    twice_w = torch.tensor(np.float32(1.0) + m00 + m11 + m22).sqrt().numpy()[()]
    scale = np.float32(2.0) * twice_w
    return (
        twice_w * twice_w / scale,
        (m21 - m12) / scale,
        (m02 - m20) / scale,
        (m10 - m01) / scale,
    )
