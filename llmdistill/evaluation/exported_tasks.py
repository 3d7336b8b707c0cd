"""Evaluates an exported form on a user's own tasks: its score, and when a server should ask the teacher.

The form answers the same items; the teacher's and the student's answers are those of `eval/tasks.parquet`.
"""

from dataclasses import dataclass
from typing import Any

import pyarrow as pa
import pyarrow.compute as pc
import pyarrow.parquet as pq

from llmdistill.config import Experiment
from llmdistill.errors import InputError
from llmdistill.evaluation.own_tasks import OwnTask, run_own
from llmdistill.evaluation.task_scores import STUDENT, TEACHER, about_own, summarise
from llmdistill.evaluation.tasks import SCHEMA, read_own_tasks
from llmdistill.runs import record
from llmdistill.runs.files import read_json
from llmdistill.runs.inputs import model_fingerprint, sha256
from llmdistill.runs.progress import say

UNEXPORTED = "student, not exported"
CASCADE = "cascade.json"
CASCADE_VERSION = 1
_CONFIDENCE = "sum of the log-probabilities of all tokens of the greedy answer, the end token included, in nats"


@dataclass(frozen=True)
class MeasuredTasks:
    """What `eval` has measured on the tasks.

    Attributes:
        tasks: the tasks, as their files are.
        rows: rows of `eval/tasks.parquet`: the teacher's, and the student's, which is called `UNEXPORTED`.
        sha256: hash of that file.
    """

    tasks: list[OwnTask]
    rows: pa.Table
    sha256: str

    @property
    def references(self) -> dict[tuple[str, str], str]:
        """The teacher's answers by task and item."""
        rows = self.rows.filter(pc.equal(self.rows["model"], TEACHER)).select(["task", "item", "answer"]).to_pylist()
        return {(row["task"], row["item"]): row["answer"] for row in rows}


def measured_tasks(experiment: Experiment) -> MeasuredTasks | None:
    """The user's own tasks, if there are any and `eval` has measured this student on them.

    Raises:
        InputError: if a task is unusable, or the tasks or the student differ from those evaluated.
    """
    own = read_own_tasks(experiment.eval.tasks)
    directory = experiment.directory("eval")
    file = directory / "tasks.parquet"
    if not own:
        return None
    if not (directory / "metrics.json").is_file() or not file.is_file():
        say("export", "skips the tasks, which have not been evaluated; run `eval`, then `export` again")
        return None
    table = pq.read_table(file)
    if not table.schema.equals(SCHEMA):
        raise InputError(f"{file}: its columns differ from those of this version; run `eval` again")
    # The experiment may have been moved: its files are identified by their content, and the student by its former path.
    read = (record.read_run(directory) or {"inputs": {}})["inputs"]
    measured = [read.get(model["path"]) for model in read_json(directory / "metrics.json")["models"] if model["name"] == STUDENT]
    changed = [name for task in own for name, path in task.files.items() if sha256(path) not in read.values()]
    trained = str(experiment.directory("student"))
    source = (experiment.export and experiment.export.model) or trained
    if model_fingerprint(source, None) not in measured:
        if source != trained:
            say("export", f"skips the tasks: {source} is not the student that `eval` has measured")
            return None
        changed.append(source)
    if changed:
        raise InputError(f"{', '.join(changed)}: changed since `eval` measured it ({file}); run `eval` again before `export`")
    student = table.filter(pc.equal(table["model"], STUDENT))
    for task in own:
        answered = student.filter(pc.equal(student["task"], task.task.name)).select(["item", "input", "target"]).to_pylist()
        items = [
            {"item": item.id, "input": item.input, "target": item.output} for item in task.items[: experiment.eval.task_limit]
        ]
        if answered != items:
            raise InputError(f"{file}: the items of {task.task.file} have changed; run `eval` again before `export`")
    names = pa.array([task.task.name for task in own])
    teacher = table.filter(pc.equal(table["model"], TEACHER))
    place = student.schema.get_field_index("model")
    student = student.set_column(place, SCHEMA.field("model"), pa.array([UNEXPORTED] * len(student), pa.string()))
    rows = pa.concat_tables([teacher, student])
    return MeasuredTasks(own, rows.filter(pc.is_in(rows["task"], names)), sha256(file))


def on_tasks(measured: MeasuredTasks, model: Any, tokenizer: Any, end_ids: list[int], experiment: Experiment) -> dict[str, Any]:
    """The entry of a form in `export.json` under `tasks`: that of the student in `metrics.json`, but for the form.

    Args:
        measured: results of `eval`.
        model: the form.
        tokenizer: its tokenizer.
        end_ids: the tokens that end an answer.
        experiment: the configuration.
    """
    settings = experiment.eval
    rows, tables = run_own(
        measured.tasks,
        {STUDENT: model},
        {STUDENT: tokenizer},
        {STUDENT: end_ids},
        settings.batch_size,
        settings.task_limit,
        experiment.teacher.template_args,
        measured.references,
        "export",
        thinking_end=experiment.generate.thinking_end,
    )
    table = pa.concat_tables([measured.rows, pa.Table.from_pylist(rows, SCHEMA)])
    about = about_own(measured.tasks, tables)
    return {"of": measured.sha256, **summarise(table, about, settings.resamples, experiment.seed)}


def for_a_server(measured: MeasuredTasks, found: dict[str, Any], dtype: str, template_args: dict[str, Any]) -> dict[str, Any]:
    """The content of `cascade.json`: how each task is asked, and from which confidence on an answer is kept.

    Args:
        measured: results of `eval`.
        found: results of `on_tasks`.
        dtype: precision in which the form answered.
        template_args: more variables of the chat template.
    """
    by_name = {own.task.name: own.task for own in measured.tasks}
    return {
        "schema_version": CASCADE_VERSION,
        "tasks": {
            entry["name"]: {
                "system": by_name[entry["name"]].told,
                "template_args": template_args,
                "max_tokens": entry["max_tokens"][STUDENT],
                "confidence": _CONFIDENCE,
                "measured": {"items": entry["items"], "clusters": entry["clusters"], "dtype": dtype},
                "calibration": {key: entry["cascade"]["calibration"][key] for key in ("slope", "intercept")},
                "thresholds": entry["cascade"]["thresholds"],
            }
            for entry in found["tasks"]
            if "cascade" in entry
        },
    }
