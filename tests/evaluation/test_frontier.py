"""Perplexity at the entropy of the data: a law with a closed form, a judge whose law is known, its record and its page."""

import json
import math
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from sedd_graph.cli import main as cli
from sedd_graph.data.rows import Dataset
from sedd_graph.data.tokenizer import load_tokenizer
from sedd_graph.evaluation.frontier import Judged, at_entropy
from sedd_graph.evaluation.text import unigram_entropy
from sedd_graph.runs.open import open_run
from sedd_graph.runs.sample_section import sampler_settings
from tests.conftest import SMALL
from tests.evaluation.judges import bigram
from tests.evaluation.test_samples import CPU
from tests.runs.folders import placed

SLOPE, START = 2.5, -0.75


def texts(entropy: float, count: int = 400, *, spread: float = 0.1, seed: int = 0) -> Judged:
    """Texts whose nats per token are START + SLOPE times their entropy, which is normal."""
    generator = np.random.default_rng([seed, round(entropy * 1000)])
    each = entropy + spread * generator.normal(size=count)
    return Judged(20 * (START + SLOPE * each), np.full(count, 20.0), each)


def test_a_line_is_interpolated_exactly_whatever_the_temperatures() -> None:
    """Nats are linear in entropy here, so that the value at the entropy of the text has a closed form."""
    reference = texts(3.0, seed=9)
    expected = math.exp(START + SLOPE * reference.entropy.mean())
    temperatures = [1.2, 0.6, 0.9]  # in any order
    samples = [texts(2.2 + t) for t in temperatures]
    found = at_entropy(samples, temperatures, reference, steps=8)
    assert found.perplexity == pytest.approx(expected, rel=1e-12)
    low, high = samples[1].entropy.mean(), samples[2].entropy.mean()
    assert found.temperature == pytest.approx(0.6 + 0.3 * (reference.entropy.mean() - low) / (high - low))
    assert (found.steps, found.why_not) == (8, None)


def test_the_error_is_that_of_repeated_evaluations() -> None:
    """The curve is exact whatever the draw, so that only the entropy of the reference is uncertain: slope times its error."""
    reference = texts(3.0, seed=9)
    found = at_entropy([texts(2.8), texts(3.3)], [0.8, 1.0], reference, steps=None)
    assert found.perplexity is not None
    entropy_error = reference.entropy.std(ddof=1) / math.sqrt(400)
    assert found.standard_error == pytest.approx(found.perplexity * SLOPE * entropy_error, rel=0.15)
    assert found.sample_error < 1e-10 * found.perplexity

    def noisy(entropy: float, seed: int) -> Judged:
        plain, generator = texts(entropy, 100, seed=seed), np.random.default_rng([seed, 7])
        return Judged(plain.nats + 20 * generator.normal(size=100), plain.counted, plain.entropy)

    for fixed, name in ((None, "standard_error"), (reference, "sample_error")):
        repeated = [
            at_entropy(
                [noisy(2.8, 3 * s), noisy(3.3, 3 * s + 1)],
                [0.8, 1.0],
                fixed or texts(3.0, 100, seed=3 * s + 2),
                steps=None,
            )
            for s in range(40)
        ]
        values = np.array([each.perplexity for each in repeated], dtype=float)
        stated = np.sqrt(np.mean([getattr(each, name) ** 2 for each in repeated]))
        assert 0.65 < stated / values.std(ddof=1) < 1.5


def test_near_the_end_of_the_curve_the_error_is_unknown() -> None:
    samples = [texts(2.8), texts(3.3)]
    for index, word in ((0, "lower"), (1, "higher")):
        shift = 0.001 * (1 if index == 0 else -1)
        end = samples[index]
        found = at_entropy(samples, [0.8, 1.0], Judged(end.nats, end.counted, end.entropy + shift), steps=4)
        assert found.perplexity is not None
        assert math.isnan(found.standard_error)
        assert found.why_not is not None
        assert f"add {word} temperatures" in found.why_not


def test_beyond_the_temperatures_there_is_no_value() -> None:
    samples = [texts(2.8), texts(3.3)]
    for entropy, word in ((2.0, "lower"), (4.0, "higher")):
        found = at_entropy(samples, [0.8, 1.0], texts(entropy), steps=4)
        assert found.perplexity is None
        assert found.why_not is not None
        assert f"add {word} temperatures" in found.why_not


@pytest.fixture(scope="module")
def run(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return placed(tmp_path_factory.mktemp("run"), SMALL)


@pytest.mark.parametrize("settings", [[], ["positions=systematic"]], ids=["as declared", "systematic"])
def test_with_a_judge_whose_law_is_known(
    run: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str], settings: list[str]
) -> None:
    pytest.importorskip("transformers", reason="the extra 'hub' is not installed")
    tokenizer = load_tokenizer(run)
    law = bigram(tmp_path / "law", tokenizer.decode(range(tokenizer.size)), window=64)
    arguments = [
        "--judge",
        str(tmp_path / "law"),
        "--temperatures",
        "0.02",
        "0.2",
        "1",
        "--steps",
        "2",
        "4",
        "--rows",
        "6",
    ]
    given = [part for text in settings for part in ("--set", text)]
    assert cli.run(["eval", str(run), "--frontier", *arguments, "--weights", "fresh", *given, *CPU]) == 0
    said = capsys.readouterr().out
    *_, record = [json.loads(line) for line in (run / "frontier.jsonl").read_text().splitlines()]
    overrides = [f"sample.{text}" for text in settings]
    opened = open_run(run, overrides=overrides, device="cpu", compile="off", weights="fresh")
    assert record["protocol"]["sampler"] == opened.plan.sampler_op
    assert record["protocol"]["positions"] == ("systematic" if settings else "independent")

    def by_hand(rows: Any) -> tuple[float, float, Judged]:
        found = [law.nats([tokenizer.decode(row)], 64) for row in rows]
        nats, counts = np.array([f[0] for f in found]), np.array([f[1] for f in found], dtype=float)
        entropy = np.array([unigram_entropy([np.array(row)]).value for row in rows])
        return nats.sum() / counts.sum(), entropy.mean(), Judged(nats, counts, entropy)

    held = opened.data()
    assert isinstance(held, Dataset)
    chosen = np.linspace(0, held.heldout.count - 1, 12).astype(int)[::2]
    _, _, reference = by_hand(held.heldout.take(chosen, 0).tokens.tolist())
    assert record["points"][0]["perplexity"] == pytest.approx(
        math.exp(reference.nats.sum() / reference.counted.sum()), rel=1e-5
    )
    at = iter(record["points"][1:])
    for steps, value in zip((2, 4), record["at_entropy"], strict=True):
        samples = []
        for temperature in (0.02, 0.2, 1.0):
            with sampler_settings(opened, temperature=temperature):
                rows = opened.engine.sample(6, opened.report.data.length, steps=steps, seed=0)
            nats, entropy, own = by_hand(rows.tolist())
            samples.append(own)
            point = next(at)
            assert (point["temperature"], point["steps"], point["texts"]) == (temperature, steps, 6)
            assert point["nats_per_token"] == pytest.approx(nats, rel=1e-5)
            assert point["entropy"] == pytest.approx(entropy)  # a letter is a token of either tokenizer
        expected = at_entropy(samples, (0.02, 0.2, 1.0), reference, steps=steps)
        assert value["perplexity"] == (expected.perplexity and pytest.approx(expected.perplexity, rel=1e-5))
        assert value["why_not"] == expected.why_not
    assert "at the entropy of held-out text, 2 steps: " in said
    page = (run / "report.html").read_text()
    assert "Perplexity at the entropy of the data" in page
    assert "generative perplexity over unigram entropy" in page
    assert "At the entropy of held-out text, 4 steps: " in page
    assert ("0.02, 0.2, 1, sample.positions=systematic" in page) == bool(settings)


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--frontier"], "give --judge FOLDER"),
        (["--frontier", "--judge", "x", "--draws", "2"], "are for other evaluations: without --frontier"),
        (["--temperatures", "1"], "--temperatures, --steps, --rows, --sampler and --set are for --frontier"),
        (["--set", "top_p=0.9"], "--sampler and --set are for --frontier"),
        (["--frontier", "--judge", "x", "--set", "positions=even"], "sample.positions: "),
        (["--frontier", "--judge", "x", "--sampler", "none_such"], "none_such"),
        (["--frontier", "--judge", "x", "--temperatures", "1", "1"], "needs at least two temperatures"),
        (["--frontier", "--judge", "x"], "judge x is neither a folder nor a .gguf file"),
    ],
)
def test_what_cannot_be_asked_for(
    run: Path, arguments: list[str], message: str, capsys: pytest.CaptureFixture[str]
) -> None:
    assert cli.run(["eval", str(run), *arguments, *CPU]) == 2
    assert message in capsys.readouterr().err


def test_settings_that_a_sampler_lacks_are_refused(run: Path) -> None:
    opened = open_run(run, device="cpu", compile="off", weights="fresh")
    with pytest.raises(Exception, match="has no 'heat'"), sampler_settings(opened, heat=1.0):
        pass
    with pytest.raises(Exception, match=r"sample\.temperature: "), sampler_settings(opened, temperature=-1.0):
        pass
