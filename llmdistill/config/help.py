"""The keys of the configuration as `--help` shows them: by section, wrapped to the terminal, the common ones only or all."""

import shutil
import textwrap
from itertools import groupby

from llmdistill.config.reading import keys

# Keys that stand outside the sections and are read by every command.
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
        "slurm.partition",
        "slurm.gpus",
        "slurm.time",
        "slurm.workers",
        "ray.workers",
        "ray.address",
        "skypilot.workers",
        "kubernetes.workers",
        "kubernetes.image",
    ),
}
COMMON = frozenset(f"{section}.{name}".lstrip(".") for section, names in _COMMON.items() for name in names)
_NARROWEST, _WIDEST = 60, 110


def keys_help(sections: tuple[str, ...], everything: bool) -> str:
    """The keys that a command reads.

    Args:
        sections: of the configuration, or single keys; the empty name is all of them.
        everything: whether keys that few need are among them.
    """
    known = list(keys())
    read = [row for row in known if row[0] in _GENERAL or any(_is_in(row[0], section) for section in sections)]
    shown = [row for row in read if everything or row[0] in COMMON]
    width = min(max(shutil.get_terminal_size().columns, _NARROWEST), _WIDEST)
    lines = ["", "keys of the configuration, in the file or as an override (--KEY VALUE):"]
    for name, rows in groupby(shown, key=lambda row: row[0].partition(".")[0] if "." in row[0] else ""):
        lines += ["", f"{name}:" if name else "general:"]
        for key, kind, text in rows:
            lines.append(f"  --{key} {kind}")
            lines += textwrap.wrap(text, width, initial_indent=" " * 6, subsequent_indent=" " * 6)
    if len(shown) < len(read):
        lines += ["", f"{len(read) - len(shown)} more keys: --help-all"]
    return "\n".join(lines) + "\n"


def _is_in(key: str, section: str) -> bool:
    return not section or key == section or key.startswith(f"{section}.")
