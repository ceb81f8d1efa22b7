"""Comparison of exported code with the run that it was exported from: both evaluate the same noisy rows."""

from __future__ import annotations

import importlib.util
import json
import sys
import types
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file
from torch import Tensor

from sedd_graph.diffusion.tokens.block_diffusion import block_inputs
from sedd_graph.diffusion.tokens.parts import TokenParts
from sedd_graph.engine.regions import Model
from sedd_graph.errors import SeddGraphError

__all__ = ["TOLERANCE", "largest_difference"]

TOLERANCE = 1e-5
"""Largest difference of logits, relative to the largest one or 1, at which an export is accepted."""
_PACKAGE = "sedd_graph_exported"
ROWS, LENGTH = 3, 16


@contextmanager
def _package(folder: Path) -> Iterator[None]:
    """Context manager within which modules of ``folder`` can be imported as a package, without bytecode files."""
    before = sys.dont_write_bytecode
    package = types.ModuleType(_PACKAGE)
    package.__path__ = [str(folder)]
    sys.modules[_PACKAGE], sys.dont_write_bytecode = package, True
    try:
        yield
    finally:
        sys.dont_write_bytecode = before
        for name in [n for n in sys.modules if n.partition(".")[0] == _PACKAGE]:
            del sys.modules[name]


def largest_difference(folder: Path, model: Model, parts: TokenParts) -> float | None:
    """Return the largest difference of logits between an exported folder and its run; None without transformers.

    The exported code is imported, and evaluated with the weights of the folder.

    Args:
        folder: The exported folder.
        model: Network of the run.
        parts: Components of its process.

    Raises:
        SeddGraphError: The difference exceeds :data:`TOLERANCE`, relative to the largest logit or 1.
    """
    if importlib.util.find_spec("transformers") is None:
        return None
    with _package(folder), torch.no_grad():
        other = _opened(folder)
        generator = torch.Generator().manual_seed(0)
        clean = torch.randint(0, parts.kernel.data_tokens, (ROWS, LENGTH), generator=generator)
        noisy = clean
        if parts.kernel.mask is not None:
            noisy = torch.where(torch.rand(clean.shape, generator=generator) < 0.5, parts.kernel.mask, clean)
        sigma = parts.schedule.sigma(torch.linspace(0.1, 0.9, ROWS)).detach().float().cpu()
        ours, theirs = _inputs(model, parts, noisy, clean, sigma)
        device = next(model.parameters()).device
        was = model.training
        model.eval()
        expected = next(iter(model(**{k: v.to(device) for k, v in ours.items()}).values())).cpu()
        model.train(was)
        found: Tensor = other(**theirs).logits
    gap = float((found - expected).abs().max())
    if not gap <= TOLERANCE * max(1.0, float(expected[expected > -1e5].abs().max())):
        raise SeddGraphError(f"exported code and run disagree: logits differ by {gap:.2g}; the export is not written")
    return gap


def _opened(folder: Path) -> Any:
    """Return the model of an exported folder, with its weights."""
    settings = json.loads((folder / "config.json").read_text(encoding="utf-8"))
    classes = []
    for key in ("AutoConfig", "AutoModel"):
        module, _, name = settings["auto_map"][key].partition(".")
        classes.append(getattr(importlib.import_module(f"{_PACKAGE}.{module}"), name))
    made = classes[1](classes[0](**{k: v for k, v in settings.items() if k not in ("auto_map", "model_type")}))
    weights: dict[str, Tensor] = {}
    for file in sorted(folder.glob("*.safetensors")):
        weights |= load_file(file)
    made.load_state_dict(weights)
    return made.eval()


def _inputs(
    model: Model, parts: TokenParts, noisy: Tensor, clean: Tensor, sigma: Tensor
) -> tuple[dict[str, Tensor], dict[str, Tensor]]:
    """Return the inputs of the network, and those of the exported model."""
    block = parts.objective.block
    if block is not None:
        whole = max(block, LENGTH // block * block)
        noisy, clean = noisy[:, :whole], clean[:, :whole]
        own, theirs = block_inputs(noisy, clean, block=block), {"input_ids": noisy, "clean_ids": clean}
    else:
        own = {"tokens": noisy, "sigma": sigma, "t": parts.schedule.time(sigma)}
        own["attend"] = torch.ones_like(noisy, dtype=torch.bool)
        theirs = {"input_ids": noisy, "sigma": sigma}
    return {name: own[name] for name in model.input_names}, theirs
