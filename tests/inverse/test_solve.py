"""The hard cases, each verified by a round trip in numpy and, where there is one, by the Jacobian's determinant."""

import dataclasses
from fractions import Fraction

import numpy as np
import pytest

from sedd_graph.errors import EnvironmentFault, UserError
from sedd_graph.graph.model import Ref, Region
from sedd_graph.inverse import Contraction, Forward, Linear, Program, Refusal, Solve, solve
from sedd_graph.inverse.format import diagnosis, explain
from sedd_graph.inverse.linear import determinant
from tests.inverse import toys
from tests.inverse.solved import inverted, random_inputs, refused
from tests.inverse.toys import chain, region

FEISTEL = region(
    ["x1", "x2", "c"],
    {"f": ("fun2", ["x2", "c"]), "y1": ("add", ["x1", "f"]), "g": ("fun2", ["y1", "c"]), "y2": ("add", ["x2", "g"])},
    {"x1": "y1", "x2": "y2"},
    label="feistel",
)
SUM = region(["a", "b"], {"s": ("add", ["a", "b"]), "d": ("sub", ["a", "b"])}, ["s", "d"])


# -- accepted -------------------------------------------------------------------------------------------------------


def test_two_streams() -> None:
    program = inverted(FEISTEL, ["c"], "volume_preserving")
    assert [type(d) for d in program.derivations] == [Forward, Linear, Forward, Linear]
    assert [str(t) for d in program.derivations for t in d.targets] == ["g.out", "x2", "f.out", "x1"]
    assert program.cost == 2


@pytest.mark.parametrize("streams", [3, 4])
def test_feistel_with_more_streams(streams: int) -> None:
    """Each round adds to one stream a function of all the others."""
    nodes, current = {}, [f"x{i}" for i in range(streams)]
    for turn in range(2 * streams):
        at = turn % streams
        others = current[:at] + current[at + 1 :]
        nodes[f"s{turn}"] = ("add", others)
        nodes[f"p{turn}"] = ("fun2", others[:2])
        nodes[f"f{turn}"] = ("fun2", [f"s{turn}", f"p{turn}"])
        nodes[f"y{turn}"] = ("add", [current[at], f"f{turn}"])
        current[at] = f"y{turn}"
    program = inverted(region([f"x{i}" for i in range(streams)], nodes, current), (), "volume_preserving")
    assert sum(isinstance(d, Linear) and d.targets[0].port != "out" for d in program.derivations) == streams


def test_sum_and_difference() -> None:
    program = inverted(SUM, (), "bijective")
    assert len(program.derivations) == 1
    (both,) = program.derivations
    assert isinstance(both, Linear)
    assert both.factor == 2
    assert program.note == "the linear system that gives a and b changes volume 2-fold per number"


def test_a_system_that_gives_one_value_before_the_other() -> None:
    """r1 - r2 gives b; a only follows once p is known, from what is left of the two relations."""
    outer = region(
        ["a", "b", "p"],
        {
            "r1": ("add", ["a", "b", "p"]),
            "d": ("sub", ["a", "b"]),
            "r2": ("add", ["d", "p"]),
            "f": ("fun", ["b"]),
            "q": ("add", ["p", "f"]),
        },
        ["r1", "r2", "q"],
    )
    program = inverted(outer, (), "bijective")
    factors = [d.factor for d in program.derivations if isinstance(d, Linear)]
    assert np.prod([float(f) for f in factors]) == 2


def test_the_factor_of_a_larger_system() -> None:
    outer = region(
        ["a", "b", "c"],
        {
            "u": ("add", ["a", "a", "b"]),
            "v": ("mean", ["b", "c"]),
            "t": ("scale:-3", ["c"]),
            "w": ("add", ["a", "t"]),
        },
        ["u", "v", "w"],
    )
    inverted(outer, (), "bijective")


def test_coefficients_that_cancel_leave_nothing() -> None:
    outer = region(["a", "b"], {"n": ("scale:-1", ["a"]), "y": ("add", ["a", "b", "n"])}, ["y"])
    assert [lost.input for lost in refused(outer).lost] == ["a"]


def test_rules_of_components() -> None:
    outer = region(
        ["x", "y", "c"],
        {
            "turn": ("turn", ["x"]),
            "affine": ("affine", ["turn", "c"]),
            "both": ("both", ["affine", "y"]),
            "wave": ("wave", ["both.v"]),
        },
        ["both.u", "wave"],
    )
    program = inverted(outer, ["c"], "bijective")
    solved = [d for d in program.derivations if isinstance(d, Solve)]
    assert [d.path for d in solved] == ["wave", "both", "affine", "turn"]
    assert solved[2].given == (Ref("both", "x"), Ref("", "c")) or solved[2].given[1] == Ref("", "c")
    assert program.note == "op 'wave' (wave) changes volume"


def test_a_closed_form_is_taken_before_an_iteration_and_the_cheaper_of_two() -> None:
    """``x`` could be derived from ``wave`` by iterating, or from ``y`` by a subtraction."""
    outer = region(["x"], {"wave": ("wave", ["x"]), "f": ("fun", ["wave"]), "y": ("add", ["x", "f"])}, ["wave", "y"])
    program = inverted(outer)
    assert [type(d) for d in program.derivations] == [Forward, Linear]
    assert program.note == "the outputs hold 8 numbers and the inputs 4"


def test_conditioning_that_the_region_computes_from_what_is_known() -> None:
    nodes = {"c": ("fun", ["k"]), "f": ("fun2", ["x2", "c"]), "y1": ("add", ["x1", "f"])}
    nodes |= {"g": ("fun2", ["y1", "c"]), "y2": ("add", ["x2", "g"])}
    outer = region(["x1", "x2", "k"], nodes, ["y1", "y2"])
    program = inverted(outer, ["k"], "volume_preserving")
    assert program.derivations[0].targets == (Ref("c", "out"),)


def test_conditioning_that_is_known_only_after_an_input_is() -> None:
    """c is computed from x2, which is recovered without it."""
    nodes = {"c": ("fun", ["x2"]), "y1": ("affine", ["x1", "c"]), "y2": ("turn", ["x2"])}
    inverted(region(["x1", "x2"], nodes, ["y1", "y2"]), (), "bijective")


def test_conditioning_computed_from_what_it_would_be_needed_for() -> None:
    nodes = {"c": ("fun", ["x1"]), "f": ("fun2", ["x2", "c"]), "y1": ("add", ["x1", "f"])}
    nodes |= {"g": ("fun2", ["y1", "c"]), "y2": ("add", ["x2", "g"])}
    refusal = refused(region(["x1", "x2"], nodes, ["y1", "y2"]))
    reasons = [b.reason for b in refusal.blockers]
    assert reasons == [
        "y1 is one equation for 2 unknowns: x1 and f (which needs x2 and c, computed here from x1); they depend on x1 and "
        "x2, which are independent",
        "y2 is one equation for 2 unknowns: x2 and g (which needs c, computed here from x1); they depend on x1 and x2, "
        "which are independent",
    ]


def test_an_output_that_is_an_input() -> None:
    outer = region(["x1", "x2"], {"f": ("fun", ["x2"]), "y": ("add", ["x1", "f"])}, {"x1": "y", "x2": "x2"})
    inverted(outer, (), "volume_preserving")


def test_a_value_used_many_times() -> None:
    """A large fan-out, and one value in several ports of one component."""
    nodes = {f"f{i}": ("fun2", ["x2", "x2"]) for i in range(20)}
    nodes["y1"] = ("add", ["x1", "x1", *(f"f{i}" for i in range(20))])
    nodes["y2"] = ("affine", ["x2", "y1"])
    program = inverted(region(["x1", "x2"], nodes, ["y1", "y2"]), (), "bijective")
    assert len(program.derivations) == 22


def test_split_and_concat() -> None:
    nodes = {
        "parts": ("split", ["x"]),
        "f": ("fun", ["parts.x1"]),
        "y0": ("add", ["parts.x0", "f"]),
        "y1": ("turn", ["parts.x1"]),
        "y": ("concat", ["y0", "y1"]),
    }
    inverted(region(["x"], nodes, ["y"]), (), "volume_preserving")


def test_only_what_is_needed_is_in_the_program() -> None:
    nodes = {"f": ("fun", ["x2"]), "y1": ("add", ["x1", "f"]), "h": ("fun", ["y1"]), "z": ("add", ["h", "x2"])}
    program = inverted(region(["x1", "x2"], nodes, {"y1": "y1", "z": "z", "x2": "x2"}))
    assert "h" not in [d.path for d in program.derivations if isinstance(d, Forward)]


def test_only_sums_and_rearrangements_are_free(monkeypatch: pytest.MonkeyPatch) -> None:
    """A component of kind ``arithmetic`` that does neither counts as an evaluation."""
    heavy = dataclasses.replace(toys.CONTRACTS["fun"], kind="arithmetic")
    monkeypatch.setitem(toys.CONTRACTS, "fun", heavy)
    assert inverted(region(["x"], {"f": ("fun", ["x"]), "y": ("add", ["x", "f"])}, ["f", "y"])).cost == 0
    nodes = {"f": ("fun", ["x2"]), "y": ("add", ["x1", "f"])}
    outer = region(["x1", "x2"], nodes, {"x1": "y", "x2": "x2"})
    assert inverted(outer, (), "volume_preserving").cost == 1


@pytest.mark.parametrize("size", [1, 2, 5, 9])
def test_determinants_are_exact(size: int) -> None:
    for seed in range(20):
        dense = np.random.default_rng(seed).integers(-3, 4, (size, size)) * (np.random.default_rng(seed + 99).random((size, size)) < 0.6)  # fmt: skip
        rows = [{j: Fraction(int(v), 2) for j, v in enumerate(row) if v} for row in dense]
        assert determinant(rows) * 2**size == round(abs(np.linalg.det(dense)))


# -- contractions ---------------------------------------------------------------------------------------------------


def residual(bound: float, scale: float = 1.0) -> Region:
    nodes = {"s": (f"scale:{scale}", ["x"]), "f": (f"lip:{bound}", ["x"]), "y": ("add", ["s", "f"])}
    return region(["x"], nodes, ["y"])


def test_a_contraction_below_one() -> None:
    program = inverted(residual(0.99), (), "bijective")
    (d,) = program.derivations
    assert isinstance(d, Contraction)
    assert (d.bound, d.iterations, d.cost) == (0.99, 1375, 1375)
    assert d.scale == 1


def test_a_contraction_at_one_is_refused() -> None:
    refusal = refused(residual(1.0))
    assert refusal.blockers[0].reason == (
        "y is one equation for 2 unknowns: f (which needs x) and s (which needs x); all follow from x, but relative to it "
        "the other terms have a Lipschitz bound of 1, and a fixed-point iteration needs less than 1"
    )


def test_a_branch_of_a_constant_is_a_constant() -> None:
    """f(x - x) is a constant, though nothing bounds f."""
    nodes = {"zero": ("sub", ["x", "x"]), "f": ("fun", ["zero"]), "y": ("add", ["x", "f"])}
    program = inverted(region(["x"], nodes, ["y"]), (), "bijective")
    (d,) = [d for d in program.derivations if isinstance(d, Contraction)]
    assert (d.bound, d.iterations) == (0, 1)


def test_the_bound_is_relative_to_the_factor_of_the_unknown() -> None:
    program = inverted(residual(1.5, -2.0), (), "bijective")
    (d,) = program.derivations
    assert isinstance(d, Contraction)
    assert (d.bound, float(d.scale)) == (0.75, -2.0)


@pytest.mark.parametrize(("bound", "count"), [(0.5, 20), (0.7, 39), (0.9, 132), (0.97, 454)])
def test_iterations_are_those_of_the_golden_table(bound: float, count: int) -> None:
    (d,) = inverted(residual(bound), (), "bijective").derivations
    assert isinstance(d, Contraction)
    assert d.iterations == count


def test_bounds_are_composed_through_the_graph() -> None:
    """A composition multiplies, a sum adds, a factor scales, halves add up, a rotation keeps."""
    nodes = {
        "turn": ("turn", ["x"]),
        "a": ("lip:0.5", ["turn"]),
        "b": ("lip:0.8", ["a"]),
        "parts": ("split", ["x"]),
        "p": ("lip:0.2", ["parts.x0"]),
        "q": ("concat", ["p", "parts.x1"]),
        "r": ("scale:0.25", ["q"]),
        "m": ("mean", ["b", "r"]),
        "y": ("sub", ["x", "m"]),
    }
    (d,) = inverted(region(["x"], nodes, ["y"]), (), "bijective").derivations
    assert isinstance(d, Contraction)
    assert d.bound == pytest.approx((0.5 * 0.8 + 0.25 * 1.2) / 2)


def test_a_contraction_with_conditioning_within_and_a_chain_of_them() -> None:
    """What depends on conditioning alone is known, and needs no bound."""
    layer = region(
        ["x", "c"],
        {"k": ("fun", ["c"]), "h": ("add", ["x", "k"]), "f": ("lip:0.6", ["h"]), "y": ("add", ["x", "f"])},
        {"x": "y"},
        label="layer",
    )
    program = inverted(region(["x", "c"], {"trunk": (chain(layer, 5), ["x", "c"])}, ["trunk"]), ["c"], "bijective")
    assert [type(d) for d in program.derivations].count(Contraction) == 5
    assert isinstance(program.derivations[-1], Contraction)
    assert [str(ref) for ref in program.derivations[-1].targets] == ["x"]


def test_a_contraction_evaluates_whole_blocks() -> None:
    branch = region(["x", "c"], {"k": ("fun", ["c"]), "h": ("add", ["x", "k"]), "f": ("lip:0.6", ["h"])}, {"x": "f"})
    outer = region(["x", "c"], {"f": (branch, ["x", "c"]), "y": ("add", ["x", "f"])}, ["y"])
    (d,) = inverted(outer, ["c"], "bijective").derivations
    assert isinstance(d, Contraction)
    assert [part.path for part in d.body] == ["f", "y"]
    assert d.needs == (Ref("y", "out"), Ref("", "c"))


def test_no_bound_is_named() -> None:
    nodes = {"norm": ("fun", ["x"]), "f": ("lip:0.1", ["norm"]), "y": ("add", ["x", "f"])}
    refusal = refused(region(["x"], nodes, ["y"]))
    assert refusal.blockers[0].reason == (
        "y is one equation for 2 unknowns: x and f (which needs norm, computed here from x); all follow from x, but a "
        "fixed-point iteration need not converge: op 'fun' (norm, toy.yaml:1) has no Lipschitz bound"
    )
    assert refusal.rewrites[0].startswith("write the residual y = x + f(x) with two streams")


def test_an_unknown_that_is_no_term_of_its_sum() -> None:
    outer = region(["x"], {"f": ("lip:0.1", ["x"]), "g": ("lip:0.1", ["x"]), "y": ("add", ["f", "g"])}, ["y"])
    assert refused(outer).blockers[0].reason.endswith("all follow from x, which is not itself a term of the sum")


# -- refused --------------------------------------------------------------------------------------------------------


def test_crossed_streams() -> None:
    nodes = {"f": ("fun", ["x2"]), "g": ("fun", ["x1"]), "y1": ("add", ["x1", "f"]), "y2": ("add", ["x2", "g"])}
    refusal = refused(region(["x1", "x2"], nodes, ["y1", "y2"]), sizes={"batch": 1, "length": 1})
    assert [(lost.input, [str(r) for r in lost.through]) for lost in refusal.lost] == [
        ("x1", ["g.out"]),
        ("x2", ["f.out"]),
    ]
    assert [(b.path, b.op, b.place) for b in refusal.blockers] == [
        ("y1", "add", ("toy.yaml", 3, 1)),
        ("y2", "add", ("toy.yaml", 4, 1)),
    ]
    assert refusal.remedy.values == (Ref("", "x1"),)
    assert (refusal.remedy.total, refusal.remedy.lower) == (16, 16)
    assert refusal.rewrites[0] == (
        "compute the function in y1 = x1 + f(x2) from a value that is known once the other outputs are (such as the sum "
        "that x2 goes into) instead of x2"
    )


def test_lost_by_a_mean() -> None:
    refusal = refused(region(["x1", "x2"], {"y": ("mean", ["x1", "x2"])}, ["y"]))
    assert refusal.blockers[0].reason == (
        "y is one equation for 2 unknowns: x1 and x2; they depend on x1 and x2, which are independent"
    )
    assert refusal.rewrites == ("make x1 and x2 outputs too, or output a difference beside the sum y",)


def test_lost_by_slicing() -> None:
    """One part of a split is used by nothing."""
    refusal = refused(region(["x"], {"parts": ("split", ["x"]), "y": ("turn", ["parts.x0"])}, ["y"]))
    assert refusal.blockers[0].path == "parts"
    assert refusal.blockers[0].reason == (
        "op 'split' recovers 'x' only with its output 'x1', which nothing uses and which is no output of the block"
    )
    assert refusal.rewrites == ("make parts.x1 an output of the block too",)
    assert refusal.remedy.values == (Ref("parts", "x1"),)


def test_lost_by_a_component_that_drops() -> None:
    nodes = {"parts": ("split", ["x"]), "h": ("half", ["parts.x1"]), "y": ("turn", ["parts.x0"])}
    refusal = refused(region(["x"], nodes, ["y", "h"]))
    assert [b.path for b in refusal.blockers] == ["h"]
    assert refusal.blockers[0].reason == (
        "op 'half' has no inversion rule, and cannot have one: 2 numbers go in and 1 come out"
    )
    assert "keeps the size" in refusal.rewrites[0]


def test_lost_by_a_map_to_fewer_numbers() -> None:
    refusal = refused(region(["x"], {"y": ("half", ["x"])}, ["y"]))
    assert refusal.blockers[0].reason.endswith("cannot have one: 4 numbers go in and 2 come out")


def test_lost_by_a_factor_of_zero() -> None:
    refusal = refused(region(["x"], {"y": ("scale:0", ["x"])}, ["y"]))
    assert refusal.blockers[0].reason == "op 'scale' multiplies by 0: nothing is left of x"


def test_lost_by_an_input_that_reaches_no_output() -> None:
    refusal = refused(region(["x1", "x2"], {"a": ("turn", ["x1"]), "b": ("turn", ["x2"])}, ["a"]))
    assert [b.path for b in refusal.blockers] == ["b"]


def test_a_rule_that_lacks_its_conditioning() -> None:
    refusal = refused(region(["x", "k"], {"c": ("fun", ["k"]), "y": ("affine", ["x", "c"])}, ["y"]))
    assert refusal.blockers[0].reason == "op 'affine' recovers 'x' only with 'c' (c (which needs k))"


def test_what_is_stored_is_a_fact() -> None:
    nodes = {"f": ("fun", ["x"]), "y": ("add", ["x", "f"])}
    program = inverted(region(["x"], nodes, ["y"]), stored=[Ref("f", "out")])
    assert program.note == "values are stored beside the outputs"


# -- the cheapest to store ------------------------------------------------------------------------------------------


def test_the_cheapest_set_is_cheapest() -> None:
    """The first residual could store 8 numbers at its input, or 4 within: half of the wide value is known anyway."""
    nodes = {
        "parts": ("split", ["x"]),
        "h": ("half", ["parts.x1"]),
        "f": ("fun", ["h"]),
        "e": ("concat", ["f", "f"]),
        "y1": ("turn", ["parts.x0"]),
        "y2": ("add", ["parts.x1", "e"]),
    }
    refusal = refused(region({"x": 8}, nodes, ["y1", "y2"]))
    assert refusal.remedy.values in ((Ref("f", "out"),), (Ref("h", "out"),))
    assert (refusal.remedy.total, refusal.remedy.lower) == (8, 8)


def test_a_search_that_is_too_long_states_its_bound() -> None:
    nodes = {
        f"{k}{i}": (op, refs)
        for i in range(60)
        for k, op, refs in (("f", "fun", [f"x{i}"]), ("y", "add", [f"x{i}", f"f{i}"]))
    }
    outer = region([f"x{i}" for i in range(60)], nodes, [f"y{i}" for i in range(60)])
    refusal = solve(outer)
    assert isinstance(refusal, Refusal)
    assert refusal.remedy.total == 60 * 16
    assert 16 <= refusal.remedy.lower < refusal.remedy.total
    assert f"any set that suffices takes at least {refusal.remedy.lower}" in diagnosis(refusal)


# -- blocks ---------------------------------------------------------------------------------------------------------


def test_nested_blocks_and_repeats() -> None:
    branch = region(["x", "c"], {"h": ("fun2", ["x", "c"]), "o": ("fun", ["h"])}, {"x": "o"}, label="branch")
    layer = region(
        ["x1", "x2", "c"],
        {
            "f": (branch, ["x2", "c"]),
            "y1": ("add", ["x1", "f"]),
            "g": (branch, ["y1", "c"]),
            "y2": ("add", ["x2", "g"]),
        },
        {"x1": "y1", "x2": "y2"},
        label="layer",
    )
    outer = region(["x", "z", "c"], {"t": (chain(layer, 3), ["x", "z", "c"])}, {"a": "t.x1", "b": "t.x2"})
    program = inverted(outer, ["c"], "volume_preserving")
    assert [d.path for d in program.derivations if isinstance(d, Forward)] == [
        "t.2.g", "t.2.f", "t.1.g", "t.1.f", "t.0.g", "t.0.f",
    ]  # fmt: skip


def test_a_block_whose_outputs_are_needed_at_different_times_is_not_called_whole() -> None:
    """Its second output needs what is only known after its first has been used."""
    two = region(["a", "b"], {"p": ("fun", ["a"]), "q": ("fun", ["b"])}, ["p", "q"])
    nodes = {"t": (two, ["a", "b"]), "y": ("add", ["b", "t.p"]), "z": ("add", ["e", "t.q"])}
    program = inverted(region(["a", "b", "e"], nodes, {"a": "a", "y": "y", "z": "z"}), (), "volume_preserving")
    assert [d.path for d in program.derivations if isinstance(d, Forward)] == ["t.p", "t.q"]


def test_blocks_that_would_wait_for_each_other_are_opened() -> None:
    """Each of two blocks could be called whole, but not both: a1 -> b1 and b2 -> a2, the other way round than forward."""
    two = region(["i", "j"], {"p": ("fun", ["i"]), "q": ("fun", ["j"])}, ["p", "q"])
    # forward: B from (x, y); A from (u, v).  y1 = x + A.p ; y2 = v + B.q
    nodes = {
        "a": (two, ["u", "v"]),
        "x1": ("add", ["x", "a.p"]),
        "b": (two, ["x", "y"]),
        "v1": ("add", ["v", "b.q"]),
        "w": ("add", ["a.q", "b.p"]),
    }
    outer = region(["u", "v", "x", "y"], nodes, {"u": "u", "y": "y", "x1": "x1", "v1": "v1", "w": "w"})
    program = inverted(outer)
    assert {d.path for d in program.derivations if isinstance(d, Forward)} >= {"a.p", "b.q"}


def test_an_output_of_a_block_that_passes_its_input_on() -> None:
    inner = region(["x", "c"], {"f": ("affine", ["x", "c"])}, {"x": "f", "c": "c"})
    outer = region(["x", "c"], {"one": (inner, ["x", "c"]), "two": (inner, ["one.x", "one.c"])}, {"x": "two.x"})
    inverted(outer, ["c"], "bijective")


def test_a_thousand_layers() -> None:
    branch = region(["x", "c"], {"h": ("fun2", ["x", "c"]), "o": ("fun", ["h"])}, {"x": "o"}, label="branch")
    layer = region(
        ["x1", "x2", "c"],
        {
            "f": (branch, ["x2", "c"]),
            "y1": ("add", ["x1", "f"]),
            "g": (branch, ["y1", "c"]),
            "y2": ("add", ["x2", "g"]),
        },
        {"x1": "y1", "x2": "y2"},
        label="layer",
    )
    outer = region(["x1", "x2", "c"], {"t": (chain(layer, 1000), ["x1", "x2", "c"])}, {"a": "t.x1", "b": "t.x2"})
    program = solve(outer, given=["c"])
    assert isinstance(program, Program)
    assert len(program.derivations) == 4000
    assert program.level == "volume_preserving"
    assert program.cost == 4000


# -- inconsistent algebras -------------------------------------------------------------------------------------------


def test_names_that_are_not_there() -> None:
    with pytest.raises(UserError, match="'feistel' has no input 'cc' \\(did you mean 'c'\\?\\); inputs: x1, x2, c"):
        solve(FEISTEL, given=["cc"])
    with pytest.raises(UserError, match=r"'feistel' has no value f\.outt"):
        solve(FEISTEL, stored=[Ref("f", "outt")])


@pytest.mark.parametrize(
    ("algebra", "message"),
    [
        ("Algebra((Rule('z', ('out',), 'm'),))", "its rule 'm' gives 'z', which is no input; inputs: x"),
        ("Algebra((Rule('x', ('o',), 'm'),))", "its rule 'm' is given 'o', which is no port; ports: x, out"),
        ("Algebra((Rule('x', ('out', 'x'), 'm'),))", "its rule 'm' gives x and is given out, x"),
        ("Algebra((Rule('x', ('out',), 'm', cost=-1),))", "its rule 'm' costs -1: a cost is at least 0"),
        ("Algebra(linear={'out': {'z': Fraction(1)}})", "the linear relation of 'out' cannot use Fraction"),
        ("Algebra(linear={'out': {'x': 0.5}})", "the linear relation of 'out' cannot use 0.5 times 'x'"),
        ("Algebra(lipschitz={('x', 'out'): float('inf')})", "inf is no Lipschitz bound from 'x' to 'out'"),
        ("1 // 0", "its algebra cannot be read: ZeroDivisionError"),
    ],
)
def test_inconsistent_algebras(algebra: str, message: str, monkeypatch: pytest.MonkeyPatch) -> None:
    from sedd_graph.component.contract import Algebra, Rule

    names = {"Algebra": Algebra, "Rule": Rule, "Fraction": Fraction}
    made = dataclasses.replace(toys.CONTRACTS["fun"], algebra=lambda config, signature: eval(algebra, names))
    monkeypatch.setitem(toys.CONTRACTS, "fun", made)
    with pytest.raises(EnvironmentFault, match=message.replace("(", "\\(").replace(")", "\\)")):
        solve(region(["x"], {"y": ("fun", ["x"])}, ["y"]))


# -- what the random search and long systems found -----------------------------------------------------------------------


def test_a_known_value_stays_known_in_an_iteration_that_computes_it_again() -> None:
    """p.x1 is an output; the split that the iteration evaluates computes it from the iterate, which would not converge."""
    nodes = {
        "s": ("scale:0.3", ["x"]),
        "j": ("concat", ["c", "s"]),
        "p": ("split", ["j"]),
        "t": ("add", ["p.x0", "p.x1", "p.x1", "p.x1"]),
        "y": ("add", ["x", "t"]),
    }
    program = inverted(region(["x", "c"], nodes, ["p.x1", "y"]), ["c"])
    (d,) = [d for d in program.derivations if isinstance(d, Contraction)]
    assert d.bound == pytest.approx(0.3)
    assert Ref("p", "x1") in d.needs


def residuals(count: int, by: float) -> Region:
    """``count`` / 2 layers x + by x."""
    nodes: dict[str, tuple[str, list[str]]] = {}
    x = "x"
    for i in range(count // 2):
        nodes |= {f"s{i}": (f"scale:{by}", [x]), f"y{i}": ("add", [x, f"s{i}"])}
        x = f"y{i}"
    return region(["x"], nodes, [x])


@pytest.mark.parametrize("by", [0.3, 0.3123456789012345])
def test_two_thousand_linear_nodes(by: float) -> None:
    """Only what is needed is solved, one layer after another, and no number of the text is long."""
    program = solve(residuals(2000, by))
    assert isinstance(program, Program)
    assert program.level == "bijective"
    assert len(program.derivations) == 1000
    assert all(len(line) < 200 for line in explain(program).splitlines())
    small = inverted(residuals(100, by), (), "bijective")
    total = sum(np.log(float(d.factor)) for d in small.derivations if isinstance(d, Linear))
    assert total == pytest.approx(50 * np.log(1 + by))


def test_a_coupled_system_of_decimals_is_not_written_with_thousands_of_digits() -> None:
    """Every stream plus 0.31 times the next one, round a circle: one system with one determinant, 1 - (-0.31...)^n."""
    count, by = 60, 0.3123456789012345
    nodes = {f"s{i}": (f"scale:{by}", [f"x{i}"]) for i in range(count)}
    nodes |= {f"y{i}": ("add", [f"x{i}", f"s{(i + 1) % count}"]) for i in range(count)}
    outer = region([f"x{i}" for i in range(count)], nodes, [f"y{i}" for i in range(count)])
    program = solve(outer)
    assert isinstance(program, Program)
    assert program.level == "volume_preserving"  # 1 - 1e-30 is 1 to rounding
    values = toys.forward(outer, random_inputs(outer))
    made = toys.run(program, toys.facts(program, values))
    for name in outer.inputs:
        np.testing.assert_allclose(made[Ref("", name)], values[Ref("", name)], atol=1e-6)
    text = explain(program)
    assert max(len(line) for line in text.splitlines()) < 2000  # one sum of 60 terms


def test_a_decimal_is_a_decimal() -> None:
    """0.1 a + 0.2 a - 0.3 a is nothing, which 54-bit fractions would call 1e-17 a."""
    nodes = {"p": ("scale:0.1", ["a"]), "q": ("scale:0.2", ["a"]), "r": ("scale:-0.3", ["a"])}
    nodes |= {"y": ("add", ["p", "q", "r"])}
    assert [lost.input for lost in refused(region(["a"], nodes, ["y"])).lost] == ["a"]
    (d,) = inverted(region(["a"], {"y": ("scale:0.3", ["a"])}, ["y"]), (), "bijective").derivations
    assert isinstance(d, Linear)
    assert d.factor == Fraction(3, 10)


def test_dependent_equations_are_named() -> None:
    nodes = {"s": ("add", ["a", "b"]), "t": ("scale:2", ["a"]), "u": ("scale:2", ["b"]), "y": ("add", ["t", "u"])}
    refusal = refused(region(["a", "b"], nodes, ["s", "y"]))
    assert refusal.blockers[0].reason.endswith(
        "these equations are dependent, so that one of them says nothing new: those of s, t, u and y"
    )
