"""The section `teacher` of the experiment, and the engines that can run a teacher."""

from dataclasses import dataclass
from typing import Literal

from pydantic import Field, model_validator

from llmdistill.config.machine import Runtime
from llmdistill.config.section import Dtype, PassedOn, Section, ServerUrl

EngineName = Literal["vllm", "server", "openai", "anthropic", "transformers"]
DEFAULT_ENGINE: EngineName = "vllm"


# Request fields that the program sets itself to interpret the answer; and those that have their own key, with that key.
_OWN_FIELDS = ("model", "messages", "prompt", "n", "stream", "echo", "logprobs", "top_logprobs", "system")
_FIELDS_WITH_KEYS = {name: f"generate.{name}" for name in ("max_tokens", "min_tokens", "temperature", "top_p", "top_k")}
_FIELDS_WITH_KEYS |= {"response_format": "generate.json_schema", "seed": "seed"}

# Arguments of `vllm.LLM` that the program sets, as they determine the model and the meaning of its log-probabilities; with their
# key, if they have one.
_OWN_ARGUMENTS = dict.fromkeys(("tokenizer", "max_logprobs", "logprobs_mode", "worker_extension_cls", "seed"), "")
_OWN_ARGUMENTS |= {
    name: f"teacher.{name}"
    for name in ("model", "revision", "dtype", "tensor_parallel_size", "trust_remote_code", "max_model_len")
} | {"tokenizer_revision": "teacher.revision", "code_revision": "teacher.revision"}  # fmt: skip
# Arguments that affect only speed or memory. All others may change what it computes.
ARGUMENTS_OF_SPEED = (
    "async_scheduling", "block_size", "compilation_config", "cpu_offload_gb", "disable_custom_all_reduce", "disable_log_stats",
    "distributed_executor_backend", "download_dir", "enable_chunked_prefill", "enable_expert_parallel",
    "enable_prefix_caching", "enable_sleep_mode", "enforce_eager", "gpu_memory_utilization", "kv_cache_memory_bytes",
    "max_num_batched_tokens", "max_num_seqs", "max_parallel_loading_workers", "pipeline_parallel_size", "scheduling_policy",
    "swap_space",
)  # fmt: skip


@dataclass(frozen=True)
class Abilities:
    """What an engine can do."""

    implementation: str
    """Module and class of the `teachers.Engine`."""
    determinism: str
    """What another run reproduces, for `dataset.json`."""
    package: str | None = None
    """Package that must be installed."""
    extra: str = "generate"
    """Extra that installs it."""
    remote: bool = False
    """Whether it is a server at `teacher.url`, which chooses the model and the precision itself."""
    address: str | None = None
    """Address of a remote engine if `teacher.url` is not set."""
    key: str | None = None
    """Environment variable with the API key of a remote engine."""
    api: bool = False
    """Whether it takes conversations and returns text, billed per token; token ids are those of `teacher.tokenizer`."""
    logprobs: bool = True
    """Whether it returns log-probabilities."""
    every_kind: bool = True
    """Whether it can select tokens from the full distribution, not only the most likely ones."""
    whole_distribution: bool = False
    """Whether it returns full distributions, so that those of several models can be averaged directly."""
    any_token: bool = False
    """Whether it returns log-probabilities of arbitrary tokens in finished text, so that models can be averaged in turn."""
    repeats: bool = True
    """Whether it can return a token more than once per position."""
    grammar: bool = False
    """Whether it supports constrained decoding by a JSON schema."""
    lowest_temperature: float = 0.0
    """Lowest sampling temperature above 0; the engine would silently raise lower ones to it."""
    continuous_batching: bool = True
    """Whether a finished sequence is immediately replaced by the next."""
    runtime: Runtime = "torch"
    """Library whose view of the device determines the precision for `teacher.dtype: auto`."""


_BATCHED = "rows and ids are the same on every run; text and the last bits of numbers depend on how requests were batched"
_HOSTED = "rows and ids are the same on every run; the text of the hosted model may differ"
ENGINES: dict[EngineName, Abilities] = {
    "vllm": Abilities(
        "llmdistill.teachers.vllm:VllmEngine",
        _BATCHED,
        package="vllm",
        any_token=True,
        grammar=True,
        lowest_temperature=0.01,
        runtime="vllm",
    ),
    "server": Abilities(
        "llmdistill.teachers.server:ServerEngine",
        _BATCHED,
        remote=True,
        key="VLLM_API_KEY",
        repeats=False,
        grammar=True,
        lowest_temperature=0.01,
    ),
    "openai": Abilities(
        "llmdistill.teachers.openai:OpenAIEngine",
        _HOSTED,
        package="openai",
        extra="api",
        remote=True,
        address="https://api.openai.com/v1",
        key="OPENAI_API_KEY",
        api=True,
        every_kind=False,
        repeats=False,
        grammar=True,
    ),
    "anthropic": Abilities(
        "llmdistill.teachers.anthropic:AnthropicEngine",
        _HOSTED,
        package="anthropic",
        extra="anthropic",
        remote=True,
        address="https://api.anthropic.com",
        key="ANTHROPIC_API_KEY",
        api=True,
        logprobs=False,
        every_kind=False,
        repeats=False,
    ),
    "transformers": Abilities(
        "llmdistill.teachers.transformers:TransformersEngine",
        "bit-exact: the same configuration, machine, versions and number of threads give the same bytes",
        whole_distribution=True,
        any_token=True,
        continuous_batching=False,
    ),
}
"""To add an engine: a module in `teachers`, a name above and an entry here."""


def engines_with(ability: str) -> str:
    """Names of the engines with an ability, for messages."""
    names = [name for name, abilities in ENGINES.items() if getattr(abilities, ability)]
    return " and ".join([", ".join(names[:-1]), names[-1]] if len(names) > 1 else names)


class Member(Section):
    """One more teacher of an ensemble, with the same tokenizer."""

    model: str
    """Model directory or name on the Hugging Face Hub."""
    revision: str | None = None
    """Branch, tag or commit on the Hub."""
    weight: float = Field(default=1.0, gt=0)
    """Weight of this teacher in the mean, relative to the others."""


class Price(Section):
    """Prices of the endpoint per million tokens, in any one currency."""

    input: float = Field(ge=0)
    """Price of a million prompt tokens."""
    output: float = Field(ge=0)
    """Price of a million output tokens, including hidden reasoning."""
    cached_input: float | None = Field(default=None, ge=0)
    """Price of a million cached prompt tokens; `input` if not set."""
    batch_share: float = Field(default=0.5, ge=0, le=1)
    """Share of these prices charged for requests sent by `teacher.batch`."""


class Teacher(Section):
    """The model that provides the text and the next-token distributions."""

    model: str
    """Model directory or name on the Hugging Face Hub; with engines openai and anthropic, the endpoint's name for the model."""
    revision: str | None = None
    """Branch, tag or commit on the Hub."""
    engine: EngineName = DEFAULT_ENGINE
    """`vllm`: vLLM in the same process, the fastest. `server`: a running vLLM server at `url`. `openai`: any endpoint with
    an OpenAI-compatible API, at `url`. `anthropic`: Anthropic's API, text only. `transformers`: the exact reference, without
    vLLM."""
    url: ServerUrl | None = None
    """Address of the server, such as http://node7:8000 (engine server) or https://openrouter.ai/api/v1 (engine openai, whose
    default is OpenAI's address). The API key is read from VLLM_API_KEY, OPENAI_API_KEY or ANTHROPIC_API_KEY."""
    served_model_name: str | None = None
    """Name of the model on the server, if it differs from `model` (engine server)."""
    concurrency: int = Field(default=64, ge=1)
    """Concurrent requests (engines server, openai, anthropic)."""
    timeout: float = Field(default=600, gt=0)
    """Seconds without a response after which a request is retried (engines server, openai, anthropic)."""
    api: Literal["chat", "completions"] = "chat"
    """`chat`: send messages. `completions`: send the token ids of the prompt (engine openai)."""
    tokenizer: str | None = None
    """Directory or Hub name of the tokenizer of the endpoint's model, if known (engine openai). Needed for soft targets;
    without it, only text is stored, in the tokens of `student.model`."""
    request_args: PassedOn = {}
    """Additional fields of every request, such as `{reasoning_effort: low}`; fields set to null are not sent (engines openai,
    anthropic). `max_completion_tokens` is the maximum length of an answer, including hidden reasoning."""
    batch: bool = False
    """Send each shard as one batch: cheaper, with answers within a day (engines openai, anthropic)."""
    price: Price | None = None
    budget: float | None = Field(default=None, gt=0)
    """Maximum spend on this dataset, in the currency of `price`. A shard is started only if its maximum cost fits the remaining
    budget. Requests made by `prompts.steps` do not count."""
    licence: str | None = None
    """Licence or terms under which the output may be used: a name such as `apache-2.0`, or the URL of the terms (required by
    engines openai and anthropic)."""
    dtype: Dtype = "auto"
    """Compute precision. `auto`: bfloat16 if the hardware supports it, else float16 (GPU) or float32. All workers of a dataset
    use the precision chosen by the first one."""
    max_model_len: int | None = Field(default=None, ge=1)
    """Maximum context length in tokens, prompt plus completion; the model's limit if not set."""
    tensor_parallel_size: int = Field(default=1, ge=1)
    """Number of GPUs over which one copy of the model is split (engine vllm)."""
    batch_size: int = Field(default=16, ge=1)
    """Sequences per batch (engine transformers). Floating-point results depend on it."""
    engine_args: PassedOn = {}
    """Any other argument of `vllm.LLM` (engine vllm)."""
    trust_remote_code: bool = False
    """Run Python code from the model's repository."""
    system: str | None = None
    """System message for the teacher only. It replaces that of the conversation and is not shown to the student."""
    template_args: PassedOn = {}
    """Variables of the chat template, such as `{enable_thinking: false}`. The stored prompts are rendered with them."""
    ensemble: list[Member] = []
    """More teachers with the same tokenizer. Soft targets come from the weighted mean of all distributions. Engine transformers
    keeps all teachers loaded and also samples from the mean; engine vllm loads them in turn, and `model` generates the text."""
    weight: float = Field(default=1.0, gt=0)
    """Weight of `model` in the mean of the ensemble, relative to the others."""

    @property
    def abilities(self) -> Abilities:
        """Abilities of the engine."""
        return ENGINES[self.engine]

    @property
    def students_engine(self) -> EngineName:
        """Engine with which a student generates in rounds: this teacher's, or the default if this one is remote."""
        return DEFAULT_ENGINE if self.abilities.remote else self.engine

    @property
    def in_turn(self) -> bool:
        """Whether it is an ensemble whose members are loaded one after the other."""
        return bool(self.ensemble) and not self.abilities.whole_distribution

    @model_validator(mode="after")
    def _an_ensemble_needs_the_probabilities_of_any_token(self) -> "Teacher":
        if self.ensemble and not self.abilities.any_token:
            raise ValueError(
                "an ensemble needs each teacher's probabilities of tokens that another one chose, which only engine "
                f"{engines_with('any_token')} return"
            )
        return self

    @model_validator(mode="after")
    def _targets_are_the_teachers_own(self) -> "Teacher":
        for name in self.engine_args:
            if name in _OWN_ARGUMENTS:
                instead = f"set {key}" if (key := _OWN_ARGUMENTS[name]) else "remove it"
                raise ValueError(f"engine_args.{name}: llmdistill sets this argument itself; {instead}")
        if self.engine_args.get("data_parallel_size", 1) != 1:
            raise ValueError(
                "engine_args.data_parallel_size: each process runs one copy of the teacher; start one process per copy, with "
                "`--shards i/n`"
            )
        if self.engine_args.get("speculative_config"):
            raise ValueError(
                "engine_args.speculative_config: log-probabilities under speculative decoding are not known to be the "
                "teacher's own; remove it"
            )
        return self

    @model_validator(mode="after")
    def _url_goes_with_a_remote_engine(self) -> "Teacher":
        if self.url is None and self.abilities.remote and self.abilities.address is None:
            raise ValueError(f"engine {self.engine} needs url, where `vllm serve` listens")
        if self.url is not None and not self.abilities.remote:
            raise ValueError(f"engine {self.engine} has no url; engines {engines_with('remote')} have one")
        return self

    @model_validator(mode="after")
    def _keys_of_an_endpoint(self) -> "Teacher":
        if not self.abilities.api:
            own = ("api", "tokenizer", "request_args", "batch", "price", "budget")
            given = [name for name in own if getattr(self, name) != type(self).model_fields[name].default]
            if given:
                raise ValueError(f"{given[0]} is for engines {engines_with('api')}, engine is {self.engine}")
            return self
        if not (self.licence or "").strip():
            raise ValueError(
                f"licence is missing: engine {self.engine} needs the licence or the terms under which the output of {self.model} "
                "may be used; it goes into the cards of the dataset and of the student"
            )
        for name, value in self.request_args.items():
            if name in _OWN_FIELDS:
                raise ValueError(f"request_args.{name}: llmdistill sets this field itself; remove it")
            if value is not None and name in _FIELDS_WITH_KEYS:
                raise ValueError(f"request_args.{name}: set {_FIELDS_WITH_KEYS[name]}; null only leaves the field out")
        most = self.request_args.get("max_completion_tokens")
        if most is not None and not (type(most) is int and most > 0):
            raise ValueError(f"request_args.max_completion_tokens must be a number of tokens, got {most!r}")
        if self.budget is not None and self.price is None:
            raise ValueError("budget needs price, in the same currency")
        if self.engine != "openai" and self.tokenizer:
            raise ValueError(f"tokenizer is for engine openai, engine is {self.engine}")
        if self.api == "completions" and (self.tokenizer is None or self.engine != "openai"):
            raise ValueError("api: completions sends the token ids of the prompt, so it needs engine openai and tokenizer")
        return self

    @property
    def endpoint(self) -> str:
        """The address of a remote engine."""
        return (self.url or self.abilities.address or "").rstrip("/")
