"""Frozen parameters and adapters: what is trained, what a checkpoint holds, and that merged is applied."""

from pathlib import Path
from typing import Any

import pytest
import torch

import sedd_graph
from sedd_graph.errors import BlueprintError
from sedd_graph.runs.check import check
from sedd_graph.runs.export import export_run
from sedd_graph.runs.open import open_run
from sedd_graph.runs.weight_source import open_source
from sedd_graph.training.adapters import merge, plain_parameters, plain_tensors
from sedd_graph.training.config import TrainConfig
from sedd_graph.training.optim import Average, make_optimizers
from tests.runs.exports import random_run

SMALL = ["params.dim=16", "params.heads=2", "params.depth=2", "params.cond=8", "params.tokens=20", "data=null"]
LORA = "train.adapters=[{op: lora, weights: [trunk.*.attention, head], rank: 3, alpha: 6}]"


def engine(name: str, *overrides: str) -> Any:
    sizes = [size for size in SMALL if name != "learn" or "cond" not in size]
    return sedd_graph.build(name, [*sizes, *overrides], device="cpu", compile="off")


def trained_step(made: Any, config: TrainConfig) -> tuple[dict[str, torch.Tensor], list[Any], Average]:
    """Train for two steps with weight decay; return the tensors of before, the optimizers and the average."""
    before = {name: value.clone() for name, value in made.model.state_dict().items()}
    optimizers, average = make_optimizers(dict(made.model.named_parameters()), config), Average(made.model, 0.9)
    rows = torch.randint(0, 20, (4, 16), generator=torch.Generator().manual_seed(0))
    for step in range(2):
        torch.manual_seed(step)
        made.loss(rows).mean().backward()
        for optimizer in optimizers:
            optimizer.step()
            optimizer.zero_grad(set_to_none=True)
        average.update()
    return before, optimizers, average


@pytest.mark.parametrize("name", ["learn", "sedd-reversible-tiny"])
def test_frozen_parameters_stay(name: str) -> None:
    """In layers that are stored and in reversible ones, with a frozen head in the chunked tail: gradients of the others
    are those of a model that is trained whole, and the frozen have neither gradient nor state."""
    freeze = ["embed", "trunk.0", "head.weight", "trunk.*.norm"] if name == "learn" else ["embed", "head", "trunk.0"]
    config = check(
        name, [*SMALL[:3], f"train.freeze={freeze}", "train.optimizer={op: adamw, lr: 1e-2, weight_decay: 0.5}"]
    ).train
    frozen, whole = engine(name, f"train.freeze={freeze}"), engine(name)
    rows = torch.randint(0, 20, (4, 16), generator=torch.Generator().manual_seed(0))
    gradients = []
    for made in (frozen, whole):
        made.model.train()
        with torch.no_grad():  # gates and heads that start at zero would hide gradients
            for number, parameter in enumerate(made.model.parameters()):
                parameter.add_(
                    torch.randn(parameter.shape, generator=torch.Generator().manual_seed(number)), alpha=0.02
                )
        torch.manual_seed(3)
        made.loss(rows).mean().backward()
        gradients.append({n: p.grad for n, p in made.model.named_parameters()})
    still = {n for n, p in frozen.model.named_parameters() if not p.requires_grad}
    assert {"embed.embed.weight", "head.weight"} <= still
    assert any(n.startswith("trunk.0.") for n in still)
    assert not any(n.startswith("trunk.1.") for n in still if ".norm." not in n)
    for n, gradient in gradients[0].items():
        assert (gradient is None) == (n in still), n
        if gradient is not None:
            torch.testing.assert_close(gradient, gradients[1][n], rtol=1e-4, atol=1e-6)
    frozen.model.zero_grad(set_to_none=True)
    before, optimizers, average = trained_step(frozen, config)
    held = {id(p) for o in optimizers for group in o.param_groups for p in group["params"]}
    for n, p in frozen.model.named_parameters():
        assert torch.equal(p.detach(), before[n]) == (n in still), n
        assert (id(p) in held) == (n not in still)
    assert average.state().keys() == {n for n, _ in frozen.model.named_parameters()} - still
    report = check(
        name,
        [*SMALL, f"train.freeze={freeze}"]
        if name != "learn"
        else [s for s in SMALL if "cond" not in s] + [f"train.freeze={freeze}"],
    )
    assert report.trained is not None
    assert sum(report.trained) == sum(p.numel() for p in frozen.model.parameters())
    assert report.trained[1] == sum(p.numel() for n, p in frozen.model.named_parameters() if n in still)


def test_a_pattern_that_matches_nothing_names_near_ones() -> None:
    sizes = [size for size in SMALL if "cond" not in size]
    with pytest.raises(BlueprintError, match=r"train.freeze.*'hed' matches no parameter \(did you mean 'head'\?\)"):
        check("learn", [*sizes, "train.freeze=[hed]"])
    with pytest.raises(BlueprintError, match="every parameter is frozen"):
        check("learn", [*sizes, 'train.freeze=["*"]'])
    with pytest.raises(BlueprintError, match="match no matrix"):
        check("learn", [*sizes, "train.adapters=[{op: lora, weights: [trunk.*.norm]}]"])
    with pytest.raises(BlueprintError, match="is not below the smaller size"):
        check("learn", [*sizes, "train.adapters=[{op: lora, weights: [head], rank: 16}]"])
    with pytest.raises(BlueprintError, match="is adapted already"):
        check("learn", [*sizes, "train.adapters=[{op: lora, weights: [head]}, {op: lora, weights: [head]}]"])


@pytest.mark.parametrize("name", ["learn", "sedd-reversible-tiny"])
def test_merged_is_applied(name: str, tmp_path: Path) -> None:
    """An adapter starts as the identity, is trained alone with ``freeze: ["*"]``, and merged gives the same outputs."""
    lora = LORA if name == "learn" else LORA.replace("trunk.*.attention", "trunk.*.qkv.weight")
    adapted, plain = engine(name, lora, 'train.freeze=["*"]'), engine(name)
    trained = {n for n, p in adapted.model.named_parameters() if p.requires_grad}
    assert trained
    assert all(".parametrizations." in n and n.endswith((".a", ".b")) for n in trained)
    assert plain_tensors(adapted.model).keys() == plain.model.state_dict().keys()
    assert plain_parameters(adapted.model).keys() == dict(plain.model.named_parameters()).keys()
    rows = torch.randint(0, 20, (4, 16), generator=torch.Generator().manual_seed(0))
    for target, value in plain_tensors(adapted.model).items():
        assert torch.equal(value, plain.model.state_dict()[target])  # adapters leave the other draws as they are
    with torch.no_grad():  # heads and gates that are zero would hide the rest
        for made in (adapted, plain):
            for number, (_, parameter) in enumerate(sorted(plain_parameters(made.model).items())):
                parameter.add_(
                    torch.randn(parameter.shape, generator=torch.Generator().manual_seed(number)), alpha=0.05
                )
    assert torch.equal(adapted.bound_rows(rows, seed=1), plain.bound_rows(rows, seed=1))
    config = TrainConfig.model_validate({"optimizer": {"op": "adamw", "lr": 3e-2}})
    before, _, _ = trained_step(adapted, config)
    for n, value in adapted.model.state_dict().items():
        assert torch.equal(value, before[n]) == (n not in trained), n
    # a folder that is saved is read with its adapters
    adapted.save(tmp_path / "saved")
    again = sedd_graph.build(tmp_path / "saved", device="cpu", compile="off")
    applied = adapted.bound_rows(rows, seed=1)
    assert torch.equal(again.bound_rows(rows, seed=1), applied)
    assert not torch.allclose(applied, plain.bound_rows(rows, seed=1), rtol=1e-3)
    merge(adapted.model)
    assert adapted.model.state_dict().keys() == plain.model.state_dict().keys()
    plain.model.load_state_dict(adapted.model.state_dict())
    torch.testing.assert_close(plain.bound_rows(rows, seed=1), applied, rtol=1e-6, atol=1e-6)


def test_export_and_from_merge_adapters(tmp_path: Path) -> None:
    """An export has no adapters and gives the bounds of the run, and so do the weights that ``--from`` takes of it."""
    run = random_run(tmp_path / "run", "learn", *SMALL[:1], "params.depth=2", LORA)
    export_run(run.path, tmp_path / "out", device=torch.device("cpu"))
    opened = open_run(tmp_path / "out", device="cpu", compile="off")
    rows = torch.randint(0, 60, (4, 16), generator=torch.Generator().manual_seed(0))
    bounds = opened.engine.bound_rows(rows, seed=1)
    torch.testing.assert_close(bounds, run.engine.bound_rows(rows, seed=1), rtol=1e-6, atol=1e-6)
    assert opened.report.train.adapters == []
    taken, own = open_source(run.path).tensors, opened.engine.model.state_dict()
    assert taken.keys() == own.keys()
    assert all(torch.equal(taken[name], value) for name, value in own.items())
