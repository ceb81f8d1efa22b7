"""Untrusted text: what is read, what is refused, with its place."""

import math

import pytest
from hypothesis import given
from hypothesis import strategies as st

from sedd_graph.blueprint.yaml import MAX_DEPTH, read_yaml
from sedd_graph.errors import BlueprintError


def refuse(text: bytes | str) -> str:
    raw = text if isinstance(text, bytes) else text.encode()
    with pytest.raises(BlueprintError) as error:
        read_yaml(raw, name="f")
    return str(error.value)


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("a: 1\na: 2", "f:2:1: duplicate key 'a', first on line 1"),
        (
            "a: !!python/object:os.system x",
            "f:1:4: tag 'tag:yaml.org,2002:python/object:os.system': tags are not allowed in a blueprint",
        ),
        ("a: !x y", "f:1:4: tag '!x': tags are not allowed in a blueprint"),
        ("a: .nan", "f:1:4: .nan is not a finite number (quote it if a string is meant)"),
        ("a: NaN", "f:1:4: NaN is not a finite number (quote it if a string is meant)"),
        ("a: -.INF", "f:1:4: -.INF is not a finite number (quote it if a string is meant)"),
        ("a: 1e999", "f:1:4: the number 1e999 is too large"),
        ("a: 010", "f:1:4: write 010 as a plain decimal number (or quote it if a string is meant)"),
        ("a: 0x1F", "f:1:4: write 0x1F as a plain decimal number (or quote it if a string is meant)"),
        ("a: 1_000", "f:1:4: write 1_000 as a plain decimal number (or quote it if a string is meant)"),
        ("a: 1:30", "f:1:4: write 1:30 as a plain decimal number (or quote it if a string is meant)"),
        ("a: 9999999999999999999", "f:1:4: the integer 999999999999... is too large"),
        ("b: &x {c: 1}\na:\n  <<: *x", "f:3:3: merge keys ('<<') are not supported: use params or blocks"),
        ("? [a]\n: 1", "f:1:3: a key must be a plain string"),
        ("a: 1\n---\nb: 2", "f:2:1: a second document ('---'): one file holds one blueprint"),
        ("a: &x [*x]", "f:1:8: alias *x points to nothing that is complete before it"),
        ("a: *x", "f:1:4: alias *x points to nothing that is complete before it"),
        ("", "f:1:1: the file is empty"),
        ("a: [1", "f:2:1: not YAML: did not find expected ',' or ']'"),
        ("a:\n\t- b", "f:2:1: not YAML: a tab cannot start a token: indent with spaces"),
        ("a: b\x07", "f:1:5: control character U+0007"),
        (b"a: \xff", "f:1:1: not UTF-8: byte 3 is 0xff"),
        ("a" * 600_000, "f: larger than 512 KiB"),
        ("a: " + "b" * 20_000, "f:1:4: a string of more than 16384 characters"),
        ("b" * 101 + ": a", "f:1:1: a key of more than 100 characters"),
        (r'a: "\ud83d\ude00"', "f:1:7: not YAML: found invalid Unicode character escape code"),
        ("[" * 60 + "]" * 60, f"f:1:{MAX_DEPTH + 1}: nested deeper than {MAX_DEPTH}"),
    ],
)
def test_refusals(text: bytes | str, message: str) -> None:
    assert refuse(text).startswith(message)


def test_an_alias_bomb_is_counted_out_and_refused() -> None:
    lines = ["a0: &a0 [x, x, x, x, x, x, x, x, x, x]"]
    lines += [f"a{i}: &a{i} [{', '.join([f'*a{i - 1}'] * 10)}]" for i in range(1, 9)]
    assert "more than 50000 values, aliases counted out in full" in refuse("\n".join(lines))


@pytest.mark.parametrize("text", ["1e-3", "1E-3", "1.e-3", "+1e-3", ".001", "0.001", "1.0e-03"])
def test_a_thousandth_however_it_is_spelled(text: str) -> None:
    assert read_yaml(f"a: {text}".encode(), name="f").data["a"] == 1e-3


def test_core_schema_and_positions() -> None:
    document = read_yaml(b"a: yes\nb:\n  - {c: true}\n  - '1'\nd: ~\n", name="f")
    assert document.data == {"a": "yes", "b": [{"c": True}, "1"], "d": None}
    assert document.position(("b", 0, "c")) == ("f", 3, 6)
    assert document.position(("b", 1)) == ("f", 4, 5)
    assert document.position(("b", 0, "missing", "deeper")) == ("f", 3, 5)


def test_uses_of_an_alias_are_apart() -> None:
    data = read_yaml(b"a: &x {c: 1}\nb: *x", name="f").data
    data["b"]["c"] = 2
    assert data["a"]["c"] == 1


@given(st.binary(max_size=200))
def test_bytes_at_random_are_read_or_refused(raw: bytes) -> None:
    try:
        data = read_yaml(raw, name="f").data
    except BlueprintError as error:
        assert str(error).startswith("f")
    else:
        assert not (isinstance(data, float) and math.isnan(data))
