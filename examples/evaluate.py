# Copyright (c) the torchrl_rpd authors.
#
# This source code is licensed under the MIT license found in the
# LICENSE file in the root directory of this source tree.
"""Evaluates a saved student, or a teacher, on fresh episodes; films some of them.

    python examples/evaluate.py runs/demo --episodes 200 --seeds 3000000
    python examples/evaluate.py runs/pick --sheet sheet.png --videos videos
    python examples/evaluate.py runs/pick --teacher            # the teacher of that run
    python examples/evaluate.py --teacher task=push_cube flaw=none
    python examples/evaluate.py --teacher task=push_cube teacher=octo teacher.device=cpu

The environment is that of the run's config.yaml; without one, what the student's file
says of it. Words such as ``env.camera=human_moved`` change the configuration; a teacher
without a run is put together by the words of ``examples/conf``, as examples/rpd.py does.
"""

from __future__ import annotations

import argparse
import importlib.util
import sys
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from tensordict import TensorDictBase
from torchrl.envs import EnvBase, Transform, TransformedEnv

from torchrl_rpd import set_learner_threads
from torchrl_rpd.envs import ManiSkillEnv
from torchrl_rpd.evaluation import evaluate
from torchrl_rpd.students import ActorCritic

if TYPE_CHECKING:
    from omegaconf import DictConfig
    from PIL.Image import Image

CONF = Path(__file__).parent / "conf"
FPS = 20  # ManiSkill's control frequency: films run in real time


# What is evaluated, and where.


def saved_config(folder: Path, words: list[str]) -> DictConfig | None:
    """The configuration that examples/rpd.py has written, changed by the words."""
    if not (folder / "config.yaml").exists():
        return None
    from omegaconf import OmegaConf

    cfg = OmegaConf.load(folder / "config.yaml")
    # ManiSkill's own controller, also where the student was trained with the fast one.
    cfg.env.fast_controller = False
    OmegaConf.set_struct(cfg, True)  # a misspelt word is an error
    cfg.merge_with_dotlist(words)
    return cfg


def composed_config(words: list[str]) -> DictConfig:
    """The configuration that examples/rpd.py would run with these words."""
    from hydra import compose, initialize_config_dir

    with initialize_config_dir(str(CONF.resolve()), version_base="1.3"):
        return compose("config", overrides=["env.fast_controller=false", *words])


def env_of_config(cfg: DictConfig) -> Callable[..., EnvBase]:
    """A function of ``num_envs`` (and ``from_pixels``) that builds the run's env."""
    from hydra.utils import instantiate

    overrides = dict(cfg.evaluation.get("env_overrides") or {})
    overrides |= {"num_workers": 1}

    def build(**kwargs: Any) -> EnvBase:
        return instantiate(cfg.env, **{**overrides, **kwargs}, _partial_=False)

    return build


def env_of_student(student: ActorCritic) -> Callable[..., EnvBase]:
    """The same for a student without a configuration: what its file says."""
    if "task" not in student.metadata:
        raise ValueError(
            "The student's file names no task, and there is no config.yaml beside it: "
            "save students with student.save(..., task=..., reward=...)."
        )
    kwargs: dict[str, Any] = {
        "reward_mode": student.metadata.get("reward", "normalized_dense")
    }
    if student.builder == "cnn_actor_critic":
        # Which camera it saw is not in the file: the paper's.
        state = "" if student.config["state_dim"] is None else "+state"
        size = student.config["image_size"]
        size = size if isinstance(size, int) else tuple(size)
        kwargs |= {"obs_mode": f"rgb{state}", "camera": "human", "image_size": size}

    def build(**more: Any) -> EnvBase:
        return ManiSkillEnv(student.metadata["task"], **{**kwargs, **more})

    return build


def teacher_of_config(cfg: DictConfig) -> Callable[[TensorDictBase], Any]:
    """The teacher, acting as its labels say: with ``teacher_action.action_transform``."""
    from hydra.utils import instantiate

    teacher = instantiate(cfg.teacher)
    transform = instantiate(cfg.teacher_action.action_transform)
    if transform is None:
        return teacher

    def act(td: TensorDictBase) -> torch.Tensor:
        out = teacher(td)
        if not isinstance(out, torch.Tensor):
            out = out["vla_action", "chunk"][..., 0, :]
        return transform(out)

    return act


# Films.


@dataclass
class Film:
    """One episode: a picture ``[H, W, 3]`` uint8 and a success flag per observation."""

    frames: list[torch.Tensor]
    success: list[bool]
    seed: int | None = None

    @property
    def succeeded(self) -> bool:
        """Success at any step, as ``success_once``."""
        return any(self.success)

    @property
    def title(self) -> str:
        """Its seed and how it went."""
        seed = "" if self.seed is None else f"episode {self.seed}: "
        word = "success" if self.succeeded else "no success"
        return f"{seed}{word}, {len(self.frames) - 1} steps"


class Camera(Transform):
    """Keeps the ``pixels`` of the first episode of each environment, its end included."""

    def __init__(self) -> None:
        super().__init__()
        self.films: list[Film] = []
        self._over: list[bool] = []

    def _reset(
        self, tensordict: TensorDictBase, tensordict_reset: TensorDictBase
    ) -> TensorDictBase:
        if not self.films:
            pixels = tensordict_reset["pixels"].flatten(0, -4).cpu()
            self.films = [Film([p.clone()], [False]) for p in pixels]
            self._over = [False] * len(self.films)
        return tensordict_reset

    def _step(
        self, tensordict: TensorDictBase, next_tensordict: TensorDictBase
    ) -> TensorDictBase:
        rows = zip(
            next_tensordict["pixels"].flatten(0, -4).cpu(),
            next_tensordict["success"].flatten().tolist(),
            next_tensordict["done"].flatten().tolist(),
            strict=True,
        )
        for i, (pixels, success, done) in enumerate(rows):
            if not self._over[i]:
                self.films[i].frames.append(pixels.clone())
                self.films[i].success.append(success)
                self._over[i] = done
        return next_tensordict


def film(
    env: EnvBase, policy: Callable[[TensorDictBase], Any], seeds: int
) -> list[Film]:
    """One whole episode of each environment, played by the protocol."""
    camera = Camera()
    result = evaluate(
        TransformedEnv(env, camera),
        policy,
        episodes=max(1, env.batch_size.numel()),
        seeds=seeds,
    )
    numbers = result.episodes.get("episode_seed")
    if numbers is not None:
        for i, seed in zip(result.episodes["env"], numbers, strict=True):
            camera.films[int(i)].seed = int(seed)
    return camera.films


def contact_sheet(films: list[Film], *, columns: int = 8, side: int = 128) -> Image:
    """One row per episode, from its first to its last picture.

    The bar under a row is green where the episode succeeded, red where it did not; so
    is the frame of a picture in which success was reported.
    """
    from PIL import Image, ImageDraw, ImageFont

    gap, text = 4, 20
    height = text + side + 2 * gap
    sheet = Image.new(
        "RGB", (columns * (side + gap) + gap, height * len(films)), "white"
    )
    draw = ImageDraw.Draw(sheet)
    for row, shown in enumerate(films):
        top = row * height
        colour = "green" if shown.succeeded else "firebrick"
        font = ImageFont.load_default(13)
        draw.text((gap, top + 2), shown.title, fill=colour, font=font)
        last = len(shown.frames) - 1
        count = min(columns, last + 1)
        # Evenly spaced, first and last included.
        steps = [round(i * last / max(1, count - 1)) for i in range(count)]
        for column, step in enumerate(steps):
            left = gap + column * (side + gap)
            picture = Image.fromarray(shown.frames[step].numpy()).resize((side, side))
            if shown.success[step]:
                box = (left - 3, top + text - 3, left + side + 2, top + text + side + 2)
                draw.rectangle(box, fill="limegreen")
            sheet.paste(picture, (left, top + text))
            draw.text((left + 3, top + text + 2), str(step), fill="white", font=font)
        bar = (gap, top + height - 4, sheet.width - gap, top + height - 2)
        draw.rectangle(bar, fill=colour)
    return sheet


def write_videos(films: list[Film], folder: Path) -> list[Path]:
    """One mp4 per episode, named after its seed and how it went."""
    import imageio.v2 as imageio

    folder.mkdir(parents=True, exist_ok=True)
    files = []
    for i, shown in enumerate(films):
        name = i if shown.seed is None else shown.seed
        word = "success" if shown.succeeded else "failure"
        files.append(folder / f"episode-{name}-{word}.mp4")
        imageio.mimwrite(files[-1], [f.numpy() for f in shown.frames], fps=FPS)
    return files


def missing_writer(videos: bool, sheet: bool) -> str | None:
    """What has to be installed first, in one sentence."""
    if videos and not all(map(importlib.util.find_spec, ("imageio", "imageio_ffmpeg"))):
        return "--videos needs a writer of mp4 files: pip install 'imageio[ffmpeg]'."
    if sheet and importlib.util.find_spec("PIL") is None:
        return "--sheet needs Pillow: pip install pillow."
    return None


def main(argv: list[str] | None = None) -> None:
    """Loads, plays, prints; draws if it is told to."""
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument(
        "what",
        nargs="*",
        help="a student's file or the folder that holds it (a run), then words of the "
        "configuration",
    )
    parser.add_argument(
        "--teacher", action="store_true", help="evaluate the teacher, not the student"
    )
    parser.add_argument("--episodes", type=int, default=200)
    parser.add_argument("--seeds", type=int, default=3_000_000)
    parser.add_argument("--envs", type=int, default=16)
    parser.add_argument("--sheet", type=Path, help="PNG file for a sheet of pictures")
    parser.add_argument("--videos", type=Path, help="folder for a film per episode")
    parser.add_argument(
        "--filmed", type=int, default=6, help="how many episodes of sheet and videos"
    )
    args = parser.parse_intermixed_args(argv)
    words = [word for word in args.what if "=" in word]
    paths = [Path(word) for word in args.what if "=" not in word]
    if len(paths) > 1:
        parser.error(f"One run at a time, got {', '.join(map(str, paths))}.")
    if not paths and not args.teacher:
        parser.error("Name a student's file or folder, or say --teacher.")
    if sentence := missing_writer(args.videos is not None, args.sheet is not None):
        parser.error(sentence)
    path = paths[0] if paths else None
    if path is not None and not path.exists():
        parser.error(f"{path} does not exist; `make demo` writes one.")
    folder = path if path is None or path.is_dir() else path.parent
    try:
        cfg = composed_config(words) if folder is None else saved_config(folder, words)
    except Exception as error:  # Hydra's and OmegaConf's, of many classes
        parser.error(str(error).split("\n")[0])
    if cfg is None and (words or args.teacher):
        parser.error(
            f"{folder} has no config.yaml to change or to take a teacher from. Leave the "
            "folder out: --teacher task=pick_cube ..."
        )

    set_learner_threads()
    if args.teacher:
        if cfg.algo == "ppo":
            parser.error("algo=ppo has no teacher.")
        subject = f"{cfg.labels} (teacher)"
        policy, build = teacher_of_config(cfg), env_of_config(cfg)
        task = cfg.env.task_id
    else:
        file = path / "student.safetensors" if path.is_dir() else path
        if not file.exists():
            parser.error(f"{file} does not exist; `make demo` writes one.")
        student = ActorCritic.load(file)
        subject, policy = str(file), student.actor
        build = env_of_student(student) if cfg is None else env_of_config(cfg)
        task = student.metadata.get("task") if cfg is None else cfg.env.task_id

    env = build(num_envs=args.envs)
    result = evaluate(env, policy, episodes=args.episodes, seeds=args.seeds)
    env.close()
    print(f"{subject} on {task}, {args.episodes} episodes, seeds from {args.seeds}")
    for name in ("success_once", "success_at_end", "episode_return", "length"):
        print(f"  {name:<15} {getattr(result, name)}")

    if args.sheet is None and args.videos is None:
        return
    env = build(num_envs=args.filmed, from_pixels=True)
    films = film(env, policy, args.seeds)
    env.close()
    if args.sheet is not None:
        args.sheet.parent.mkdir(parents=True, exist_ok=True)
        contact_sheet(films).save(args.sheet)
        print(f"wrote {args.sheet}")
    if args.videos is not None:
        files = write_videos(films, args.videos)
        print(f"wrote {len(files)} films to {args.videos}")


if __name__ == "__main__":
    main(sys.argv[1:])
