# Copyright (c) the torchrl_rpd authors.
#
# This source code is licensed under the MIT license found in the
# LICENSE file in the root directory of this source tree.
"""Closed-loop, memoryless controllers in ``pd_ee_delta_pose``, one per task.

Each maps a :class:`~torchrl_rpd.teachers._layout.Scene` to ``[*B, 7]`` actions. Stages
(approach, descend, act) are blended by smooth weights instead of switched: a student
regresses to the mean of its labels, and a jump in the labels can leave it standing
still on the border.
"""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor

from torchrl_rpd.teachers._layout import BASE_X, Scene

__all__ = ["CONTROLLERS"]

_UNIT = 0.1  # metres per step commanded by an action of 1
# The arm realises 30 to 60 % of a commanded step (targets are relative to where it is),
# so a gain above 1 still converges without overshoot.
_GAIN = 1.5
# The Panda's geometry in metres: the height of the hand's centre at which the wrist is
# level with the shoulder; the wrist's offset, and the hand's length from there; the
# stretched arm (0.719 by the drawing) less a margin.
_SHOULDER_Z = 0.123
_WRIST = 0.088
_HAND = 0.21
_STRETCH = 0.71
# How far the hand leans outwards for a cube that is far away, in radians: so the
# stretched arm reaches furthest along the table (0.88 m from its base, upright 0.79).
_TILT = 0.8
# The peg: half its length and half its width; where it is held, from its middle.
_PEG_HALF = 0.12
_PEG_RADIUS = 0.025
_PEG_HOLD = 0.09
# RollBall's arm stands elsewhere: the position of its base, which looks along -y.
_BALL_BASE = (-0.1, 1.0)


def _ramp(x: Tensor, low: float, high: float) -> Tensor:
    """0 below ``low``, 1 above ``high``, smooth (zero slope at both ends) between."""
    t = ((x - low) / (high - low)).clamp(0.0, 1.0)
    return t * t * (3.0 - 2.0 * t)


def _norm(x: Tensor) -> Tensor:
    return x.square().sum(-1, keepdim=True).sqrt()


def _towards(position: Tensor, target: Tensor) -> Tensor:
    return (_GAIN / _UNIT * (target - position)).clamp(-1.0, 1.0)


def _action(
    scene: Scene,
    position: Tensor,
    gripper: Tensor,
    rotation: Tensor | None = None,
    tilt: Tensor | float = 0.0,
) -> Tensor:
    """The 7 dimensions: position kept within reach, rotation, gripper.

    ``tilt`` (``[*B, 1]`` or a number) is how far the hand leans outwards, in radians.
    """
    wanted = scene.tcp + _UNIT * position
    # Out of reach the inverse kinematics has no solution and the arm stands still for
    # ever, so the command is shortened, towards the base, to what the stretched arm
    # reaches with the hand as it is.
    tilt = torch.as_tensor(tilt, dtype=position.dtype, device=position.device)
    down, out = torch.cos(tilt), torch.sin(tilt)
    radial = _from_base(wanted)
    level = _SHOULDER_Z + _HAND * (1.0 - down) + _WRIST * out
    drop = wanted[..., 2:] - level
    arm = (_STRETCH**2 - drop.square()).clamp_min(0.0).sqrt()
    reach = _WRIST * down + _HAND * out + arm
    shrink = (reach / _norm(radial).clamp_min(1e-6)).clamp_max(1.0) - 1.0
    inside = position[..., :2] + shrink * radial / _UNIT
    position = torch.cat([inside, position[..., 2:]], -1).clamp(-1.0, 1.0)
    if rotation is None:
        rotation = torch.zeros_like(position)
    return torch.cat([position, rotation, gripper], -1)


def _from_base(position: Tensor) -> Tensor:
    """In the plane, from the robot's base: ``[*B, 2]``."""
    return torch.cat([position[..., :1] - BASE_X, position[..., 1:2]], -1)


def _above(position: Tensor, height: Tensor) -> Tensor:
    """``position`` raised by ``height`` (``[*B, 1]`` metres)."""
    return torch.cat([position[..., :2], position[..., 2:] + height], -1)


def _reach(scene: Scene) -> tuple[Tensor, Tensor]:
    """Arm target and gripper command that bring the open hand around the cube.

    The hand stays above the cube until the fingers clear its sides, and closes
    as the tool centre comes within a few millimetres of the cube's centre.
    """
    away = _norm(scene.cube[..., :2] - scene.tcp[..., :2])
    target = _above(scene.cube, 0.08 * _ramp(away, 0.018, 0.06))
    distance = _norm(scene.cube - scene.tcp)
    gripper = 2.0 * _ramp(distance, 0.010, 0.024) - 1.0
    return target, gripper


def pick_cube(scene: Scene) -> Tensor:
    """Reach, close, then carry the cube to the goal and hold it there."""
    assert scene.grasped is not None
    target, gripper = _reach(scene)
    reach = _action(scene, _towards(scene.tcp, target), gripper)
    carry = _action(scene, _towards(scene.cube, scene.goal), -torch.ones_like(gripper))
    return torch.where(scene.grasped > 0.5, carry, reach)


def _slide(scene: Scene, sign: float) -> Tensor:
    """Move the cube along x (``sign`` 1 away from the robot, -1 towards it).

    The closed hand goes over the cube to its far side seen from the goal, comes
    down, and sweeps until the cube's centre is on the goal's.
    """
    behind = sign * (scene.cube[..., :1] - scene.tcp[..., :1])
    aside = (scene.cube[..., 1:2] - scene.tcp[..., 1:2]).abs()
    height = scene.tcp[..., 2:] - scene.cube[..., 2:]
    # half a cube, half a finger and 10 mm of air: clear of the cube's side
    ready = scene.cube[..., :1] - sign * 0.045
    final = scene.goal[..., :1] - sign * 0.03
    in_line = (1.0 - _ramp(aside, 0.01, 0.025)) * (1.0 - _ramp(height, 0.012, 0.035))
    sweep = in_line * _ramp(behind, 0.0, 0.02)
    x = ready + sweep * (final - ready)
    lift = 0.06 * (1.0 - _ramp(behind, 0.012, 0.03))
    target = torch.cat([x, scene.cube[..., 1:2], scene.cube[..., 2:] + lift], -1)
    # a cube that leaves the hand at full speed slides past the goal
    slow = 1.0 - 0.5 * sweep
    arm = _towards(scene.tcp, target)
    arm = torch.cat([arm[..., :1].clamp(-slow, slow), arm[..., 1:]], -1)
    return _action(scene, arm, -torch.ones_like(lift))


def push_cube(scene: Scene) -> Tensor:
    """Push the cube away from the robot onto the goal and stop there."""
    return _slide(scene, 1.0)


def pull_cube(scene: Scene) -> Tensor:
    """Pull the cube towards the robot onto the goal and stop there."""
    return _slide(scene, -1.0)


def stack_cube(scene: Scene) -> Tensor:
    """Reach and close, lift, carry over the goal, lower, open."""
    target, gripper = _reach(scene)
    reach = _towards(scene.tcp, target)
    # The state does not say whether the cube is held: it is, when the fingers are
    # less than open and the cube is between them.
    fingers = scene.fingers.mean(-1, keepdim=True)
    between = 1.0 - _ramp(_norm(scene.cube - scene.tcp), 0.014, 0.024)
    held = between * (1.0 - _ramp(fingers, 0.030, 0.036))
    away = _norm(scene.goal[..., :2] - scene.cube[..., :2])
    above = scene.cube[..., 2:] - scene.goal[..., 2:]
    # sideways only at a height at which the other cube is out of the way
    free = torch.maximum(_ramp(above, -0.02, 0.005), 1.0 - _ramp(away, 0.01, 0.02))
    carry = _towards(scene.cube, _above(scene.goal, 0.04 * _ramp(away, 0.008, 0.03)))
    carry = torch.cat([free * carry[..., :2], carry[..., 2:]], -1)
    placed = (1.0 - _ramp(away, 0.015, 0.025)) * (
        1.0 - _ramp(above.abs(), 0.003, 0.005)
    )
    arm = (1.0 - placed) * (reach + held * (carry - reach))
    gripper = gripper + held * (-1.0 - gripper)
    return _action(scene, arm, gripper + placed * (1.0 - gripper))


def lift_peg_upright(scene: Scene) -> Tensor:
    """Hold the peg near its far end and lead that end up, the other one as the pivot.

    The hand does not turn: the peg turns in the fingers, which therefore press just
    hard enough to carry it, and less hard the more of it stands on the table.
    """
    assert scene.axis is not None
    hold = scene.cube + _PEG_HOLD * scene.axis
    pivot = scene.cube - _PEG_HALF * scene.axis
    aside = _norm((hold - scene.tcp)[..., :2])
    away = _norm(hold - scene.tcp)
    reach = _towards(scene.tcp, _above(hold, 0.08 * _ramp(aside, 0.018, 0.06)))

    # a point further along the circle that the hand moves on, past the top at the end
    flat, up = scene.axis[..., :2], scene.axis[..., 2:]
    level = _norm(flat)
    angle = torch.atan2(up, level) + 0.3
    radius = _PEG_HALF + _PEG_HOLD
    forward = radius * torch.cos(angle) * flat / level.clamp_min(0.1)
    rest = _PEG_RADIUS * torch.cos(angle).clamp_min(0.0)
    height = radius * torch.sin(angle) + rest + scene.goal[..., 2:] - _PEG_HALF
    lead = _towards(scene.tcp, torch.cat([pivot[..., :2] + forward, height], -1))

    fingers = scene.fingers.mean(-1, keepdim=True)
    between = 1.0 - _ramp(away, 0.03, 0.045)
    held = between * (1.0 - _ramp(fingers, 0.0258, 0.0275))
    closing = torch.maximum(
        1.0 - _ramp(away, 0.012, 0.024), between * (1.0 - _ramp(fingers, 0.030, 0.036))
    )
    press = 0.2 + 0.1 * _ramp(up, 0.5, 0.8)
    arm = reach + held * (lead - reach)
    return _action(scene, arm, 1.0 + closing * (press - 1.0))


def _as_seen_from_the_arm(scene: Scene) -> Scene:
    """RollBall in the frame of the other tasks: base at ``BASE_X``, looking along x."""
    assert scene.velocity is not None
    x, y = _BALL_BASE

    def turn(v: Tensor) -> Tensor:
        return torch.stack([-v[..., 1], v[..., 0], v[..., 2]], -1)

    def move(position: Tensor) -> Tensor:
        return turn(position) + position.new_tensor((BASE_X + y, -x, 0.0))

    return scene._replace(
        tcp=move(scene.tcp),
        cube=move(scene.cube),
        goal=move(scene.goal),
        velocity=turn(scene.velocity),
    )


def roll_ball(scene: Scene) -> Tensor:
    """Grasp the ball, sweep it towards the goal and let go on the way.

    A push from behind would have to start closer to the base than the arm can fold.
    """
    scene = _as_seen_from_the_arm(scene)
    assert scene.velocity is not None
    aside = _norm((scene.cube - scene.tcp)[..., :2])
    away = _norm(scene.cube - scene.tcp)
    reach = _towards(scene.tcp, _above(scene.cube, 0.08 * _ramp(aside, 0.018, 0.06)))

    to_goal = (scene.goal - scene.cube)[..., :2]
    ahead = to_goal / _norm(to_goal).clamp_min(0.1)
    # 5 mm above the table, over which the ball would otherwise be dragged
    level = _GAIN / _UNIT * (0.04 - scene.tcp[..., 2:])
    sweep = torch.cat([ahead, level.clamp(-1.0, 1.0)], -1)

    fingers = scene.fingers.mean(-1, keepdim=True)
    between = 1.0 - _ramp(aside, 0.03, 0.05)
    held = between * (1.0 - _ramp(fingers, 0.0365, 0.0385))
    closing = torch.maximum(
        1.0 - _ramp(away, 0.012, 0.024),
        between * (1.0 - _ramp(fingers, 0.0365, 0.039)),
    )
    moving = _ramp(scene.velocity[..., :1], 0.15, 0.3)
    arm = reach + torch.maximum(held, between * moving) * (sweep - reach)

    # Let go where the arm can still go along: the hand rises out of the rolling ball
    # at the ball's own speed (0.7 m/s is what an action of 1 comes to), then rests.
    let_go = moving * _ramp(scene.cube[..., :1], -0.05, -0.03)
    loose = let_go * _ramp(fingers, 0.0355, 0.037)
    along = scene.velocity[..., :2] / 0.7
    arm = arm + loose * (torch.cat([along, torch.ones_like(loose)], -1) - arm)
    arm = arm * (1.0 - moving * _ramp(scene.tcp[..., 2:], 0.09, 0.12))
    gripper = 1.0 + closing * (1.0 - let_go) * (0.2 - 1.0)
    return _action(scene, arm, gripper)


def _tilted(scene: Scene, out: Tensor, wanted: Tensor) -> tuple[Tensor, Tensor]:
    """The rotation command that tilts the hand by ``wanted``, and the tilt that it has.

    ``out`` (``[*B, 2]``, a unit vector) is the direction in which it leans; the fingers
    open at right angles to it.
    """
    assert scene.hand is not None
    w, x, y, z = (scene.hand / _norm(scene.hand).clamp_min(1e-6)).unbind(-1)
    # where the hand points (its z axis), and along what its fingers open (its y axis)
    points = torch.stack(
        [2.0 * (x * z + w * y), 2.0 * (y * z - w * x), 1.0 - 2.0 * (x * x + y * y)], -1
    )
    opens = torch.stack(
        [2.0 * (x * y - w * z), 1.0 - 2.0 * (x * x + z * z), 2.0 * (y * z + w * x)], -1
    )
    to_point = torch.cat([torch.sin(wanted) * out, -torch.cos(wanted)], -1)
    to_open = torch.cat([out[..., 1:], -out[..., :1], torch.zeros_like(wanted)], -1)
    error = torch.linalg.cross(points, to_point) + torch.linalg.cross(opens, to_open)
    # ManiSkill's controller turns against the command (Panda: rot_lower = -0.1)
    rotation = (-_GAIN / _UNIT * 0.5 * error).clamp(-1.0, 1.0)
    outwards = (points[..., :2] * out).sum(-1, keepdim=True)
    tilt = torch.atan2(outwards.clamp_min(0.0), -points[..., 2:])
    return rotation, tilt.clamp_max(1.0)


def pull_far_cube(scene: Scene) -> Tensor:
    """Grasp the cube with the tilted hand, drag it over the table to the goal, let go.

    PullCube's own way starts behind the cube, which more often is out of reach.
    """
    # upright where that will do: beside a near cube the tool may lie under the hand
    out = _from_base(scene.cube)
    wanted = _TILT * _ramp(_norm(out), 0.70, 0.80)
    rotation, tilt = _tilted(scene, out / _norm(out).clamp_min(0.1), wanted)
    away = _norm(scene.cube[..., :2] - scene.tcp[..., :2])
    far = torch.maximum(_ramp(away, 0.018, 0.06), _ramp(wanted - tilt, 0.1, 0.3))
    reach = _towards(scene.tcp, _above(scene.cube, 0.08 * far))
    distance = _norm(scene.cube - scene.tcp)
    fingers = scene.fingers.mean(-1, keepdim=True)
    between = 1.0 - _ramp(distance, 0.014, 0.024)
    held = between * (1.0 - _ramp(fingers, 0.030, 0.036))
    drag = _towards(scene.cube, scene.goal)
    to_goal = _norm(scene.goal[..., :2] - scene.cube[..., :2])
    placed = between * (1.0 - _ramp(to_goal, 0.02, 0.04))
    arm = (1.0 - placed) * (reach + held * (drag - reach))
    closed = torch.maximum(held, 1.0 - _ramp(distance, 0.010, 0.024))
    gripper = 1.0 - 2.0 * closed * (1.0 - placed)
    # a turn of the hand would tilt the cube, which counts flat on the table only
    return _action(scene, arm, gripper, (1.0 - held) * rotation, tilt)


def push_far_cube(scene: Scene) -> Tensor:
    """Push the cube to the goal with the tilted hand, its fingers 20 mm apart.

    Two points of contact keep the cube straight where one would turn it aside. They
    are above the cube's centre: higher up the arm reaches further.
    """
    behind = scene.cube[..., :1] - scene.tcp[..., :1]
    aside = (scene.cube[..., 1:2] - scene.tcp[..., 1:2]).abs()
    contact = _above(scene.cube, torch.full_like(behind, 0.012))
    height = scene.tcp[..., 2:] - contact[..., 2:]
    ready = scene.cube[..., :1] - 0.055
    final = scene.goal[..., :1] - 0.03
    in_line = (1.0 - _ramp(aside, 0.01, 0.025)) * (1.0 - _ramp(height, 0.012, 0.035))
    sweep = in_line * _ramp(behind, 0.0, 0.02)
    x = ready + sweep * (final - ready)
    # over the peg, which lies behind the cube, and over the cube
    clear = (1.0 - _ramp(behind, 0.075, 0.12)) * (1.0 - _ramp(aside, 0.02, 0.05))
    lift = 0.08 * (1.0 - clear * _ramp(behind, 0.012, 0.03))
    target = torch.cat([x, contact[..., 1:2], contact[..., 2:] + lift], -1)
    # a cube that leaves the hand at full speed slides past the goal
    slow = 1.0 - 0.5 * sweep
    arm = _towards(scene.tcp, target)
    arm = torch.cat([arm[..., :1].clamp(-slow, slow), arm[..., 1:]], -1)
    ahead = torch.zeros_like(scene.cube[..., :2])
    ahead[..., 0] = 1.0
    rotation, tilt = _tilted(scene, ahead, torch.full_like(lift, _TILT))
    return _action(scene, arm, torch.full_like(lift, -0.2), rotation, tilt)


CONTROLLERS: dict[str, Callable[[Scene], Tensor]] = {
    "PushCube-v1": push_cube,
    "PullCube-v1": pull_cube,
    "PickCube-v1": pick_cube,
    "StackCube-v1": stack_cube,
    "LiftPegUpright-v1": lift_peg_upright,
    "RollBall-v1": roll_ball,
    "PokeCubeDistractor-v1": push_far_cube,
    "PullCubeToolDistractor-v1": pull_far_cube,
}
