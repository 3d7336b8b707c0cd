"""`run` with a teacher behind an address, to the report: what is measured without its weights, against independent numbers."""

import json
import re
import shutil

import numpy as np
import pyarrow.parquet as pq
import pytest
import torch
from transformers import AutoModelForCausalLM, AutoTokenizer

from llmdistill import load_dataset
from llmdistill.config import load_experiment
from llmdistill.config.jobs import Slurm
from llmdistill.errors import InputError
from llmdistill.jobs.commands import scheduled
from llmdistill.stages.curate import curate
from llmdistill.stages.evaluate import evaluate
from llmdistill.stages.generate import generate
from llmdistill.stages.report import report
from llmdistill.stages.retokenize import retokenize
from llmdistill.stages.train import train
from llmdistill.workflow.compare import compare
from llmdistill.workflow.plan import stages
from tests.conftest import run_cli
from tests.factories import write_foreign
from tests.teachers.endpoint import Endpoint, distribution, serving, write_numbers

pytest.importorskip("openai", reason="the extra `api` is not installed")
HOSTILE = "<script>alert(1)</script>"
K = 4


class Hostile(Endpoint):
    """Writes what would be a script."""

    def text(self, body):
        return f"{HOSTILE} {super().text(body)}"


def write_api_experiment(directory, url, student, tokenizer, more=""):
    file = directory / "experiment.yaml"
    file.write_text(
        f"""
output: {directory}/run
teacher: {{model: large, engine: openai, url: "{url}", tokenizer: {tokenizer}, licence: "https://example.org/terms",
          price: {{input: 1.0, output: 2.0}}, concurrency: 4}}
prompts: {{source: {write_numbers(directory, 24)}}}
generate: {{max_tokens: 60, rows_per_shard: 12}}
targets: {{kind: topk, k: {K}}}
student: {{model: {student}}}
train:
  compare_text_only: true
  args: {{max_steps: 3, per_device_train_batch_size: 2, learning_rate: 1.0e-3, gradient_checkpointing: false, bf16: false}}
eval:
  held_out: 0.25
  resamples: 200
  samples: 2
  sample_tokens: 4
{more}
"""
    )
    return file


@pytest.fixture(scope="module")
def tiny(whole_tiny):
    """With the whole vocabulary, which is that of the judge and of the endpoint."""
    return whole_tiny


@pytest.fixture(scope="module")
def finished(tiny, smollm2, tmp_path_factory):
    """The directory of a run that went to its report."""
    pytest.importorskip("lm_eval", reason="the extra `tasks` is not installed")
    directory = tmp_path_factory.mktemp("api")
    judge = f"{{model: {smollm2}, engine: transformers}}"
    more = "  tasks: [configs/tasks/facts.yaml]\n  task_limit: 12\n"
    more += f"  win_rate: {{judge: {judge}, max_tokens: 4, min_mass: 1.0e-12}}"
    with serving(Hostile(AutoTokenizer.from_pretrained(smollm2))) as url:
        done = run_cli("run", write_api_experiment(directory, url, tiny, smollm2, more))
    assert done.returncode == 0, done.stderr
    return directory / "run"


@pytest.fixture(scope="module")
def metrics(finished):
    return json.loads((finished / "eval/metrics.json").read_text())


def independent(model, tokenizer, rows):
    """Nats of each row's rendered answer by transformers' own loss, how many tokens and bytes it has, and the logits there."""
    model = AutoModelForCausalLM.from_pretrained(model, dtype=torch.float32).eval()
    found = []
    for row in rows:
        asked = [dict(message) for message in row["prompt"]]
        answered = [*asked, *(dict(message) for message in row["completion"])]
        prompt = tokenizer.apply_chat_template(asked, add_generation_prompt=True, tokenize=False)
        text = tokenizer.apply_chat_template(answered, tokenize=False).rstrip("\n")
        assert text.startswith(prompt)
        start = len(tokenizer(prompt, add_special_tokens=False)["input_ids"])
        ids = torch.tensor([tokenizer(text, add_special_tokens=False)["input_ids"]])
        labels = ids.masked_fill(torch.arange(ids.shape[1]) < start, -100)
        with torch.no_grad():
            out = model(input_ids=ids, labels=labels)
        tokens = ids.shape[1] - start
        size = len(answered[-1]["content"].encode())
        found.append((out.loss.item() * tokens, tokens, size, out.logits[0, start - 1 : -1].double(), ids[0, start:]))
    return found


def test_the_text_is_measured_as_transformers_measures_it(finished, metrics, tiny, smollm2):
    rows, tokenizer = load_dataset(finished / "curated", "test").with_format(None), AutoTokenizer.from_pretrained(smollm2)
    by_name = {model["name"]: model for model in metrics["models"]}
    assert list(by_name) == ["student before", "student", "student, text only"]
    nats = {}
    for name, path in (("student before", tiny), ("student", finished / "student")):
        told = independent(path, tokenizer, rows)
        nats[name], tokens, size = (np.array([row[place] for row in told]) for place in range(3))
        assert by_name[name]["nll"]["mean"] == pytest.approx(nats[name].sum() / tokens.sum(), rel=1e-4)
        assert by_name[name]["bits_per_byte"]["mean"] == pytest.approx(nats[name].sum() / np.log(2) / size.sum(), rel=1e-4)
        first = [int((logits.argmax(-1) == ids).sum()) for _, _, _, logits, ids in told]
        assert by_name[name]["written"]["mean"] == pytest.approx(sum(first) / tokens.sum(), abs=1e-9)
        assert by_name[name]["stored_kl"]["mean"] == pytest.approx(stored_kl(told), rel=2e-3)  # stored in float16
    assert metrics["held_out"]["tokens"] == tokens.sum()
    assert metrics["held_out"]["stored"] == pytest.approx((tokens.sum() - len(rows)) / tokens.sum()), "all but the end tokens"
    found = next(d for d in metrics["differences"] if (d["worse"], d["metric"]) == ("student before", "nll"))
    difference = (nats["student"] - nats["student before"]).sum() / tokens.sum()
    assert found["mean"] == pytest.approx(difference, rel=1e-3)
    assert found["low"] < found["mean"] < found["high"]
    compared = {(d["worse"], d["metric"]) for d in metrics["differences"]}
    rivals, by = ("student before", "student, text only"), ("nll", "written", "stored_kl", "bits_per_byte")
    assert compared == {(rival, metric) for rival in rivals for metric in by}


def stored_kl(told):
    """KL(p ‖ q) over the K tokens that the endpoint named and the rest, from its own probabilities."""
    total, count = 0.0, 0
    for _, _, _, logits, ids in told:
        q = logits.softmax(-1)
        for place, token in enumerate(ids.tolist()[:-1]):  # the end token is not shown
            named = dict(distribution(token, place, K + 1)[:K])
            p = [np.exp(value) for value in named.values()]
            own = [float(q[place, other]) for other in named]
            outcomes = zip([*p, 1 - sum(p)], [*own, 1 - sum(own)], strict=True)
            total, count = total + sum(one * np.log(one / other) for one, other in outcomes), count + 1
    return total / count


def test_nothing_that_needs_the_weights_is_there(metrics):
    of_teacher = {"kl", "reverse_kl", "top1", "top5", "calibration_error", "draft", "own_text", "sequence_kl", "kl_by_position"}
    assert all(not of_teacher & set(model) for model in metrics["models"])
    assert metrics["views"] == []
    assert "own_text" not in metrics
    assert metrics["examples"]["by"] == "nll"
    assert metrics["samples"][0]["answers"]["teacher"].startswith("<script")
    assert set(metrics["tasks"]["together"]["models"]) == {"student before", "student", "student, text only"}
    assert metrics["tasks"]["together"]["kept"] is None
    assert metrics["decoding"]["engine"] == "transformers"
    assert all(model["decode_tokens_per_s"] > 0 and model["bytes"] for model in metrics["models"])


def test_the_judge_reads_the_stored_answers(finished, metrics):
    rows = load_dataset(finished / "curated", "test").with_format(None)
    verdicts = pq.read_table(finished / "eval/verdicts.parquet").to_pylist()
    stored = {str(row["id"]): row["completion"][0]["content"] for row in rows}
    assert {row["id"]: row["rival"] for row in verdicts} == stored
    assert metrics["win_rate"]["against"] == "teacher"
    assert metrics["win_rate"]["prompts"] == len(stored)
    assert "the judge has the teacher's tokenizer" in metrics["win_rate"]["warnings"][0]


def test_the_report_says_what_is_there_and_what_is_not(finished, metrics):
    page, text = ((finished / f"report.{form}").read_text() for form in ("html", "md"))
    assert (finished / "report.png").stat().st_size > 1000
    assert HOSTILE not in page
    assert "&lt;script&gt;alert(1)" in page
    shown = " ".join(re.sub(r"<[^>]+>", " ", page).split())
    student = next(model for model in metrics["models"] if model["name"] == "student")
    for document in (shown, text.replace("\\", "")):
        assert "The teacher is behind an API, so results that need its weights are missing: the KL from the teacher" in document
        assert "The teacher was not asked, since its answers to tasks would be billed." in document
        assert "The teacher’s answers are the stored ones, which were sampled." in document
        assert f"{student['bits_per_byte']['mean']:.2f}" in document
        assert "KL over the stored tokens" in document
        assert "Cost: " in document
        assert "a kept row" in document
        assert "Against the same student trained on the text only, " in document
        assert "KL(model ‖ teacher)" not in document
    assert "against the student before training p, by Holm" in shown
    assert metrics["headline"] in text
    assert "bits per byte of the teacher's text" in metrics["headline"]
    card = (finished / "student/README.md").read_text()
    assert "the token that the teacher wrote is the most likely one, % |" in card
    assert "KL(teacher ‖ student) over the stored tokens" in card


def test_the_stages_are_done_and_runs_of_it_are_not_compared(finished, tmp_path):
    assert json.loads((finished / "eval/run.json").read_text())["status"] == "done"
    shutil.copytree(finished / "eval", tmp_path / "other/eval")
    with pytest.raises(InputError, match="its teacher is behind an API"):
        compare([finished, tmp_path / "other"], tmp_path / "page.html")


def test_a_student_with_another_vocabulary_is_measured_by_the_byte(tiny, smollm2, tmp_path):
    """Its own tokens count its nats; over root classes there is no KL of stored tokens alone."""
    foreign = write_foreign(tmp_path / "foreign")
    with serving(Endpoint(AutoTokenizer.from_pretrained(smollm2))) as url:
        file = write_api_experiment(tmp_path, url, foreign, smollm2, "  own_prompts: 0")
        experiment = load_experiment(file, [("train.compare_text_only", "false"), ("eval.samples", "1")])
        names = ["generate", "curate", "retokenize", "train", "eval", "report"]
        assert [stage.command for stage in stages(experiment)] == names
        assert [stage.command for stage in scheduled(experiment, Slurm())] == names, "the jobs of every scheduler"
        for stage in (generate, curate, retokenize, train, evaluate, report):
            stage(experiment)
    found = json.loads((tmp_path / "run/eval/metrics.json").read_text())
    rows = load_dataset(tmp_path / "run/curated", "test").with_format(None)
    told = independent(foreign, AutoTokenizer.from_pretrained(foreign), rows)
    nats, tokens, size = (np.array([row[place] for row in told]) for place in range(3))
    before = found["models"][0]
    assert before["bits_per_byte"]["mean"] == pytest.approx(nats.sum() / np.log(2) / size.sum(), rel=1e-4)
    assert before["nll"]["mean"] == pytest.approx(nats.sum() / tokens.sum(), rel=1e-4)
    assert all("stored_kl" not in model for model in found["models"])
    assert not {"stored", "classes"} & set(found["held_out"])
    assert "KL over the stored tokens" not in (tmp_path / "run/report.html").read_text()


@pytest.mark.parametrize(("key", "value"), [("own_prompts", "8"), ("own_tokens", "32")])
def test_what_needs_the_weights_is_refused_before_anything_is_paid(tmp_path, tiny, smollm2, key, value):
    endpoint = Endpoint(AutoTokenizer.from_pretrained(smollm2))
    with serving(endpoint) as url:
        file = write_api_experiment(tmp_path, url, tiny, smollm2)
        for command in ("run", "generate"):
            done = run_cli(command, file, f"--eval.{key}", value)
            assert done.returncode == 2
            assert f"eval.{key} needs the teacher's weights, which teacher.engine openai does not have" in done.stderr
            assert "Traceback" not in done.stderr
    assert not endpoint.bodies
    assert not (tmp_path / "run").exists()
