"""Ten minutes of training on two cores: the held-out bound of blueprints/learn.yaml on a text file.

    python benchmarks/learn.py path/to/tinyshakespeare.txt [key=value ...]

The first 90 % of the text are trained on, the last 10 % are held out. The time of compiling counts. Prints one line and appends
it to benchmarks/results/learn.jsonl with the hardware named.
"""

from __future__ import annotations

import sys
import tempfile
from pathlib import Path

from common import BLUEPRINTS, append_record, bound, data_config, text_data

from sedd_graph.engine.hardware import describe_hardware, pick_device
from sedd_graph.evaluation.bound import numbers
from sedd_graph.runs.check import check
from sedd_graph.runs.open import make_engine
from sedd_graph.training.loop import train


def main() -> None:
    """Train, evaluate over all held-out rows with 8 draws each, and record."""
    text = Path(sys.argv[1]).resolve()
    overrides = [f"data.corpus={{op: text, files: ['{text}']}}", *sys.argv[2:]]
    report = check(BLUEPRINTS / "learn.yaml", overrides)
    if report.parameters > 1_100_000:
        raise SystemExit(f"{report.parameters:,} parameters are more than the 1,100,000 that the record is for")
    device = pick_device("cpu")
    data = text_data(report, root=text.parent)
    engine = make_engine(report, device=device, compile=report.train.compile)
    with tempfile.TemporaryDirectory() as run:
        result = train(engine, data, report.train, run=Path(run))
    found = bound(engine, data, rows=64, batches=None, draws=8)
    record = {
        "parameters": report.parameters,
        "steps": result.step,
        "seconds": round(result.seconds, 1),
        "tokens_per_second": round(result.step * report.train.batch * data_config(report).length / result.seconds),
        "hardware": describe_hardware(device),
        "overrides": sys.argv[2:],
        **numbers(found),
    }
    append_record("learn", record)
    print(f"{found.bits_per_character:.4f} +- {found.bits_standard_error:.4f} bits per character held out; {record}")


if __name__ == "__main__":
    main()
