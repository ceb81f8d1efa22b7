"""Import of released SEDD, MDLM, duo (UDLM) and Diffusion-LM weights into a run folder.

The sizes of the network are read from the shapes of the tensors, and tensors are matched by name. SEDD and MDLM
have the network of SEDD (github.com/louaaron/Score-Entropy-Discrete-Diffusion); MDLM (github.com/kuleshov-group/mdlm)
and duo (github.com/s-sahoo/duo) store it under the name ``backbone``. :mod:`sedd_graph.runs.import_diffusion_lm` converts Diffusion-LM's.
"""

from __future__ import annotations

import dataclasses
import re
from collections.abc import Callable
from pathlib import Path
from typing import Literal

import torch
from torch import Tensor

from sedd_graph.blueprint.load import packaged_blueprints
from sedd_graph.data.tokenizer import FILE as TOKENIZER
from sedd_graph.errors import UserError
from sedd_graph.runs.check import check
from sedd_graph.runs.import_diffusion_lm import convert
from sedd_graph.runs.import_folder import write_imported
from sedd_graph.runs.weight_files import read_tensors

__all__ = ["Imported", "import_run", "import_weights"]

Kind = Literal["sedd", "mdlm", "duo", "diffusion-lm"]

_DUO = (
    "outputs={log_x0: head}",
    "nodes.head={op: x0_head, in: {x: modulate, tokens: tokens}, out: float b l v, with: {mask: none}}",
    "process={op: uniform, schedule: {op: loglinear, eps: 1e-3}}",
    "objective={op: nelbo}",
    "sample={op: ancestral, steps: 128}",
)
"""Changes to the blueprint of SEDD with uniform noise that make it that of UDLM: the network predicts clean tokens."""

_PREFIXES = re.compile(r"^(weights\.|module\.|backbone\.|model\.|ema\.|state_dict\.)*")
GPT2_TOKENS = 50_257

# ours: released
_NETWORK = {
    "time.mlp.0.weight": "sigma_map.mlp.0.weight",
    "time.mlp.0.bias": "sigma_map.mlp.0.bias",
    "time.mlp.2.weight": "sigma_map.mlp.2.weight",
    "time.mlp.2.bias": "sigma_map.mlp.2.bias",
    "norm.weight": "output_layer.norm_final.weight",
    "modulate.linear.weight": "output_layer.adaLN_modulation.weight",
    "modulate.linear.bias": "output_layer.adaLN_modulation.bias",
    "head.weight": "output_layer.linear.weight",
    "head.bias": "output_layer.linear.bias",
}
_BLOCK = {
    "attend.norm.weight": "norm1.weight",
    "feed.norm.weight": "norm2.weight",
    "attend.attention.qkv.weight": "attn_qkv.weight",
    "attend.attention.out.weight": "attn_out.weight",
    "feed.mlp.up.weight": "mlp.0.weight",
    "feed.mlp.up.bias": "mlp.0.bias",
    "feed.mlp.down.weight": "mlp.2.weight",
    "feed.mlp.down.bias": "mlp.2.bias",
}


@dataclasses.dataclass(frozen=True)
class Imported:
    """Released weights, converted to a blueprint that is shipped with the package.

    Attributes:
        blueprint: The blueprint file.
        overrides: Changes to the blueprint as ``key=value``, which set the sizes of the network.
        weights: The tensors, float32, by the parameter names of the blueprint's network.
    """

    blueprint: Path
    overrides: tuple[str, ...]
    weights: dict[str, Tensor]


@dataclasses.dataclass(frozen=True)
class _Sizes:
    states: int
    dim: int
    heads: int
    depth: int
    cond: int


class _Released:
    """The released tensors by name, each of which is taken exactly once."""

    def __init__(self, kind: Kind, path: Path) -> None:
        tensors = read_tensors(path)
        tensors = {name: tensor for name, tensor in tensors.items() if name.startswith("weights.")} or tensors
        self.path = path
        self.left = {_PREFIXES.sub("", name): tensor for name, tensor in tensors.items()}
        of_bert = "word_embedding.weight" in self.left
        if of_bert != (kind == "diffusion-lm") and (of_bert or "vocab_embed.embedding" in self.left):
            other = "diffusion-lm" if of_bert else "sedd, mdlm or duo"
            raise UserError(f"{path} holds weights of {other}, by their names: say `sedd-graph import {other}`")
        held_by_backbone = any("backbone." in name for name in tensors if name.endswith("vocab_embed.embedding"))
        found: Kind = "sedd" if not held_by_backbone else "duo" if kind == "duo" else "mdlm"
        if found != kind and "vocab_embed.embedding" in self.left:
            names = "begin with 'backbone.'" if held_by_backbone else "do not begin with 'backbone.'"
            raise UserError(
                f"{path} holds {found.upper()} weights, not {kind.upper()} weights: its tensor names {names}; "
                f"say `sedd-graph import {found}`"
            )

    def take(self, name: str) -> Tensor:
        """Return a tensor in float32. Raises :class:`UserError` where there is none of this name."""
        if name not in self.left:
            raise UserError(f"{self.path} has no tensor {name!r}; found: {', '.join(sorted(self.left)[:6])} ...")
        return self.left.pop(name).float()


def import_weights(kind: Kind, path: Path, *, kernel: str | None = None, heads: int | None = None) -> Imported:
    """Convert released weights to the parameter names of a blueprint that is shipped with the package.

    Args:
        kind: Code that released the weights, ``"sedd"``, ``"mdlm"``, ``"duo"`` or ``"diffusion-lm"``.
        path: A file of weights, or a folder as downloaded from a model hub.
        kernel: ``"absorb"`` or ``"uniform"``, for SEDD weights; None derives it from the tensor shapes, which is
            possible only with the vocabulary of GPT-2. Ignored for the others, which have one kernel each.
        heads: Number of attention heads, for Diffusion-LM weights; None: that of BERT base, for its width.

    Returns:
        The blueprint, the overrides that set its sizes, and the tensors by parameter name.

    Raises:
        UserError: A tensor is missing, unknown or of an unexpected shape, or the weights are not those of ``kind``.
    """
    released = _Released(kind, path)
    if kind == "diffusion-lm":
        return Imported(packaged_blueprints() / "diffusion-lm.yaml", *convert(path, released.left, heads))
    table = released.take("vocab_embed.embedding")
    sizes = _sizes(released, table)
    kernel = _kernel(kind, kernel, sizes.states, path)
    weights = {"embed.embed.weight": table} | {ours: released.take(theirs) for ours, theirs in _NETWORK.items()}
    for index in range(sizes.depth):
        weights |= _block(released, index, sizes.dim)
    left = sorted(released.left)
    if left:
        raise UserError(f"{path} has tensors that the network does not have: {', '.join(left[:8])}")
    name = "mdlm-small" if kind == "mdlm" else "sedd-small" if kernel == "absorb" else "sedd-uniform-small"
    changes = _DUO if kind == "duo" else ()
    overrides = (
        *changes,
        f"params.dim={sizes.dim}",
        f"params.heads={sizes.heads}",
        f"params.depth={sizes.depth}",
        f"params.cond={sizes.cond}",
        f"params.tokens={sizes.states - (kernel == 'absorb')}",
        f"name={kind}-imported",
    )
    return Imported(packaged_blueprints() / f"{name}.yaml", overrides, weights)


def _sizes(released: _Released, table: Tensor) -> _Sizes:
    """Return the sizes of the network; the width of a head follows from the rotary frequencies, which are taken."""
    path = released.path
    if table.dim() != 2:
        raise UserError(f"{path}: vocab_embed.embedding is {list(table.shape)}, not [states, width]")
    states, dim = table.shape
    frequencies = released.take("rotary_emb.inv_freq")
    head = 2 * frequencies.numel()
    expected = 1.0 / 10000 ** (torch.arange(0, head, 2).float() / head)
    if head == 0 or dim % head or not torch.allclose(frequencies, expected, rtol=1e-2):
        raise UserError(f"{path}: rotary_emb.inv_freq is not the usual one for a head of {head} in a width of {dim}")
    depth = 1 + max((int(m[1]) for name in released.left if (m := re.match(r"blocks\.(\d+)\.", name))), default=-1)
    if depth == 0:
        raise UserError(f"{path} has no tensors named blocks.N")
    hidden = released.left.get("sigma_map.mlp.0.bias")
    return _Sizes(states, dim, dim // head, depth, cond=0 if hidden is None else len(hidden))


def _kernel(kind: Kind, kernel: str | None, states: int, path: Path) -> str:
    """Return the kernel: given, or known from the number of states (tokens, and the mask of the absorbing kernel)."""
    if kind in ("mdlm", "duo"):
        return "absorb" if kind == "mdlm" else "uniform"
    if kernel is None:
        known = {GPT2_TOKENS: "uniform", GPT2_TOKENS + 1: "absorb"}
        kernel = known.get(states)
    if kernel is None:
        raise UserError(f"{path} has {states} states: say --kernel absorb (the last is the mask) or --kernel uniform")
    return kernel


def _block(released: _Released, index: int, dim: int) -> dict[str, Tensor]:
    """Return the tensors of one transformer block under our names."""
    source, target = f"blocks.{index}.", f"trunk.{index}."
    found = {target + ours: released.take(source + theirs) for ours, theirs in _BLOCK.items()}
    for part in ("weight", "bias"):
        # one linear map makes (shift, scale, gate) of both halves there; here each component has its own
        name = f"{source}adaLN_modulation.{part}"
        whole = released.take(name)
        if whole.shape[0] != 6 * dim:
            raise UserError(f"{released.path}: {name} is {list(whole.shape)}, not six times {dim}")
        chunks = whole.chunk(6)
        for half, first in (("attend", 0), ("feed", 3)):
            found[f"{target}{half}.modulate.linear.{part}"] = torch.cat(chunks[first : first + 2])
            found[f"{target}{half}.gate.linear.{part}"] = chunks[first + 2].contiguous()
    return found


def import_run(
    kind: Kind,
    path: Path,
    *,
    out: Path | None,
    runs: Path,
    kernel: str | None,
    say: Callable[[str], None],
    heads: int | None = None,
) -> Path:
    """Write a run folder with released weights and, if there is a ``tokenizer.json`` beside them, their tokenizer.

    Args:
        kind: Code that released the weights, ``"sedd"``, ``"mdlm"``, ``"duo"`` or ``"diffusion-lm"``.
        path: A file of weights, or a folder as downloaded from a model hub.
        out: The run folder, which must be empty or not exist; None creates a run folder in ``runs``.
        runs: Folder in which run folders are created.
        kernel: ``"absorb"`` or ``"uniform"``, as in :func:`import_weights`.
        say: Function that prints a line for the user.
        heads: Number of attention heads, as in :func:`import_weights`.

    Returns:
        The path of the run folder.

    Raises:
        UserError: The weights do not match the network, or ``out`` is not empty.
    """
    found = import_weights(kind, path, kernel=kernel, heads=heads)
    # the data and train sections of the blueprint are about training from scratch, with a tokenizer of its own
    report = check(found.blueprint, [*found.overrides, "data=null", "train=null"])
    tokenizer = path / TOKENIZER if path.is_dir() else path.with_name(TOKENIZER)
    return write_imported(report, found.weights, path=path, kind=kind, tokenizer=tokenizer, out=out, runs=runs, say=say)
