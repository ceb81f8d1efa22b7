"""What counts for the volume: factors, equal steps and outputs of given inputs, against the Jacobian's determinant."""

from collections.abc import Mapping, Sequence

import numpy as np
import pytest

from sedd_graph.graph.model import Region
from sedd_graph.inverse import Forward, Linear
from sedd_graph.inverse.format import explain
from tests.inverse.solved import inverted, refused
from tests.inverse.toys import region


def rotations(count: int) -> Region:
    """``count`` / 6 rotations of two streams by an angle of 0.5."""
    cos, sin = f"scale:{np.cos(0.5)}", f"scale:{np.sin(0.5)}"
    nodes: dict[str, tuple[str, list[str]]] = {}
    a, b = "a", "b"
    for i in range(count // 6):
        nodes |= {f"p{i}": (cos, [a]), f"q{i}": (sin, [b]), f"r{i}": (sin, [a]), f"t{i}": (cos, [b])}
        nodes |= {f"u{i}": ("sub", [f"p{i}", f"q{i}"]), f"v{i}": ("add", [f"r{i}", f"t{i}"])}
        a, b = f"u{i}", f"v{i}"
    return region(["a", "b"], nodes, [a, b])


@pytest.mark.parametrize(
    "nodes",
    [
        {"s": ("scale:2", ["a"]), "t": ("scale:0.5", ["b"])},
        {"p": ("add", ["a", "b"]), "q": ("sub", ["a", "b"]), "s": ("mean", ["p", "p"]), "t": ("scale:0.5", ["q"])},
    ],
)
def test_factors_count_together(nodes: dict[str, tuple[str, list[str]]]) -> None:
    inverted(region(["a", "b"], nodes, ["s", "t"]), (), "volume_preserving")


def test_rotations_preserve_volume_to_rounding() -> None:
    program = inverted(rotations(60), (), "volume_preserving")
    assert "log|det| = 0" in explain(program)
    assert all(len(d.targets) == 2 for d in program.derivations)


def test_equal_steps_are_one() -> None:
    nodes = {
        "first": ("split", ["x"]),
        "again": ("split", ["x"]),
        "third": ("split", ["x"]),
        "f": ("fun", ["first.x0"]),
        "y": ("add", ["again.x1", "f"]),
    }
    inverted(region(["x"], nodes, ["y", "third.x0"]), (), "volume_preserving")


def test_equal_steps_with_weights_of_their_own_are_not_one() -> None:
    nodes = {"f": ("fun", ["x"]), "g": ("fun", ["x"]), "y": ("add", ["z", "f"]), "h": ("turn", ["x"])}
    inverted(region(["x", "z"], nodes, ["y", "h"]), (), "volume_preserving")
    refused(region(["x", "z"], {"f": ("fun", ["x"]), "g": ("fun", ["x"]), "y": ("add", ["z", "f"])}, ["y", "g"]))


def test_outputs_of_given_inputs_do_not_count() -> None:
    nodes = {"f": ("fun", ["c"]), "y": ("add", ["x", "f"]), "d": ("fun", ["c"])}
    inverted(region(["x", "c"], nodes, {"x": "y", "c": "c"}), ["c"], "volume_preserving")
    inverted(region(["x", "c"], nodes, {"x": "y", "c": "d"}), ["c"], "volume_preserving")


@pytest.mark.parametrize(
    "way",
    [
        {"p": ("affine", ["f", "c"])},
        {"p": ("scale:0.5", ["f"])},
        {"s": ("scale:2", ["f"]), "p": ("add", ["s", "e"])},
        {"p": ("wave", ["f"])},
        {"p": ("lip:0.5", ["f"]), "q": ("add", ["p", "f"])},
    ],
    ids=["rule", "scale", "relation", "iteration", "contraction"],
)
def test_outputs_of_given_inputs_do_not_change_volume(way: Mapping[str, tuple[str, Sequence[str]]]) -> None:
    """Before, the cheapest derivation read f from the output, and its factor was counted: a wrong log-determinant."""
    nodes = {"e": ("fun", ["c"]), "f": ("fun", ["e"]), "y": ("add", ["x", "f"]), **way}
    program = inverted(region(["x", "c"], nodes, {"x": "y", "c": [*way][-1]}), ["c"], "volume_preserving")
    assert [type(d) for d in program.derivations] == [Forward, Forward, Linear]


def test_outputs_that_are_one_value_are_no_bijection() -> None:
    program = inverted(region(["x"], {"y": ("turn", ["x"])}, {"a": "y", "b": "y"}))
    assert program.note == "the outputs 'a' and 'b' are one value"


def test_integers_have_no_volume() -> None:
    outer = region(["x", "k"], {"y": ("turn", ["x"]), "n": ("count", ["k"])}, ["y", "n"], integers=["k"])
    inverted(outer, (), "volume_preserving")
