"""One broken blueprint per message: the exact text, place included."""

from collections.abc import Callable
from pathlib import Path

import pytest

from sedd_graph.api import check
from sedd_graph.errors import BlueprintError

CASES: list[tuple[str, tuple[str, str], str]] = [
    ("a key of the root that is not known", ("name: small", "nmae: small"), "2:1: nmae: unknown key (did you mean 'name'?); known: axes, blocks, blueprint, data, description, inputs, name, nodes, objective, outputs, params, process, sample, store, train, use\n1:1: name: is missing"),
    ("a newer version", ("blueprint: 1", "blueprint: 2"), "1:1: blueprint: version 2 is newer than this sedd_graph reads (1): upgrade sedd_graph"),
    ("a bad name", ("name: small", "name: Small Model"), "2:1: name: 'Small Model': use lower-case letters, digits, '-', '_' and '.'"),
    ("an unknown op", ("op: rms_norm", "op: rmsnorm"), "14:14: blocks.layer.nodes.norm.op: unknown op 'rmsnorm' (did you mean 'rms_norm'?); `sedd-graph components` lists them"),
    ("a version that is not there", ("op: rms_norm", "op: rms_norm.v7"), "14:14: blocks.layer.nodes.norm.op: op 'rms_norm' has no version 7; installed: rms_norm.v1"),
    ("an import path for an op", ("op: rms_norm", "op: os.system"), "14:14: blocks.layer.nodes.norm.op: 'os.system': an op is a registered name, such as 'attention' or 'attention.v1'"),
    ("a kernel as a node", ("op: rms_norm", "op: absorb"), "14:14: blocks.layer.nodes.norm.op: 'absorb' is of kind kernel; here stands a node of the graph"),
    ("a node as a kernel", ("process: {op: absorb", "process: {op: add"), "22:11: process.op: 'add' is of kind arithmetic; here stands a kernel: absorb, uniform"),
    ("an unknown config key", ("{hidden: 2*d}", "{hiden: 2*d}"), "17:53: blocks.layer.nodes.mlp.with.hiden: unknown key (did you mean 'hidden'?); known: activation, bias, hidden"),
    ("an unknown choice", ("{hidden: 2*d}", "{activation: gelo}"), "17:53: blocks.layer.nodes.mlp.with.activation: 'gelo': must be 'gelu', 'swiglu' or 'squared_relu' (did you mean 'gelu'?)"),
    ("an unknown axis in a size", ("{hidden: 2*d}", "{hidden: 2*q}"), "17:53: blocks.layer.nodes.mlp.with.hidden: unknown axis 'q'; known: b, l, d, v"),
    ("a size that is dynamic", ("{hidden: 2*d}", "{hidden: 2*l}"), "17:53: blocks.layer.nodes.mlp.with.hidden: '2*l' depends on length, which no one knows before a step runs"),
    ("a size that is negative", ("{hidden: 2*d}", "{hidden: 2-d}"), "17:53: blocks.layer.nodes.mlp.with.hidden: must be greater than 0, not -14"),
    ("a missing config key", (', with: {heads: "${params.heads}"}', ""), "15:7: blocks.layer.nodes.attention.with.heads: is missing"),
    ("an unknown parameter", ("${params.depth}", "${params.deep}"), "21:25: nodes.trunk.repeat: unknown parameter 'deep'; known: dim, heads, depth, tokens"),
    ("another kind of interpolation", ("${params.depth}", "${oc.env:HOME}"), "21:25: nodes.trunk.repeat: '${oc.env:HOME}': the only interpolation is ${params.NAME}"),
    ("parameters in a circle", ("dim: 16", 'dim: "${params.dim}"'), "3:10: params.dim: parameters refer to each other in a circle: dim"),
    ("a reference to nothing", ("in: {x: trunk, tokens", "in: {x: trnk, tokens"), "22:24: nodes.head.in.x: nothing here is called 'trnk' (did you mean 'trunk'?); known: tokens, attend, embed, trunk, head"),
    ("an output that is not there", ("in: {x: embed,", "in: {x: embed.outt,"), "21:51: nodes.trunk.in.x: 'embed' has no output 'outt' (did you mean 'out'?); outputs: out, table"),
    ("a port that is not there", ("{x: norm, attend: attend}", "{x: norm, atend: attend}"), "15:44: blocks.layer.nodes.attention.in.atend: op 'attention' has no input 'atend' (did you mean 'attend'?); inputs: x, angles?, attend?"),
    ("an input that is not fed", ("in: {x: trunk, tokens: tokens}", "in: {x: trunk}"), "22:3: nodes.head: op 'x0_head' needs its input 'tokens' (int b l); inputs: x, tokens, table?"),
    ("too many inputs", ("norm: {op: rms_norm, in: x}", "norm: {op: rms_norm, in: [x, x]}"), "14:32: blocks.layer.nodes.norm.in[1]: op 'rms_norm' takes 1 input(s) (x), not 2"),
    ("a wrong kind of number", ("in: {x: trunk, tokens: tokens}", "in: {x: tokens, tokens: tokens}"), "22:24: nodes.head.in.x: input 'x' of op 'x0_head' wants float b l d, but int batch length comes in: float is not int\n21:3: nodes.trunk: node 'trunk' feeds no output"),
    ("too few axes", ("{x: norm, attend: attend}", "{x: norm, angles: x}"), "15:44: blocks.layer.nodes.attention.in.angles: input 'angles' of op 'attention' wants float 2 l r, but float batch length 16 comes in: 2 = 2, not batch; so far heads=2, b=batch, l=length, r=8"),
    ("heads that do not divide", ("heads: 2, depth", "heads: 3, depth"), "15:34: blocks.layer.nodes.attention.in.x: input 'x' of op 'attention' wants float b l heads*r, but float batch length 16 comes in: 16 does not fit heads*r; so far heads=3, b=batch, l=length"),
    ("an output of unknown size", (", out: float b l d, with", ", with"), "20:3: nodes.embed: output 'out' is float b l d, but nothing says how large d is: add 'out:' with its type"),
    ("a declared type that is wrong", ("out: float b l v}", "out: float b d v}"), "22:45: nodes.head.out: output 'out' of op 'x0_head' wants float b l v, but float batch 16 129 comes in: l = length, not 16; so far b=batch, l=length, d=16"),
    ("nodes in a circle", ("attention: {op: attention, in: {x: norm,", "attention: {op: attention, in: {x: mlp,"), "16:7: blocks.layer.nodes.attended: nodes feed each other in a circle: attended -> mlp -> attention -> attended"),
    ("an unknown block", ("block: layer", "block: laier"), "21:11: nodes.trunk.block: unknown block 'laier' (did you mean 'layer'?); known: layer"),
    ("an unknown alias", ("block: layer", "block: dit.layer"), "21:11: nodes.trunk.block: no alias 'dit' under 'use'; known: none"),
    ("a block within itself", ("norm: {op: rms_norm, in: x}", "norm: {block: layer, in: {x: x, attend: attend}}"), "14:14: blocks.layer.nodes.norm.block: blocks contain each other in a circle: layer -> layer"),
    ("a parameter that a block lacks", ('with: {heads: "${params.heads}"}\n  head', "with: {headz: 2}\n  head"), "21:87: nodes.trunk.with.headz: block 'layer' has no parameter 'headz' (did you mean 'heads'?); known: heads"),
    ("a repeat of nothing", ("depth: 2", "depth: 0"), "21:25: nodes.trunk.repeat: repeat is 0: it must be from 1 to 4096"),
    ("a repeat beyond bounds", ("depth: 2", "depth: 5000"), "21:25: nodes.trunk.repeat: repeat is 5000: it must be from 1 to 4096"),
    ("a repeat that does not close", ("outputs: {x: fed}", "outputs: {y: fed}"), "21:25: nodes.trunk.repeat: block 'layer' is repeated, but its output 'y' is none of its inputs: x, attend"),
    ("a node without use", ("  head:", "  spare: {op: add, in: [trunk]}\n  head:"), "22:3: nodes.spare: node 'spare' feeds no output"),
    ("an input that nothing reads", ("attend: bool b l}\noutputs: {log", "attend: bool b l, t: float b}\noutputs: {log"), "5:43: inputs.t: input 't' is never read"),
    ("an input that the engine does not feed", ("inputs: {tokens: int b l, attend: bool b l}", "inputs: {tokens: int b l, attend: bool b l, age: float b}\n#"), "5:45: inputs.age: input 'age' is never read"),
    ("an output that no objective reads", ("outputs: {log_x0: head}", "outputs: {logits: head}"), "6:1: outputs: a graph with a noise process has one output named log_score or log_x0"),
    ("half of a process", ("objective: {op: masked_count}\n", ""), "23:1: process: 'process' is given, but 'objective' is missing: all three belong together"),
    ("an objective that needs a mask", ("process: {op: absorb,", "process: {op: uniform,"), "24:1: objective: 'masked_count' needs a kernel with a mask, not 'uniform'"),
    ("a training key that is not known", ("train: {steps: 6,", "train: {stepz: 6,"), "27:9: train.stepz: unknown key (did you mean 'steps'?); known: accumulate, batch, budget_s, checkpoint, clip, compile, dtype, ema, evaluate, final, log_every, optimizer, sample, schedule, seed, steps, trackers, warmup"),
    ("a batch that does not divide", ("batch: 8", "batch: 8, accumulate: 3"), "27:1: train: batch = 8 is not a multiple of accumulate = 3"),
    ("a tokenizer of another size", ("size: 128", "size: 64"), "26:8: data.tokenizer: the tokenizer has 64 tokens, but the graph is built for 128 (states less the mask)"),
    ("an unknown corpus", ("data: {", "data: {corpus: {op: bultin}, "), "26:8: data.corpus: unknown op 'bultin' (did you mean 'builtin'?); known: builtin, text, jsonl, parquet, dataset"),
    ("both op and block", ("block: layer, repeat", "op: add, block: layer, repeat"), "21:3: nodes.trunk: give exactly one of 'op' and 'block'"),
    ("a saved port that is not there", ("repeat: \"${params.depth}\",", "repeat: \"${params.depth}\", save: {ports: [y]},"), "21:61: nodes.trunk.save.ports[0]: 'trunk' has no output 'y'; outputs: x"),
]  # fmt: skip


@pytest.mark.parametrize(("change", "message"), [(c, m) for _, c, m in CASES], ids=[n for n, _, _ in CASES])
def test_message(small: Callable[..., Path], change: tuple[str, str], message: str) -> None:
    path = small(change)
    with pytest.raises(BlueprintError) as error:
        check(path)
    found = str(error.value).replace(f"{path}:", "")
    assert sorted(found.split("\n")) == sorted(message.split("\n"))


def test_every_problem_of_a_stage_at_once(small: Callable[..., Path]) -> None:
    path = small(("op: rms_norm", "op: rmsnorm"), ("x0_head", "x0head"), ("token_embedding", "tokenembedding"))
    with pytest.raises(BlueprintError) as error:
        check(path)
    # within a block, what depends on a broken node is not reported again
    assert [p.line for p in error.value.problems] == [14, 20, 22] or [p.line for p in error.value.problems] == [20, 22]
