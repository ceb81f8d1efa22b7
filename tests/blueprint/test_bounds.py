"""Files made to cost much: each is read or refused in seconds, with a message that a person can read."""

import time
import tracemalloc
from pathlib import Path

import pytest

from sedd_graph.errors import BlueprintError
from sedd_graph.runs.check import check

HEAD = "blueprint: 1\nname: x\naxes: {b: batch, d: 4}\ninputs: {x: float b d}\n"
ONE = HEAD + "outputs: {y: n}\nnodes: {n: {op: rms_norm, in: x}}\n"
NORM = "inputs: {x: float b d}, outputs: {x: n}, nodes: {n: {op: rms_norm, in: x}}"


def twice(body: str, count: int, params: tuple[str, str, str] = ("", "", "")) -> str:
    """Blocks that use the next one twice: 2**count uses of the last."""
    head, first, second = params
    blocks = "".join(
        f"  b{i}: {{{head}inputs: {{x: float b d}}, outputs: {{x: n1}}, nodes: {{n0: {{block: b{i + 1}, in: x{first}}}, "
        f"n1: {{block: b{i + 1}, in: n0{second}}}}}}}\n"
        for i in range(count)
    )
    return (
        HEAD + f"outputs: {{y: n}}\nnodes: {{n: {{block: b0, in: x}}}}\nblocks:\n{blocks}  b{count}: {{{head}{body}}}\n"
    )


REFERENCES = "${params.a}"
WHOLE = ", ".join([f'"{REFERENCES}"'] * 30_000)
NEAR = ", ".join(f"a_name_of_mine_{i}: 1" for i in range(250))
UNKNOWN = ", ".join(['"${params.a_name_of_mine}"'] * 15_000)
LONG = ", ".join(f'k{i}: "{REFERENCES * 1400}"' for i in range(30))
MANY = "".join(f"  a_node_of_mine_{i}: {{op: add, in: [node_of_mine_{i}]}}\n" for i in range(4000))
HOSTILE = {
    "parameters that make every use another": (
        twice("inputs: {x: float b d}, outputs: {x: n}, nodes: {n: {op: scale, in: x, with: {by: \"${params.p}\"}}}", 25, ("params: {p: 1}, ", ', with: {p: "${params.p}0"}', ', with: {p: "${params.p}1"}')),
        "the uses of blocks expand to more than 10000 distinct nodes",
    ),
    "blocks that double": (twice(NORM, 25), "expands to more than 100000 components"),
    "thirty thousand references": (f"{ONE}params: {{a: 1}}\ndata: {{k: [{WHOLE}]}}", "data.k: unknown key"),
    "parameters of many references": (ONE + "params: {p0: 1, " + ", ".join(f'p{i}: "' + f"${{params.p{i - 1}}}" * 33 + '"' for i in range(1, 256)) + "}", "params.p1: more than 32 references in one parameter"),
    "parameters that double": (ONE + "params: {p0: 1, " + ", ".join(f'p{i}: "' + f"${{params.p{i - 1}}}" * 2 + '"' for i in range(1, 256)) + "}", "params.p13: longer than 4096 characters once interpolated"),
    "references to a long text": (f"{ONE}params: {{a: {'z' * 4000}}}\ndata: {{{LONG}}}", "longer than 4096 characters once interpolated"),
    "four thousand names that are near": (HEAD + "outputs: {y: a_node_of_mine_0}\nnodes:\n" + MANY, "(did you mean 'a_node_of_mine_0'?); known: a_node_of_mine_0, a_node_of_mine_"),
    "references to unknown parameters": (f"{ONE}params: {{{NEAR}}}\ndata: {{k: [{UNKNOWN}]}}", "unknown parameter 'a_name_of_mine' (did you mean 'a_name_of_mine_"),
    "four thousand unknown keys": (HEAD + "outputs: {y: n}\nnodes:\n" + "".join(f"  n{i}: {{opp: add}}\n" for i in range(4000)), "nodes.n0.opp: unknown key (did you mean 'op'?)"),
    "four thousand unknown ops": (HEAD + "outputs: {y: n0}\nnodes:\n" + "".join(f"  n{i}: {{op: ad, in: [x]}}\n" for i in range(4000)), "unknown op 'ad' (did you mean 'add'?)"),
    "a circle of four thousand": (HEAD + "outputs: {y: n0}\nnodes:\n" + "".join(f"  n{i}: {{op: add, in: [n{(i + 1) % 4000}]}}\n" for i in range(4000)), "nodes form a cycle: "),
    "a product of sums": (ONE.replace("d: 4", "d: 4, p: (batch+length+1)*(batch+length+2)*(batch+length+3), q: p*p*p*p"), "axes.q: size expression"),
    "thousands joined": (HEAD + f"outputs: {{y: n}}\nnodes: {{n: {{op: concat, in: [{', '.join(['x'] * 4000)}]}}}}\n", "port type is longer than 256 characters"),
}  # fmt: skip


@pytest.mark.parametrize(("text", "message"), HOSTILE.values(), ids=HOSTILE)
def test_what_would_cost_much_is_refused_soon(text: str, message: str, tmp_path: Path) -> None:
    path = tmp_path / "hostile.yaml"
    path.write_text(text)
    began = time.process_time()
    with pytest.raises(BlueprintError) as error:
        check(path)
    assert time.process_time() - began < 10
    assert message in str(error.value)
    assert len(str(error.value)) < 100_000


def test_memory_is_bounded_too(tmp_path: Path) -> None:
    path = tmp_path / "hostile.yaml"
    path.write_text(HOSTILE["references to a long text"][0])
    tracemalloc.start()
    try:
        with pytest.raises(BlueprintError):
            check(path)
        assert tracemalloc.get_traced_memory()[1] < 60e6
    finally:
        tracemalloc.stop()


def test_large_and_honest_is_taken(tmp_path: Path) -> None:
    chain = "".join(f"  n{i}: {{op: add, in: [n{i - 1}]}}\n" for i in range(1, 2000))
    (tmp_path / "long.yaml").write_text(HEAD + "outputs: {y: n1999}\nnodes:\n  n0: {op: rms_norm, in: x}\n" + chain)
    assert check(tmp_path / "long.yaml").graph.root.size == 2000
    (tmp_path / "double.yaml").write_text(twice(NORM, 14))
    assert check(tmp_path / "double.yaml").graph.root.size == 2**14


def test_problems_stop_at_a_hundred(tmp_path: Path) -> None:
    path = tmp_path / "hostile.yaml"
    path.write_text(HOSTILE["four thousand unknown ops"][0])
    with pytest.raises(BlueprintError) as error:
        check(path)
    assert len(error.value.problems) == 100
    assert str(error.value).endswith("\n... these are the first 100 problems")
