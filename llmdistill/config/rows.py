"""How the rows of a user's own files are read: keys that sections with a `source` share."""

from typing import Literal, get_args

from pydantic import Field

from llmdistill.config.section import Section

Format = Literal[
    "messages", "sharegpt", "conversations", "hh-rlhf", "preference", "oasst", "kto", "completion", "mt-bench", "alpaca",
    "question", "prompt", "prompts", "input", "text",
]  # fmt: skip
FORMATS: tuple[str, ...] = get_args(Format)
Role = Literal["system", "user", "assistant", "tool"]


class RowReading(Section):
    """How rows become conversations."""

    format: Literal["auto"] | Format = "auto"
    """Form of the rows; `auto` recognises it row by row, by the names of the fields."""
    columns: dict[str, str] = {}
    """Names of the fields in the file, by the names that a form knows: `{prompt: question_text, completion: best_answer}`."""
    roles: dict[str, Role] = {}
    """Who speaks, for names that are not known: `{agent: assistant}`."""
    on_bad_rows: Literal["skip", "refuse"] = "skip"
    """What becomes of rows that cannot be read: `skip` leaves them out and counts them by reason; `refuse` stops at the first."""
    max_bad_rows: float = Field(default=0.1, ge=0, le=1)
    """Share of rows that cannot be read at which the file is taken for something else, and refused."""
