# Copyright (c) the torchrl_rpd authors.
#
# This source code is licensed under the MIT license found in the
# LICENSE file in the root directory of this source tree.
"""The robot drawn as its collision shapes: same physics, and nobody else's robot."""

from __future__ import annotations

import importlib
import xml.etree.ElementTree as ET

import pytest
import torch

from torchrl_rpd.envs import ManiSkillEnv
from torchrl_rpd.envs._light_visuals import write_light_urdf

URDF = """
<robot name="r">
  <link name="base">
    <inertial><mass value="1"/></inertial>
    <visual><geometry><mesh filename="meshes/fine.glb"/></geometry></visual>
    <collision>
      <origin xyz="1 2 3"/><geometry><mesh filename="package://r/coarse.stl"/></geometry>
    </collision>
    <collision><geometry><box size="1 1 1"/></geometry></collision>
  </link>
  <link name="lens">
    <visual><geometry><mesh filename="meshes/lens.glb"/></geometry></visual>
  </link>
  <link name="frame"/>
</robot>
"""


class TestDescription:
    @pytest.fixture
    def links(self, tmp_path):
        folder = tmp_path / "r"
        (folder / "meshes").mkdir(parents=True)
        for name in ("meshes/fine.glb", "meshes/lens.glb", "coarse.stl"):
            (folder / name).touch()
        (folder / "robot.urdf").write_text(URDF)
        (folder / "robot.srdf").write_text("<robot/>")
        out = tmp_path / "out"
        out.mkdir()
        light = write_light_urdf(folder / "robot.urdf", out)
        # Which links may touch is told by the file of the same name.
        assert light.with_suffix(".srdf").read_text() == "<robot/>"
        self.folder = folder
        return {link.get("name"): link for link in ET.parse(light).iter("link")}

    def test_looks_are_the_collision_shapes(self, links):
        base = links["base"]
        shapes = [
            [ET.tostring(part).strip() for part in base.findall(kind)]
            for kind in ("visual", "collision")
        ]
        assert len(shapes[0]) == 2
        assert [s.replace(b"visual", b"collision") for s in shapes[0]] == shapes[1]
        assert base.find("visual/origin").get("xyz") == "1 2 3"
        assert base.find("inertial/mass").get("value") == "1"

    def test_paths_are_absolute(self, links):
        mesh = links["base"].find("visual/geometry/mesh")
        assert mesh.get("filename") == str(self.folder / "coarse.stl")

    def test_links_without_collision_shapes_keep_their_looks(self, links):
        mesh = links["lens"].find("visual/geometry/mesh")
        assert mesh.get("filename") == str(self.folder / "meshes/lens.glb")
        assert links["lens"].find("collision") is None
        assert len(links["frame"]) == 0


def visual_meshes(env) -> set[str]:
    """The files that the robot's looks were loaded from."""
    return {
        shape.filename.rsplit("/", 1)[-1]
        for link in env._env[0].agent.robot.links
        for component in link._objs[0].entity.components
        if "RenderBody" in type(component).__name__
        for shape in component.render_shapes
        if "Mesh" in type(shape).__name__
    }


@pytest.mark.maniskill
class TestRobot:
    def test_same_physics(self):
        """50 random steps, bit for bit."""
        actions = torch.rand(50, 1, 7) * 2 - 1
        states = []
        for light in (False, True):
            env = ManiSkillEnv("PushCube-v1", light_visuals=light)
            env.set_seed(0)
            td = env.reset()
            frames = [td["observation"]]
            for action in actions:
                td = env.step(td.set("action", action))["next"]
                frames.append(td["observation"])
            states.append(torch.cat(frames))
        assert torch.equal(*states)

    def test_nothing_leaks(self):
        agents = importlib.import_module("mani_skill.agents.robots")
        registered = importlib.import_module(
            "mani_skill.agents.registration"
        ).REGISTERED_AGENTS
        tasks = importlib.import_module("mani_skill.utils.registration").REGISTERED_ENVS
        before = (
            dict(vars(agents.Panda)),
            {uid: spec.agent_cls for uid, spec in registered.items()},
            {uid: spec.cls for uid, spec in tasks.items()},
        )
        light = ManiSkillEnv("PushCube-v1", light_visuals=True)
        stock = ManiSkillEnv("PushCube-v1")
        assert before == (
            dict(vars(agents.Panda)),
            {uid: spec.agent_cls for uid, spec in registered.items()},
            {uid: spec.cls for uid, spec in tasks.items()},
        )
        assert type(stock._env[0].agent) is agents.Panda
        assert isinstance(light._env[0].agent, agents.Panda)
        assert light._env[0].robot_uids == "panda"
        # Controllers that read the robot's description find one that exists.
        assert light._env[0].agent.urdf_path == agents.Panda.urdf_path
        assert type(light._env[0]).__name__ == type(stock._env[0]).__name__

    def test_with_the_fast_controller(self):
        env = ManiSkillEnv("PickCube-v1", light_visuals=True, fast_controller=True)
        assert env.rollout(2)["observation"].isfinite().all()

    def test_robot_without_urdf(self):
        from torchrl_rpd.envs._light_visuals import light_agent

        class Cart:
            urdf_path = None

        with pytest.raises(ValueError, match=r"Cart is not: use light_visuals=False"):
            light_agent(Cart)


@pytest.mark.maniskill
@pytest.mark.render
@pytest.mark.usefixtures("renderer")
def test_both_looks_in_one_process():
    """The light robot is drawn from collision meshes, also after a rebuild; the stock
    robot's picture is the same before and after."""
    kwargs = {"obs_mode": "rgb", "camera": "human", "image_size": 32}
    stock = ManiSkillEnv("PushCube-v1", **kwargs)
    light = ManiSkillEnv("PushCube-v1", light_visuals=True, **kwargs)
    again = ManiSkillEnv("PushCube-v1", **kwargs)
    pictures = []
    for env in (stock, light, again):
        env.set_seed(0)
        pictures.append(env.reset()["observation", "image"].int())
    assert torch.equal(pictures[0], pictures[2])
    different = (pictures[0] - pictures[1]).abs().amax(1) > 8
    # The robot, and nothing else: table, cube and goal fill most of the picture.
    assert 0.005 < different.float().mean() < 0.3
    assert visual_meshes(stock) == visual_meshes(again)
    assert all(name.endswith(".glb") for name in visual_meshes(stock))
    assert all(name.endswith(".stl") for name in visual_meshes(light))
    light._env[0].reset(seed=1, options={"reconfigure": True})
    assert all(name.endswith(".stl") for name in visual_meshes(light))


if __name__ == "__main__":
    pytest.main([__file__])
