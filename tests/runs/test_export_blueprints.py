"""Every shipped blueprint of token rows, exported and opened by transformers in a process without sedd_graph."""

from pathlib import Path
from typing import Any

import pytest
import torch

from sedd_graph.blueprint.shipped import shipped_blueprints
from sedd_graph.cli import main as cli
from sedd_graph.component.base import Context
from sedd_graph.component.registry import installed
from sedd_graph.errors import UserError
from sedd_graph.runs.check import check
from sedd_graph.runs.export import export_run
from sedd_graph.runs.open import open_run
from tests.registry.test_backbone import KINDS, TEXT
from tests.runs.exports import LENGTH, SMALL, check_alone, prompt_of, random_run, record

pytest.importorskip("transformers", reason="the extra 'hub' is not installed")
pytestmark = [pytest.mark.slow, pytest.mark.timeout(3600)]

ALL_SAMPLERS = ("mdlm-tiny", "sedd-tiny", "unigram-tiny")
"""Blueprints of which every exported sampler is compared; of the others, the declared one."""

SIZES: dict[str, tuple[str, ...]] = {
    "bijective-text-tiny": ("params.dim=128",),
    "smollm2-blocks": (
        *("params.dim=16", "params.depth=2", "params.heads=4", "params.kv_heads=2", "params.hidden=24"),
        *("params.tokens=128", "data.tokenizer={op: characters, size: 128}"),
    ),
}
REFUSED = {
    "bijective-text-tiny": "arithmetic: exact",
    "d3pm-gaussian-tiny": "its tables hold 13,342,155 numbers",
    "neighbours-tiny": "kernel Neighbours cannot be exported",
}
FAMILIES = "its process generates"


def small(name: str) -> tuple[str, ...]:
    """Return overrides that make a shipped blueprint small."""
    return SIZES.get(name, SMALL)


def names() -> list[str]:
    return [
        name for name in shipped_blueprints() if "small" not in name and "medium" not in name and "text8" not in name
    ]


@pytest.fixture(scope="module")
def exported(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Any]:
    """All exports, checked in one process without sedd_graph: what was found, or the message of the refusal, by name."""
    root = tmp_path_factory.mktemp("exports")
    folders: list[Path] = []
    found: dict[str, Any] = {}
    jobs: list[tuple[str, Any, tuple[str, ...]]] = [(name, name, small(name)) for name in names()]
    for kind in KINDS:
        path = root / f"backbone-{kind}.yaml"
        path.write_text(TEXT.format(kind=kind, more=KINDS[kind]))
        jobs.append((f"backbone-{kind}", path, ()))
    for name, blueprint, overrides in jobs:
        if check(blueprint, ()).plan.family != "tokens":
            continue
        run = random_run(root / "runs" / name, blueprint, *overrides)
        folder = root / name
        try:
            done = export_run(run.path, folder, device=torch.device("cpu"), format="transformers")
        except UserError as error:
            found[name] = str(error)
            continue
        assert done.difference is not None
        record(run, Path(f"{folder}.pt"), _others(run, folder) if name in ALL_SAMPLERS else {})
        folders.append(folder)
    for folder, result in zip(folders, check_alone(folders, root), strict=True):
        found[folder.name] = {**result, "folder": folder}
    return found


def _others(run: Any, folder: Path) -> dict[str, Any]:
    """Return tokens of the other exported samplers, with their defaults, by name."""
    process, made = run.engine.process, {}
    text = (folder / next(f.name for f in folder.glob("generation_*.py"))).read_text()
    for contract in installed().contracts():
        if contract.kind != "sampler" or f"    '{contract.name}': lambda" not in text:
            continue
        if contract.op == run.plan.sampler_op:
            continue
        cls: Any = installed().component(contract.op)
        sampler, own = cls(cls.Config(), Context({"n": process.kernel.states})), process.parts
        process.parts = own._replace(sampler=sampler)
        steps = None if sampler.steps is None else 24  # analytic refuses fewer for unigram
        # a prompt, since the order of positions that are all alike, by entropy, is that of rounding
        made[contract.name] = (run.engine.sample(2, LENGTH, seed=5, prompt=prompt_of(run), steps=steps), steps)
        process.parts = own
    return made


def test_every_blueprint_of_token_rows_is_exported_or_refused_by_name(exported: dict[str, Any]) -> None:
    refused = {name: text for name, text in exported.items() if isinstance(text, str)}
    assert refused.keys() == REFUSED.keys()
    for name, text in REFUSED.items():
        assert text in refused[name]
    print(len(exported) - len(refused), "exported:", ", ".join(sorted(exported.keys() - refused.keys())))


def test_logits_and_tokens_are_those_of_the_run(exported: dict[str, Any]) -> None:
    for name, found in exported.items():
        if isinstance(found, str):
            continue
        assert found["logits"] <= 1e-5, name
        assert found["tokens"], name
        assert found["prompted"], name
        assert all(found["samplers"].values()), (name, found["samplers"])


def test_tokenizers_open_and_masks_are_filled(exported: dict[str, Any]) -> None:
    for name, found in exported.items():
        if isinstance(found, str) or "ids" not in found:
            continue
        assert found["ids"], name
        assert found["mask"][0] == found["mask"][1], name
        assert (found["mask"][0] is None) == ("filled" not in found), name


def test_what_was_exported_is_read_back(exported: dict[str, Any], tmp_path: Path) -> None:
    for name, found in exported.items():
        if isinstance(found, str):
            continue
        folder = found["folder"]
        assert cli.run(["import", "export", str(folder), "-o", str(tmp_path / name)]) == 0
        given = torch.load(f"{folder}.pt")
        back = open_run(tmp_path / name, device="cpu", compile="off")
        assert torch.equal(back.engine.sample(2, 16, seed=3, steps=given["steps"]), given["tokens"]), name
