"""The section `teacher` of the experiment, and the engines that a teacher may run in."""

from dataclasses import dataclass
from typing import Literal

from pydantic import Field, model_validator

from llmdistill.config.machine import Runtime
from llmdistill.config.section import Dtype, PassedOn, Section

EngineName = Literal["vllm", "server", "transformers"]
DEFAULT_ENGINE: EngineName = "vllm"


@dataclass(frozen=True)
class Abilities:
    """What an engine can do."""

    implementation: str
    """Module and class of a `teachers.Engine`."""
    determinism: str
    """What a second run repeats, for `dataset.json`."""
    package: str | None = None
    """What has to be installed, of the extra `generate`."""
    remote: bool = False
    """Whether it runs elsewhere, at `teacher.url`: the model and what it computes in are those that it was started with."""
    whole_distribution: bool = False
    """Whether it has the whole distribution of each model at every token, so that several can be averaged."""
    repeats: bool = True
    """Whether it can name a token more than once at a position."""
    grammar: bool = False
    """Whether it can keep to a JSON schema while it writes."""
    continuous_batching: bool = True
    """Whether a sequence that has ended makes room for the next at once."""
    runtime: Runtime = "torch"
    """Whose view of the device decides what it computes in where `teacher.dtype` is auto."""


_BATCHED = "rows and ids are the same on every run; text and last bits of the numbers depend on how requests were batched"
ENGINES: dict[EngineName, Abilities] = {
    "vllm": Abilities("llmdistill.teachers.vllm:VllmEngine", _BATCHED, package="vllm", grammar=True, runtime="vllm"),
    "server": Abilities("llmdistill.teachers.server:ServerEngine", _BATCHED, remote=True, repeats=False, grammar=True),
    "transformers": Abilities(
        "llmdistill.teachers.transformers:TransformersEngine",
        "bit-exact: the same configuration, machine, versions and number of threads give the same bytes",
        whole_distribution=True,
        continuous_batching=False,
    ),
}
"""A new engine is a module in `teachers`, and its name above and its entry here."""


def engines_with(ability: str) -> str:
    """The names of the engines that have it, in words."""
    return " and ".join(name for name, abilities in ENGINES.items() if getattr(abilities, ability))


class Member(Section):
    """One more teacher, with the same tokenizer."""

    model: str
    """Model directory or name on the Hugging Face Hub."""
    revision: str | None = None
    """Branch, tag or commit on the Hub."""
    weight: float = Field(default=1.0, gt=0)
    """Its share of the mean, relative to those of the others."""


class Teacher(Section):
    """The model that writes the text and gives its distribution at every token."""

    model: str
    """Model directory or name on the Hugging Face Hub."""
    revision: str | None = None
    """Branch, tag or commit on the Hub."""
    engine: EngineName = DEFAULT_ENGINE
    """`vllm` for speed; `server` for one that runs already, at `url`; `transformers` is the exact reference, without vLLM."""
    url: str | None = None
    """Where `vllm serve` listens, such as http://node7:8000 (engine server). Its key, if any, is that of VLLM_API_KEY."""
    served_model_name: str | None = None
    """The server's name for the model, if it is another than `model` (engine server)."""
    concurrency: int = Field(default=64, ge=1)
    """Requests on their way at a time (engine server)."""
    timeout: float = Field(default=600, gt=0)
    """Seconds without an answer after which a request is sent again (engine server)."""
    dtype: Dtype = "auto"
    """What it computes in; `auto`: bfloat16 where this machine is good at it, else float16 (GPU) or float32. Workers of one
    dataset compute in what the first of them chose."""
    max_model_len: int | None = Field(default=None, ge=1)
    """Longest context in tokens, prompt and completion together; the model's own limit if not given."""
    tensor_parallel_size: int = Field(default=1, ge=1)
    """GPUs that hold one copy of the model (engine vllm)."""
    batch_size: int = Field(default=16, ge=1)
    """Sequences decoded together (engine transformers); part of what makes its floating-point results repeatable."""
    engine_args: PassedOn = {}
    """Any argument of `vllm.LLM`, passed through (engine vllm)."""
    trust_remote_code: bool = False
    """Run Python code that the model's repository ships."""
    system: str | None = None
    """A system message that the teacher is given in the place of the conversation's own, and the student is not."""
    ensemble: list[Member] = []
    """More teachers with the same tokenizer: the mean of all their distributions is the teacher's (engine transformers)."""
    weight: float = Field(default=1.0, gt=0)
    """The share of `model` in that mean, relative to those of the others."""

    @property
    def abilities(self) -> Abilities:
        """What its engine can do."""
        return ENGINES[self.engine]

    @model_validator(mode="after")
    def _an_ensemble_needs_whole_distributions(self) -> "Teacher":
        if self.ensemble and not self.abilities.whole_distribution:
            raise ValueError(
                "an ensemble needs the whole distribution of each teacher, which engine "
                f"{engines_with('whole_distribution')} has and {self.engine} has not; to let one teacher write with vLLM, "
                "`generate` first and `score` its dataset with the ensemble"
            )
        return self

    @model_validator(mode="after")
    def _url_goes_with_a_remote_engine(self) -> "Teacher":
        if self.abilities.remote != (self.url is not None):
            raise ValueError(
                f"engine {engines_with('remote')} needs url, where `vllm serve` listens, and no other engine has one"
            )
        return self
