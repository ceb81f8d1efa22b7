"""Plans for a memory budget: the choice against enumeration, and gradients of what is chosen."""

import functools
import itertools
import json
import random
from pathlib import Path

import pytest
import torch
from torch import Tensor, nn

import sedd_graph
from sedd_graph.cli import main as cli
from sedd_graph.engine.engine import Engine
from sedd_graph.engine.layer_cost import retained
from sedd_graph.engine.memory_plan import LayerCost, choose, options
from sedd_graph.engine.network import Network
from sedd_graph.engine.running import RunningModule
from sedd_graph.errors import BlueprintError, UserError
from sedd_graph.graph.memory import planned
from sedd_graph.graph.model import Running
from sedd_graph.runs.check import check
from sedd_graph.runs.memory_plan import BudgetPlan, budget_plan
from sedd_graph.runs.open import make_engine

TINY = "blueprints/sedd-reversible-tiny.yaml"
CHANGES = ["params.dim=16", "params.heads=2", "params.cond=8", "params.depth=4", "data.length=16", "train.batch=4"]
TOKENS = torch.randint(0, 100, (3, 12), generator=torch.Generator().manual_seed(0))


def test_the_choice_is_that_of_enumeration() -> None:
    rng = random.Random(0)
    for _ in range(200):
        chains = []
        for _ in range(rng.randint(1, 3)):
            costs = {("store", 1.0): LayerCost(rng.uniform(1, 2), rng.randint(50, 90), rng.randint(0, 5))}
            for mode in (("store", 0.5), ("checkpoint", 1.0), ("reversible", 1.0)):
                if rng.random() < 0.7:
                    costs[mode] = LayerCost(rng.uniform(1, 4), rng.randint(0, 50), rng.randint(0, 20))
            chains.append(list(options(costs, rng.randint(1, 4), exact=False)))
        every = list(itertools.product(*chains))
        room = rng.randint(0, 800)
        chosen, fits = choose(chains, room)
        sizes = [(sum(o.size for o in choice), sum(o.seconds for o in choice)) for choice in every]
        fitting = [seconds for size, seconds in sizes if size <= room]
        assert fits == bool(fitting)
        if fits:
            assert sum(o.size for o in chosen) <= room
            assert sum(o.seconds for o in chosen) == pytest.approx(min(fitting))
        else:
            assert sum(o.size for o in chosen) == min(size for size, _ in sizes)


def test_options_of_a_chain() -> None:
    costs = {
        ("store", 1.0): LayerCost(1.0, 100),
        ("store", 0.5): LayerCost(1.1, 50),
        ("reversible", 1.0): LayerCost(1.4, 1, 20),
    }
    found = list(options(costs, 4, exact=True))
    assert len(found) == len({o.running for o in found}) == 2 + 4 + 3
    by_running = {option.running: (option.size, round(option.seconds, 9)) for option in found}
    assert by_running[Running("store", True)] == (400, 4.0)
    assert by_running[Running("store", True, 0.5)] == (200 + 50, 4.4)
    assert by_running[Running("reversible", True)] == (20 + 4 + 100, 5.6)  # one layer at work
    assert by_running[Running("reversible", True, 1.0, 3)] == (20 + 1 + 300, 4.4)


def engine(running: Running, compile: str = "off", *changes: str) -> Engine:
    report = check(TINY, [*CHANGES, *changes])
    object.__setattr__(report, "graph", planned(report.graph, {"trunk": running}))
    made = make_engine(report, device=torch.device("cpu"), compile=compile)  # type: ignore[arg-type]
    generator = torch.Generator().manual_seed(1)
    for parameter in made.model.parameters():
        nn.init.normal_(parameter, std=0.1, generator=generator)
    made.model.train()
    return made


def gradients(made: Engine) -> dict[str, Tensor]:
    torch.manual_seed(5)
    made.loss(TOKENS).sum().backward()
    return {name: p.grad for name, p in made.model.named_parameters() if p.grad is not None}


@pytest.mark.parametrize("exact", [False, True])
@pytest.mark.parametrize("memory", ["reversible", "checkpoint"])
@pytest.mark.parametrize("stored", [1, 2, 3])
def test_gradients_where_the_last_layers_are_stored(exact: bool, memory: str, stored: int) -> None:
    expected = gradients(engine(Running("store", exact)))
    found = gradients(engine(Running(memory, exact, 1.0, stored)))  # type: ignore[arg-type]
    assert found.keys() == expected.keys()
    for name, gradient in expected.items():
        if exact and not name.startswith("time."):  # which the end reads too: a sum in another order
            assert torch.equal(found[name], gradient), name
        else:
            assert torch.allclose(found[name], gradient, rtol=1e-4, atol=1e-5 * float(gradient.abs().max())), name


def test_the_memory_retained_falls_with_the_layers_that_reconstruct() -> None:
    found = []
    for stored in range(4):
        made = engine(Running("reversible", stored=stored))
        found.append(retained(functools.partial(made.loss, TOKENS), torch.device("cpu")))
    steps = [b - a for a, b in itertools.pairwise(found)]
    assert min(steps) > 20 * TOKENS.numel() * 16 * 4  # activations of a layer
    assert max(steps) < 1.1 * min(steps)


def test_layers_that_do_not_exist_are_refused() -> None:
    with pytest.raises(UserError, match="has 4 layers, of which 4 cannot be the last"):
        engine(Running("reversible", stored=4))


def test_shares_are_passed_to_the_compiler(monkeypatch: pytest.MonkeyPatch) -> None:
    compiled: list[tuple[str, float]] = []

    def note(module: nn.Module, share: float = 1.0) -> None:
        compiled.append((next(name for name, m in made.model.named_modules() if m is module), share))

    made = engine(Running("reversible", share=0.5, stored=1))
    monkeypatch.setattr("sedd_graph.engine.network.compile_in_place", note)
    network = made.network
    assert isinstance(network, Network)
    network.compile("block", None)
    assert compiled == [(f"trunk.{i}.{b}", 1.0) for i in range(3) for b in "fg"] + [("trunk.3", 0.5)]


@pytest.mark.slow
def test_a_share_of_the_activations_is_retained() -> None:
    sizes, found = [], []
    for share in (1.0, 0.5, 0.25):
        made = engine(Running("store", share=share), "block", "params.dim=64")
        found.append(gradients(made))
        inputs = {"tokens": TOKENS, "sigma": torch.rand(3)}
        sizes.append(retained(functools.partial(made.model.run, inputs), torch.device("cpu")))
    assert sizes[1] < 0.75 * sizes[0]
    assert sizes[2] < 0.5 * sizes[0]
    for name, gradient in found[0].items():
        assert all(torch.allclose(other[name], gradient, rtol=1e-3, atol=1e-5) for other in found[1:])


def plan(*changes: str) -> tuple[BudgetPlan | None, str]:
    said: list[str] = []
    found = budget_plan(check(TINY, [*CHANGES, *changes]), device=torch.device("cpu"), compiled=False, say=said.append)
    return found, "\n".join(said)


def test_plans_of_a_blueprint() -> None:
    assert plan("nodes.trunk.memory=auto") == (None, "")
    found, said = plan("nodes.trunk.memory=auto", "memory={budget: 100 GiB}")
    assert found is not None
    assert found.modes == {"trunk": Running("store")}
    assert "trunk: 4 of 4 layers stored" in said
    half, _ = plan("nodes.trunk.memory=auto", f"memory={{budget: {0.6 * found.size / 1000:.1f} kB}}")
    assert half is not None
    assert half.size <= 0.6 * found.size
    assert half.modes["trunk"].memory != "store"
    kept, said = plan("memory={budget: 100 GiB}")  # the blueprint sets memory: reversible
    assert kept is not None
    assert kept.modes == {}
    assert "no block whose memory may be chosen" in said


def test_a_budget_that_cannot_be_met_is_refused() -> None:
    with pytest.raises(UserError, match=r"memory\.budget: 1 KiB cannot be met: the least is 0\.\d+ MiB"):
        plan("nodes.trunk.memory=auto", "memory={budget: 1 KiB}")
    for wrong in ("2 gigabytes", "-1 GiB", "1e9 GiB", "12"):
        with pytest.raises(BlueprintError, match=r"memory\.budget"):
            check(TINY, [f"memory={{budget: {wrong}}}"])


def test_build_prints_and_records_the_plan(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    arguments = ["build", TINY, *CHANGES, "nodes.trunk.memory=auto", "memory={budget: 300 KiB}", "train.compile=off"]
    folders = ["--runs", str(tmp_path), "--path-to", str(tmp_path / "path")]
    assert cli.run([*arguments, "--proof", "quick", "--device", "cpu", *folders]) == 0
    assert "of 300 KiB for activations" in capsys.readouterr().out
    run = Path((tmp_path / "path").read_text())
    recorded = json.loads((run / "certificate.json").read_text())["memory"]["trunk"]
    assert recorded["memory"] in ("checkpoint", "reversible")
    found = sedd_graph.build(run, device="cpu", compile="off").model._modules["trunk"]
    assert isinstance(found, RunningModule)
    assert (found.memory, found.bound) == (recorded["memory"], 4 - recorded["stored"])
