"""The lock file reads back as what was written, builds what was built, and locks to itself."""

import itertools
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from sedd_graph.blueprint.load import load
from sedd_graph.blueprint.lock import dump, lock
from sedd_graph.blueprint.yaml import MAX_KEY, read_yaml
from sedd_graph.errors import UserError
from sedd_graph.graph.draw import to_json
from sedd_graph.runs.check import check, lock_text
from tests.conftest import BLUEPRINTS


def refer(op: str, keys: Mapping[str, Any]) -> tuple[str, dict[str, Any]]:
    return op, dict(keys)


def relock(text: str, folder: Path, name: str = "again.yaml") -> str:
    path = folder / name
    path.write_text(text, encoding="utf-8")
    return lock(load(path), refer)


def write(folder: Path, files: Mapping[str, str]) -> Path:
    for name, text in files.items():
        (folder / name).parent.mkdir(parents=True, exist_ok=True)
        (folder / name).write_text(text, encoding="utf-8")
    return folder / "main.yaml"


MAIN = """\
blueprint: 1
name: main
use: {USE}
params: {depth: 2}
axes: {b: batch, l: length, d: 16}
inputs: {x: float b l d}
outputs: {x: LAST}
nodes:
"""
NORM = "inputs: {x: float b l d}, outputs: {x: norm}, nodes: {norm: {op: OP, in: x}}"


def library(blocks: Mapping[str, str], use: str = "{}") -> str:
    return f"blueprint: 1\nuse: {use}\nblocks:\n" + "".join(f"  {name}: {{{body}}}\n" for name, body in blocks.items())


def main(use: Mapping[str, str], chain: list[str]) -> str:
    """A blueprint whose nodes n0, n1, ... each run one block after the other."""
    text = MAIN.replace("{USE}", str(use).replace("'", "")).replace("LAST", f"n{len(chain) - 1}")
    nodes = [f"  n{i}: {{block: {block}, in: {f'n{i - 1}' if i else 'x'}}}\n" for i, block in enumerate(chain)]
    return text + "".join(nodes)


def assert_locks(path: Path) -> str:
    """The lock builds the same graph, and is its own lock. Returns its text."""
    report = check(path)
    text = lock_text(report)
    again = path.with_name("again.yaml")
    again.write_text(text, encoding="utf-8")
    rebuilt = check(again)
    assert to_json(rebuilt.graph) == to_json(report.graph)
    assert lock_text(rebuilt) == text
    return text


@pytest.mark.parametrize("path", BLUEPRINTS, ids=lambda p: p.stem)
def test_shipped_blueprints_lock_to_themselves(path: Path, tmp_path: Path) -> None:
    report = check(path)
    text = lock_text(report)
    again = tmp_path / path.name
    again.write_text(text, encoding="utf-8")
    rebuilt = check(again)
    assert lock_text(rebuilt) == text
    assert to_json(rebuilt.graph) == to_json(report.graph)
    assert rebuilt.loaded.sections == report.loaded.sections


def test_two_libraries_with_blocks_of_the_same_name(tmp_path: Path) -> None:
    layer, norm = NORM.replace("OP", "layer_norm"), NORM.replace("OP", "rms_norm")
    files = {
        "main.yaml": main({"a": "a.yaml", "b": "b.yaml"}, ["a.norm", "b.norm", "a.norm"]),
        "a.yaml": library({"norm": layer}),
        "b.yaml": library({"norm": norm}),
    }
    data = read_yaml(assert_locks(write(tmp_path, files)).encode(), name="lock").data
    assert {n: b["nodes"]["norm"]["op"] for n, b in data["blocks"].items()} == {"a_norm": "layer_norm.v1", "b_norm": "rms_norm.v1"}  # fmt: skip


def test_a_generated_name_gives_way_to_one_that_is_taken(tmp_path: Path) -> None:
    files = {
        "main.yaml": main({"a": "a.yaml", "a_b": "b.yaml"}, ["a.b_norm", "a_b.norm", "a_b_norm"])
        + "blocks:\n  a_b_norm: {" + NORM.replace("OP", "rms_norm") + "}\n",
        "a.yaml": library({"b_norm": NORM.replace("OP", "layer_norm")}),
        "b.yaml": library({"norm": NORM.replace("OP", "layer_norm")}),
    }  # fmt: skip
    data = read_yaml(assert_locks(write(tmp_path, files)).encode(), name="lock").data
    assert {n: v["block"] for n, v in data["nodes"].items()} == {
        "n0": "a_b_norm_2",
        "n1": "a_b_norm_3",
        "n2": "a_b_norm",
    }


def test_libraries_within_libraries(tmp_path: Path) -> None:
    outer = "inputs: {x: float b l d}, outputs: {x: b}, nodes: {a: {block: in.norm, in: x}, b: {block: own, in: a}}"
    own = NORM.replace("OP", "layer_norm")
    files = {
        "main.yaml": main({"out": "lib/outer.yaml", "in": "lib/deep/inner.yaml"}, ["out.pair", "in.norm", "out.own"]),
        "lib/outer.yaml": library({"pair": outer, "own": own}, "{in: deep/inner.yaml}"),
        "lib/deep/inner.yaml": library({"norm": NORM.replace("OP", "rms_norm"), "own": own}),
    }
    text = assert_locks(write(tmp_path, files))
    assert list(read_yaml(text.encode(), name="lock").data["blocks"]) == ["out_pair", "in_norm", "out_own"]


long_names = st.builds(
    lambda letter, tail, n: letter + tail * n, st.sampled_from("ab"), st.sampled_from("a_"), st.integers(0, 63)
)


@settings(deadline=None, max_examples=60, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(st.lists(st.tuples(long_names, long_names), min_size=1, max_size=5, unique_by=lambda pair: pair[0]))
def test_names_are_apart_and_never_too_long(tmp_path: Path, pairs: list[tuple[str, str]]) -> None:
    """One library per pair of alias and block, each doing something of its own."""
    files = {
        "main.yaml": main({alias: f"{i}.yaml" for i, (alias, _) in enumerate(pairs)}, [f"{a}.{b}" for a, b in pairs])
    }
    for i, (_, block) in enumerate(pairs):
        files[f"{i}.yaml"] = library({block: NORM.replace("OP", f"op{i}")})
    text = lock(load(write(tmp_path, files)), refer)
    data = read_yaml(text.encode(), name="lock").data
    assert [data["blocks"][data["nodes"][f"n{i}"]["block"]]["nodes"]["norm"]["op"] for i in range(len(pairs))] == [f"op{i}" for i in range(len(pairs))]  # fmt: skip
    assert relock(text, tmp_path) == text


def test_unused_blocks_are_left_out_whatever_they_say(tmp_path: Path) -> None:
    spare = "  spare: {inputs: {x: float b}, outputs: {x: n}, nodes: {n: {block: nowhere.at_all, in: x}}}\n"
    text = main({}, ["norm"]) + "blocks:\n  norm: {" + NORM.replace("OP", "rms_norm") + "}\n" + spare
    assert list(read_yaml(assert_locks(write(tmp_path, {"main.yaml": text})).encode(), name="l").data["blocks"]) == [
        "norm"
    ]


def test_a_lock_too_large_for_one_file_is_refused(tmp_path: Path) -> None:
    words = ", ".join(f"n{i}: {{op: add, in: x, with: {{k: {'w' * 8000}}}}}" for i in range(8))
    blocks = {f"b{i}": f"inputs: {{x: float b}}, outputs: {{x: n0}}, nodes: {{{words}}}" for i in range(5)}
    files = {f"{n}.yaml": library(blocks) for n in ("p", "q")}
    used = [f"{n}.b{i}" for n, i in itertools.product("pq", range(5))]
    files["main.yaml"] = main({"p": "p.yaml", "q": "q.yaml"}, used)
    with pytest.raises(
        UserError, match="with all it includes it cannot be kept as one file: lock file: larger than 512 KiB"
    ):
        lock(load(write(tmp_path, files)), refer)


def test_any_text_of_a_blueprint_comes_through(small: Callable[..., Path], tmp_path: Path) -> None:
    odd = '\\U0001F600 \\u2028 \\x00 \\" \\\\ \\t \U0001f600 é NaN'
    path = small(("name: small\n", f'name: small\ndescription: "{odd}"\n'))
    text = lock_text(check(path))
    assert read_yaml(text.encode(), name="lock").data["description"] == read_yaml(path).data["description"]
    path = tmp_path / "lock.yaml"
    path.write_text(text, encoding="utf-8")
    assert lock_text(check(path)) == text


# -- dump -----------------------------------------------------------------------------------------------------------

words = st.one_of(
    st.text(max_size=20),  # every plane but surrogates
    st.text(
        st.sampled_from("\U0001f600\U0010ffff\ufeff\ufffe\u2028\x85\xa0\x00\x7f\\\"' \n\t:#-?&*!|>%@`{}[],~"),
        max_size=12,
    ),
    st.sampled_from(
        [
            "null",
            "True",
            "~",
            "nan",
            ".inf",
            "1e3",
            "0x1",
            "1_0",
            "12:30",
            "<<",
            "=",
            "---",
            "...",
            "- a",
            "a: b",
            "a #b",
            " a",
            "a ",
            "é" * 5000,
        ]
    ),
)
scalars = st.one_of(
    st.none(),
    st.booleans(),
    st.integers(-(10**15), 10**15),
    st.floats(allow_nan=False, allow_infinity=False),
    words,
)
keys = st.one_of(
    st.from_regex(r"[a-z][a-z0-9_]{0,8}", fullmatch=True),
    words.filter(lambda w: 0 < len(w) <= MAX_KEY),
    st.just("\U0010ffff" * MAX_KEY),
)
trees = st.dictionaries(
    keys,
    st.recursive(
        scalars, lambda t: st.one_of(st.lists(t, max_size=4), st.dictionaries(keys, t, max_size=4)), max_leaves=12
    ),
    min_size=1,
    max_size=5,
)


@settings(deadline=None, max_examples=400)
@given(trees)
def test_what_is_dumped_is_read_back(data: dict[str, object]) -> None:
    text = dump(data)
    back = read_yaml(text.encode(), name="f").data
    assert back == data
    assert repr(back) == repr(data)  # types, order of keys, and the sign of zero
    assert dump(back) == text
