"""Deletions and insertions: dynamic programmes against enumeration, draws and bounds against the generator."""

import itertools
import math
import threading
from typing import Any

import pytest
import torch
from scipy.linalg import expm
from sedd_graph_registry.strings.birth_death import Delete, Indel
from sedd_graph_registry.strings.objectives import DICE, DISE, RatioDraw
from torch import Tensor

from sedd_graph.component.base import Context
from sedd_graph.diffusion.batch import Randomness
from sedd_graph.diffusion.strings.alignment import Links, Pairs, align, log_likelihood
from sedd_graph.diffusion.strings.birth_death import BirthDeath
from sedd_graph.diffusion.strings.kernel import LEAST
from sedd_graph.diffusion.strings.strings import rebuild
from sedd_graph.verify.birth_death import BirthDeathTable
from tests.diffusion.strings import batch, strings

DOUBLE = torch.float64


def delete(tokens: int = 2) -> Delete:
    return Delete(Delete.Config(), Context({"n": tokens + 1}))


def indel(law: tuple[float, ...] = (0.6, 0.4), births: float = 0.25) -> Indel:
    config = Indel.Config(frequencies=law, smoothing=1e-6, mean_length=births / (1 - births))
    return Indel(config, Context({"n": len(law) + 1}))


def dense(
    kernel: BirthDeath, clean: list[int], noisy: list[int], sigma: float, spared: int = 0
) -> tuple[Tensor, Tensor]:
    """What the heads should say, written out: [gaps, v] and [tokens]."""
    level = torch.tensor([sigma], dtype=DOUBLE)
    target = kernel.target(batch([clean], spared), strings([noisy], kernel.start), level)
    out = target.fresh[0, :, None].double() * kernel.law
    out = out.index_add(1, target.symbols[0], target.missing[0].T.double())
    return out, target.spurious[0, 1:].double()


def embeddings(short: list[int], long: list[int]) -> int:
    """How often ``short`` is a subsequence of ``long``, by looking at all of them."""
    return sum([long[i] for i in chosen] == short for chosen in itertools.combinations(range(len(long)), len(short)))


# -- goldens ---------------------------------------------------------------------------------------------------------


def test_golden_6() -> None:
    assert dense(delete(), [0, 1, 0], [0], 0.7)[0].tolist() == [[0.5, 0.5], [0.5, 0.5]]
    assert dense(delete(), [0, 0, 1], [0], 0.7)[0].tolist() == [[0.5, 0.0], [0.5, 1.0]]


def test_golden_7() -> None:
    kernel, sigma = indel(), torch.tensor([0.7], dtype=DOUBLE)
    links = kernel.links(sigma)
    found = [float(x) for x in (links.survive, links.birth, links.vanish, links.replace)]
    assert found == pytest.approx([0.496585304, 0.119833144, 0.479332575, 0.024082122], abs=1e-9)
    p = kernel.log_p(batch([[0, 1, 1]]), strings([[0, 1]], 2), sigma).exp()
    assert float(p) == pytest.approx(0.189513942, abs=1e-8)
    said, born = dense(kernel, [0, 1, 1], [0, 1], 0.7)
    ratios = said * kernel.weights(sigma)[0, 0]
    golden = [[0.15178593, 0.08507736], [0.15178593, 0.54231193], [0.08766449, 0.54231193]]
    assert torch.allclose(ratios, torch.tensor(golden, dtype=DOUBLE), atol=1e-6)
    shrunk = born / (links.birth * kernel.law)
    assert shrunk.tolist() == pytest.approx([0.98445489, 0.54388649], abs=1e-6)


# -- dynamic programmes ----------------------------------------------------------------------------------------------


def random_pairs(rows: int, tokens: int, longest: int, seed: int) -> list[tuple[list[int], list[int]]]:
    """Clean strings, and what deletions leave of them."""
    g = torch.Generator().manual_seed(seed)
    pairs = []
    for _ in range(rows):
        clean = torch.randint(0, tokens, (int(torch.randint(0, longest + 1, (), generator=g)),), generator=g)
        pairs.append((clean.tolist(), clean[torch.rand(len(clean), generator=g) < 0.6].tolist()))
    return pairs


def aligned(pairs: list[tuple[list[int], list[int]]], links: Links, law: Tensor | None) -> Any:
    clean, noisy = (strings([p[side] for p in pairs], 0) for side in (0, 1))
    frequency = None if law is None else law[noisy.tokens[:, 1:]]
    rows = Pairs(clean.tokens[:, 1:], clean.lengths, noisy.tokens[:, 1:], noisy.lengths, frequency, links)
    found = align(rows)
    assert torch.equal(found.log_p, log_likelihood(rows))
    return found


def test_deletion_ratios_are_those_of_embedding_counts() -> None:
    pairs = random_pairs(40, 3, 9, seed=0)
    one = torch.ones(len(pairs), dtype=DOUBLE)
    found = aligned(pairs, Links(one, one, 0 * one, 0 * one), None)
    for row, (clean, noisy) in enumerate(pairs):
        count = embeddings(noisy, clean)
        assert float(found.log_p[row].exp()) == pytest.approx(count, rel=1e-10)
        assert float(found.missing[row].sum()) == pytest.approx(len(clean) - len(noisy), abs=1e-10)
        for gap, token in itertools.product(range(len(noisy) + 1), range(3)):
            exact = embeddings([*noisy[:gap], token, *noisy[gap:]], clean) / count
            said = sum(float(found.missing[row, i, gap]) for i, v in enumerate(clean) if v == token)
            assert said == pytest.approx(exact, abs=1e-10)


def counts(clean: list[int], noisy: list[int]) -> list[list[int]]:
    """Embeddings of every prefix in every prefix, in integers."""
    table = [[1, *[0] * len(noisy)]]
    for c in clean:
        last = table[-1]
        table.append([1, *(last[j + 1] + (last[j] if noisy[j] == c else 0) for j in range(len(noisy)))])
    return table


@pytest.mark.parametrize(("length", "tokens"), [(700, 2), (1024, 50)])
def test_long_strings_do_not_overflow(length: int, tokens: int) -> None:
    """C(1024, 512) is at the edge of float64, and the chances of the table are thousands of powers of two apart."""
    g = torch.Generator().manual_seed(length)
    clean = torch.randint(0, tokens, (length,), generator=g).tolist()
    noisy = [c for c, u in zip(clean, torch.rand(length, generator=g).tolist(), strict=True) if u < 0.5]
    one = torch.ones(2, dtype=DOUBLE)
    # beside a shorter pair, so that lengths differ
    found = aligned([(clean, noisy), (clean[:90], noisy[:30])], Links(one / 2, one / 2, 0 * one, 0 * one), None)
    before, after = counts(clean, noisy), counts(clean[::-1], noisy[::-1])
    whole, n, m = before[-1][-1], len(clean), len(noisy)
    assert float(found.log_p[0]) == pytest.approx(math.log(whole) - n * math.log(2), abs=1e-9)
    exact = torch.tensor([[before[i][j] * after[n - i - 1][m - j] / whole for j in range(m + 1)] for i in range(n)])
    assert float((found.missing[0, :, : m + 1] - exact).abs().max()) < 1e-6
    assert float(found.missing[0].sum()) == pytest.approx(n - m, abs=1e-9)


def plain(clean: list[int], noisy: list[int], links: list[float], law: list[float]) -> float:
    """p(x | x0) by the recursion as it is printed (Thorne, Kishino and Felsenstein 1991), cell by cell."""
    survive, vanish, replace, birth = links
    n, m = len(clean), len(noisy)
    opened = [[0.0] * (m + 1) for _ in range(n + 1)]
    ended = [[0.0] * (m + 1) for _ in range(n + 1)]
    for i, j in itertools.product(range(n + 1), range(m + 1)):
        h = float(i == j == 0)
        if i and j:
            h += ended[i - 1][j - 1] * (survive * (noisy[j - 1] == clean[i - 1]) + replace * law[noisy[j - 1]])
        if j:
            h += opened[i][j - 1] * birth * law[noisy[j - 1]]
        opened[i][j] = h
        ended[i][j] = (1 - birth) * h + (ended[i - 1][j] * vanish if i else 0.0)
    return ended[n][m]


@pytest.mark.parametrize("sigma", [1e-3, 0.7, 5.0])
def test_pair_hmm_is_the_printed_recursion(sigma: float) -> None:
    kernel = indel((0.5, 0.3, 0.2), births=0.6)
    law, links = kernel.law.tolist(), kernel.links(torch.tensor([sigma], dtype=DOUBLE))
    numbers = [float(x) for x in (links.survive, links.vanish, links.replace, links.birth)]
    g = torch.Generator().manual_seed(1)
    pairs = []
    for clean, _ in random_pairs(6, 3, 20, seed=3):
        noisy = [v for v in clean if torch.rand((), generator=g) < 0.8]
        pairs.append((clean, [*noisy[:2], *torch.randint(0, 3, (2,), generator=g).tolist(), *noisy[2:]]))
    many = Links(*(x.expand(len(pairs)) for x in (links.survive, links.vanish, links.replace, links.birth)))
    found = aligned(pairs, many, kernel.law)
    for row, (clean, noisy) in enumerate(pairs):
        p = plain(clean, noisy, numbers, law)
        assert float(found.log_p[row].exp()) == pytest.approx(p, rel=1e-10)
        for gap, token in itertools.product(range(len(noisy) + 1), range(3)):
            exact = plain(clean, [*noisy[:gap], token, *noisy[gap:]], numbers, law) / p
            said = float(found.fresh[row, gap]) * law[token]
            said += sum(float(found.missing[row, i, gap]) for i, v in enumerate(clean) if v == token)
            assert said == pytest.approx(exact, rel=1e-10)
        for place, token in enumerate(noisy):
            exact = plain(clean, noisy[:place] + noisy[place + 1 :], numbers, law) / p * law[token] * numbers[3]
            assert float(found.spurious[row, place]) == pytest.approx(exact, abs=1e-10)


@pytest.mark.parametrize("births", [0.0, 0.6])
def test_pairs_do_not_depend_on_which_are_aligned_together(births: float, monkeypatch: pytest.MonkeyPatch) -> None:
    """Strings of 0 to 90 tokens, one by one, all at once, and from memory that inference mode was the first to ask for."""
    kernel = delete(3) if births == 0 else indel((0.5, 0.3, 0.2), births=births)
    drawn = batch([clean for clean, _ in random_pairs(12, 3, 90, seed=8)])
    sigma = torch.linspace(0.05, 3, 12, dtype=DOUBLE)
    noisy = kernel.sample(drawn, sigma, random=Randomness(torch.Generator().manual_seed(9)), width=None)
    whole = kernel.target(drawn, noisy, sigma)
    monkeypatch.setattr("sedd_graph.diffusion.strings.alignment_sweep._KEPT", threading.local())
    monkeypatch.setattr("sedd_graph.diffusion.strings.alignment._CHUNK", 1)
    with torch.inference_mode():
        kernel.target(drawn, noisy, sigma)
    apart = kernel.target(drawn, noisy, sigma)
    assert bool((noisy.lengths == 0).any() or births)
    for name in ("missing", "fresh", "spurious", "constant"):
        assert torch.allclose(getattr(whole, name), getattr(apart, name), rtol=1e-5, atol=1e-6), name


def test_ratios_of_one_symbol_are_summed() -> None:
    pairs = random_pairs(9, 3, 20, seed=4)
    one = torch.ones(len(pairs), dtype=DOUBLE)
    clean, noisy = (strings([p[side] for p in pairs], 0) for side in (0, 1))
    rows = Pairs(
        clean.tokens[:, 1:], clean.lengths, noisy.tokens[:, 1:], noisy.lengths, None, Links(one, one, 0 * one, 0 * one)
    )
    whole = align(rows).missing
    symbols = rows.clean % 2
    for symbol in (0, 1):
        exact = (whole * (symbols == symbol)[..., None]).sum(1)
        assert torch.allclose(align(rows, symbols=symbols).missing[:, symbol], exact, atol=1e-12)
    assert not align(rows, symbols=symbols).missing[:, 2:].any()


def test_what_deletion_cannot_have_made_has_no_chance() -> None:
    kernel, level = delete(), torch.full((3,), 0.7)
    found = kernel.log_p(batch([[0], [0, 1], [0, 1]]), strings([[0, 0], [1, 0], [1]], 2), level)
    assert found[:2].tolist() == [-math.inf, -math.inf]
    assert float(found[2]) == pytest.approx(-0.7 + math.log(-math.expm1(-0.7)), abs=1e-7)


def test_pair_hmm_is_the_exponential_of_the_rates() -> None:
    kernel = indel()
    toy = BirthDeathTable(kernel)
    all_of_it = torch.from_numpy(expm(0.7 * toy.generator.numpy()))
    short = torch.tensor([i for i, s in enumerate(toy.strings) if len(s) <= 3])
    for x0 in (0, 2, 5):
        start = torch.full((len(short),), x0)
        found = kernel.log_p(toy.batch(start), toy.rows(short), torch.full((len(short),), 0.7)).exp()
        assert float((found - all_of_it[short, x0]).abs().max()) < 2e-5  # strings of 7 tokens and more are left out
    assert torch.allclose(toy.at(torch.tensor([0.7])), (all_of_it @ toy.law)[None], atol=1e-12)


def test_the_toy_of_deletions_is_its_generator() -> None:
    toy = BirthDeathTable(delete())
    for sigma in (1e-3, 0.7, 9.0):
        exact = torch.from_numpy(expm(sigma * toy.generator.numpy())) @ toy.law
        assert torch.allclose(toy.at(torch.tensor([sigma], dtype=DOUBLE))[0], exact, atol=1e-13)


def test_without_births_indel_is_delete() -> None:
    few = indel(births=1e-7)
    for clean, noisy in random_pairs(8, 2, 6, seed=5):
        a, b = (dense(k, clean, noisy, 0.9)[0] for k in (few, delete()))
        assert torch.allclose(a, b, atol=1e-5)


def test_spared_tokens_are_left_of_themselves_only() -> None:
    clean, spared = [0, 1, 0, 1, 1, 0], 2
    noisy = [0, 1, 1, 0]
    said, _ = dense(delete(), clean, noisy, 0.7, spared)
    tail = noisy[spared:]
    for gap, token in itertools.product(range(len(noisy) + 1), range(2)):
        exact = 0.0
        if gap >= spared:
            more = [*noisy[spared:gap], token, *noisy[gap:]]
            exact = embeddings(more, clean[spared:]) / embeddings(tail, clean[spared:])
        assert float(said[gap, token]) == pytest.approx(exact, abs=1e-6)


def test_sampled_targets_have_the_mean_of_the_exact_ones() -> None:
    kernel, clean = delete(), [0, 1, 1, 0]
    rows = batch([clean] * 20_000)
    noisy = kernel.sample(
        rows, torch.full((len(rows),), 0.7), random=Randomness(torch.Generator().manual_seed(0)), width=5
    )
    target = kernel.sampled_target(rows, noisy)
    exact = kernel.target(rows, noisy, torch.full((len(rows),), 0.7))
    for code in ([0, 1], [1, 0], [0], []):
        same = (noisy.lengths == len(code)) & (noisy.tokens[:, 1 : 1 + len(code)] == torch.tensor(code)).all(-1)
        mean = target.missing[same].mean(0)
        assert torch.allclose(mean, exact.missing[same][0], atol=4 / math.sqrt(int(same.sum())))


# -- strings ---------------------------------------------------------------------------------------------------------


def test_rebuilding_keeps_new_tokens_where_they_belong() -> None:
    tokens = torch.tensor([[9, 1, 2, 9], [9, 3, 9, 9]])
    keep = torch.tensor([[True, False, True, False], [True, True, False, False]])
    follow = torch.tensor([[0, 2, 1, 0], [1, 0, 0, 0]])
    made = rebuild(tokens, keep, follow, lambda place: 4 + place, start=9)
    assert made.tokens.tolist() == [[9, 5, 5, 2, 6], [9, 4, 3, 9, 9]]
    assert made.lengths.tolist() == [4, 2]
    short = rebuild(tokens, keep, follow, lambda place: 4 + place, start=9, width=3)
    assert short.tokens.tolist() == [[9, 5, 5], [9, 4, 3]]
    assert short.cut == 2


@pytest.mark.parametrize("kernel", [delete(), indel()])
def test_rows_do_not_depend_on_how_a_batch_is_split(kernel: BirthDeath) -> None:
    rows = batch([[0, 1, 1, 0], [1, 1], [0], [1, 0, 1]])
    level = torch.full((4,), 0.7)

    def drawn(start: int, stop: int) -> Tensor:
        random = Randomness(torch.Generator().manual_seed(5), start=start, total=4)
        return kernel.sample(rows.rows(start, stop), level[start:stop], random=random, width=9).tokens

    assert torch.equal(drawn(0, 4), torch.cat([drawn(0, 2), drawn(2, 4)]))


# -- bounds ----------------------------------------------------------------------------------------------------------


def integrand(toy: BirthDeathTable, kernel: BirthDeath, sigma: float, push: Tensor) -> Tensor:
    """Of every clean string, the mean over noisy ones of the loss of perfect scores times exp(push), per unit of sigma."""
    count = len(toy.strings)
    level = torch.tensor([sigma], dtype=DOUBLE)
    support = toy.law.nonzero()[:, 0]
    objective = DISE(DISE.Config(), Context({"n": 3}))
    pairs = [
        (torch.full_like(seen, x0), seen, chance[seen])
        for x0 in support.tolist()
        for chance in toy.at(level, torch.nn.functional.one_hot(torch.tensor(x0), count).double())
        for seen in [(chance > 1e-12).nonzero()[:, 0]]
    ]
    clean, seen, chance = (torch.cat(part) for part in zip(*pairs, strict=True))
    rows, levels = toy.rows(seen), level.expand(len(seen))
    target, weights = kernel.target(toy.batch(clean), rows, levels), kernel.weights(levels)
    outputs = toy.outputs(rows, levels)
    outputs["log_insert"] = outputs["log_insert"] + push[seen]
    if kernel.births:
        outputs["log_delete"] = outputs["log_delete"] + push[seen][..., 0]
    draw = RatioDraw(
        rows.tokens,
        rows.attend,
        levels,
        target.missing,
        target.symbols,
        target.fresh,
        target.spurious,
        weights.float(),
        (weights * target.constant).sum(-1).float(),
    )
    nats = objective.loss(outputs, draw, kernel).double()
    return torch.zeros(count, dtype=DOUBLE).index_add(0, clean, chance * nats)


def model_law(toy: BirthDeathTable, kernel: BirthDeath, levels: Tensor, push: Tensor) -> Tensor:
    """The law of what perfect rates times exp(push) generate from pure noise, by the master equation (Heun's method)."""
    count = len(toy.strings)
    every = torch.arange(count)
    rows = toy.rows(every)

    def rates(sigma: Tensor) -> Tensor:
        outputs = toy.outputs(rows, sigma.expand(count))
        pace = kernel.weights(sigma.double().expand(count))
        q = torch.zeros(count + 1, count + 1, dtype=DOUBLE)
        put = (outputs["log_insert"].double() + push).exp() * pace[:, 0, None, None]
        columns = every[:, None, None].expand_as(toy.inserted)
        q.index_put_((toy.inserted.flatten(), columns.flatten()), put.flatten(), accumulate=True)
        if kernel.births:
            out = (outputs["log_delete"].double() + push[..., 0]).exp() * pace[:, 1:]
            q.index_put_(
                (toy.deleted.flatten(), every[:, None].expand_as(toy.deleted).flatten()), out.flatten(), accumulate=True
            )
        q = q[:count, :count]
        return q - torch.diag(q.sum(0))

    if kernel.births:
        weight = [kernel.births ** len(s) * math.prod(float(kernel.law[v]) for v in s) for s in toy.strings]
        law = torch.tensor(weight, dtype=DOUBLE)
        law /= law.sum()
    else:
        law = torch.nn.functional.one_hot(torch.tensor(0), count).double()
    for now, after in itertools.pairwise(levels.flip(0)):
        # exact for constant rates: the middle of the step
        law = torch.matrix_exp((now - after) * rates((now * after).sqrt()[None])) @ law
    return law


@pytest.mark.parametrize("kernel", [delete(), indel((0.6, 0.4), births=0.2)], ids=["delete", "indel"])
def test_bounds_are_tight_for_perfect_scores_and_hold_for_others(kernel: BirthDeath) -> None:
    toy = BirthDeathTable(kernel)
    end = 14.0
    nodes = torch.linspace(math.log(LEAST), math.log(end), 97, dtype=DOUBLE).exp()
    weights = torch.gradient(nodes.log())[0] * nodes
    weights[0], weights[-1] = weights[0] / 2, weights[-1] / 2
    still = torch.zeros(len(toy.strings), toy.longest + 1, 2, dtype=DOUBLE)
    prior = torch.zeros(len(toy.strings), dtype=DOUBLE)
    if kernel.births:
        steady = model_law(toy, kernel, nodes[-1:], still)
        for x0 in toy.law.nonzero()[:, 0].tolist():
            last = toy.at(nodes[-1:], torch.nn.functional.one_hot(torch.tensor(x0), len(toy.strings)).double())[0]
            prior[x0] = (last * (last / steady).log()).sum()
    support = toy.law > 0
    pushed = 0.3 * torch.randn(still.shape, generator=torch.Generator().manual_seed(2), dtype=DOUBLE)
    exact, worse = (
        sum(w * integrand(toy, kernel, float(s), push) for s, w in zip(nodes, weights, strict=True)) + prior
        for push in (still, pushed)
    )
    assert float((toy.law * exact).sum()) == pytest.approx(toy.entropy, abs=4e-3)
    fine = torch.linspace(math.log(LEAST), math.log(end), 401, dtype=DOUBLE).exp()
    law = model_law(toy, kernel, fine, pushed)
    gap = (worse + law.log())[support]
    assert bool((gap > -2e-3).all())
    assert float(gap.max()) > 0.01  # and the push is felt


def test_cross_entropy_is_the_score_entropy_of_scaled_rates() -> None:
    kernel = delete()
    rows = batch([[0, 1, 1, 0]] * 64)
    dice = DICE(DICE.Config(), Context({"n": 3}))
    noisy = kernel.sample(rows, torch.full((64,), 0.7), random=Randomness(torch.Generator().manual_seed(3)), width=5)
    target = kernel.target(rows, noisy, torch.full((64,), 0.7))
    one = torch.ones(64, 2)
    draw = RatioDraw(
        noisy.tokens,
        noisy.attend,
        one[:, 0],
        target.missing,
        target.symbols,
        target.fresh,
        target.spurious,
        one,
        target.constant[:, 0],
    )
    raw = torch.randn(64, 5, 2, generator=torch.Generator().manual_seed(4))
    found = dice.loss({"log_insert": raw}, draw, kernel)
    weights = raw.exp() * noisy.attend[..., None]
    for row in range(64):
        left = 4 - int(noisy.lengths[row])
        share = (left * weights[row] / weights[row].sum()).double()
        ratio = torch.zeros(5, 2).index_add(1, target.symbols[row], target.missing[row].T).double()
        exact = torch.where(
            ratio > 0, ratio * (ratio / share.clamp(min=1e-30)).log(), 0.0
        ).sum()  # sums of both are `left`
        assert float(found[row]) == pytest.approx(float(exact), abs=1e-4)
