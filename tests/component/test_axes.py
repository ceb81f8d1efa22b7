"""Sizes against Python's own arithmetic, and the bounds of the parser."""

import pytest
from hypothesis import given
from hypothesis import strategies as st

from sedd_graph.component.axes import AxisError, Size, parse_port_type, parse_size

names = st.sampled_from(["a", "b", "c"])
expressions = st.recursive(
    st.one_of(st.integers(0, 50).map(str), names),
    lambda inner: st.tuples(inner, st.sampled_from(["+", "-", "*"]), inner).map(lambda t: f"({t[0]}{t[1]}{t[2]})"),
    max_leaves=6,
)


@given(expressions, st.fixed_dictionaries({n: st.integers(1, 9) for n in "abc"}))
def test_a_size_means_what_python_means(text: str, env: dict[str, int]) -> None:
    try:
        size = parse_size(text)
    except AxisError:
        return  # more than eight symbols multiplied
    expected = _plain(text, env)
    assert size.evaluate(env) == expected
    assert parse_size(str(size)) == size


def _plain(text: str, env: dict[str, int]) -> int:
    """Shunting over the fully parenthesised text, apart from the parser under test."""
    if not text.startswith("("):
        return env[text] if text.isalpha() else int(text)
    depth, body = 0, text[1:-1]
    for i, c in enumerate(body):
        depth += (c == "(") - (c == ")")
        if depth == 0 and c in "+-*" and i:
            left, right = _plain(body[:i], env), _plain(body[i + 1 :], env)
            return left + right if c == "+" else left - right if c == "-" else left * right
    raise AssertionError(text)


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("7//2", "7 is not divisible by 2"),
        ("d//(d+1)", "cannot divide by the sum d+1"),
        ("1//0", "division by zero in a size expression"),
        ("2**40", "size '2**40': unexpected '*'"),
        ("9999999999999999", "size 999999999999... is too large: the largest is 2**40"),
        ("1099511627776", "size is too large: the largest is 2**40"),
        (
            "__import__('os')",
            'size "__import__(\'os\')": unexpected "\'" (integers, axis names, + - * // and parentheses)',
        ),
        ("(1", "size '(1': something is missing at the end"),
        ("1 2", "size '1 2': unexpected '2'"),
        ("", "a size is empty"),
        ("(" * 40 + "1" + ")" * 40, "nested deeper than 16"),
        ("1+" * 200 + "1", "size expression is longer than 256 characters"),
    ],
)
def test_refusals(text: str, message: str) -> None:
    with pytest.raises(AxisError) as error:
        parse_size(text)
    assert message in str(error.value)


def test_unknown_axis_has_a_suggestion() -> None:
    with pytest.raises(AxisError, match=r"unknown axis 'dimm' \(did you mean 'dim'\?\); known: dim, v"):
        parse_size("4*dimm", ["dim", "v"])


def test_port_types() -> None:
    found = parse_port_type("float b l 4*d *s")
    assert (str(found), found.kind, found.dims[3].variadic) == ("float b l 4*d *s", "float", "s")
    with pytest.raises(AxisError, match=r"start with float, int or bool \(did you mean 'float'\?\)"):
        parse_port_type("flaot b")
    with pytest.raises(AxisError, match="only one variadic"):
        parse_port_type("float *a *b")


def test_exact_division_of_polynomials() -> None:
    assert (Size.of("d") * 6 // 3) == Size.of("d") * 2


def test_sizes_that_are_known_take_their_place() -> None:
    sizes = {"d": Size.of(12), "l": Size.of("length"), "k": Size.of("length") * 4}
    assert [str(parse_size(text, sizes)) for text in ("d//4", "d//(d//4)", "k//2", "k//l", "d*l")] == ["3", "4", "2*length", "4", "12*length"]  # fmt: skip
    assert str(parse_port_type("float l d//3", sizes)) == "float length 4"
    for text, message in {"d//5": "12 is not divisible by 5", "l//2": "length is not divisible by 2", "q": "unknown axis 'q'; known: d, l, k"}.items():  # fmt: skip
        with pytest.raises(AxisError, match=message):
            parse_size(text, sizes)
