"""The command line: one command a stage, dotted overrides, exit statuses that schedulers understand."""

import argparse
import errno
import importlib
import os
import signal
import sys
import time
from contextlib import nullcontext
from pathlib import Path
from typing import Any, NoReturn

import yaml

from llmdistill import __version__
from llmdistill.config import Experiment, keys, load_experiment, overrides_of
from llmdistill.errors import InputError, RemoteError
from llmdistill.runs.quiet import quiet_libraries

# What each command does, and the sections of the configuration it reads.
STAGES = {
    "prompts": (
        "the teacher makes prompts out of prompts, by the steps of the configuration",
        ("teacher", "prompts", "generate.rows_per_shard"),
    ),
    "generate": (
        "the teacher writes a dataset: text and soft targets in one pass",
        ("teacher", "prompts", "generate", "targets"),
    ),
    "score": (
        "the teacher reads finished text; it is stored with soft targets, as by generate",
        ("teacher", "score", "generate.rows_per_shard", "targets"),
    ),
    "curate": ("filter the dataset and hold rows out for evaluation, counting every rejected row", ("curate", "eval.held_out")),
    "prune": ("cut the student out of the teacher, and say what went and why", ("teacher", "student.prune")),
    "train": ("train the student on the dataset", ("student", "train")),
    "eval": ("measure the student against the teacher on held-out rows", ("eval",)),
    "export": ("write the student whole or quantised, ready to serve, and measure what that costs", ("export", "eval.speed")),
    "report": ("write report.html and report.md, or one page on several runs", ()),
    "chat": ("talk to the teacher and the student side by side in the terminal", ("teacher", "generate")),
    "run": ("all stages in order; a finished stage is skipped", ("",)),
    "refresh": (
        "a run that comes back: what is new is added, and the new student is promoted if it is not worse",
        ("refresh",),
    ),
    "submit": ("the same as scheduled jobs, each after those that it needs", ("jobs",)),
}
_PATIENCE = 30  # seconds
_SHARED = ("prompts", "generate", "score")  # several workers may do it together
_USAGE = dict.fromkeys(_SHARED, " [--shards I/N]") | {"report": "\n       llmdistill report RUN RUN ... [--out FILE.html]"}
_NO_SPACE = (errno.ENOSPC, errno.EDQUOT, errno.EFBIG)
_MODULES = {"eval": ("llmdistill.stages.evaluate", "evaluate")}  # the others are named as their command


def main(argv: list[str] | None = None) -> NoReturn:
    """Entry point of the `llmdistill` command."""
    signal.signal(signal.SIGTERM, _preempted)
    quiet_libraries()
    parser = _parser()
    arguments, rest = parser.parse_known_args(argv)
    if arguments.command is None:
        parser.print_help()
        sys.exit(2)
    try:
        if arguments.command in ("inspect", "push", "convert", "status", "cancel"):
            _call_on_directory(arguments, rest)
        elif arguments.command == "report" and (len(arguments.config) > 1 or Path(arguments.config[0]).is_dir()):
            _compare(arguments, rest)
        else:
            overrides = overrides_of(rest)
            config = arguments.config[0] if arguments.command == "report" else arguments.config
            if getattr(arguments, "out", None):
                raise InputError("--out is for the report of several runs; that of one goes into its output")
            experiment = load_experiment(Path(config), overrides)
            _call_stage(arguments, experiment, rest)
    except InputError as error:
        _leave_it_to_the_first()
        _complain(arguments, error)
        sys.exit(2)
    except OSError as error:
        if error.errno not in _NO_SPACE:
            raise
        _complain(arguments, f"{error.filename}: {error.strerror}; finished work is kept, the same command goes on from there")
        sys.exit(1)
    except RemoteError as error:
        _complain(arguments, error)
        sys.exit(1)
    except KeyboardInterrupt:
        _complain(arguments, "interrupted; finished work is kept, the same command goes on from there")
        sys.exit(1)
    sys.exit(0)


def _complain(arguments: argparse.Namespace, text: object) -> None:
    """What went wrong, on the standard error stream."""
    from llmdistill.runs import watch

    if watch.current.as_json:
        watch.event(arguments.command, "message", level="error", error=True, text=str(text))
    else:
        print(text, file=sys.stderr)


def _call_on_directory(arguments: argparse.Namespace, rest: list[str]) -> None:
    if rest:
        raise InputError(f"{arguments.command} takes no {rest[0]}")
    directory = Path(arguments.directory)
    if arguments.command == "convert":
        _convert(directory, arguments)
    elif arguments.command in ("status", "cancel"):
        from llmdistill import jobs

        getattr(jobs, arguments.command)(directory)
    elif arguments.command == "inspect":
        from llmdistill.data.inspect import inspect

        inspect(directory, arguments.verify)
    else:
        from llmdistill.data.hub import push

        push(directory, arguments.repo_id, arguments.private, arguments.revision, arguments.dry_run)


def _compare(arguments: argparse.Namespace, rest: list[str]) -> None:
    if rest:
        raise InputError(f"report of several runs takes no {rest[0]}")
    from llmdistill.runs.compare import compare

    directories = [Path(name) for name in arguments.config]
    for directory in directories:
        if not directory.is_dir():
            raise InputError(f"{directory}: no such directory; to compare runs, name the `output` of each")
    compare(directories, Path(arguments.out or "comparison.html"))


def _convert(source: Path, arguments: argparse.Namespace) -> None:
    out = Path(arguments.out)
    if arguments.to:
        for flag in ("teacher", "k"):
            if getattr(arguments, flag) is not None:
                raise InputError(f"--{flag} is for --from; a dataset of ours says that itself")
        from llmdistill.data.convert.exports import export_dataset

        return export_dataset(source, out, arguments.to, arguments.exact_k)
    if arguments.exact_k is not None:
        raise InputError("--exact-k is for --to distillkit")
    if arguments.teacher is None:
        raise InputError(
            f"--teacher is missing: --from {arguments.form} needs the model whose tokenizer the files were made with"
        )
    from llmdistill.data.convert.imports import import_dataset

    return import_dataset(source, out, arguments.form, arguments.teacher, arguments.k)


def _call_stage(arguments: argparse.Namespace, experiment: Experiment, rest: list[str]) -> None:
    from llmdistill.runs.pipeline import Stage, run_pipeline, say_estimate, stages

    if arguments.dry_run:
        print(yaml.safe_dump(experiment.model_dump(mode="json"), sort_keys=False, allow_unicode=True))
    elif arguments.command == "run":
        return run_pipeline(experiment, [arguments.config, *rest])
    if arguments.command == "refresh":
        from llmdistill.runs.refresh import refresh

        return refresh(experiment, [arguments.config, *rest], arguments.dry_run)
    if arguments.command == "submit":
        from llmdistill.jobs import submit

        return submit(experiment, [arguments.config, *rest], arguments.dry_run)
    options: dict[str, Any] = {"dry_run": arguments.dry_run}
    if getattr(arguments, "shards", None):
        from llmdistill.data.shards import Share

        options["worker"] = Share.parse(arguments.shards)
    if arguments.dry_run:
        for stage in stages(experiment) if arguments.command == "run" else [Stage(arguments.command)]:
            overrides = [*overrides_of(rest), *stage.overrides.items()]
            here = load_experiment(Path(arguments.config), overrides) if stage.overrides else experiment
            _function(stage.command)(here, **options)
        if arguments.command == "run":
            say_estimate(experiment)
        return None
    from llmdistill.objectstore.copies import bring, keep
    from llmdistill.runs.progress import console, working
    from llmdistill.runs.watch import watched

    talks = arguments.command == "chat"
    console.quiet = console.quiet or (experiment.watch.log == "json" and not talks)  # what is not a line of a stage
    watching = watched(arguments.command, experiment.output, experiment.watch, getattr(arguments, "shards", None))
    with nullcontext() if talks else watching, nullcontext() if talks else working(arguments.command, "starting"):
        if experiment.store is not None:
            bring(experiment, arguments.command)
        _function(arguments.command)(experiment, **options)
        if experiment.store is not None:
            keep(experiment, arguments.command)
    return None


def _function(command: str) -> Any:
    module, function = _MODULES.get(command, (f"llmdistill.stages.{command}", command))
    return getattr(importlib.import_module(module), function)


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        prog="llmdistill",
        description="Distil a large language model into a small one with synthetic data.",
        epilog="`llmdistill COMMAND --help` lists every key of the configuration that the command reads.",
        allow_abbrev=False,
    )
    parser.add_argument("--version", action="version", version=f"llmdistill {__version__}")
    commands = parser.add_subparsers(dest="command", metavar="COMMAND", title="commands")
    for name, (help_text, sections) in STAGES.items():
        command = commands.add_parser(
            name,
            help=help_text,
            description=help_text[0].upper() + help_text[1:] + ".",
            usage=f"llmdistill {name} CONFIG.yaml [--KEY VALUE ...] [--dry-run]" + _USAGE.get(name, ""),
            epilog=_keys_help(sections),
            formatter_class=argparse.RawDescriptionHelpFormatter,
            allow_abbrev=False,
        )
        if name == "report":
            command.add_argument("config", nargs="+", metavar="CONFIG.yaml", help="the experiment, or the outputs of several")
            command.add_argument("--out", metavar="FILE.html", help="of several: where the page goes (default comparison.html)")
        else:
            command.add_argument("config", metavar="CONFIG.yaml", help="the experiment")
        command.add_argument(
            "--dry-run", action="store_true", help="show the resolved configuration and what would be done; load no model"
        )
        if name in _SHARED:
            command.add_argument("--shards", metavar="I/N", help="make only the shards of the I-th of N workers")
    inspect = commands.add_parser("inspect", help="show what is in a dataset", allow_abbrev=False)
    inspect.add_argument("directory", metavar="DIR", help="the dataset's directory")
    inspect.add_argument("--verify", action="store_true", help="also read every shard and check it against its checksum")
    for name, text in (
        ("status", "show how far a run is"),
        ("cancel", "end submitted jobs; what is finished stays"),
    ):
        of_jobs = commands.add_parser(name, help=text, allow_abbrev=False)
        of_jobs.add_argument("directory", metavar="RUN", help="the output of the experiment")
    help_text = "upload a finished dataset or student to the Hugging Face Hub"
    push = commands.add_parser(
        "push",
        help=help_text,
        description=help_text[0].upper() + help_text[1:] + ", whole and in one commit.",
        epilog="The token is that of HF_TOKEN or of `hf auth login`.",
        allow_abbrev=False,
    )
    push.add_argument("directory", metavar="DIR", help="what `generate`, `curate` or `train` wrote")
    push.add_argument("repo_id", metavar="REPO_ID", help="user/name or organisation/name; created if it is not there")
    push.add_argument("--private", action="store_true", help="create it as private; an existing public one is refused")
    push.add_argument("--revision", metavar="BRANCH", help="another branch than main; created if it is not there")
    push.add_argument("--dry-run", action="store_true", help="check the directory and list what would be uploaded; no network")
    _add_convert(commands)
    return parser


def _add_convert(commands: Any) -> None:
    text = "write a dataset in the format of DistillKit, of axolotl, as JSONL or as preference pairs, or read one"
    convert = commands.add_parser(
        "convert", help=text, description=f"{text[0].upper()}{text[1:]}; docs/formats.md describes them.", allow_abbrev=False
    )
    formats = ("distillkit", "axolotl", "jsonl")
    convert.add_argument(
        "directory", metavar="SRC", help="with --to a finished dataset; with --from a file or a directory of them"
    )
    convert.add_argument("out", metavar="OUT", help="the directory to make; it must be empty, or not be there")
    direction = convert.add_mutually_exclusive_group(required=True)
    direction.add_argument("--to", choices=(*formats, "preferences"), help="the format to write")
    direction.add_argument("--from", dest="form", choices=formats, help="the format to read")
    convert.add_argument("--teacher", metavar="MODEL", help="with --from: the model whose tokenizer the files were made with")
    convert.add_argument("--k", type=int, metavar="N", help="with --from: keep the N most likely targets of each position")
    convert.add_argument(
        "--exact-k",
        type=int,
        metavar="N",
        help="with --to distillkit: keep N log-probabilities a position as they are and the others as a curve; all if not given",
    )


def _keys_help(sections: tuple[str, ...]) -> str:
    rows = [
        (f"--{key}", kind, text)
        for key, kind, text in keys()
        if key in ("output", "seed", "watch.log", "watch.metrics")
        or any(not section or key == section or key.startswith(f"{section}.") for section in sections)
    ]
    lines = [f"  {key} {kind}\n      {text}" for key, kind, text in rows]
    return "every key of the configuration, in the file or as an override:\n" + "\n".join(lines)


def _is_first() -> bool:
    """Whether this is the process that speaks for all that `torchrun` started on this machine."""
    return os.environ.get("LOCAL_RANK", "0") == "0"


def _leave_it_to_the_first() -> None:
    """Where many processes find the same fault the first says so, upon which torchrun ends the others.

    What another alone has found it says itself, after a while.
    """
    if not _is_first():
        signal.signal(signal.SIGTERM, lambda signum, frame: os._exit(2))
        time.sleep(_PATIENCE)


def _preempted(signum: int, frame: Any) -> NoReturn:
    """SIGTERM: finished shards and checkpoints are on disk; status 143 tells the scheduler to start us again."""
    if _is_first():
        os.write(2, b"terminated; finished work is kept, the same command goes on from there\n")
    sys.exit(143)
