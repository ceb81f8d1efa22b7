"""Block diffusion: who sees whom, the bound against enumeration and an autoregressive sum, writing with and without memory."""

import itertools
import math
import re
import shutil
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

import sedd_graph
from sedd_graph.diffusion.batch import Batch, Randomness
from sedd_graph.diffusion.conditions.constraint import Matching
from sedd_graph.diffusion.tokens.block_diffusion import block_inputs, write_blocks
from sedd_graph.diffusion.tokens.walk import WalkSettings
from sedd_graph.engine.block_cache import cached, uncached
from sedd_graph.engine.engine import Engine
from sedd_graph.errors import BlueprintError, UserError
from sedd_graph.families.plan import ProcessPlan
from sedd_graph.families.tokens import make_parts
from sedd_graph.runs.check import check
from sedd_graph.verify.block_diffusion import prove_blocks
from sedd_graph.verify.tokens import prove_objective, prove_sampler
from tests.conftest import ROOT
from tests.plans import maker

TINY = ROOT / "blueprints" / "bd3lm-tiny.yaml"
V, L = 3, 4
MASK = V
SIZES = ["params.dim=16", "params.heads=2", "params.depth=2", "params.cond=8", f"params.tokens={V}", "data=null"]
SEQUENCES = torch.tensor(list(itertools.product(range(V), repeat=L)))


def network(block: int, *more: str) -> Engine:
    """A small network with gates and head off zero."""
    engine = sedd_graph.build(TINY, [*SIZES, f"objective.block={block}", "objective.clip=null", *more], device="cpu", compile="off")  # fmt: skip
    generator = torch.Generator().manual_seed(1)
    with torch.no_grad():
        for p in engine.model.parameters():
            p.add_(torch.randn(p.shape, generator=generator) * 0.2)
    engine.model.eval()
    return engine


def table(engine: Engine, block: int) -> Tensor:
    """-log of the chance to write each sequence, averaged over orders, and of the averaged chance: float64 [81, 2].

    One token at a time: the network is asked afresh about a block whose other masks still stand.
    """
    bound, law = torch.zeros(V**L, dtype=torch.float64), torch.zeros(V**L, dtype=torch.float64)
    rows, t = torch.arange(V**L), torch.zeros(V**L)
    for start in range(0, L, block):
        truth, orders = SEQUENCES[:, start : start + block], []
        for order in itertools.permutations(range(block)):
            x, total = torch.full_like(truth, MASK), torch.zeros(V**L, dtype=torch.float64)
            for place in order:
                with torch.no_grad():
                    said = uncached(engine.model, block, SEQUENCES[:, :start])(x, t, rows)["log_x0"]
                total += said[rows, place, truth[:, place]].double()
                x[:, place] = truth[:, place]
            orders.append(total)
        each = torch.stack(orders)
        bound -= each.mean(0)
        law += each.exp().mean(0).log()
    return torch.stack([bound, -law], dim=1)


def test_the_view_is_that_of_the_paper() -> None:
    """Rows and columns noised 0-3, clean 0-3, blocks of two; written out by hand after figure 4 of arXiv 2503.09573."""
    inputs = block_inputs(torch.zeros(1, 4).long(), torch.zeros(1, 4).long(), block=2)
    by_hand = ["11000000", "11000000", "00111100", "00111100", "00001100", "00001100", "00001111", "00001111"]
    assert ["".join(str(int(v)) for v in row) for row in inputs["sees"]] == by_hand
    assert inputs["places"].tolist() == [0, 1, 2, 3, 0, 1, 2, 3]


@pytest.mark.parametrize("block", [1, 2, 4])
def test_the_bound_is_that_of_all_orders_and_lies_above_the_law(block: int) -> None:
    engine = network(block)
    exact = table(engine, block)
    assert float((-exact[:, 1]).exp().sum()) == pytest.approx(1, abs=1e-5)
    found = engine.bound_rows(Batch.of(SEQUENCES), seed=0, draws=100)
    if block == 1:  # an autoregressive model: every draw is its cross-entropy
        torch.testing.assert_close(found, exact[:, 1], atol=1e-5, rtol=0)
    assert bool((exact[:, 0] >= exact[:, 1] - 1e-6).all())
    gap = found - exact[:, 0]
    assert abs(float(gap.mean())) < 4 * float(gap.std()) / math.sqrt(len(gap)) + 1e-5
    assert float(gap.std()) < 1


def test_training_draws_have_the_mean_of_the_bound_and_clipped_ones_keep_to_their_shares() -> None:
    engine = network(2)
    rows = SEQUENCES.repeat(300, 1)
    with torch.no_grad():
        nats = engine.loss(rows).double().view(300, -1).mean(0)
    gap = nats - table(engine, 2)[:, 0]
    assert abs(float(gap.mean())) < 4 * float(gap.std()) / math.sqrt(len(gap))
    assert float(gap.std()) < 1
    clipped = network(2, "objective.clip=[0.45,0.95]")
    draw = clipped.draw(Batch.of(rows), random=Randomness(torch.Generator().manual_seed(0)))
    share = -torch.expm1(-draw.sigma)
    assert share.shape == (len(rows), 2)
    assert 0.4499 < float(share.min()) < 0.46
    assert 0.94 < float(share.max()) < 0.9501
    masked = (draw.xt == MASK).double().mean()
    assert float(masked) == pytest.approx(0.7, abs=0.01)
    # ranks and accumulation steps take their own rows of one global draw
    parts = [clipped.draw(Batch.of(rows[s : s + 9]), random=Randomness(torch.Generator().manual_seed(3), start=s, total=18)) for s in (0, 9)]  # fmt: skip
    whole = clipped.draw(Batch.of(rows[:18]), random=Randomness(torch.Generator().manual_seed(3), total=18))
    assert torch.equal(torch.cat([p.xt for p in parts]), whole.xt)


@pytest.mark.parametrize("op", ["{op: first_hitting}", "{op: ancestral, steps: 64}"])
def test_what_is_written_has_the_law_of_the_model(op: str) -> None:
    engine = network(2, f"sample={op}")
    law = (-table(engine, 2)[:, 1]).exp()
    rows = engine.sample(20_000, L, seed=0)
    counts = torch.bincount((rows * V ** torch.arange(L).flip(0)).sum(-1), minlength=V**L).double() / len(rows)
    assert float((counts - law).abs().sum() / 2) < math.sqrt(V**L / len(rows) / 2)


@pytest.mark.parametrize("length", [3, 4])
def test_what_must_match_matches_and_blocks_have_the_law_given_that_the_rest_can(length: int) -> None:
    """Two tokens a block, shown at once: the product of the predictions times how many endings match. The last may be cut."""
    engine, pattern = network(2, "sample={op: ancestral, steps: 1}"), "(ab*c|bb|c.)+a?"
    texts = ["".join("abc"[i] for i in row) for row in SEQUENCES.tolist()]
    fits = torch.tensor([re.fullmatch(pattern, text[:length]) is not None for text in texts]).double().view(V**2, V**2)
    assert 0 < float(fits.mean()) < 1
    factors = []
    for start in (0, 2):
        before, block = SEQUENCES[:, :start], SEQUENCES[:, start : start + 2]
        with torch.no_grad():
            said = uncached(engine.model, 2, before)(
                torch.full_like(block, MASK), torch.zeros(V**L), torch.arange(V**L)
            )
        each = said["log_x0"].double().gather(2, block[..., None])[..., 0]
        factors.append(each.sum(1).exp().view(V**2, V**2))
    first, second = factors[0][:, :1] * fits.sum(1, keepdim=True), factors[1] * fits
    law = (first / first.sum() * second / second.sum(1, keepdim=True).clamp(min=1e-300)).flatten()

    x = torch.full((20_000, L), MASK)
    process = engine.process
    assert process is not None
    out = write_blocks(
        process.sampler,
        lambda written: uncached(engine.model, 2, written),
        x,
        WalkSettings(
            free=torch.ones_like(x, dtype=torch.bool),
            allowed=torch.arange(V + 1) < V,
            matching=Matching(pattern, lambda: [b"a", b"b", b"c", None], x.device),
            kernel=process.kernel,
            schedule=process.schedule,
            generator=torch.Generator().manual_seed(0),
        ),
        block=2,
        length=length,
    )
    counts = torch.bincount((out * V ** torch.arange(L).flip(0)).sum(-1), minlength=V**L).double() / len(out)
    assert bool((law[counts > 0] > 0).all())
    assert float((counts - law).abs().sum() / 2) < math.sqrt(int((law > 0).sum()) / len(out) / 2)


def test_what_ends_within_a_block_begins_a_whole_one() -> None:
    engine = network(2)
    law = (-table(engine, 2)[:, 1]).exp().view(-1, V).sum(1)
    rows = engine.sample(20_000, 3, seed=0)
    counts = torch.bincount((rows * torch.tensor([9, 3, 1])).sum(-1), minlength=27).double() / len(rows)
    assert float((counts - law).abs().sum() / 2) < math.sqrt(27 / len(rows) / 2)


@torch.no_grad()
def test_memory_changes_no_bit_that_counts() -> None:
    """In float64, what the trunk gives of the block that is written; all rows at once, then some of them."""
    engine = network(2)
    model = engine.model.double()
    model.get_submodule("time").float().register_forward_hook(lambda m, args, out: out.double())
    seen: list[Tensor] = []
    hook = model.get_submodule("norm").register_forward_hook(lambda m, args, out: seen.append(out))
    rows, length = 5, 12
    written = torch.randint(0, V, (rows, length), generator=torch.Generator().manual_seed(0))
    noised = torch.full((rows, 2), MASK)
    some = torch.tensor([3, 1])
    with cached(model, 2, rows=rows, length=length) as given:
        for start in (0, 2, 8, 10):  # three blocks at once in between
            ask = given(written[:, :start])
            ask(noised, torch.zeros(rows), torch.arange(rows))
            found = seen[-1]
            ask(noised[some], torch.zeros(2), some)
            torch.testing.assert_close(seen[-1], found[some], atol=1e-12, rtol=0)
            kept = found
    uncached(model, 2, written[:, :10])(noised, torch.zeros(rows), torch.arange(rows))
    hook.remove()
    assert kept.dtype == torch.float64
    assert float(kept.std()) > 0.1
    torch.testing.assert_close(kept, seen[-1], atol=1e-10, rtol=0)


def test_a_prompt_is_filled_in_from_left_to_right_or_refused() -> None:
    engine = network(2)
    prompt = torch.tensor([[2, -1, -1, -1]])
    rows = engine.sample(20_000, L, prompt=prompt, seed=0)
    assert bool((rows[:, 0] == 2).all())
    # the second token from its law given the first, which only stands in the same block
    with torch.no_grad():
        said = uncached(engine.model, 2, SEQUENCES[:1, :0])(torch.tensor([[2, MASK]]), torch.zeros(1), torch.arange(1))
    counts = torch.bincount(rows[:, 1], minlength=V).double() / len(rows)
    assert float((counts - said["log_x0"][0, 1, :V].exp()).abs().sum() / 2) < 0.01
    with pytest.raises(UserError, match="the prompt has tokens in block 2, behind a block with a hole"):
        engine.sample(2, L, prompt=torch.tensor([[2, -1, -1, 0]]))
    with pytest.raises(UserError, match="text in blocks has no padding to hide"):
        engine.sample(2, L, attend=torch.ones(2, L, dtype=torch.bool))


def test_every_step_is_shown_and_evaluations_are_summed() -> None:
    engine = network(2)
    frames: list[tuple[int, Tensor]] = []
    rows = engine.sample(3, L, seed=0, on_step=lambda number, x: frames.append((number, x.clone())))
    assert [number for number, _ in frames] == [0, 1, 2, 3, 4]
    assert [int((x == MASK).sum(1).max()) for _, x in frames] == [4, 3, 2, 1, 0]
    assert torch.equal(frames[-1][1], rows)
    assert engine.process.sampler.evaluations == 3 * L


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        (["objective={op: nelbo}"], "objective 'nelbo' feeds no input 'clean'"),
        (["objective.block=3"], "rows of 128 tokens are no whole number of blocks of 3"),
        (["objective.clip=[0.9,0.1]"], "clip goes from the lower share to the higher"),
        (["process={op: uniform, schedule: {op: geometric}}"], "needs a kernel that only masks"),
    ],
)
def test_what_cannot_work_is_refused(changes: list[str], message: str) -> None:
    with pytest.raises(BlueprintError, match=message.replace("(", r"\(")):
        check(TINY, changes)


def test_a_plain_graph_is_refused() -> None:
    with pytest.raises(BlueprintError, match="objective 'block_nelbo' needs a graph with the input clean"):
        check(ROOT / "blueprints" / "mdlm-tiny.yaml", ["objective={op: block_nelbo}"])


def test_rows_that_are_no_whole_blocks_are_refused() -> None:
    with pytest.raises(UserError, match="rows of 3 tokens are no whole number of blocks of 2"):
        network(2).loss(torch.zeros(1, 3).long())


def changed(tmp_path: Path, old: str, new: str) -> Any:
    """The blueprint with one line of its network changed."""
    text = TINY.read_text()
    assert old in text
    (tmp_path / "blocks").mkdir()
    shutil.copy(ROOT / "blueprints" / "blocks" / "dit.yaml", tmp_path / "blocks")
    path = tmp_path / "changed.yaml"
    text = text.replace(old, new)
    path.write_text(text if ": places" in text else text.replace("places: int 2*l, ", ""))
    return check(path, SIZES)


MIX = "  mixed: {op: roll, in: trunk, with: {by: 1}}\n  noised: {op: take_noised, in: {x: mixed, tokens: tokens}}"


@pytest.mark.parametrize(
    ("old", "new", "broken"),
    [
        ("name: bd3lm-tiny", "name: bd3lm-tiny", set()),
        ("  noised: {op: take_noised, in: {x: trunk, tokens: tokens}}", MIX, {"network.blocks", "network.memory"}),
        (", places: places}, with", "}, with", {"network.memory"}),
    ],
    ids=["sound", "leaks", "elsewhere"],
)
def test_networks_that_leak_or_stand_elsewhere_are_caught(tmp_path: Path, old: str, new: str, broken: set[str]) -> None:
    report = changed(tmp_path, old, new)
    checks = prove_blocks(report.graph, make_parts(report.plan, report.registry), report.registry, "log_x0")
    assert {c.name for c in checks if c.holds is False} == broken


def test_the_whole_process_is_proved() -> None:
    report = check(TINY)
    assert isinstance(report.plan, ProcessPlan)
    make = maker(report.plan, report.registry)
    found = {c.name: c.holds for prove in (prove_objective, prove_sampler) for c in prove(make, "log_x0")}
    objective = ("draws", "loss", "gradient", "tight", "optimum", "roles", "positions", "random", "evaluated")
    sampler = ("clean", "law", "bound", "alone", "conditions", "random")
    names = [*(f"objective.{name}" for name in objective), *(f"sampler.{name}" for name in sampler)]
    assert found == dict.fromkeys(names, True)


@pytest.mark.slow
def test_compiled_training_gives_the_gradients_of_eager() -> None:
    x0, xt = SEQUENCES[:4], SEQUENCES[:4].clone()
    xt[:, ::2] = MASK
    found = []
    for mode in ("off", "whole"):
        engine = network(2)
        engine.compile(mode)
        engine.model.train()
        engine.loss(x0, t=torch.full((4,), 0.5), xt=xt).mean().backward()
        found.append([p.grad for p in engine.model.parameters()])
    for a, b in zip(*found, strict=True):
        torch.testing.assert_close(a, b, atol=1e-5, rtol=1e-4)
