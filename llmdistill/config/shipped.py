"""The files that come with the package: prompts, tasks and configurations, and the pages of the documentation.

In the repository they are at the top level, where readers find them; the wheel contains them in the package.
"""

from pathlib import Path

_PACKAGE = Path(__file__).parent.parent
SHIPPED = _PACKAGE / "shipped" if (_PACKAGE / "shipped").is_dir() else _PACKAGE.parent
"""The directory that holds `configs`, `docs` and `prompts`."""


def find(path: str | Path) -> Path:
    """Locate a file that an experiment names: in the working directory or, failing that, in the package.

    Args:
        path: the path as given in the experiment. Only `prompts/…` and `configs/…` are looked up in the package, such as
            `prompts/instruct.yaml` and `configs/tasks/facts.yaml`. A path found in neither place is returned unchanged.
    """
    named = Path(path)
    shipped = SHIPPED / named
    is_ours = named.parts[:1] in (("prompts",), ("configs",))
    return shipped if is_ours and not named.exists() and shipped.is_file() else named


def page(name: str) -> Path:
    """Location of a documentation page on this machine, for messages: `page("formats")`."""
    return SHIPPED / "docs" / f"{name}.md"
