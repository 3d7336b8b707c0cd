"""The keys of the configuration as shown by `--help`: by section, wrapped to the terminal, only the common ones or all."""

import re
import shutil
import textwrap
from collections.abc import Iterable
from itertools import groupby

from llmdistill.config.reading import keys

Row = tuple[str, str, str]  # a key, its type and its help
# Keys outside sections, which every command reads.
_GENERAL = ("output", "store", "seed", "watch.log", "watch.metrics")
# By section; the empty name is for keys outside of one.
_COMMON = {
    "": (
        "output",
        "store",
        "seed",
        "curate",
    ),
    "teacher": (
        "model",
        "engine",
        "url",
        "dtype",
        "max_model_len",
        "tensor_parallel_size",
        "engine_args",
    ),
    "prompts": (
        "source",
        "template",
        "task",
        "limit",
        "steps",
    ),
    "generate": (
        "samples",
        "temperature",
        "max_tokens",
        "rows_per_shard",
    ),
    "score": (
        "source",
        "turns",
    ),
    "targets": (
        "kind",
        "n",
        "k",
    ),
    "student": (
        "model",
        "prune.layers",
        "prune.by",
        "lora.r",
        "lora.alpha",
        "quantize",
    ),
    "train": (
        "dataset",
        "loss",
        "alpha",
        "temperature",
        "validation",
        "compare_text_only",
        "args",
    ),
    "eval": (
        "held_out",
        "tasks",
        "task_limit",
        "speed",
        "batch_size",
        "dtype",
    ),
    "export": (
        "formats",
        "rounding",
        "model",
    ),
    "rounds": ("n",),
    "refresh": (
        "replay",
        "margin",
    ),
    "jobs": (
        "slurm.gpus",
        "slurm.partition",
        "slurm.time",
        "slurm.workers",
        "ray.address",
        "skypilot.bucket",
        "kubernetes.image",
    ),
}
COMMON = frozenset(f"{section}.{name}".lstrip(".") for section, names in _COMMON.items() for name in names)
_NARROWEST, _WIDEST = 60, 110


def keys_help(sections: tuple[str, ...], everything: bool) -> str:
    """Help text for the keys that a command reads.

    Args:
        sections: sections of the configuration, or single keys; the empty name means all.
        everything: whether to include keys that few users need.
    """
    known = [row for row in keys() if row[0] in _GENERAL or any(_is_in(row[0], section) for section in sections)]
    common = {(_without_scheduler(row[0]), *row[1:]) for row in known if row[0] in COMMON}
    read = merged(known)
    shown = [row for row in read if everything or (_without_scheduler(row[0]), *row[1:]) in common]
    width = min(max(shutil.get_terminal_size().columns, _NARROWEST), _WIDEST)
    lines = ["", "configuration keys, in the file or as overrides (--KEY VALUE):"]
    for name, rows in groupby(shown, key=lambda row: row[0].partition(".")[0] if "." in row[0] else ""):
        lines += ["", f"{name}:" if name else "general:"]
        for key, kind, text in rows:
            lines.append(f"  --{key} {kind}")
            lines += textwrap.wrap(text, width, initial_indent=" " * 6, subsequent_indent=" " * 6)
    if len(shown) < len(read):
        lines += ["", f"{len(read) - len(shown)} more keys: --help-all"]
    return "\n".join(lines) + "\n"


def merged(rows: Iterable[Row]) -> list[Row]:
    """Rows of keys, with those that several schedulers share merged into one: `jobs.{slurm,ray}.cpus`."""
    alike: dict[Row, list[str]] = {}
    for key, kind, text in rows:
        alike.setdefault((_without_scheduler(key), kind, text), []).append(key)
    return [(_together(found), kind, text) for (_, kind, text), found in alike.items()]


def _together(alike: list[str]) -> str:
    if len(alike) == 1:
        return alike[0]
    rest = alike[0].split(".", 2)[2]
    return f"jobs.{{{','.join(key.split('.')[1] for key in alike)}}}.{rest}"


def _without_scheduler(key: str) -> str:
    return re.sub(r"^jobs\.[^.]+\.", "jobs.*.", key)


def _is_in(key: str, section: str) -> bool:
    return not section or key == section or key.startswith(f"{section}.")
