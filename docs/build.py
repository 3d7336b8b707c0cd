"""What the documentation is built with: the tables of configuration.md, and the pages that lie outside of docs/.

`python docs/build.py` writes the tables from the docstrings in llmdistill/config.
"""

import re
from itertools import groupby
from pathlib import Path
from typing import Any, get_args

from llmdistill.config import Experiment, Section, keys
from llmdistill.config.help import merged

ROOT = Path(__file__).parent.parent
PAGE = ROOT / "docs/configuration.md"
_START = "<!-- Written by `python docs/build.py` from here on. -->\n"
# Sections that the configuration has more than once: the keys of the second are listed under the first.
_REPEATED = {
    "teachers.NAME": "teacher",
    "curate.N.judge.teacher": "teacher",
    "curate.N.best_of.judge": "curate.N.judge",
    "eval.win_rate.judge": "teacher",
}


def on_files(files: Any, config: Any) -> Any:
    """MkDocs' hook: CONTRIBUTING.md, SECURITY.md and CHANGELOG.md are pages of the site, too."""
    from mkdocs.structure.files import File

    for name in ("CONTRIBUTING.md", "SECURITY.md", "CHANGELOG.md"):
        files.append(File.generated(config, name.lower(), abs_src_path=str(ROOT / name)))
    return files


def configuration_page() -> str:
    """configuration.md as it should be: what was written by hand, and a table for each section."""
    by_hand, _, _ = PAGE.read_text(encoding="utf-8").partition(_START)
    return by_hand + _START + "".join(_tables())


def _tables() -> list[str]:
    parts = []
    listed = [row for row in keys() if not any(row[0].startswith(f"{again}.") for again in _REPEATED)]
    for name, rows in groupby(merged(listed), key=lambda row: row[0].partition(".")[0] if "." in row[0] else _top(row[0])):
        table = [_row(*row) for row in rows]
        for again, first in _REPEATED.items():
            if again.startswith(f"{name}."):
                table.append(f"| `{again}.…` | | | the keys of [`{first}`](#{first.partition('.')[0]}) |")
        parts.append(f"\n## {name}\n\n{_description(name)}| key | type | default | meaning |\n| --- | --- | --- | --- |\n")
        parts.append("\n".join(table) + "\n")
    return parts


def _top(key: str) -> str:
    """The heading for a key outside of a section; a list of steps is a section of its own."""
    return key if any(other.startswith(f"{key}.") for other, _, _ in keys()) else "General"


def _row(key: str, kind: str, text: str) -> str:
    match = re.fullmatch(r"(.*) \((?:(required)(?: with (.*))?|default (.*))\)", text)
    _, needed, section, value = match.groups() if match else ("", "", "", "")
    default = f"required with `{section}`" if section else needed or (f"`{value}`" if value else "")
    meaning = re.sub(r"docs/(\w+\.md)", r"[docs/\1](\1)", match[1] if match else text).replace("|", "\\|")
    return f"| `{key}` | {kind.lower().replace('|', ' or ')} | {default} | {meaning} |"


def _description(name: str) -> str:
    """What the configuration says of a section, and else the section of itself."""
    if name not in Experiment.model_fields:
        return ""
    if text := Experiment.help_texts().get(name):
        return f"{text}\n\n"
    field = Experiment.model_fields[name]
    for found in (field.annotation, *get_args(field.annotation)):
        if isinstance(found, type) and issubclass(found, Section):
            return f"{found.__doc__}\n\n"
    raise ValueError(f"{name}: has no description")


if __name__ == "__main__":
    PAGE.write_text(configuration_page(), encoding="utf-8")
