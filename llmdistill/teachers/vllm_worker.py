"""Runs inside vLLM's workers: the sample is drawn there, from the full distribution, and only it travels.

vLLM loads the class by name (`worker_extension_cls`) and calls its method by `collective_rpc`, both public. What the
method replaces is not: the two functions by which the sampler of vLLM's first model runner makes the log-probabilities and
picks those to return, and the table of requests whose prompts are read. If a version of vLLM does without them, or its second
model runner is used (`VLLM_USE_V2_MODEL_RUNNER`), the call fails at start; nothing falls back to another kind of targets.
"""

import math
from collections.abc import Iterable
from typing import Any

import torch

from llmdistill.data.targets import KINDS
from llmdistill.data.targets.draw import pieces

ASKED = "llmdistill_asked"
"""Of a request's `extra_args`: the tokens whose log-probabilities are wanted in its text, `ids` (N, J) as bytes of int32, of
which the first row belongs to the row `first_row` of the prompt's log-probabilities."""


class SampleTargets:
    """Mixed into vLLM's worker class."""

    model_runner: Any

    def take_weights(self, weights: Iterable[tuple[str, torch.Tensor]]) -> None:
        """Go on with other weights.

        Args:
            weights: all of them, by their names in the checkpoint.
        """
        self.model_runner.reload_weights(weights_iterator=iter(weights))
        head = getattr(self.model_runner.get_model(), "lm_head", None)
        if head is not None and hasattr(head, "cpu_linear"):  # made of the old weights where the head shares the embedding's
            head.quant_method.process_weights_after_loading(head)

    def sample_targets(
        self,
        kind: str,
        kept: int | str,
        seed: int | str,
        temperature: float | None = None,
        known_ids: int | str | None = None,
        asked: int | str = 0,
    ) -> None:
        """From now on, log-probabilities are returned of the tokens that a kind of targets keeps.

        Args:
            kind: the name of the kind.
            kept: tokens kept a position.
            seed: of the draw.
            temperature: that of the sampling; where one more log-probability than `kept` is asked for, it is
                log Σ p^(1/temperature), what a tempered log-probability is short of being normalised.
            known_ids: ids from here on are padding of the output layer: they get no probability.
            asked: log-probabilities that each text asks for at every token, of ids of its own (`ASKED`).

        Raises:
            RuntimeError: this worker's sampler does not return log-probabilities in the known way.
        """
        from vllm.v1.outputs import LogprobsTensors

        sampler: Any = getattr(self.model_runner, "sampler", None)
        for name in ("compute_logprobs", "gather_logprobs"):
            if not callable(getattr(sampler, name, None)):
                raise RuntimeError(
                    f"targets.kind {kind}: this vLLM's model runner has no Sampler.{name}; start it with "
                    "VLLM_USE_V2_MODEL_RUNNER=0, or use engine transformers"
                )
        kept, uniform = int(kept), _Uniform(int(seed))  # a server passes strings on
        logprobs = LogSoftmax()
        reading = _know_what_is_read(self.model_runner) if int(asked) else None

        def gather_logprobs(logprobs_NV: torch.Tensor, n: int, token_ids: torch.Tensor) -> Any:
            uniform_NU = uniform(len(logprobs_NV), KINDS[kind].uniforms(kept), logprobs_NV.device)
            kept_Nn = KINDS[kind].keep(logprobs_NV, kept, uniform_NU)
            ids_NK = torch.cat([token_ids[:, None], kept_Nn], dim=1)
            kept_NK = logprobs_NV.gather(1, ids_NK)
            rank_N = torch.zeros_like(token_ids)  # nobody looks at it, and to count costs as much as to sample
            if reading is not None:
                asked_NJ = _asked_ids(self.model_runner.requests[reading.current], len(logprobs_NV), int(asked))
                ids_NK = torch.cat([ids_NK, asked_NJ.to(ids_NK.device)], dim=1)
                kept_NK = logprobs_NV.gather(1, ids_NK)
            elif n > kept and temperature:
                normaliser_N1 = _log_sum(logprobs_NV, temperature)
                ids_NK = torch.cat([ids_NK, torch.zeros_like(ids_NK[:, :1])], dim=1)
                kept_NK = torch.cat([kept_NK, normaliser_N1], dim=1)
            return LogprobsTensors(ids_NK.int(), kept_NK, rank_N)

        own_forward = sampler.forward

        def forward(logits: torch.Tensor, *args: Any, **kwargs: Any) -> Any:
            return own_forward(_without_padding(logits, known_ids), *args, **kwargs)

        sampler.gather_logprobs = gather_logprobs
        sampler.compute_logprobs = lambda logits_NV: logprobs(_without_padding(logits_NV, known_ids))
        if known_ids is not None:
            sampler.forward = forward


class _Reading(dict[str, int]):
    """The requests whose prompts get log-probabilities; remembers which one the runner has come to, as it goes through them."""

    current: str = ""

    def items(self) -> Any:
        for key, value in super().items():
            self.current = key
            yield key, value


def _know_what_is_read(runner: Any) -> _Reading:
    """Have the runner keep its table in one that says where it is.

    Raises:
        RuntimeError: it has no such table.
    """
    if not isinstance(getattr(runner, "num_prompt_logprobs", None), dict):
        raise RuntimeError("teacher.ensemble: this vLLM's model runner has no table num_prompt_logprobs; use engine transformers")
    runner.num_prompt_logprobs = _Reading(runner.num_prompt_logprobs)
    found: _Reading = runner.num_prompt_logprobs
    return found


def _asked_ids(request: Any, rows: int, asked: int) -> torch.Tensor:
    """What a request asks for in the next so many rows of its prompt, (rows, J); token 0 where it asks for nothing."""
    wanted = request.sampling_params.extra_args[ASKED]
    ids_NJ = torch.frombuffer(bytearray(wanted["ids"]), dtype=torch.int32).view(-1, asked).long()
    places = torch.arange(rows) + request.num_computed_tokens - wanted["first_row"]
    is_there = (places >= 0) & (places < len(ids_NJ))
    return ids_NJ[places.clamp(0, len(ids_NJ) - 1)] * is_there[:, None]


class _Uniform:
    """Random numbers that are made where they are used: to copy them to a GPU, it would have to be waited for in every step."""

    def __init__(self, seed: int) -> None:
        self._seed = seed
        self._generator: torch.Generator | None = None

    def __call__(self, rows: int, columns: int, device: torch.device) -> torch.Tensor:
        """From 0 to 1, in float64; shape (rows, columns)."""
        if self._generator is None:
            self._generator = torch.Generator(device).manual_seed(self._seed)
        return torch.rand((rows, columns), generator=self._generator, dtype=torch.float64, device=device)


class LogSoftmax:
    """Log-softmax in float32. On a CPU its results share one memory, which takes longer to get anew than to fill."""

    def __init__(self) -> None:
        self._memory = torch.empty(0)

    def __call__(self, logits_NV: torch.Tensor) -> torch.Tensor:
        """Valid until the next call."""
        if logits_NV.device.type != "cpu":
            return logits_NV.log_softmax(dim=-1, dtype=torch.float32)  # without a copy of them in float32
        if self._memory.numel() < logits_NV.numel():
            self._memory = torch.empty(logits_NV.numel())
        logprobs_NV = self._memory[: logits_NV.numel()].view(logits_NV.shape)
        for logits, logprobs in pieces(logits_NV, logprobs_NV):
            torch.log_softmax(logits.float(), dim=-1, out=logprobs)  # five times as fast as with `dtype=`
        return logprobs_NV


def _without_padding(logits_NV: torch.Tensor, known_ids: int | str | None) -> torch.Tensor:
    """The logits, in place, with those of ids that no tokenizer knows at −inf."""
    if known_ids is not None:
        logits_NV[:, int(known_ids) :] = -torch.inf
    return logits_NV


def _log_sum(logprobs_NV: torch.Tensor, temperature: float) -> torch.Tensor:
    """Of a distribution p, log Σ p^(1/temperature), shape (N, 1).

    The largest is at least 1/V; where that to the power could underflow, the sum is taken around it.
    """
    return torch.cat([_log_sum_of(logprobs, temperature) for (logprobs,) in pieces(logprobs_NV)])


def _log_sum_of(logprobs_NV: torch.Tensor, temperature: float) -> torch.Tensor:
    if math.log(logprobs_NV.shape[1]) / temperature < 60:
        return logprobs_NV.div(temperature).exp_().sum(1, keepdim=True).log_()
    largest_N1 = logprobs_NV.amax(1, keepdim=True)
    shares_NV = logprobs_NV.sub(largest_N1).div_(temperature).exp_()
    return shares_NV.sum(1, keepdim=True).log_() + largest_N1 / temperature
