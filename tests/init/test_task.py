"""`init --task`: an experiment of a user's own examples for each kind; what cannot be used is said and nothing is written."""

import json
import re
from collections import Counter
from pathlib import Path

import pytest
import yaml

from llmdistill import cli
from llmdistill.config import load_experiment, shipped
from llmdistill.errors import InputError
from llmdistill.init.experiment import Choices, init
from llmdistill.init.task import KINDS as OF_TASKS
from llmdistill.init.task import TaskChoices, split
from llmdistill.prompting.plan import Plan
from llmdistill.tasks.task import Item, read_items, read_task
from llmdistill.workflow import pipeline
from tests.conftest import ROOT, run_cli
from tests.init.test_experiment import typed
from tests.tasks.make import KINDS, SCHEMA

OUTPUTS = {
    "extract": lambda n: {"name": f"Person {n}", "age": n},
    "classify": lambda n: ["good", "bad"][n % 2],
    "sql": lambda n: f"SELECT name FROM people WHERE age > {n}",
    "tools": lambda n: {"name": "book", "arguments": {"city": f"Town {n}"}},
    "generate": lambda n: f"Dear {n},\nall is well.",
}
NEEDED = {"extract": ("schema", "person.json"), "sql": ("database", "people.sql"), "tools": ("tools", "tools.json")}


@pytest.fixture
def here(tiny, tmp_path, monkeypatch):
    """A working directory with twelve examples of each kind, and a model beside them."""
    for kind, output in OUTPUTS.items():
        write(tmp_path / f"{kind}.jsonl", [{"input": f"Message {n} about {n * n}.", "output": output(n)} for n in range(12)])
        for name, text in KINDS[kind][1].items():
            (tmp_path / name).write_text(text)
    (tmp_path / "models").mkdir()
    (tmp_path / "models/tiny").symlink_to(tiny)
    monkeypatch.chdir(tmp_path)
    return tmp_path


def write(file, rows):
    Path(file).write_text("".join(json.dumps(row, ensure_ascii=False) + "\n" for row in rows))


def begin(kind, directory="first", gpu=False, **changes):
    needed = {NEEDED[kind][0]: Path(NEEDED[kind][1])} if kind in NEEDED else {}
    chosen = {"examples": Path(f"{kind}.jsonl"), "description": "Do it: “well”.", **needed, **changes}
    init(Path(directory), Choices("task", None, "models/tiny", "models/tiny", gpu, TaskChoices(kind, **chosen)))


@pytest.mark.parametrize("gpu", [False, True])
@pytest.mark.parametrize("kind", OUTPUTS)
def test_each_kind_is_a_whole_experiment_of_its_own_files(here, monkeypatch, capsys, kind, gpu):
    begin(kind, gpu=gpu)
    for file in [*here.glob("*.json*"), here / "people.sql"]:
        file.unlink()
    monkeypatch.chdir(here / "first")
    monkeypatch.setattr(shipped, "SHIPPED", here / "nowhere")
    monkeypatch.setattr(pipeline, "check_plan", lambda experiment: None)
    experiment = load_experiment(Path("experiment.yaml"))
    assert experiment.teacher.engine == ("vllm" if gpu else "transformers")
    assert (experiment.prompts.task, experiment.eval.tasks) == ("task.yaml", ["task.yaml"])
    assert [step.name for step in experiment.curate] == ["finish_reason", "task", "contamination"]
    capsys.readouterr()
    with pytest.raises(SystemExit) as ended:
        cli.main(["run", "experiment.yaml", "--dry-run"])
    said = capsys.readouterr().out
    assert ended.value.code == 0, said
    samples = 120 if gpu else 16
    assert f"self_instruct {4 * samples:,} questions" in said
    assert "overlap by more than 0.85, also with test.jsonl" in said
    text = Path("experiment.yaml").read_text()
    assert len(text.splitlines()) < 45
    assert all(len(line) <= 125 for line in text.splitlines())

    task = read_task("task.yaml", "eval.tasks")
    assert task.settings.description == "Do it: “well”."
    shown, held_out = read_items(Path("seeds.jsonl")), read_items(Path("test.jsonl"))
    task.rules.check_outputs(task, held_out)
    assert (len(shown), len(held_out)) == ((4, 8) if kind == "classify" else (3, 9))
    texts = sorted(item.input for item in [*shown, *held_out])
    assert texts == sorted(f"Message {n} about {n * n}." for n in range(12))
    outputs = {item.input: item.output for item in [*shown, *held_out]}
    for n in range(12):
        wanted, found = OUTPUTS[kind](n), outputs[f"Message {n} about {n * n}."]
        assert (found if isinstance(wanted, str) else json.loads(found)) == wanted


def test_the_files_are_for_people(here):
    begin("extract")
    assert yaml.safe_load(Path("first/task.yaml").read_text()) == {
        "kind": "extract",
        "description": "Do it: “well”.",
        "schema": "schema.json",
        "test": "test.jsonl",
    }
    assert Path("first/schema.json").read_text() == json.dumps(SCHEMA)
    row = json.loads(Path("first/test.jsonl").read_text().splitlines()[0])
    assert list(row) == ["id", "input", "output"]
    assert isinstance(row["output"], dict)


def item(number, text, output="x", cluster=None):
    return Item(f"line {number}", str(number), cluster or str(number), text, output)


@pytest.mark.parametrize(("count", "shown"), [(10, 3), (12, 3), (13, 4), (20, 5), (50, 13)])
def test_a_quarter_is_shown_whatever_the_order_of_lines(count, shown):
    items = [item(n, f"text {n}") for n in range(count)]
    seeds, held_out = split(items, of_label=False)
    assert (len(seeds), len(held_out)) == (shown, count - shown)
    again, _ = split(items[::-1], of_label=False)
    assert {one.id for one in again} == {one.id for one in seeds}
    more, _ = split([*items, item(count, "another")], of_label=False)
    assert len({one.id for one in more} - {one.id for one in seeds}) <= 1


def test_every_label_is_shown_and_tested():
    outputs = ["a"] * 9 + ["b"] * 2 + [" b"] + ["c"] * 2
    seeds, held_out = split([item(n, f"text {n}", output) for n, output in enumerate(outputs)], of_label=True)
    count = [Counter(one.output.strip() for one in part) for part in (seeds, held_out)]
    assert count == [{"a": 3, "b": 1, "c": 1}, {"a": 6, "b": 2, "c": 1}]


def test_what_has_one_cluster_stays_together(here):
    items = [item(n, f"text {n}", cluster=f"c{n // 3}") for n in range(12)]
    seeds, held_out = split(items, of_label=False)
    assert not {one.cluster for one in seeds} & {one.cluster for one in held_out}
    assert len(seeds) == 3
    write("generate.jsonl", [{"input": f"Text {n}", "output": "x", "cluster": n // 3, "id": f"n{n}"} for n in range(12)])
    begin("generate")
    found = read_items(Path("first/test.jsonl"))
    assert {one.id for one in found} < {f"n{n}" for n in range(12)}
    assert Counter(Counter(one.cluster for one in found).values()) == {3: 3}
    write("generate.jsonl", [{"input": f"Text {n}", "output": "x", "cluster": n // 6} for n in range(12)])
    with pytest.raises(
        InputError, match=r"generate.jsonl: too few values of the field cluster: they leave 6 as examples and 6 for the test"
    ):
        begin("generate", "second")


def test_settings_follow_from_the_lengths_of_the_examples(here):
    """64 tokens more than bytes, in whole sixty-fours; half a token a byte of an input, for the five of an answer."""
    begin("generate")
    experiment = load_experiment(Path("first/experiment.yaml"))
    assert experiment.generate.max_tokens == 128
    assert experiment.prompts.sampling.max_tokens == 128  # 5 · 21 // 2 + 64 = 116
    write("generate.jsonl", [{"input": f"{n} " + "word " * 60, "output": "ä" * 100} for n in range(12)])
    begin("generate", "second")
    experiment = load_experiment(Path("second/experiment.yaml"))
    assert experiment.generate.max_tokens == 320  # 200 + 64 = 264
    assert experiment.prompts.sampling.max_tokens == 832  # 5 · 302 // 2 + 64 = 819
    step = experiment.prompts.steps[0].self_instruct
    assert (step.max_overlap, step.examples, step.template) == (0.7, 2, "prompts/inputs.yaml")


def test_inputs_of_several_lines_are_asked_for_one_by_one(here, monkeypatch):
    write("generate.jsonl", [{"input": f"Hello,\n{n}", "output": "x"} for n in range(40)])
    begin("generate")
    step = load_experiment(Path("first/experiment.yaml")).prompts.steps[0].self_instruct
    assert (step.template, step.samples, step.examples) == ("prompts/long_input.yaml", 80, 6)
    assert Path("first/prompts/long_input.yaml").read_bytes() == (ROOT / "prompts/long_input.yaml").read_bytes()
    monkeypatch.chdir("first")
    plan = Plan(load_experiment(Path("experiment.yaml")).prompts)
    asked = plan.templates["prompts/long_input.yaml"].render({**plan.task, "examples": ["Hello,\n1", "Hello,\n{{ 2 }}"]}, "x")
    assert "Do it: “well”." in asked[0]["content"]
    assert "--- input 2 ---\nHello,\n{{ 2 }}\n" in asked[0]["content"]


def test_labels_are_those_of_the_examples_or_those_that_are_named(here):
    write("classify.jsonl", [{"input": f"Text {n}", "output": label} for n, label in enumerate(["no", "1e3", " no"] * 4)])
    begin("classify")
    assert read_task("first/task.yaml", "eval.tasks").labels == ["no", "1e3"]
    begin("classify", "second", labels="1e3, never,no")
    assert read_task("second/task.yaml", "eval.tasks").labels == ["1e3", "never", "no"]


def changed(file, line, **fields):
    rows = [json.loads(text) for text in Path(file).read_text().splitlines()]
    rows[line - 1] |= fields
    write(file, rows)


@pytest.mark.parametrize(
    ("kind", "spoil", "message"),
    [
        ("extract", lambda: cut("extract.jsonl", 9), r"^extract.jsonl: 9 examples; at least 10 are needed$"),
        ("extract", lambda: changed("extract.jsonl", 2, input=""), r"^extract.jsonl line 2: input must be text$"),
        (
            "extract",
            lambda: [changed("extract.jsonl", 3, output={"age": 1}), changed("extract.jsonl", 5, output={"name": 5})],
            r"^extract.jsonl line 3: output: \$: 'name' is a required property\n"
            r"extract.jsonl line 5: output: \$\.name: 5 is not of type 'string'$",
        ),
        (
            "extract",
            lambda: Path("person.json").write_text(json.dumps({**SCHEMA, "required": ["name", "town"]})),
            r"^--task: schema: person.json cannot be satisfied: \$: town is required, but not allowed$",
        ),
        (
            "extract",
            lambda: Path("person.json").write_text(json.dumps({"properties": {"age": {"minimum": 3, "exclusiveMaximum": 3}}})),
            r"cannot be satisfied: \$\.age: minimum is 3, not less than exclusiveMaximum, 3$",
        ),
        ("extract", lambda: Path("person.json").write_text("{"), r"^person.json: cannot be read as JSON"),
        ("extract", lambda: Path("person.json").unlink(), r"^--task: schema: person.json does not exist$"),
        (
            "classify",
            lambda: changed("classify.jsonl", 4, output="ugly"),
            r"^labels with a single example; each needs at least two:\nclassify.jsonl line 4: 'ugly'$",
        ),
        (
            "classify",
            lambda: changed("classify.jsonl", 4, input="message 0  about 0."),
            r"^classify.jsonl line 4: has the same input as classify.jsonl line 1$",
        ),
        (
            "sql",
            lambda: changed("sql.jsonl", 2, output="DELETE FROM people"),
            r"^sql.jsonl line 2: output: does more than read the tables$",
        ),
        (
            "sql",
            lambda: changed("sql.jsonl", 2, output="SELECT nam FROM people"),
            r"^sql.jsonl line 2: output: does not run: no such column: nam$",
        ),
        (
            "tools",
            lambda: changed("tools.jsonl", 1, output={"name": "book", "arguments": {}}),
            r"^tools.jsonl line 1: output: \$: 'city' is a required property$",
        ),
        ("generate", lambda: changed("generate.jsonl", 6, output="?!"), r"^generate.jsonl line 6: output: has no word$"),
        ("generate", lambda: Path("generate.jsonl").unlink(), r"^generate.jsonl: no such file \(--examples\)$"),
    ],
)
def test_examples_that_cannot_be_used_are_named_and_nothing_is_written(here, kind, spoil, message):
    spoil()
    with pytest.raises(InputError) as error:
        begin(kind)
    assert re.search(message, str(error.value)), error.value
    assert not Path("first").exists()


def cut(file, lines):
    Path(file).write_text("".join(Path(file).read_text().splitlines(keepends=True)[:lines]))


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (
            ["--task", "extract", "--examples", "extract.jsonl", "--description", "x"],
            "--schema is missing, which --task extract needs",
        ),
        (["--task", "extract", "--examples", "extract.jsonl"], "--description is missing"),
        (["--task", "extract", "--description", "x"], "--examples is missing"),
        (["--task", "generate", "--tools", "tools.json"], "--tools is not for --task generate"),
        (["--prompts", "extract.jsonl", "--schema", "person.json"], "--schema needs --task"),
        (["--labels", "a,b"], "--labels needs --task"),
        (["--demo", "--task", "generate"], "--demo cannot be combined with other flags"),
        (
            ["--task", "classify", "--examples", "classify.jsonl", "--description", "x", "--labels", "good"],
            "--task: labels List should have at least 2 items",
        ),
        (
            ["--task", "classify", "--examples", "classify.jsonl", "--description", "x", "--labels", "good,ugly"],
            "classify.jsonl line 2: output: not a label: bad",
        ),
    ],
)
def test_flags_that_do_not_fit_are_refused(here, capsys, arguments, message):
    with pytest.raises(SystemExit) as ended:
        cli.main(["init", "first", *arguments])
    assert ended.value.code == 2
    assert message in capsys.readouterr().err
    assert not Path("first").exists()


def test_the_command_says_what_to_type_next(here):
    models = ["--teacher", here / "models/tiny", "--student", here / "models/tiny", "--no-gpu"]
    task = [
        "--task",
        "extract",
        "--description",
        "Do it.",
        "--examples",
        here / "extract.jsonl",
        "--schema",
        here / "person.json",
    ]
    result = run_cli("init", here / "mine", *task, *models)
    assert result.returncode == 0, result.stderr
    names = ["experiment.yaml", "task.yaml", "schema.json", "test.jsonl", "seeds.jsonl", "prompts/inputs.yaml"]
    written = "".join(f"wrote {here}/mine/{name}\n" for name in names)
    assert result.stdout == (
        f"{written}\nnext:\n  cd {here}/mine\n  llmdistill run experiment.yaml --dry-run\n  llmdistill run experiment.yaml\n"
    )


def test_the_help_names_every_kind(capsys):
    with pytest.raises(SystemExit):
        cli.main(["init", "--help"])
    assert f"{{{','.join(OF_TASKS)}}}" in capsys.readouterr().out


def test_on_a_terminal_what_no_flag_says_is_asked_for(here):
    answers = ["task", "no", "models/tiny", "models/tiny", "classify", "classify.jsonl", "Say how it is.", ""]
    result = typed("".join(f"{line}\n" for line in answers), "first")
    assert result.returncode == 0, result.stderr
    assert read_task("first/task.yaml", "eval.tasks").settings.description == "Say how it is."
