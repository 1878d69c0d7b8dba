# Copyright (c) the torchrl_rpd authors.
#
# This source code is licensed under the MIT license found in the
# LICENSE file in the root directory of this source tree.
"""RPD with Ray: collectors on several machines, one teacher that they share.

TorchRL's Ray collectors step the simulators, each in a process of its own; the teacher is
one Ray actor with its own resources; PPO and distillation run here. Without an address a
small Ray is started on this machine.

    python examples/rpd_ray.py
    python examples/rpd_ray.py --address auto --collectors 8 --teacher-gpus 1
    python examples/rpd_ray.py --placement postproc --on-teacher-loss mask

Collectors and the teacher may die. A lost collector: its batch is lost, all collectors
are started again with the weights of now ("restart"), or the run ends ("stop"). A lost
teacher: Ray starts it again and repeats the question ("restart"), rows go without labels
("mask"), or the run ends ("stop").
"""

from __future__ import annotations

import argparse
import functools
import os
from collections.abc import Callable
from typing import Any

import torch
from tensordict import TensorDictBase
from torchrl.collectors import Collector
from torchrl.data import (
    LazyTensorStorage,
    SamplerWithoutReplacement,
    TensorDictReplayBuffer,
)
from torchrl.envs import EnvBase, TransformedEnv

from torchrl_rpd import set_learner_threads
from torchrl_rpd.envs import ManiSkillEnv
from torchrl_rpd.evaluation import evaluate
from torchrl_rpd.objectives import DistillPPOLoss, FiniteHorizonGAE
from torchrl_rpd.students import ActorCritic, mlp_actor_critic
from torchrl_rpd.teachers import ScriptedTeacher
from torchrl_rpd.teachers.ray_actor import RayTeacher, TeacherActor
from torchrl_rpd.teachers.remote import TeacherUnavailable
from torchrl_rpd.transforms import TeacherActionTransform

# What Ray does about an actor that has died.
RESTART = {"max_restarts": -1, "max_task_retries": -1}


class RemoteCollector(Collector):
    """TorchRL's collector, whose errors arrive.

    Ray looks at the truth value of an actor before it passes an error on. Without this,
    that is the length in TorchRL 0.14, which a collector without an end does not have:
    its process would die instead.
    """

    def __bool__(self) -> bool:
        return True

    def __repr__(self) -> str:
        return "collector"  # what it prints appears here under this name


def make_simulators(args: argparse.Namespace, seed: int) -> EnvBase:
    """The simulators of one collector; called in its process."""
    env = ManiSkillEnv(
        args.task, num_envs=args.num_envs, reward_mode="sparse", fast_controller=True
    )
    env.set_seed(seed)
    return env


def make_teacher(args: argparse.Namespace) -> ScriptedTeacher:
    """The teacher; called in its actor."""
    return ScriptedTeacher(args.task, jitter=0.3)


def make_env(
    args: argparse.Namespace,
    make_simulators: Callable[[argparse.Namespace, int], EnvBase],
    ask: Callable[[], RayTeacher] | None,
    seed: int,
) -> EnvBase:
    """The environments of one collector, with the shared teacher in them or without."""
    torch.set_num_threads(1)
    env = make_simulators(args, seed)
    if ask is None:
        return env
    return TransformedEnv(env, TeacherActionTransform(teacher_factory=ask))


def parse_args(argv: list[str] | None = None) -> argparse.Namespace:
    """The options."""
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--address", help="of a running Ray; 'auto' finds it")
    parser.add_argument("--task", default="PushCube-v1")
    parser.add_argument("--frames", type=int, default=24_000)
    parser.add_argument("--collectors", type=int, default=2)
    parser.add_argument("--num-envs", type=int, default=8, help="of each collector")
    parser.add_argument("--steps", type=int, default=50, help="of a rollout")
    parser.add_argument("--placement", default="env", choices=["env", "postproc"])
    parser.add_argument("--teacher-cpus", type=float, default=1)
    parser.add_argument("--teacher-gpus", type=float, default=0)
    parser.add_argument("--teacher-timeout", type=float, default=120.0)
    parser.add_argument(
        "--on-teacher-loss", default="restart", choices=["restart", "mask", "stop"]
    )
    parser.add_argument(
        "--on-collector-loss", default="restart", choices=["restart", "stop"]
    )
    parser.add_argument("--episodes", type=int, default=100, help="to evaluate")
    parser.add_argument("--seed", type=int, default=0)
    return parser.parse_args(argv)


def start_ray(args: argparse.Namespace) -> None:
    """Joins a cluster, or starts one for this run."""
    import ray

    os.environ.setdefault("RAY_USAGE_STATS_ENABLED", "0")
    if args.address is not None:
        ray.init(address=args.address)
        return
    ray.init(
        # As many as there are processes to place, however few there really are.
        num_cpus=args.collectors + max(1, round(args.teacher_cpus)),
        include_dashboard=False,
        object_store_memory=200 * 1024**2,
    )


def start_teacher(
    args: argparse.Namespace, make_teacher: Callable[[argparse.Namespace], Any]
) -> Any:
    """The actor with the teacher, on resources of its own."""
    import ray

    actor_class = ray.remote(
        num_cpus=args.teacher_cpus,
        num_gpus=args.teacher_gpus,
        max_concurrency=args.collectors + 1,
        **(RESTART if args.on_teacher_loss == "restart" else {}),
    )(TeacherActor)
    return actor_class.remote(
        functools.partial(make_teacher, args),
        device="cuda" if args.teacher_gpus else None,
        timeout=args.teacher_timeout,
    )


def start_collectors(
    args: argparse.Namespace,
    student: ActorCritic,
    make_simulators: Callable[[argparse.Namespace, int], EnvBase],
    ask: Callable[[], RayTeacher],
    *,
    total_frames: int,
    seed: int,
) -> Any:
    """TorchRL's Ray collectors, with the student's weights of now."""
    in_env = args.placement == "env"
    collectors = Collector(
        [
            functools.partial(
                make_env,
                args,
                make_simulators,
                ask if in_env else None,
                seed + 1000 * i,
            )
            for i in range(args.collectors)
        ],
        student.actor,
        backend="ray",
        sync=True,
        frames_per_batch=args.collectors * args.num_envs * args.steps,
        total_frames=total_frames,
        postproc=None if in_env else TeacherActionTransform(ask(), low=-1.0, high=1.0),
        backend_options={
            "collector_class": RemoteCollector,
            "collector_kwargs": {"auto_register_policy_transforms": False},
            # No restarts by Ray: it would start a collector with the weights of the
            # beginning. We do it.
            "remote_configs": {"num_cpus": 1},
        },
    )
    collectors.update_policy_weights_(student.actor)
    return collectors


def are_alive(actors: list[Any]) -> bool:
    """Whether all of these actors are there."""
    import ray

    try:
        ray.get([actor.__ray_ready__.remote() for actor in actors], timeout=30.0)
    except ray.exceptions.RayError:
        return False
    return True


def train(
    args: argparse.Namespace,
    *,
    make_simulators: Callable[[argparse.Namespace, int], EnvBase] = make_simulators,
    make_teacher: Callable[[argparse.Namespace], Any] = make_teacher,
    after_batch: Callable[..., None] = lambda **state: None,
) -> ActorCritic:
    """Trains; ``after_batch`` looks on."""
    import ray

    torch.manual_seed(args.seed)
    teacher = start_teacher(args, make_teacher)
    ray.get(teacher.stats.remote())  # loaded, or an error from there
    spec = make_simulators(args, args.seed)
    ask = functools.partial(
        RayTeacher,
        teacher,
        timeout=args.teacher_timeout,
        on_error="mask" if args.on_teacher_loss == "mask" else "raise",
        action_dim=spec.action_spec.shape[-1],
    )
    student = mlp_actor_critic(
        spec.observation_spec["observation"].shape[-1],
        spec.action_spec.shape[-1],
        log_std_init=-1.2,
    )
    spec.close()
    learner = Learner(student, args)

    frames = losses = 0
    while frames < args.frames:
        # Whoever takes over goes on with episodes that nobody has played.
        seed = args.seed + 100_000 * losses
        collectors, frames_before = None, frames
        try:
            collectors = start_collectors(
                args,
                student,
                make_simulators,
                ask,
                total_frames=args.frames - frames,
                seed=seed,
            )
            for batch in collectors:
                frames += batch.numel()
                report = learner.update(batch)
                print(f"{frames:>7} frames  {report}", flush=True)
                collectors.update_policy_weights_(student.actor)
                after_batch(
                    batch=batch, student=student, collectors=collectors, teacher=teacher
                )
        except TeacherUnavailable as error:
            raise SystemExit(
                f"The teacher is gone after {frames} frames: "
                f"{getattr(error, 'cause', error)}\n"
                "(--on-teacher-loss restart, with a --teacher-timeout that is long "
                "enough to load it, and mask go on)"
            ) from error
        except ray.exceptions.RayTaskError:
            raise  # an error in a collector, not its end
        except Exception as error:
            # One that ends while it collects, or while it is sent weights (any error).
            lost = isinstance(error, ray.exceptions.RayActorError) or (
                collectors is not None and not are_alive(collectors.remote_collectors)
            )
            if not lost:
                raise
            what = f"A collector died after {frames} frames: {type(error).__name__}"
            if args.on_collector_loss == "stop":
                raise SystemExit(
                    f"{what}\n(--on-collector-loss restart goes on)"
                ) from error
            if frames == frames_before:
                raise  # no batch since they started: nor would the next ones deliver
            losses += 1
            print(f"{what}; all start again", flush=True)
        finally:
            if collectors is not None:
                collectors.shutdown()
    if args.on_teacher_loss == "restart":
        print(f"teacher: {ray.get(teacher.stats.remote())}")
    ray.kill(teacher)
    return student


class Learner:
    """PPO plus distillation, as in ``rpd_loop.py``."""

    def __init__(self, student: ActorCritic, args: argparse.Namespace) -> None:
        self.student = student
        self.loss = DistillPPOLoss(
            student.actor,
            student.critic,
            distill_coeff=2.0,
            entropy_bonus=False,
            loss_critic_type="l2",
            critic_coeff=0.25,
            normalize_advantage=True,
        )
        self.gae = FiniteHorizonGAE(
            gamma=0.99, lmbda=0.9, value_network=student.value_network
        )
        self.optimizer = torch.optim.Adam(self.loss.parameters(), lr=3e-4, eps=1e-5)
        self.buffer = TensorDictReplayBuffer(
            storage=LazyTensorStorage(args.collectors * args.num_envs * args.steps),
            sampler=SamplerWithoutReplacement(),
            batch_size=50,
        )

    def update(self, batch: TensorDictBase) -> str:
        """Eight epochs over one batch ``[collectors, num_envs, steps]``."""
        batch = self.gae(batch.copy())
        self.buffer.extend(batch.reshape(-1))
        for _ in range(8):
            for minibatch in self.buffer:
                out = self.loss(minibatch)
                total = out["loss_objective"] + out["loss_critic"] + out["loss_distill"]
                self.optimizer.zero_grad()
                total.backward()
                torch.nn.utils.clip_grad_norm_(self.loss.parameters(), 0.5)
                self.optimizer.step()
        # After the updates: the next rollout and its updates see the same statistics.
        self.student.observation_norm.update(batch["observation"])
        ended = batch["next", "done"]
        success = batch["next", "success"][ended].double().mean()
        labelled = batch["teacher_mask"].double().mean()
        return (
            f"success {success:.2f}  labelled {labelled:.2f}  "
            f"distill_error {out['distill_error']:.4f}"
        )


def main() -> None:
    """Starts Ray, trains and evaluates."""
    args = parse_args()
    set_learner_threads(num_workers=args.collectors + 1)
    import ray

    start_ray(args)
    try:
        student = train(args)
    finally:
        ray.shutdown()
    if args.episodes:
        env = ManiSkillEnv(args.task, num_envs=args.num_envs, reward_mode="sparse")
        seeds = args.seed + 2_000_000
        print(evaluate(env, student.actor, episodes=args.episodes, seeds=seeds))


if __name__ == "__main__":
    main()
