"""The model card of an export (``README.md``): usage, evaluation, what was verified, and papers."""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from typing import Any

from sedd_graph.errors import SeddGraphError
from sedd_graph.graph.model import Op
from sedd_graph.runs.open import CERTIFICATE, Run
from sedd_graph.runs.plain.model_files import ModelFiles
from sedd_graph.runs.provenance import version_of
from sedd_graph.store.files import read_json

__all__ = ["model_card"]

_ARXIV = re.compile(r"\b(\d{4}\.\d{4,5})\b")


def model_card(run: Run, code: ModelFiles) -> str:
    """Return the text of the model card of a run that is exported as ``code``."""
    report = run.report
    masked = "AutoModelForMaskedLM" in code.auto_map
    tags = ["diffusion", "discrete-diffusion", "sedd_graph"]
    head = ["---", "library_name: transformers", *(["pipeline_tag: fill-mask"] if masked else []), "tags:"]
    head += [*(f"- {tag}" for tag in tags), "---", ""]
    description = " ".join(report.graph.root.description.split())
    body = [
        f"# {report.graph.name}",
        "",
        *([description, ""] if description else []),
        f"Process: {run.engine.process.describe()}.",
        "",
    ]
    body += [f"{report.parameters:,} parameters. Weights: `{run.weights}` of the run.", ""]
    body += _usage(run, code, masked=masked)
    body += _evaluation(_object(run, "evaluation.json"))
    body += _proofs(_object(run, CERTIFICATE))
    body += _papers(run)
    body += [
        f"Written by sedd_graph {version_of('sedd_graph')}. The blueprint that defines the model is `blueprint.lock.yaml`.",
        "",
    ]
    return "\n".join([*head, *body])


def _object(run: Run, name: str) -> Mapping[str, Any]:
    """Return the object in a JSON file of the run folder; empty if there is none."""
    try:
        found = read_json(run.path / name) if (run.path / name).is_file() else {}
    except SeddGraphError:
        return {}
    return found if isinstance(found, dict) else {}


def _usage(run: Run, code: ModelFiles, *, masked: bool) -> list[str]:
    length = getattr(run.report.data, "length", None) or 128
    lines = [
        "## Use",
        "",
        "```python",
        "from transformers import AutoModel, AutoTokenizer",
        "",
        'model = AutoModel.from_pretrained("FOLDER", trust_remote_code=True)',
        *(
            ['tokenizer = AutoTokenizer.from_pretrained("FOLDER", trust_remote_code=True)']
            if run.tokenizer is not None
            else []
        ),
        f"rows = model.generate(length={length}, batch_size=4, seed=0)",
        *(["print(*tokenizer.batch_decode(rows, skip_special_tokens=True))"] if run.tokenizer is not None else []),
        "```",
        "",
        "`trust_remote_code` runs the Python files of this folder, which need torch and transformers alone: read them first. "
        f"Samplers of `generate`: {', '.join(f'`{name}`' for name in code.samplers)}; the default is `{code.samplers[0]}`.",
        "",
    ]
    if masked:
        lines += [
            'A prompt has the mask at the positions to fill in. `pipeline("fill-mask", ...)` works, too: it shows the most '
            "likely tokens of each mask by itself.",
            "",
        ]
    return lines


def _evaluation(found: Mapping[str, Any]) -> list[str]:
    if not found:
        return ["## Evaluation", "", "The run has not been evaluated (`sedd-graph eval`).", ""]
    protocol = found.get("protocol") if isinstance(found.get("protocol"), dict) else {}
    rows = [
        ("bits per character (upper bound)", found.get("bits_per_character"), found.get("bits_standard_error")),
        ("perplexity per token (upper bound)", found.get("perplexity"), None),
    ]
    lines = ["## Evaluation", "", "| held-out text | value | standard error |", "|---|---|---|"]
    for label, value, error in rows:
        if isinstance(value, int | float):
            lines.append(f"| {label} | {value:,.4g} | {f'{error:.2g}' if isinstance(error, int | float) else '-'} |")
    text = (
        f"{found.get('sequences', '?')} sequences, {found.get('draws', '?')} noise draw(s) each, "
        f"objective `{found.get('objective', '?')}`, weights `{found.get('weights', '?')}`"
    )
    data = protocol.get("data") if protocol else None
    if isinstance(data, dict) and data:
        text += "; data: " + ", ".join(f"{k} {v}" for k, v in data.items() if isinstance(v, str | int | float))
    caveat = found.get("caveat")
    return [*lines, "", f"{text}.{f' Note: {caveat}.' if caveat else ''}", ""]


def _proofs(found: Mapping[str, Any]) -> list[str]:
    checks = [c for c in found.get("checks") or [] if isinstance(c, dict)]
    if not checks:
        return ["## Verified", "", "The run has no certificate: nothing was verified.", ""]
    lines = ["## Verified", "", "Before training the noise process was verified numerically on small cases:", ""]
    words: Mapping[object, str] = {True: "holds", False: "FAILS"}
    lines += ["| claim | result | measured | how |", "|---|---|---|---|"]
    for check in checks:
        cells = [check.get("claim"), words.get(check.get("holds"), "-"), check.get("value"), check.get("how")]
        lines.append("| " + " | ".join(str(cell).replace("|", "\\|") for cell in cells) + " |")
    return [*lines, ""]


def _papers(run: Run) -> list[str]:
    """Return the papers that the docstrings of the model's components name, by component."""
    registry, plan = run.report.registry, run.plan
    ops = {step.body.contract.op for _, step in run.report.graph.root.walk() if isinstance(step.body, Op)}
    for part in ("kernel", "schedule", "objective", "sampler"):
        contract = getattr(getattr(plan, part, None), "contract", None)
        ops |= {contract.op} if contract is not None else set()
    lines: list[str] = []
    for op in sorted(ops):
        ids: Sequence[str] = list(dict.fromkeys(_ARXIV.findall(registry.component(op).__doc__ or "")))
        if ids:
            links = ", ".join(f"[arXiv {i}](https://arxiv.org/abs/{i})" for i in ids)
            lines.append(f"- `{op.partition('.')[0]}`: {links}")
    return ["## Papers", "", *lines, ""] if lines else []
