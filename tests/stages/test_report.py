"""The report: every number is there, hostile text stays text, and what is missing is said."""

import json
import re
from html.parser import HTMLParser
from itertools import pairwise
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from PIL import Image

from llmdistill.config import Experiment
from llmdistill.errors import InputError
from llmdistill.evaluation.cascade import cascade
from llmdistill.evaluation.drafts import add_speed_ups
from llmdistill.evaluation.plots import fit_axis, interval_plot, loss_plot, share_plot, smooth, spread, thin
from llmdistill.evaluation.report.words import cell, fenced
from llmdistill.evaluation.statistics import Draws
from llmdistill.evaluation.summary import task_verdict
from llmdistill.stages.report import report

HEADLINE = "40% smaller · 1.9× faster · keeps 61% of the teacher's next-token choices (95% CI 59 to 63)"
HOSTILE = "<script>alert(1)</script>\n{{ 7*7 }} | a | b |\n````\n<img src=x onerror=alert(1)> https://example.org/x.png\n```"


def interval(mean: float, low: float, high: float) -> dict[str, float]:
    return {"mean": mean, "low": low, "high": high}


def model(name: str, parameters: int, rate: float, kl: Any, top1: Any, nll: Any, size: int | None = None) -> dict[str, Any]:
    return {
        "name": name,
        "path": "models/<Teacher>|x",
        "parameters": parameters,
        "bytes": size,
        "decode_tokens_per_s": rate,
        "kl": interval(*kl),
        "top1": interval(*top1),
        "nll": interval(*nll),
        "reverse_kl": interval(*kl),
        "top5": interval(*top1),
        "bits_per_byte": interval(*nll),
        "calibration_error": interval(0.02, 0.01, 0.03),
        "early_end": interval(0.004, 0.003, 0.005),
        "kl_by_position": [{"from": begin, "tokens": 100, **interval(*kl)} for begin in (0, 4, 8)],
        "kl_by_entropy": [{"from": begin, "tokens": 100, **interval(*kl)} for begin in (0.0, 0.05, 2.0)],
        "draft": draft(),
        "own_text": {"tokens": 900, "reverse_kl": interval(*kl), "length": interval(40.2, 30.1, 50.7)},
    }


def draft() -> dict[str, Any]:
    """As `drafts.figures` gives it, with speed-ups: 7.<MODE>1 tokens a cycle with one draft, and so on."""
    found: dict[str, Any] = {}
    for number, mode in enumerate(("sampled", "greedy", "temperature_0", "unweighted")):
        tokens = [7 + number / 10 + gamma / 100 for gamma in (1, 2)]
        found[mode] = {
            "acceptance": interval(0.61 + number / 100, 0.6, 0.7),
            "by_position": [{"from": begin, "tokens": 100, **interval(0.51 + number / 100, 0.4, 0.6)} for begin in (0, 4)],
            "cycles": [{"gamma": n + 1, **interval(mean, mean, mean), "by_place": [0.5]} for n, mean in enumerate(tokens)],
        }
    add_speed_ups(found, {"median": 2.0, "low": 2.0, "high": 2.0})
    return found


def hostile_token() -> dict[str, Any]:
    guesses = [(HOSTILE, 0.5), ("\n", 0.25), (" the", 0.125), ("", 0.0625), ("<b>", 0.03)]
    return {"text": HOSTILE, "kl": 1.25, "teacher": guesses, "student": guesses}


def tasks(names: list[str]) -> dict[str, Any]:
    """As `task_scores.summarise` gives it."""
    means = {name: interval(0.5, 0.4, 0.6) for name in names}
    against = {"of": "student", "against": "teacher", **interval(-0.1, -0.2, 0.05)}
    test = {"only_first": 3, "only_second": 9, "p": 0.02, "p_holm": 0.04, "test": "exact binomial"}
    entry = {"name": "<b>|facts", "metric": "acc", "chance": 0.25, "items": 120, "models": means, "kept": interval(0.9, 0.8, 1.0)}
    kept = {"kept": interval(0.925, 0.85, 0.99), "kept_above_chance": None}
    together = {"tasks": 1, "items": 120, "models": means, "differences": [against], **kept}
    described = [{**entry, "differences": [{**against, "mcnemar": test}]}]
    return {"limit": 120, "warnings": [], "tasks": described, "together": together}


def judged() -> dict[str, Any]:
    """As `win_rate.Comparison` gives it."""
    counts = {"prompts": 20, "wins": 3, "ties": 10, "losses": 7, "orders_agree": 0.6}
    rates = {"win_rate": interval(0.4, 0.3, 0.5), "length_controlled": interval(0.45, 0.33, 0.57)}
    return {"against": "teacher", "judge": {"model": "<judge>"}, "warnings": ["the judge is <small>"], **counts, **rates}


def metrics() -> dict[str, Any]:
    names = ["teacher", "student before", "student", "student, text only"]
    return {
        "schema_version": 2,
        "headline": HEADLINE,
        "held_out": {"rows": 48, "tokens": 3903, "prompts": 48, "resamples": 2000},
        "models": [
            model("teacher", 134_515_008, 105.2, (0, 0, 0), (1, 1, 1), (1.35, 1.28, 1.43), 269_060_552),
            model("student before", 80_709_005, 201.0, (10.15, 9.84, 10.46), (0.032, 0.026, 0.039), (11.4, 11.1, 11.7)),
            model("student", 80_709_005, 199.9, (2.13, 2.08, 2.18), (0.612, 0.593, 0.631), (2.98, 2.89, 3.08), 161_418_010),
            model("student, text only", 80_709_005, 200.4, (2.54, 2.48, 2.61), (0.566, 0.546, 0.586), (3.31, 3.21, 3.42)),
        ],
        "differences": [
            {"better": "student", "worse": "student, text only", "metric": "kl", "mean": -0.41, "low": -0.47, "high": -0.35}
        ],
        "decoding": {"engine": "transformers", "batch": 8, "new_tokens": 64, "rounds": 3},
        "own_text": {"prompts": 24, "max_tokens": 64},
        "tasks": tasks(names),
        "win_rate": judged(),
        "views": [{"prompt": HOSTILE, "tokens": [hostile_token(), {**hostile_token(), "text": " sea", "kl": 0.01}]}],
        "examples": {
            "rival": "student, text only",
            "better": 0.75,
            "won": [{"prompt": HOSTILE, "text": HOSTILE, "student": 0.5, "rival": 1.5}],
            "lost": [{"prompt": "p", "text": "t", "student": 2.5, "rival": 1.25}],
        },
        "samples": [{"prompt": HOSTILE, "answers": dict.fromkeys(names, HOSTILE)}],
    }


def text_metrics() -> dict[str, Any]:
    """The same of a teacher whose weights are not there: its text alone is known."""
    content = metrics()
    kept = {"name", "path", "parameters", "bytes", "decode_tokens_per_s", "nll", "bits_per_byte", "early_end"}
    content["models"] = [{key: value for key, value in model.items() if key in kept} for model in content["models"][1:]]
    for number, found in enumerate(content["models"]):
        found |= {"written": interval(0.31 + number / 10, 0.3, 0.6), "stored_kl": interval(2.5 - number, 0.4, 2.6)}
    names = [found["name"] for found in content["models"]]
    against = [{"of": "student", "against": rival, **interval(0.2, 0.1, 0.3)} for rival in ("student before", names[2])]
    test = {"only_first": 3, "only_second": 9, "p": 0.02, "p_holm": 0.034, "test": "exact binomial"}
    found = tasks(names)
    found["tasks"][0] |= {"kept": None, "differences": [{**difference, "mcnemar": test} for difference in against]}
    found["together"] |= {"kept": None, "differences": against}
    gain = {"better": "student", "worse": "student, text only", "mean": -0.33, "low": -0.4, "high": -0.25}
    content["held_out"]["stored"] = 0.987
    content |= {"tasks": found, "views": [], "differences": [{**gain, "metric": name} for name in ("nll", "stored_kl")]}
    del content["own_text"]
    return content


def write(file: Path, content: Any) -> None:
    file.parent.mkdir(parents=True, exist_ok=True)
    file.write_text(json.dumps(content))


def write_run(directory: Path) -> None:
    """A finished run, with the teacher's text and file names as hostile as they can be."""
    write(directory / "eval/metrics.json", metrics())
    history = [{"step": step, "kl": 10 / step + 2, "ce": 10 / step + 3, "loss": 1.0} for step in range(1, 61)]
    for name in ("student", "student-text-only"):
        write(directory / name / "trainer_state.json", {"log_history": [*history, {"step": 60, "train_runtime": 9.0}]})
    for name, stage in {"data": "generate", "curated": "curate", "student": "train", "eval": "eval"}.items():
        run = {"stage": stage, "status": "done", "started": "2026-11-23T18:28:49Z", "finished": "2026-11-23T18:30:04Z"}
        run |= {"seed": 7, "git": None, "versions": {"torch": "2.13.0"}, "inputs": {"a|<script>b": "feed" * 16}}
        write(directory / name / "run.json", run)
    served = {"name": "w8a8", "decode": {"median": 321.0, "low": 300.0, "high": 345.0}, "peak_bytes": 1_500_000_000}
    made = {"name": "w8a8", "path": "x/<export>|/w8a8", "bytes": 110_000_000}
    made |= {"kl": interval(0.017, 0.015, 0.018), "top1": interval(0.92, 0.91, 0.93)}
    write(directory / "export/export.json", {"formats": [made], "serving": {"models": [served]}})
    shards = [("train", 120, 9000), ("train", 63, 5900), ("test", 48, 3903)]
    write(
        directory / "curated/dataset.json",
        {
            "rows_in": 240,
            "steps": [
                {"name": "repetition", "rows_in": 240, "kept": 234, "rejected": 6, "failed": 0},
                {"name": "near_duplicates", "rows_in": 234, "kept": 234, "rejected": 0, "failed": 0},
                {"name": "math", "rows_in": 234, "kept": 231, "rejected": 1, "failed": 2},
            ],
            "prompts": [
                {"name": "source", "rows_in": 24, "kept": 24, "rejected": 0, "failed": 0},
                {"name": "1 ask", "rows_in": 260, "kept": 240, "rejected": 15, "failed": 5},
            ],
            "teacher": {"model": "models/<Teacher>|x", "engine": "vllm"},
            "targets": {"kind": "topk", "k": 32},
            "sampling": {"samples": 1, "temperature": 1.0, "top_p": 1.0, "top_k": 0, "max_tokens": 96},
            "shards": [{"split": split, "rows": rows, "tokens": tokens} for split, rows, tokens in shards],
        },
    )


@pytest.fixture
def experiment(tmp_path: Path) -> Experiment:
    """That run in a directory of the test's own."""
    write_run(tmp_path)
    return Experiment.model_validate({"output": str(tmp_path), "teacher": {"model": "m"}})


def pages(experiment: Experiment) -> tuple[str, str]:
    report(experiment)
    page, text = (Path(experiment.output, name).read_text(encoding="utf-8") for name in ("report.html", "report.md"))
    return page, text


def change(experiment: Experiment, **changes: Any) -> None:
    write(experiment.directory("eval") / "metrics.json", {**metrics(), **changes})


class Page(HTMLParser):
    """Tags, attributes and text, as a browser would take them."""

    def __init__(self, page: str) -> None:
        super().__init__()
        self.tags: list[str] = []
        self.attributes: list[tuple[str, str | None]] = []
        self.text = ""
        self.feed(page)

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.tags.append(tag)
        self.attributes += attrs

    def handle_data(self, data: str) -> None:
        self.text += data


def test_hostile_text_stays_text_in_html(experiment: Experiment) -> None:
    page, _ = pages(experiment)
    parsed = Page(page)
    assert "<script" not in page
    assert not {"script", "img", "link", "iframe", "teacher"} & set(parsed.tags)
    assert not [name for name, _ in parsed.attributes if name.startswith("on")]
    assert "&lt;script&gt;alert(1)&lt;/script&gt;" in page
    assert page.count("{{ 7*7 }}") == 9
    assert parsed.text.count(HOSTILE) == 9


def test_html_loads_nothing(experiment: Experiment) -> None:
    page, _ = pages(experiment)
    links = [value for name, value in Page(page).attributes if name in ("src", "href", "srcset", "xlink:href", "action")]
    assert all(value.startswith("#") and f'id="{value[1:]}"' in page for value in links), (
        "they stay on the page, and lead somewhere"
    )
    style = page[page.index("<style>") : page.index("</style>")]
    assert "@import" not in style
    assert "url(" not in style
    assert "http" not in page.replace("https://example.org/x.png", "").replace("http-equiv", "")
    assert "default-src 'none'" in page


def test_without_the_teachers_weights(tmp_path: Path) -> None:
    """Its text is what students are compared by, and one sentence says what is not there; hostile text stays text."""
    write_run(tmp_path)
    write(tmp_path / "eval/metrics.json", text_metrics())
    teacher = {"model": HOSTILE, "engine": "openai", "tokenizer": "x", "licence": "y"}
    told = {"output": str(tmp_path), "teacher": teacher, "student": {"model": "z"}, "targets": {"kind": "topk"}}
    page, text = pages(Experiment.model_validate(told))
    assert "<script" not in page
    assert not {"script", "img", "link", "iframe", "teacher"} & set(Page(page).tags)
    shown = " ".join(Page(page).text.split())
    for words in (
        "The teacher is behind an API, so results that need its weights are missing",
        "Soft targets helped. Against the same student trained on the text only, it predicts the teacher’s text better by "
        "0.33 nats per token (95% interval 0.25 to 0.40).",
        "Over the stored tokens it is 0.33 nats per token closer to the teacher (95% interval 0.25 to 0.40).",
        "2.98 bits per byte of the teacher’s text 95% CI 2.89 to 3.08; 11.40 before training",
        "41% of the teacher’s tokens are its first choice 95% CI 30 to 60",
        "50% on the tasks 95% CI 40 to 60",
        "at the 98.7% of positions where there are any",
        "against the student before trainingp, by Holm",
        "<b>|factsacc12025 5040–605040–605040–60 0.034",
        "Student minus student before training on the same items",
        "The teacher was not asked, since its answers to tasks would be billed.",
        "the student predicts the teacher’s text better than the student trained on text only",
    ):
        assert words in shown, words
    assert "same next token%" not in shown.split("Exported formats")[0], "of the exported forms it is the student's"
    for gone in ("Token by token", "As a draft model", "KL by position", "Calibration error", "Size against quality"):
        assert gone not in shown, gone
    assert "| **student** | **2.98** (2.89–3.08) | **2.98** (2.89–3.08) | **41** (30–60) | **1.50** (0.40–2.60) |" in text
    outside = re.sub(r"^(`{3,})text\n.*?\n\1$", "", text, flags=re.DOTALL | re.MULTILINE)
    assert not re.search(r"(?<!\\)<", outside)
    assert Path(tmp_path, "report.png").is_file()
    assert "its NLL says how well the models predict this text" not in shown
    file = tmp_path / "curated/dataset.json"
    manifest = json.loads(file.read_text())
    write(file, manifest | {"sampling": manifest["sampling"] | {"temperature": 0.7}})
    caution = "its NLL says how well the models predict this text, not which is closer to the teacher"
    for document in pages(Experiment.model_validate(told)):
        assert caution in document
    for sampling in ({}, manifest["sampling"]):  # of text that nobody is known to have sampled, and of another model's
        write(file, manifest | {"sampling": sampling, "text_from": "mine/books.jsonl"})
        for document in pages(Experiment.model_validate(told)):
            assert caution in document
            assert "compared with the text scored by its teacher" in document
            assert "The teacher’s are the beginning of the stored text, which it only scored." in document


@pytest.mark.parametrize("sampled", [False, True])
def test_text_that_the_teacher_only_read_is_not_said_to_be_its_own(experiment: Experiment, sampled: bool) -> None:
    """Whether or not another model has sampled it."""
    file = Path(experiment.output) / "curated/dataset.json"
    manifest = json.loads(file.read_text()) | {"text_from": "mine/books.jsonl"}
    write(file, manifest if sampled else manifest | {"sampling": {}})
    page, text = pages(experiment)
    assert "Existing text, scored by" in page
    assert "| scored by the teacher | 240 |" in text
    for document in (" ".join(Page(page).text.split()), text):
        assert "on 3,903 tokens of existing text for 48 prompts held out from training" in document
        for claimed in ("ritten by the teacher", "Written by", "that the teacher wrote", "answers of the teacher"):
            assert claimed not in document, claimed


def test_an_exported_model_that_is_not_the_student_is_named(experiment: Experiment) -> None:
    told = experiment.model_dump(exclude_unset=True)
    models = ({}, {"model": str(experiment.directory("student"))}, {"model": "models/other"})
    shown = [pages(Experiment.model_validate({**told, "export": model})) for model in models]
    for page, text in shown[:2]:
        assert "KL from the student<br>" in page
        assert "| KL from the student, nats per token" in text
    page, text = shown[2]
    assert "KL from models/other<br>" in page
    assert "Against models/other before quantisation" in page
    assert "| KL from models/other, nats per token" in text


def test_a_judge_without_a_verdict_is_not_passed_over(experiment: Experiment) -> None:
    file = Path(experiment.output) / "eval/metrics.json"
    none = {"prompts": 0, "without_verdict": 12, "win_rate": None, "length_controlled": None, "warnings": ["choose another"]}
    write(file, json.loads(file.read_text()) | {"win_rate": {**judged(), **none}})
    page, text = pages(experiment)
    for shown in (" ".join(Page(page).text.split()), text):
        assert "gave no verdict on 12 of 12 held-out prompts. Choose another." in shown


def test_html_is_well_formed_and_shows_the_numbers(experiment: Experiment) -> None:
    page, _ = pages(experiment)
    text = " ".join(Page(page).text.split())
    for number in ("40% smaller", "1.9× faster", "61% of", "134.5M", "80.7M", "269 MB", "161 MB", "2.13", "2.08–2.18", "3,903"):
        assert number in text, number
    assert "92% of its task score kept 95% CI 85 to 99" in text
    assert "Student against student trained on text only" in text
    assert "It is 0.41 nats per token closer to the teacher (95% interval 0.35 to 0.47)." in text
    assert "240" in text
    for step in ("rejected by repetition −6", "rejected by near duplicates 0", "rejected by math −1", "failed in math −2"):
        assert step in text, step
    bars = re.findall(r'class="out" style="left: ([\d.]+)%; width: ([\d.]+)%"', page)
    assert [tuple(map(float, bar)) for bar in bars] == [(97.5, 2.5), (97.08, 0.42), (96.25, 0.83)]  # of 240
    assert "14,900" in text
    assert "feed" * 16 in text
    assert "1 ask260155240" in text
    for tag in ("svg", "table", "section", "div", "ul", "details"):
        assert len(re.findall(rf"<{tag}[ >]", page)) == page.count(f"</{tag}>")
    assert not list(Path(experiment.output).glob(".report*"))


def test_markdown_has_headline_table_and_safe_text(experiment: Experiment) -> None:
    _, text = pages(experiment)
    assert HEADLINE in text
    assert "| **student** | **2.13** (2.08–2.18) | **61** (59–63) | **2.98** (2.89–3.08) |" in text
    outside = re.sub(r"^(`{3,})text\n.*?\n\1$", "", text, flags=re.DOTALL | re.MULTILINE)
    assert outside.count("alert(1)") == 0
    assert not re.search(r"(?<!\\)<", outside)
    tables = [line for line in outside.splitlines() if line.startswith("| ")]
    widths = [len(re.findall(r"(?<!\\)\|", line)) for line in tables]
    assert set(widths) == {8, 7, 6, 4, 3, 5}
    assert "`````text\n" + HOSTILE + "\n`````" in text


def test_the_page_shows_where_the_student_differs(experiment: Experiment) -> None:
    """Figures by position and entropy, the other measures, tokens in shades with both guesses, and examples."""
    page, text = pages(experiment)
    shown = " ".join(Page(page).text.split())
    for words in (
        "KL by position",
        "KL by the teacher’s entropy",
        "Size against quality",
        "Token by token",
        "Best and worst examples",
    ):
        assert words in shown, words
    assert "calibration error against the teacher% ↓ 21–321–3" in shown
    assert "length of its own answerstokens 40.2030.10–50.70" in shown
    assert "probability of the end token where the teacher ended" not in shown, "nobody measured it"
    assert re.findall(r'class="token (s\d)" popovertarget', page) == ["s4", "s0"]
    assert "Over 1 tasks with 120 items the student keeps 92% of the teacher’s score (95% interval 85–99)." in shown
    assert "<b>|factsacc12025 5040–60" in shown
    assert "Against the teacher the student wins 40% (95% interval 30–50); at equal length 45% (33–57)." in shown
    assert "x/<export>|/w8a8110 MB0.0170.015–0.0189291–93 321300–3451.5 GB" in shown
    assert "On 75% of the held-out answers the student is closer" in shown
    assert "| calibration error against the teacher, % ↓ | 2 (1–3) |" in text


def test_the_student_as_a_draft_model(experiment: Experiment) -> None:
    """What to serve it with, and plainly that it would not help where it does not; a draft costs half of the teacher's pass."""
    page, text = pages(experiment)
    shown = " ".join(Page(page).text.split())
    said = (
        "At temperature 1 the student as a draft model would give the teacher 4.74 times its speed (4.74 to 4.74), with 1 greedy"
    )
    assert said in shown
    assert said in text
    command = (
        """vllm serve 'models/<Teacher>|x' --speculative-config '{"model": "models/<Teacher>|x", "num_speculative_tokens": 1, """
    )
    assert command in shown
    assert command in text
    assert "| 2 | 7.02 | 3.51 | 7.12 | 3.56 | 7.22 | 3.61 |" in text
    assert "| from token 4 | 51 (40–60) | 52 (40–60) | 53 (40–60) | 54 (40–60) |" in text
    assert "| all tokens | 61 (60–70) | 62 (60–70) | 63 (60–70) | 64 (60–70) |" in text
    assert "c = 0.50 (0.50–0.50)" in shown
    models = metrics()["models"]
    add_speed_ups(models[2]["draft"], {"median": 0.1, "low": 0.1, "high": 0.1})
    change(experiment, models=models)
    page, text = pages(experiment)
    assert "would slow the teacher down: even the best, 1 greedy draft per cycle, gives 0.65 times its speed" in text
    assert "vllm serve" not in page + text


def test_the_answer_that_changed_most_stands_near_the_top(experiment: Experiment) -> None:
    told = {"teacher": "Paris is the capital of France.", "student before": "The the the", "student, text only": "x"}
    samples = [
        {"prompt": "p1", "answers": {**told, "student": "The the is"}},
        {"prompt": "p2", "answers": {**told, "student": "Paris is a city in France."}},
        {"prompt": "p3", "answers": {**told, "student before": told["teacher"], "student": told["teacher"]}},
    ]
    change(experiment, samples=samples)
    page, _ = pages(experiment)
    before_contents = " ".join(Page(page[: page.index("<nav")]).text.split())
    assert "Before and after p2" in before_contents
    assert "student Paris is a city in France. Of the 3 sample answers" in before_contents
    change(experiment, samples=samples[2:])
    page, _ = pages(experiment)
    assert "Before and after" not in page, "training brought no answer closer"


def test_tasks_are_compared_with_the_student_of_the_text_alone(experiment: Experiment) -> None:
    found = metrics()["tasks"]
    rival = {"of": "student", "against": "student, text only", **interval(0.05, 0.01, 0.09)}
    for entry in (*found["tasks"], found["together"]):
        entry["differences"] = [*entry["differences"], rival]
    change(experiment, tasks=found)
    page, text = pages(experiment)
    assert "Student minus student trained on text only on the same items" in " ".join(Page(page).text.split())
    assert "the student minus the student trained on text only: 5 percentage points (95% interval 1–9)." in text


def test_the_verdict_on_a_task_of_ones_own_comes_first(experiment: Experiment, capsys: pytest.CaptureFixture[str]) -> None:
    """What is kept, with a link to the items that are worse, which are shown as they are; and as the last line on the screen."""
    found = metrics()["tasks"]
    (entry,) = found["tasks"]
    told = dict.fromkeys(("item", "input", "target", "teacher", "student"), HOSTILE) | {"probability": 0.912}
    entry |= {"name": "invoices", "items": 1000, "kept": interval(0.984, 0.972, 0.993), "metric": "exact_match"}
    entry |= {"valid": dict.fromkeys(entry["models"], 1.0)}
    entry |= {"apart": {"worse": 12, "better": 1, "lost": [told] * 11, "won": [{**told, "item": "i7"}]}}
    change(experiment, tasks=found)
    page, text = pages(experiment)
    verdict = "The student keeps 98.4% (95% CI 97.2 to 99.3) of the teacher on invoices; 12 of 1,000 items are worse, 1 better."
    assert " ".join(capsys.readouterr().out.split()).endswith(verdict)
    parsed = Page(page)
    shown = " ".join(parsed.text.split())
    assert shown.index(verdict) < shown.index("Soft targets helped")
    assert ("href", "#worse-1") in parsed.attributes
    assert ("id", "worse-1") in parsed.attributes
    assert parsed.text.count(HOSTILE) == 9 + 11 * 5 + 4
    assert "<script" not in page
    assert "12 of 1,000 items are worse than the teacher’s" in shown
    assert "The first 11; all are in eval/tasks.parquet." in shown
    assert "1 item is better" in shown
    assert shown.index("of its task score kept") < shown.index("40% smaller")
    cards = [shown.index(label) for label in ("of its task score kept", "smaller 134.5M", "of the teacher’s next-token")]
    assert cards == sorted(cards)
    assert text.index(cell(verdict)) < text.index(HEADLINE)
    rows = [line for line in text.splitlines() if line.endswith("| 91% |")]
    assert len(rows) == 10 + 1
    assert all(len(re.findall(r"(?<!\\)\|", row)) == 7 for row in rows)
    outside = re.sub(r"^(`{3,})text\n.*?\n\1$", "", text, flags=re.DOTALL | re.MULTILINE)
    assert not re.search(r"(?<!\\)<", outside)


@pytest.mark.parametrize(
    ("entry", "said"),
    [
        ({"kept": interval(1.01, 0.99, 1.03)}, "keeps 101.0% (95% CI 99.0 to 103.0) of the teacher on t"),
        ({"kept": None}, "scores 50.0% (95% CI 40.0 to 60.0) on t"),
        (
            {"kept": None, "apart": {"worse": 1, "better": 2}},
            "scores 50.0% (95% CI 40.0 to 60.0) on t; 1 of 9 items are worse, 2 better",
        ),
    ],
)
def test_what_is_said_where_nothing_is_kept_or_more_than_all(entry: dict[str, Any], said: str) -> None:
    assert task_verdict({"name": "t", "items": 9, "models": {"student": interval(0.5, 0.4, 0.6)}, **entry}) == said


def timed(p50: float, per_s: float) -> dict[str, Any]:
    """As `serving.request_figures` gives it."""
    return {"facts": {"count": 32, "p50_s": p50, "p95_s": 2 * p50, "per_s": per_s, "tokens_per_s": 20 * per_s}}


def test_whether_it_was_worth_it(experiment: Experiment) -> None:
    """A row for what is there, and columns for what was measured: 3.6 an hour is 0.001 a second, so 0.5 a second cost 2,000."""
    found, models = metrics()["tasks"], metrics()["models"]
    (entry,) = found["tasks"]
    entry |= {"name": "facts", "metric": "accuracy", "valid": dict.fromkeys(entry["models"], 1.0)}
    entry["kept_by_model"] = {"student before": interval(0.21, 0.1, 0.3), "student": interval(0.984, 0.972, 0.993)}
    entry["kept_by_model"]["student, text only"] = None
    change(experiment, tasks=found)
    page, text = pages(experiment)
    for model in ("teacher | 50 (40–60) | – | 269 MB", "student | 50 (40–60) | 98.4 (97.2–99.3) | 161 MB"):
        assert f"\n| {model} |\n" in text
    assert "latency" not in text, "it was not measured"

    for model, figures in zip(models, (timed(2, 0.5), timed(1, 1), timed(1, 1), timed(1, 1)), strict=True):
        model["requests"] = figures
    change(experiment, tasks=found, models=models)
    file = Path(experiment.output) / "export/export.json"
    exported = json.loads(file.read_text())
    exported["formats"][0]["tasks"] = {"tasks": [{**entry, "kept": interval(0.9, 0.85, 0.95)}]}
    exported["serving"]["models"][0]["requests"] = timed(0.25, 4)
    write(file, exported)
    page, text = pages(experiment.with_(eval=experiment.eval.with_(price_per_hour=3.6)))
    table = text[text.index("| model | accuracy, % |") :].partition("\n\n")[0].splitlines()
    assert table[2:] == [
        "| teacher | 50 (40–60) | – | 2,000 | 4,000 | 10 | 269 MB | 2,000.00 |",
        "| student before training | 50 (40–60) | 21.0 (10.0–30.0) | 1,000 | 2,000 | 20 | – | 1,000.00 |",
        "| student trained on text only | 50 (40–60) | – | 1,000 | 2,000 | 20 | – | 1,000.00 |",
        "| student | 50 (40–60) | 98.4 (97.2–99.3) | 1,000 | 2,000 | 20 | 161 MB | 1,000.00 |",
        "| exported as w8a8 | 50 (40–60) | 90.0 (85.0–95.0) | 250 | 500 | 80 | 110 MB | 250.00 |",
    ]
    shown = " ".join(Page(page).text.split())
    assert "student 5040–60 98.497.2–99.3 1,0002,00020 161 MB 1,000.00" in shown
    assert "a machine at 3.60 per hour that answers 8 requests at once and is never idle" in shown


def own_cascade(n: int = 400) -> dict[str, Any]:
    """As `cascade` gives it: the n answers agree down to half of them, then every tenth does not; the teacher is right."""
    agrees = np.array([number < n / 2 or number % 10 > 0 for number in range(n)])
    names = [str(number) for number in range(n)]
    right = {"student": agrees.astype(float), "teacher": np.ones(n)}
    tokens = [[-0.01 * number, -0.01] for number in range(n)]
    return cascade(tokens, agrees, right, names, Draws.of(names, 100, 0), 0)


def test_when_to_ask_the_teacher_is_said_drawn_and_read_aloud(experiment: Experiment) -> None:
    """Of 400 items none may disagree for 99%, so the 200 before the first that does are answered; for 90% all 20 may."""
    found = metrics()["tasks"]
    (entry,) = found["tasks"]
    entry |= {"metric": "accuracy", "valid": dict.fromkeys(entry["models"], 1.0), "cascade": own_cascade()}
    change(experiment, tasks=found)
    page, text = pages(experiment)
    said = "the student answers 50% of the requests (95% CI 45 to 55), and the answers are the teacher’s on at least 99% of all"
    for shown in (" ".join(Page(page).text.split()), text):
        assert "Alone, the student gives the teacher’s answer on 95.0% of the items" in shown
        assert said in shown
        assert "(95% confidence; 100.0% on these items)" in shown
        assert "too few" not in shown
    assert "| 99% | −2 | 50 (45–55) | 100.0 | 100.0 |" in text
    assert "| 90% | −4 | 100.0 (99.0–100.0) | 95.0 | 95.0 |" in text
    (label,) = [value for name, value in Page(page).attributes if name == "aria-label" and "share of requests" in str(value)]
    assert label is not None
    assert label.endswith("49%: 100.0% and 100.0%; 76%: 97.2% and 97.2%; 100%: 95.0% and 95.0%.")
    entry["cascade"] = own_cascade(50)
    change(experiment, tasks=found)
    for shown in pages(experiment):
        assert "50 independent items are too few to show a higher agreement, even without one disagreement" in shown
        assert "95% takes 59, 99% takes 299." in shown


def test_a_figure_of_shares_has_its_ends_where_they_belong() -> None:
    plot = share_plot({"a": [(0, 100), (50, 90), (100, 60)]}, [(50, "x")])
    assert plot["lines"][0]["line"].startswith("M44.0 10.0L")
    assert plot["marks"] == [((plot["left"] + plot["width"] - 10) / 2, "x")]
    assert plot["lines"][0]["line"].split("L")[-1].startswith("470.0 ")


def test_a_task_of_ones_own_is_shown_with_its_fields_and_confusions(experiment: Experiment) -> None:
    """What a file or a model has written stays text."""
    found = metrics()["tasks"]
    (entry,) = found["tasks"]
    shares = {"precision": 0.5, "recall": None, "f1": 0.25}
    fields = [{"field": "", **shares}, {"field": HOSTILE, **shares}, {"field": "(others)", **shares, "f1": 0.0}]
    names = list(entry["models"])
    entry |= {"metric": "exact_match", "valid": dict.fromkeys(names, 0.75)}
    entry |= {"fields": {name: fields[: 3 if name == "student" else 2] for name in names}}
    entry |= {"confusion": {name: {"labels": [HOSTILE, "(no label)"], "counts": [[7, 2]]} for name in names}}
    change(experiment, tasks=found)
    page, text = pages(experiment)
    parsed = Page(page).text
    assert parsed.count(HOSTILE) == 9 + 3, "beside what is there in every report: a field, a row and a column"
    shown = " ".join(parsed.split())
    assert "<b>|factsexact_match120" in shown
    assert "Valid answers, right or wrong: teacher 75%, student before training 75%, student 75%" in shown
    tight = shown.replace(" ", "")
    assert "allfields50–25252525" in tight
    assert "(others)50–––0–" in tight
    assert "By the metric given with the name" in shown
    assert "| <b>|facts (exact\\_match) |".replace("<b>|", "\\<b\\>\\|") in text
    assert "| all fields | 50 | – | 25 | 25 | 25 | 25 |" in text
    assert "| (others) | 50 | – | – | – | 0 | – |" in text
    assert "| 7 | 2 |" in text
    assert "<script>" not in text.replace("`````text\n" + HOSTILE, "").replace("\\<script\\>", "")


def test_the_picture(experiment: Experiment) -> None:
    pages(experiment)
    with Image.open(Path(experiment.output, "report.png")) as image:
        assert (image.format, image.size) == ("PNG", (2400, 1260))
        colours = {colour for _, colour in image.convert("RGB").getcolors(1 << 24)}
    assert {(252, 251, 248), (28, 33, 38), (0, 114, 178), (213, 94, 0)} <= colours  # paper, ink, and both students


@given(st.lists(st.floats(10, 220), min_size=1, max_size=8))
def test_labels_lie_apart_and_as_near_as_they_can(places: list[float]) -> None:
    places = sorted(places)
    found = spread(places, 20, 12, 220)
    assert all(12 <= place <= 220 for place in found)
    assert all(above + 19.9 <= below for above, below in pairwise(found))
    if all(above + 20 <= below for above, below in pairwise(places)) and places[0] >= 12:
        assert found == pytest.approx(places, abs=0.06)


def test_labels_of_equal_points_are_centred_on_them() -> None:
    assert spread([100, 100, 100], 20, 0, 300) == [80, 100, 120]
    assert spread([5, 5], 20, 12, 300) == [12, 32]


def test_prints_where_it_is_and_the_headline(experiment: Experiment, capsys: pytest.CaptureFixture[str]) -> None:
    report(experiment)
    assert capsys.readouterr().out == f"report    {experiment.output}/report.html\n\n{HEADLINE}\n"


def test_dry_run_writes_nothing(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    report(Experiment.model_validate({"output": str(tmp_path), "teacher": {"model": "m"}}), dry_run=True)
    assert f"would write {tmp_path}/report.html" in capsys.readouterr().out
    assert not list(tmp_path.iterdir())


def test_names_the_missing_metrics(tmp_path: Path) -> None:
    experiment = Experiment.model_validate({"output": str(tmp_path), "teacher": {"model": "m"}})
    with pytest.raises(InputError, match=r"eval/metrics\.json is missing; run `eval` first"):
        report(experiment)


def test_refuses_another_schema(experiment: Experiment) -> None:
    change(experiment, schema_version=1)
    with pytest.raises(InputError, match=r"metrics\.json: schema_version is 1, this version reads 2"):
        report(experiment)


def test_without_a_text_only_student(experiment: Experiment) -> None:
    change(experiment, models=metrics()["models"][:3], differences=[], samples=[], examples={"won": [], "lost": []})
    (experiment.directory("student-text-only") / "trainer_state.json").unlink()
    page, text = pages(experiment)
    assert "text only" not in page + text
    assert "2.13" in page


def test_says_what_is_missing(experiment: Experiment) -> None:
    for file in ("student/trainer_state.json", "student-text-only/trainer_state.json", "curated/dataset.json", "data/run.json"):
        Path(experiment.output, file).unlink()
    for document in pages(experiment):
        assert "student/trainer_state.json".replace("_", r"\_" if document.startswith("#") else "_") in document
        assert "so the student’s training is not shown" in document.replace("'", "’")
        assert "so the data are not shown" in document
        assert "run.json is missing" in document


@pytest.mark.parametrize(
    ("metric", "low", "mean", "high", "words"),
    [
        ("kl", -0.47, -0.41, -0.35, "It is 0.41 nats per token closer to the teacher (95% interval 0.35 to 0.47)."),
        ("kl", 0.1, 0.2, 0.3, "It is 0.20 nats per token farther from the teacher (95% interval 0.10 to 0.30)."),
        ("kl", -0.1, 0.02, 0.14, "the 95% interval of the gain, −0.14 to 0.10 nats per token, includes 0."),
        ("nll", -0.4, -0.3, -0.2, "It predicts the teacher’s text better by 0.30 nats per token (95% interval 0.20 to 0.40)."),
        ("top1", 0.02, 0.046, 0.07, "the teacher’s choice 4.6 percentage points more often (95% interval 2.0 to 7.0)."),
        ("top1", -0.07, -0.046, -0.02, "the teacher’s choice 4.6 percentage points less often (95% interval 2.0 to 7.0)."),
    ],
)
def test_says_differences_as_they_are(
    experiment: Experiment, metric: str, low: float, mean: float, high: float, words: str
) -> None:
    pair = {"better": "student", "worse": "student before", "metric": metric, "low": low, "mean": mean, "high": high}
    change(experiment, differences=[pair])
    for document in pages(experiment):
        assert words in document
        assert ("Reversed" in document) == ("farther" in words or "less often" in words)


def test_says_when_training_did_not_help_and_prompts_are_few(experiment: Experiment) -> None:
    models = metrics()["models"]
    models[2]["kl"] = interval(10.2, 9.9, 10.5)
    change(experiment, models=models, held_out={"rows": 9, "tokens": 300, "prompts": 9, "resamples": 2000})
    page, _ = pages(experiment)
    assert "Training did not bring the student closer to the teacher." in page
    assert "With 9 held-out prompts the intervals are approximate." in page


def test_values_that_are_not_finite_are_left_out_and_said(experiment: Experiment) -> None:
    history = [{"step": 1, "ce": 3.0, "kl": 2.0}, {"step": 2, "ce": float("nan"), "kl": float("nan")}]
    write(experiment.directory("student") / "trainer_state.json", {"log_history": history})
    page, _ = pages(experiment)
    assert "2 logged values are not finite" in page
    assert not re.search(r'd="[^"]*nan', page)


def test_axis_is_logarithmic_only_where_values_are_far_apart() -> None:
    far, near = fit_axis([2, 10], 0, 100), fit_axis([2, 2.5], 0, 100)
    assert (far.log, near.log, fit_axis([0, 10], 0, 100).log) == (True, False, False)
    assert far.place(20**0.5) == pytest.approx(50, abs=0.1)
    assert near.place(2.25) == pytest.approx(50, abs=0.1)
    assert [text for _, text in far.ticks()] == ["2", "3", "5", "7", "10"]
    for low, high in ((1e-4, 3e3), (0.5, 0.52), (-3, 5), (4, 4), (1, 4), (1e-5, 1e5)):
        axis = fit_axis([low, high], 0, 100)
        assert 1 <= len(axis.ticks()) <= 20
        assert all(0 <= x <= 100 for x, _ in axis.ticks())


def test_plots_of_nothing_are_none() -> None:
    assert interval_plot([]) is None
    assert interval_plot([("student", interval(float("nan"), 1, 2))]) is None
    assert loss_plot({"student": []}) is None
    assert loss_plot({"student": [(1, 2.0)]}) is not None


def test_smoothing_and_thinning_keep_a_straight_line() -> None:
    line = [(float(x), 3.0 * x) for x in range(1000)]
    assert [x for x, _ in smooth(line)] == [x for x, _ in line]
    assert [y for _, y in smooth(line)] == pytest.approx([y for _, y in line])
    thinned = thin(line)
    assert len(thinned) == 200
    assert thinned[0] == (2.0, 6.0)
    assert thin(line[:7]) == line[:7]


def test_half_a_surrogate_pair_is_no_crash(experiment: Experiment) -> None:
    change(experiment, samples=[{"prompt": "half \ud83d of it", "answers": {"teacher": "\x00 \u202e back"}}])
    page, text = pages(experiment)
    assert "half ? of it" in page
    assert "half ? of it" in text


def test_cells_and_fences() -> None:
    assert cell("a|b\n<i>*c*") == r"a\|b \<i\>\*c\*"
    assert fenced("a\n`````\nb") == "``````text\na\n`````\nb\n``````"


def test_what_a_kept_row_cost_is_what_was_paid_over_the_rows_kept():
    from llmdistill.evaluation.report.provenance import cost_text

    cost = {"input_tokens": 120_000, "cached_tokens": 0, "output_tokens": 450_000, "total": 1.9, "paid": 2.0}
    assert cost_text(cost, 800) == "2.00 for 120,000 tokens in, 450,000 out: 0.0025 a kept row"
    assert cost_text({key: cost[key] for key in ("input_tokens", "output_tokens")}, 800) == "120,000 tokens in, 450,000 out"
    assert cost_text({}, 800) is None
