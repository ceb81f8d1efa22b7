"""A family of processes that is written here is checked, built, trained and sampled without a line in the core."""

import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import pytest
import torch
import zarr
from torch import Tensor, nn

from sedd_graph.cli.main import run
from sedd_graph.component import registry as registries
from sedd_graph.component.base import Component, ComponentConfig, Context
from sedd_graph.component.check import Check, Proof
from sedd_graph.component.kinds import KINDS, Kind
from sedd_graph.component.outputs import Input, Output
from sedd_graph.component.registry import Registry, discover
from sedd_graph.diffusion.batch import Batch, Randomness
from sedd_graph.engine.network import Network
from sedd_graph.engine.process import OnDraw, Process, Setup
from sedd_graph.engine.regions import Model
from sedd_graph.engine.samples import SampleRequest, Samples, Stored
from sedd_graph.errors import UserError
from sedd_graph.families.table import FAMILIES, Family

BLUEPRINT = """
blueprint: 1
name: bags
axes: {b: batch, l: length, v: 128}
inputs: {tokens: int b l}
outputs: {log_frequency: head}
nodes:
  embed: {op: token_embedding, in: tokens, out: float b l 16, with: {vocab: v}}
  head: {op: linear, in: embed, out: float b l v, with: {width: v}}
process: {op: reorder, schedule: {op: loglinear}}
objective: {op: frequency}
sample: {op: bag, temperature: 0.5}
data: {tokenizer: {op: characters, size: 128}, length: 32}
train: {steps: 2, batch: 4, warmup: 1, compile: "off", log_every: 1, ema: null, evaluate: null, checkpoint: {every: 2}}
"""


class Part(Component):
    """Base of the components of bags; ``new_kinds`` makes it that of their kinds."""

    abstract = True


@pytest.fixture
def bags(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """The kinds, components and family of bags, registered for one test; a blueprint of them."""
    base, check = f"{__name__}:Part", "sedd_graph.testing.processes:check_kernel"
    for name, place in (("bag_kernel", "process"), ("bag_objective", "objective"), ("bag_sampler", "sample")):
        monkeypatch.setitem(KINDS, name, Kind(name, place, base, check, "bags"))

    class Reorder(Part, kind="bag_kernel"):
        class Config(ComponentConfig):
            pass

        extra_states = 0

        @classmethod
        def parametrizations(cls, config: ComponentConfig) -> tuple[tuple[Output, ...], ...]:
            return ((Output("log_frequency", "float b l v", "unnormalised log frequency of each token"),),)

        @classmethod
        def own_schedule(cls, config: ComponentConfig) -> None:
            return None

    class Frequency(Part, kind="bag_objective"):
        class Config(ComponentConfig):
            pass

        feeds = (Input("tokens", "int b l", "shuffled tokens", required=True),)

    class Bag(Part, kind="bag_sampler"):
        class Config(ComponentConfig):
            temperature: float = 1.0

    made = discover() | Registry.of({"reorder.v1": Reorder, "frequency.v1": Frequency, "bag.v1": Bag})
    monkeypatch.setattr(registries, "discover", lambda: made)
    monkeypatch.setattr(registries, "_installed", lambda path: (made, []))
    monkeypatch.setitem(FAMILIES, "bags", Family(f"{__name__}:BagProcess"))
    path = tmp_path / "bags.yaml"
    path.write_text(BLUEPRINT, encoding="utf-8")
    return path


class BagProcess(Process):
    """Bags of tokens: the order is noise. The network predicts how frequent each token is in the row."""

    family = "bags"
    batch_type = Batch
    refuses = {"prompt": "a bag has no positions"}

    def __init__(self, plan: Any, setup: Setup) -> None:
        super().__init__(plan, setup)
        self.sampler = setup.registry.component(plan.sampler_op)(plan.sampler.config, Context({"n": plan.states}))
        self.temperature = nn.Parameter(torch.zeros(()))

    def batch(self, rows: Any, device: torch.device) -> Batch:
        return (rows if isinstance(rows, Batch) else Batch.of(rows)).to(device)

    def draw(self, batch: Batch, *, random: Randomness, t: Tensor | None = None, xt: Tensor | None = None) -> Tensor:
        order = random.rand(*batch.tokens.shape).argsort(-1)
        return batch.tokens.gather(1, order)

    def loss(self, model: Model, draw: Any, batch: Any, key: Tensor | None) -> tuple[Tensor, dict[str, Tensor]]:
        outputs, saved = model.run({"tokens": draw}, key)
        frequency = outputs["log_frequency"].mean(1).log_softmax(-1)
        return -frequency.gather(1, batch.tokens).sum(1), saved

    def bound_rows(
        self,
        network: Network,
        batch: Any,
        parts: Sequence[range],
        *,
        seeds: Sequence[int],
        on_draw: OnDraw | None = None,
    ) -> Tensor:
        rows = [batch.part(part) for part in parts]
        return torch.cat([self.loss(network.model, own.tokens, own, None)[0].double() for own in rows])

    def sample(self, network: Network, request: SampleRequest) -> Samples:
        generator = request.generator(network.device)
        shape = (request.batch, request.length or 8)
        start = torch.randint(self.plan.states, shape, generator=generator)
        with network.evaluating():
            weights = network.run({"tokens": start})["log_frequency"].mean(1) / self.sampler.config.temperature
        rows = torch.multinomial(weights.softmax(-1), shape[1], replacement=True, generator=generator)
        return Samples(rows, {"evaluations": request.batch})

    def stored(self, samples: Samples, tokenizer: Any) -> Stored:
        return Stored({"tokens": samples.rows.numpy()}, self.texts(samples.rows, tokenizer))

    def conditions(self, changes: Mapping[str, Any]) -> None:
        if changes:
            raise UserError("a bag has no conditions")

    @classmethod
    def prove(cls, plan: Any, graph: Any, registry: Any, proof: Proof) -> list[Check]:
        return [
            Check("bags.count", "shuffling keeps the tokens of a row", holds=True, value="equal", how="by counting")
        ]


def test_a_new_family_goes_through_every_verb(bags: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    runs = ["--runs", str(tmp_path / "runs"), "--path-to", str(tmp_path / "at"), "--device", "cpu"]
    assert run(["build", str(bags), "--check"]) == 0
    assert "reorder with loglinear, 128 states; objective frequency; sampler bag" in capsys.readouterr().out
    assert run(["build", str(bags), *runs]) == 0
    assert "holds  bags.count  shuffling keeps the tokens of a row: equal" in capsys.readouterr().out
    folder = Path((tmp_path / "at").read_text())
    assert run(["train", str(folder), "--device", "cpu"]) == 0
    assert "held-out bound" in capsys.readouterr().out
    losses = [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()]
    assert [r["step"] for r in losses if "loss" in r] == [1, 2]
    found = json.loads((folder / "evaluation.json").read_text())
    assert (found["objective"], found["protocol"]["kernel"]) == ("frequency.v1", {"op": "reorder.v1"})
    assert run(["sample", str(folder), "--batch", "3", "--length", "9", "--device", "cpu"]) == 0
    group: Any = zarr.open_group(str(folder / "samples.zarr"), mode="r")
    assert group["tokens"].shape == (3, 9)
    assert group.attrs["sampler"] == "bag.v1"
    assert len(group["text"][:]) == 3
    assert (folder / "report.html").is_file()
    capsys.readouterr()
    assert run(["sample", str(folder), "--forbid", "a", "--device", "cpu"]) == 2
    assert capsys.readouterr().err == "a bag has no conditions\n"
    assert run(["infill", str(folder), "--prefix", "a", "--device", "cpu"]) == 2
    assert capsys.readouterr().err == "infill: a process of bags fills in no text\n"


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (("{log_frequency: head}", "{log_x0: head}"), "the kernel 'reorder' needs the output log_frequency"),
        (("objective: {op: frequency}", "objective: {op: nelbo}"), "must be of kind bag_objective: frequency"),
        (("sample: {op: bag, temperature: 0.5}", "sample: {op: analytic}"), "must be of kind bag_sampler: bag"),
        (
            ("temperature: 0.5}", "classifier: {op: token_counts}}"),
            "a process of bags takes no classifier: leave it out",
        ),
    ],
)
def test_its_plan_is_checked_by_what_its_components_declare(
    bags: Path, capsys: pytest.CaptureFixture[str], change: tuple[str, str], message: str
) -> None:
    assert change[0] in BLUEPRINT
    bags.write_text(BLUEPRINT.replace(*change), encoding="utf-8")
    assert run(["build", str(bags), "--check"]) == 2
    assert message in capsys.readouterr().err
