"""Every shipped blueprint agrees with the schema, builds, and takes a training step and samples on a CPU.

Small ones are tested as they are; of the others width, depth, vocabulary and length are reduced. Parameter counts of
published models are compared with a formula that is written out here.
"""

import itertools
import json
from pathlib import Path
from typing import Any

import jsonschema
import pytest
import torch
from omegaconf import OmegaConf

import sedd_graph
from sedd_graph.blueprint.schema import Blueprint
from sedd_graph.engine.measure import measure
from sedd_graph.runs.check import Report, check
from tests.conftest import BLUEPRINTS, ROOT

BLOCKS = sorted((ROOT / "blueprints" / "blocks").glob("*.yaml"))
SMALL = 4_000_000
"""Largest number of parameters of a blueprint that is trained at its own size."""
SHRUNK = {"dim": 32, "heads": 2, "cond": 16, "tokens": 30, "kv_heads": 1, "hidden": 48, "depth": 2}


def read(path: Path) -> Any:
    """Read the file with OmegaConf (PyYAML reads ``1e-3`` as a string)."""
    return OmegaConf.to_container(OmegaConf.load(path), resolve=False)


def name_of(path: Path) -> str:
    return path.stem


@pytest.mark.parametrize("path", [*BLUEPRINTS, *BLOCKS], ids=name_of)
def test_header_names_the_schema_and_the_file_is_valid(path: Path) -> None:
    header = path.read_text(encoding="utf-8").splitlines()[0]
    prefix = "# yaml-language-server: $schema="
    assert header.startswith(prefix)
    schema = (path.parent / header.removeprefix(prefix)).resolve()
    assert schema == ROOT / "schema" / "blueprint.v1.json"
    jsonschema.validate(read(path), json.loads(schema.read_text(encoding="utf-8")))


@pytest.mark.parametrize("path", BLUEPRINTS, ids=name_of)
def test_name_description_and_header(path: Path) -> None:
    """The name is that of the file, and the first lines state what it is and how large."""
    report = check(path)
    blueprint = report.loaded.blueprint
    assert isinstance(blueprint, Blueprint)
    assert blueprint.name == path.stem
    assert blueprint.description
    lines = path.read_text(encoding="utf-8").splitlines()[1:]
    header = list(itertools.takewhile(lambda line: line.startswith("# "), lines))
    assert 2 <= len(header) <= 3
    assert f"{report.parameters:,} parameters" in " ".join(header)


def shrinking(path: Path) -> list[str]:
    """Return overrides that make every size small and keep the structure; the last one is for the depth."""
    params = read(path)["params"]
    return ["data=null", "train=null", *(f"params.{name}={size}" for name, size in SHRUNK.items() if name in params)]


def structure(report: Report) -> Any:
    """Return the steps of the graph with their inputs, recursively, without sizes."""

    def of(region: Any) -> Any:
        return [
            (step.name, step.inputs, of(step.body) if hasattr(step.body, "steps") else step.body.contract.op)
            for step in region.steps
        ]

    return of(report.graph.root)


def test_flow_trains_and_samples() -> None:
    engine = sedd_graph.build(ROOT / "blueprints" / "flow-tiny.yaml", device="cpu")
    rows = torch.randn(8, 1, 2, generator=torch.Generator().manual_seed(0))
    engine.loss(rows).mean().backward()
    silent = [n for n, p in engine.model.named_parameters() if p.grad is None or not bool(p.grad.isfinite().all())]
    assert silent == []
    drawn = engine.sample(8, seed=0)
    assert drawn.shape == (8, 1, 2)
    assert bool(drawn.isfinite().all())


@pytest.mark.parametrize("path", [p for p in BLUEPRINTS if not p.stem.startswith("flow")], ids=name_of)
def test_trains_and_samples(path: Path) -> None:
    report = check(path)
    overrides: list[str] = []
    length = report.data.length
    if report.parameters > SMALL:
        overrides, length = shrinking(path), 16
        assert structure(check(path, overrides[:-1])) == structure(report)  # at its full depth
    if "forbid:" in path.read_text(encoding="utf-8"):  # texts have tokens in a run folder alone
        overrides = [*overrides, "sample.forbid=[]"]
    engine = sedd_graph.build(path, overrides, device="cpu", compile="off")
    process: Any = engine.process
    kernel = process.kernel
    tokens = kernel.data_tokens
    rows = torch.randint(0, tokens, (2, length), generator=torch.Generator().manual_seed(0))
    loss = engine.loss(rows)
    assert loss.shape == (2,)
    assert bool((loss > 0).all() & loss.isfinite().all())
    optimizer = torch.optim.SGD(engine.model.parameters(), lr=1e-3)
    loss.mean().backward()
    silent = [n for n, p in engine.model.named_parameters() if p.grad is None or not bool(p.grad.isfinite().all())]
    assert silent == []
    optimizer.step()
    assert bool(engine.loss(rows).isfinite().all())
    if report.plan.family == "strings":  # strings of any length, padded with the start
        drawn = engine.sample(2, length, steps=None if process.sampler.steps is None else 2, seed=0)
        assert 1 <= drawn.shape[1] <= length
        drawn = torch.where(drawn == kernel.start, 0, drawn)
    else:
        drawn = engine.sample(2, length, steps=None if process.sampler.steps is None else 2, seed=0)
        assert drawn.shape == (2, length)
    assert 0 <= int(drawn.min()) <= int(drawn.max()) < tokens


def published(*, dim: int, depth: int, states: int, cond: int = 128) -> int:
    """Return the parameters of SEDD's and MDLM's DiT (their ``model/transformer.py`` and ``models/dit.py``).

    Linear maps with a bias: (in + 1) out; attention's two have none; a norm has a weight and no bias.
    """
    embedding = states * dim
    time = (256 + 1) * cond + (cond + 1) * cond  # 256 sinusoidal features, linear, SiLU, linear
    norms = 2 * dim
    attention = dim * 3 * dim + dim * dim
    mlp = (dim + 1) * 4 * dim + (4 * dim + 1) * dim
    modulation = (cond + 1) * 6 * dim  # shift, scale and gate of either half
    final = dim + (cond + 1) * 2 * dim + (dim + 1) * states  # norm, shift and scale, map to states
    return embedding + time + depth * (norms + attention + mlp + modulation) + final


@pytest.mark.parametrize(
    ("name", "sizes"),
    [
        ("sedd-small", {"dim": 768, "depth": 12, "states": 50_258}),
        ("sedd-medium", {"dim": 1024, "depth": 24, "states": 50_258}),
        ("sedd-uniform-small", {"dim": 768, "depth": 12, "states": 50_257}),
        ("mdlm-small", {"dim": 768, "depth": 12, "states": 50_258}),
        ("bd3lm-small", {"dim": 768, "depth": 12, "states": 50_258}),
    ],
)
def test_published_parameter_counts(name: str, sizes: dict[str, int]) -> None:
    report = check(ROOT / "blueprints" / f"{name}.yaml")
    assert report.parameters == published(**sizes)
    assert report.data.length == 1024


@pytest.mark.parametrize("path", [p for p in BLUEPRINTS if "tiny" in p.stem], ids=lambda p: p.stem)
def test_measure_counts_parameters_without_allocating(path: Path) -> None:
    report = check(path)
    found = measure(report.graph, report.registry, batch=2, length=8)
    assert found.parameters == report.parameters


def test_measure_counts_saved_bytes_with_exact_arithmetic() -> None:
    report = check(ROOT / "blueprints" / "sedd-reversible-tiny.yaml", ["nodes.trunk.arithmetic=exact"])
    assert measure(report.graph, report.registry, batch=2, length=8).saved_bytes > 0
