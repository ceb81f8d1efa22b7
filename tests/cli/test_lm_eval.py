"""The evaluation harness on local tasks: likelihoods, rolling likelihoods and generated texts of a run."""

import json
import math
from pathlib import Path
from typing import Any

import pytest
import torch
import yaml

from sedd_graph.cli import main as cli
from sedd_graph.errors import MissingExtraError, UserError
from sedd_graph.evaluation.sequences import Scored, score
from sedd_graph.runs.harness import Generation, HarnessRun, Settings
from sedd_graph.runs.open import open_run
from tests.runs.folders import placed

TINY = ("params.dim=16", "params.depth=1", "params.heads=2", "params.cond=16", "train.seed=3")

CHOICES = """
task: local_choice
dataset_path: json
dataset_kwargs: {data_files: {test: FOLDER/choice.jsonl}}
output_type: multiple_choice
test_split: test
doc_to_text: "{{question}}"
target_delimiter: ""
doc_to_choice: "{{choices}}"
doc_to_target: answer
metric_list: [{metric: acc}]
"""
TEXTS = """
task: local_texts
dataset_path: json
dataset_kwargs: {data_files: {test: FOLDER/texts.jsonl}}
output_type: loglikelihood_rolling
test_split: test
doc_to_text: ""
doc_to_target: "{{text}}"
metric_list: [{metric: word_perplexity}, {metric: bits_per_byte}]
"""
WRITTEN = """
task: local_written
dataset_path: json
dataset_kwargs: {data_files: {test: FOLDER/choice.jsonl}}
output_type: generate_until
test_split: test
doc_to_text: "{{question}}"
target_delimiter: ""
doc_to_target: "{{choices[answer]}}"
generation_kwargs: {until: ["e"], max_gen_toks: 12}
metric_list: [{metric: exact_match}]
"""


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A run, and three tasks over local files."""
    pytest.importorskip("lm_eval", reason="the extra 'lm-eval' is not installed")
    made: Path = tmp_path_factory.mktemp("harness")
    built = placed(made, "mdlm-tiny", *TINY, "objective={op: masked_count}", "sample.steps=4")
    engine = open_run(built, device="cpu", compile="off").engine
    generator = torch.Generator().manual_seed(0)
    with torch.no_grad():  # a network that has opinions
        for parameter in engine.model.parameters():
            parameter.add_(torch.randn(parameter.shape, generator=generator) * 0.2)
    engine.save(made / "run")
    (made / "choice.jsonl").write_text(
        "".join(
            json.dumps({"question": q, "choices": c, "answer": 0}) + "\n"
            for q, c in (
                ("The sky is", [" blue", " red"]),
                ("One and one", [" is two", " is six, or seven"]),
                ("", ["a", "b"]),
            )
        )
    )
    (made / "texts.jsonl").write_text(
        "".join(json.dumps({"text": t}) + "\n" for t in ("A short text.", "Words. " * 40))
    )
    for name, text in (("choice", CHOICES), ("texts", TEXTS), ("written", WRITTEN)):
        (made / f"{name}.yaml").write_text(text.replace("FOLDER", str(made)))
    return made


@pytest.fixture
def offline(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The libraries that read tasks keep their files in the test's folder, and use no network."""
    import datasets

    monkeypatch.setattr(datasets.config, "HF_DATASETS_CACHE", tmp_path / "cache")
    monkeypatch.setattr(datasets.config, "HF_DATASETS_OFFLINE", True)
    monkeypatch.setenv("HF_DATASETS_OFFLINE", "1")
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")
    monkeypatch.setenv("HF_HOME", str(tmp_path / "home"))


def harness(folder: Path, task: str, **arguments: Any) -> dict[str, Any]:
    """What the harness returns of a task, which it does not look for among its own (there are 15,000 files of those)."""
    from lm_eval import simple_evaluate
    from lm_eval.tasks import TaskManager

    import sedd_graph.runs.harness_model

    assert sedd_graph.runs.harness_model.NAME == "sedd_graph"
    found: dict[str, Any] = simple_evaluate(
        model="sedd_graph",
        model_args={"run": str(folder / "run"), **arguments},
        tasks=[yaml.safe_load((folder / f"{task}.yaml").read_text())],
        task_manager=TaskManager(include_defaults=False),
        batch_size=4,
        device="cpu",
        bootstrap_iters=10,
    )
    found["samples"] = next(iter(found["samples"].values()))
    return found


@pytest.mark.slow  # the harness reads the names of all its tasks first
def test_the_command_line(folder: Path, tmp_path: Path, offline: None, capsys: pytest.CaptureFixture[str]) -> None:
    words = ["--model_args", f"run={folder / 'run'},draws=6", "--tasks", str(folder / "choice.yaml")]
    words += ["--output_path", str(tmp_path / "out"), "--log_samples", "--device", "cpu", "--batch_size", "4"]
    assert cli.run(["lm-eval", *words]) == 0
    (record,) = (tmp_path / "out").rglob("results_*.json")
    assert json.loads(record.read_text())["config"]["model"] == "sedd_graph"
    assert "|local_choice|" in capsys.readouterr().out


@pytest.mark.filterwarnings("ignore")
def test_a_local_task_of_choices(folder: Path, tmp_path: Path, offline: None) -> None:
    details = tmp_path / "details.jsonl"
    found = harness(folder, "choice", draws=6, details=str(details))
    answers = [float(r[0][0]) for sample in found["samples"] for r in sample["resps"]]
    made = HarnessRun.open(folder / "run", Settings(draws=6), device="cpu")
    pairs = [(q, c) for q, choices in (("The sky is", (" blue", " red")), ("One and one", (" is two", " is six, or seven")), ("", ("a", "b"))) for c in choices]  # fmt: skip
    assert answers == pytest.approx([-bound.nats for bound in made.likelihoods(pairs)], rel=1e-5)
    lines = [json.loads(line) for line in details.read_text().splitlines()]
    assert [line["tokens"] for line in lines] == [5, 4, 7, 17, 1, 1]
    assert [line["nats"] for line in lines] == pytest.approx([-a for a in answers])
    assert lines[0]["standard_error"] > 1e-3
    assert lines[4]["standard_error"] == 0  # one token: exact
    assert found["config"]["draws"] == 6
    assert found["config"]["bound_noise_error"] > 1e-4
    assert 0 <= found["results"]["local_choice"]["acc,none"] <= 1


@pytest.mark.filterwarnings("ignore")
def test_a_local_task_of_whole_texts(folder: Path, offline: None) -> None:
    found = harness(folder, "texts", draws=4)
    made = HarnessRun.open(folder / "run", Settings(draws=4), device="cpu")
    texts = ["A short text.", "Words. " * 40]
    nats = [bound.nats for bound in made.whole_likelihoods(texts)]
    expected = sum(nats) / math.log(2) / sum(map(len, texts))
    assert found["results"]["local_texts"]["bits_per_byte,none"] == pytest.approx(expected, rel=1e-5)
    assert [bound.tokens for bound in made.whole_likelihoods(texts)] == [13, 280]  # more than a row: each token once


@pytest.mark.filterwarnings("ignore")
def test_a_local_task_of_generated_texts(folder: Path, offline: None) -> None:
    found = harness(folder, "written", sampler="confidence", steps=4)
    texts = [sample["resps"][0][0] for sample in found["samples"]]
    made = HarnessRun.open(folder / "run", Settings(rows=1, steps=4), device="cpu", sampler="confidence")
    assert texts == made.texts(["The sky is", "One and one", ""], Generation(tokens=12, until=("e",)))
    assert all("e" not in text and len(text) <= 12 for text in texts)
    assert any(texts)


def test_answers_do_not_depend_on_the_batch(folder: Path) -> None:
    pairs = [("The sky", " is blue"), ("", "One"), ("A long context " * 20, "and an end")]
    texts, how = ["The sky", "One and one and", "A long context " * 20], Generation(tokens=9, temperature=1.0)
    one, many = (HarnessRun.open(folder / "run", Settings(rows=r, draws=5), device="cpu") for r in (1, 16))
    for a, b in zip(one.likelihoods(pairs), many.likelihoods(pairs[::-1])[::-1], strict=True):
        assert a.nats == pytest.approx(b.nats, rel=1e-5)
    assert one.texts(texts, how) == many.texts(texts[::-1], how)[::-1]
    assert one.texts(texts, how)[0] == many.texts(texts[:1], how)[0]
    assert many.run.engine.process.sampler.config.temperature == 1.0


def test_greedy_continuations_are_those_that_the_sampler_writes(folder: Path) -> None:
    made = HarnessRun.open(folder / "run", Settings(greedy=True), device="cpu", sampler="confidence")
    context = "The sky is"
    (text,) = made.texts([context], Generation(tokens=4))
    best = made.greedy([(context, text), (context, "zzzz"), ("", "q")])
    written = made.tokenizer.encode(context + text)
    assert best[0] == (len(written) == len(made.tokenizer.encode(context)) + 4)
    assert best[1:] == [False, False]
    assert HarnessRun.open(folder / "run", Settings(), device="cpu").greedy([(context, text)]) == [False]


def test_contexts_are_never_noised_and_encoded_with_their_continuation(folder: Path) -> None:
    made = HarnessRun.open(folder / "run", Settings(draws=7, seed=2), device="cpu")
    encode = made.tokenizer.encode
    (found,) = made.likelihoods([("In a ", "row")])  # the blank belongs to the continuation
    row = Scored(tuple(encode("In a").tolist()), tuple(encode(" row").tolist()))
    assert found == score(made.run.engine, [row], draws=7, seed=2, at_once=32)[0]


def test_bad_settings_are_refused(folder: Path, tmp_path: Path) -> None:
    from sedd_graph.runs.harness_model import SeddGraphLM

    with pytest.raises(UserError, match="draws must be a whole number from 1 to 4,096, not 0"):
        Settings(draws=0)
    with pytest.raises(UserError, match="batch_size must be a whole number or 'auto', not 'many'"):
        SeddGraphLM(str(folder / "run"), batch_size="many")
    with pytest.raises(UserError, match="is not a run folder"):
        SeddGraphLM(str(tmp_path))
    made = HarnessRun.open(folder / "run", Settings(), device="cpu")
    with pytest.raises(UserError, match="characters that the model was not trained on"):
        made.likelihoods([("", "\N{SNOWMAN}")])
    with pytest.raises(UserError, match="has no tokens of its own"):
        made.likelihoods([("a", "")])


def test_without_the_extra_the_message_names_it(monkeypatch: pytest.MonkeyPatch) -> None:
    from sedd_graph.cli import lm_eval

    monkeypatch.setattr(lm_eval.importlib.util, "find_spec", lambda name: None)
    with pytest.raises(MissingExtraError, match=r"pip install 'sedd_graph\[lm-eval\]'"):
        cli.run(["lm-eval", "--debug", "--tasks", "x"])
