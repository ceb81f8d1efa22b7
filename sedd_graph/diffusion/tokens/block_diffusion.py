"""Text in blocks, from left to right, noise within each (BD3-LM, arXiv 2503.09573): who sees whom, and how it is written.

A network of blocks looks at noised positions and at clean ones, each with its place in the row. In training both are the
whole row, in one pass; while a block is written, the noised ones are that block, and the clean ones all before it, or none
where they are remembered. Axes: b batch, l length, n noised positions, m clean ones.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable

import torch
from torch import Tensor

from sedd_graph.component.outputs import Input
from sedd_graph.diffusion.tokens.sampler import Sampler
from sedd_graph.diffusion.tokens.walk import Denoise, WalkSettings
from sedd_graph.errors import UserError

BLOCK_FEEDS = (
    Input("tokens", "int b l", "noisy tokens x_t"),
    Input("clean", "int b l", "clean tokens x_0, of which a block sees those of earlier blocks", required=True),
    Input("places", "int 2*l", "positions in the row of noisy and clean tokens"),
    Input("sees", "bool 2*l 2*l", "which position (first) may attend to which (second)", required=True),
    Input("sigma", "float b", "0: blocks differ in it, and the masks tell all there is to know"),
)
"""Inputs of a graph that reads text block by block."""

__all__ = ["BLOCK_FEEDS", "block_inputs", "hold_prompt", "write_blocks"]


def block_inputs(
    noised: Tensor, clean: Tensor, *, block: int, noised_from: int = 0, clean_from: int = 0
) -> dict[str, Tensor]:
    """What a graph of blocks is fed: ``tokens`` [b, n], ``clean`` [b, m], their ``places`` [n + m] in the row, and ``sees``.

    ``sees`` bool [n + m, clean_from + n + m] tells whom each may look at, the ``clean_from`` positions that are remembered in
    front: positions of its own block that are as noised or as clean as itself, and clean ones of earlier blocks. ``sigma`` [b] is 0:
    blocks differ in it, and under a mask there is nothing in it that the tokens do not tell.
    """
    device = noised.device
    where = torch.arange(noised.shape[1], device=device) + noised_from
    places = torch.cat([where, torch.arange(clean.shape[1], device=device) + clean_from])
    # 0 for noised and 1 for clean: Inductor cannot compare truth values that it works out from positions
    is_clean = (torch.arange(len(places), device=device) >= noised.shape[1]).long()
    remembered = torch.arange(clean_from, device=device)
    of_query, of_key = places // block, torch.cat([remembered, places]) // block
    key_clean = torch.cat([torch.ones_like(remembered), is_clean])
    own = (2 * of_query + is_clean)[:, None] == 2 * of_key + key_clean
    sees = own | ((key_clean > 0) & (of_query[:, None] > of_key))
    sigma = torch.zeros(len(noised), device=device)
    return {"tokens": noised, "clean": clean, "places": places, "sees": sees, "sigma": sigma}


def hold_prompt(free: Tensor, block: int) -> None:
    """Hold a prompt to what can be filled in from left to right; ``free`` bool [b, l] is what it leaves open.

    Raises :class:`UserError` where a given token stands in a block after one that is to be written, which would not know of it.
    """
    starts = range(0, free.shape[1], block)
    open_ = torch.stack([free[:, s : s + block].any(1) for s in starts], dim=1)
    given = torch.stack([(~free[:, s : s + block]).any(1) for s in starts], dim=1)
    late = given & (open_.cumsum(1) - open_.long() > 0)
    if bool(late.any()):
        raise UserError(
            f"text is written in blocks of {block} from left to right, each given those before it alone: the prompt holds tokens "
            f"in block {int(late.any(0).nonzero()[0]) + 1}, after one that is to be written, which would not know of them. "
            "Leave all after the first block with a hole free, or use a model without blocks"
        )


def write_blocks(
    sampler: Sampler,
    given: Callable[[Tensor], Denoise],
    x: Tensor,
    settings: WalkSettings,
    *,
    block: int,
    length: int | None = None,
    steps: int | None = None,
) -> Tensor:
    """Rows ``x`` int64 [b, l], block by block from noise to text: ``sampler`` runs in each as if it were the whole.

    ``given(x [b, m])`` makes what evaluates the network on the block after ``m`` written positions. All else is as in
    :meth:`Sampler.run`, and so are the sampler's ``clamped`` and ``evaluations`` afterwards, summed over blocks. By the chain
    rule the law is the model's where the sampler's is.

    The first ``length`` positions (all, if not given) are what is ``matching``: a block is drawn given that they do, with those
    after it drawn evenly from the ``allowed`` tokens, since nothing else is known of them yet.
    """
    length = x.shape[1] if length is None else length
    free, allowed, matching, on_step = settings.free, settings.allowed, settings.matching, settings.on_step
    if matching is not None:
        allowed = torch.ones(settings.kernel.states, dtype=torch.bool, device=x.device) if allowed is None else allowed
        may = allowed[..., :length, :] if allowed.dim() > 1 else allowed
        matching.feasible(x[:, :length], free[:, :length], may)
        ahead = matching.ahead(x[:, :length], free[:, :length], may)
    clamped = evaluations = shown = 0
    for start in range(0, x.shape[1], block):
        here = slice(start, start + block)
        if not bool(free[:, here].any()):
            continue
        before, after = x[:, :start], x[:, start + block :]

        def show(number: int, rows: Tensor, before: Tensor = before, after: Tensor = after) -> None:
            nonlocal shown
            if on_step is not None and (
                number or not shown
            ):  # rows as one block ends and as the next begins are the same
                on_step(shown, torch.cat([before, rows, after], dim=1))
                shown += 1

        own = allowed[..., here, :] if allowed is not None and allowed.dim() > 1 else allowed
        within = matching
        if matching is not None:
            stop = min(start + block, length)
            within = matching.between(before, ahead[stop], stop - start)
        part = sampler.run(
            given(before),
            x[:, here],
            dataclasses.replace(
                settings, free=free[:, here], allowed=own, matching=within, on_step=show, timeless=True
            ),
            steps=steps,
        )
        x = torch.cat([before, part, after], dim=1)
        clamped, evaluations = clamped + sampler.clamped, evaluations + sampler.evaluations
    sampler.clamped, sampler.evaluations = clamped, evaluations
    return x
