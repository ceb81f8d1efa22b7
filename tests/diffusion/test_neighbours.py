"""The nearest-neighbour kernel: its graph and its walks beside dense tables and scipy, at sizes where those can be had."""

import subprocess
import sys
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import scipy.linalg
import torch
from safetensors.torch import save_file
from sedd_graph_registry.noise._neighbour_graph import exchange, nearest
from sedd_graph_registry.noise.neighbours import Neighbours
from torch import Tensor

from sedd_graph.component.base import Context
from sedd_graph.diffusion.batch import Randomness
from sedd_graph.errors import UserError

N = 60


def made(states: int = N, **config: Any) -> Neighbours:
    return Neighbours(Neighbours.Config(**config), Context({"n": states}))


def points(states: int = N, width: int = 8) -> Tensor:
    return torch.randn(states, width, generator=torch.Generator().manual_seed(0))


def test_the_graph_is_that_of_the_nearest_both_ways() -> None:
    x = points()
    apart = torch.cdist(x.double(), x.double()).fill_diagonal_(torch.inf)
    near = apart.argsort(1)[:, :5]
    assert torch.equal(nearest(x, 5).sort(1).values, near.sort(1).values)
    table = torch.zeros(N, N, dtype=torch.float64).scatter_(1, near, 1.0)
    q = made(neighbours=5, width=8).rate_matrix(1.0)
    off = q - torch.diag(q.diagonal())
    assert torch.equal(off > 0, table + table.T > 0)
    torch.testing.assert_close(q, q.T)  # even noise at the end


def test_the_clock_and_the_exponential_are_scipys() -> None:
    for states, even in ((N, 0.0), (N, 0.2), (100, 0.0), (100, 0.2)):  # by tables, and by sparse products
        k = made(states, neighbours=5, width=8, even=even)
        q = k.rate_matrix(1.0)
        assert np.linalg.eigvalsh(q.numpy())[-2] == pytest.approx(-1, abs=1e-6)
        for sigma in (1e-3, 0.7, 6.0):
            torch.testing.assert_close(
                k.transition_matrix(sigma),
                torch.from_numpy(scipy.linalg.expm(sigma * q.numpy())),
                rtol=1e-8,
                atol=1e-13,
            )


def test_tokens_are_left_about_as_often() -> None:
    """Hubs, which many are near to, are left no oftener than others: rates with what stays sum to 1."""
    graph = exchange(points(400, 64), 10, even=0.0)
    assert int(graph.start.diff().max()) > 60
    assert float(graph.leave.max()) < 1
    assert float(graph.leave.min()) > 0.3


@pytest.mark.parametrize("even", [0.0, 0.3])
def test_walks_follow_the_exponential(even: float) -> None:
    k, rows, sigma = made(12, neighbours=3, even=even, width=4), 4000, 0.6
    x0 = torch.arange(12).expand(rows, 12)
    x = k.sample(x0, torch.full((rows,), sigma), random=Randomness(torch.Generator().manual_seed(0)), corrupt=x0 >= 0)
    found = torch.nn.functional.one_hot(x, 12).double().mean(0)  # [from, to]
    wanted = torch.from_numpy(scipy.linalg.expm(sigma * k.rate_matrix(1.0).numpy()))
    chance = (12 / rows) ** 0.5 / 2
    assert float((found - wanted).abs().sum(1).max() / 2) < 2 * chance


def test_walks_do_not_depend_on_how_the_batch_is_split() -> None:
    k = made(neighbours=5)
    x0, sigma = torch.arange(N).reshape(4, 15), torch.tensor([0.1, 5.0, 1.0, 3.0])
    whole = k.sample(x0, sigma, random=Randomness(torch.Generator().manual_seed(3)), corrupt=x0 >= 0)
    for first in (0, 2):
        random, part = Randomness(torch.Generator().manual_seed(3), start=first, total=4), slice(first, first + 2)
        assert torch.equal(whole[part], k.sample(x0[part], sigma[part], random=random, corrupt=x0[part] >= 0))


@pytest.mark.parametrize("few", [64, 0])
def test_tables_and_sparse_products_are_the_same(few: int, monkeypatch: pytest.MonkeyPatch) -> None:
    """At any noise, one that is taken back included, and to the smallest chance."""
    monkeypatch.setattr("sedd_graph_registry.noise._uniformization._FEW", few)
    k = made(12, neighbours=2, width=4, even=0.1)
    q = k.rate_matrix(1.0)
    for sigma in (-2.0, -0.3, 0.0, 1e-5, 0.4, 30.0):
        x = torch.eye(12, dtype=torch.float64)[None]
        found = k._product(x, torch.tensor([sigma], dtype=torch.float64))[0]
        assert torch.allclose(found, torch.from_numpy(scipy.linalg.expm(sigma * q.numpy())), rtol=1e-9, atol=1e-13)
        assert sigma <= 0 or bool((found > 0).all())
    assert torch.equal(k._rates_into(torch.arange(12)[None], q)[0].fill_diagonal_(0), q.clone().fill_diagonal_(0))


@pytest.mark.parametrize("few", [64, 0])
def test_gradients_go_through_tables_and_sparse_products(few: int, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("sedd_graph_registry.noise._uniformization._FEW", few)
    k = made(10, neighbours=3)
    raw = torch.randn(2, 3, 10, generator=torch.Generator().manual_seed(0), dtype=torch.float64, requires_grad=True)
    xt, x0 = torch.tensor([[1, 2, 3], [4, 5, 6]]), torch.tensor([[1, 0, 3], [9, 5, 7]])
    sigma = torch.tensor([0.2, 3.0], dtype=torch.float64)
    assert torch.autograd.gradcheck(lambda raw: k.nelbo(raw.log_softmax(-1), xt, x0, sigma), (raw,))


PLAIN = """
import sys, torch
from sedd_graph_registry.noise.neighbours import Neighbours
from sedd_graph.component.base import Context
kernel = Neighbours(Neighbours.Config(neighbours=3), Context({"n": 10}))
raw = torch.zeros(1, 3, 10, requires_grad=True)
tokens = torch.tensor([[1, 2, 3]])
kernel.nelbo(raw.log_softmax(-1), tokens, tokens + 1, torch.ones(1)).sum().backward()
assert raw.grad.isfinite().all() and raw.grad.any()
print("torch._dynamo" in sys.modules)
"""


def test_plain_calls_do_without_the_compiler() -> None:
    """It takes seconds to import, which a proof would spend."""
    done = subprocess.run([sys.executable, "-c", PLAIN], capture_output=True, text=True, check=True)
    assert done.stdout.strip() == "False"


@pytest.mark.slow
def test_operators_are_the_plain_calls(monkeypatch: pytest.MonkeyPatch) -> None:
    k, found = made(10, neighbours=3), list[list[Tensor]]()
    raw = torch.randn(2, 3, 10, generator=torch.Generator().manual_seed(0), dtype=torch.float64, requires_grad=True)
    x, sigma = torch.tensor([[1, 2, 3], [4, 5, 6]]), torch.tensor([0.2, 3.0], dtype=torch.float64)
    for compiling in (False, True):
        monkeypatch.setattr(torch.compiler, "is_compiling", lambda compiling=compiling: compiling)
        nats = k.nelbo(raw.log_softmax(-1), x, x + 1, sigma)
        found.append([nats, *torch.autograd.grad(nats.sum(), raw)])
    assert all(map(torch.equal, *found))


def test_a_graph_that_falls_apart_is_refused_or_joined() -> None:
    apart = torch.cat([points(20), points(20) + 1000])
    with pytest.raises(UserError, match="falls into 2 pieces"):
        exchange(apart, 3, even=0.0)
    assert exchange(apart, 3, even=0.05).gap == 0.0
    chain = torch.arange(400.0)[:, None]
    with pytest.raises(UserError, match="mixes too slowly"):
        exchange(chain, 2, even=0.0)
    # a slow mode is found, or counts as none: the even moves decide
    assert exchange(torch.arange(5000.0)[:, None], 2, even=0.5).gap < 1e-4


@pytest.mark.parametrize("states", [250, 300, 1500])
def test_the_gap_is_that_of_all_eigenvalues(states: int) -> None:
    graph = exchange(points(states, 4), 6, even=0.1)
    table = torch.zeros(states, states, dtype=torch.float64)
    table[torch.repeat_interleave(torch.arange(states), graph.start.diff()), graph.to] = graph.rate
    table -= torch.diag(graph.leave)
    assert graph.gap == pytest.approx(-np.linalg.eigvalsh(table.numpy())[-2], rel=1e-6)


def test_files(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    drawn = torch.randn(N, 64, generator=torch.Generator().manual_seed(0))
    np.save("e.npy", drawn.numpy())
    save_file({"wte.weight": drawn.half(), "ids": torch.zeros(2, 2, dtype=torch.int64)}, "e.safetensors")
    wanted = made().rate_matrix(1.0)
    torch.testing.assert_close(made(file="e.npy").rate_matrix(1.0), wanted)
    half = made(file="e.safetensors", tensor="wte.weight").rate_matrix(1.0)
    assert float(((half > 0) == (wanted > 0)).double().mean()) > 0.99
    for config, message in (
        ({"file": "e.safetensors", "tensor": "none"}, "has no tensor 'none'; it has ids, wte.weight"),
        ({"file": "e.safetensors", "tensor": "ids"}, "finite numbers of two axes"),
        ({"file": "absent.npy"}, "cannot be read"),
        ({"file": "/etc/hostname"}, "not below the working directory"),
    ):
        with pytest.raises(UserError, match=message):
            _ = made(**config).graph  # type: ignore[arg-type]
    with pytest.raises(UserError, match="60 embeddings, but the model has 5 states"):
        _ = made(5, file="e.npy").graph
    with pytest.raises(ValueError, match="give both or neither"):
        Neighbours.Config(file="e.safetensors")


def test_too_little_noise_for_its_size_is_seen() -> None:
    k = made(400, neighbours=8)
    little, enough = k.unmixed(2.0), k.unmixed(12.0)
    exact = torch.from_numpy(scipy.linalg.expm(2.0 * k.rate_matrix(1.0).numpy()))
    assert little <= float((exact - 1 / 400).abs().sum(0).max() / 2) + 1e-9
    assert little > 0.02 > enough
