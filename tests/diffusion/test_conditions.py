"""Constraints and guidance against enumerated laws: three tokens at three positions, a perfect network."""

import itertools
import math
import re
from collections.abc import Callable
from typing import Any

import pytest
import torch
from sedd_graph_registry.noise.interpolating import Absorb, Uniform
from sedd_graph_registry.sampling.exact import FirstHitting, Uniformization
from sedd_graph_registry.sampling.masked import Confidence, EntropyBound, ReMDM
from sedd_graph_registry.sampling.steps import Analytic, Ancestral, Euler, PredictorCorrector, Psi
from torch import Tensor

from sedd_graph.diffusion.conditions.allowed import allowed_tokens
from sedd_graph.diffusion.conditions.conditions import Conditions
from sedd_graph.diffusion.conditions.constraint import Matching
from sedd_graph.diffusion.tokens.conditions import lacks
from sedd_graph.diffusion.tokens.guidance import Classifier, classified, renoised, unprompted
from sedd_graph.errors import UserError
from tests.diffusion.test_samplers import (
    FLOOR,
    LAW,
    ROWS,
    SEQUENCES,
    L,
    V,
    chances,
    distance,
    make,
    perfect,
    run,
    world,
)

PIECES = [b"a", b"b", b"ab", None]
TEXTS = [b"".join(PIECES[i] or b"" for i in row).decode() for row in SEQUENCES.tolist()]
PATTERN = "a(ab|b)*b|bb.*"
MATCHES = torch.tensor([re.fullmatch(PATTERN, text) is not None for text in TEXTS])
MASKED = [Ancestral, Analytic, Euler, PredictorCorrector, Psi, FirstHitting, Uniformization, Confidence, EntropyBound, ReMDM]  # fmt: skip


def matching(pattern: str = PATTERN) -> Matching:
    return Matching(pattern, lambda: PIECES, torch.device("cpu"))


def factorised(prompt: Tensor, conditions: Tensor) -> Tensor:
    """The law of all masks of ``prompt`` [1, L] shown at once, given ``conditions`` bool [27]."""
    k, _ = world(Absorb)
    x = torch.where(prompt < 0, V, prompt)
    each = chances(x, torch.ones(1), k)[0]
    law = torch.stack([each[i][SEQUENCES[:, i]] if prompt[0, i] < 0 else (SEQUENCES[:, i] == prompt[0, i]).double() for i in range(L)]).prod(0)  # fmt: skip
    law = law * conditions
    return law / law.sum()


@pytest.mark.parametrize("prompt", [[-1, -1, -1], [-1, 1, -1]])
def test_a_step_has_the_factorised_law_given_that_the_text_matches(prompt: list[int]) -> None:
    """One step that shows everything is the product of the predictions, conditioned: no error but chance."""
    given = torch.tensor([prompt])
    law = factorised(given, MATCHES)
    for sampler in (make(EntropyBound, gamma=1e6), make(Confidence, steps=1)):
        found = distance(run(sampler, Absorb, prompt=given, matching=matching()), law)
        print(f"total variation {found:.4f}, chance alone {FLOOR:.4f}")
        assert found < 1.3 * FLOOR
    assert float((law - factorised(given, torch.ones(27).bool())).abs().sum() / 2) > 10 * FLOOR


def test_steps_that_show_some_leave_the_rest_to_the_predictions() -> None:
    """First one position, at random, from its law given that all match; then the others, predicted anew."""
    orders = torch.zeros(V**L, dtype=torch.float64)
    for order in itertools.permutations(range(L)):
        for index, row in enumerate(SEQUENCES):
            prompt, chance = torch.full((1, L), -1), 1.0
            for place in order:
                law = factorised(prompt, MATCHES)
                chance *= float(law[SEQUENCES[:, place] == row[place]].sum())
                if chance == 0:
                    break
                prompt[0, place] = row[place]
            orders[index] += chance / math.factorial(L)
    assert float(orders.sum()) == pytest.approx(1)
    assert bool((orders[~MATCHES] == 0).all())
    assert distance(run(make(FirstHitting), Absorb, matching=matching()), orders) < 1.3 * FLOOR


def test_every_sampler_of_masks_matches() -> None:
    keep = MATCHES[:, None].double()
    for cls, config in [(c, {}) for c in MASKED] + [(Ancestral, {"top_p": 0.4}), (Confidence, {"temperature": 0.0})]:
        out = run(make(cls, **config), Absorb, rows=300, matching=matching())
        assert bool(keep[(out * torch.tensor([9, 3, 1])).sum(-1)].all()), cls


def test_where_the_predictions_leave_no_match_an_unlikely_one_is_drawn() -> None:
    def denoise(x: Tensor, t: Tensor, rows: Tensor, at: Tensor | None = None) -> dict[str, Tensor]:
        x = x if at is None else x.gather(1, at)
        law = torch.tensor([0.5, 0.0, 0.5, 0.0]).expand(*x.shape, 4)
        law = torch.where((x == V)[..., None], law, torch.nn.functional.one_hot(x, 4).float())
        return {"log_x0": law.log().clamp(min=-1e6)}

    out = run(make(Ancestral, steps=4), Absorb, rows=200, denoise=denoise, matching=matching("[ab]b+|bb"))
    texts = {"".join(p.decode() for i in row if (p := PIECES[i])) for row in out.tolist()}
    assert texts == {"abb", "abbb"}  # two tokens that the network never says, and not "bbb" with three


@pytest.mark.parametrize(
    ("pattern", "prompt", "said"),
    [
        ("a{7,9}b{9}", None, r"no text of 3 tokens matches 'a\{7,9\}b\{9\}': the nearest lengths are 15"),
        ("ab", None, "the nearest lengths are 2$"),
        ("ab|(ab){9}", None, "the nearest lengths are 2 and 9"),
        ("a{3}", [-1, 1, -1], "with what is given and allowed"),
        ("c", None, "no text of this model's tokens matches"),
    ],
)
def test_what_cannot_match_is_said_before_the_network_is_asked(pattern: str, prompt: Any, said: str) -> None:
    def never(*_: Any) -> dict[str, Tensor]:
        raise AssertionError

    given = None if prompt is None else torch.tensor([prompt])
    with pytest.raises(UserError, match=said):
        run(make(Ancestral), Absorb, rows=2, denoise=never, prompt=given, matching=matching(pattern))


def test_tokens_are_forbidden_by_id_by_text_and_by_position() -> None:
    every = torch.tensor([True, True, True, False])

    def left(**conditions: Any) -> Any:
        return allowed_tokens(Conditions(**conditions), every, L, lambda: PIECES).int().tolist()

    assert left() == [1, 1, 1, 0]
    assert left(forbid=[1]) == [1, 0, 1, 0]
    assert left(forbid=["b"]) == [1, 0, 0, 0]
    assert left(allow={0: "a.*", -1: "b"}) == [[1, 0, 1, 0], [1, 1, 1, 0], [0, 1, 0, 0]]
    for wrong, said in (
        ({"forbid": ["a", "b"]}, "no token is left for any position"),
        ({"forbid": [4]}, "there is no token 4; ids go up to 3"),
        ({"allow": {1: "x"}}, "no token is left for position 1"),
        ({"allow": {3: "a"}}, "there is no position 3 in rows of 3 tokens"),
    ):
        with pytest.raises(UserError, match=said):
            left(**wrong)
    may = allowed_tokens(Conditions(allow={0: "a.*", -1: "b"}), every, L, lambda: PIECES)
    for cls in (Ancestral, Euler, Uniformization, Psi):  # noise itself may not stay where it is not allowed
        out = run(make(cls), Uniform, rows=200, allowed=may[:, :V])
        assert bool(may.gather(1, out.T).all())


def test_conditions_say_what_kernel_they_need() -> None:
    absorb, uniform = world(Absorb)[0], world(Uniform)[0]
    for conditions, kernel, said in (
        (Conditions(matching="a"), uniform, "for matching"),
        (Conditions(guidance=2), uniform, "for guidance"),
        (Conditions(observed="renoise"), absorb, "for observed: renoise"),
        (Conditions(particles=2), uniform, "for particles"),
    ):
        assert (lacks(conditions, kernel, make(FirstHitting)) or "").endswith(said)
        assert lacks(conditions, absorb if kernel is uniform else uniform, make(FirstHitting)) is None


# -- guidance ---------------------------------------------------------------------------------------------------------


def guided_orders(prompt: Tensor, guidance: float) -> Tensor:
    """One token at a time in every order, each from p(. | all) ** g p(. | all but the prompt) ** (1 - g), normalised."""
    k, _ = world(Absorb)
    out = torch.zeros(V**L, dtype=torch.float64)
    places = [i for i in range(L) if prompt[0, i] < 0]
    for order in itertools.permutations(places):
        for index, row in enumerate(SEQUENCES):
            if bool(((prompt[0] >= 0) & (prompt[0] != row)).any()):
                continue
            x, chance = torch.where(prompt < 0, V, prompt), 1.0
            for place in order:
                blind = torch.where(prompt < 0, x, V)
                both = [chances(rows, torch.ones(1), k)[0, place] for rows in (x, blind)]
                law = both[0] ** guidance * both[1] ** (1 - guidance)
                chance *= float(law[row[place]] / law.sum())
                x[0, place] = row[place]
            out[index] += chance / math.factorial(len(order))
    return out


@pytest.mark.parametrize("head", ["log_x0", "log_score"])
@pytest.mark.parametrize("guidance", [0.0, 1.0, 2.5])
def test_guidance_by_the_prompt_has_the_tilted_law(guidance: float, head: str) -> None:
    k, s = world(Absorb)
    prompt = torch.tensor([[-1, 1, -1]])
    law = guided_orders(prompt, guidance)
    base = perfect(k, s)

    def scored(x: Tensor, t: Tensor, rows: Tensor, at: Tensor | None = None) -> dict[str, Tensor]:
        found, x = base(x, t, rows, at)["log_x0"], x if at is None else x.gather(1, at)
        return {head: found if head == "log_x0" else k.log_score(found, x, s.sigma(t))}

    denoise = unprompted(scored, (prompt < 0).expand(ROWS, L), k, guidance)
    assert distance(run(make(FirstHitting), Absorb, prompt=prompt, denoise=denoise), law) < 1.3 * FLOOR
    if guidance != 1:
        assert float((law - guided_orders(prompt, 1.0)).abs().sum() / 2) > 4 * FLOOR


def test_guidance_leaves_when_masks_fall_alone() -> None:
    k, s = world(Absorb)
    prompt = torch.tensor([[-1, 1, -1]])
    x, t = torch.tensor([[V, 1, V]]), torch.tensor([0.4])
    sigma = s.sigma(t)

    def scored(x: Tensor, t: Tensor, rows: Tensor, at: Tensor | None = None) -> dict[str, Tensor]:
        return {"log_score": k.log_score(perfect(k, s)(x, t, rows)["log_x0"], x, s.sigma(t))}

    plain = scored(x, t, torch.zeros(1).long())["log_score"]
    guided = unprompted(scored, prompt < 0, k, 3.0)(x, t, torch.zeros(1).long())["log_score"]
    rates = [k.reverse_rate(log.exp(), x, sigma) for log in (plain, guided)]
    torch.testing.assert_close(rates[0].sum(-1), rates[1].sum(-1))
    assert float((rates[0] - rates[1]).abs().max()) > 0.05


CHANCES = torch.rand(V**L, generator=torch.Generator().manual_seed(8), dtype=torch.float64) ** 3 + 0.01
"""p(c | x0)."""


def noisy_classifier(kernel: Any, schedule: Any) -> Callable[[Tensor, Tensor], Tensor]:
    """log p(c | x_t) by Bayes' rule over all sequences."""

    def log_prob(x: Tensor, t: Tensor) -> Tensor:
        alpha = torch.exp(-schedule.sigma(t).double())[:, None, None]
        noise = torch.full((V,), 1 / V, dtype=torch.float64) if kernel.mask is None else torch.eye(V + 1).double()[V]
        like = alpha * (x[..., None] == torch.arange(V)) + (1 - alpha) * noise[x][..., None]
        seen = torch.stack([like[:, i][:, SEQUENCES[:, i]] for i in range(L)]).prod(0) * LAW
        return ((seen * CHANCES).sum(-1) / seen.sum(-1)).log()

    return log_prob


@pytest.mark.parametrize(
    ("cls", "kernel"), [(FirstHitting, Absorb), (Uniformization, Uniform), (Uniformization, Absorb)]
)
def test_an_exact_classifier_gives_the_law_given_the_class(cls: Any, kernel: Any) -> None:
    k, s = world(kernel)
    rows = ROWS // 4
    law = LAW * CHANCES / (LAW * CHANCES).sum()
    assert float((law - LAW).abs().sum() / 2) > 0.2
    free = torch.ones(rows, L).bool()
    denoise = classified(perfect(k, s), k, s, Classifier(noisy_classifier(k, s)), free)
    sampler = make(cls)
    assert distance(run(sampler, kernel, rows=rows, denoise=denoise), law) < 1.3 * math.sqrt(27 / rows / 2)


def test_too_many_calls_of_an_exact_classifier_are_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("sedd_graph.diffusion.tokens.guidance.MAX_CALLS", 11)
    k, s = world(Absorb)
    x = torch.full((1, L), V)
    guided = classified(perfect(k, s), k, s, Classifier(noisy_classifier(k, s)), x == V)
    with pytest.raises(UserError, match="would evaluate 12 rows in one step, more than 11; use method='gradient'"):
        guided(x, torch.ones(1), torch.zeros(1).long())


def test_a_gradient_is_exact_where_the_classifier_is_linear() -> None:
    """Independent tokens, log p(c | x) a sum over positions: the law given the class is a product."""
    k, s = world(Absorb)
    p = torch.tensor([0.5, 0.3, 0.2])
    by = torch.tensor([[0.0, 1.5, -1.0], [0.7, 0.0, 0.2], [-2.0, 0.0, 1.0]])
    masked = (p * by.exp()).sum(-1, keepdim=True).log()
    table = torch.cat([by, masked], -1)

    def denoise(x: Tensor, t: Tensor, rows: Tensor, at: Tensor | None = None) -> dict[str, Tensor]:
        x = x if at is None else x.gather(1, at)
        law = torch.cat([p, torch.zeros(1)]).expand(*x.shape, 4)
        law = torch.where((x == V)[..., None], law, torch.nn.functional.one_hot(x, 4).float())
        return {"log_x0": law.log().clamp(min=-1e6)}

    law = torch.stack([(p * by[i].exp())[SEQUENCES[:, i]] for i in range(L)]).prod(0).double()
    free = torch.ones(ROWS, L).bool()
    for strength, method in ((1.0, "gradient"), (1.0, "exact"), (2.0, "gradient")):
        tall = law if strength == 1 else torch.stack([(p * (2 * by[i]).exp())[SEQUENCES[:, i]] for i in range(L)]).prod(0).double()  # fmt: skip

        def log_prob(x: Tensor, t: Tensor) -> Tensor:
            hot = x if x.is_floating_point() else torch.nn.functional.one_hot(x, 4).float()
            return (hot * table).sum((-1, -2))

        classifier = Classifier(log_prob, method=method, strength=strength)  # type: ignore[arg-type]
        out = run(make(Ancestral, steps=8), Absorb, denoise=classified(denoise, k, s, classifier, free))
        assert distance(out, tall / tall.sum()) < 1.3 * FLOOR


# -- filling in where tokens that are seen move -------------------------------------------------------------------------


def test_what_filling_in_costs_where_seen_tokens_move() -> None:
    """Neither way of holding the text is exact; Gibbs moves at little noise, where held text is as good as clean, undo it."""
    k, s = world(Uniform)
    prompt = torch.tensor([[-1, 1, -1]])
    law = torch.where(SEQUENCES[:, 1] == 1, LAW, 0.0)
    law, free = law / law.sum(), (prompt < 0).expand(ROWS, L)
    clamped = distance(run(make(Ancestral, steps=48), Uniform, prompt=prompt), law)
    noised = renoised(perfect(k, s), prompt.expand(ROWS, L), free, k, s, torch.Generator().manual_seed(1))
    anew = distance(run(make(Ancestral, steps=48), Uniform, prompt=prompt, denoise=noised), law)
    corrected = distance(run(make(PredictorCorrector, steps=48, corrections=2), Uniform, prompt=prompt), law)
    print(f"clamp {clamped:.4f}, renoise {anew:.4f}, clamp with corrections {corrected:.4f}")
    floor = math.sqrt(9 / ROWS / 2)
    assert clamped > 4 * floor
    assert anew > 4 * floor
    assert corrected < 1.3 * floor + 1.5 / 48
