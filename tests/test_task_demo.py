"""What `make task-demo` learns from: the grammar's records, read once more here, and its two experiments."""

import importlib.util
import json
import re
import subprocess
import sys
from datetime import datetime
from decimal import Decimal

import pytest

from llmdistill.config import load_experiment
from llmdistill.evaluation.own_tasks import read_own
from tests.conftest import ROOT

DIRECTORY = ROOT / "configs/task-demo"
COUNTS = ("--examples", "300", "--inputs", "200", "--tests", "200")
VERBS = {
    "invoice": r"nvoice|bill",
    "payment": r"paid|Payment|went out|[Tt]ransfer|sent (?!a bill)",
    "refund": r"refund|Refund|back|returned",
}
DATES = ["%d %B %Y", "%B %d, %Y", "%d %b %Y", "%b %d, %Y", "the %d of %B %Y", "%d.%m.%Y", "%Y-%m-%d"]
DATE = re.compile(r"(the )?\d+ (of )?[A-Z][a-z]{2,8} \d{4}|[A-Z][a-z]{2,8} \d+, \d{4}|\d\d\.\d\d\.\d{4}|\d{4}-\d\d-\d\d")
AMOUNT = re.compile(
    r"(?:[€$£]|(?:EUR|USD|GBP) )(?P<a>[\d,]*\d(?:\.\d\d)?)|(?P<b>[\d,]*\d(?:\.\d\d)?) (?:EUR|USD|GBP|euros|dollars|pounds)"
)
CURRENCY = {"EUR": "EUR|€|euros", "USD": r"USD|\$|dollars", "GBP": "GBP|£|pounds"}


@pytest.fixture(scope="module")
def make():
    spec = importlib.util.spec_from_file_location("task_demo_make", DIRECTORY / "make.py")
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


@pytest.fixture(scope="module")
def made(make, tmp_path_factory):
    """The directory in which `make task-demo` runs, with fewer rows."""
    root = tmp_path_factory.mktemp("clone")
    make.main([*COUNTS, "--out", str(root / "runs/task-demo")])
    return root


def lines(file):
    return [json.loads(line) for line in file.read_text(encoding="utf-8").splitlines()]


def read_again(note):
    """The record of a note, by other means than those that it was made by."""
    plain = re.sub(r"(\d)(st|nd|rd|th)\b", r"\1", note)
    (written,) = [found.group() for found in DATE.finditer(plain)]
    days = {datetime.strptime(written, form).date() for form in DATES if _fits(written, form)}
    (amount,) = AMOUNT.finditer(plain.replace(written, "DATE"))
    (currency,) = [code for code, signs in CURRENCY.items() if re.search(signs, amount.group())]
    (kind,) = [kind for kind, verbs in VERBS.items() if re.search(verbs, note)]
    return {
        "kind": kind,
        "date": days.pop().isoformat(),
        "amount": Decimal((amount["a"] or amount["b"]).replace(",", "")),
        "currency": currency,
    }


def _fits(text, form):
    try:
        datetime.strptime(text, form)
    except ValueError:
        return False
    return True


def test_every_record_is_what_its_note_says(made):
    rows = [
        *((row["input"], row["output"]) for row in lines(made / "runs/task-demo/test.jsonl")),
        *(
            (row["prompt"][-1]["content"], json.loads(row["completion"][0]["content"]))
            for row in lines(made / "runs/task-demo/examples.jsonl")
        ),
    ]
    assert len(rows) == 500
    for note, record in rows:
        again = read_again(note)
        assert {**record, "amount": Decimal(str(record["amount"]))} == {**again, "party": record["party"]}, note
        assert re.search(rf"(?<!\w){re.escape(record['party'])}(?!\w)", note)
        assert not re.search(rf"{re.escape(record['party'])} (Ltd|Inc|GmbH|&|Group)", note), "the party is the whole name"


def test_every_phrase_form_and_kind_occurs(make, made):
    notes = [row["input"] for row in lines(made / "runs/task-demo/test.jsonl")]
    for kind, phrases in make.NOTES.items():
        for phrase in phrases:
            pattern = re.sub(r"\\\{\w+\\\}", ".+", re.escape(phrase))
            assert any(re.fullmatch(pattern, note) for note in notes), (kind, phrase)
    for form in (*DATES[:4], *DATES[5:]):
        assert any(_fits(DATE.search(re.sub(r"(\d)(st|nd|rd|th)\b", r"\1", note)).group(), form) for note in notes), form


def test_nothing_held_out_is_learned(made):
    """No note twice, and no party of the test among the other rows, with whatever ending."""
    directory = made / "runs/task-demo"
    examples = [row["prompt"][-1]["content"] for row in lines(directory / "examples.jsonl")]
    inputs = [row["input"] for row in lines(directory / "inputs.jsonl")]
    tests = lines(directory / "test.jsonl")
    together = [*examples, *inputs, *(row["input"] for row in tests)]
    assert (len(examples), len(inputs), len(tests)) == (300, 200, 200)
    assert len(set(together)) == len(together)
    learned = "\n".join([*examples, *inputs])
    assert not [row for row in tests if " ".join(row["output"]["party"].split()[:2]) in learned]


def test_the_same_seed_gives_the_same_bytes(make, made, tmp_path):
    make.main([*COUNTS, "--out", str(tmp_path)])
    for file in (made / "runs/task-demo").iterdir():
        assert file.read_bytes() == (tmp_path / file.name).read_bytes(), file.name


def test_the_task_can_be_learned_from_and_the_teacher_is_asked_as_the_student_is(made):
    own = read_own(made / "runs/task-demo/payments.yaml")
    own.task.rules.check_outputs(own.task, own.items)
    row = lines(made / "runs/task-demo/examples.jsonl")[0]
    assert row["prompt"] == own.task.prompt(row["prompt"][-1]["content"])
    item = own.items[0]
    assert own.task.rules.score(own.task, item.output, item.output)["exact_match"] == 1


@pytest.mark.parametrize("name", ["teacher", "student"])
def test_its_experiments_are_valid(name):
    load_experiment(DIRECTORY / f"{name}.yaml")


def test_the_commands_of_the_makefile_dry_run(made, smollm2):
    """In the directory of a clone, with the teacher as it was before it was trained."""
    (made / "models").mkdir()
    (made / "models/SmolLM2-135M-Instruct").symlink_to(smollm2)
    (made / "configs").symlink_to(ROOT / "configs")
    commands = re.findall(r"^\t\$\(BIN\)/llmdistill (.*task-demo.*|.*TASK_DEMO.*)$", (ROOT / "Makefile").read_text(), flags=re.M)
    assert sorted(command.split()[0] for command in commands) == ["convert", "run", "train"]
    variables = {
        "$(TASK_DEMO)": "runs/task-demo",
        "$(@D)": "runs/task-demo/examples",
        "$(TEACHER)": "models/SmolLM2-135M-Instruct",
    }
    for line in sorted(commands, key=lambda line: ["convert", "train", "run"].index(line.split()[0])):
        command = re.sub(r"\$\(.*?\)", lambda found: variables[found.group()], line).split()
        dry = [] if command[0] == "convert" else ["--dry-run"]
        done = subprocess.run(
            [sys.executable, "-m", "llmdistill", *command, *dry], cwd=made, capture_output=True, text=True, timeout=300
        )
        assert done.returncode == 0, done.stderr
        if command[0] == "train":
            assert "300 rows" in done.stdout
            (made / "runs/task-demo/teacher").mkdir()
            (made / "runs/task-demo/teacher/student").symlink_to(smollm2)
