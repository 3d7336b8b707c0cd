"""Whatever file or model a stage reads is one of its inputs: editing it shows, and without it a dry run ends."""

import json
import shutil
from pathlib import Path

import pytest

from llmdistill.config import Experiment
from llmdistill.errors import InputError
from llmdistill.models.loading import load_tokenizer, vocabulary_hash
from llmdistill.runs import record
from llmdistill.runs.files import read_json, write_json
from llmdistill.runs.inputs import model_fingerprint, sha256
from llmdistill.stages.table import STAGES
from tests.conftest import run_cli

FILES = {
    "ask.yaml": """
name: ask
description: Ask.
variables: [instruction]
answer: {field: instruction}
messages: [{role: user, content: "Ask about {{ instruction }}."}]
""",
    "more.yaml": """
name: more
description: More.
variables: [examples]
answer: {field: instruction}
messages: [{role: user, content: "More like {{ examples }}"}]
""",
    "final.yaml": """
name: final
description: The prompt.
variables: [instruction]
messages: [{role: user, content: "{{ instruction }}"}]
""",
    "rubric.yaml": """
name: rubric
description: A digit.
variables: [prompt, answer]
messages: [{role: user, content: "{{ prompt }} {{ answer }}"}]
""",
    "compare.yaml": """
name: compare
description: A digit.
variables: [prompt, answer_1, answer_2]
messages: [{role: user, content: "{{ prompt }} {{ answer_1 }} {{ answer_2 }}"}]
""",
    "task.yaml": """
task: task
dataset_path: json
dataset_kwargs: {data_files: {test: task.jsonl}}
test_split: test
output_type: generate_until
doc_to_text: "{{ question }}"
doc_to_target: answer
""",
    "folder-task.yaml": """
task: task
dataset_path: @/folder
test_split: test
output_type: generate_until
""",
    "own.yaml": "{kind: extract, description: d, schema: own.schema.json, test: own.jsonl}",
    "own.schema.json": "{}",
    "own.jsonl": '{"input": "a", "output": 1}\n{"input": "b", "output": 2}\n',
    "task.jsonl": '{"question": "?", "answer": "!"}\n',
    "folder/data.jsonl": '{"question": "?", "answer": "!"}\n',
    "source.jsonl": '{"instruction": "a"}\n{"instruction": "b"}\n',
    "chat.jsonl": '{"prompt": "a", "completion": "b"}\n',
    "personas.jsonl": '{"persona": "p"}\n',
    "tests.jsonl": '{"question": "a question of eight words or more than that"}\n',
    "schema.json": '{"type": "object"}',
    "fsdp.json": '{"activation_checkpointing": false}',
}
MODELS = ("teacher", "member", "judge", "student")
SOURCE = {"source": "@/source.jsonl", "template": "@/final.yaml"}
JUDGE = {"model": "@/judge", "engine": "transformers", "ensemble": [{"model": "@/member"}]}
STEPS = [
    {"ask": {"template": "@/ask.yaml"}},
    {"evolve": {"templates": ["@/ask.yaml"]}},
    {"self_instruct": {"template": "@/more.yaml", "examples": 2}},
    {"combine": {"source": "@/personas.jsonl", "fields": ["persona"]}},
]
TEXT = {"alpha": 0.0, "dataset": "@/text"}


def prompts(step):
    return {"prompts": {**SOURCE, "steps": [step]}}


SETTINGS = {"teacher": JUDGE, "template": "@/rubric.yaml"}
JUDGED = {"curate": [{"judge": SETTINGS}]}
BEST_OF = {"curate": [{"best_of": {"judge": SETTINGS}}]}
COMPARED = {"eval": {"win_rate": {"judge": JUDGE, "template": "@/compare.yaml"}}}
TASK = {"eval": {"tasks": ["@/task.yaml"]}}
OWN = {"eval": {"tasks": ["@/own.yaml"]}}
CHECKED = {"curate": [{"task": {"file": "@/own.yaml"}}]}
STUDENT = {"student": {"model": "@/student"}}


# stage, configuration, file or model, and the key that names it
READ = [
    ("prompts", prompts(STEPS[0]), "source.jsonl", "prompts.source"),
    ("prompts", prompts(STEPS[0]), "final.yaml", "prompts.template"),
    ("prompts", prompts(STEPS[0]), "ask.yaml", "prompts.steps.0.ask.template"),
    ("prompts", prompts(STEPS[1]), "ask.yaml", "prompts.steps.0.evolve.templates"),
    ("prompts", prompts(STEPS[2]), "more.yaml", "prompts.steps.0.self_instruct.template"),
    ("prompts", prompts(STEPS[3]), "personas.jsonl", "prompts.steps.0.combine.source"),
    ("prompts", prompts(STEPS[0]), "teacher", "teacher.model"),
    ("prompts", prompts(STEPS[0]), "member", "teacher.ensemble.0.model"),
    ("generate", {"prompts": SOURCE}, "source.jsonl", "prompts.source"),
    ("generate", {"prompts": SOURCE}, "final.yaml", "prompts.template"),
    ("generate", {"prompts": {**SOURCE, "known": ["@/text"]}}, "text/dataset.json", "prompts.known"),
    ("generate", {"prompts": SOURCE}, "teacher", "teacher.model"),
    ("generate", {"prompts": SOURCE}, "member", "teacher.ensemble.0.model"),
    ("score", {"score": {"source": "@/chat.jsonl"}}, "chat.jsonl", "score.source"),
    ("score", {"score": {"source": "@/text"}}, "text/dataset.json", "score.source"),
    ("score", {"score": {"source": "@/chat.jsonl"}}, "member", "teacher.ensemble.0.model"),
    ("curate", {"curate": [{"contamination": {"against": ["@/tests.jsonl"]}}]}, "tests.jsonl", "curate.0.contamination.against"),
    ("curate", {"curate": [{"json_schema": {"file": "@/schema.json"}}]}, "schema.json", "curate.0.json_schema.file"),
    ("curate", CHECKED, "own.yaml", "curate.0.task.file"),
    ("curate", CHECKED, "own.schema.json", "own.yaml: schema"),
    ("curate", JUDGED, "rubric.yaml", "curate.0.judge.template"),
    ("curate", JUDGED, "judge", "curate.0.judge.teacher.model"),
    ("curate", JUDGED, "member", "curate.0.judge.teacher.ensemble.0.model"),
    ("curate", BEST_OF, "rubric.yaml", "curate.0.best_of.judge.template"),
    ("curate", BEST_OF, "judge", "curate.0.best_of.judge.teacher.model"),
    ("curate", BEST_OF, "member", "curate.0.best_of.judge.teacher.ensemble.0.model"),
    ("prune", {"student": {"prune": {"layers": [0, 1], "refit": False}}}, "teacher", "teacher.model"),
    ("train", STUDENT, "student", "student.model"),
    ("train", {"targets": {"kind": "online"}, "train": TEXT}, "teacher", "teacher.model"),
    ("train", {"train": {**TEXT, "mix": {"datasets": ["@/mixed"], "share": 0.5}}}, "mixed/dataset.json", "train.mix.datasets"),
    ("train", {"train": {**TEXT, "args": {"fsdp_config": "@/fsdp.json"}}}, "fsdp.json", "train.args.fsdp_config"),
    ("eval", TASK, "task.yaml", "eval.tasks"),
    ("eval", TASK, "task.jsonl", "dataset_kwargs.data_files"),
    ("eval", OWN, "own.yaml", "eval.tasks"),
    ("eval", OWN, "own.schema.json", "own.yaml: schema"),
    ("eval", OWN, "own.jsonl", "own.yaml: test"),
    ("eval", COMPARED, "compare.yaml", "eval.win_rate.template"),
    ("eval", COMPARED, "judge", "eval.win_rate.judge.model"),
    ("eval", COMPARED, "member", "eval.win_rate.judge.ensemble.0.model"),
    ("eval", {}, "teacher", "the model `teacher`"),
    ("eval", {}, "student", "the model `student before`"),
    ("export", {"export": {"model": "@/student"}}, "student", "export.model"),
]


class ClaimedError(Exception):
    """A stage was about to claim its directory; what follows costs time."""


@pytest.fixture
def place(tiny, text_rows, tmp_path):
    """All that stages read, and the student that they would have made."""
    (tmp_path / "folder").mkdir()
    for name, text in FILES.items():
        (tmp_path / name).write_text(text.replace("@", str(tmp_path)))
    for name in (*MODELS, "run/student"):
        shutil.copytree(tiny, tmp_path / name)
    for name in ("text", "mixed", "run/data"):
        shutil.copytree(text_rows, tmp_path / name)
        manifest = read_json(tmp_path / name / "dataset.json")
        vocabulary = vocabulary_hash(load_tokenizer(str(tiny), None))
        manifest["tokenizer"]["vocabulary_hash"] = vocabulary
        write_json(tmp_path / name / "dataset.json", manifest)
    return tmp_path


def experiment(place, tree):
    teacher = {"model": "@/teacher", "engine": "transformers", "ensemble": [{"model": "@/member"}]}
    base = {"output": "@/run", "teacher": teacher, "train": TEXT, **STUDENT}
    return Experiment.model_validate(json.loads(json.dumps({**base, **tree}).replace("@", str(place))))


@pytest.fixture
def inputs(monkeypatch):
    """The inputs with which a stage claims its directory."""

    def inputs(stage, configuration):
        found = {}

        def claim(directory, name, settings, inputs):
            found.update(inputs)
            raise ClaimedError

        with monkeypatch.context() as patch:
            patch.setattr(record, "claim", claim)
            with pytest.raises(ClaimedError):
                STAGES[stage].function(configuration)
        return found

    return inputs


def edit(path: Path):
    """Change what is read, so that it can still be read."""
    if path.is_dir():
        path = path / "config.json"
    if path.suffix == ".jsonl":
        path.write_text(path.read_text() * 2)
    else:
        path.write_text(path.read_text() + "\n")


@pytest.mark.parametrize(("stage", "tree", "name", "key"), READ, ids=lambda value: value if isinstance(value, str) else "")
def test_what_is_read_is_an_input_and_has_to_be_there(place, inputs, stage, tree, name, key):
    path, configuration = place / name, experiment(place, tree)
    before = inputs(stage, configuration)
    assert str(path) in before
    edit(path)
    after = inputs(stage, configuration)
    assert before.keys() == after.keys()
    assert {read for read in before if before[read] != after[read]} == {str(path)}

    shutil.rmtree(path) if path.is_dir() else path.unlink()
    there = sorted(place.rglob("*"))
    with pytest.raises(InputError) as error:
        STAGES[stage].function(configuration, dry_run=True)
    assert path.name in str(error.value)
    assert key in str(error.value)
    assert sorted(place.rglob("*")) == there


def test_a_folder_that_a_task_reads_is_an_input(place, inputs):
    configuration = experiment(place, {"eval": {"tasks": [f"{place}/folder-task.yaml"]}})
    assert str(place / "folder/data.jsonl") in inputs("eval", configuration)


def test_an_edited_rubric_is_told_by_the_command_and_a_missing_one_by_its_dry_run(place):
    """As a user meets it, where the judge is inside another step."""
    tree = {**BEST_OF, "output": "@/run", "teacher": {"model": "@/teacher"}, "eval": {"held_out": 0}}
    (place / "experiment.yaml").write_text(json.dumps(tree).replace("@", str(place)))
    loaded = experiment(place, tree)
    settings = loaded.model_dump(mode="json", include={"seed", "curate", "shard_mb"}) | {"eval": {"held_out": 0.0}}
    data = place / "run/data/dataset.json"
    rubric = place / "rubric.yaml"
    read = {str(file): sha256(file) for file in (data, rubric)}
    read |= {str(place / name): model_fingerprint(str(place / name), None) for name in ("judge", "member")}
    record.begin(place / "run/curated", "curate", settings, read, 0)
    record.finish(place / "run/curated", {})
    done = run_cli("curate", place / "experiment.yaml")
    assert (done.returncode, "is finished" in done.stdout.replace("\n", " ")) == (0, True), done.stderr
    rubric.write_text(rubric.read_text().replace("description: A digit.", "description: Another digit."))
    edited = run_cli("curate", place / "experiment.yaml")
    assert edited.returncode == 2
    assert f"was made with other settings: input.{rubric} was " in edited.stderr
    rubric.unlink()
    missing = run_cli("curate", place / "experiment.yaml", "--dry-run")
    assert (missing.returncode, missing.stderr) == (2, f"{rubric}: no such file (curate.0.best_of.judge.template)\n")
