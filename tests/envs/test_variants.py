# Copyright (c) the torchrl_rpd authors.
#
# This source code is licensed under the MIT license found in the
# LICENSE file in the root directory of this source tree.
"""The hold-outs in which the tool is a distractor: their rules, in constructed states."""

from __future__ import annotations

import importlib
from collections.abc import Callable, Generator
from types import SimpleNamespace

import gymnasium as gym
import pytest
import torch

from torchrl_rpd.envs import TASKS, ManiSkillEnv, ManiSkillWrapper
from torchrl_rpd.envs._variants import register_variants
from torchrl_rpd.teachers._controllers import pull_cube, push_cube
from torchrl_rpd.teachers._layout import Scene

pytestmark = pytest.mark.maniskill

POKE, PULL = "PokeCubeDistractor-v1", "PullCubeToolDistractor-v1"
STOCK = {POKE: "PokeCube-v1", PULL: "PullCubeTool-v1"}
REST = 0.02  # the centre of a cube of 40 mm that lies on the table
LIFTED = REST + 0.006  # past ManiSkill's margin of 5 mm
BASE = -0.615  # where the robot stands on the x axis


@pytest.fixture(scope="module")
def envs() -> Generator[dict[str, ManiSkillEnv]]:
    """Both variants, and the tasks that they come from."""
    made = {
        task: ManiSkillEnv(task, reward_mode="sparse")
        for task in (*STOCK, *STOCK.values())
    }
    yield made
    for env in made.values():
        env.close()


def start(env: ManiSkillEnv, seed: int = 0):
    """A new episode, and the simulation in it."""
    env.set_seed(seed)
    td = env.reset()
    return td, env._env[0]


def put(actor, x: float, y: float, z: float, q=(1.0, 0.0, 0.0, 0.0)) -> None:
    pose = importlib.import_module("mani_skill.utils.structs.pose").Pose
    actor.set_pose(pose.create_from_pq(p=[x, y, z], q=list(q)))
    actor.set_linear_velocity(torch.zeros(1, 3))
    actor.set_angular_velocity(torch.zeros(1, 3))


def put_in_the_goal(task: str, sim) -> None:
    """The cube at rest in the middle of the goal, or well inside the goal region."""
    if task == POKE:
        x, y, _ = sim.goal_region.pose.p[0].tolist()
        put(sim.cube, x, y, REST)
    else:
        put(sim.cube, -0.05, 0.1, REST)


class TestRules:
    @pytest.mark.parametrize(
        ("dx", "dy", "z", "expected"),
        [
            (0.0, 0.0, REST, True),
            (0.049, 0.0, REST, True),
            (-0.049, 0.0, REST, True),
            (0.051, 0.0, REST, False),
            (0.0, -0.051, REST, False),
            (0.034, 0.034, REST, True),  # 0.034 * sqrt(2) = 0.0481
            (0.036, 0.036, REST, False),  # 0.036 * sqrt(2) = 0.0509
            (0.0, 0.0, REST + 0.004, True),
            (0.0, 0.0, LIFTED, False),
        ],
    )
    def test_poke(self, envs, dx, dy, z, expected):
        """Within 50 mm of the goal's centre, on the table."""
        _, sim = start(envs[POKE])
        x, y, _ = sim.goal_region.pose.p[0].tolist()
        put(sim.cube, x + dx, y + dy, z)
        info = sim.evaluate()
        assert info["success"].tolist() == [expected]
        assert info["is_cube_on_table"].tolist() == [z < 0.025]

    @pytest.mark.parametrize(
        ("x", "y", "z", "expected"),
        [
            (BASE + 0.599, 0.0, REST, True),
            (BASE + 0.601, 0.0, REST, False),
            # sqrt(0.6^2 - 0.25^2) = 0.5454
            (BASE + 0.544, -0.25, REST, True),
            (BASE + 0.547, -0.25, REST, False),
            (BASE + 0.5, 0.0, LIFTED, False),
            (BASE + 0.5, 0.0, 0.07, False),  # on top of the tool
        ],
    )
    def test_pull(self, envs, x, y, z, expected):
        """Less than 0.6 m from the robot's base, on the table."""
        _, sim = start(envs[PULL])
        put(sim.cube, x, y, z)
        info = sim.evaluate()
        assert info["success"].tolist() == [expected]

    @pytest.mark.parametrize("task", STOCK)
    def test_the_tool_plays_no_part(self, envs, task):
        """Wherever it lies or stands, it neither makes nor prevents success."""
        _, sim = start(envs[task])
        tool = sim.peg if task == POKE else sim.l_shape_tool
        upright = (0.7071068, 0.0, -0.7071068, 0.0)
        places = [(-0.3, 0.3, 0.025), (0.3, 0.3, 0.12, upright), (-0.2, 0.0, 0.4)]
        outside = sim.cube.pose.p[0].tolist()
        for place in places:
            put(tool, *place)
            put(sim.cube, *outside[:2], REST)
            assert not sim.evaluate()["success"].any()
            put_in_the_goal(task, sim)
            assert sim.evaluate()["success"].all()

    @pytest.mark.parametrize("task", STOCK)
    def test_what_differs_from_the_stock_task(self, envs, task):
        """A lifted cube counts for ManiSkill and not here; a moving robot is the reverse
        in PokeCube, which wants it static."""
        outcomes = {}
        for name in (task, STOCK[task]):
            _, sim = start(envs[name])
            put_in_the_goal(task, sim)
            results = [bool(sim.evaluate()["success"])]
            sim.agent.robot.set_qvel(torch.full((1, 9), 0.5))
            results.append(bool(sim.evaluate()["success"]))
            sim.agent.robot.set_qvel(torch.zeros(1, 9))
            x, y, _ = sim.cube.pose.p[0].tolist()
            put(sim.cube, x, y, LIFTED)
            results.append(bool(sim.evaluate()["success"]))
            outcomes[name] = results
        assert outcomes[task] == [True, True, False]
        assert outcomes[STOCK[task]] == [True, task == PULL, True]

    def test_a_batch(self):
        """Scene by scene, as on a GPU."""
        register_variants()
        registered = importlib.import_module("mani_skill.utils.registration")

        def thing(*positions):
            return SimpleNamespace(pose=SimpleNamespace(p=torch.tensor(positions)))

        cube = thing((0.3, 0.0, REST), (0.4, 0.0, REST), (-0.1, 0.0, LIFTED))
        link = thing(*[(BASE, 0.0, 0.0)] * 3)
        scenes = SimpleNamespace(
            cube=cube,
            cube_half_size=0.02,
            goal_radius=0.05,
            goal_region=thing((0.32, 0.0, 0.0), (0.32, 0.0, 0.0), (-0.1, 0.0, 0.0)),
            goal_distance=0.92,
            agent=SimpleNamespace(robot=SimpleNamespace(get_links=lambda: [link])),
        )
        for task in STOCK:
            info = registered.REGISTERED_ENVS[task].cls.evaluate(scenes)
            assert info["success"].tolist() == [True, False, False], task
            assert info["is_cube_placed"].tolist() == [True, False, True], task


class TestEpisodes:
    @pytest.mark.parametrize("task", STOCK)
    def test_starts_and_moves_as_the_stock_task(self, envs, task):
        """The same seeds give the same episodes; only success is something else."""
        for seed in (3, 4):
            td, _ = start(envs[task], seed)
            stock, _ = start(envs[STOCK[task]], seed)
            assert td["episode_seed"].item() == seed
            assert torch.equal(td["observation"], stock["observation"])
        for _ in range(3):
            action = envs[task].action_spec.rand()
            td = envs[task].step(td.set("action", action))["next"]
            stock = envs[STOCK[task]].step(stock.set("action", action))["next"]
            assert torch.equal(td["observation"], stock["observation"])
            assert not td["done"].any()

    @pytest.mark.parametrize("task", STOCK)
    def test_sparse_reward(self, envs, task):
        """1 and the end of the episode where the cube is in the goal, else 0."""
        still = torch.tensor([[0.0, 0.0, 0.0, 0.0, 0.0, 0.0, 1.0]])
        td, sim = start(envs[task])
        td = envs[task].step(td.set("action", still))["next"]
        for key in ("reward", "success", "terminated"):
            assert td[key].tolist() == [[0]], key
        put_in_the_goal(task, sim)
        td = envs[task].step(td.exclude("reward").set("action", still))["next"]
        for key in ("reward", "success", "terminated", "done"):
            assert td[key].tolist() == [[1]], key
        assert td["reward"].dtype == torch.float32
        assert not td["truncated"].any()
        assert "fail" not in td.keys()

    @pytest.mark.parametrize("task", STOCK)
    def test_info(self, envs, task):
        """Per scene, and nothing that belongs to the reward or to earlier steps."""
        _, sim = start(envs[task])
        info = sim.evaluate()
        assert set(info) == {"success", "is_cube_placed", "is_cube_on_table"}
        for value in info.values():
            assert value.shape == (1,) and value.dtype == torch.bool

    def test_no_reward(self):
        """The other mode that there is; made by gymnasium."""
        assert POKE in ManiSkillEnv.available_envs  # registered from here on
        env = ManiSkillWrapper(
            gym.make(POKE, obs_mode="state", reward_mode="none", render_backend="none")
        )
        td, sim = start(env)
        put_in_the_goal(POKE, sim)
        td = env.step(td.set("action", torch.zeros(1, 8)))["next"]
        assert td["reward"].tolist() == [[0.0]]
        assert td["success"].tolist() == [[True]]
        assert env._max_episode_steps == 50
        env.close()

    @pytest.mark.parametrize("task", STOCK)
    @pytest.mark.parametrize("mode", ["normalized_dense", "dense"])
    def test_no_dense_reward(self, task, mode):
        with pytest.raises(ValueError, match=rf"{task}.*{mode}.*\['none', 'sparse'\]"):
            ManiSkillEnv(task, reward_mode=mode)


@pytest.mark.parametrize("task", STOCK)
def test_the_stock_task_is_as_it_was(envs, task):
    registration = importlib.import_module("mani_skill.utils.registration")
    register_variants()  # a second time changes nothing
    stock = registration.REGISTERED_ENVS[STOCK[task]]
    variant = registration.REGISTERED_ENVS[task]
    module = importlib.import_module(stock.cls.__module__)
    assert getattr(module, stock.cls.__name__) is stock.cls
    assert stock.cls.__module__.startswith("mani_skill.")
    assert variant.cls.__mro__[1] is stock.cls
    assert set(stock.cls.SUPPORTED_REWARD_MODES) == set(TASKS[STOCK[task]].reward_modes)
    assert gym.spec(STOCK[task]).max_episode_steps == stock.max_episode_steps
    _, sim = start(envs[STOCK[task]])
    assert "is_cube_on_table" not in sim.evaluate()
    trained = "PushCube-v1" if task == POKE else "PullCube-v1"
    assert TASKS[task].instruction == TASKS[trained].instruction


def poke_scene(state: torch.Tensor) -> Scene:
    """PokeCube's state: tcp_pose 18:25, cube_pose 25:32, cube_to_goal_pos 48:51."""
    cube = state[..., 25:28]
    goal = torch.cat([(cube + state[..., 48:51])[..., :2], cube[..., 2:]], -1)
    return Scene(tcp=state[..., 18:21], fingers=state[..., 7:9], cube=cube, goal=goal)


def pull_scene(state: torch.Tensor) -> Scene:
    """PullCubeTool's state: tcp_pose 18:25, cube_pose 25:32. Straight to x = -0.12."""
    cube = state[..., 25:28]
    goal = torch.cat([torch.full_like(cube[..., :1], -0.12), cube[..., 1:]], -1)
    return Scene(tcp=state[..., 18:21], fingers=state[..., 7:9], cube=cube, goal=goal)


SOLUTIONS: dict[str, Callable[[torch.Tensor], torch.Tensor]] = {
    POKE: lambda state: push_cube(poke_scene(state)),
    PULL: lambda state: pull_cube(pull_scene(state)),
}


def solve(env: ManiSkillEnv, task: str, seed: int, steps: int) -> tuple[float, bool]:
    """How far away the cube was, and whether the hand moved it there without the tool."""
    td, sim = start(env, seed)
    distance = sim.cube.pose.p[0, 0].item()
    for _ in range(steps):
        action = SOLUTIONS[task](td["observation"].double()).float()
        td = env.step(td.set("action", action))["next"]
        if td["success"].item():
            return distance, True
        td = td.exclude("reward", "done", "terminated", "truncated")
    return distance, False


@pytest.mark.parametrize(("task", "seed"), [(POKE, 3), (PULL, 0)])
def test_the_hand_alone_solves_it(envs, task, seed):
    """PushCube's and PullCube's own way, from a start within reach."""
    assert solve(envs[task], task, seed, 30)[1]


@pytest.mark.slow
@pytest.mark.parametrize(("task", "share"), [(POKE, 0.15), (PULL, 0.475)])
def test_how_often_the_hand_alone_solves_it(task, share):
    """Where it reaches behind the cube, pointing down; see docs/tasks.md."""
    env = ManiSkillEnv(task, reward_mode="sparse", fast_controller=True)
    outcomes = [solve(env, task, seed, 40) for seed in range(40)]
    near = [solved for distance, solved in outcomes if distance < 0.15]
    assert sum(near) / len(near) > 0.9
    assert sum(solved for _, solved in outcomes) / 40 == pytest.approx(share, abs=0.1)
    env.close()


if __name__ == "__main__":
    pytest.main([__file__])
