"""The sections `generate` and `score` of the experiment: how the teacher writes text, and which existing text it scores."""

from typing import Any, Literal

from pydantic import Field, model_validator

from llmdistill.config.prompts import Sampling
from llmdistill.config.rows import RowReading
from llmdistill.config.section import check_schema


class Generate(Sampling):
    """How the teacher generates completions."""

    samples: int = Field(default=1, ge=1)
    """Completions per prompt."""
    min_tokens: int = Field(default=0, ge=0)
    """Minimum completion length in tokens."""
    json_schema: dict[str, Any] | None = None
    """JSON schema that every completion follows (constrained decoding in vLLM). Soft targets are computed without the
    constraint."""
    thinking: Literal["kept", "masked", "removed"] = "kept"
    """How to handle reasoning traces. `kept`: train on them like the answer. `masked`: keep them in the context, but exclude
    them from the loss. `removed`: delete them; the teacher then scores the answer directly after the prompt."""
    thinking_end: str = Field(default="</think>", min_length=1)
    """String that ends a reasoning trace."""
    rows_per_shard: int = Field(default=1024, ge=1)
    """Maximum number of rows in a Parquet shard. Shards are the unit of work and of resuming."""

    @property
    def shows_everything(self) -> bool:
        """Whether sampling can produce any text, so that importance weights can correct it to temperature 1."""
        whole = self.min_tokens == 0 and self.json_schema is None and self.thinking == "kept"
        return whole and self.temperature > 0 and self.top_p == 1 and self.top_k == 0

    @property
    def unused(self) -> set[str]:
        """Fields left at their defaults, which `dataset.json` does not record."""
        fields = ("min_tokens", "json_schema", "thinking")
        left = {name for name in fields if getattr(self, name) == type(self).model_fields[name].default}
        is_default = self.thinking_end == type(self).model_fields["thinking_end"].default
        return left | ({"thinking_end"} if self.thinking == "kept" and is_default else set())

    @property
    def rereads(self) -> bool:
        """Whether the teacher scores its text again, as it was generated under a different context or constraint."""
        return self.json_schema is not None or self.thinking == "removed"

    @model_validator(mode="after")
    def _lengths_fit(self) -> "Generate":
        if self.min_tokens > self.max_tokens:
            raise ValueError(f"min_tokens is {self.min_tokens:,}, more than max_tokens {self.max_tokens:,}")
        if self.json_schema is not None and self.thinking != "kept":
            raise ValueError(
                "json_schema constrains the completion from its first token, so there is no reasoning trace to mask or remove"
            )
        check_schema(self.json_schema)
        return self


class Score(RowReading):
    """Existing text that the teacher scores. With this section, `run` scores instead of generating."""

    source: str
    """JSONL, JSON, CSV or Parquet files whose rows hold conversations that end with an answer, in any known format, or `text`
    (trained on from its second token); or the directory of a dataset, whose token ids are used unchanged."""
    turns: Literal["last", "all"] = "last"
    """Assistant turns to train on: the `last` one, or `all`, each as a row with everything before it as the prompt."""
    tool_calls: bool = True
    """Whether to train on turns that call a tool. Either way, they are part of the prompts of later turns."""
