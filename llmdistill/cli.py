"""The command line: one command per stage, dotted overrides, exit statuses that schedulers understand."""

import argparse
import difflib
import errno
import os
import re
import select
import shutil
import signal
import sys
import time
import traceback
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NoReturn

import yaml

from llmdistill import __version__
from llmdistill.config import Experiment, load_experiment, overrides_of
from llmdistill.config.help import keys_help
from llmdistill.config.shipped import SHIPPED, find, page
from llmdistill.errors import BudgetError, BusyError, InputError, NonFiniteError, RemoteError
from llmdistill.runs.quiet import quiet_libraries
from llmdistill.runs.termination import exit_on_sigterm
from llmdistill.stages.table import STAGES, Stage


@dataclass(frozen=True)
class Command:
    """A command that takes a configuration but is not a stage: its help, and the sections that it reads."""

    help: str
    sections: tuple[str, ...]


COMMANDS: dict[str, Stage | Command] = {
    **STAGES,
    "chat": Command("talk to the teacher and the student side by side in the terminal", ("teacher", "generate")),
    "run": Command("run all stages in order; finished stages are skipped", ("",)),
    "refresh": Command(
        "incremental retraining: train on new prompts, and promote the new student if it is not worse", ("refresh",)
    ),
    "submit": Command("run the stages as scheduled jobs", ("jobs",)),
}
_OTHERS = ("init", "inspect", "status", "cancel", "push", "convert")  # commands that take a directory
_PATIENCE = 30  # seconds
_NO_SPACE = (errno.ENOSPC, errno.EDQUOT, errno.EFBIG)
_FAILED_WRITE = re.compile(r"iostream error|unexpected pos \d+|PytorchStreamWriter|file write failed")
_LITTLE = 64 << 20  # bytes; a disk with less is considered full
_NOT_WRITABLE = (
    errno.EACCES,
    errno.EPERM,
    errno.EROFS,
    errno.ENOTDIR,
    errno.EISDIR,
    errno.ENAMETOOLONG,
    errno.EEXIST,
    errno.ELOOP,
)


def main(argv: list[str] | None = None) -> NoReturn:
    """Entry point of the `llmdistill` command."""
    exit_on_sigterm(_report_termination)
    quiet_libraries()
    _refuse_unknown(sys.argv[1:] if argv is None else argv)
    parser = _parser()
    arguments, rest = parser.parse_known_args(argv)
    if arguments.command is None:
        parser.print_help()
        sys.exit(2)
    try:
        arguments.call(arguments, rest)
    except InputError as error:
        _leave_it_to_the_first()
        _complain(arguments, _with_file(arguments, str(error)))
        sys.exit(2)
    except (BudgetError, BusyError, RemoteError, NonFiniteError) as error:
        _complain(arguments, error)
        sys.exit(1)
    except KeyboardInterrupt:
        _complain(arguments, "interrupted; finished work is kept; run the same command to continue")
        sys.exit(1)
    except Exception as error:
        if isinstance(error, BrokenPipeError) and _nobody_reads():
            sys.exit(1)
        said = _of_the_disk(error, getattr(arguments, "where", None))
        if said is None:
            _complain(arguments, traceback.format_exc().rstrip())
            sys.exit(1)
        text, status = said
        kept = "nothing of it is kept" if arguments.command == "convert" else "finished work is kept"
        _complain(arguments, f"{text}; {kept}; free some space and run the same command again" if status == 1 else text)
        sys.exit(status)
    sys.exit(0)


def _nobody_reads() -> bool:
    """Whether the reader of the output, such as `head`, has exited; if so, further output is discarded."""
    poll, number = select.poll(), sys.stdout.fileno()
    poll.register(number, select.POLLERR)
    if not any(event & select.POLLERR for _, event in poll.poll(0)):
        return False
    os.dup2(os.open(os.devnull, os.O_WRONLY), number)
    return True


def _of_the_disk(error: BaseException, where: str | None) -> tuple[str, int] | None:
    """Message and exit status for an error caused by a full or unwritable disk; None for any other error.

    Args:
        error: the error that ended a command; libraries wrap or quote the error of the system.
        where: the directory that the command writes to.
    """
    chain: list[BaseException] = []
    while error is not None and error not in chain:
        chain.append(error)
        error = error.__cause__ or error.__context__  # type: ignore[assignment]
    file = next((found.filename for found in chain if isinstance(found, OSError) and found.filename), where)
    for number in _NO_SPACE:
        if any(getattr(found, "errno", None) == number or os.strerror(number) in str(found) for found in chain):
            return f"{file}: {os.strerror(number)}", 1
    # PyTorch reports only that a write has failed.
    if where and any(isinstance(found, RuntimeError) and _FAILED_WRITE.search(str(found)) for found in chain):
        full = (
            shutil.disk_usage(next(path for path in (Path(where), *Path(where).resolve().parents) if path.exists())).free
            < _LITTLE
        )
        return f"{where}: {os.strerror(errno.ENOSPC) if full else 'a file could not be written'}", 1
    if isinstance(chain[0], OSError) and chain[0].errno in _NOT_WRITABLE:
        return f"{file}: {chain[0].strerror}", 2
    return None


def _complain(arguments: argparse.Namespace, text: object) -> None:
    """Report an error on stderr."""
    from llmdistill.runs import watch
    from llmdistill.runs.progress import printable

    if watch.current.as_json:
        watch.event(arguments.command, "message", level="error", error=True, text=str(text))
    else:
        print(printable(watch.without_secrets(str(text))), file=sys.stderr)


def _with_file(arguments: argparse.Namespace, text: str) -> str:
    """Name the configuration file for a key that a stage misses in it; the stage does not know the file."""
    file = getattr(arguments, "config", None)
    return f"{file}: {text}" if file and text.startswith("the key ") else text


def _no_more(arguments: argparse.Namespace, rest: list[str]) -> None:
    """Refuse overrides for a command that takes no configuration."""
    if rest:
        raise InputError(f"{arguments.command} does not take {rest[0]}")


def _init(arguments: argparse.Namespace, rest: list[str]) -> None:
    _no_more(arguments, rest)
    from llmdistill.init.experiment import Choices, init, init_demo
    from llmdistill.init.task import TaskChoices

    directory = Path(arguments.directory)
    kind = next((kind for kind in ("prompts", "text", "documents", "task") if getattr(arguments, kind) is not None), None)
    path = getattr(arguments, kind) if kind not in (None, "task") else None
    names = ("examples", "description", "schema", "labels", "database", "tools")
    task = TaskChoices(arguments.task, **{name: getattr(arguments, name) for name in names})
    if task.given and kind != "task":
        raise InputError(f"--{task.given[0]} needs --task")
    choices = Choices(kind, path, arguments.teacher, arguments.student, arguments.gpu, task, arguments.layers)
    if not arguments.demo:
        init(directory, choices)
    elif choices == Choices():
        init_demo(directory)
    else:
        raise InputError("--demo cannot be combined with other flags")


def _status(arguments: argparse.Namespace, rest: list[str]) -> None:
    _no_more(arguments, rest)
    from llmdistill import jobs

    jobs.status(_of_run(arguments))


def _cancel(arguments: argparse.Namespace, rest: list[str]) -> None:
    _no_more(arguments, rest)
    from llmdistill import jobs

    jobs.cancel(_of_run(arguments))


def _of_run(arguments: argparse.Namespace) -> Path:
    directory = Path(arguments.directory)
    if not directory.is_dir():
        raise InputError(f"{directory}: no such directory; give the `output` of an experiment")
    return directory


def _inspect(arguments: argparse.Namespace, rest: list[str]) -> None:
    _no_more(arguments, rest)
    from llmdistill.data.inspect import inspect

    inspect(Path(arguments.directory), arguments.verify, Path(arguments.task) if arguments.task else None)


def _push(arguments: argparse.Namespace, rest: list[str]) -> None:
    _no_more(arguments, rest)
    from llmdistill.data.hub import push

    push(Path(arguments.directory), arguments.repo_id, arguments.private, arguments.revision, arguments.dry_run)


def _compare(arguments: argparse.Namespace, rest: list[str]) -> None:
    if rest:
        raise InputError(f"report of several runs does not take {rest[0]}")
    from llmdistill.workflow.compare import compare

    directories = [Path(name) for name in arguments.config]
    for directory in directories:
        if not directory.is_dir():
            raise InputError(f"{directory}: no such directory; to compare runs, give the `output` directory of each")
    compare(directories, Path(arguments.out or "comparison.html"), arguments.dry_run)


def _convert(arguments: argparse.Namespace, rest: list[str]) -> None:
    _no_more(arguments, rest)
    from llmdistill.runs import lock

    source, out = Path(arguments.directory), Path(arguments.out)
    arguments.where = str(out)
    with lock.alone([out], "convert"):
        _convert_alone(arguments, source, out)


def _convert_alone(arguments: argparse.Namespace, source: Path, out: Path) -> None:
    if arguments.to:
        for flag in ("teacher", "k"):
            if getattr(arguments, flag) is not None:
                raise InputError(f"--{flag} is only for --from; a dataset records it")
        from llmdistill.data.convert.exports import export_dataset

        return export_dataset(source, out, arguments.to, arguments.exact_k)
    if arguments.exact_k is not None:
        raise InputError("--exact-k needs --to distillkit")
    if arguments.teacher is None:
        raise InputError(f"--from {arguments.form} needs --teacher, the model whose tokenizer the files were made with")
    from llmdistill.data.convert.imports import import_dataset

    return import_dataset(source, out, arguments.form, arguments.teacher, arguments.k)


def _report(arguments: argparse.Namespace, rest: list[str]) -> None:
    if len(arguments.config) > 1 or Path(arguments.config[0]).is_dir():
        return _compare(arguments, rest)
    if arguments.out:
        raise InputError("--out is only for comparing several runs; the report of one run is written to its output")
    arguments.config = arguments.config[0]
    return _stage(arguments, rest)


def _experiment(arguments: argparse.Namespace, rest: list[str]) -> Experiment:
    """Read the configuration with the overrides; print it in a dry run."""
    if not find(arguments.config).exists() and any(Path(word).is_file() for word in rest):  # `--key VALUE FILE`
        raise InputError(f"{arguments.config}: no such file; the configuration must come before the overrides")
    experiment = load_experiment(Path(arguments.config), overrides_of(rest))
    arguments.where = experiment.output
    if arguments.dry_run:
        print(yaml.safe_dump(experiment.model_dump(mode="json"), sort_keys=False, allow_unicode=True))
    return experiment


def _run(arguments: argparse.Namespace, rest: list[str]) -> None:
    from llmdistill.workflow.pipeline import dry_run, run_pipeline

    (dry_run if arguments.dry_run else run_pipeline)(_experiment(arguments, rest), arguments.remake)


def _refresh(arguments: argparse.Namespace, rest: list[str]) -> None:
    from llmdistill.workflow.refresh import refresh

    refresh(_experiment(arguments, rest), arguments.dry_run)


def _submit(arguments: argparse.Namespace, rest: list[str]) -> None:
    from llmdistill.jobs import submit

    submit(_experiment(arguments, rest), arguments.dry_run)


def _chat(arguments: argparse.Namespace, rest: list[str]) -> None:
    from llmdistill.objectstore.copies import bring
    from llmdistill.stages.chat import chat

    experiment = _experiment(arguments, rest)
    if experiment.store is not None and not arguments.dry_run:
        bring(experiment, "chat")
    chat(experiment, arguments.dry_run)


def _stage(arguments: argparse.Namespace, rest: list[str]) -> None:
    experiment = _experiment(arguments, rest)
    if arguments.command == "train":
        experiment = experiment.with_(rounds=None)  # trains the student that the rounds start from
    options: dict[str, Any] = {}
    share = getattr(arguments, "shards", None)
    if share:
        from llmdistill.data.shards import Share

        options["worker"] = Share.parse(share)
    if arguments.dry_run:
        STAGES[arguments.command].function(experiment, dry_run=True, **options)
        return
    from llmdistill.workflow.stage import run_stage

    run_stage(experiment, arguments.command, share, **options)


class _Parser(argparse.ArgumentParser):
    """A parser whose help ends with the configuration keys that its command reads."""

    sections: tuple[str, ...] | None = None
    shows_all_keys = False

    def format_help(self) -> str:
        """The usual help, followed by the keys."""
        return super().format_help() + (keys_help(self.sections, self.shows_all_keys) if self.sections is not None else "")


class _HelpAll(argparse.Action):
    def __call__(self, parser: Any, namespace: argparse.Namespace, values: Any, option_string: str | None = None) -> None:
        parser.shows_all_keys = True
        parser.print_help()
        parser.exit()


def _refuse_unknown(words: list[str]) -> None:
    """Exit with a suggestion if the command is unknown."""
    known = [*COMMANDS, *_OTHERS]
    if words and not words[0].startswith("-") and words[0] not in known:
        near = difflib.get_close_matches(words[0], known, n=1)
        hint = f"did you mean {near[0]}?" if near else "`llmdistill --help` lists them"
        print(f"llmdistill: no such command {words[0]}; {hint}", file=sys.stderr)
        sys.exit(2)


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        prog="llmdistill",
        description="Distil a large language model into a small one with synthetic data and soft targets.",
        epilog="`llmdistill COMMAND --help` lists the configuration keys that the command reads.\n"
        f"Documentation, prompts and configurations: {SHIPPED}",
        formatter_class=argparse.RawDescriptionHelpFormatter,  # a path is not wrapped
        allow_abbrev=False,
    )
    parser.add_argument("--version", action="version", version=f"llmdistill {__version__}")
    commands = parser.add_subparsers(dest="command", metavar="COMMAND", title="commands", parser_class=_Parser)
    _add_init(commands)
    for name, described in COMMANDS.items():
        _add_command(commands, name, described)
    inspect = commands.add_parser("inspect", help="show the contents of a dataset", allow_abbrev=False)
    inspect.add_argument("directory", metavar="DIR", help="the dataset's directory")
    inspect.add_argument("--verify", action="store_true", help="also verify the checksum of every shard")
    inspect.add_argument("--task", metavar="FILE", help="score answers to the held-out examples of a task of your own")
    inspect.set_defaults(call=_inspect)
    for name, text, call in (
        ("status", "show the progress of a run", _status),
        ("cancel", "cancel submitted jobs; finished work is kept", _cancel),
    ):
        of_jobs = commands.add_parser(name, help=text, allow_abbrev=False)
        of_jobs.add_argument("directory", metavar="RUN", help="output directory of the experiment")
        of_jobs.set_defaults(call=call)
    help_text = "upload a finished dataset or student to the Hugging Face Hub"
    push = commands.add_parser(
        "push",
        help=help_text,
        description=f"{_capitalised(help_text)} in one commit.",
        epilog="The token is read from HF_TOKEN or `hf auth login`.",
        allow_abbrev=False,
    )
    push.add_argument("directory", metavar="DIR", help="output directory of `generate`, `score`, `curate` or `train`")
    push.add_argument("repo_id", metavar="REPO_ID", help="user/name or organisation/name; created if it does not exist")
    push.add_argument("--private", action="store_true", help="create a private repository; fails if it exists and is public")
    push.add_argument("--revision", metavar="BRANCH", help="branch (default main); created if it does not exist")
    push.add_argument(
        "--dry-run", action="store_true", help="check the directory and list what would be uploaded, without network access"
    )
    push.set_defaults(call=_push)
    _add_convert(commands)
    return parser


def _capitalised(text: str) -> str:
    return text[0].upper() + text[1:]


def _add_init(commands: Any) -> None:
    text = "write a first experiment or the demo to a directory"
    command = commands.add_parser(
        "init",
        help=text,
        description=f"{_capitalised(text)}, and print the next commands. On a terminal, prompts for missing settings.",
        allow_abbrev=False,
    )
    command.add_argument(
        "directory", nargs="?", default=".", metavar="DIR", help="directory to write to (default: the current one)"
    )
    command.add_argument("--demo", action="store_true", help="the demo, with its prompts and tasks")
    data = command.add_mutually_exclusive_group()
    data.add_argument(
        "--prompts", type=Path, metavar="FILE", help="your prompts: .jsonl, .csv, .parquet, or .txt with one per line"
    )
    data.add_argument(
        "--text", type=Path, metavar="FILE", help="your existing conversations or text, for the teacher to score: JSONL"
    )
    data.add_argument(
        "--documents", type=Path, metavar="PATH", help="your text or Markdown files, for the teacher to write questions about"
    )
    data.add_argument(
        "--task",
        choices=("extract", "classify", "sql", "tools", "generate"),
        help="your task, by the type of answer: JSON, a label, a query, a function call or text",
    )
    _add_task(command)
    command.add_argument("--teacher", metavar="MODEL", help="teacher: a name on the Hugging Face Hub, or a directory")
    student = command.add_mutually_exclusive_group()
    student.add_argument("--student", metavar="MODEL", help="student: a name on the Hugging Face Hub, or a directory")
    student.add_argument("--layers", type=int, metavar="N", help="make the student from N of the teacher's layers")
    command.add_argument(
        "--gpu",
        action=argparse.BooleanOptionalAction,
        help="whether this machine has a GPU (default: whether nvidia-smi or rocm-smi is found)",
    )
    command.set_defaults(call=_init)


def _add_task(command: argparse.ArgumentParser) -> None:
    group = command.add_argument_group("your task, with --task")
    for flag, metavar, text in (
        ("examples", "FILE", 'JSONL with at least ten lines of {"input": …, "output": …}'),
        ("description", "TEXT", "what to do with an input, as an instruction to the models"),
        ("schema", "FILE", "extract: JSON schema of an answer"),
        ("labels", "A,B", "classify: the labels (default: those of the examples)"),
        ("database", "FILE", "sql: SQL that creates and fills the tables, for SQLite"),
        ("tools", "FILE", "tools: JSON list of function schemas in OpenAI's format"),
    ):
        group.add_argument(f"--{flag}", metavar=metavar, type=Path if metavar == "FILE" else str, help=text)


def _add_command(commands: Any, name: str, described: Stage | Command) -> None:
    """A command that takes a configuration."""
    shared = isinstance(described, Stage) and described.shared
    usage = f"llmdistill {name} CONFIG.yaml [--KEY VALUE ...] [--dry-run]"
    usage += (" [--shards I/N]" if shared else "") + (" [--remake]" if name == "run" else "")
    if name == "report":
        usage += "\n       llmdistill report RUN RUN ... [--out FILE.html]"
    command = commands.add_parser(
        name,
        help=described.help,
        description=f"{_capitalised(described.help)}.",
        usage=usage,
        formatter_class=argparse.RawDescriptionHelpFormatter,
        allow_abbrev=False,
    )
    calls = {"chat": _chat, "run": _run, "refresh": _refresh, "submit": _submit, "report": _report}
    command.set_defaults(call=calls.get(name, _stage))
    command.sections = described.sections
    command.add_argument("--help-all", action=_HelpAll, nargs=0, help="show this help message with all keys and exit")
    if name == "report":
        command.add_argument(
            "config", nargs="+", metavar="CONFIG.yaml", help="the configuration file, or the output directories of several runs"
        )
        command.add_argument("--out", metavar="FILE.html", help="with several runs: file to write (default comparison.html)")
    else:
        command.add_argument("config", metavar="CONFIG.yaml", help="the configuration file")
    command.add_argument(
        "--dry-run", action="store_true", help="show the resolved configuration and what would be done, without loading a model"
    )
    if name == "run":
        command.add_argument(
            "--remake",
            action="store_true",
            help="delete results made with other settings and everything made from them, then make them again",
        )
    if shared:
        command.add_argument("--shards", metavar="I/N", help="make only the shards of worker I of N")


def _add_convert(commands: Any) -> None:
    text = "convert a dataset to or from the format of DistillKit, axolotl or JSONL, or to preference pairs"
    convert = commands.add_parser(
        "convert",
        help=text,
        description=f"{_capitalised(text)}.",
        epilog=f"The formats: {page('formats')}",
        formatter_class=argparse.RawDescriptionHelpFormatter,
        allow_abbrev=False,
    )
    formats = ("distillkit", "axolotl", "jsonl")
    convert.add_argument(
        "directory", metavar="SRC", help="with --to: a finished dataset; with --from: a file or a directory of files"
    )
    convert.add_argument("out", metavar="OUT", help="output directory; must be empty or not exist")
    direction = convert.add_mutually_exclusive_group(required=True)
    direction.add_argument("--to", choices=(*formats, "preferences"), help="the format to write")
    direction.add_argument("--from", dest="form", choices=formats, help="the format to read")
    convert.add_argument("--teacher", metavar="MODEL", help="with --from: model whose tokenizer was used for the files")
    convert.add_argument("--k", type=int, metavar="N", help="with --from: keep only the N most likely tokens per position")
    convert.add_argument(
        "--exact-k",
        type=int,
        metavar="N",
        help="with --to distillkit: store N log-probabilities per position exactly, the rest as a polynomial (default: all)",
    )
    convert.set_defaults(call=_convert)


def _is_first() -> bool:
    """Whether this process prints for all those that `torchrun` started on this machine."""
    return os.environ.get("LOCAL_RANK", "0") == "0"


def _leave_it_to_the_first() -> None:
    """Leave an error that all processes find to the first one, after which torchrun ends the others.

    An error that only another process has found is reported by that process after a while.
    """
    if not _is_first():
        signal.signal(signal.SIGTERM, lambda signum, frame: os._exit(2))
        time.sleep(_PATIENCE)


def _report_termination() -> None:
    """Report SIGTERM on stderr: finished shards and checkpoints are on disk."""
    if _is_first():
        os.write(2, b"terminated; finished work is kept; run the same command to continue\n")
