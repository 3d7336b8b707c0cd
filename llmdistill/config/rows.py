"""How the rows of a user's own files are read: keys that sections with a `source` share."""

from typing import Literal, get_args

from pydantic import Field, field_validator, model_validator

from llmdistill.config.section import Section, is_secret

Format = Literal[
    "requests", "messages", "sharegpt", "conversations", "hh-rlhf", "preference", "oasst", "kto", "completion", "mt-bench",
    "alpaca", "question", "prompt", "prompts", "input", "text",
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
    session: str | None = None
    """Field that names the session of a row, such as `metadata.session_id`. All rows of a session are on the same side of the
    held-out split. Without it, recorded requests are grouped by their first user turn."""
    metadata: list[str] = []
    """Fields of recorded requests to keep as metadata, such as `model` or `metadata.topic`. Nothing else beside the messages and
    the tools is stored."""
    on_bad_rows: Literal["skip", "refuse"] = "skip"
    """What becomes of rows that cannot be read: `skip` leaves them out and counts them by reason; `refuse` stops at the first."""
    max_bad_rows: float = Field(default=0.1, ge=0, le=1)
    """Share of rows that cannot be read at which the file is taken for something else, and refused."""

    @field_validator("metadata")
    @classmethod
    def _no_secrets(cls, names: list[str]) -> list[str]:
        for name in names:
            if any(is_secret(part) for part in name.split(".")):
                raise ValueError(f"{name} looks like a secret, which must not be stored")
            if name in ("messages", "prompt", "completion", "tools"):
                raise ValueError(f"{name} is a part of the conversation, which is always stored")
        return names

    @model_validator(mode="after")
    def _requests_have_no_columns(self) -> "RowReading":
        if self.format == "requests" and self.columns:
            raise ValueError("columns: the fields of recorded requests are known; remove it, or format requests")
        return self
