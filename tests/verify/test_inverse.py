"""Certificates of derived inverses: what is right holds, each kind of wrong is caught by the check that is named for it."""

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from jaxtyping import Float
from torch import Tensor, nn

import sedd_graph
from sedd_graph.cli import main as cli
from sedd_graph.component.base import Component, ComponentConfig, Context, solves
from sedd_graph.component.check import Check
from sedd_graph.component.contract import Algebra, Signature
from sedd_graph.component.registry import Registry, discover
from sedd_graph.engine.running import RunningModule
from sedd_graph.verify.inverse import prove_inverses
from tests.conftest import BLUEPRINTS

TEXT = """\
blueprint: 1
name: claimed
axes: {b: batch, l: length, d: 8, v: 129}
inputs: {tokens: int b l}
outputs: {log_x0: head}
blocks:
  layer:
    invertible: {CLAIM}
    inputs: {x: float b l d}
    outputs: {x: out}
    nodes: NODES
nodes:
  embed: {op: token_embedding, in: tokens, out: float b l d, with: {vocab: v}}
  trunk: {block: layer, repeat: 3, in: {x: embed}, memory: reversible}
  head: {op: x0_head, in: {x: trunk, tokens: tokens}, out: float b l v}
process: {op: absorb, schedule: {op: loglinear}}
objective: {op: masked_count}
sample: {op: ancestral, steps: 4}
data: {tokenizer: {op: characters, size: 128}, length: 16}
train: {steps: 2, batch: 4, warmup: 1, compile: "off", log_every: 1, evaluate: null}
"""


class Stretch(Component, kind="mixer"):
    """Each channel times a positive number."""

    class Config(ComponentConfig):
        pass

    def __init__(self, config: ComponentConfig, context: Context) -> None:
        super().__init__(config, context)
        self.log = nn.Parameter(torch.zeros(self.axis("d")))

    def forward(self, x: Float[Tensor, "b l d"]) -> Float[Tensor, "b l d"]:
        return x * self.log.exp()

    @solves("x", given=("out",), log_det="log_det")
    def inverse(self, out: Tensor) -> Tensor:
        return out * (-self.log).exp()

    def log_det(self, x: Tensor) -> Tensor:
        return self.log.sum().expand(len(x)) * x.shape[1]


class WrongInverse(Stretch):
    @solves("x", given=("out",), log_det="log_det")
    def inverse(self, out: Tensor) -> Tensor:
        return out * (-self.log).exp() * (1 + 1e-6)


class WrongVolume(Stretch):
    @solves("x", given=("out",), log_det="zero")
    def inverse(self, out: Tensor) -> Tensor:
        return out * (-self.log).exp()


class Unmeasured(Stretch):
    @solves("x", given=("out",))
    def inverse(self, out: Tensor) -> Tensor:
        return out * (-self.log).exp()


class Sine(Component, kind="mixer"):
    """Moves 0.8 times as far as its input."""

    bound = 0.8

    class Config(ComponentConfig):
        pass

    @classmethod
    def algebra(cls, config: ComponentConfig, signature: Signature) -> Algebra:
        return Algebra(lipschitz={("x", "out"): cls.bound})

    def forward(self, x: Float[Tensor, "b l d"]) -> Float[Tensor, "b l d"]:
        return 0.8 * torch.sin(x)


class WrongBound(Sine):
    bound = 0.5


class Noisy(Component, kind="mixer"):
    """Reads one half, and another number each time."""

    class Config(ComponentConfig):
        pass

    def forward(self, x: Float[Tensor, "b l d"]) -> Float[Tensor, "b l d"]:
        return x + 1e-3 * torch.randn_like(x)


PARTS = [Stretch, WrongInverse, WrongVolume, Unmeasured, Sine, WrongBound, Noisy]
NODES = {
    "one": "{out: {op: OP, in: x}}",
    "residual": "{f: {op: OP, in: x}, out: {op: add, in: [x, f]}}",
    "coupling": (
        "{half: {op: split, in: x, with: {sizes: [4, 4]}}, f: {op: OP, in: half.x0},"
        " y: {op: add, in: [half.x1, f]}, out: {op: concat, in: [y, half.x0]}}"
    ),
}


@pytest.fixture
def write(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Callable[..., Path]:
    names = {"".join(f"_{c.lower()}" if c.isupper() else c for c in part.__name__)[1:]: part for part in PARTS}
    together = discover() | Registry.of(names)
    monkeypatch.setattr("sedd_graph.component.registry._installed", lambda path: (together, []))

    def made(shape: str, op: str, claim: str = "level: injective") -> Path:
        path = tmp_path / "claimed.yaml"
        path.write_text(TEXT.replace("NODES", NODES[shape].replace("OP", op)).replace("CLAIM", claim))
        return path

    return made


def certificate(path: Path) -> dict[str, Check]:
    report = sedd_graph.check(path)
    made = prove_inverses(report.graph, report.registry, device=torch.device("cpu"))
    return {check.name.partition(".")[2]: check for one in made for check in one.checks}


@pytest.mark.parametrize(("shape", "op"), [("one", "stretch"), ("residual", "sine"), ("coupling", "feed_forward")])
def test_what_is_right_holds(write: Callable[..., Path], shape: str, op: str) -> None:
    found = certificate(write(shape, op))
    wanted = {"round_trip", "log_det", "gradients", "recompute", "float32", "bfloat16"}
    assert found.keys() == wanted | ({"contraction"} if shape == "residual" else set())
    assert [name for name, check in found.items() if check.holds is not True] == ["bfloat16"]
    assert " at 1, " in found["float32"].value


@pytest.mark.parametrize(
    ("shape", "op", "check", "others"),
    [
        ("one", "wrong_inverse", "round_trip", {"gradients"}),
        ("one", "wrong_volume", "log_det", set()),
        ("residual", "wrong_bound", "contraction", set()),
        ("coupling", "noisy", "recompute", {"round_trip", "gradients", "float32", "log_det"}),
    ],
)
def test_what_is_wrong_is_caught_by_name(
    write: Callable[..., Path], shape: str, op: str, check: str, others: set[str]
) -> None:
    failing = {name for name, one in certificate(write(shape, op)).items() if one.holds is False}
    assert check in failing
    assert failing <= {check} | others


def test_a_log_det_that_nobody_declares_is_a_note(write: Callable[..., Path]) -> None:
    found = certificate(write("one", "unmeasured"))["log_det"]
    assert (found.holds, found.value) == (None, "not run")
    assert "declares no log-determinant" in found.how


def test_torchs_own_generator_is_left_alone(write: Callable[..., Path]) -> None:
    path = write("one", "stretch")
    state = torch.get_rng_state()
    certificate(path)
    assert torch.equal(torch.get_rng_state(), state)


def test_exact_arithmetic_is_certified(write: Callable[..., Path]) -> None:
    path = write("coupling", "feed_forward")
    path.write_text(path.read_text().replace("memory: reversible", "memory: reversible, arithmetic: exact"))
    assert certificate(path)["exact"].value == "equal"


def test_build_refuses_with_the_check_and_its_number(
    write: Callable[..., Path], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert cli.run(["build", str(write("one", "wrong_inverse")), "--runs", str(tmp_path / "runs"), "--device", "cpu"]) == 2  # fmt: skip
    said = capsys.readouterr()
    assert "FAILS  layer.round_trip" in said.out
    assert "block 'layer' is not invertible as claimed: layer.round_trip: layer: its inputs are reconstructed from its outputs (1.0e-06)" in said.err  # fmt: skip
    assert not (tmp_path / "runs").exists()


def test_a_block_may_be_checkpointed_instead(
    write: Callable[..., Path], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    def memory(engine: Any) -> str:
        trunk = engine.model._modules["trunk"]
        assert isinstance(trunk, RunningModule)
        return trunk.memory

    path, marker = write("one", "wrong_inverse", "on_failure: checkpoint"), tmp_path / "marker"
    arguments = ["build", str(path), "--runs", str(tmp_path / "runs"), "--device", "cpu", "--path-to", str(marker)]
    assert cli.run(arguments) == 0
    assert (
        "warning     block 'layer' is checkpointed instead of reversible: layer.round_trip" in capsys.readouterr().out
    )
    run = Path(marker.read_text())
    found = json.loads((run / "certificate.json").read_text())
    assert found["checkpointed"] == ["trunk"]
    assert next(c["name"] for c in found["checks"] if c["holds"] is False) == "layer.round_trip"
    assert "fails</span>" in (run / "report.html").read_text()
    assert memory(sedd_graph.build(path, device="cpu", compile="off")) == "reversible"
    assert memory(sedd_graph.build(run, device="cpu", compile="off")) == "checkpoint"
    assert cli.run(["train", str(run), "--device", "cpu"]) == 0


@pytest.mark.parametrize("name", ["sedd-reversible-tiny", "sedd-iresnet-tiny", "sedd-bijective-mix-tiny"])
def test_shipped_blueprints_are_certified(name: str) -> None:
    found = certificate(next(p for p in BLUEPRINTS if p.stem == name))
    assert {"round_trip", "log_det", "gradients", "recompute", "float32"} <= found.keys()
    assert [c for c in found.values() if c.holds is False] == []


def test_a_claim_that_fails_and_one_that_is_not_run_are_told_apart() -> None:
    from sedd_graph.runs.prove import checks_text

    lines = checks_text([Check("a.b", "c", holds, "d", "e") for holds in (True, False, None)]).splitlines()
    assert [line.split()[0] for line in lines[1:]] == ["holds", "FAILS", "note"]
