"""Guidance by a classifier that a blueprint declares: its law by enumeration, and the road from a file of counts to text."""

import itertools
import json
import math
from collections.abc import Callable
from pathlib import Path
from typing import Any

import jsonschema
import numpy as np
import pytest
import torch
import zarr
from sedd_graph_registry.noise.interpolating import Absorb
from sedd_graph_registry.sampling.classifiers import TokenCounts
from sedd_graph_registry.sampling.exact import FirstHitting
from torch import Tensor

import sedd_graph
from sedd_graph.blueprint.yaml import read_yaml
from sedd_graph.cli import main as cli
from sedd_graph.component.base import Context
from sedd_graph.diffusion.tokens.classifier import NoisyClassifier
from sedd_graph.diffusion.tokens.guidance import Classifier, _differences, classified
from sedd_graph.errors import BlueprintError
from sedd_graph.verify.classifier import check_classifier
from tests.conftest import ROOT
from tests.diffusion.test_samplers import ROWS, SEQUENCES, L, V, distance, make, run, some, world

TOLD = torch.tensor([[0.7, 0.2, 0.1], [0.1, 0.1, 0.8], [0.2, 0.6, 0.2]], dtype=torch.float64)
PRIOR = torch.tensor([0.5, 0.2, 0.3], dtype=torch.float64)
"""A law of text: a label, then tokens that know of each other by the label alone."""


def counts(label: int, strength: float = 1.0) -> TokenCounts:
    """A classifier that is right about that law, but for a smoothing of one in a million."""
    rows = (TOLD * 1e6).round().tolist()
    config = TokenCounts.Config(counts=rows, label=label, strength=strength, smoothing=1e-6, prior=PRIOR.tolist())
    return TokenCounts(config, Context({"n": V + 1}))


def labels_given(x: Tensor) -> Tensor:
    """p(label | what is seen of x), float64 [b, 3]."""
    seen = torch.where((x < V)[..., None], TOLD.T[x.clamp(max=V - 1)], 1.0)
    law = PRIOR * seen.prod(1)
    return law / law.sum(-1, keepdim=True)


def denoise(x: Tensor, t: Tensor, rows: Tensor, at: Tensor | None = None) -> dict[str, Tensor]:
    """A perfect network."""
    law = (labels_given(x) @ TOLD)[:, None].expand(*x.shape, V)
    law = torch.cat([law, torch.zeros_like(law[..., :1])], -1)
    law = torch.where((x == V)[..., None], law, torch.nn.functional.one_hot(x, V + 1).double())
    return {"log_x0": some(law.log().clamp(min=-1e6).float(), at)}


def one_at_a_time(label: int, strength: float) -> Tensor:
    """Each token in turn from p(token | seen) p(label | seen and the token) ** strength, normalised, in every order."""
    out = torch.zeros(V**L, dtype=torch.float64)
    for order in itertools.permutations(range(L)):
        for index, row in enumerate(SEQUENCES):
            x, chance = torch.full((1, L), V), 1.0
            for place in order:
                weights = []
                for token in range(V):
                    after = x.clone()
                    after[0, place] = token
                    weights.append(
                        float((labels_given(x)[0] @ TOLD)[token] * labels_given(after)[0, label] ** strength)
                    )
                chance *= weights[int(row[place])] / sum(weights)
                x[0, place] = row[place]
            out[index] += chance / math.factorial(L)
    return out


@pytest.mark.parametrize(("label", "strength"), [(0, 1.0), (1, 1.0), (1, 3.0), (2, 0.0)])
def test_guided_text_has_the_law_given_the_label(label: int, strength: float) -> None:
    kernel, schedule = world(Absorb)
    law = one_at_a_time(label, strength)
    if strength == 1:  # Bayes' rule: the law of text with this label, in whatever order it is written
        given = torch.stack([TOLD[label][SEQUENCES[:, i]] for i in range(L)]).prod(0)
        torch.testing.assert_close(law, given)
    free = torch.ones(ROWS, L).bool()
    guided = classified(denoise, kernel, schedule, counts(label, strength).guide(schedule), free)
    floor = math.sqrt(V**L / ROWS / 2)
    assert distance(run(make(FirstHitting), Absorb, denoise=guided), law) < 1.3 * floor
    if strength:
        assert float((law - one_at_a_time(label, 0.0)).abs().sum() / 2) > 10 * floor


def test_the_short_way_is_what_asking_for_each_says() -> None:
    classifier, (_, schedule) = counts(1), world(Absorb)
    x = torch.randint(0, V + 1, (5, L), generator=torch.Generator().manual_seed(0))
    t, here = torch.rand(5), torch.ones_like(x, dtype=torch.bool)
    quick = classifier.guide(schedule)
    slow = Classifier(quick.log_prob)
    torch.testing.assert_close(_differences(quick, x, t, here, V + 1), _differences(slow, x, t, here, V + 1), atol=1e-5, rtol=1e-5)  # fmt: skip


def test_one_that_is_none_is_caught() -> None:
    class Unsure(TokenCounts, kind="classifier"):
        class Config(TokenCounts.Config):
            pass

        def log_prob(self, x: Tensor, sigma: Tensor) -> Tensor:
            return super().log_prob(x, sigma) - 0.1

    class Hasty(TokenCounts, kind="classifier"):
        class Config(TokenCounts.Config):
            pass

        def changes(self, x: Tensor, sigma: Tensor, label: int) -> Tensor:
            return self.log_likelihood.T[label].float().expand(*x.shape, -1)

    for cls, name in ((Unsure, "classifier.law"), (Hasty, "classifier.changes")):
        made: NoisyClassifier = cls(cls.Config(counts=TOLD.tolist(), label=0), Context({"n": V + 1}))
        assert [c.name for c in check_classifier(made, V + 1) if c.holds is False] == [name]


# -- from a blueprint ---------------------------------------------------------------------------------------------------


@pytest.fixture
def table(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> str:
    """Counts of two labels: one of text in tokens up to 63, one in the others."""
    monkeypatch.chdir(tmp_path)
    rows = np.ones((2, 128))
    rows[0, :64] = rows[1, 64:] = 1000
    np.save("counts.npy", rows)
    return "counts.npy"


def test_from_a_file_of_counts_to_guided_text(
    small: Callable[..., Path], table: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    declared = f"sample: {{op: ancestral, steps: 8, classifier: {{op: token_counts, file: {table}, label: 0}}}}"
    path = small(("sample: {op: ancestral, steps: 8}", declared))
    schema = json.loads((ROOT / "schema" / "blueprint.v1.json").read_text())
    jsonschema.validate(read_yaml(path).data, schema)
    engine = sedd_graph.build(path, device="cpu", compile="off")
    plain = sedd_graph.build(path, ["sample.classifier=null"], device="cpu", compile="off")
    for made, sure in ((engine, True), (plain, False)):
        near = (made.sample(16, 31, seed=0) < 64).double().mean(1)  # of a network that knows nothing
        assert bool((near > 0.5).all()) is sure, near
    # a run folder keeps what it was declared with, and takes another
    assert cli.run(["build", str(path), "--runs", "runs", "--compile", "off"]) == 0
    (run,) = (tmp_path / "runs" / "small").iterdir()
    assert "guided by token_counts" in capsys.readouterr().out
    held = {c["name"]: c["holds"] for c in json.loads((run / "certificate.json").read_text())["checks"]}
    assert held["classifier.law"] is True
    assert held["classifier.changes"] is True
    for words, low in (
        ([], True),
        (["--classifier", f"{{op: token_counts, file: {table}, label: 1, strength: 2}}"], False),
    ):
        assert cli.run(["sample", str(run), "--weights", "fresh", "--batch", "8", "--length", "31", *words]) == 0
        group: Any = zarr.open_group(str(run / f"samples{'' if low else '-2'}.zarr"), mode="r")
        share = (group["tokens"][:] < 64).mean(1)
        assert (share > 0.5).all() if low else (share < 0.5).all()
        assert group.attrs["classifier"]["label"] == (0 if low else 1)
    capsys.readouterr()
    assert cli.run(["sample", str(run), "--classifier", f"{{op: token_counts, file: {table}, label: 2}}"]) == 2
    assert "there is no label 2: this classifier has 2, from 0 to 1" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("blueprint", "classifier", "said"),
    [
        ("mdlm-tiny", "file: counts.npy, label: 2", r"sample\.classifier\.label: there is no label 2"),
        ("mdlm-tiny", "file: counts.npy", r"sample\.classifier\.label: is missing"),
        ("mdlm-tiny", "file: other.npy, label: 0", r"other\.npy: cannot be read"),
        ("mdlm-tiny", "counts: [[1, 2], [2, 1]], label: 0", "counts has 2 rows of 2; there must be 2 to 4,096 labels, with a count for each of the model's 128 data tokens"),
        ("mdlm-tiny", "label: 0", "give one of 'counts' and 'file'"),
        ("mdlm-tiny", "counts: [[1, 2], [2, 1, 3]], label: 0", "all labels need as many counts"),
        ("mdlm-tiny", "file: counts.npy, label: 0, prior: [1, 2, 3]", "prior has 3 entries, but there are 2 labels"),
        ("sedd-uniform-tiny", "counts: [[1], [2]], label: 0", "counts"),
        ("bd3lm-tiny", "file: counts.npy, label: 0", "'token_counts' needs text that is drawn as a whole, not in blocks"),
        ("did-tiny", "file: counts.npy, label: 0", "a process of strings takes no classifier"),
    ],
)  # fmt: skip
def test_refused(table: str, blueprint: str, classifier: str, said: str) -> None:
    with pytest.raises(BlueprintError, match=said):
        sedd_graph.check(
            ROOT / "blueprints" / f"{blueprint}.yaml", [f"sample.classifier={{op: token_counts, {classifier}}}"]
        )


def test_a_kernel_under_which_masks_speak_is_refused(small: Callable[..., Path], table: str) -> None:
    changes = ["process={op: power, schedule: {op: loglinear}}", "objective={op: nelbo}"]
    with pytest.raises(BlueprintError, match="'token_counts' needs a kernel that only masks, all tokens at one rate"):
        sedd_graph.check(small(), [*changes, f"sample.classifier={{op: token_counts, file: {table}, label: 0}}"])
