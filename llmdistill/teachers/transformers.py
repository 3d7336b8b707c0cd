"""The exact reference engine: the full distribution at every step, without vLLM, for one teacher or several."""

from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from transformers import PreTrainedModel

from llmdistill.config import Generate
from llmdistill.data.collator import DistillCollator
from llmdistill.data.targets import Array, draw
from llmdistill.models.forward import completion_logits
from llmdistill.models.loading import load_model
from llmdistill.teachers import Completion, Engine, EngineSpec, Request, Said


class TransformersEngine(Engine):
    """Decodes batches in order; their composition is fixed by the configuration, so results are exactly reproducible.

    Args:
        spec: the specification of the engine.
        models: the models of `spec.teacher`, if they are in memory.
    """

    def __init__(self, spec: EngineSpec, models: Sequence[PreTrainedModel] | None = None) -> None:
        teacher = spec.teacher
        members = [(teacher.model, teacher.revision, teacher.weight, "teacher.model")]
        members += [
            (more.model, more.revision, more.weight, f"teacher.ensemble.{number}.model")
            for number, more in enumerate(teacher.ensemble)
        ]
        self.models: list[PreTrainedModel] = list(models or ()) or [
            load_model(model, revision, teacher.dtype, teacher.trust_remote_code, key) for model, revision, _, key in members
        ]
        self.device = self.models[0].device
        self.log_weights = torch.tensor([weight for _, _, weight, _ in members], dtype=torch.float64).log().log_softmax(0)
        self.batch_size = teacher.batch_size
        self.sampling = spec.sampling
        self.kept = spec.kept
        self.known_ids = spec.known_ids
        self.end_ids = spec.end_ids
        self.is_member = spec.asked is not None
        self.end_tensor = torch.tensor(spec.end_ids, device=self.device)
        self.tokens = 0

    def generate(self, batches: Iterable[Sequence[Request]]) -> Iterator[Completion]:
        """Continue every request, `teacher.batch_size` at a time."""
        for requests in batches:
            for start in range(0, len(requests), self.batch_size):
                yield from self._generate_batch(requests[start : start + self.batch_size])

    def score(self, batches: Iterable[Sequence[Request]]) -> Iterator[Completion]:
        """Score every request's text, `teacher.batch_size` at a time."""
        for requests in batches:
            for start in range(0, len(requests), self.batch_size):
                yield from self._score_batch(requests[start : start + self.batch_size])

    @torch.inference_mode()
    def _score_batch(self, requests: Sequence[Request]) -> Iterator[Completion]:
        rows = [
            {"input_ids": [*request.prompt_ids, *request.completion_ids], "completion_start": len(request.prompt_ids)}
            for request in requests
        ]
        batch = {name: values.to(self.device) for name, values in DistillCollator(pad_token_id=0)(rows).items()}
        lengths = [len(request.completion_ids) for request in requests]
        logits = [completion_logits(model, batch).split(lengths) for model in self.models]  # one row at a time in float32
        for request, *logits_TV in zip(requests, *logits, strict=True):
            logprobs_TV = self._logprobs(logits_TV)
            ids_T = torch.tensor(request.completion_ids, device=logprobs_TV.device)
            self.tokens += len(ids_T)
            kept_ids, kept_logprobs = self._keep(logprobs_TV, self._uniforms(request, len(ids_T)))
            said = None
            if self.is_member:
                asked_NJ = torch.as_tensor(np.empty((len(ids_T), 0), np.int64) if request.asked_NJ is None else request.asked_NJ)
                said = Said(kept_ids, kept_logprobs, logprobs_TV.gather(1, asked_NJ.to(logprobs_TV.device)).cpu().numpy())
            yield Completion(
                request.index,
                np.asarray(request.completion_ids, dtype=np.int64),
                "stop" if request.completion_ids[-1] in self.end_ids else "length",
                logprobs_TV.gather(1, ids_T[:, None])[:, 0].cpu().numpy(),
                None if said else self.kept.stored.from_kept(kept_ids, kept_logprobs),
                said=said,
            )

    def close(self) -> None:
        """Release the models."""
        self.models = []

    def _uniforms(self, request: Request, positions: int) -> torch.Tensor:
        """The random numbers for a row's targets; a separate stream, so that the kind of targets does not change the text."""
        key = np.array([request.seed, 1], dtype=np.uint64)
        shape = (positions, self.kept.stored.uniforms(self.kept.kept))
        return torch.from_numpy(np.random.Generator(np.random.Philox(key=key)).random(shape))

    @torch.inference_mode()
    def _generate_batch(self, requests: Sequence[Request]) -> Iterator[Completion]:
        limit = self.sampling.max_tokens
        streams = [np.random.Generator(np.random.Philox(key=request.seed)) for request in requests]
        uniforms_BT = torch.from_numpy(np.stack([stream.random(limit) for stream in streams]))
        uniforms_BTU = torch.stack([self._uniforms(request, limit) for request in requests])
        inputs_BT, mask_BT = _left_padded(requests, self.device)
        caches: list[Any] = [None] * len(self.models)
        steps: list[_Step] = []
        alive_B = np.ones(len(requests), dtype=bool)
        lengths_B = np.zeros(len(requests), dtype=np.int64)
        while len(steps) < limit and alive_B.any():
            step = len(steps)
            logprobs_BV, caches = self._forward(inputs_BT, mask_BT, caches)
            may_end = step >= self.sampling.min_tokens
            allowed_BV = logprobs_BV if may_end else logprobs_BV.index_fill(1, self.end_tensor, -torch.inf)
            token_B = sample(allowed_BV, self.sampling, uniforms_BT[:, step])
            steps.append(self._step(logprobs_BV, token_B, uniforms_BTU[:, step]))
            lengths_B += alive_B
            self.tokens += int(alive_B.sum())
            alive_B &= ~np.isin(steps[-1].token_B, self.end_ids)
            inputs_BT = token_B[:, None]
            mask_BT = torch.cat([mask_BT, mask_BT.new_ones(len(requests), 1)], dim=1)
        for row, request in enumerate(requests):
            yield self._completion(request, row, steps[: lengths_B[row]])

    def _forward(self, inputs_BT: torch.Tensor, mask_BT: torch.Tensor, caches: list[Any]) -> tuple[torch.Tensor, list[Any]]:
        """The log-probabilities (B, V) of the next tokens, and the caches including the inputs."""
        positions_BT = (mask_BT.cumsum(1) - 1).clamp(min=0)[:, -inputs_BT.shape[1] :]
        text = {"input_ids": inputs_BT, "attention_mask": mask_BT, "position_ids": positions_BT}
        outputs = [
            model(**text, past_key_values=cache, use_cache=True, logits_to_keep=1)
            for model, cache in zip(self.models, caches, strict=True)
        ]
        return self._logprobs([output.logits[:, -1] for output in outputs]), [output.past_key_values for output in outputs]

    def _step(self, logprobs_BV: torch.Tensor, token_B: torch.Tensor, uniform_BU: torch.Tensor) -> "_Step":
        def of_token(values_BV: torch.Tensor) -> Array:
            found: Array = values_BV.gather(1, token_B[:, None])[:, 0].cpu().numpy()
            return found

        tempered_B = None
        if self.sampling.shows_everything:
            tempered_B = of_token((logprobs_BV / self.sampling.temperature).log_softmax(-1))
        return _Step(token_B.cpu().numpy(), of_token(logprobs_BV), tempered_B, *self._keep(logprobs_BV, uniform_BU))

    def _completion(self, request: Request, row: int, steps: Sequence["_Step"]) -> Completion:
        """The text that a row of the batch generated, in this many steps."""
        ids = np.array([step.token_B[row] for step in steps], dtype=np.int64)
        tempered = [step.tempered_B[row] for step in steps if step.tempered_B is not None]
        kept_ids = np.stack([step.kept_ids_BK[row] for step in steps])
        kept_logprobs = np.stack([step.kept_logprobs_BK[row] for step in steps])
        return Completion(
            request.index,
            ids,
            "stop" if ids[-1] in self.end_ids else "length",
            np.array([step.logprob_B[row] for step in steps], dtype=np.float32),
            None if self.is_member else self.kept.stored.from_kept(kept_ids, kept_logprobs),
            float(sum(tempered)) if tempered else None,
            said=Said.of(kept_ids, kept_logprobs, self.kept.kept) if self.is_member else None,
        )

    def _logprobs(self, logits_NV: Sequence[torch.Tensor]) -> torch.Tensor:
        """Log-probabilities of the teacher, or of the weighted mean of several, over the ids that all vocabularies have."""
        size = min([logits.shape[1] for logits in logits_NV] + ([self.known_ids] if self.known_ids else []))
        each_NV = [logits[:, :size].float().log_softmax(-1) for logits in logits_NV]
        if len(each_NV) == 1:
            return each_NV[0]
        weighted = [logprobs + weight for logprobs, weight in zip(each_NV, self.log_weights.tolist(), strict=True)]
        return torch.stack(weighted).logsumexp(dim=0)

    def _keep(self, logprobs_NV: torch.Tensor, uniform_NU: torch.Tensor) -> tuple[Array, Array]:
        """The ids to keep at some positions, with their log-probabilities."""
        ids_NK = self.kept.stored.keep(logprobs_NV, self.kept.kept, uniform_NU.to(logprobs_NV.device, draw.widest(logprobs_NV)))
        return ids_NK.cpu().numpy(), logprobs_NV.gather(1, ids_NK).cpu().numpy()


@dataclass(frozen=True)
class _Step:
    """One decoding step: the token of each row, its log-probability, that at the sampling temperature, and the kept tokens."""

    token_B: Array
    logprob_B: Array
    tempered_B: Array | None
    kept_ids_BK: Array
    kept_logprobs_BK: Array


def _left_padded(requests: Sequence[Request], device: torch.device) -> tuple[torch.Tensor, torch.Tensor]:
    """The prompts and their mask (B, T), padded on the left, so that all next tokens are in the same column."""
    width = max(len(request.prompt_ids) for request in requests)
    ids_BT = torch.zeros(len(requests), width, dtype=torch.long)
    mask_BT = torch.zeros_like(ids_BT)
    for row, request in enumerate(requests):
        ids_BT[row, width - len(request.prompt_ids) :] = torch.tensor(request.prompt_ids)
        mask_BT[row, width - len(request.prompt_ids) :] = 1
    return ids_BT.to(device), mask_BT.to(device)


def sample(logprobs_BV: torch.Tensor, sampling: Generate, uniform_B: torch.Tensor) -> torch.Tensor:
    """One token per row by the inverse of the cumulative distribution at `uniform_B`; the most likely one at temperature 0.

    The distribution is summed in the order of the ids: in the order of probability, the last bit of one of them could swap two
    tokens, and a row's text would depend on the rest of its batch.
    """
    if sampling.temperature == 0:
        return logprobs_BV.argmax(-1)
    p_BV = (logprobs_BV.to(draw.widest(logprobs_BV)) / sampling.temperature).softmax(-1)
    if sampling.top_k or sampling.top_p < 1:
        sorted_BV, order_BV = p_BV.sort(dim=-1, descending=True, stable=True)
        if sampling.top_k:
            sorted_BV[:, sampling.top_k :] = 0
        if sampling.top_p < 1:
            total_B1 = sorted_BV.sum(-1, keepdim=True)
            sorted_BV[sorted_BV.cumsum(-1) - sorted_BV >= sampling.top_p * total_B1] = 0
        p_BV = torch.zeros_like(p_BV).scatter(1, order_BV, sorted_BV)
    return draw.sample_with_replacement(p_BV.log(), uniform_B[:, None])[:, 0]
