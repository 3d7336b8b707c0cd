"""The exact reference engine: the full distribution at every step, with no vLLM needed."""

from collections.abc import Iterable, Iterator, Sequence

import numpy as np
import torch
from transformers import PreTrainedModel

from llmdistill import pps
from llmdistill.config import Generate, Targets, Teacher
from llmdistill.models import end_token_ids, load_model
from llmdistill.targets import Array, from_logprobs
from llmdistill.teachers import Completion, Request


class TransformersEngine:
    """Decodes batches in order; a batch's composition is fixed by the configuration, so results repeat exactly."""

    def __init__(self, teacher: Teacher, sampling: Generate, kept: Targets) -> None:
        self.model: PreTrainedModel = load_model(teacher.model, teacher.revision, teacher.dtype, teacher.trust_remote_code)
        self.batch_size = teacher.batch_size
        self.sampling = sampling
        self.kept = kept
        self.end_ids = end_token_ids(self.model)

    def generate(self, batches: Iterable[Sequence[Request]]) -> Iterator[Completion]:
        """Continue every request, `teacher.batch_size` at a time."""
        for requests in batches:
            for start in range(0, len(requests), self.batch_size):
                yield from self._generate_batch(requests[start : start + self.batch_size])

    @torch.inference_mode()
    def _generate_batch(self, requests: Sequence[Request]) -> Iterator[Completion]:
        device = self.model.device
        width = max(len(request.prompt_ids) for request in requests)
        ids_BT = torch.zeros(len(requests), width, dtype=torch.long)
        mask_BT = torch.zeros_like(ids_BT)
        for row, request in enumerate(requests):  # left padding: every next token stands in the same column
            ids_BT[row, width - len(request.prompt_ids) :] = torch.tensor(request.prompt_ids)
            mask_BT[row, width - len(request.prompt_ids) :] = 1
        ids_BT, mask_BT = ids_BT.to(device), mask_BT.to(device)
        # Two streams of random numbers a row, both from its seed alone: one for its text, one for its targets.
        limit = self.sampling.max_tokens
        uniforms_BT2 = torch.from_numpy(
            np.stack([np.random.Generator(np.random.Philox(key=request.seed)).random((limit, 2)) for request in requests])
        )

        tokens, chosen, kept = [], [], []
        alive_B = np.ones(len(requests), dtype=bool)
        lengths_B = np.zeros(len(requests), dtype=np.int64)
        cache, inputs_BT = None, ids_BT
        for step in range(limit):
            positions_BT = (mask_BT.cumsum(1) - 1).clamp(min=0)[:, -inputs_BT.shape[1] :]
            output = self.model(
                input_ids=inputs_BT,
                attention_mask=mask_BT,
                position_ids=positions_BT,
                past_key_values=cache,
                use_cache=True,
                logits_to_keep=1,
            )
            cache = output.past_key_values
            logprobs_BV = output.logits[:, -1].float().log_softmax(-1)
            token_B = sample(logprobs_BV, self.sampling, uniforms_BT2[:, step, 0])
            tokens.append(token_B.cpu().numpy())
            chosen.append(logprobs_BV.gather(1, token_B[:, None])[:, 0].cpu().numpy())
            kept.append(self._keep(logprobs_BV, uniforms_BT2[:, step, 1]))
            lengths_B += alive_B
            alive_B &= ~np.isin(tokens[-1], self.end_ids)
            if not alive_B.any():
                break
            inputs_BT = token_B[:, None]
            mask_BT = torch.cat([mask_BT, mask_BT.new_ones(len(requests), 1)], dim=1)

        for row, request in enumerate(requests):
            length = lengths_B[row]
            ids = np.array([step[row] for step in tokens[:length]], dtype=np.int64)
            yield Completion(
                request.index,
                ids,
                "stop" if ids[-1] in self.end_ids else "length",
                np.array([step[row] for step in chosen[:length]], dtype=np.float32),
                from_logprobs(
                    self.kept.kind,
                    np.stack([ids[row] for ids, _ in kept[:length]]),
                    np.stack([lp[row] for _, lp in kept[:length]]),
                ),
            )

    def _keep(self, logprobs_BV: torch.Tensor, uniform_B: torch.Tensor) -> tuple[Array, Array]:
        """The ids to keep at one step, and their log-probabilities."""
        if self.kept.kind == "sampled":
            ids_BK = pps.sample(logprobs_BV, self.kept.n, uniform_B)
        else:
            ids_BK = logprobs_BV.topk(self.kept.kept).indices
        return ids_BK.cpu().numpy(), logprobs_BV.gather(1, ids_BK).cpu().numpy()


def sample(logprobs_BV: torch.Tensor, sampling: Generate, uniform_B: torch.Tensor) -> torch.Tensor:
    """One token a row by the inverse of the cumulative distribution at `uniform_B`; the most likely one at temperature 0."""
    if sampling.temperature == 0:
        return logprobs_BV.argmax(-1)
    sorted_BV, order_BV = (logprobs_BV.double() / sampling.temperature).softmax(-1).sort(dim=-1, descending=True, stable=True)
    if sampling.top_k:
        sorted_BV[:, sampling.top_k :] = 0
    if sampling.top_p < 1:
        total_B1 = sorted_BV.sum(-1, keepdim=True)
        sorted_BV[sorted_BV.cumsum(-1) - sorted_BV >= sampling.top_p * total_B1] = 0
    cumulative_BV = sorted_BV.cumsum(-1)
    threshold_B1 = uniform_B.to(sorted_BV.device)[:, None] * cumulative_BV[:, -1:]
    return order_BV.gather(1, torch.searchsorted(cumulative_BV, threshold_B1, right=True).clamp(max=order_BV.shape[1] - 1))[:, 0]
