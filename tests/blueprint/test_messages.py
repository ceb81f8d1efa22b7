"""One broken blueprint per message, held to golden texts, place included (``UPDATE_GOLDEN=1`` writes them anew)."""

import os
from collections.abc import Callable
from pathlib import Path

import pytest

from sedd_graph.errors import BlueprintError, choices, nearest
from sedd_graph.runs.check import check

GOLDEN = Path(__file__).parent / "golden_messages.txt"

# name, what is replaced in the small blueprint of tests/conftest.py, by what
CASES = [
    ('a key of the root that is not known', 'name: small', 'nmae: small'),
    ('a newer version', 'blueprint: 1', 'blueprint: 2'),
    ('a bad name', 'name: small', 'name: Small Model'),
    ('an unknown op', 'op: rms_norm', 'op: rmsnorm'),
    ('a version that is not there', 'op: rms_norm', 'op: rms_norm.v7'),
    ('an import path for an op', 'op: rms_norm', 'op: os.system'),
    ('a kernel as a node', 'op: rms_norm', 'op: absorb'),
    ('an unknown sampler', 'sample: {op: ancestral', 'sample: {op: qqq'),
    ('a node as a sampler', 'sample: {op: ancestral', 'sample: {op: add'),
    ('a node as a kernel', 'process: {op: absorb', 'process: {op: add'),
    ('an unknown config key', '{hidden: 2*d}', '{hiden: 2*d}'),
    ('an unknown choice', '{hidden: 2*d}', '{activation: gelo}'),
    ('an unknown axis in a size', '{hidden: 2*d}', '{hidden: 2*q}'),
    ('a size that is dynamic', '{hidden: 2*d}', '{hidden: 2*l}'),
    ('a size that is negative', '{hidden: 2*d}', '{hidden: 2-d}'),
    ('a missing config key', ', with: {heads: "${params.heads}"}', ''),
    ('an unknown parameter', '${params.depth}', '${params.deep}'),
    ('another kind of interpolation', '${params.depth}', '${oc.env:HOME}'),
    ('parameters in a circle', 'dim: 16', 'dim: "${params.dim}"'),
    ('a reference to nothing', 'in: {x: trunk, tokens', 'in: {x: trnk, tokens'),
    ('an output that is not there', 'in: {x: embed,', 'in: {x: embed.outt,'),
    ('a port that is not there', '{x: norm, attend: attend}', '{x: norm, atend: attend}'),
    ('an input that is not fed', 'in: {x: trunk, tokens: tokens}', 'in: {x: trunk}'),
    ('too many inputs', 'norm: {op: rms_norm, in: x}', 'norm: {op: rms_norm, in: [x, x]}'),
    ('a wrong kind of number', 'in: {x: trunk, tokens: tokens}', 'in: {x: tokens, tokens: tokens}'),
    ('too few axes', '{x: norm, attend: attend}', '{x: norm, angles: x}'),
    ('heads that do not divide', 'heads: 2, depth', 'heads: 3, depth'),
    ('an output of unknown size', ', out: float b l d, with', ', with'),
    ('a declared type that is wrong', 'out: float b l v}', 'out: float b d v}'),
    ('nodes in a circle', 'attention: {op: attention, in: {x: norm,', 'attention: {op: attention, in: {x: mlp,'),
    ('an unknown block', 'block: layer', 'block: laier'),
    ('an unknown alias', 'block: layer', 'block: dit.layer'),
    ('a block within itself', 'norm: {op: rms_norm, in: x}', 'norm: {block: layer, in: {x: x, attend: attend}}'),
    ('a parameter that a block lacks', 'attend: attend}, with: {heads: "${params.heads}"}}\n  head', 'attend: attend}, with: {headz: 2}}\n  head'),
    ('a repeat of nothing', 'depth: 2', 'depth: 0'),
    ('a repeat beyond bounds', 'depth: 2', 'depth: 5000'),
    ('a repeat that does not close', 'outputs: {x: fed}', 'outputs: {y: fed}'),
    ('a node without use', '  head:', '  spare: {op: add, in: [trunk]}\n  head:'),
    ('an input that nothing reads', 'attend: bool b l}\noutputs: {log', 'attend: bool b l, t: float b}\noutputs: {log'),
    ('an input that the engine does not feed', 'inputs: {tokens: int b l, attend: bool b l}', 'inputs: {tokens: int b l, attend: bool b l, age: float b}\n#'),
    ('an output that no objective reads', 'outputs: {log_x0: head}', 'outputs: {logits: head}'),
    ('half of a process', 'objective: {op: masked_count}\n', ''),
    ('an objective that needs a mask', 'process: {op: absorb,', 'process: {op: uniform,'),
    ('a training key that is not known', 'train: {steps: 6,', 'train: {stepz: 6,'),
    ('a batch that does not divide', 'batch: 8', 'batch: 8, accumulate: 3'),
    ('a tokenizer of another size', 'size: 128', 'size: 64'),
    ('an unknown corpus', 'data: {', 'data: {corpus: {op: bultin}, '),
    ('both op and block', 'block: layer, repeat', 'op: add, block: layer, repeat'),
    ('a saved port that is not there', 'repeat: "${params.depth}",', 'repeat: "${params.depth}", save: {ports: [y]},'),
]  # fmt: skip


def golden() -> dict[str, str]:
    found = {}
    for part in GOLDEN.read_text().split("## ")[1:]:
        name, _, text = part.partition("\n")
        found[name] = text.strip("\n")
    return found


def message(path: Path) -> str:
    with pytest.raises(BlueprintError) as error:
        check(path)
    return str(error.value).replace(f"{path}:", "")


def test_messages_are_the_golden_ones(small: Callable[..., Path]) -> None:
    found = {name: message(small((old, new))) for name, old, new in CASES}
    if os.environ.get("UPDATE_GOLDEN"):
        GOLDEN.write_text("".join(f"## {name}\n{text}\n\n" for name, text in found.items()))
    assert found == golden()
    assert len(found) >= 40


def test_every_problem_of_a_stage_at_once(small: Callable[..., Path]) -> None:
    path = small(("token_embedding", "tokenembedding"), ("op: rms_norm", "op: rmsnorm"), ("op: absorb", "op: absorbb"))
    with pytest.raises(BlueprintError) as error:
        check(path)
    assert [p.path for p in error.value.problems] == ["nodes.embed.op"]
    path = small(("name: small", "name: Small"), ('d: "${params.dim}"', "d: [1]"), ("steps: 6", "steps: 0"))
    with pytest.raises(BlueprintError) as error:
        check(path)
    assert {p.path.split(".")[0] for p in error.value.problems} == {"name", "axes", "train"}


@pytest.mark.parametrize("name", ["node_7x", "qqqqqq"])
def test_of_hundreds_of_names_only_the_nearest_are_listed(small: Callable[..., Path], name: str) -> None:
    nodes = "".join(f"  node_{i}: {{op: rms_norm, in: embed}}\n" for i in range(300))
    text = message(small(("nodes:\n  embed", f"nodes:\n{nodes}  embed"), ("in: {x: trunk,", f"in: {{x: {name},")))
    line = next(line for line in text.splitlines() if "no node or input is called" in line)
    assert line.endswith(" and 300 more")
    assert line.count("node_") <= 7
    assert ("(did you mean 'node_7" in line) == (name == "node_7x")


def test_names_that_fit_the_place_are_listed_to_a_limit() -> None:
    names = [f"name_{i}" for i in range(30)]
    assert nearest("name_3", names[:3]) == "name_0, name_1, name_2"
    assert (
        choices("nam_17", names)
        == " (did you mean 'name_17'?); known: name_17, name_7, name_1, name_27, name_21 and 25 more"
    )
    assert choices("zzz", names) == "; known: name_0, name_1, name_2, name_3, name_4 and 25 more"
