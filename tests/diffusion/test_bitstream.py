"""Reversible noise on tokens: the coder, round trips of every kernel, altered bitstreams, and the size of the record."""

import subprocess
import sys
from typing import Any

import numpy as np
import pytest
import torch
from scipy.stats import chisquare
from torch import Tensor

from sedd_graph.component.base import Context
from sedd_graph.component.registry import discover
from sedd_graph.diffusion.bitstream.bitstream import Bitstream
from sedd_graph.diffusion.bitstream.coder import TOTAL, Reader, Stack, Writer
from sedd_graph.diffusion.bitstream.noise import denoise, denoise_step, levels, noise
from sedd_graph.diffusion.bitstream.tables import Rows, SharedRows, rounded
from sedd_graph.diffusion.schedule import Schedule
from sedd_graph.diffusion.tokens.kernel import Kernel
from sedd_graph.errors import UserError

REGISTRY = discover()
KERNELS = (
    "absorb",
    "uniform",
    "unigram",
    "mixture",
    "power",
    "learned_power",
    "spindle",
    "neighbours",
    "ordinal",
    "rates",
)
TIMES = (0.3, 0.7)


def made(op: str, states: int | None = None, **config: Any) -> Any:
    """Construct a registered component with its example Config."""
    cls: Any = REGISTRY.component(op)
    return cls(cls.Config.model_validate({**cls.example, **config}), Context({"n": states} if states else {}))


def schedule() -> Schedule:
    cls: Any = REGISTRY.component("loglinear")
    found: Schedule = cls(cls.Config(), Context({}))
    return found


def kernel(op: str) -> Kernel:
    found: Kernel = made(op, 4 if op == "rates" else 33)
    return found


def rows(kernel: Kernel, count: int = 40, length: int = 12) -> Tensor:
    return torch.randint(kernel.data_tokens, (count, length), generator=torch.Generator().manual_seed(8))


def table(rows: int = 5, symbols: int = 19) -> Rows:
    weights = np.random.default_rng(0).random((rows, symbols)) ** 4
    weights[1, 4:] = 0
    return Rows(rounded(weights))


def test_pop_inverts_push_and_push_inverts_pop() -> None:
    numbers, lanes = np.random.default_rng(1), 7
    given = numbers.integers(0, 5, (200, lanes))
    stack, law, every = Stack(b"seed", "a", lanes), table(), np.ones(lanes, dtype=bool)
    drawn = [law.take(Reader(stack), row, every, None) for row in given]
    assert not stack.pristine
    writer = Writer(stack)
    for row, symbols in zip(given, drawn, strict=True):
        law.take(writer, row, every, symbols)
    writer.finish()
    assert stack.pristine
    # the other order, below the start of the stream
    for row, symbols in zip(given, drawn, strict=True):
        law.take(writer, row, every, symbols)
    writer.finish()
    ideal = sum(law.bits(row, symbols).sum() for row, symbols in zip(given, drawn, strict=True))
    stored = 16 * sum(len(words) for words in stack.explicit()) + 64 * lanes
    assert ideal <= stored <= ideal + 64 * lanes
    again = [law.take(Reader(stack), row, every, None) for row in given]
    assert all((a == b).all() for a, b in zip(drawn, again, strict=True))
    assert stack.pristine


def test_lanes_that_do_not_take_part_are_unchanged() -> None:
    stack, law = Stack(b"seed", "a", 4), table()
    some = np.array([True, False, True, False])
    before = stack.state.copy()
    for _ in range(50):
        law.take(Reader(stack), np.zeros(4, dtype=np.int64), some, None)
    assert ((stack.state == before) == ~some).all()
    assert ((stack.at == 0) == ~some).all()


def test_frequencies_sum_to_the_total_and_keep_the_support() -> None:
    weights = np.array([[1e-30, 0.0, 1.0, 3.0], [0.0, 0.0, 0.0, 2.0]])
    nearest, kept = rounded(weights), rounded(weights, weights > 0)
    assert (nearest.sum(-1) == TOTAL).all()
    assert (kept.sum(-1) == TOTAL).all()
    assert nearest[0, 0] == 0
    assert kept[0, 0] == 1
    assert kept[0, 1] == 0
    assert np.abs(nearest[0] / TOTAL - weights[0] / weights[0].sum()).max() < 2**-28


def test_shared_rows_take_the_condition_out_exactly() -> None:
    others = np.array([0.3, 0.0, 0.4, 1e-9, 0.3])
    stay = np.full(5, TOTAL // 4)
    law = SharedRows(stay, rounded(others[None], others[None] > 0)[0])
    for given in range(5):
        row = np.full(5, given)
        found = 2.0 ** -law.bits(row, np.arange(5))
        expected = 0.75 * others / (others.sum() - others[given])
        expected[given] = 0.25
        assert found[others > 0] == pytest.approx(expected[others > 0], rel=0.5 if given == 3 else 1e-2, abs=2e-8)


@pytest.mark.parametrize("op", KERNELS)
def test_text_to_noise_and_back(op: str) -> None:
    k, s = kernel(op), schedule()
    x = rows(k)
    corrupt = torch.rand(x.shape, generator=torch.Generator().manual_seed(1)) < 0.9
    new = Bitstream.new(11, *x.shape, lanes=7)
    y, bitstream = noise(k, s, x, TIMES, new, corrupt=corrupt)
    assert new.pristine
    assert torch.equal(y[~corrupt], x[~corrupt])
    assert bool((y != x).any())
    z, left = denoise(k, s, y, TIMES, Bitstream.from_bytes(bitstream.to_bytes()), corrupt=corrupt)
    assert torch.equal(z, x)
    assert left.to_bytes() == new.to_bytes()


@pytest.mark.parametrize("op", KERNELS)
def test_the_record_is_as_long_as_the_entropy_of_what_noise_erased(op: str) -> None:
    k, s = kernel(op), schedule()
    x = rows(k, 100, 50)
    _, bitstream = noise(k, s, x, [0.6], Bitstream.new(5, *x.shape, lanes=4))
    with torch.no_grad():
        joint = k.transition_matrix(levels(s, [0.6])[0])[:, : k.data_tokens] / k.data_tokens
    bits = float(-torch.xlogy(joint, joint / joint.sum(1, keepdim=True).clamp(min=1e-300)).sum()) / np.log(2)
    assert bitstream.bits <= 1.05 * bits * x.numel() + 64 * bitstream.lanes
    assert bitstream.bits >= 0.95 * bits * x.numel()


@pytest.mark.parametrize("op", KERNELS)
def test_noise_has_the_distribution_of_the_kernel(op: str) -> None:
    k, s = kernel(op), schedule()
    token = 1
    x = torch.full((400, 100), token)
    y, _ = noise(k, s, x, TIMES, Bitstream.new(2, *x.shape, lanes=400))
    with torch.no_grad():
        law = k.transition_matrix(levels(s, TIMES)[-1])[:, token].numpy()
    seen = np.bincount(y.numpy().ravel(), minlength=k.states)
    assert not seen[law < 1e-9].any()
    often = law * x.numel() > 5
    if often.sum() > 1:
        assert chisquare(seen[often], law[often] / law[often].sum() * seen[often].sum()).pvalue > 1e-4


def test_a_large_vocabulary() -> None:
    for op in ("absorb", "uniform", "power"):
        k, s = made(op, 50_258), schedule()
        x = torch.randint(50_257, (10, 8), generator=torch.Generator().manual_seed(8))
        y, bitstream = noise(k, s, x, [0.5], Bitstream.new(3, *x.shape))
        assert torch.equal(denoise(k, s, y, [0.5], bitstream)[0], x)
    with pytest.raises(UserError, match="limited to 2,048 states"):
        noise(made("neighbours", 4096), s, x[:, :4] % 4096, [0.5], Bitstream.new(3, 20, 4))


def test_the_same_bitstream_in_another_process() -> None:
    program = (
        "import sys, torch; from tests.diffusion.test_bitstream import *; "
        "x = rows(kernel('ordinal')); torch.set_num_threads(int(sys.argv[1])); "
        "y, t = noise(kernel('ordinal'), schedule(), x, TIMES, Bitstream.new(4, *x.shape)); "
        "sys.stdout.buffer.write(t.to_bytes() + y.numpy().tobytes())"
    )
    x = rows(kernel("ordinal"))
    y, bitstream = noise(kernel("ordinal"), schedule(), x, TIMES, Bitstream.new(4, *x.shape))
    found = subprocess.run([sys.executable, "-c", program, "2"], capture_output=True, check=True).stdout
    assert found == bitstream.to_bytes() + y.numpy().tobytes()


def test_altered_bitstreams_rows_kernels_and_times_are_refused() -> None:
    k, s = kernel("unigram"), schedule()
    x = rows(k, 10)
    y, bitstream = noise(k, s, x, TIMES, Bitstream.new(6, *x.shape))
    data, numbers = bitstream.to_bytes(), np.random.default_rng(3)
    for place in numbers.integers(0, len(data), 300):
        other = bytearray(data)
        other[place] ^= int(numbers.integers(1, 256))
        with pytest.raises(UserError):
            Bitstream.from_bytes(bytes(other))
    with pytest.raises(UserError, match="altered or is incomplete"):
        Bitstream.from_bytes(data[:-1])
    with pytest.raises(UserError, match="not a bitstream"):
        Bitstream.from_bytes(b"text")
    for place in range(10):
        other_rows = y.clone()
        other_rows[place, 3] = (other_rows[place, 3] + 1) % k.states
        with pytest.raises(UserError, match="noisy rows are not those of this bitstream"):
            denoise(k, s, other_rows, TIMES, bitstream)
    # without the digest of the rows, what is left on the bitstream tells
    last = bitstream.steps[-1]
    wrong, rest = denoise_step(k, last.end, last.start, (y + 1) % k.states, bitstream, corrupt=torch.ones_like(y) > 0)
    assert not torch.equal(wrong, x)
    assert not rest.pristine
    with pytest.raises(UserError, match="another kernel"):
        denoise(kernel("uniform"), s, y, TIMES, bitstream)
    with pytest.raises(UserError, match="noisy rows are not those"):
        denoise(k, s, y[:, :-1], TIMES, bitstream)
    with pytest.raises(UserError, match="2 steps"):
        denoise(k, s, y, TIMES[1:], bitstream)
    with pytest.raises(UserError, match="from total noise"):
        denoise(k, s, y, (0.3, 0.8), bitstream)
    with pytest.raises(UserError, match="noise on it already"):
        noise(k, s, x, TIMES, bitstream)


def test_bad_arguments_are_refused() -> None:
    k, s = kernel("absorb"), schedule()
    x = rows(k)
    with pytest.raises(UserError, match="increasing"):
        noise(k, s, x, (0.7, 0.3), Bitstream.new(1, *x.shape))
    with pytest.raises(UserError, match="data tokens"):
        noise(k, s, x.clone().fill_(32), TIMES, Bitstream.new(1, *x.shape))
    with pytest.raises(UserError, match="32 positive numbers"):
        noise(k, s, x, TIMES, Bitstream.new(1, *x.shape), reference=torch.zeros(32))
    with pytest.raises(UserError, match="16 bytes"):
        Bitstream.new(b"short", 1, 1)
    bitstream = Bitstream.new(1, *x.shape)
    with pytest.raises(UserError, match="0 steps"):
        denoise(k, s, x, TIMES, bitstream)


def test_a_reference_near_the_data_shortens_the_record() -> None:
    k, s = kernel("absorb"), schedule()
    weights = torch.linspace(1, 30, 32) ** 2
    x = torch.multinomial(weights.expand(50, -1), 20, replacement=True, generator=torch.Generator().manual_seed(1))
    plain = noise(k, s, x, [0.9], Bitstream.new(1, *x.shape, lanes=10))[1]
    y, near = noise(k, s, x, [0.9], Bitstream.new(1, *x.shape, lanes=10), reference=weights)
    assert near.bits < plain.bits
    assert torch.equal(denoise(k, s, y, [0.9], near, reference=weights)[0], x)
    with pytest.raises(UserError, match="another kernel, reference"):
        denoise(k, s, y, [0.9], near)
