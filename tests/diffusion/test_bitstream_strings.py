"""Reversible noise on strings: round trips of every kernel that declares fates, refusals, and the size of the record."""

import math
from typing import Any

import pytest
import torch
from torch import Tensor

from sedd_graph.component.base import Context
from sedd_graph.diffusion.bitstream.bitstream import Bitstream
from sedd_graph.diffusion.bitstream.strings import denoise_string_step, denoise_strings, noise_strings
from sedd_graph.diffusion.strings.kernel import StringKernel
from sedd_graph.diffusion.strings.strings import Strings
from sedd_graph.errors import UserError
from tests.diffusion.test_bitstream import REGISTRY, TIMES, schedule
from tests.verify.planted import planted

KERNELS = ("delete", "indel", "mask_delete", "edit_flow")
TOKENS = 20


def kernel(op: str, **config: Any) -> StringKernel:
    cls: Any = REGISTRY.component(op)
    found: StringKernel = planted(cls, {}, config, TOKENS + 1 + (op == "mask_delete"))
    return found


def mixed(**config: Any) -> StringKernel:
    """An edit flow with noise strings."""
    cls: Any = REGISTRY.component("edit_flow")
    found: StringKernel = cls(cls.Config(mean_length=8.0, **config), Context({"n": TOKENS + 1}))
    return found


def strings(kernel: StringKernel, rows: int = 30, longest: int = 12, *, one_length: bool = False) -> Strings:
    generator = torch.Generator().manual_seed(5)
    lengths = torch.randint(longest + 1, (rows,), generator=generator)
    attend = torch.arange(longest + 1) <= (torch.full_like(lengths, longest) if one_length else lengths)[:, None]
    tokens = torch.randint(kernel.data_tokens, (rows, longest + 1), generator=generator)
    tokens[:, 0] = kernel.start
    return Strings(torch.where(attend, tokens, kernel.start), attend)


def texts(strings: Strings) -> list[list[int]]:
    return [row[real].tolist() for row, real in zip(strings.tokens[:, 1:], strings.attend[:, 1:], strict=True)]


@pytest.mark.parametrize("op", KERNELS)
def test_strings_to_noise_and_back(op: str) -> None:
    k, s = kernel(op), schedule()
    x = strings(k)
    new = Bitstream.new(3, *x.tokens.shape, lanes=8)
    y, bitstream = noise_strings(k, s, x, TIMES, new)
    assert texts(y) != texts(x)
    z, left = denoise_strings(k, s, y, TIMES, Bitstream.from_bytes(bitstream.to_bytes()))
    assert texts(z) == texts(x)
    assert left.to_bytes() == new.to_bytes()


@pytest.mark.parametrize("alignment", ["optimal", "padded"])
@pytest.mark.parametrize("longest", [None, 15])
def test_text_mixed_with_noise_strings_and_back(alignment: str, longest: int | None) -> None:
    k, s = mixed(alignment=alignment, longest=longest), schedule()
    x = strings(k, 60)
    for time in (0.1, 0.6, 1.0):
        new = Bitstream.new(3, *x.tokens.shape, lanes=4)
        y, bitstream = noise_strings(k, s, x, [time], new)
        assert texts(y) != texts(x)
        z, left = denoise_strings(k, s, y, [time], Bitstream.from_bytes(bitstream.to_bytes()))
        assert texts(z) == texts(x)
        assert left.to_bytes() == new.to_bytes()
        assert bitstream.information <= bitstream.bits <= bitstream.information + 64 * bitstream.lanes
    assert float(y.lengths.double().mean()) == pytest.approx(6.0, abs=2.5)  # noise has the length of noise strings
    with pytest.raises(UserError, match="take one time"):
        noise_strings(k, s, x, TIMES, new)
    other = Strings(torch.where(y.attend & (y.tokens < TOKENS - 1), y.tokens + 1, y.tokens), y.attend)
    with pytest.raises(UserError, match="noisy rows are not those"):
        denoise_strings(k, s, other, [time], bitstream)
    with pytest.raises(UserError, match="another kernel"):
        denoise_strings(mixed(alignment=alignment, longest=14), s, y, [time], bitstream)


def test_columns_that_are_no_alignment_are_refused() -> None:
    """Other noisy strings lead to columns that the two strings do not have, or to other strings; never to the text."""
    k, s = mixed(), schedule()
    x = strings(k, 60)
    y, bitstream = noise_strings(k, s, x, [0.5], Bitstream.new(3, *x.tokens.shape, lanes=4))
    last, refused = bitstream.steps[-1], 0
    for row in y.lengths.nonzero()[:20, 0].tolist():
        tokens = y.tokens.clone()
        tokens[row, 1] = (tokens[row, 1] + 1) % TOKENS
        try:
            z, rest = denoise_string_step(k, last.end, last.start, Strings(tokens, y.attend), bitstream)
        except UserError:
            refused += 1
        else:
            assert texts(z) != texts(x) or not rest.pristine
    assert refused


def test_the_record_of_aligned_noise_is_near_what_noise_erased() -> None:
    """Text of which nothing is left: the text and the unseen noise, against the entropy of both."""
    k, s = mixed(), schedule()
    x = strings(k, 100, 30, one_length=True)
    _, bitstream = noise_strings(k, s, x, [1.0], Bitstream.new(3, *x.tokens.shape, lanes=1))
    assert bitstream.information < 1.3 * 100 * 30 * math.log2(TOKENS)


def test_empty_strings_and_no_strings() -> None:
    k, s = kernel("indel"), schedule()
    for rows in (0, 3):
        x = Strings(torch.full((rows, 1), k.start), torch.ones(rows, 1, dtype=torch.bool))
        y, bitstream = noise_strings(k, s, x, TIMES, Bitstream.new(3, max(rows, 1), 1))
        assert texts(denoise_strings(k, s, y, TIMES, bitstream)[0]) == [[]] * rows


def test_the_record_of_deletions_is_as_long_as_the_places_and_the_tokens() -> None:
    k, s = kernel("delete"), schedule()
    rows, length = 40, 40
    x = strings(k, rows, length, one_length=True)
    y, bitstream = noise_strings(k, s, x, [0.5], Bitstream.new(3, rows, length))
    gone = (length - y.lengths).double()
    # of all strings of this length with this many deletions, each in nats: the places, and the deleted tokens
    places = math.lgamma(length + 1) - torch.lgamma(gone + 1) - torch.lgamma(length - gone + 1)
    bound = float((places + gone * math.log(TOKENS)).sum()) / math.log(2)
    assert bound <= bitstream.bits <= 1.05 * bound + 64


def test_the_record_under_births_is_as_long_as_its_entropy() -> None:
    k, s = kernel("indel", mean_length=20.0), schedule()
    x = k.prior(80, longest=400, generator=torch.Generator().manual_seed(1), allowed=None)
    _, bitstream = noise_strings(k, s, x, [0.4], Bitstream.new(3, 1, 1))
    assert isinstance(k.law, Tensor)
    sigma = float(s.sigma(torch.tensor([0.4], dtype=torch.float64)))
    fates = k.fates(sigma)
    assert fates is not None

    def entropy(*chances: float) -> float:
        return -sum(p * math.log2(p) for p in chances if p > 0)

    # the process is reversible: what is erased has the entropy of what is drawn
    b, alive = fates.birth, float(fates.survive[0])
    each = entropy(alive, float(fates.vanish[0]), fates.replace)
    followed = entropy(b, 1 - b) / (1 - b)
    token = entropy(*k.law.tolist())
    length = float(x.lengths.double().mean())
    born = (1 + length * (alive + fates.replace)) * b / (1 - b) + length * fates.replace
    bound = length * each + (1 + length * (alive + fates.replace)) * followed + born * token
    assert 0.95 * bound * 80 <= bitstream.bits <= 1.05 * bound * 80 + 64


def test_altered_strings_and_other_kernels_are_refused() -> None:
    k, s = kernel("mask_delete"), schedule()
    x = strings(k)
    y, bitstream = noise_strings(k, s, x, TIMES, Bitstream.new(3, *x.tokens.shape))
    full = y.lengths.nonzero()[:3, 0]
    for row in full.tolist():
        tokens = y.tokens.clone()
        tokens[row, 1] = (tokens[row, 1] + 1) % k.data_tokens
        with pytest.raises(UserError, match="noisy rows are not those of this bitstream"):
            denoise_strings(k, s, Strings(tokens, y.attend), TIMES, bitstream)
    attend = y.attend.clone()
    attend[full[0], y.lengths[full[0]]] = False
    with pytest.raises(UserError):
        denoise_strings(k, s, Strings(y.tokens, attend), TIMES, bitstream)
    with pytest.raises(UserError, match="another kernel"):
        denoise_strings(kernel("mask_delete", pace=2.0), s, y, TIMES, bitstream)
    outside = Strings(torch.where(y.attend, k.start, y.tokens), y.attend)
    with pytest.raises(UserError, match="outside the vocabulary"):
        denoise_string_step(k, bitstream.steps[-1].end, bitstream.steps[-1].start, outside, bitstream)


def test_what_has_no_reversible_noise_is_refused() -> None:
    s, x = schedule(), strings(kernel("indel"))
    new = Bitstream.new(3, *x.tokens.shape)
    with pytest.raises(UserError, match="leave out the reference"):
        noise_strings(kernel("indel"), s, x, TIMES, new, reference=torch.ones(TOKENS))
    with pytest.raises(UserError, match="20 positive numbers"):
        noise_strings(kernel("delete"), s, x, TIMES, new, reference=torch.ones(3))
    masked = kernel("mask_delete")
    assert masked.data_tokens == TOKENS
    y = Strings(torch.where(x.attend, TOKENS, TOKENS), x.attend)
    with pytest.raises(UserError, match="only strings of data tokens"):
        noise_strings(masked, s, y, TIMES, new)
