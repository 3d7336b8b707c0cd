"""The files that come with the package: prompts, tasks and configurations, and the pages of the documentation.

In the repository they stand at its top, where a reader finds them; the wheel carries them inside the package.
"""

from pathlib import Path

_PACKAGE = Path(__file__).parent.parent
SHIPPED = _PACKAGE / "shipped" if (_PACKAGE / "shipped").is_dir() else _PACKAGE.parent
"""The directory that holds `configs`, `docs` and `prompts`."""


def find(path: str | Path) -> Path:
    """Where a file is that an experiment names: in the working directory or, if it is not there, in the package.

    Args:
        path: as the experiment says it. Only `prompts/…` and `configs/…` are looked for in the package, such as
            `prompts/instruct.yaml` and `configs/tasks/facts.yaml`. A path that is in neither place comes back as it is.
    """
    named = Path(path)
    shipped = SHIPPED / named
    is_ours = named.parts[:1] in (("prompts",), ("configs",))
    return shipped if is_ours and not named.exists() and shipped.is_file() else named


def page(name: str) -> Path:
    """Where a page of the documentation is on this machine, for messages: `page("formats")`."""
    return SHIPPED / "docs" / f"{name}.md"
