"""The section `teacher` of the experiment, and the engines that can run a teacher."""

from dataclasses import dataclass
from typing import Literal

from pydantic import Field, model_validator

from llmdistill.config.machine import Runtime
from llmdistill.config.section import Dtype, PassedOn, Section, ServerUrl

EngineName = Literal["vllm", "server", "transformers"]
DEFAULT_ENGINE: EngineName = "vllm"


@dataclass(frozen=True)
class Abilities:
    """What an engine can do."""

    implementation: str
    """Module and class of a `teachers.Engine`."""
    determinism: str
    """What a second run reproduces, for `dataset.json`."""
    package: str | None = None
    """The package that has to be installed, from the extra `generate`."""
    remote: bool = False
    """Whether it is a server at `teacher.url`, which decides the model and the precision itself."""
    whole_distribution: bool = False
    """Whether it gives full distributions, so that those of several models can be averaged as they come."""
    any_token: bool = False
    """Whether it gives the log-probabilities of any tokens in finished text, so that several models can be averaged in turn."""
    repeats: bool = True
    """Whether it can return a token more than once per position."""
    grammar: bool = False
    """Whether it supports constrained decoding by a JSON schema."""
    continuous_batching: bool = True
    """Whether a finished sequence is immediately replaced by the next."""
    runtime: Runtime = "torch"
    """The library whose view of the device decides the precision for `teacher.dtype: auto`."""


_BATCHED = "rows and ids are the same on every run; text and last bits of the numbers depend on how requests were batched"
ENGINES: dict[EngineName, Abilities] = {
    "vllm": Abilities(
        "llmdistill.teachers.vllm:VllmEngine", _BATCHED, package="vllm", grammar=True, any_token=True, runtime="vllm"
    ),
    "server": Abilities("llmdistill.teachers.server:ServerEngine", _BATCHED, remote=True, repeats=False, grammar=True),
    "transformers": Abilities(
        "llmdistill.teachers.transformers:TransformersEngine",
        "bit-exact: the same configuration, machine, versions and number of threads give the same bytes",
        whole_distribution=True,
        any_token=True,
        continuous_batching=False,
    ),
}
"""A new engine is a module in `teachers`, a name above and an entry here."""


def engines_with(ability: str) -> str:
    """The names of the engines with an ability, in words."""
    return " and ".join(name for name, abilities in ENGINES.items() if getattr(abilities, ability))


class Member(Section):
    """One more teacher of an ensemble, with the same tokenizer."""

    model: str
    """Model directory or name on the Hugging Face Hub."""
    revision: str | None = None
    """Branch, tag or commit on the Hub."""
    weight: float = Field(default=1.0, gt=0)
    """Weight of this teacher in the mean, relative to the others."""


class Teacher(Section):
    """The model that writes the text and gives the next-token distributions."""

    model: str
    """Model directory or name on the Hugging Face Hub."""
    revision: str | None = None
    """Branch, tag or commit on the Hub."""
    engine: EngineName = DEFAULT_ENGINE
    """`vllm`: vLLM in the same process, the fastest. `server`: a running vLLM server at `url`. `transformers`: the exact
    reference, without vLLM."""
    url: ServerUrl | None = None
    """Address of the vLLM server, such as http://node7:8000 (engine server). An API key is read from VLLM_API_KEY."""
    served_model_name: str | None = None
    """Name of the model on the server, if it differs from `model` (engine server)."""
    concurrency: int = Field(default=64, ge=1)
    """Concurrent requests (engine server)."""
    timeout: float = Field(default=600, gt=0)
    """Seconds without a response after which a request is retried (engine server)."""
    dtype: Dtype = "auto"
    """Compute precision. `auto`: bfloat16 where the hardware supports it, else float16 (GPU) or float32. All workers of one
    dataset use the precision that the first one chose."""
    max_model_len: int | None = Field(default=None, ge=1)
    """Maximum context length in tokens, prompt and completion together; the model's limit if not set."""
    tensor_parallel_size: int = Field(default=1, ge=1)
    """Number of GPUs that one copy of the model is split over (engine vllm)."""
    batch_size: int = Field(default=16, ge=1)
    """Sequences per batch (engine transformers). Floating-point results depend on it."""
    engine_args: PassedOn = {}
    """Any other argument of `vllm.LLM` (engine vllm)."""
    trust_remote_code: bool = False
    """Run Python code from the model's repository."""
    system: str | None = None
    """System message for the teacher only. It replaces that of the conversation; the student is not given it."""
    template_args: PassedOn = {}
    """Variables of the chat template, such as `{enable_thinking: false}`. The stored prompts are rendered with them."""
    ensemble: list[Member] = []
    """More teachers with the same tokenizer. Soft targets are of the weighted mean of all distributions. Engine transformers
    holds all of them and also samples from the mean; engine vllm loads one after the other, and `model` writes."""
    weight: float = Field(default=1.0, gt=0)
    """Weight of `model` in the mean of the ensemble, relative to the others."""

    @property
    def abilities(self) -> Abilities:
        """What its engine can do."""
        return ENGINES[self.engine]

    @property
    def in_turn(self) -> bool:
        """Whether it is an ensemble whose members are loaded one after the other."""
        return bool(self.ensemble) and not self.abilities.whole_distribution

    @model_validator(mode="after")
    def _an_ensemble_needs_the_probabilities_of_any_token(self) -> "Teacher":
        if self.ensemble and not self.abilities.any_token:
            raise ValueError(
                "an ensemble needs each teacher's probabilities of tokens that another one chose, which only engine "
                f"{engines_with('any_token')} give"
            )
        return self

    @model_validator(mode="after")
    def _targets_are_the_teachers_own(self) -> "Teacher":
        if self.engine_args.get("speculative_config"):
            raise ValueError(
                "engine_args.speculative_config: log-probabilities under speculative decoding are not known to be the "
                "teacher's own; remove it"
            )
        return self

    @model_validator(mode="after")
    def _url_goes_with_a_remote_engine(self) -> "Teacher":
        if self.abilities.remote != (self.url is not None):
            raise ValueError(
                f"engine {engines_with('remote')} needs url, where `vllm serve` listens, and no other engine has one"
            )
        return self
