"""Block diffusion (BD3-LM, arXiv 2503.09573): attention mask of noisy and clean blocks, block-by-block sampling.

The network processes noisy positions and clean positions in one pass. In training, both are the whole row. In sampling,
the noisy positions are one block; the clean positions are the blocks before it, or none if a KV cache stores them.
Axes: b batch, l length, n noisy positions, m clean positions.
"""

from __future__ import annotations

import dataclasses
import functools
from collections.abc import Callable

import torch
from torch import Tensor
from torch.utils._python_dispatch import is_in_torch_dispatch_mode

from sedd_graph.component.exported import exported_as
from sedd_graph.component.outputs import Input
from sedd_graph.diffusion.tokens.sampler import Sampler
from sedd_graph.diffusion.tokens.walk import Denoise, WalkSettings
from sedd_graph.diffusion.visibility import with_blocks
from sedd_graph.errors import UserError

BLOCK_FEEDS = (
    Input("tokens", "int b l", "noisy tokens x_t"),
    Input("clean", "int b l", "clean tokens x_0, of which a block attends to those of earlier blocks", required=True),
    Input("places", "int 2*l", "positions in the row of noisy and clean tokens"),
    Input("sees", "bool 2*l 2*l", "which position (first) may attend to which (second)", required=True),
    Input("sigma", "float b", "0: blocks have different noise levels, which the network infers from their masks"),
)
"""Inputs of a graph under an objective that noises blocks separately; :func:`block_inputs` computes them."""

__all__ = ["BLOCK_FEEDS", "block_inputs", "hold_prompt", "write_blocks"]


def block_inputs(
    noised: Tensor, clean: Tensor, *, block: int, noised_from: int = 0, clean_from: int = 0
) -> dict[str, Tensor]:
    """Return the inputs of the network for noisy and clean tokens in blocks, attention mask included.

    A position attends to the noisy positions of its own block if it is noisy itself, to the clean positions of its own
    block if it is clean itself, and to all clean positions of earlier blocks.

    Args:
        noised: Noisy tokens, int64 [b, n].
        clean: Clean tokens, int64 [b, m].
        block: Number of positions per block.
        noised_from: Index in the row of the first noisy token.
        clean_from: Index in the row of the first clean token; a KV cache stores the keys and values of those before it.

    Returns:
        A dict of ``tokens`` int64 [b, n]; ``clean`` int64 [b, m]; ``places`` int64 [n + m], the index in the row of
        each noisy, then of each clean token; ``sees`` bool [n + m, clean_from + n + m], the attention mask from queries
        to keys (cached, noisy, clean), True where attention is allowed; and ``sigma`` float32 [b], all 0, since the
        noise level differs between blocks.
    """
    places, sees = _layout(noised.shape[1], clean.shape[1], block, noised_from, clean_from, noised.device)
    sigma = torch.zeros(len(noised), device=noised.device)
    return {"tokens": noised, "clean": clean, "places": places, "sees": sees, "sigma": sigma}


def _make_layout(
    noised: int, clean: int, block: int, noised_from: int, clean_from: int, device: torch.device
) -> tuple[Tensor, Tensor]:
    """Return ``places`` and ``sees`` of :func:`block_inputs`."""
    where = torch.arange(noised, device=device) + noised_from
    places = torch.cat([where, torch.arange(clean, device=device) + clean_from])
    # integers, since Inductor cannot compare booleans that are computed from positions
    is_clean = (torch.arange(len(places), device=device) >= noised).long()
    cached = torch.arange(clean_from, device=device)
    of_query, of_key = places // block, torch.cat([cached, places]) // block
    key_clean = torch.cat([torch.ones_like(cached), is_clean])
    own = (2 * of_query + is_clean)[:, None] == 2 * of_key + key_clean
    return places, own | ((key_clean > 0) & (of_query[:, None] > of_key))


@functools.lru_cache(maxsize=2)
def _kept_layout(
    noised: int, clean: int, block: int, noised_from: int, clean_from: int, device: torch.device
) -> tuple[Tensor, Tensor]:
    """Return the layout of whole rows in training or evaluation, the same tensors each time."""
    places, sees = _make_layout(noised, clean, block, noised_from, clean_from, device)
    return places, with_blocks(sees)


@exported_as(_make_layout)
def _layout(
    noised: int, clean: int, block: int, noised_from: int, clean_from: int, device: torch.device
) -> tuple[Tensor, Tensor]:
    """Return ``places`` and ``sees`` of :func:`block_inputs`; those of whole rows are made once.

    A layout of sampling, which changes from block to block, is not kept, and neither is one in code that is traced.
    """
    if noised_from or clean_from or torch.compiler.is_compiling() or is_in_torch_dispatch_mode():
        return _make_layout(noised, clean, block, noised_from, clean_from, device)
    return _kept_layout(noised, clean, block, noised_from, clean_from, device)


def hold_prompt(free: Tensor, block: int) -> None:
    """Verify that a prompt permits generation block by block from left to right.

    Args:
        free: bool [b, l], positions without a given token.
        block: Number of positions per block.

    Raises:
        UserError: A block with given tokens follows a block with free positions, which would be generated without those
            tokens.
    """
    starts = range(0, free.shape[1], block)
    open_ = torch.stack([free[:, s : s + block].any(1) for s in starts], dim=1)
    given = torch.stack([(~free[:, s : s + block]).any(1) for s in starts], dim=1)
    late = given & (open_.cumsum(1) - open_.long() > 0)
    if bool(late.any()):
        raise UserError(
            f"text is generated in blocks of {block} from left to right, each given the earlier ones alone: the prompt has tokens in "
            f"block {int(late.any(0).nonzero()[0]) + 1}, behind a block with a hole, which is generated without them. "
            "Leave everything behind the first block with a hole free, or use a model without blocks"
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
    """Generate rows block by block with ``sampler``, each block conditioned on the blocks before it.

    By the chain rule, rows have the model's distribution if the sampler's blocks do. If ``settings.matching`` requires
    that rows match a regular expression, each block is sampled given that the whole row matches, where the tokens of
    later blocks are assumed to be uniform over the allowed ones.

    Args:
        sampler: Generates one block. Afterwards ``clamped``, ``evaluations`` and ``log_weight`` are sums over blocks.
        given: ``given(before)`` returns the function that evaluates the network on the next block
            (:class:`~sedd_graph.diffusion.tokens.walk_settings.Denoise`), conditioned on the m tokens ``before`` the
            block, int64 [b, m].
        x: Noise, int64 [b, l], with the given tokens at positions that are not free.
        settings: The process, and the conditions on whole rows.
        block: Number of positions per block.
        length: Number of leading positions that must match the regular expression; None: all.
        steps: Number of steps per block; None: the number in the sampler's Config.

    Returns:
        The generated rows, int64 [b, l].

    Raises:
        UserError: No completion of a row matches the regular expression.
    """
    length = x.shape[1] if length is None else length
    free, allowed, matching, on_step = settings.free, settings.allowed, settings.matching, settings.on_step
    told, sure = settings.on_confidence, torch.full(x.shape, torch.nan, device=x.device)
    if matching is not None:
        allowed = torch.ones(settings.kernel.states, dtype=torch.bool, device=x.device) if allowed is None else allowed
        may = allowed[..., :length, :] if allowed.dim() > 1 else allowed
        matching.feasible(x[:, :length], free[:, :length], may)
        ahead = matching.ahead(x[:, :length], free[:, :length], may)
    clamped = evaluations = shown = 0
    log_weight = None if settings.unconditioned is None else torch.zeros(len(x), dtype=torch.float64, device=x.device)
    for start in range(0, x.shape[1], block):
        here = slice(start, start + block)
        if not bool(free[:, here].any()):
            continue
        before, after = x[:, :start], x[:, start + block :]

        def show(number: int, rows: Tensor, before: Tensor = before, after: Tensor = after) -> None:
            nonlocal shown
            # the rows before a block's first step are those after the previous block's last
            if on_step is not None and (number or not shown):
                on_step(shown, torch.cat([before, rows, after], dim=1))
                shown += 1

        def report(number: int, confidences: Tensor, here: slice = here) -> None:
            if told is not None and (number or not shown):
                sure[:, here] = confidences
                told(shown, sure.clone())

        own = allowed[..., here, :] if allowed is not None and allowed.dim() > 1 else allowed
        within = matching
        if matching is not None:
            stop = min(start + block, length)
            within = matching.between(before, ahead[stop], stop - start)
        part = sampler.run(
            given(before),
            x[:, here],
            dataclasses.replace(
                settings,
                free=free[:, here],
                allowed=own,
                matching=within,
                draws=None if settings.draws is None else settings.draws.part(start, start + block),
                on_step=show,
                on_confidence=None if told is None else report,
                timeless=True,
            ),
            steps=steps,
        )
        x = torch.cat([before, part, after], dim=1)
        clamped, evaluations = clamped + sampler.clamped, evaluations + sampler.evaluations
        if log_weight is not None and sampler.log_weight is not None:
            log_weight = log_weight + sampler.log_weight
    sampler.clamped, sampler.evaluations, sampler.log_weight = clamped, evaluations, log_weight
    return x
