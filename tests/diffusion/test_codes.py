"""Codes from tokens to vectors: least distances against scipy, decoding under the worst perturbations, and refusals."""

import math
from typing import Any

import pytest
import torch
from scipy.linalg import hadamard as scipy_hadamard
from scipy.spatial.distance import cdist, pdist
from sedd_graph_registry.codes.fixed import DigitCode, DigitsOf, HadamardCode, OrthonormalCode
from sedd_graph_registry.codes.learned import LearnedCode
from torch import Tensor

from sedd_graph.component.base import Context
from sedd_graph.diffusion.codes import nearest as module
from sedd_graph.diffusion.codes.code import Code
from sedd_graph.diffusion.codes.nearest import Codebook, least_distance, nearest, nearest_others
from sedd_graph.diffusion.codes.tables import digits_of, hadamard, number_of
from sedd_graph.errors import DivergedError

TABLE = torch.randn(200, 6, generator=torch.Generator().manual_seed(0), dtype=torch.float64)

CODES: list[tuple[type[Code], dict[str, Any], int]] = [
    (OrthonormalCode, {"vocab": 12}, 12),
    (OrthonormalCode, {"vocab": 7, "rms": 0.3}, 20),
    (HadamardCode, {"vocab": 16, "signs": False}, 16),
    (HadamardCode, {"vocab": 31}, 16),
    (HadamardCode, {"vocab": 2, "rms": 3.0}, 1),
    (DigitCode, {"vocab": 129, "digits": 8}, 8),
    (DigitCode, {"vocab": 129, "base": 12, "digits": 2}, 16),
    (DigitCode, {"vocab": 81, "base": 3, "digits": 4, "rms": 0.1}, 8),
    (LearnedCode, {"vocab": 40}, 8),
    (LearnedCode, {"vocab": 300, "std": 0.02}, 24),
]


def make(cls: type[Code], config: dict[str, Any], width: int) -> Code:
    torch.manual_seed(0)
    return cls(cls.Config(**config), Context({"d": width, "vocab": config["vocab"]}))


@pytest.fixture(params=CODES, ids=lambda c: f"{c[0].__name__}-{c[1]['vocab']}-{c[2]}")
def code(request: pytest.FixtureRequest) -> Code:
    return make(*request.param)


def test_the_least_distance_is_that_of_all_pairs(code: Code) -> None:
    wanted = pdist(code.rows().detach().double().numpy()).min()
    assert least_distance(code.rows()) == pytest.approx(wanted, rel=1e-9)
    declared = code.declared_distance()
    assert declared is None or declared == pytest.approx(wanted, rel=1e-6)
    assert code(torch.arange(len(code.rows()))[None])[0].detach()[0].allclose(code.rows())


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
@torch.no_grad()
def test_errors_below_half_the_least_distance_never_change_a_token(code: Code, dtype: torch.dtype) -> None:
    """The worst direction is that of the nearest other codeword: at 0.999 of the margin nothing changes, at 1.001 some."""
    rows = code.rows().double()
    distances = torch.from_numpy(cdist(rows.numpy(), rows.numpy())).fill_diagonal_(math.inf)
    least, tokens = float(distances.min()), torch.arange(len(rows))
    changed = 0
    for rank in range(min(4, len(rows) - 1)):  # towards the nearest, the second nearest, ...
        others = distances.argsort(1)[:, rank]
        towards = (rows[others] - rows) / (rows[others] - rows).norm(dim=1, keepdim=True)
        for share in (0.5, 0.999):
            moved = (rows + share * least / 2 * towards).to(dtype)
            assert torch.equal(code.decode(moved[None])[0], tokens)
        beyond = code.decode((rows + 1.001 * least / 2 * towards).to(dtype)[None])[0]
        changed += int((beyond != tokens).sum())
        nearest_pairs = distances[tokens, others] < least * 1.0001
        assert torch.equal(beyond[nearest_pairs] == tokens[nearest_pairs], torch.zeros(int(nearest_pairs.sum())) > 0)
    assert changed > 0
    noise = torch.randn(20, *rows.shape, generator=torch.Generator().manual_seed(1), dtype=torch.float64)
    noise *= 0.999 * least / 2 / noise.norm(dim=-1, keepdim=True)
    assert torch.equal(code.decode((rows + noise).to(dtype)), tokens.expand(20, -1))


@torch.no_grad()
def test_decoding_finds_the_nearest_row_of_any_vector(code: Code) -> None:
    rows = code.rows().double()
    vectors = torch.randn(3, 50, rows.shape[1], generator=torch.Generator().manual_seed(2), dtype=torch.float64)
    vectors *= rows.norm(dim=1).max() / rows.shape[1] ** 0.5
    apart = cdist(vectors.flatten(0, 1).numpy(), rows.numpy())
    found = code.decode(vectors).flatten()
    assert apart[range(150), found] == pytest.approx(apart.min(1), rel=1e-12)


@pytest.mark.parametrize("value", [math.nan, math.inf, -math.inf])
def test_vectors_that_are_not_finite_are_refused(code: Code, value: float) -> None:
    vectors = code.rows().detach().clone()[None]
    vectors[0, 1, -1] = value
    with pytest.raises(DivergedError, match=r"decode: 1 of .* vectors are not finite"):
        code.decode(vectors)


@torch.no_grad()
def test_decoding_is_exact_under_autocast(code: Code) -> None:
    tokens = torch.arange(len(code.rows()))[None]
    with torch.autocast("cpu", torch.bfloat16):
        assert torch.equal(code.decode(code(tokens)[0]), tokens)


REFUSED: list[tuple[type[Code], dict[str, Any], int, str]] = [
    (OrthonormalCode, {"vocab": 13}, 12, "13 tokens have no orthonormal code of width 12"),
    (OrthonormalCode, {"vocab": 1}, 12, "at least two tokens"),
    (HadamardCode, {"vocab": 4}, 12, "power of two, such as 8 or 16"),
    (HadamardCode, {"vocab": 33}, 16, "33 tokens have no biorthogonal code .* which has 32 words"),
    (HadamardCode, {"vocab": 17, "signs": False}, 16, "signs: true for up to 32 tokens"),
    (
        DigitCode,
        {"vocab": 257, "digits": 8},
        8,
        "8 digits in base 2 write 256 numbers, fewer than 257 tokens: at least 9",
    ),
    (DigitCode, {"vocab": 9, "base": 3, "digits": 2}, 7, "a width of 7 cannot be shared by 2 digits"),
    (DigitCode, {"vocab": 9, "base": 3, "digits": 2}, 6, "power of two"),
    (DigitCode, {"vocab": 9, "base": 3, "digits": 2}, 2, "3 tokens have no biorthogonal code"),
    (DigitCode, {"vocab": 9, "base": 2**16, "digits": 32}, 64, "beyond 2"),
    (LearnedCode, {"vocab": 1}, 4, "at least two tokens"),
]


@pytest.mark.parametrize(("cls", "config", "width", "message"), REFUSED)
def test_codes_that_do_not_exist_are_refused(cls: type[Code], config: dict[str, Any], width: int, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        make(cls, config, width)


def test_hadamard_is_that_of_scipy() -> None:
    for width in (1, 2, 8, 64):
        assert torch.equal(hadamard(width), torch.from_numpy(scipy_hadamard(width)).float())


def test_digits_are_a_bijection_of_all_numbers() -> None:
    for base, count in ((2, 7), (3, 4), (10, 3), (50_257, 1)):
        tokens = torch.arange(base**count)
        digits = digits_of(tokens, base, count)
        assert len(digits.unique(dim=0)) == base**count
        assert int(digits.min()) == 0
        assert int(digits.max()) == base - 1
        assert torch.equal(number_of(digits, base), tokens)
    assert digits_of(torch.tensor(1234), 10, 5).tolist() == [4, 3, 2, 1, 0]
    for vocab, onto in ((8, True), (7, False)):
        config = DigitsOf.Config(vocab=vocab, digits=3)
        (rule,) = DigitsOf.algebra(config, DigitsOf.signature(config, {})).rules
        assert rule.onto is onto


def test_equal_rows_have_no_distance_and_near_ones_keep_it(monkeypatch: pytest.MonkeyPatch) -> None:
    assert least_distance(torch.cat([TABLE, TABLE[3:4]])) == 0
    far = TABLE.clone()
    far[7] = far[8] + torch.tensor([1e-13, 0, 0, 0, 0, 0], dtype=torch.float64)
    exact = float((far[7] - far[8]).norm())
    assert least_distance(far) == exact > 0
    ulp = torch.ones(3, 4)  # float32 rows one unit in the last place apart, far from zero
    ulp[1, 0], ulp[2] = 1 + 2**-23, 5.0
    assert least_distance(ulp + 0) == 2**-23
    monkeypatch.setattr(module, "CHUNK", 2 * 200 * 7)  # in chunks, the last one shorter
    assert least_distance(TABLE) == pytest.approx(pdist(TABLE.numpy()).min(), rel=1e-12)
    apart = torch.from_numpy(cdist(TABLE.numpy(), TABLE.numpy())).fill_diagonal_(math.inf)
    assert torch.equal(nearest_others(TABLE, torch.arange(0, 200, 3)), apart.argmin(1)[::3])


def test_rounding_of_scores_does_not_change_the_nearest_row() -> None:
    """Rows whose squares are 10^7 times those of their distances: float32 scores alone are wrong for most vectors."""
    generator = torch.Generator().manual_seed(3)
    table = 100 * torch.nn.functional.normalize(torch.randn(4, 32, generator=generator, dtype=torch.float64))
    table = (table[:, None] + 0.004 * torch.randn(4, 50, 32, generator=generator, dtype=torch.float64)).flatten(0, 1)
    rows = table.float()
    vectors = rows + 0.002 * torch.randn(rows.shape, generator=generator)
    wanted = torch.from_numpy(cdist(vectors.double().numpy(), rows.double().numpy()).argmin(1))
    assert torch.equal(nearest(rows, vectors), wanted)
    centred = rows - rows.mean(0)
    plain = ((vectors - rows.mean(0)) @ centred.T - centred.square().sum(1) / 2).argmax(1)
    assert not torch.equal(plain, wanted)


def test_norms_that_differ_are_corrected() -> None:
    tokens = torch.arange(200)
    assert torch.equal(nearest(TABLE, TABLE), tokens)
    assert not torch.equal((TABLE @ TABLE.T).argmax(1), tokens)


def test_tables_and_chunks(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(module, "CHUNK", 1000)
    book = Codebook(TABLE.float())
    assert torch.equal(book.decode(TABLE.float().view(4, 50, 6)), torch.arange(200).view(4, 50))
    assert book.decode(TABLE[:0].float()).shape == (0,)
    assert Codebook(TABLE[:1]).decode(TABLE).eq(0).all()
    for wrong in (torch.ones(0, 3), torch.full((2, 2), math.nan), torch.ones(3)):
        with pytest.raises(ValueError, match="a table of one or more finite rows is needed"):
            Codebook(wrong)


def keys(rows: int) -> Tensor:
    return torch.arange(1, rows + 1, dtype=torch.int32) * 7919


def test_the_penalty_is_the_mean_hinge_of_pairs() -> None:
    code = make(LearnedCode, {"vocab": 9, "margin": 3.0, "weight": 0.5, "pairs": 4096}, 4)
    found = code.penalty(keys(60))
    assert found is not None
    shortfall = (3.0 - torch.pdist(code.rows().detach())).clamp(min=0)
    assert found.shape == (60,)
    error = 0.5 * float(shortfall.std()) / 4096**0.5  # standard error of a row
    away = (found.detach() - 0.5 * float(shortfall.mean())) / error
    assert float(away.abs().max()) < 4.5
    assert abs(float(away.mean())) * 60**0.5 < 4.5
    again = code.penalty(keys(60)[1:])
    assert again is not None
    assert torch.equal(again, found[1:])  # of a row's key alone
    assert make(LearnedCode, {"vocab": 9, "weight": 0.0}, 4).penalty(keys(3)) is None


def test_the_penalty_moves_rows_apart() -> None:
    code = make(LearnedCode, {"vocab": 20, "margin": 1.0, "std": 0.1}, 8)
    before, optimizer = least_distance(code.rows()), torch.optim.Adam(code.parameters(), lr=0.02)
    for step in range(150):
        optimizer.zero_grad()
        penalty = code.penalty(keys(4) + step)
        assert penalty is not None
        penalty.mean().backward()
        optimizer.step()
    assert before < 0.5 < 0.95 < least_distance(code.rows())
