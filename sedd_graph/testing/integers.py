"""Verification of the inversion rules of integers, such as tokens, on every value; and of codes under perturbations."""

from __future__ import annotations

import torch

from sedd_graph.component.base import Component
from sedd_graph.component.contract import Algebra, Signature
from sedd_graph.diffusion.codes.code import Code
from sedd_graph.testing.case import Found
from sedd_graph.verify.decoding import decode_faults, distance_of

__all__ = ["check_integers"]

VALUES = 2**16
"""Largest number of values of an integer that are tried."""


@torch.no_grad()
def check_integers(component: Component, signature: Signature, algebra: Algebra) -> Found:
    """Verify the rules of a component that recover one integer input, and the declarations of a code.

    The checks are ``inverse`` (each value of the input, up to :data:`VALUES` of them, is recovered), ``onto``
    (:attr:`~sedd_graph.component.contract.Rule.onto` holds), ``distance`` and ``decode`` (of a code: its declared least
    distance is not too large, and codewords moved by less than half the distance to the nearest other one are decoded to
    their tokens).

    Args:
        component: The component, in float64.
        signature: Its ports.
        algebra: Its declared algebra.

    Yields:
        The failures, as (name of the check, what is wrong).
    """
    inputs, outputs = [p.name for p in signature.inputs], [p.name for p in signature.outputs]
    for rule in algebra.rules:
        if len(rule.targets) != 1 or inputs != list(rule.targets) or rule.targets[0] not in algebra.integers:
            continue
        count = algebra.integers[rule.targets[0]]
        values = torch.arange(min(count, VALUES))[None]
        made = component(values)
        known = dict(zip(outputs, made if isinstance(made, tuple) else (made,), strict=True))
        found = getattr(component, rule.method)(*[known[name] for name in rule.given])
        if found.shape != values.shape or found.dtype != values.dtype:
            yield "inverse", f"{rule.method!r} gives {found.dtype} {list(found.shape)} for int64 {list(values.shape)}"
        elif wrong := int((found != values).sum()):
            yield "inverse", f"{rule.method!r} recovers {wrong:,} of {values.numel():,} values wrongly"
        if rule.onto and count <= VALUES:
            parts = [known[name].flatten(2)[0] for name in rule.given]
            whole = torch.cat([part if part.dim() == 2 else part[:, None] for part in parts], 1)
            images = 1
            for part in whole.unbind(1):
                images *= int(part.max()) + 1
            if len(whole.unique(dim=0)) != count or images != count or int(whole.min()) < 0:
                yield "onto", f"{count:,} values are not mapped one-to-one onto all {images:,} values of the output"
    if isinstance(component, Code):
        measured, declared = distance_of(component)
        if measured is not None and declared is not None and declared > measured * (1 + 1e-6):
            yield "distance", f"the least distance of codewords is {measured:.6g}, and {declared:.6g} is declared"
        wrong, tried = decode_faults(component)
        if wrong:
            yield "decode", f"{wrong:,} of {tried:,} perturbed codewords are decoded to other tokens"
