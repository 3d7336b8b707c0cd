"""The section `route` of the experiment: which of several teachers a row goes to."""

from collections.abc import Mapping
from fnmatch import fnmatchcase
from typing import Any

from pydantic import model_validator

from llmdistill.config.section import Section
from llmdistill.errors import InputError

DEFAULT = "default"  # the teacher of rows that name no other


class Route(Section):
    """Assigns prompts or texts to teachers, by a field of the row or by the file that it comes from."""

    column: str | None = None
    """Field of the row that names its teacher: a column of the file, or a field added by a step of `prompts`. It must be part
    of the row's metadata, not of the prompt."""
    values: dict[str, str] = {}
    """Mapping from values of the column to teachers, for values that are not their names: `{algebra: math, geometry: math}`."""
    files: dict[str, str] = {}
    """Mapping from the file that a row comes from, as a path or a glob such as `logs/code-*.jsonl`, to teachers; the first
    match counts."""

    @model_validator(mode="after")
    def _one_way(self) -> "Route":
        if (self.column is None) == (not self.files):
            raise ValueError("needs either column or files")
        if self.values and self.column is None:
            raise ValueError("values needs a column, but the key route.column is missing")
        return self

    @property
    def named(self) -> dict[str, str]:
        """The teachers that it names, by key."""
        return {f"{key}.{name}": teacher for key in ("values", "files") for name, teacher in getattr(self, key).items()}

    def teacher_of(self, fields: Mapping[str, Any], file: str, teachers: Mapping[str, Any], origin: str) -> str:
        """The name of a row's teacher.

        Args:
            fields: fields of the row.
            file: the file that it comes from.
            teachers: the teachers by name.
            origin: where the row was read, for messages.

        Raises:
            InputError: if the row lacks the field, or matches no teacher and there is no default.
        """
        if self.column is None:
            name = next((self.files[glob] for glob in self.files if file == glob or fnmatchcase(file, glob)), None)
            what = f"no pattern of route.files matches {file}"
        elif self.column not in fields:
            there = ", ".join(fields) or "no other fields"
            raise InputError(f"{origin}: has no field {self.column} (route.column) besides its conversation, but {there}")
        else:
            value = str(fields[self.column])
            name = self.values.get(value, value if value in teachers else None)
            what = f"{self.column} is {value!r}, which is not one of the teachers {', '.join(teachers)} (route.column)"
        if name is None and DEFAULT not in teachers:
            raise InputError(f"{origin}: {what}, and there is no teachers.{DEFAULT}")
        return name or DEFAULT
