"""Unification against sizes known beforehand, and its messages."""

import itertools
from collections.abc import Sequence

import pytest
from hypothesis import given
from hypothesis import strategies as st

from sedd_graph.component.axes import Size, parse_port_type, parse_size
from sedd_graph.component.contract import Port
from sedd_graph.graph.unify import Binding, Mismatch


def port(pattern: str, name: str = "x") -> Port:
    return Port(name, parse_port_type(pattern))


def unify(
    *pairs: tuple[str, str], known: dict[str, int] | None = None, defaults: dict[str, int] | None = None
) -> Binding:
    """Ports x0, x1, ... of the given patterns against the given types, and the end."""
    binding = Binding({n: Size.of(v) for n, v in (known or {}).items()})
    for index, (pattern, actual) in enumerate(pairs):
        binding.unify(port(pattern, f"x{index}"), parse_port_type(actual))
    binding.finish({n: Size.of(v) for n, v in (defaults or {}).items()})
    return binding


def shown(binding: Binding) -> set[str]:
    return set(binding.shown().split(", "))


@pytest.mark.parametrize(
    ("pairs", "bound"),
    [
        ([("float b l d", "float batch length 16")], {"b=batch", "l=length", "d=16"}),
        ([("float 2*d", "float 16")], {"d=8"}),
        ([("float d-1", "float length")], {"d=length+1"}),
        # what waits for another port is solved once that port has come, in any order
        ([("float h*r", "float 12"), ("float h", "float 3")], {"h=3", "r=4"}),
        ([("float h", "float 3"), ("float h*r", "float 12")], {"h=3", "r=4"}),
        ([("float a+b", "float 10"), ("float b+c", "float 9"), ("float c", "float 4")], {"c=4", "b=5", "a=5"}),
        ([("float h*r", "float 6*length"), ("float h", "float length")], {"h=length", "r=6"}),
        # an axis of the component's own that is called like one of the blueprint's stays apart from it
        ([("float b", "float batch"), ("float b+batch", "float batch+7")], {"b=batch", "batch=7"}),
        ([("float *s d", "float batch length 16"), ("float *s", "float batch length")], {"d=16", "*s=(batch length)"}),
        ([("float *s", "float")], {"*s=()"}),
    ],
)  # fmt: skip
def test_axes_are_bound(pairs: list[tuple[str, str]], bound: set[str]) -> None:
    assert shown(unify(*pairs)) == bound


@pytest.mark.parametrize(
    ("pairs", "message"),
    [
        ([("float b", "int batch")], "port 'x0' expects float b, but receives int batch: float is not int"),
        ([("float b l", "float batch")], "port 'x0' expects float b l, but receives float batch: 2 axes, not 1"),
        ([("float b *s l", "float batch")], "port 'x0' expects float b *s l, but receives float batch: at least 2 axes, not 1"),
        (
            [("float b d", "float batch 16"), ("float b d", "float batch 8")],
            "port 'x1' expects float b d, but receives float batch 8: d = 16, not 8; so far b=batch, d=16",
        ),
        (
            [("float d", "float 16"), ("float 3*d", "float 47")],
            "port 'x1' expects float 3*d, but receives float 47: 3*d = 48, not 47; so far d=16",
        ),
        ([("float 3*d", "float 16")], "port 'x0' expects float 3*d, but receives float 16: 16 does not fit 3*d; so far nothing is bound"),
        ([("float d+16", "float 16")], "port 'x0' expects float d+16, but receives float 16: 16 does not fit d+16; so far nothing is bound"),
        (
            [("float *s", "float batch 16"), ("float *s", "float batch 8")],
            "port 'x1' expects float *s, but receives float batch 8; so far *s=(batch 16)",
        ),
        # what waited is held to what came later; the port that waited is named
        (
            [("float h*r", "float 12"), ("float h r", "float 3 5")],
            "port 'x0' expects float h*r, but receives float 12: h*r = 15, not 12; so far h=3, r=5",
        ),
        # what waits for ever is refused, with what is known
        (
            [("float b h*r", "float batch 12")],
            "port 'x0' expects float b h*r, but receives float batch 12: h*r = 12 cannot be solved for h and r; so far b=batch",
        ),
        (
            [("float r*r", "float 16")],
            "port 'x0' expects float r*r, but receives float 16: r*r = 16 cannot be solved for r; so far nothing is bound",
        ),
        (
            [("float a+b", "float 10"), ("float a-b", "float 2")],
            "port 'x0' expects float a+b, but receives float 10: a+b = 10 cannot be solved for a and b; so far nothing is bound",
        ),
    ],
)  # fmt: skip
def test_messages(pairs: list[tuple[str, str]], message: str) -> None:
    with pytest.raises(Mismatch) as error:
        unify(*pairs)
    assert str(error.value) == message


def test_a_known_size_may_make_a_term_vanish() -> None:
    assert shown(unify(("float h*r", "float 0"), known={"h": 0})) == {"h=0"}
    with pytest.raises(Mismatch, match=r"h\*r = 0, not 4"):
        unify(("float h*r", "float 4"), known={"h": 0})


def test_defaults_are_for_what_no_port_binds() -> None:
    assert shown(unify(("float d+e", "float 24"), defaults={"d": 16, "e": 8, "q": 1})) == {"d=16", "e=8"}
    with pytest.raises(Mismatch, match=r"d\+e = 32, not 24; so far d=16, e=16"):
        unify(("float d+e", "float 24"), defaults={"d": 16, "e": 16})
    assert shown(unify(("float d", "float 20"), ("float d+e", "float 24"), defaults={"d": 16, "e": 8})) == {
        "d=20",
        "e=4",
    }


def test_results() -> None:
    binding = unify(("float *s d", "float batch length 16"))
    assert str(binding.result(port("float *s 2*d"))) == "float batch length 32"
    for pattern, message in {
        "float e": "output 'x' is float e, but the size of e is not determined: add 'out:' with its type",
        "float *t": "output 'x' is float *t, but *t is not determined: add 'out:' with its type",
        "float d-16": "output 'x' is float d-16, but d-16 = 0: a size is at least 1; d=16, *s=(batch length)",
    }.items():
        with pytest.raises(Mismatch) as error:
            binding.result(port(pattern))
        assert str(error.value) == message


def test_a_size_beyond_bounds_is_a_mismatch() -> None:
    with pytest.raises(Mismatch, match="too large"):
        unify(("float d", f"float {2**39}"), ("float 4*d", "float 4"))
    with pytest.raises(Mismatch, match="too large"):
        unify(("float d", f"float {2**39}")).result(port("float 4*d"))


expressions = st.sampled_from(
    ["a", "b", "c", "2*a", "a+1", "a*b", "b*c", "a+b", "b+c", "3*c-1", "a*b*c", "a*a", "a*b+c", "a*b+a", "7"]
)


@given(
    st.lists(st.lists(expressions, min_size=1, max_size=3), min_size=1, max_size=4),
    st.fixed_dictionaries({n: st.integers(1, 12) for n in "abc"}),
    st.data(),
)
def test_sizes_known_beforehand_are_found_or_called_open(
    patterns: list[list[str]], truth: dict[str, int], data: st.DataObject
) -> None:
    """Feed ports with the sizes that ``truth`` gives: nothing but the truth is bound; one wrong size never passes."""
    sizes = [[parse_size(e).evaluate(truth) for e in dims] for dims in patterns]
    pairs = [(_typed(p), _typed(s)) for p, s in zip(patterns, sizes, strict=True)]
    try:
        found = unify(*pairs).axes
    except Mismatch as error:
        assert "cannot be solved for" in str(error)
        assert not _triangular(patterns)
        return
    assert {n: s.constant for n, s in found.items()}.items() <= truth.items()
    # Another size somewhere: whatever passes must satisfy every equation.
    port_at = data.draw(st.integers(0, len(sizes) - 1))
    dim_at = data.draw(st.integers(0, len(sizes[port_at]) - 1))
    sizes[port_at][dim_at] += data.draw(st.integers(1, 9))
    try:
        found = unify(*[(_typed(p), _typed(s)) for p, s in zip(patterns, sizes, strict=True)]).axes
    except Mismatch:
        return
    env = {n: s.constant or 0 for n, s in found.items()}
    assert all(parse_size(e).evaluate(env) == s for dims, row in zip(patterns, sizes, strict=True) for e, s in zip(dims, row, strict=True))  # fmt: skip
    assert min(env.values(), default=1) >= 1


def _typed(dims: Sequence[object]) -> str:
    return " ".join(["float", *map(str, dims)])


def _triangular(patterns: list[list[str]]) -> bool:
    """Whether some order of the expressions has at most one new axis each, and that linearly (a*a is not)."""
    left = [(set(e) & set("abc"), "a*a" in e) for dims in patterns for e in dims]
    known: set[str] = set()
    while left:
        ready = [(s, square) for s, square in left if len(s - known) <= 1 and not (square and s - known)]
        if not ready:
            return False
        left = [item for item in left if item not in ready]
        known |= set().union(*(s for s, _ in ready))
    return True


@given(
    st.permutations(
        [("float h*r", "float 12"), ("float h", "float 3"), ("float r+q", "float 9"), ("float q", "float 5")]
    )
)
def test_the_order_of_ports_does_not_matter(pairs: list[tuple[str, str]]) -> None:
    assert shown(unify(*pairs)) == {"h=3", "r=4", "q=5"}


def test_every_dimension_of_every_port_is_verified() -> None:
    """Change any one of nine sizes that fit: no change passes."""
    patterns = [["b", "l", "h*r"], ["h", "r"], ["2*l", "b+1", "h+r", "7"]]
    truth = {"b": 2, "l": 5, "h": 3, "r": 4}
    sizes = [[parse_size(e).evaluate(truth) for e in dims] for dims in patterns]
    for which, (row, column) in itertools.product(
        (1, -1), [(i, j) for i, dims in enumerate(patterns) for j in range(len(dims))]
    ):
        changed = [list(dims) for dims in sizes]
        changed[row][column] += which
        with pytest.raises(Mismatch):
            unify(*[(_typed(p), _typed(s)) for p, s in zip(patterns, changed, strict=True)])
