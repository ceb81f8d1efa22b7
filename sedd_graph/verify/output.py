"""Verification that the output head of the network fits the token kernel.

Two errors of a head escape the other checks, which compute ideal outputs in place of the network's: it excludes the
last token as if that were the mask, although the kernel has no mask; or it copies visible tokens, although the kernel
may have replaced them. Such a network trains, but its likelihood bound stays far from the optimum.
"""

from __future__ import annotations

from collections.abc import Iterator

import torch
from torch import Tensor

from sedd_graph.component.check import Check
from sedd_graph.diffusion.batch import Batch, Draw
from sedd_graph.diffusion.numerics import FLOOR
from sedd_graph.diffusion.tokens.kernel import Kernel
from sedd_graph.diffusion.tokens.objective import Objective
from sedd_graph.engine.network import Network

__all__ = ["check_output"]


@torch.no_grad()
def check_output(network: Network, kernel: Kernel, objective: Objective) -> Check:
    """Verify that the output of the network has the form that the kernel requires.

    A prediction of the clean token (``log_x0``) must be normalised, and give no probability to the mask. It must copy
    visible (unmasked) tokens if the kernel leaves them clean, and must not if the kernel can replace them. Of a
    prediction that is positive for all states, the mask among them, none of this is required if the objective accepts
    it (:meth:`Objective.reads_mask`). In an output
    ``log_score``, the score p(y) / p(x) must be 1 for y = x, the current token. The network is evaluated on two rows of
    four random tokens at total noise 0.5.

    Args:
        network: The network with its current weights. Its training or evaluation mode is restored.
        kernel: Token kernel, on the device of the network.
        objective: Objective, which computes the network's inputs.
    """
    device = network.device
    generator = torch.Generator(device).manual_seed(0)
    tokens = torch.randint(0, kernel.states, (2, 4), generator=generator, device=device)
    if kernel.mask is not None:
        tokens[:, 0] = kernel.mask
    half = torch.full((2,), 0.5, device=device)
    inputs = objective.inputs(Draw(tokens, half, half, half, half), Batch.of(tokens))
    training = network.model.training
    network.model.eval()
    ((name, out),) = kernel.translate(network.run(inputs), tokens, half).items()
    network.model.train(training)
    if not bool(out.isfinite().all()):
        wrong = ["it is not finite"]
    elif name == "log_x0":
        wrong = list(_wrong_log_x0(out.double(), tokens, kernel, whole=objective.reads_mask(kernel)))
    else:
        current = float(out.gather(-1, tokens[..., None]).abs().max())
        wrong = ["the score of the current token is not 1"] if current > 1e-5 else []
    claim = "the output of the network has the form that the kernel reads"
    how = "the untrained network, 2 rows of 4 at total noise 0.5"
    return Check("head.output", claim, not wrong, "; ".join(wrong) or name, how)


def _wrong_log_x0(log_x0: Tensor, tokens: Tensor, kernel: Kernel, *, whole: bool) -> Iterator[str]:
    """Yield the errors of a prediction ``log_x0`` [b, l, n] at the noisy ``tokens`` int64 [b, l], as sentences.

    If ``whole``, a prediction that is positive for all states is accepted.
    """
    moving = tokens == kernel.mask if kernel.clamp_safe else torch.ones_like(tokens, dtype=torch.bool)
    data = torch.arange(kernel.states, device=tokens.device) != (-1 if kernel.mask is None else kernel.mask)
    if float(log_x0.logsumexp(-1).abs().max()) > 1e-3:
        yield "its probabilities do not sum to 1"
    if whole and bool((log_x0 > FLOOR / 2).all()):
        return
    if bool((log_x0[moving][:, data] < FLOOR / 2).any()):
        yield "a possible clean token has probability 0"
    if kernel.mask is not None and float(log_x0[..., kernel.mask].exp().max()) > 1e-6:
        yield "the mask has a positive probability of being the clean token"
    if kernel.clamp_safe and float(log_x0[~moving].gather(-1, tokens[~moving][:, None]).abs().sum()) > 1e-3:
        yield "a visible token, which is clean, is not carried over"
