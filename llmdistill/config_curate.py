"""The `curate` list of the experiment: a section a step."""

from typing import get_args

from pydantic import Field, model_validator

from llmdistill.section import Section


class FinishReason(Section):
    """Keep rows that ended for one of these reasons."""

    keep: list[str] = ["stop"]
    """`stop`: the teacher ended by itself; `length`: it was cut at `max_tokens`."""


class Length(Section):
    """Keep rows whose completion has a length in this range."""

    min_tokens: int = Field(default=1, ge=0)
    """Fewest completion tokens."""
    max_tokens: int | None = Field(default=None, ge=1)
    """Most completion tokens."""


class Repetition(Section):
    """Keep rows that do not repeat themselves."""

    ngram: int = Field(default=4, ge=1)
    """Length of the token n-grams compared."""
    max_share: float = Field(default=0.5, ge=0, le=1)
    """Largest share of n-grams that may be repeats of an earlier one."""


class Duplicates(Section):
    """Keep the first of rows whose completions have the same text after lower-casing and joining white space."""


class CurateStep(Section):
    """One filter of the `curate` list; exactly one key."""

    finish_reason: FinishReason | None = None
    """By the reason for which a completion ended."""
    length: Length | None = None
    """By the length of the completion."""
    repetition: Repetition | None = None
    """By repeated n-grams."""
    duplicates: Duplicates | None = None
    """By equal completions."""

    @model_validator(mode="after")
    def _one_key(self) -> "CurateStep":
        if len(self.model_fields_set) != 1:
            raise ValueError(f"a step has exactly one key, one of {', '.join(type(self).model_fields)}")
        (name,) = self.model_fields_set
        if getattr(self, name) is None:
            setattr(self, name, type(self).types()[name]())
        return self

    @classmethod
    def types(cls) -> dict[str, type[Section]]:
        """The section under each key."""
        return {name: get_args(field.annotation)[0] for name, field in cls.model_fields.items()}

    @property
    def name(self) -> str:
        """The step's one key."""
        (name,) = self.model_fields_set
        return name

    @property
    def settings(self) -> Section:
        """What stands under that key."""
        settings: Section = getattr(self, self.name)
        return settings
