"""check_component, of every kind: what is sound passes, methods that only raise and wrong numbers are refused by name."""

import itertools
import types
from collections.abc import Iterable, Iterator, Mapping
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from jaxtyping import Float
from sedd_graph_registry.data.corpora import Builtin
from sedd_graph_registry.data.points import TwoMoons
from sedd_graph_registry.data.tokenizers import Bytes, BytesFactory
from sedd_graph_registry.noise.interpolating import Uniform
from sedd_graph_registry.noise.schedules import LogLinear
from sedd_graph_registry.objectives.bounds import MaskedCount
from sedd_graph_registry.sampling.classifiers import TokenCounts
from sedd_graph_registry.sampling.steps import Ancestral
from sedd_graph_registry.strings.birth_death import Delete
from sedd_graph_registry.strings.objectives import DISE
from sedd_graph_registry.strings.samplers import StringTau
from sedd_graph_registry.training.adapters import Lora
from sedd_graph_registry.training.distillation import Consistency
from sedd_graph_registry.training.optimizers import AdamW
from sedd_graph_registry.training.schedules import LinearDecay
from sedd_graph_registry.vectors.classifiers import EmbeddingCounts
from sedd_graph_registry.vectors.kernels import Gaussian
from sedd_graph_registry.vectors.objectives import DiffusionLM
from sedd_graph_registry.vectors.samplers import DDPM
from torch import Tensor

from sedd_graph.component.base import Component, ComponentConfig
from sedd_graph.component.kinds import KINDS
from sedd_graph.component.registry import discover
from sedd_graph.data.sources import Document
from sedd_graph.data.tokenizer import Ids, Tokenizer
from sedd_graph.diffusion.likelihood import Likelihood
from sedd_graph.diffusion.tokens.classifier import ClassifierConfig
from sedd_graph.diffusion.tokens.walk import SamplerConfig
from sedd_graph.diffusion.vectors.classifier import VectorClassifierConfig
from sedd_graph.diffusion.vectors.kernel import VectorKernelConfig
from sedd_graph.diffusion.vectors.sampler import VectorSamplerConfig
from sedd_graph.testing.conformance import ConformanceError, check_component
from sedd_graph.training.interfaces import Tracker

REGISTRY = discover()


def failures(cls: Any, config: Mapping[str, Any] | None = None, **more: Any) -> dict[str, str]:
    try:
        check_component(cls, config, **more)
    except ConformanceError as error:
        return dict(error.failures)
    return {}


# -- methods that only raise ----------------------------------------------------------------------------------------


class Labelled(ClassifierConfig):
    label: int = 0


class LabelledVectors(VectorClassifierConfig):
    label: int = 0


class Sized(VectorKernelConfig):
    vocab: int = 4
    width: int = 1


CONFIGS: dict[str, Any] = {
    "classifier": Labelled,
    "sampler": SamplerConfig,
    "string_sampler": ComponentConfig,
    "vector_classifier": LabelledVectors,
    "vector_kernel": Sized,
    "vector_sampler": VectorSamplerConfig,
}


def raises(*_: Any, **__: Any) -> Any:
    raise RuntimeError("not written yet")


def liar(kind: str) -> type:
    """A class of ``kind`` whose abstract methods only raise."""
    base = KINDS[kind].base_class()
    abstract = getattr(base, "__abstractmethods__", ())
    reads = ("x0",) if kind.startswith("vector") else ("log_x0",)
    body: dict[str, Any] = {"Config": type("Config", (CONFIGS.get(kind, ComponentConfig),), {}), "reads": reads}
    for name in abstract:
        body[name] = property(raises) if isinstance(getattr(base, name), property) else raises
    if kind == "vector_kernel":
        body["steps"] = 10  # the shipped objectives of vectors need discrete time
    if KINDS[kind].is_node:

        def forward(self: Any, x: Float[Tensor, "b l d"]) -> Float[Tensor, "b l d"]:
            raise RuntimeError("not written yet")

        body["forward"] = forward
    return types.new_class(f"Raises_{kind}", (base,), {"kind": kind}, lambda namespace: namespace.update(body))


@pytest.mark.parametrize("kind", KINDS)
def test_methods_that_only_raise_are_refused(kind: str) -> None:
    found = failures(liar(kind))
    assert found, kind
    assert any("not written yet" in text for text in found.values()), found


# -- wrong numbers --------------------------------------------------------------------------------------------------


class Grows(Component, kind="arithmetic"):
    """Another shape than declared."""

    class Config(ComponentConfig):
        pass

    def forward(self, x: Float[Tensor, "b l d"]) -> Float[Tensor, "b l d"]:
        return torch.cat([x, x], dim=-1)


class Doubled(Uniform, kind="kernel"):
    """Rates that are not those of its transitions."""

    def rate_matrix(self, sigma: float) -> Tensor:
        return 2 * super().rate_matrix(sigma)


class Slow(LogLinear, kind="schedule"):
    """A derivative that is not that of the total noise."""

    def dsigma(self, t: Tensor) -> Tensor:
        return 0.5 * super().dsigma(t)


class Halved(MaskedCount, kind="objective"):
    """Half of the bound."""

    def loss(self, *arguments: Any) -> Tensor:
        return super().loss(*arguments) / 2


class Unnormalised(Likelihood, kind="likelihood"):
    """A density without its constant."""

    class Config(ComponentConfig):
        pass

    def nats(self, z: Tensor) -> Tensor:
        return 0.5 * z.flatten(1).square().sum(1)

    def draw(self, shape: Any, *, generator: torch.Generator) -> Tensor:
        return torch.randn(list(shape), generator=generator)


class Repeats(Ancestral, kind="sampler"):
    """Every position gets the token of the first."""

    def walk(self, walk: Any, steps: int) -> None:
        super().walk(walk, steps)
        walk.x = walk.x[:, :1].expand_as(walk.x).clone()


class Unsure(TokenCounts, kind="classifier"):
    """Chances that do not sum to one."""

    def log_prob(self, x: Tensor, sigma: Tensor) -> Tensor:
        return super().log_prob(x, sigma) - 1.0


class Eager(Delete, kind="string_kernel"):
    """Heads that say 1 stand for twice the rate of insertions."""

    def weights(self, sigma: Tensor) -> Tensor:
        return 2 * super().weights(sigma)


class Lighter(DISE, kind="string_objective"):
    """Half of the bound."""

    def loss(self, *arguments: Any) -> Tensor:
        return super().loss(*arguments) / 2


class Stays(StringTau, kind="string_sampler"):
    """Noise is returned as it is."""

    def walk(self, walk: Any, steps: int) -> None:
        pass


class Blurred(Gaussian, kind="vector_kernel"):
    """Clean vectors that spread twice as far as declared."""

    def start(self, tokens: Tensor, schedule: Any, noise: Tensor) -> Tensor:
        return super().start(tokens, schedule, 2 * noise)


class Lower(DiffusionLM, kind="vector_objective"):
    """Half of the bound."""

    def bound(self, *arguments: Any) -> Tensor:
        return super().bound(*arguments) / 2


class Idle(DDPM, kind="vector_sampler"):
    """Noise is returned as it is."""

    def walk(self, walk: Any, times: Tensor) -> None:
        for _ in times:
            walk.end_step()


class Boasts(EmbeddingCounts, kind="vector_classifier"):
    """Chances that do not sum to one."""

    def log_prob(self, *arguments: Any) -> Tensor:
        return super().log_prob(*arguments) + 1.0


class Shuffled(Builtin, kind="corpus"):
    """Another order each time."""

    turns = itertools.count()

    def documents(self, root: Path) -> Iterator[Document]:
        found = [Document(text) for text in ("one two", "three four", "five six")]
        yield from found if next(self.turns) % 2 else found[::-1]


class Unseeded(TwoMoons, kind="points"):
    """Points of a generator of its own."""

    own = np.random.Generator(np.random.Philox(1))

    def points(self, root: Path, generator: np.random.Generator) -> Any:
        return super().points(root, self.own)


class Exchanged(Consistency, kind="distillation"):
    """The teacher is noisier than the student."""

    def at(self, process: Any, batch: Any, s: Tensor, t: Tensor, random: Any) -> Any:
        return super().at(process, batch, t, 0.5 * s, random)


class Shouts(Bytes):
    def encode(self, text: str) -> Ids:
        return super().encode(text.upper())


class ShoutsFactory(BytesFactory, kind="tokenizer"):
    """Text comes back in capitals."""

    def make(self, texts: Iterable[str], *, root: Path) -> Tokenizer:
        return Shouts()


class Climbs(AdamW, kind="optimizer"):
    """Steps uphill."""

    def make(self, parameters: Any) -> Any:
        return [torch.optim.SGD(list(parameters.values()), lr=0.1, maximize=True)]


class Shifts(Lora, kind="adapter"):
    """A matrix that is changed from the start."""

    def make(self, weight: Any) -> Any:
        made = super().make(weight)
        torch.nn.init.ones_(made.b)
        return made


class Negative(LinearDecay, kind="lr_schedule"):
    """A share below 0."""

    def share(self, progress: float) -> float:
        return 0.5 - progress


class Overwrites(Tracker, kind="tracker"):
    """Metrics that it changes."""

    class Config(ComponentConfig):
        pass

    def start(self, run: Path, name: str) -> None:
        pass

    def log(self, step: int, metrics: Any) -> None:
        metrics["loss"] = 0.0


WRONG: list[tuple[Any, dict[str, Any], str]] = [
    (Grows, {}, "shape"),
    (Doubled, {}, "kernel."),
    (Slow, {}, "schedule."),
    (Halved, {}, "objective.loss"),
    (Unnormalised, {}, "density"),
    (Unsure, {"counts": [[3, 1, 1], [1, 2, 2]], "label": 0}, "classifier.law"),
    (Repeats, {}, "sampler.law"),
    (Eager, {}, ""),
    (Lighter, {}, "objective."),
    (Stays, {}, "sampler."),
    (Blurred, {"vocab": 4, "width": 1}, "vectors.start"),
    (Lower, {}, "vectors.bound"),
    (Idle, {}, "vectors.step"),
    (Boasts, {"counts": [[3, 1, 1, 0], [1, 2, 2, 0]], "label": 0}, "classifier.normalised"),
    (Exchanged, {"divergence": "forward"}, "distill.optimum"),
    (Shuffled, {}, "determinism"),
    (Unseeded, {"count": 100}, "determinism"),
    (ShoutsFactory, {}, "round trip"),
    (Climbs, {}, "descent"),
    (Shifts, {"weights": ["*"]}, "identity"),
    (Negative, {}, "share"),
    (Overwrites, {}, "purity"),
]


@pytest.mark.parametrize(("cls", "config", "check"), WRONG, ids=lambda v: getattr(v, "__name__", None))
def test_wrong_numbers_are_refused_by_name(cls: Any, config: dict[str, Any], check: str) -> None:
    found = failures(cls, config)
    assert found, cls
    assert any(name.startswith(check) for name in found), found


def test_every_kind_has_a_liar_with_wrong_numbers() -> None:
    tried = {cls.kind for cls, _, _ in WRONG}
    assert tried == {name for name, kind in KINDS.items() if not kind.is_node} | {"arithmetic"}


# -- what is sound --------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "op",
    [
        *("add", "absorb", "loglinear", "masked_count", "score_entropy", "ancestral", "exact_likelihood"),
        *("delete", "edit_flow_loss"),
        *("builtin", "two_moons", "eight_gaussians", "characters", "bytes", "bpe", "adamw", "muon"),
        *("constant", "cosine_decay", "linear_decay", "pretrained"),
        *(
            pytest.param(op, marks=pytest.mark.slow)
            for op in ("analytic", "string_tau", "mask_delete", "edit_flow", "dise", "flexmdm", "flexmdm_tau")
        ),
    ],
)
def test_what_is_sound_passes(op: str) -> None:
    cls = REGISTRY.component(op)
    assert failures(cls, getattr(cls, "example", {})) == {}


def test_files_are_read_from_the_root(tmp_path: Path) -> None:
    (tmp_path / "a.jsonl").write_text('{"text": "one", "ask": "q"}\n{"text": "two", "ask": "r"}\n')
    (tmp_path / "a.txt").write_text("some text, and more of it")
    (tmp_path / "a.fna").write_text(">one\nACGT\nacgn\n>two\nGATTACA\n")
    np.save(tmp_path / "a.npy", np.zeros((4, 2), np.float32))
    cls = REGISTRY.component
    assert failures(cls("text"), {"files": ["*.txt"]}, root=tmp_path) == {}
    assert failures(cls("jsonl"), {"files": ["*.jsonl"]}, root=tmp_path) == {}
    assert failures(cls("jsonl"), {"files": ["*.jsonl"], "prompt": "ask"}, root=tmp_path) == {}
    assert failures(cls("fasta"), {"files": ["*.fna"], "reverse_complement": True}, root=tmp_path) == {}
    assert failures(cls("npy"), {"path": "a.npy"}, root=tmp_path) == {}
    assert "matches no file" in failures(cls("text"), {"files": ["*.md"]}, root=tmp_path)["raises"]


def test_a_tracker_that_is_installed_passes() -> None:
    pytest.importorskip("tensorboard")
    assert failures(REGISTRY.component("tensorboard")) == {}


def test_an_objective_without_a_partner_is_told_so() -> None:
    class Picky(MaskedCount, kind="objective"):
        def lacks(self, kernel: Any) -> str | None:
            return "a kernel of its own"

    assert "a kernel of its own" in failures(Picky)["partners"]


def test_a_given_partner_takes_the_place_of_the_built_in_ones() -> None:
    class Idle(Ancestral, kind="sampler"):
        reads = ()

    found = failures(MaskedCount, partners=(Idle,))
    assert "it reads" in found["partners"]
