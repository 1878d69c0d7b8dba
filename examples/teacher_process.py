# Copyright (c) the torchrl_rpd authors.
#
# This source code is licensed under the MIT license found in the
# LICENSE file in the root directory of this source tree.
"""One teacher for several worker processes, behind TorchRL's InferenceServer.

Simulators run in the workers of a ParallelEnv, each with a TeacherActionTransform of its
own. The teacher they ask is one and the same: in a thread of this process, or in a
process of its own (on a GPU of its own, if it wants one). The server batches the rows of
all workers. The labels are those of a teacher in this process.

    python examples/teacher_process.py
    python examples/teacher_process.py --server thread --workers 4
"""

from __future__ import annotations

import argparse
import functools
from collections.abc import Callable

import torch
from torchrl.envs import ParallelEnv, TransformedEnv
from torchrl.modules.inference_server import (
    InferenceServer,
    MPTransport,
    ProcessInferenceServer,
)

from torchrl_rpd import set_learner_threads
from torchrl_rpd.envs import ManiSkillEnv
from torchrl_rpd.teachers import ScriptedTeacher
from torchrl_rpd.teachers.inference import InferenceTeacher, ServableTeacher
from torchrl_rpd.transforms import TeacherActionTransform


def make_teacher(task: str) -> ScriptedTeacher:
    """The teacher; called where it is to live."""
    torch.set_num_threads(1)  # a teacher on a GPU does not mind
    return ScriptedTeacher(task, jitter=0.3)


def make_env(
    task: str, num_envs: int, seed: int, teacher_factory: Callable[[], InferenceTeacher]
) -> TransformedEnv:
    """The environments of one worker; called there."""
    torch.set_num_threads(1)
    env = ManiSkillEnv(task, num_envs=num_envs, fast_controller=True)
    env.set_seed(seed)
    return TransformedEnv(env, TeacherActionTransform(teacher_factory=teacher_factory))


def make_server(
    kind: str, teacher_factory: Callable[[], ScriptedTeacher], num_rows: int
) -> InferenceServer | ProcessInferenceServer:
    """A server that waits up to 20 ms until the rows of all workers are there."""
    options = {
        # Queues that outlive the server and can be sent to workers that are spawned.
        "transport": MPTransport(use_manager=True),
        "max_batch_size": num_rows,
        "min_batch_size": num_rows,
        "timeout": 0.02,
        "policy_version_key": None,
    }
    # For a GPU: policy_device="cuda:1", output_device="cpu".
    factory = functools.partial(ServableTeacher, teacher_factory)
    if kind == "process":
        return ProcessInferenceServer(policy_factory=factory, **options)
    return InferenceServer(policy_factory=factory, **options)


def main() -> None:
    """Collects with each kind of server and compares the labels."""
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--task", default="PushCube-v1")
    parser.add_argument(
        "--server", default="both", choices=["thread", "process", "both"]
    )
    parser.add_argument("--workers", type=int, default=2)
    parser.add_argument("--num-envs", type=int, default=4, help="of each worker")
    parser.add_argument("--steps", type=int, default=60)
    args = parser.parse_args()
    set_learner_threads(num_workers=args.workers)  # the workers get one thread each
    factory = functools.partial(make_teacher, args.task)
    kinds = ["thread", "process"] if args.server == "both" else [args.server]
    for kind in kinds:
        collect(kind, factory, args)


def collect(
    kind: str, factory: Callable[[], ScriptedTeacher], args: argparse.Namespace
) -> None:
    """One rollout of all workers, labelled by one server."""
    server = make_server(kind, factory, args.workers * args.num_envs).start()
    try:
        # One client for each worker, made before the workers start.
        clients = InferenceTeacher.factories(
            server, args.workers, in_keys=factory().in_keys, timeout=60.0
        )
        env = ParallelEnv(
            args.workers,
            [
                functools.partial(make_env, args.task, args.num_envs, 100 * i, client)
                for i, client in enumerate(clients)
            ],
        )
        try:
            frames = env.rollout(args.steps, break_when_any_done=False)
            asked = sum(stats["queries"] for stats in env.transform.stats())
            served = server.stats()
        finally:
            env.close()
    finally:
        server.shutdown()
        server.transport.close()

    # The same frames, labelled in this process.
    label = TeacherActionTransform(factory(), low=-1.0, high=1.0)
    expected = label(frames.exclude("teacher_action", "teacher_mask"))
    equal = torch.equal(frames["teacher_action"], expected["teacher_action"])
    assert equal and bool(frames["teacher_mask"].all()), "labels differ"
    assert asked == served["requests"], (asked, served["requests"])
    # A worker sends num_envs rows and waits: larger batches hold rows of several.
    print(
        f"{kind}: {frames.numel()} frames with the labels of a teacher in this process; "
        f"{served['requests']} rows in {served['batches']} batches, "
        f"{served['avg_batch_size']:.1f} on average, from workers with "
        f"{args.num_envs} each",
        flush=True,
    )


if __name__ == "__main__":
    main()
