"""Released SEDD and MDLM weights to a run folder: sizes inferred, every tensor matched by name, nothing passed over.

Weights are untrusted: safetensors, or torch files read with ``weights_only=True``.
"""

from __future__ import annotations

import dataclasses
import json
import re
from collections.abc import Callable
from pathlib import Path
from typing import Any, Literal

import torch
from safetensors import SafetensorError
from safetensors.torch import load_file
from torch import Tensor

from sedd_graph.blueprint.load import packaged_blueprints
from sedd_graph.engine.construct import build_shapes
from sedd_graph.engine.weights import save_tensors
from sedd_graph.errors import UserError
from sedd_graph.graph.draw import to_json, to_mermaid, to_svg
from sedd_graph.runs.check import LOCK, check, digest, lock_text
from sedd_graph.store.files import new_run, write_json, write_text

__all__ = ["Imported", "import_run", "import_weights"]

Kind = Literal["sedd", "mdlm"]
MAX_BYTES = 64 * 2**30
_CONTAINERS = ("model", "ema", "state_dict", "weights", "backbone")


@dataclasses.dataclass(frozen=True)
class Imported:
    """A shipped blueprint, the overrides that give it the weights' sizes, and the weights under our names."""

    blueprint: Path
    overrides: tuple[str, ...]
    weights: dict[str, Tensor]


def _read(path: Path) -> dict[str, Tensor]:
    """All tensors of a file or local hub folder."""
    if path.is_dir():
        index = path / "model.safetensors.index.json"
        if index.is_file():
            try:
                parts = sorted(set(json.loads(index.read_text(encoding="utf-8"))["weight_map"].values()))
            except (ValueError, KeyError, AttributeError, TypeError):
                raise UserError(f"{index} is not an index of safetensors files") from None
            found: dict[str, Tensor] = {}
            for part in parts:
                if not isinstance(part, str) or Path(part).name != part:
                    raise UserError(f"{index} names a file outside its folder: {part!r}")
                found |= _read(path / part)
            return found
        for name in ("model.safetensors", "pytorch_model.bin", "model.pth", "checkpoint.pth"):
            if (path / name).is_file():
                return _read(path / name)
        raise UserError(f"{path} holds neither model.safetensors nor pytorch_model.bin")
    if not path.is_file():
        raise UserError(f"{path}: no such file or folder")
    if path.stat().st_size > MAX_BYTES:
        raise UserError(f"{path} is larger than {MAX_BYTES >> 30} GiB")
    if path.suffix == ".safetensors":
        try:
            return load_file(path)
        except (SafetensorError, OSError) as error:
            raise UserError(f"{path} is not a safetensors file: {error}") from None
    try:
        data: Any = torch.load(path, map_location="cpu", weights_only=True)
    except Exception:  # torch raises many classes for files it will not load, and advises to load them all the same
        raise UserError(f"{path} cannot be read as plain weights, and nothing else is loaded from a file") from None
    while isinstance(data, dict) and not any(isinstance(v, Tensor) for v in data.values()):
        inner = next((data[c] for c in _CONTAINERS if isinstance(data.get(c), dict)), None)
        if inner is None:
            raise UserError(f"{path} holds no tensors under {', '.join(_CONTAINERS)}")
        data = inner
    if not isinstance(data, dict):
        raise UserError(f"{path} holds no named tensors")
    return {str(k): v for k, v in data.items() if isinstance(v, Tensor)}


class _Names:
    """The released names, each to be taken exactly once."""

    def __init__(self, tensors: dict[str, Tensor], where: str) -> None:
        plain = {}
        for name, value in tensors.items():
            plain[re.sub(r"^(weights\.|module\.|backbone\.|model\.|ema\.)*", "", name)] = value
        self.left, self.where = plain, where

    def take(self, name: str) -> Tensor:
        if name not in self.left:
            raise UserError(f"{self.where} has no tensor {name!r}; found: {', '.join(sorted(self.left)[:6])} ...")
        return self.left.pop(name).float()


def import_weights(kind: Kind, path: Path, *, kernel: str | None = None) -> Imported:
    """Match the released names with ours.

    Sizes are read off the shapes; the number of heads off ``rotary_emb.inv_freq``. Whether SEDD weights are of the
    absorbing or uniform kernel cannot be seen in them unless the vocabulary is GPT-2's (50,257 tokens and a mask):
    give ``kernel``. Raises :class:`UserError` for whatever is missing, left over or of an odd shape.
    """
    tensors = {k: v for k, v in _read(path).items() if k.startswith("weights.")} or _read(path)
    names = _Names(tensors, str(path))
    table = names.take("vocab_embed.embedding")
    if table.dim() != 2:
        raise UserError(f"{path}: vocab_embed.embedding is {list(table.shape)}, not [states, width]")
    states, dim = table.shape
    frequencies = names.take("rotary_emb.inv_freq")
    head = 2 * frequencies.numel()
    expected = 1.0 / 10000 ** (torch.arange(0, head, 2).float() / head)
    if head == 0 or dim % head or not torch.allclose(frequencies, expected, rtol=1e-2):
        raise UserError(f"{path}: rotary_emb.inv_freq is not the usual one for a head of {head} in a width of {dim}")
    depth = 1 + max((int(m[1]) for n in names.left if (m := re.match(r"blocks\.(\d+)\.", n))), default=-1)
    if depth == 0:
        raise UserError(f"{path} has no tensors named blocks.N")
    if kind == "mdlm":
        kernel = "absorb"
    elif kernel is None:
        if states not in (50257, 50258):
            raise UserError(
                f"{path} has {states} states: say --kernel absorb (the last is the mask) or --kernel uniform"
            )
        kernel = "absorb" if states == 50258 else "uniform"
    out = {"embed.embed.weight": table}
    for part in ("0.weight", "0.bias", "2.weight", "2.bias"):
        out[f"time.mlp.{part}"] = names.take(f"sigma_map.mlp.{part}")
    cond = out["time.mlp.0.bias"].shape[0]
    for index in range(depth):
        source, target = f"blocks.{index}.", f"trunk.{index}."
        out[f"{target}attend.norm.weight"] = names.take(f"{source}norm1.weight")
        out[f"{target}feed.norm.weight"] = names.take(f"{source}norm2.weight")
        out[f"{target}attend.attention.qkv.weight"] = names.take(f"{source}attn_qkv.weight")
        out[f"{target}attend.attention.out.weight"] = names.take(f"{source}attn_out.weight")
        for kind_ in ("weight", "bias"):
            out[f"{target}feed.mlp.up.{kind_}"] = names.take(f"{source}mlp.0.{kind_}")
            out[f"{target}feed.mlp.down.{kind_}"] = names.take(f"{source}mlp.2.{kind_}")
            # one map to (shift, scale, gate) of both halves there; here each component has its own
            whole = names.take(f"{source}adaLN_modulation.{kind_}")
            if whole.shape[0] != 6 * dim:
                raise UserError(f"{path}: {source}adaLN_modulation.{kind_} is {list(whole.shape)}, not six times {dim}")
            parts = whole.chunk(6)
            out[f"{target}attend.modulate.linear.{kind_}"] = torch.cat(parts[0:2])
            out[f"{target}attend.gate.linear.{kind_}"] = parts[2].contiguous()
            out[f"{target}feed.modulate.linear.{kind_}"] = torch.cat(parts[3:5])
            out[f"{target}feed.gate.linear.{kind_}"] = parts[5].contiguous()
    out["norm.weight"] = names.take("output_layer.norm_final.weight")
    for kind_ in ("weight", "bias"):
        out[f"modulate.linear.{kind_}"] = names.take(f"output_layer.adaLN_modulation.{kind_}")
        out[f"head.{kind_}"] = names.take(f"output_layer.linear.{kind_}")
    if names.left:
        raise UserError(f"{path} has tensors that nothing here takes: {', '.join(sorted(names.left)[:8])}")
    name = {"mdlm": "mdlm-small"}.get(kind, "sedd-small" if kernel == "absorb" else "sedd-uniform-small")
    tokens = states - (kernel == "absorb")
    overrides = (
        f"params.dim={dim}",
        f"params.heads={dim // head}",
        f"params.depth={depth}",
        f"params.cond={cond}",
        f"params.tokens={tokens}",
        f"name={kind}-imported",
    )
    return Imported(packaged_blueprints() / f"{name}.yaml", overrides, out)


def import_run(
    kind: Kind, path: Path, *, out: Path | None, runs: Path, kernel: str | None, say: Callable[[str], None]
) -> Path:
    """Write a run folder with the imported weights. Returns its path; refuses a folder that is not empty."""
    found = import_weights(kind, path, kernel=kernel)
    tokenizer = path / "tokenizer.json" if path.is_dir() else path.with_name("tokenizer.json")
    # the data section is about training from scratch, whose tokenizer the weights know nothing of
    report = check(found.blueprint, [*found.overrides, "data=null", "train=null"])
    own = {k: list(v.shape) for k, v in build_shapes(report.graph, report.registry).state_dict().items()}
    for name, value in found.weights.items():
        if own.get(name) != list(value.shape):
            raise UserError(f"{path}: {name} comes out as {list(value.shape)}, not {own.get(name)}")
    say(str(report))
    text = lock_text(report)
    if out is None:
        run = new_run(runs, report.name, digest(text))
    else:
        if out.exists() and any(out.iterdir()):
            raise UserError(f"{out} exists and is not empty")
        out.mkdir(parents=True, exist_ok=True)
        run = out
    write_text(run / LOCK, text)
    write_text(run / "graph.json", to_json(report.graph))
    write_text(run / "graph.svg", to_svg(report.graph))
    write_text(run / "graph.mmd", to_mermaid(report.graph))
    write_json(run / "run.json", {"imported": str(path.name), "kind": kind, "root": str(run.resolve())})
    if tokenizer.is_file():
        from sedd_graph.data.tokenizer import load_tokenizer

        write_text(run / "tokenizer.json", load_tokenizer(tokenizer).to_json())
    part = run / ".model.safetensors.part"
    save_tensors({k: v.contiguous() for k, v in found.weights.items()}, part)
    part.replace(run / "model.safetensors")
    return run
