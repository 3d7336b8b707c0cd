"""How the rows of a user's own files are read: keys shared by the sections with a `source`."""

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
    """Format of the rows; `auto` detects it row by row from the field names."""
    columns: dict[str, str] = {}
    """Mapping from standard field names to those in the file: `{prompt: question_text, completion: best_answer}`."""
    roles: dict[str, Role] = {}
    """Mapping from unknown speaker names to roles: `{agent: assistant}`."""
    session: str | None = None
    """Field that identifies the session of a row, such as `metadata.session_id`. All rows of a session are on the same side of
    the held-out split. If not set, recorded requests are grouped by their first user turn."""
    metadata: list[str] = []
    """Fields of recorded requests to keep as metadata, such as `model` or `metadata.topic`. Apart from messages and tools,
    nothing else is stored."""
    on_bad_rows: Literal["skip", "refuse"] = "skip"
    """What to do with unreadable rows. `skip`: leave them out and count them by reason. `refuse`: stop at the first one."""
    max_bad_rows: float = Field(default=0.1, ge=0, le=1)
    """Share of unreadable rows at which the file is assumed to have a different format and is refused."""

    @field_validator("metadata")
    @classmethod
    def _no_secrets(cls, names: list[str]) -> list[str]:
        for name in names:
            if any(is_secret(part) for part in name.split(".")):
                raise ValueError(f"{name} looks like a secret, which must not be stored")
            if name in ("messages", "prompt", "completion", "tools"):
                raise ValueError(f"{name} is part of the conversation, which is always stored")
        return names

    @model_validator(mode="after")
    def _requests_have_no_columns(self) -> "RowReading":
        if self.format == "requests" and self.columns:
            raise ValueError("the fields of recorded requests are fixed; remove either columns or format: requests")
        return self
