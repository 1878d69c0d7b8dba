# Copyright (c) the torchrl_rpd authors.
#
# This source code is licensed under the MIT license found in the
# LICENSE file in the root directory of this source tree.
"""What the sections of the speed page are made of; nothing here is timed."""

from __future__ import annotations

import pytest
import torch

from benchmarks.speed._clock import Clock
from benchmarks.speed._noise import NoiseEnv
from benchmarks.speed._runs import World
from benchmarks.speed._section import Section, markdown
from benchmarks.speed._turns import Row
from benchmarks.speed.growth import verdict
from benchmarks.speed.teacher import EPOCHS, Case, Run, expected
from torchrl_rpd.students import mlp_actor_critic
from torchrl_rpd.teachers import ScriptedTeacher

CPU = torch.device("cpu")


class Thing:
    """Its methods take the seconds that they move the time on."""

    def __init__(self):
        self.time = 0.0

    def outer(self):
        self.time += 1
        self.inner()
        self.time += 2

    def inner(self):
        self.time += 4


def test_each_second_belongs_to_the_innermost_part():
    thing = Thing()
    clock = Clock(lambda: thing.time)
    clock.watch(thing, "outer", "outer")
    clock.watch(thing, "inner", "inner")
    with clock.part("rest"):
        thing.outer()
        thing.time += 8
        thing.inner()
    assert clock.take() == {"rest": 8, "outer": 3, "inner": 8}
    assert clock.take() == {}


def test_a_part_ends_with_an_error_and_everything_is_put_back():
    clock = Clock(lambda: 0.0)
    before = Thing.inner
    thing = Thing()
    clock.watch(Thing, "inner", "class")
    clock.watch(thing, "outer", "instance")
    thing.outer()
    assert Thing.inner is not before
    with pytest.raises(ValueError, match="no"), clock.part("a"):
        raise ValueError("no")
    assert clock._open == []
    clock.leave()
    assert Thing.inner is before
    assert "outer" not in vars(thing)


def test_what_is_no_longer_linear_is_named():
    assert verdict({1: 4.0, 2: 4.9, 4: 3.8}) == "linear"  # +22.5 %, -22.4 %
    assert verdict({1: 8.0, 2: 4.0, 4: 4.0}) == "1 to 2: -50 %; linear from 2 on"
    assert verdict({1: 4.0, 2: 4.0, 4: 6.0}) == "linear up to 2; 2 to 4: +50 %"


def test_the_curve_begins_and_ends_where_it_is_said_to():
    assert expected(0.0, 8.0) == 1.0
    assert expected(1.0, 8.0) == 4.5  # (1 + 8) / 2
    assert expected(1e9, 8.0) == pytest.approx(8.0)


def test_a_row_without_a_bar_is_neither_met_nor_missed():
    assert Row("a", [1.0, 3.0, 2.0]).cells == ["a", "2.00 [1.00, 3.00]", "", "", ""]


def test_a_section_is_kept_and_written():
    section = Section([["x", "1"]], columns=("what", "us"), text="Said.")
    found = {**section.stored(), "machine": "m", "picture": ["a", "b.png"]}
    assert markdown(found) == [
        "| what | us |",
        "| --- | --- |",
        "| x | 1 |",
        "",
        "Said.",
        "",
        "![a](b.png)",
        "",
        "m.",
        "",
    ]
    old = markdown({"rows": [["a", "1.00", "", "", ""]], "machine": "m"})
    assert old[0] == "|  | ratio | bar |  |  |"


@pytest.fixture(scope="module")
def case():
    worlds = tuple(
        World("noise", NoiseEnv(2, (35,)), lambda: mlp_actor_critic(35, 7))
        for _ in range(2)
    )
    return Case("scripted", ScriptedTeacher("PushCube-v1"), worlds, 16, 4)


def test_both_ways_are_the_same_run(case):
    """Asked once or in every minibatch: the student learns the same."""
    runs = [Run(case, again=again, target_kl=None, device=CPU) for again in (0, 1)]
    for run in runs:
        for _ in range(2):
            run.iterate()
    once, again = runs
    assert once.figures("queries") == [1.0]
    assert again.figures("queries") == [EPOCHS]
    assert once.figures("steps") == again.figures("steps") == [4 * EPOCHS]
    weights = [dict(run.trainer.loss_module.named_parameters()) for run in runs]
    for name, weight in weights[0].items():
        torch.testing.assert_close(weight, weights[1][name], rtol=1e-4, atol=1e-6)


def test_a_minibatch_over_the_target_is_not_asked_about(case):
    # The first minibatch has the policy that acted; after its step all are over.
    run = Run(case, again=True, target_kl=1e-7, device=CPU)
    run.iterate()
    assert run.asked[0]["queries"] == 4 / 16
    assert run.asked[0]["steps"] == 1


if __name__ == "__main__":
    pytest.main([__file__])
