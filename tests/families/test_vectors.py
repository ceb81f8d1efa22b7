"""Processes on vectors: training, bound, sampling, infilling, conditions, guidance, self-conditioning and messages."""

import itertools
import math
from pathlib import Path
from typing import Any

import pytest
import torch
from sedd_graph_registry.vectors.classifiers import EmbeddingCounts
from sedd_graph_registry.vectors.samplers import DDIM, DDPM
from torch import Tensor

import sedd_graph
from sedd_graph.component.base import Context
from sedd_graph.diffusion.batch import Batch, Randomness
from sedd_graph.diffusion.vectors.gaussian import kl
from sedd_graph.diffusion.vectors.parts import VectorParts
from sedd_graph.diffusion.vectors.sampler import VectorWalkSettings
from sedd_graph.engine.process import KERNEL
from sedd_graph.engine.samples import TextWithHoles
from sedd_graph.errors import BlueprintError, SeddGraphError, UserError
from sedd_graph.families.vectors import VectorProcess
from sedd_graph.verify.vectors_toy import Toy, placed
from tests.verify.planted_vectors import parts

BLUEPRINT = """
blueprint: 1
name: small
axes: {b: batch, l: length, w: 3, d: 16, v: 11}
inputs: {x: float b l w, timestep: float b}
outputs: {x0: down}
nodes:
  up: {op: projection, in: x, out: float b l d, with: {width: d}}
  time: {op: timestep_embedding, in: timestep, out: float b d, with: {frequencies: 16}}
  join: {op: condition_add, in: {x: up, c: time}}
  attention: {op: attention, in: join, with: {heads: 2}}
  down: {op: projection, in: attention, out: float b l w, with: {width: w}}
process: {op: gaussian, vocab: v, width: w, steps: 50, schedule: {op: stepwise, steps: 50}}
objective: {op: diffusion_lm}
sample: {op: ddpm, steps: 20}
"""
CONDITIONED = BLUEPRINT.replace("inputs: {x: float b l w,", "inputs: {x: float b l w, estimate: float b l w,").replace(
    "  up: {op: projection, in: x,", "  both: {op: add, in: [x, estimate]}\n  up: {op: projection, in: both,"
)


def made(tmp_path: Path, text: str = BLUEPRINT, *overrides: str) -> Any:
    path = tmp_path / "small.yaml"
    path.write_text(text, encoding="utf-8")
    return sedd_graph.build(path, list(overrides), device="cpu", compile="off")


def rows(count: int = 4, length: int = 6) -> Tensor:
    return torch.randint(0, 11, (count, length), generator=torch.Generator().manual_seed(3))


def test_the_loss_trains_network_and_embeddings(tmp_path: Path) -> None:
    engine = made(tmp_path)
    optimizer = torch.optim.Adam(engine.model.parameters(), lr=1e-2)
    torch.manual_seed(0)
    before = {name: p.detach().clone() for name, p in engine.model.named_parameters()}
    losses = []
    for _ in range(30):
        loss = engine.loss(rows(32)).mean()
        losses.append(float(loss.detach()))
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
    assert sum(losses[-5:]) < 0.85 * sum(losses[:5])
    names = {f"{KERNEL}.embedding", f"{KERNEL}.bias"}
    assert all(bool((p != before[n]).any()) for n, p in engine.model.named_parameters() if n in names)
    assert names <= set(engine.model.state_dict())


def test_a_split_batch_has_the_draws_of_the_whole(tmp_path: Path) -> None:
    process: VectorProcess = made(tmp_path).process
    whole = process.draw(Batch.of(rows(8)), random=Randomness(torch.Generator().manual_seed(1)))
    part = process.draw(Batch.of(rows(8)[4:]), random=Randomness(torch.Generator().manual_seed(1), start=4, total=8))
    for name in ("t", "start", "noise", "refined"):
        assert torch.equal(getattr(whole, name)[4:], getattr(part, name))


def test_padding_and_prompts_do_not_count(tmp_path: Path) -> None:
    engine = made(tmp_path)
    tokens = rows()
    corrupt = torch.ones_like(tokens, dtype=torch.bool)
    corrupt[:, :2] = False
    batch = Batch(tokens, torch.ones_like(corrupt), corrupt, corrupt)
    process: VectorProcess = engine.process
    draw = process.draw(batch, random=Randomness(torch.Generator().manual_seed(1)))
    clean, x0, xt = process.objective.vectors(draw, batch, process.kernel, process.schedule)
    assert torch.equal(x0[:, :2], clean[:, :2])
    assert torch.equal(xt[:, :2], clean[:, :2])
    assert bool((xt[:, 2:] != clean[:, 2:]).any(-1).all())
    with torch.no_grad():
        nats = engine.bound_rows(batch, seed=0)
        alone = engine.bound_rows(Batch.of(tokens), seed=0)
    assert bool(nats.isfinite().all())
    assert not torch.equal(nats, alone)


def test_bound_levels_and_rounding_accuracy(tmp_path: Path) -> None:
    engine = made(tmp_path)
    found: list[tuple[str, Tensor, Tensor]] = []
    nats = engine.bound_rows(rows(), seed=0, draws=2, on_draw=lambda *one: found.append(one))
    assert nats.shape == (4,)
    assert bool((nats > 0).all())
    assert [over for over, _, _ in found] == ["time", "time"]
    assert bool((found[0][1] * 50 >= 1.5).all())  # step 1 is the rounding term
    assert engine.process.caveat is None
    share = engine.measures(rows(), seed=0)["rounding_accuracy"]
    assert bool(((share >= 0) & (share <= 6)).all())


def test_kl_of_normals_against_torch() -> None:
    generator = torch.Generator().manual_seed(5)
    mean, other = torch.randn(2, 5, 3, generator=generator, dtype=torch.float64)
    variance, second = torch.rand(2, 5, generator=generator, dtype=torch.float64) + 0.1
    normal = torch.distributions.Normal
    expected = torch.distributions.kl_divergence(
        normal(mean, variance.sqrt()[:, None]), normal(other, second.sqrt()[:, None])
    )
    torch.testing.assert_close(kl(mean, variance, other, second), expected)


def test_the_bound_is_above_the_likelihood_of_a_wrong_network() -> None:
    """-log p of each token by simulating the generative process that the bound describes."""
    made_ = placed(parts())
    config = made_.kernel.config.model_copy(update={"steps": 20, "variance": "matched"})
    kernel = type(made_.kernel)(config, made_.kernel.context)
    kernel.load_state_dict(made_.kernel.state_dict())
    schedule, objective, count = made_.schedule, made_.objective, 8_000
    wrong = Toy(made_._replace(kernel=kernel)).denoiser(objective, "x0", count)
    run = wrong._run
    wrong._run = lambda inputs: {"x0": 0.95 * run(inputs)["x0"] + 0.1}
    rounded: list[Tensor] = []
    known = kernel.round

    def kept(x0: Tensor, allowed: Tensor | None = None) -> Tensor:
        rounded.append(x0)
        return known(x0, allowed)

    kernel.round = kept
    sampler = DDPM(DDPM.Config(steps=20), Context({"n": 3}))
    with torch.no_grad():
        sampler.run(wrong, settings(made_._replace(kernel=kernel), (count, 1)))
        chance = kernel.logits(rounded[-1].float()).softmax(-1).mean((0, 1)).double()
        generator = torch.Generator().manual_seed(6)
        for token in range(3):
            batch = Batch.of(torch.full((count, 1), token))
            draw = objective.bound_draw(batch, kernel, schedule, random=Randomness(generator))
            nats = objective.bound(wrong, draw, batch, kernel, schedule).double()
            nats = nats + objective.reconstruction(wrong, batch, kernel, schedule, random=Randomness(generator))
            likelihood, error = -math.log(float(chance[token])), float(nats.std()) / math.sqrt(count)
            assert likelihood - 0.03 < float(nats.mean()) + 4 * error
            assert float(nats.mean()) < likelihood + 2.5


def settings(parts_: VectorParts, shape: tuple[int, int], seed: int = 7, **more: Any) -> VectorWalkSettings:
    """Settings of a run without conditions."""
    return VectorWalkSettings(
        kernel=parts_.kernel,
        schedule=parts_.schedule,
        generator=torch.Generator().manual_seed(seed),
        tokens=torch.zeros(shape, dtype=torch.int64),
        free=torch.ones(shape, dtype=torch.bool),
        **more,
    )


# -- sampling -------------------------------------------------------------------------------------------------------


def test_given_forbidden_and_allowed_tokens(tmp_path: Path) -> None:
    engine = made(tmp_path)
    prompt = torch.tensor([[1, -1, -1, 4, -1, 7]])
    found = engine.sample(8, 6, seed=0, prompt=prompt)
    assert bool((found[:, [0, 3, 5]] == torch.tensor([1, 4, 7])).all())
    held = engine.process.conditions({"forbid": [0, 1, 2, 3]})
    assert int(engine.sample(16, 6, seed=0, conditions=held).min()) >= 4
    mask = torch.zeros(6, 11, dtype=torch.bool)
    mask[:, 5] = mask[2, 9] = True
    found = engine.sample(16, 6, seed=0, allowed=mask)
    assert bool((found[:, [0, 1, 3, 4, 5]] == 5).all())
    assert set(found[:, 2].tolist()) <= {5, 9}
    clamped = engine.process.conditions({"observed": "clamp"})
    assert clamped.observed == "clamp"
    assert bool((engine.sample(4, 6, seed=0, prompt=prompt, conditions=clamped)[:, 0] == 1).all())


@pytest.mark.parametrize("op", ["ddpm", "ddim"])
def test_samples_depend_on_the_seed_alone(tmp_path: Path, op: str) -> None:
    engine = made(tmp_path, BLUEPRINT.replace("op: ddpm", f"op: {op}"))
    frames: list[Tensor] = []
    first, again, other = (engine.sample(8, 6, seed=seed, on_step=lambda _, r: frames.append(r)) for seed in (4, 4, 5))
    assert torch.equal(first, again)
    assert other.shape == first.shape
    assert len(frames) == 3 * 21
    assert torch.equal(frames[0], frames[21])
    assert not torch.equal(frames[0], frames[42])


def test_implicit_sampling_at_eta_1_is_ancestral_with_small_variance() -> None:
    """DDIM at eta = 1 has the mean and variance of q(x_s | x_t, x_0) (arXiv 2010.02502, section 4.1)."""
    made_ = placed(parts())
    small = made_.kernel.config.model_copy(update={"variance": "small"})
    kernel = type(made_.kernel)(small, Context({"n": 3}))
    kernel.load_state_dict(made_.kernel.state_dict())
    toy, count, found = Toy(made_, 2), 5_000, []
    for sampler in (DDIM(DDIM.Config(eta=1.0), Context({"n": 3})), DDPM(DDPM.Config(), Context({"n": 3}))):
        denoise = toy.denoiser(made_.objective, "x0", count)
        found.append(sampler.run(denoise, settings(made_._replace(kernel=kernel), (count, 2)), steps=25))
    assert float((found[0] != found[1]).float().mean()) < 0.002  # of the same noise


def guided(updates: int, strength: float) -> tuple[Tensor, Tensor]:
    """Return token frequencies of guided samples, and those of the label, for tokens that are independent given it."""
    made_ = placed(parts())
    counts = torch.tensor([[7.0, 2.0, 1.0], [1.0, 1.0, 6.0]], dtype=torch.float64)
    each = (counts + 1e-6) / (counts + 1e-6).sum(-1, keepdim=True)
    pairs = torch.tensor(list(itertools.product(range(3), repeat=2)))
    chances = 0.5 * (each[:, pairs[:, 0]] * each[:, pairs[:, 1]]).sum(0)
    toy, count = Toy(made_, 2, chances), 4_000
    config = EmbeddingCounts.Config(
        counts=tuple(map(tuple, counts.tolist())), label=1, smoothing=1e-6, strength=strength, updates=updates
    )
    classifier = EmbeddingCounts(config, Context({"n": 3}))
    sampler = DDPM(DDPM.Config(steps=60), Context({"n": 3}))
    found = sampler.run(toy.denoiser(made_.objective, "x0", count), settings(made_, (count, 2), classifier=classifier))
    return torch.bincount(found.flatten(), minlength=3) / found.numel(), each[1]


def test_guidance_by_an_exact_classifier_samples_the_label() -> None:
    found, expected = guided(0, 1.0)
    assert float((found - expected).abs().sum()) < 0.05
    unguided, _ = guided(0, 0.0)
    assert float((unguided - expected).abs().sum()) > 0.3


def test_updates_of_a_classifier_move_samples_towards_the_label() -> None:
    found, expected = guided(3, 1.0)
    plain, _ = guided(0, 0.0)
    assert float(found[2]) > float(plain[2]) + 0.1
    assert float(expected[2]) > float(plain[2])


# -- self-conditioning ----------------------------------------------------------------------------------------------


def test_self_conditioning_evaluates_twice_and_feeds_the_last_estimate(tmp_path: Path) -> None:
    engine = made(tmp_path, CONDITIONED)
    process: VectorProcess = engine.process
    seen: list[Tensor] = []
    known = engine.network.run

    def run(inputs: Any, *more: Any) -> Any:
        seen.append(inputs["estimate"].clone())
        return known(inputs, *more)

    engine.network.run = run
    nats = engine.bound_rows(rows(), seed=0)
    assert bool(nats.isfinite().all())
    assert len(seen) == 4  # the bound and the rounding term, twice each
    assert [bool((v == 0).all()) for v in seen] == [True, False, True, False]
    seen.clear()
    engine.sample(2, 6, steps=3, seed=0)
    assert [bool((v == 0).all()) for v in seen] == [True, False, False]
    draw = process.draw(Batch.of(rows(64)), random=Randomness(torch.Generator().manual_seed(1)))
    assert int(draw.refined.sum()) == 32
    denoise = process.denoiser(engine.model.run, engine.model, Batch.of(rows(64)).attend, torch.arange(64).int())
    seen.clear()

    def trained(inputs: Any, key: Tensor | None = None) -> Any:
        seen.append(torch.zeros(0) if key is None else key)
        return run(inputs)

    denoise._run = trained
    process.objective.loss(denoise, draw, Batch.of(rows(64)), process.kernel, process.schedule)
    chosen, keys, first, second = draw.refined, seen[0], seen[1], seen[3]
    assert torch.equal(keys.long(), chosen.nonzero().flatten())  # half the rows have a first estimate, with their keys
    assert first.shape[0] == 32
    assert torch.equal((second != 0).any(-1).any(-1), chosen)
    engine.loss(rows()).mean().backward()


# -- messages -------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (("width: w, steps: 50", "width: 4, steps: 50"), "must have the width 4 of the kernel's vectors, not 3"),
        (("out: float b l w, with: {width: w}", "out: float b l v, with: {width: v}"), "reads a last axis of 3"),
        (("{x0: down}", "{log_x0: down}"), "has one output named x0 or logits"),
        (("op: stepwise, steps: 50", "op: learned"), "needs a schedule without trained parameters"),
        (("op: diffusion_lm", "op: nelbo"), "must be of kind vector_objective"),
        (("op: ddpm, steps: 20", "op: ddpm, steps: 20, matching: a"), "matching"),
        (
            ("steps: 20}", "steps: 20, classifier: {op: embedding_counts, label: 5, counts: [[1,2],[3,4]]}}"),
            "with a count for each of the model's 11 tokens",
        ),
        (("steps: 50}}", "form: linear, steps: 15}}"), "linear needs more than 15 steps"),
    ],
)
def test_wrong_blueprints_are_refused(tmp_path: Path, change: tuple[str, str], message: str) -> None:
    assert change[0] in BLUEPRINT
    with pytest.raises(BlueprintError) as error:
        made(tmp_path, BLUEPRINT.replace(*change))
    assert message in str(error.value)


@pytest.mark.parametrize(
    ("call", "message"),
    [
        (lambda e: e.sample(2, 6, steps=51), "51 steps are more than the 50 of the process"),
        (lambda e: e.sample(2), "give a length"),
        (lambda e: e.sample(2, 6, prompt=torch.full((1, 5), -1)), "prompt must be"),
        (lambda e: e.sample(2, 6, prompt=torch.full((1, 6), 11)), "this model has 11"),
        (lambda e: e.loss(rows(), xt=rows()), "noisy vectors cannot be given"),
        (lambda e: e.process.conditions({"matching": "a"}), "--matching"),
        (lambda e: e.sample(2, 6, allowed=torch.ones(5, dtype=torch.bool)), "allowed must be bool"),
        (
            lambda e: e.process.prompt(TextWithHoles(), None, length=4, prompts_trained=False, observed="clamp"),
            "--text",
        ),
    ],
)
def test_wrong_requests_are_refused(tmp_path: Path, call: Any, message: str) -> None:
    with pytest.raises((UserError, SeddGraphError)) as error:
        call(made(tmp_path))
    assert message in str(error.value)
