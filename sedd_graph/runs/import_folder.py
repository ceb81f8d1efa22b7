"""The run folder that an import writes: converted weights of a checked blueprint, and their tokenizer."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from pathlib import Path

import torch
from torch import Tensor

from sedd_graph.data.tokenizer import FILE as TOKENIZER
from sedd_graph.data.tokenizer import load_tokenizer
from sedd_graph.engine.construct import build_shapes
from sedd_graph.engine.process import Setup
from sedd_graph.engine.weights import save_tensors
from sedd_graph.errors import UserError
from sedd_graph.families.table import process_class
from sedd_graph.runs.check import Report, digest, lock_text
from sedd_graph.runs.graph_files import write_graph
from sedd_graph.runs.open import write_run_manifest
from sedd_graph.store.files import write_json, write_text
from sedd_graph.store.run_folder import new_run, require_empty, write_folder

__all__ = ["expected_shapes", "require_shapes", "write_imported"]


def expected_shapes(report: Report) -> dict[str, list[int]]:
    """Return the shape of each tensor of a model by name, those of learned parts of the process included."""
    own = {name: list(p.shape) for name, p in build_shapes(report.graph, report.registry).state_dict().items()}
    setup = Setup(registry=report.registry, graph=report.graph, device=torch.device("cpu"))
    for part, module in process_class(report.plan.family)(report.plan, setup).learned().items():
        own |= {f"{part}.{name}": list(p.shape) for name, p in module.state_dict().items()}
    return own


def require_shapes(weights: Mapping[str, Tensor], expected: Mapping[str, list[int]], path: Path) -> None:
    """Check converted weights against the model.

    Args:
        weights: Tensors by our names.
        expected: Shape of each tensor of the model by name.
        path: File or folder of the weights, for messages.

    Raises:
        UserError: Tensors are missing or of another shape; the message lists them.
    """
    wrong = []
    for name, value in weights.items():
        if expected.get(name) != list(value.shape):
            wrong.append(f"{name} comes out as {list(value.shape)}, not {expected.get(name)}")
    wrong += [f"{name} {shape} has no weights" for name, shape in expected.items() if name not in weights]
    if wrong:
        more = f"; and {len(wrong) - 8} more" if len(wrong) > 8 else ""
        raise UserError(f"{path}: {'; '.join(wrong[:8])}{more}")


def write_imported(
    report: Report,
    weights: Mapping[str, Tensor],
    *,
    path: Path,
    kind: str,
    tokenizer: Path,
    out: Path | None,
    runs: Path,
    say: Callable[[str], None],
) -> Path:
    """Write a run folder with converted weights.

    Args:
        report: Result of checking the blueprint.
        weights: Tensors by our names.
        path: File or folder that they come from.
        kind: Kind of the import, which ``run.json`` records.
        tokenizer: The tokenizer's file, which need not exist.
        out: The run folder, which must be empty or not exist; None creates a run folder in ``runs``.
        runs: Folder in which run folders are created.
        say: Function that prints a line for the user.

    Returns:
        The path of the run folder.

    Raises:
        UserError: The weights do not match the network, or ``out`` is not empty.
    """
    require_shapes(weights, expected_shapes(report), path)
    say(str(report))
    if out is not None:
        require_empty(out)

    def write(run: Path) -> None:
        write_graph(run, report)
        write_json(run / "run.json", {"imported": str(path.name), "kind": kind})
        if tokenizer.is_file():
            write_text(run / TOKENIZER, load_tokenizer(tokenizer).to_json())
        save_tensors({k: v.contiguous() for k, v in weights.items()}, run / "model.safetensors")
        write_run_manifest(run)

    if out is None:
        return new_run(runs, report.name, digest(lock_text(report)), write)
    write_folder(out, write)
    return out
