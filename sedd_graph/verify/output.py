"""Whether what the network puts out is what the kernel takes it for: read off the numbers, whatever the head is.

A proof with a perfect network says nothing of a head that hides the last token of a kernel without a mask, or carries
tokens over that the kernel may have replaced: such a network trains, and its bound is far from what it could be.
"""

from __future__ import annotations

import torch

from sedd_graph.component.check import Check
from sedd_graph.diffusion.batch import Batch, Draw
from sedd_graph.diffusion.numerics import FLOOR
from sedd_graph.diffusion.tokens.kernel import Kernel
from sedd_graph.diffusion.tokens.objective import Objective
from sedd_graph.engine.network import Network

__all__ = ["check_output"]


@torch.no_grad()
def check_output(network: Network, kernel: Kernel, objective: Objective) -> Check:
    """Verify the output of the network, as it stands, for two short rows at total noise 1/2."""
    device = network.device
    generator = torch.Generator(device).manual_seed(0)
    tokens = torch.randint(0, kernel.states, (2, 4), generator=generator, device=device)
    if kernel.mask is not None:
        tokens[:, 0] = kernel.mask
    half = torch.full((2,), 0.5, device=device)
    inputs = objective.inputs(Draw(tokens, half, half, half, half), Batch.of(tokens))
    training = network.model.training
    network.model.eval()
    outputs = kernel.translate(network.run(inputs), tokens, half)
    ((name, out),) = outputs.items()
    network.model.train(training)
    wrong: list[str] = []
    if not bool(out.isfinite().all()):
        wrong.append("it is not finite")
    elif name == "log_x0":
        out = out.double()
        moving = tokens == kernel.mask if kernel.clamp_safe else torch.ones_like(tokens, dtype=torch.bool)
        data = torch.arange(kernel.states, device=device) != (-1 if kernel.mask is None else kernel.mask)
        if float((out.logsumexp(-1)).abs().max()) > 1e-3:
            wrong.append("probabilities do not sum to 1")
        if bool((out[moving][:, data] < FLOOR / 2).any()):
            wrong.append("a token that may be the clean one is given no chance")
        if kernel.mask is not None and float(out[..., kernel.mask].exp().max()) > 1e-6:
            wrong.append("the mask is given a chance to be the clean token")
        if kernel.clamp_safe and float(out[~moving].gather(-1, tokens[~moving][:, None]).abs().sum()) > 1e-3:
            wrong.append("a token that is seen, and so clean, is not carried over")
    elif float(out.gather(-1, tokens[..., None]).abs().max()) > 1e-5:
        wrong.append("the score of the current token is not 1")
    return Check(
        "head.output",
        "the network's output is what the kernel takes it for",
        not wrong,
        "; ".join(wrong) or name,
        "the network as it starts, 2 rows of 4 at total noise 0.5",
    )
