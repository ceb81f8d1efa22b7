"""Conformance tests of components of the ``data`` and ``train`` sections of a blueprint, on small data."""

from __future__ import annotations

import json
import math
import tempfile
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn
from torch.nn.utils import parametrize

from sedd_graph.data.config import DataConfig
from sedd_graph.data.rows import open_data
from sedd_graph.data.sources import Document, read_corpus
from sedd_graph.errors import UserError
from sedd_graph.testing.case import Case, Failures, Found
from sedd_graph.training.optimizer_state import named_state, set_state

__all__ = [
    "check_adapter",
    "check_corpus",
    "check_lr_schedule",
    "check_optimizer",
    "check_points",
    "check_tokenizer",
    "check_tracker",
]

TEXTS = ["ab ba b", "a bab\n", "", "b"]
"""Test texts. They contain only four different characters, so that tokenizers with small alphabets cover them."""
STEPS = 50
"""Number of optimizer steps in :func:`check_optimizer`."""


def check_corpus(case: Case) -> Found:
    """Test that a corpus yields documents of text, and the same documents and data fingerprint each time.

    Args:
        case: Class and Config of the corpus, and the folder of its files.

    Yields:
        The failed checks.
    """
    corpus = case.cls(case.config)
    first, second = (read_corpus(corpus, root=case.root) for _ in range(2))
    for found in first:
        if not (isinstance(found, Document) and isinstance(found.text, str) and isinstance(found.prompt, str)):
            yield "documents", f"'documents' yields {found!r}, not a Document of text"
            return
    if first != second:
        yield "determinism", "'documents' yields other documents, or another order, when it is called again"
    if any(d.prompt for d in first) and not corpus.prompted:
        yield "prompted", "there are prompts, but 'prompted' is false"
    rows = "documents" if corpus.prompted else "stream"
    keys = {"corpus": corpus, "tokenizer": "bytes", "length": 2, "rows": rows, "holdout": 0.5}
    if corpus.repeats:  # such text needs held-out text of its own
        keys["heldout"] = "builtin"
    config = DataConfig.model_validate(keys)
    data, again = (open_data(config, root=case.root) for _ in range(2))
    if data.fingerprint() != again.fingerprint():
        yield "fingerprint", "training and held-out rows differ when the corpus is opened again"


def check_points(case: Case) -> Found:
    """Test that a source of real-valued rows returns finite float32 arrays, determined by the random generator alone.

    Args:
        case: Class and Config of the source, and the folder of its files.

    Yields:
        The failed checks.
    """
    source = case.cls(case.config)
    first, second = (source.points(case.root, np.random.Generator(np.random.Philox(key=[7, 0]))) for _ in range(2))
    if not isinstance(first, np.ndarray) or first.dtype != np.float32 or first.ndim < 2 or len(first) < 2:
        yield "points", "'points' returns no float32 array [row, ...] of two rows or more"
        return
    if not np.isfinite(first).all():
        yield "finite", "some points are not finite"
    if not np.array_equal(first, second):
        yield "determinism", "the same generator gives other points when 'points' is called again"


def check_tokenizer(case: Case) -> Found:
    """Test a tokenizer factory: special ids, decoding of encoded texts, and serialisation of the tokenizer to JSON.

    Args:
        case: Class and Config of the factory, and the folder of its files. A tokenizer that has to be
            trained is trained on :data:`TEXTS`.

    Yields:
        The failed checks.
    """
    factory = case.cls(case.config)
    if factory.of_weights:  # makes none of its own
        return
    tokenizer, again = (factory.make(TEXTS if factory.trained else (), root=case.root) for _ in range(2))
    loaded = type(factory).from_json(tokenizer.to_json())
    if tokenizer.to_json() != again.to_json():
        yield "determinism", "the same texts give another tokenizer"
    # training may find fewer tokens in a short text
    if not (factory.size in (None, tokenizer.size) or (factory.trained and tokenizer.size < (factory.size or 0))):
        yield "size", f"the Config says {factory.size} tokens, but the tokenizer has {tokenizer.size}"
    if factory.trained and factory.separates != (tokenizer.end is not None):
        yield "separates", f"'separates' is {factory.separates}, but 'end' is {tokenizer.end}"
    special = {i for i in (tokenizer.pad, tokenizer.end, *tokenizer.forbidden) if i is not None}
    if not special <= set(range(tokenizer.size)):
        yield "ids", f"pad, end and forbidden ids are not all below {tokenizer.size}"
    if tokenizer.pad is not None and tokenizer.pad not in tokenizer.forbidden:
        yield "forbidden", f"padding ({tokenizer.pad}) may be generated: it is not forbidden"
    if not isinstance(json.loads(tokenizer.to_json()), dict):
        yield "json", "'to_json' gives no JSON object"
    for text in TEXTS:
        ids = tokenizer.encode(text)
        if ids.dtype != np.int64 or ids.ndim != 1 or not ((ids >= 0) & (ids < tokenizer.size)).all():
            seen = f"{ids.dtype} {ids.tolist()}"
            yield "encode", f"{text!r} is encoded as {seen}, not as int64 ids below {tokenizer.size}"
        elif set(ids.tolist()) & set(tokenizer.forbidden):
            yield "forbidden", f"{text!r} is encoded with forbidden ids"
        elif (found := tokenizer.decode(ids.tolist())) != text:
            yield "round trip", f"{text!r} is decoded as {found!r}"
        elif loaded.encode(text).tolist() != ids.tolist() or loaded.decode(ids.tolist()) != text:
            yield "json", f"{text!r} is encoded or decoded otherwise after a round trip through JSON"
        elif (wrong := _pieces(tokenizer, text, ids.tolist())) is not None:
            yield "pieces", wrong
    facts = [(t.size, t.pad, t.end, t.forbidden) for t in (tokenizer, loaded)]
    if facts[0] != facts[1]:
        yield "json", f"size, pad, end and forbidden are {facts[1]} after a round trip through JSON, not {facts[0]}"


def _pieces(tokenizer: Any, text: str, ids: list[int]) -> str | None:
    """Return an error message if the bytes of the tokens do not add up to the text; None if they do."""
    try:
        pieces = tokenizer.pieces()
    except UserError:  # the text of a token depends on its neighbours
        return None
    if len(pieces) != tokenizer.size:
        return f"'pieces' gives {len(pieces)} tokens, not {tokenizer.size}"
    found = b"".join(pieces[i] or b"" for i in ids)
    return None if found == text.encode() else f"the pieces of {text!r} are {found!r}"


class _Toy:
    """Convex test problem with the optimizers under test: the loss is the sum of squares of three parameter tensors."""

    def __init__(self, case: Case) -> None:
        generator = torch.Generator().manual_seed(5)
        shapes = {"embed.table": (5, 3), "trunk.0.mix.weight": (4, 3), "trunk.0.mix.bias": (4,)}
        self.parameters = {n: nn.Parameter(torch.randn(s, generator=generator)) for n, s in shapes.items()}
        self.optimizers: list[torch.optim.Optimizer] = case.cls(case.config).make(self.parameters)

    def loss(self) -> Tensor:
        return torch.stack([p.square().sum() for p in self.parameters.values()]).sum()

    def step(self) -> None:
        self.loss().backward()
        for optimizer in self.optimizers:
            optimizer.step()
            optimizer.zero_grad(set_to_none=True)

    def values(self) -> Tensor:
        return torch.cat([p.detach().flatten() for p in self.parameters.values()])


def check_optimizer(case: Case) -> Found:
    """Test that an optimizer factory covers each parameter once and decreases a convex loss.

    A step must also be the same after the optimizer state was saved and loaded, and must leave the parameters unchanged
    if every learning rate is 0.

    Args:
        case: Class and Config of the optimizer factory.

    Yields:
        The failed checks.
    """
    toy, again = _Toy(case), _Toy(case)
    held = [id(p) for o in toy.optimizers for group in o.param_groups for p in group["params"]]
    if sorted(held) != sorted(map(id, toy.parameters.values())):
        yield "parameters", f"{len(held)} parameters are held, not each of the {len(toy.parameters)} once"
        return
    start = toy.loss().item()
    for _ in range(STEPS):
        toy.step()
    if not (end := toy.loss().item()) < start:
        yield "descent", f"{STEPS} steps take a convex loss from {start:.4g} to {end:.4g}"
    with torch.no_grad():
        for name, p in again.parameters.items():
            p.copy_(toy.parameters[name])
    state = named_state(toy.optimizers, toy.parameters)
    set_state(again.optimizers, again.parameters, {name: value.clone() for name, value in state.items()})
    toy.step()
    again.step()
    if not torch.equal(toy.values(), again.values()):
        yield "state", "a step after the state was saved and loaded differs from one without"
    before = toy.values()
    for optimizer in toy.optimizers:
        for group in optimizer.param_groups:
            group["lr"] = 0.0
    toy.step()
    if not torch.equal(before, toy.values()):
        yield "lr", "parameters move though the learning rate of every group is 0"


def check_adapter(case: Case) -> Failures:
    """Test that an adapter leaves a matrix as it is at first, trains parameters that change it, and can be merged.

    Args:
        case: Class and Config of the adapter.

    Returns:
        The failed checks; empty if all pass.
    """
    torch.manual_seed(3)
    linear, x = nn.Linear(24, 16, bias=False), torch.randn(5, 24)
    weight, adapter = linear.weight.detach().clone(), case.cls(case.config)
    if not adapter.patterns:
        return [("patterns", "'patterns' names no weights")]
    parametrize.register_parametrization(linear, "weight", adapter.make(weight))
    dict(linear.named_parameters())["parametrizations.weight.original"].requires_grad_(False)
    if not torch.equal(linear.weight, weight):
        return [("identity", "the adapted matrix differs from the frozen one at first")]
    trained = {n: p for n, p in linear.named_parameters() if p.requires_grad}
    if not trained:
        return [("parameters", "'make' returns a module without trained parameters")]
    for _ in range(2):  # of two factors, the gradient of one is 0 at first
        linear(x).square().sum().backward()
        with torch.no_grad():
            for p in trained.values():
                p.sub_(0.0 if p.grad is None else 0.01 * p.grad.sign())
    silent = [n for n, p in trained.items() if p.grad is None or not p.grad.any()]
    if silent or torch.equal(linear.weight, weight):
        return [("gradient", f"parameters have no gradient, or do not change the matrix: {', '.join(silent) or 'all'}")]
    applied = linear(x).detach()
    parametrize.remove_parametrizations(linear, "weight", leave_parametrized=True)
    if not torch.allclose(linear(x), applied, rtol=1e-6, atol=1e-6):
        return [("merge", "the merged matrix gives other outputs than the adapted one")]
    return []


def check_lr_schedule(case: Case) -> Failures:
    """Test that a learning-rate schedule returns deterministic fractions of the peak learning rate in [0, 1].

    Args:
        case: Class and Config of the schedule.

    Returns:
        The failed checks; empty if all pass.
    """
    schedule = case.cls(case.config)
    for progress in (i / 100 for i in range(101)):
        share = schedule.share(progress)
        if not (isinstance(share, int | float) and math.isfinite(share) and 0 <= share <= 1):
            return [("share", f"the share at progress {progress} is {share!r}, not a number in [0, 1]")]
        if schedule.share(progress) != share:
            return [("determinism", f"the share at progress {progress} differs between two calls")]
    return []


def check_tracker(case: Case) -> Failures:
    """Test that an experiment tracker logs a short run that is resumed once, and leaves the metrics passed unchanged.

    Args:
        case: Class and Config of the tracker.

    Returns:
        The failed checks; empty if all pass.
    """
    metrics = {"loss": 1.5, "learning_rate": 0.25}
    seen: Mapping[str, float] = dict(metrics)
    with tempfile.TemporaryDirectory() as folder:
        run = Path(folder) / "run"
        run.mkdir()
        tracker = case.cls(case.config)
        tracker.describe({"lock_digest": "0" * 16, "train.batch": 8, "train.ema": 0.99, "train.trackers": "[]"})
        tracker.start(run, "under_test")
        try:
            for step in (1, 2):
                tracker.log(step, seen)
                tracker.text(step, "sample", "some text")
            tracker.resume(1)
            tracker.log(2, seen)
        finally:
            tracker.close()
    return [] if seen == metrics else [("purity", "'log' changes the metrics that it is given")]
