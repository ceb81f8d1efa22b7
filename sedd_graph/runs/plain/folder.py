"""The folder of an exported model, as the transformers library reads it and as model hubs lay it out."""

from __future__ import annotations

import dataclasses
import json
import math
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from sedd_graph.component.base import Context
from sedd_graph.diffusion.conditions.conditions import Conditions
from sedd_graph.diffusion.tokens.parts import TokenParts
from sedd_graph.diffusion.tokens.sampler import Sampler
from sedd_graph.diffusion.tokens.walk import T_MIN
from sedd_graph.engine.weights import save_tensors
from sedd_graph.errors import UserError
from sedd_graph.runs.check import LOCK, lock_text
from sedd_graph.runs.open import Run
from sedd_graph.runs.plain.agreement import largest_difference
from sedd_graph.runs.plain.card import model_card
from sedd_graph.runs.plain.model_files import ModelFiles, write_model
from sedd_graph.runs.plain.tokenizer_files import tokenizer_files
from sedd_graph.store.files import write_json, write_text

__all__ = ["OWN_TOKENIZER", "SHARD_BYTES", "export_transformers", "write_shards"]

SHARD_BYTES = 5 * 10**9
"""Largest size of one file of weights, in bytes."""
WEIGHTS = "model.safetensors"
OWN_TOKENIZER = "tokenizer.sedd_graph.json"
"""The run's own tokenizer, without the mask token that ``tokenizer.json`` has for the transformers library."""
INDEX = f"{WEIGHTS}.index.json"


def export_transformers(
    run: Run, *, shard: int = SHARD_BYTES
) -> tuple[Callable[[Path], None], ModelFiles, list[float | None]]:
    """Prepare the export of a run as a folder that the transformers library opens.

    Args:
        run: The opened run folder.
        shard: Largest size of one file of weights, in bytes.

    Returns:
        A function that writes the files to the folder whose path it is given, the generated code, and a list to which
        that function adds the largest difference between the logits of the export and of the run (None without the
        transformers library).

    Raises:
        UserError: The run is not of a process on token rows, or a part of it cannot be exported; the message lists every
            reason.
    """
    parts = getattr(run.engine.process, "parts", None)
    if not isinstance(parts, TokenParts):
        raise UserError(
            f"{run.path} cannot be exported: its process generates {run.plan.family}, and exported code generates rows of "
            "tokens of one length"
        )
    model, graph = run.engine.model, run.report.graph
    description = " ".join(graph.root.description.split()) or f"The model {graph.name}."
    code = write_model(graph, model, parts, samplers=_samplers(run, parts), name=graph.name, description=description)
    code = dataclasses.replace(code, left_out={**code.left_out, **_conditions(parts)})
    tensors = _tensors(model, code.state)
    forbidden = [i for i in range(parts.kernel.data_tokens) if not bool(run.engine.process.allowed[i])]  # type: ignore[attr-defined]  # of a process with TokenParts
    mask, length = parts.kernel.mask, getattr(run.report.data, "length", None)
    names = tokenizer_files(run.tokenizer, mask=mask, length=length)

    compared: list[float | None] = []

    def write(folder: Path) -> None:
        for name, text in code.files.items():
            write_text(folder / name, text)
        write_json(folder / "config.json", _config(run, parts, code))
        write_json(folder / "generation_config.json", _generation(parts, run, code, forbidden))
        for name, text in names.items():
            write_text(folder / name, text)
        write_shards(tensors, folder, shard)
        write_text(folder / LOCK, lock_text(run.report))
        write_text(folder / "README.md", model_card(run, code))
        if run.tokenizer is not None:
            write_text(folder / OWN_TOKENIZER, run.tokenizer.to_json())
        compared.append(largest_difference(folder, model, parts))

    return write, code, compared


def _samplers(run: Run, parts: TokenParts) -> dict[str, Sampler]:
    """Return the samplers that work with the process, with the run's own first, by their names."""
    own = run.plan.sampler_op
    found = {own.partition(".")[0]: parts.sampler}
    output = next(iter(run.report.graph.root.outputs))
    for contract in run.report.registry.contracts():
        if contract.kind != "sampler" or contract.op == own:
            continue
        cls = run.report.registry.component(contract.op)
        if not issubclass(cls, Sampler) or output not in cls.reads:
            continue
        try:
            made = cls(cls.Config(), Context({"n": parts.kernel.states}))
        except ValueError:  # a Config with keys that have no default
            continue
        if made.lacks(parts.kernel) is None:
            found.setdefault(contract.name, made)
    return found


def _conditions(parts: TokenParts) -> dict[str, str]:
    """Return why conditions on text that the blueprint declares are not exported, by the key under ``sample``."""
    told = parts.sampler.config.model_dump(include=set(Conditions.model_fields), exclude_defaults=True)
    names = [*told, *(["classifier"] if parts.classifier is not None else [])]
    return {name: f"sample: {name} is not exported: generate draws without conditions on the text" for name in names}


def _tensors(model: torch.nn.Module, state: Mapping[str, str]) -> dict[str, Tensor]:
    """Return the weights and buffers of a network by their exported names."""
    found = {}
    for path, exported in state.items():
        part: Any = model
        for name in path.split("."):
            part = part._modules[name]
        tensors = {**part.state_dict(keep_vars=True), **{k: v for k, v in part._buffers.items() if v is not None}}
        for name, tensor in tensors.items():
            found[f"{exported}.{name}"] = tensor.detach().cpu().contiguous().clone()
    return found


def _config(run: Run, parts: TokenParts, code: ModelFiles) -> dict[str, Any]:
    ends = torch.tensor([T_MIN, 1.0], dtype=torch.float64)
    low, high = parts.schedule.sigma(ends).tolist()
    tokenizer = run.tokenizer
    return {
        "architectures": [code.architecture],
        "auto_map": code.auto_map,
        "model_type": code.model_type,
        "vocab_size": parts.kernel.states,
        "mask_token_id": parts.kernel.mask,
        "pad_token_id": None if tokenizer is None else tokenizer.pad,
        "eos_token_id": None if tokenizer is None else tokenizer.end,
        "dtype": "float32",
        "is_decoder": False,
        "tables": code.tensors,
        "min_sigma": low,
        "max_sigma": high,
        "kernel": run.plan.kernel.name if hasattr(run.plan, "kernel") else None,
        "output": next(iter(run.report.graph.root.outputs)),
        "block_size": parts.objective.block,
        **({"max_position_embeddings": length} if (length := getattr(run.report.data, "length", None)) else {}),
    }


def _generation(parts: TokenParts, run: Run, code: ModelFiles, forbidden: list[int]) -> dict[str, Any]:
    config = parts.sampler.config
    tokenizer = run.tokenizer
    return {
        "sampler": code.samplers[0],
        **({} if parts.sampler.steps is None else {"steps": parts.sampler.steps}),
        "temperature": float(config.temperature),
        "top_p": float(config.top_p),
        "do_sample": True,
        "suppress_tokens": forbidden,
        "mask_token_id": parts.kernel.mask,
        "pad_token_id": None if tokenizer is None else tokenizer.pad,
        "eos_token_id": None if tokenizer is None else tokenizer.end,
    }


def write_shards(tensors: Mapping[str, Tensor], folder: Path, limit: int) -> None:
    """Write weights to one safetensors file, or to several of at most ``limit`` bytes with an index.

    Args:
        tensors: Contiguous CPU tensors by name.
        folder: The folder.
        limit: Largest size of one file, in bytes; a single tensor may be larger.
    """
    shards: list[dict[str, Tensor]] = [{}]
    size = 0
    for name, tensor in tensors.items():
        if shards[-1] and size + tensor.nbytes > limit:
            shards.append({})
            size = 0
        shards[-1][name] = tensor
        size += tensor.nbytes
    if len(shards) == 1:
        save_tensors(shards[0], folder / WEIGHTS, metadata={"format": "pt"})
        return
    width = max(5, math.ceil(math.log10(len(shards) + 1)))
    where: dict[str, str] = {}
    for number, shard in enumerate(shards, start=1):
        file = f"model-{number:0{width}d}-of-{len(shards):0{width}d}.safetensors"
        save_tensors(shard, folder / file, metadata={"format": "pt"})
        where |= dict.fromkeys(shard, file)
    total = sum(t.nbytes for t in tensors.values())
    text = json.dumps({"metadata": {"total_size": total}, "weight_map": where}, indent=2)
    write_text(folder / INDEX, text + "\n")
