"""Verification of vectors that depend on the whole row, and of the network's reading of tokens from them.

Axes: b batch, l length, d width of a vector, v tokens.
"""

from __future__ import annotations

from collections.abc import Mapping

import torch
from torch import Tensor

from sedd_graph.component.check import Check
from sedd_graph.diffusion.vectors.denoiser import Denoiser, first_time
from sedd_graph.diffusion.vectors.objective import Decoding
from sedd_graph.diffusion.vectors.parts import VectorParts
from sedd_graph.verify.guards import generators_state
from sedd_graph.verify.vectors_toy import TOKENS, Toy

__all__ = ["check_context", "check_decoding", "decoded_nats"]

ROWS, LENGTH = 6, 6
"""Size of the batch of random rows that the vectors are verified on."""
CLOSE = 1e-4
"""Largest difference of vectors that should be equal, times their largest number; batches of other sizes are rounded otherwise."""


def check_context(parts: VectorParts) -> Check:
    """Verify that vectors are a frozen function of the whole row, of the positions that they may depend on alone.

    Args:
        parts: Components with the declared number of tokens.
    """
    kernel = parts.kernel
    generator = torch.Generator().manual_seed(23)
    rows = torch.randint(0, kernel.data_tokens, (ROWS, LENGTH), generator=generator)
    other = rows.clone()
    other[:, -1] = (rows[:, -1] + 1) % kernel.data_tokens
    before = generators_state()
    found, moved = kernel.embed(rows), kernel.embed(other)
    size = float(found.abs().max()) or 1.0

    def equal(a: Tensor, b: Tensor) -> bool:
        return float((a - b).abs().max()) <= CLOSE * size

    wrong = []
    if tuple(found.shape) != (ROWS, LENGTH, kernel.width) or not bool(found.isfinite().all()):
        return Check("vectors.context", _CLAIM, False, f"vectors {list(found.shape)}, or some are not finite", _HOW)
    if found.requires_grad or any(p.requires_grad for p in kernel.parameters()):
        wrong.append("vectors are trained")
    if not torch.equal(found, kernel.train().embed(rows)) or generators_state() != before:
        wrong.append("vectors of a row are not the same twice")
    if not equal(found[:1], kernel.embed(rows[:1])):
        wrong.append("vectors of a row depend on other rows")
    if equal(found[:, -1], moved[:, -1]):
        wrong.append("vectors do not depend on their token")
    if equal(found[:, :-1], moved[:, :-1]):
        wrong.append("vectors do not depend on other positions")
    seen = torch.ones_like(rows, dtype=torch.bool)
    seen[:, -1] = False
    padded = kernel.embed(rows, seen)
    if not torch.equal(padded, kernel.embed(other, seen)) or bool(padded[:, -1].any()):
        wrong.append("padding has a vector, or changes others")
    if not equal(padded[:, :-1], kernel.embed(rows[:, :-1])):
        wrong.append("vectors depend on padding")
    prompt, all_seen = torch.zeros_like(seen), torch.ones_like(seen)
    prompt[:, :2] = True
    free = torch.cat([rows[:, :2], (rows[:, 2:] + 1) % kernel.data_tokens], 1)
    held = kernel.embed(rows, all_seen, prompt)
    if not equal(held[:, :2], kernel.embed(free, all_seen, prompt)[:, :2]):
        wrong.append("vectors of given tokens depend on others")
    if not equal(held[:, 2:], found[:, 2:]):
        wrong.append("vectors of free tokens are not those of the whole row")
    scale = f"coordinates have mean {float(found.mean()):.3g}, standard deviation {float(found.std()):.3g}"
    return Check("vectors.context", _CLAIM, not wrong, "; ".join(wrong) or scale, _HOW)


_CLAIM = "vectors are a frozen function of the tokens of the row that they may depend on, and of no others"
_HOW = f"{ROWS} random rows of {LENGTH} tokens, with padding, with prompts, and one by one"


@torch.no_grad()
def check_decoding(parts: VectorParts) -> Check:
    """Verify that tokens are read by the network in its decoding mode at the lowest noise, and obey a mask.

    Args:
        parts: Components with few tokens.
    """
    toy, count = Toy(parts, 2), 64
    perfect = toy.network(parts.objective, "x0")
    told: list[tuple[float, float]] = []

    def run(inputs: Mapping[str, Tensor]) -> dict[str, Tensor]:
        told.extend(zip(inputs["decode"].tolist(), inputs["t"].tolist(), strict=True))
        return perfect(inputs)

    rows = toy.draw(count, torch.Generator().manual_seed(24))
    denoise = Denoiser(run, parts.kernel, parts.schedule, torch.ones(count, 2, dtype=torch.bool))
    clean, wrong = parts.kernel.embed(rows), []
    if not torch.equal(denoise.round(clean), rows):
        wrong.append("clean vectors are read as other tokens")
    only = torch.zeros(TOKENS, dtype=torch.bool)
    only[1] = True
    if not bool((denoise.round(clean, only) == 1).all()):
        wrong.append("a token that is not allowed is returned")
    if any(mode != 1 or abs(t - first_time(parts.schedule)) > 1e-6 for mode, t in told):
        wrong.append("tokens are read in another mode, or at another time")
    told.clear()
    denoise(clean, torch.full((count,), 0.5, dtype=torch.float64))
    if any(mode != 0 for mode, _ in told):
        wrong.append("clean vectors are estimated in the decoding mode")
    claim = "the network reads each token from its vectors, in its decoding mode, and returns allowed tokens alone"
    return Check(
        "vectors.decoding", claim, not wrong, "; ".join(wrong) or "all", f"{count} rows of 2 tokens, a perfect network"
    )


def decoded_nats(toy: Toy, decoding: Decoding) -> float:
    """Return the cross-entropy of reading the tokens of rows of one token at the levels of training, nats, by integration.

    Args:
        toy: The toy, of one token per row.
        decoding: Noise levels of training.
    """
    width, found = toy.parts.kernel.width, 0.0
    line = torch.linspace(-6, 6, 33, dtype=torch.float64)
    axes = torch.stack(torch.meshgrid(*[line] * width, indexing="ij"), -1).view(-1, width)
    weight = (-axes.square().sum(-1) / 2).softmax(0)
    levels = (-line.square() / 2).softmax(0)
    for chance, row, clean in zip(toy.chances.tolist(), toy.rows[:, 0].tolist(), toy.clean[:, 0], strict=True):
        for level, share in zip(line.tolist(), levels.tolist(), strict=True):
            snr = torch.tensor(decoding.mean + decoding.std * level, dtype=torch.float64)
            points = torch.sigmoid(snr).sqrt() * clean + torch.sigmoid(-snr).sqrt() * axes
            found -= chance * share * float(weight @ toy.decoded(points[:, None])[:, 0, row])
    return found
