"""Runs inside vLLM's workers: the sample is drawn there, from the full distribution, and only the sample is transferred.

vLLM loads the class by name (`worker_extension_cls`) and calls its method by `collective_rpc`, both public. What the method
replaces is not: the two functions with which the sampler of vLLM's first model runner computes log-probabilities and selects
those to return, and the table of requests whose prompts are scored. If a version of vLLM lacks them, or its second model
runner is used (`VLLM_USE_V2_MODEL_RUNNER`), the call fails at start; nothing falls back to another kind of targets.
"""

import math
from collections.abc import Iterable
from typing import Any

import torch

from llmdistill.data.targets import KINDS
from llmdistill.data.targets.draw import pieces

ASKED = "llmdistill_asked"
"""In a request's `extra_args`: the tokens whose log-probabilities are requested in its text, `ids` (N, J) as bytes of int32,
whose first row belongs to row `first_row` of the prompt's log-probabilities."""


class SampleTargets:
    """Mixed into vLLM's worker class."""

    model_runner: Any

    def take_weights(self, weights: Iterable[tuple[str, torch.Tensor]]) -> None:
        """Continue with new weights.

        Args:
            weights: all of them, by their names in the checkpoint.
        """
        self.model_runner.reload_weights(weights_iterator=iter(weights))
        head = getattr(self.model_runner.get_model(), "lm_head", None)
        if head is not None and hasattr(head, "cpu_linear"):  # made from the old weights if the head shares the embedding's
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
        """Return log-probabilities of the tokens that a kind of targets keeps.

        Args:
            kind: name of the kind.
            kept: number of tokens kept per position.
            seed: seed of the draws.
            temperature: sampling temperature; if one log-probability more than `kept` is requested, it is log Σ
                p^(1/temperature), the normaliser of tempered log-probabilities.
            known_ids: ids from here on are padding of the output layer and get no probability.
            asked: number of log-probabilities that each text requests at every token, of given ids (`ASKED`).

        Raises:
            RuntimeError: if this worker's sampler does not return log-probabilities in the known way.
        """
        from vllm.v1.outputs import LogprobsTensors

        sampler: Any = getattr(self.model_runner, "sampler", None)
        for name in ("compute_logprobs", "gather_logprobs"):
            if not callable(getattr(sampler, name, None)):
                raise RuntimeError(
                    f"targets.kind {kind}: this vLLM's model runner has no Sampler.{name}; start it with "
                    "VLLM_USE_V2_MODEL_RUNNER=0, or use engine transformers"
                )
        kept, uniform = int(kept), _Uniform(int(seed))  # a server passes strings
        logprobs = LogSoftmax()
        reading = _know_what_is_read(self.model_runner) if int(asked) else None

        def gather_logprobs(logprobs_NV: torch.Tensor, n: int, token_ids: torch.Tensor) -> Any:
            uniform_NU = uniform(len(logprobs_NV), KINDS[kind].uniforms(kept), logprobs_NV.device)
            kept_Nn = KINDS[kind].keep(logprobs_NV, kept, uniform_NU)
            ids_NK = torch.cat([token_ids[:, None], kept_Nn], dim=1)
            kept_NK = logprobs_NV.gather(1, ids_NK)
            rank_N = torch.zeros_like(token_ids)  # unused, and counting costs as much as sampling
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
    """The requests whose prompts get log-probabilities; remembers which one the runner is processing."""

    current: str = ""

    def items(self) -> Any:
        for key, value in super().items():
            self.current = key
            yield key, value


def _know_what_is_read(runner: Any) -> _Reading:
    """Replace the runner's table with one that records its progress.

    Raises:
        RuntimeError: if it has no such table.
    """
    if not isinstance(getattr(runner, "num_prompt_logprobs", None), dict):
        raise RuntimeError("teacher.ensemble: this vLLM's model runner has no table num_prompt_logprobs; use engine transformers")
    runner.num_prompt_logprobs = _Reading(runner.num_prompt_logprobs)
    found: _Reading = runner.num_prompt_logprobs
    return found


def _asked_ids(request: Any, rows: int, asked: int) -> torch.Tensor:
    """The token ids requested in the next rows of a request's prompt, (rows, J); 0 where nothing is requested."""
    wanted = request.sampling_params.extra_args[ASKED]
    ids_NJ = torch.frombuffer(bytearray(wanted["ids"]), dtype=torch.int32).view(-1, asked).long()
    places = torch.arange(rows) + request.num_computed_tokens - wanted["first_row"]
    is_there = (places >= 0) & (places < len(ids_NJ))
    return ids_NJ[places.clamp(0, len(ids_NJ) - 1)] * is_there[:, None]


class _Uniform:
    """Random numbers generated on the device: copying them to a GPU would need a synchronisation in every step."""

    def __init__(self, seed: int) -> None:
        self._seed = seed
        self._generator: torch.Generator | None = None

    def __call__(self, rows: int, columns: int, device: torch.device) -> torch.Tensor:
        """Values from 0 to 1, in float64; shape (rows, columns)."""
        if self._generator is None:
            self._generator = torch.Generator(device).manual_seed(self._seed)
        return torch.rand((rows, columns), generator=self._generator, dtype=torch.float64, device=device)


class LogSoftmax:
    """Log-softmax in float32. On a CPU, results share one buffer, as allocating it takes longer than filling it."""

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
    """The logits, in place, with ids unknown to the tokenizer set to −inf."""
    if known_ids is not None:
        logits_NV[:, int(known_ids) :] = -torch.inf
    return logits_NV


def _log_sum(logprobs_NV: torch.Tensor, temperature: float) -> torch.Tensor:
    """For a distribution p, log Σ p^(1/temperature), shape (N, 1).

    The largest p is at least 1/V; where its power could underflow, the sum is computed relative to it.
    """
    return torch.cat([_log_sum_of(logprobs, temperature) for (logprobs,) in pieces(logprobs_NV)])


def _log_sum_of(logprobs_NV: torch.Tensor, temperature: float) -> torch.Tensor:
    if math.log(logprobs_NV.shape[1]) / temperature < 60:
        return logprobs_NV.div(temperature).exp_().sum(1, keepdim=True).log_()
    largest_N1 = logprobs_NV.amax(1, keepdim=True)
    shares_NV = logprobs_NV.sub(largest_N1).div_(temperature).exp_()
    return shares_NV.sum(1, keepdim=True).log_() + largest_N1 / temperature
