"""The sections `generate` and `score` of the experiment: how the teacher writes, and what it reads."""

from typing import Any, Literal

from pydantic import Field, model_validator

from llmdistill.config.prompts import Sampling
from llmdistill.config.section import Section, check_schema


class Generate(Sampling):
    """How the teacher writes."""

    samples: int = Field(default=1, ge=1)
    """Completions a prompt."""
    min_tokens: int = Field(default=0, ge=0)
    """Tokens before which no completion ends."""
    json_schema: dict[str, Any] | None = None
    """A JSON schema that every completion follows, by vLLM's grammar. The targets are read afterwards, without the grammar."""
    thinking: Literal["kept", "masked", "removed"] = "kept"
    """What becomes of a reasoning trace: `kept`, learned as the rest; `masked`, not learned but before the answer's eyes;
    `removed`, and the teacher reads the answer alone after the prompt."""
    thinking_end: str = Field(default="</think>", min_length=1)
    """Where a reasoning trace ends and the answer begins."""
    rows_per_shard: int = Field(default=1024, ge=1)
    """Rows in one Parquet shard, the unit of work and of resuming."""

    @property
    def shows_everything(self) -> bool:
        """Whether every text can come out, so that sampled ones can stand for the teacher's at temperature 1."""
        whole = self.min_tokens == 0 and self.json_schema is None and self.thinking == "kept"
        return whole and self.temperature > 0 and self.top_p == 1 and self.top_k == 0

    @property
    def unused(self) -> set[str]:
        """Fields of what is not asked for, which need not be said of a dataset."""
        fields = ("min_tokens", "json_schema", "thinking")
        left = {name for name in fields if getattr(self, name) == type(self).model_fields[name].default}
        return left | ({"thinking_end"} if self.thinking == "kept" else set())

    @property
    def rereads(self) -> bool:
        """Whether what is stored has to be read again, because the teacher wrote it seeing something else."""
        return self.json_schema is not None or self.thinking == "removed"

    @model_validator(mode="after")
    def _lengths_fit(self) -> "Generate":
        if self.min_tokens > self.max_tokens:
            raise ValueError(f"min_tokens is {self.min_tokens:,}, more than max_tokens {self.max_tokens:,}")
        if self.json_schema is not None and self.thinking != "kept":
            raise ValueError("json_schema begins with the first token, so there is no thinking to be masked or removed")
        check_schema(self.json_schema)
        return self


class Score(Section):
    """Finished text that the teacher reads instead of writing any; `run` scores where this section is given."""

    source: str
    """A JSONL file whose lines hold `messages` up to and with the assistant's answer, or `prompt` and `completion`; or the
    directory of a dataset, whose exact token ids are read again. Lines that hold `text` alone are learned from their second
    token on."""
    turns: Literal["last", "all"] = "last"
    """Which of the assistant's turns are learned: `all` are rows of their own, each with what came before it as its prompt."""
    tool_calls: bool = True
    """Whether turns that call a tool are learned; where they are not, they still stand before others."""
