"""The interface of a process: each family implements all of it, and refuses what it does not support by name."""

import inspect
import re
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any, cast

import pytest
import torch

import sedd_graph
from sedd_graph.engine.process import Process
from sedd_graph.engine.samples import SampleRequest, TextWithHoles
from sedd_graph.errors import BlueprintError, UserError
from sedd_graph.families.table import FAMILIES, process_class
from sedd_graph.runs.check import check
from tests.conftest import ROOT

GRAPH = "this blueprint is a graph without a process: add process, objective and sample to train or sample"
METHODS = {name: member for name, member in vars(Process).items() if inspect.isfunction(member)}
BLUEPRINT_OF = {"tokens": "first", "strings": "did-tiny", "vectors": "diffusion-lm-tiny", "points": "flow-tiny"}
SMALL = {
    "tokens": ["params.dim=16", "params.heads=2", "params.depth=1"],
    "strings": ["params.dim=16", "params.heads=2", "params.cond=8", "params.depth=1"],
    "vectors": ["params.dim=16", "params.heads=2", "params.depth=1"],
    "points": ["params.depth=1", "params.hidden=8"],
}


@pytest.mark.parametrize("family", FAMILIES)
def test_a_family_implements_every_method_of_the_interface(family: str) -> None:
    cls = process_class(family)
    assert issubclass(cls, Process)
    assert not inspect.isabstract(cls)
    assert cls.family == family
    assert set(cls.refuses) <= {*SampleRequest.__dataclass_fields__}
    if cls.trains:
        assert callable(cls.batch_type)
    for name, declared in METHODS.items():
        found = inspect.signature(getattr(cls, name)).parameters
        variadic = any(p.kind is p.VAR_KEYWORD for p in found.values())
        named = [p for p in inspect.signature(declared).parameters if p != "self"]
        assert variadic or [p for p in found if p != "self"] == named, name


@pytest.mark.parametrize("family", BLUEPRINT_OF)
def test_the_smallest_blueprint_of_a_family_goes_through_the_interface(family: str) -> None:
    path = ROOT / "blueprints" / f"{BLUEPRINT_OF[family]}.yaml"
    engine = sedd_graph.build(path, SMALL[family], device="cpu", compile="off")
    process = engine.process
    rows = process.example(3, 8)
    batch = process.batch(rows, engine.device)
    assert len(batch) == 3
    assert batch.counted.shape == (3,)
    assert engine.loss(rows).shape == (3,)
    bound = engine.bound_rows(rows, seed=0)
    assert (bound.shape, bound.dtype, bound.device.type) == ((3,), torch.float64, "cpu")
    assert torch.equal(bound, engine.bound_rows(rows, seed=0))
    fields: dict[str, Any] = {} if "steps" in process.refuses else {"steps": 2}
    length = None if "length" in process.refuses else 8
    samples = engine.generate(SampleRequest(batch=2, length=length, seed=0, **fields))
    assert len(samples.rows) == 2
    assert torch.equal(samples.rows, engine.sample(2, length, seed=0, **fields))
    assert process.describe() in repr(engine)
    assert [c.name for c in process.check_network(engine.network) if c.holds is False] == []


REFUSED = [(family, name) for family in FAMILIES for name in process_class(family).refuses]


@pytest.mark.parametrize(("family", "name"), REFUSED)
def test_a_refused_field_is_named_with_its_reason(family: str, name: str) -> None:
    path = ROOT / "blueprints" / f"{BLUEPRINT_OF[family]}.yaml"
    engine = sedd_graph.build(path, SMALL[family], device="cpu", compile="off")
    value: Any = {"length": 8, "steps": 2}.get(name, object())
    fields = {"batch": 1, "length": 8, name: value}
    if "length" in engine.process.refuses and name != "length":
        del fields["length"]
    with pytest.raises(UserError) as error:
        engine.generate(SampleRequest(**fields))
    assert str(error.value) == f"sample: {engine.process.refuses[name]}: leave {name} out"


def test_a_graph_without_a_process_refuses_with_one_message(small: Callable[..., Path]) -> None:
    path = small(
        ("process: {op: absorb, schedule: {op: loglinear}}\n", ""),
        ("objective: {op: masked_count}\n", ""),
        ("sample: {op: ancestral, steps: 8}\n", ""),
    )
    report = check(path)
    assert (report.plan.family, report.plan.states, report.plan.describe()) == ("graph", 0, "")
    engine = sedd_graph.build(path, device="cpu", compile="off")
    tokens, unused = torch.zeros(1, 4, dtype=torch.int64), cast("Any", None)
    calls: list[Callable[[], object]] = [
        lambda: engine.loss(tokens),
        lambda: engine.bound([tokens]),
        lambda: engine.sample(1, 4),
        lambda: engine.process.conditions({}),
        lambda: engine.process.prompt(
            TextWithHoles(text="a"), unused, length=4, prompts_trained=False, observed="clamp"
        ),
        lambda: report.plan.objective_op,
        lambda: report.plan.sampler_op,
        report.plan.record,
        report.plan.sampling,
    ]
    for call in calls:
        with pytest.raises(UserError, match=f"^{re.escape(GRAPH)}$"):
            call()
    assert engine.process.prove(report.plan, report.graph, report.registry, "full") == []


# -- plans that do not fit their graph -----------------------------------------------------------------------------

SUBSTITUTE = "  substitute: {op: substitution_head, in: {x: modulate, tokens: tokens}, out: float b l v}\n"
DELETE = "  delete: {op: deletion_head, in: modulate, out: float b l}\n"
HEAD = "  head: {op: x0_head, in: {x: norm, tokens: tokens}, out: float b l v, with: {bias: none}}\n"
PLANS: dict[str, tuple[str, list[tuple[str, str]], str]] = {
    # blueprint, texts and what replaces them, the message
    "a missing output of strings": (
        "editflow-tiny", [(", log_substitute: substitute", ""), (SUBSTITUTE, "")],
        "outputs: the kernel 'edit_flow' needs the output log_substitute: float b l v (",
    ),
    "a superfluous output of strings": (
        "editflow-tiny", [("mean_length: 4", "mean_length: 0")],
        "outputs.log_delete: the kernel 'edit_flow' does not read the output 'log_delete': leave it out",
    ),
    "a missing output of births": (
        "indel-tiny", [(", log_delete: delete", ""), (DELETE, "")],
        "outputs: the kernel 'indel' needs the output log_delete: float b l (",
    ),
    "an output of another kernel": (
        "did-tiny", [("{log_insert: insert}", "{log_insert: insert, log_delete: delete}"), ("process:", DELETE + "process:")],
        "outputs.log_delete: the kernel 'delete' does not read the output 'log_delete': leave it out",
    ),
    "an output with another name": (
        "flexmdm-tiny", [("log_gap: gap", "gaps: gap")],
        "outputs: the kernel 'mask_delete' needs the output log_gap: float b l (",
    ),
    "an output of another type": (
        "indel-tiny", [("log_delete: delete", "log_delete: insert"), (DELETE, "")],
        "outputs.log_delete: must be float b l, not float batch length 128",
    ),
    "outputs of two sizes": (
        "editflow-tiny", [("  insert: {op: insertion_head, in: modulate, out: float b l v}", "  insert: {op: insertion_head, in: modulate, out: float b l v-1}")],
        "outputs.log_substitute: must have the 127 states of log_insert, not 128",
    ),
    "a missing output of tokens": (
        "first", [("{log_x0: head}", "{logits: head}")],
        "outputs: a graph with the kernel 'absorb' has one output named log_score or log_x0",
    ),
    "two outputs of tokens": (
        "first", [("{log_x0: head}", "{log_x0: head, log_score: head}")],
        "outputs: a graph with the kernel 'absorb' has one output named log_score or log_x0",
    ),
    "an output that no kernel of tokens reads": (
        "first", [("{log_x0: head}", "{log_x0: head, hidden: norm}")],
        "outputs.hidden: the kernel 'absorb' does not read the output 'hidden': leave it out",
    ),
    "one state of tokens": (
        "first", [(HEAD, "  head: {op: linear, in: norm, out: float b l 1, with: {width: 1}}\n")],
        "outputs.log_x0: must be float b l v with two or more states v, not float batch length 1",
    ),
    "an input that is misspelled": (
        "did-tiny", [("sigma: float b", "sgma: float b"), ("in: sigma", "in: sgma")],
        "inputs.sgma: objective 'dise' feeds no input 'sgma' (did you mean 'sigma'?); it feeds: ",
    ),
    "an input of another type": (
        "first",
        [("{tokens: int b l}", "{tokens: int b l, sigma: float b l d}"), ("  norm:", "  sum: {op: add, in: [trunk, sigma]}\n  norm:"), ("in: trunk}", "in: sum}")],
        "inputs.sigma: objective 'masked_count' feeds 'sigma' as float b, not float batch length 128",
    ),
    "a missing section": (
        "first", [("objective: {op: masked_count}\n", "")],
        "process: 'process' is given, but 'objective' is missing: all three belong together",
    ),
    "a classifier of strings": (
        "did-tiny", [("steps: 128}", "steps: 128, classifier: {op: token_counts, file: a.npy, label: 0}}")],
        "sample.classifier: a process of strings takes no classifier: leave it out",
    ),
}  # fmt: skip


@pytest.mark.parametrize("name", PLANS)
def test_a_plan_that_does_not_fit_is_refused_by_name(name: str, tmp_path: Path) -> None:
    blueprint, changes, message = PLANS[name]
    text = (ROOT / "blueprints" / f"{blueprint}.yaml").read_text(encoding="utf-8")
    for old, new in changes:
        assert old in text, old
        text = text.replace(old, new)
    path = tmp_path / f"{blueprint}.yaml"
    path.write_text(text, encoding="utf-8")
    shutil.copytree(ROOT / "blueprints" / "blocks", tmp_path / "blocks")
    with pytest.raises(BlueprintError) as error:
        check(path)
    assert message in str(error.value)
    assert all(problem.line for problem in error.value.problems)
