"""Reversible execution against ordinary autograd on the same parameters: values, gradients, memory, randomness."""

import json
import subprocess
import sys
import warnings
import weakref
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

import sedd_graph
from sedd_graph.cli import main as cli
from sedd_graph.diffusion.grid import Grid
from sedd_graph.engine.drift import DriftWarning
from sedd_graph.engine.engine import Engine
from sedd_graph.engine.layer_run import LayerRun
from sedd_graph.engine.running import RunningModule
from sedd_graph.errors import BlueprintError, DivergedError

TEXT = """
blueprint: 1
name: reversible
params: {depth: 4, memory: reversible, arithmetic: float, dropout: 0.1}
axes: {b: batch, l: length, d: 16, e: 8, v: 13}
inputs: {tokens: int b l, sigma: float b}
outputs: {log_score: head}
blocks:
  attend:
    params: {dropout: 0.1}
    inputs: {x: float b l d, c: float b e, angles: float 2 l r}
    outputs: {x: gate}
    nodes:
      norm: {op: layer_norm, in: x}
      modulate: {op: adaln_modulate, in: {x: norm, c: c}}
      attention: {op: attention, in: {x: modulate, angles: angles}, with: {heads: 2}}
      gate: {op: adaln_gate, in: {x: attention, c: c}, with: {dropout: "${params.dropout}"}}
  feed:
    params: {dropout: 0.1}
    inputs: {x: float b l d, c: float b e}
    outputs: {x: gate}
    nodes:
      norm: {op: layer_norm, in: x}
      modulate: {op: adaln_modulate, in: {x: norm, c: c}}
      mlp: {op: feed_forward, in: modulate}
      gate: {op: adaln_gate, in: {x: mlp, c: c}, with: {dropout: "${params.dropout}"}}
  couple:
    invertible: {given: [c, angles]}
    inputs: {x1: float b l d, x2: float b l d, c: float b e, angles: float 2 l r}
    outputs: {x1: y1, x2: y2}
    nodes:
      f: {block: attend, in: {x: x2, c: c, angles: angles}, with: {dropout: "${params.dropout}"}}
      y1: {op: add, in: [x1, f]}
      g: {block: feed, in: {x: y1, c: c}, with: {dropout: "${params.dropout}"}}
      y2: {op: add, in: [x2, g]}
    params: {dropout: 0.1}
nodes:
  embed: {op: token_embedding, in: tokens, out: float b l d, with: {vocab: v}}
  time: {op: sigma_embedding, in: sigma, out: float b e}
  rope: {op: rotary, in: embed.out, with: {dim: 8}}
  trunk:
    block: couple
    repeat: "${params.depth}"
    in: {x1: embed.out, x2: embed.out, c: time, angles: rope}
    with: {dropout: "${params.dropout}"}
    memory: reversible
    arithmetic: float
  join: {op: mean, in: [trunk.x1, trunk.x2]}
  head: {op: score_head, in: {x: join, tokens: tokens, sigma: sigma}, out: float b l v}
process: {op: absorb, schedule: {op: loglinear}}
objective: {op: score_entropy}
sample: {op: analytic, steps: 4}
"""


@pytest.fixture
def make(tmp_path: Path) -> Callable[..., Engine]:
    def engine(text: str = TEXT, *overrides: str, compile: Any = "off", std: float = 0.2) -> Engine:
        path = tmp_path / "b.yaml"
        path.write_text(text)
        made = sedd_graph.build(path, overrides, device="cpu", compile=compile)
        generator = torch.Generator().manual_seed(1)
        for parameter in made.model.parameters():  # gates and heads start at zero, which would hide what is behind them
            torch.nn.init.normal_(parameter, std=std, generator=generator)
        return made

    return engine


TOKENS = torch.randint(0, 12, (3, 10), generator=torch.Generator().manual_seed(0))


def gradients(engine: Engine, *, tokens: Tensor = TOKENS) -> dict[str, Tensor]:
    """Loss and gradients of one training step, dropout on."""
    torch.manual_seed(5)
    engine.model.train()
    engine.model.zero_grad(set_to_none=True)
    loss = engine.loss(tokens)
    loss.sum().backward()
    found = {name: p.grad for name, p in engine.model.named_parameters() if p.grad is not None}
    return {"loss": loss.detach(), **found}


def off(a: dict[str, Tensor], b: dict[str, Tensor]) -> float:
    assert a.keys() == b.keys()
    return max(float((a[k] - b[k]).norm() / b[k].norm().clamp(min=1e-12)) for k in a)


def trunk(engine: Engine) -> RunningModule:
    found = engine.model._modules["trunk"]
    assert isinstance(found, RunningModule)
    return found


@pytest.mark.parametrize("memory", ["reversible", "checkpoint"])
def test_gradients_are_those_of_stored_activations(make: Callable[..., Engine], memory: str) -> None:
    stored = gradients(make(TEXT, "nodes.trunk.memory=store"))
    assert len(stored) > 60
    assert off(gradients(make(TEXT, f"nodes.trunk.memory={memory}")), stored) < 2e-5


@pytest.mark.parametrize(
    ("depth", "compile"),
    [
        (1, "off"),
        (24, "off"),
        (128, "off"),
        (512, "off"),
        *(pytest.param(depth, "block", marks=pytest.mark.slow) for depth in (24, 128, 512)),
    ],
)
def test_exact_arithmetic_is_equal_to_the_last_bit(make: Callable[..., Engine], depth: int, compile: str) -> None:
    found = []
    for memory in ("store", "reversible"):
        changes = (f"params.depth={depth}", "nodes.trunk.arithmetic=exact", f"nodes.trunk.memory={memory}")
        engine = make(TEXT, *changes, std=0.05, compile=compile)
        found.append(gradients(engine))
    assert float(trunk(engine).drift or 0) == 0.0  # what was rebuilt is what went in
    stored, rebuilt = found
    assert stored.keys() == rebuilt.keys()
    assert [k for k in stored if not torch.equal(stored[k], rebuilt[k])] == []


@pytest.mark.parametrize(("depth", "bar"), [(24, 1e-5), (128, 1e-4)])
def test_gradients_in_float32_at_depth(make: Callable[..., Engine], depth: int, bar: float) -> None:
    found = [
        gradients(make(TEXT, f"params.depth={depth}", f"nodes.trunk.memory={m}", std=0.05))
        for m in ("store", "reversible")
    ]
    whole = [torch.cat([v.flatten() for k, v in f.items() if k != "loss"]) for f in found]
    assert float((whole[1] - whole[0]).norm() / whole[0].norm()) < bar


def test_what_is_kept_does_not_grow_with_depth(make: Callable[..., Engine]) -> None:
    def kept(depth: int, memory: str) -> int:
        engine = make(TEXT, f"params.depth={depth}", f"nodes.trunk.memory={memory}", std=0.05)
        engine.model.train()
        own = {p.untyped_storage()._cdata for p in engine.model.parameters()}
        packed = []

        class Held:
            def __init__(self, x: Tensor) -> None:
                self.x = x.detach()  # not x: an output that its own node saved would keep itself alive

        def pack(x: Tensor) -> Held:
            held = Held(x)
            packed.append(weakref.ref(held))  # lives as long as a graph wants it
            return held

        with torch.autograd.graph.saved_tensors_hooks(pack, lambda held: held.x):
            loss = engine.loss(TOKENS)
        storages = [held.x.untyped_storage() for ref in packed if (held := ref()) is not None]
        assert loss.requires_grad
        return sum({s._cdata: s.nbytes() for s in storages if s._cdata not in own}.values())

    slope = {m: (kept(12, m) - kept(4, m)) / 8 for m in ("store", "reversible", "checkpoint")}
    assert slope["store"] > 10_000
    assert slope["reversible"] <= 0.01 * slope["store"]
    assert slope["checkpoint"] <= 0.3 * slope["store"]
    assert kept(512, "reversible") <= kept(4, "reversible") * 1.01


def test_no_grad_and_evaluation_are_the_same(make: Callable[..., Engine]) -> None:
    found = []
    for memory in ("store", "reversible", "checkpoint"):
        engine = make(TEXT, f"nodes.trunk.memory={memory}")
        engine.model.eval()
        with torch.no_grad():
            found.append(engine.model(tokens=TOKENS, sigma=torch.tensor([0.1, 1.0, 3.0]))["log_score"])
    assert torch.equal(found[0], found[1])
    assert torch.equal(found[0], found[2])


def test_autocast_is_as_it_was(make: Callable[..., Engine]) -> None:
    def run(memory: str) -> dict[str, Tensor]:
        with torch.autocast("cpu", torch.bfloat16):
            torch.manual_seed(5)
            engine = make(TEXT, f"nodes.trunk.memory={memory}")
            loss = engine.loss(TOKENS).sum()
        loss.backward()  # outside: as training loops do
        return {n: p.grad for n, p in engine.model.named_parameters() if p.grad is not None}

    stored, rebuilt = run("store"), run("reversible")
    assert off(rebuilt, stored) < 0.05  # bfloat16 rounds a rebuilt stream's neighbours apart
    assert {k: v.dtype for k, v in rebuilt.items()} == {k: v.dtype for k, v in stored.items()}


def test_frozen_parameters_and_inputs_without_gradients(make: Callable[..., Engine]) -> None:
    found = []
    for memory in ("store", "reversible"):
        engine = make(TEXT, f"nodes.trunk.memory={memory}")
        for name, parameter in engine.model.named_parameters():
            parameter.requires_grad_(not (name.startswith("embed") or ".attention." in name))
        found.append(gradients(engine))
    assert not any(".attention." in name or name.startswith("embed") for name in found[0])
    assert off(found[1], found[0]) < 2e-5


SHIFTS = """
blueprint: 1
name: shifts
axes: {b: batch, l: length, d: 4}
inputs: {a: float b l d, c: float b l d}
outputs: {a: trunk.x}
blocks:
  shift:
    invertible: {given: [c]}
    inputs: {x: float b l d, c: float b l d}
    outputs: {x: y}
    nodes:
      shift: {op: feed_forward, in: c}
      y: {op: add, in: [x, shift]}
nodes:
  trunk: {block: shift, repeat: 3, in: {x: a, c: c}, memory: reversible}
"""


@pytest.mark.parametrize("frozen", [0, 1, 2])
@pytest.mark.parametrize("needs", [True, False])
def test_frozen_layers_whose_branches_read_no_stream(make: Callable[..., Engine], frozen: int, needs: bool) -> None:
    found = []
    a, c = torch.randn(2, 2, 3, 4, generator=torch.Generator().manual_seed(0)).unbind()
    for memory in ("store", "reversible"):
        engine = make(SHIFTS, f"nodes.trunk.memory={memory}")
        for name, parameter in engine.model.named_parameters():
            parameter.requires_grad_(not name.startswith(f"trunk.{frozen}."))
        engine.model.run({"a": a.clone().requires_grad_(needs), "c": c})[0]["a"].square().sum().backward()
        found.append({name: p.grad for name, p in engine.model.named_parameters() if p.grad is not None})
    assert {name.split(".")[1] for name in found[0]} == {"0", "1", "2"} - {str(frozen)}
    assert off(found[1], found[0]) < 2e-5


def test_one_parameter_in_two_units_of_a_layer(make: Callable[..., Engine]) -> None:
    found = []
    for memory in ("store", "reversible"):
        engine = make(TEXT, f"nodes.trunk.memory={memory}")
        modules = dict(engine.model.named_modules())
        for layer in range(4):
            for unit, name in (("norm", "weight"), ("modulate", "linear.weight"), ("gate", "linear.weight")):
                one, other = (
                    modules[f"trunk.{layer}.{branch}.{unit}"].get_submodule(name.rpartition(".")[0]) for branch in "fg"
                )
                setattr(other, name.rpartition(".")[2], getattr(one, name.rpartition(".")[2]))
        found.append(gradients(engine))
    assert off(found[1], found[0]) < 2e-5


OUT = TEXT.replace("    outputs: {x1: y1, x2: y2}\n", "    outputs: {x1: y1, x2: y2, c: c}\n")
CHANGED = TEXT.replace("    outputs: {x1: y1, x2: y2}\n", "    outputs: {x1: y1, x2: y2, c: twice}\n").replace(
    "      y1: {op: add,", "      twice: {op: scale, in: c, with: {by: 2.0}}\n      y1: {op: add,"
)
READ = "join: {op: mean, in: [trunk.x1, trunk.x2]}\n"
ONCE = '    repeat: "${params.depth}"\n'


def reading(text: str) -> str:
    """A network whose output depends on the conditioning that the trunk passes on."""
    added = "bias: {op: adaln_modulate, in: {x: join, c: trunk.c}}\n  head:"
    return text.replace("head: {op: score_head, in: {x: join,", f"{added} {{op: score_head, in: {{x: bias,")


@pytest.mark.parametrize(
    "text", [OUT, OUT.replace(ONCE, ""), CHANGED.replace(ONCE, "")], ids=["repeated", "once", "changed"]
)
def test_a_given_input_that_is_also_an_output(make: Callable[..., Engine], text: str) -> None:
    stored, found = (gradients(make(reading(text), f"nodes.trunk.memory={m}")) for m in ("store", "reversible"))
    assert off(found, stored) < 2e-5


def test_a_given_input_that_changes_from_layer_to_layer_is_refused(make: Callable[..., Engine]) -> None:
    with pytest.raises(BlueprintError, match="its given input 'c' differs from layer to layer"):
        make(reading(CHANGED))


def test_accumulation_adds_up(make: Callable[..., Engine]) -> None:
    found = []
    for memory in ("store", "reversible"):
        engine = make(TEXT, f"nodes.trunk.memory={memory}")
        torch.manual_seed(3)
        first, second = engine.loss(TOKENS), engine.loss(TOKENS.flip(0))  # two forward passes before any backward pass
        first.sum().backward()
        second.sum().backward()
        found.append({n: p.grad for n, p in engine.model.named_parameters() if p.grad is not None})
    assert off(found[1], found[0]) < 2e-5


def test_torchs_own_generator_is_left_alone(make: Callable[..., Engine]) -> None:
    engine = make()
    loss = engine.loss(TOKENS).sum()
    state = torch.get_rng_state()
    loss.backward()
    assert torch.equal(torch.get_rng_state(), state)


def test_taps_ride_along(make: Callable[..., Engine]) -> None:
    text = TEXT.replace("f: {block: attend,", "f: {save: {ports: [x]}, block: attend,").replace(
        "y1: {op: add, in: [x1, f]}", "y1: {op: add, in: [x1, f], save: {ports: [out]}}"
    )
    found = []
    for memory in ("store", "reversible", "checkpoint"):
        engine = make(text, f"nodes.trunk.memory={memory}", "params.dropout=0")
        engine.model.train()
        found.append(engine.model.run({"tokens": TOKENS, "sigma": torch.tensor([0.1, 1.0, 3.0])})[1])
    assert len(found[0]) == 8
    for other in found[1:]:
        assert all(torch.equal(other[name], value) for name, value in found[0].items())


@pytest.mark.slow
def test_two_processes_see_the_losses_of_one(tmp_path: Path) -> None:
    text = TEXT.replace("v: 13", "v: 129") + (
        "data: {tokenizer: {op: characters, size: 128}, length: 24}\n"
        "train: {steps: 4, batch: 8, accumulate: 2, warmup: 1, optimizer: {op: adamw, lr: 1e-2}, compile: off, log_every: 1,"
        " evaluate: null}\n"
    )
    (tmp_path / "b.yaml").write_text(text)
    found = []
    for memory, processes in (("store", 1), ("reversible", 2)):
        marker = tmp_path / "marker"
        arguments = ["build", str(tmp_path / "b.yaml"), f"nodes.trunk.memory={memory}", "--path-to", str(marker)]
        assert cli.run([*arguments, "--runs", str(tmp_path / memory), "--device", "cpu"]) == 0
        run = marker.read_text()
        command = [sys.executable, "-m"]
        if processes > 1:
            command += ["torch.distributed.run", "--standalone", "--nproc-per-node", "2", "-m"]
        done = subprocess.run(
            [*command, "sedd_graph", "train", run, "--device", "cpu"],
            capture_output=True,
            text=True,
            timeout=300,
            check=False,
        )
        assert done.returncode == 0, done.stderr[-2000:]
        records = [json.loads(line) for line in (Path(run) / "metrics.jsonl").read_text().splitlines()]
        found.append([r["loss"] for r in records if "loss" in r])
    assert len(found[0]) == 4
    assert found[1] == pytest.approx(found[0], rel=1e-5)


def test_drift_is_seen_and_answered(make: Callable[..., Engine]) -> None:
    engine = make()
    assert gradients(engine)
    assert float(trunk(engine).drift or 1) < 1e-4
    found = []
    for memory in ("reversible", "store"):
        engine = make(SHIFTS, f"nodes.trunk.memory={memory}")
        for parameter in engine.model.parameters():
            parameter.data *= 300  # branches so large that the sum loses the stream
        a, c = torch.randn(2, 2, 3, 4, generator=torch.Generator().manual_seed(0)).unbind()
        loss = engine.model.run({"a": a, "c": c})[0]["a"].square().sum()
        with warnings.catch_warnings(record=True) as warned:
            warnings.simplefilter("always")
            loss.backward()
        found.append({name: p.grad for name, p in engine.model.named_parameters() if p.grad is not None})
        if memory == "reversible":
            assert [w.category for w in warned] == [DriftWarning]
            assert (trunk(engine).memory, trunk(engine).fallback) == ("checkpoint", trunk(engine).drift)
            assert float(trunk(engine).drift or 0) > 1e-3
    assert off(*found) < 1e-6  # of the same step


def test_drift_is_measured_element_by_element(make: Callable[..., Engine], monkeypatch: pytest.MonkeyPatch) -> None:
    """Two swapped elements leave sum and sum of squares as they are."""
    engine = make()
    inverted = LayerRun.invert

    def swapped(run: LayerRun) -> None:
        inverted(run)
        for name in run.layout.streams:
            value = run.layout.inputs[name]
            run.values[value] = run.values[value][:, [1, 0, *range(2, 10)]]

    monkeypatch.setattr(LayerRun, "invert", swapped)
    with pytest.warns(DriftWarning):
        gradients(engine)
    assert trunk(engine).fallback is not None


def test_a_grid_that_is_left_is_an_error(make: Callable[..., Engine]) -> None:
    engine = make(TEXT, "nodes.trunk.arithmetic=exact")
    for name, parameter in engine.model.named_parameters():
        if name.startswith("trunk"):
            parameter.data *= 30
    with pytest.raises(DivergedError, match="it must stay below 128"):
        engine.loss(TOKENS)


INSIDE = """
blueprint: 1
name: inside
axes: {b: batch, l: length, d: 4}
inputs: {a: float b l d, c: float b l d}
outputs: {a: trunk.x1, c: trunk.x2}
blocks:
  mix:
    invertible: true
    inputs: {x1: float b l d, x2: float b l d}
    outputs: {x1: y1, x2: y2}
    nodes:
      t: {op: add, in: [x1, x2]}
      y1: {op: add, in: [t, x2]}
      y2: {op: sub, in: {x: x2, y: y1}}
nodes:
  trunk: {block: mix, repeat: 2, in: {x1: a, x2: c}, memory: reversible, arithmetic: exact}
"""


@pytest.mark.parametrize("training", [True, False])
def test_a_grid_that_an_inner_layer_leaves_is_an_error(make: Callable[..., Engine], training: bool) -> None:
    engine = make(INSIDE)
    x = torch.full((1, 2, 4), 126.0 + 2**-16)  # 378 in the first layer, -126 after the second
    with torch.set_grad_enabled(training), pytest.raises(DivergedError, match="it must stay below 128"):
        engine.model.run({"a": x.clone().requires_grad_(training), "c": x})


def test_out_of_range_without_waiting_for_the_device() -> None:
    grid, x = Grid(), torch.ones(3)
    assert torch.equal(grid.spoilt([x], torch.tensor(127.0))[0], x)
    for largest in (128.0, torch.nan, torch.inf):
        assert grid.spoilt([x], torch.tensor(largest))[0].isnan().all()


@pytest.mark.parametrize(
    ("old", "new", "message"),
    [
        (
            "    invertible: {given: [c, angles]}\n",
            "",
            "nodes.trunk.memory: block 'couple' does not claim to be invertible",
        ),
        ("g: {block: feed, in: {x: y1,", "g: {block: feed, in: {x: x1,", "blocks.couple.invertible:"),
        ("time: {op: sigma_embedding,", "time: {memory: store, op: sigma_embedding,", "are for blocks"),
    ],
)
def test_refusals(make: Callable[..., Engine], old: str, new: str, message: str) -> None:
    with pytest.raises(BlueprintError) as error:
        make(TEXT.replace(old, new))
    assert message in str(error.value)
