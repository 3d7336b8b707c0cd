"""A process that serves one model with vLLM and times it on request, see serving.py.

It reads its settings as one line of JSON and answers with a line once the model is loaded. Every empty line that it reads is
answered with the figures of a round, and a line of JSON, which holds requests, with the time that they took.
"""

import importlib
import json
import math
import os
import resource
import sys
import time
from typing import Any


class PeakMemory:
    """Mixed into vLLM's worker class."""

    def peak_bytes(self) -> int:
        """Peak memory of this worker: of the accelerator if there is one, else its resident set."""
        import torch

        if torch.accelerator.is_available():
            return int(torch.accelerator.max_memory_reserved())
        return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024


def main() -> None:
    """Answer until the input ends."""
    answers = os.fdopen(os.dup(1), "w")
    os.dup2(2, 1)  # what vLLM prints is not an answer
    settings = json.loads(sys.stdin.readline())
    try:
        llm = _load(settings)
        _round(llm, settings, 0)  # the first round is slower than the others
    except Exception as error:  # vLLM refuses a model in many ways
        answers.write(json.dumps({"failed": " ".join(str(error).split())[:300] or type(error).__name__}) + "\n")
        sys.exit(1)
    answers.write(json.dumps({"version": importlib.import_module("vllm").__version__}) + "\n")
    answers.flush()
    for number, line in enumerate(sys.stdin, start=1):
        found = _requests(llm, **json.loads(line)) if line.strip() else _round(llm, settings, number)
        answers.write(json.dumps(found) + "\n")
        answers.flush()


def _load(settings: dict[str, Any]) -> Any:
    from llmdistill.models.loading import model_precision
    from llmdistill.teachers.vllm import prepare_environment

    cache = settings["kv_cache_bytes"]
    prepare_environment(kv_cache_gib=math.ceil(cache / (1 << 30)))
    import vllm
    from vllm.platforms import current_platform

    model = settings["model"]
    precision = model_precision(
        model["model"], model["revision"], trust_remote_code=model["trust_remote_code"], key="the model", runtime="vllm"
    )
    batch, length = settings["batch"], settings["prompt_tokens"] + settings["new_tokens"]
    return vllm.LLM(
        **model,
        dtype=precision.dtype,
        max_model_len=settings["max_model_len"],
        max_num_seqs=batch,
        # All prompts are read in one step.
        max_num_batched_tokens=max(batch * length, settings["max_model_len"], 2048),
        enable_prefix_caching=False,
        kv_cache_memory_bytes=cache,
        gpu_memory_utilization=0.01,  # leaves the rest of the memory to the other engines
        enforce_eager=current_platform.is_cpu(),
        worker_extension_cls="llmdistill.evaluation.serving_worker.PeakMemory",
        use_tqdm_on_load=False,
        seed=0,
    )


def _round(llm: Any, settings: dict[str, Any], number: int) -> dict[str, float]:
    """Prefill of the prompts, and decoding of the tokens after the first of each."""
    import numpy as np
    import vllm

    batch, prompt_tokens, new_tokens = (settings[name] for name in ("batch", "prompt_tokens", "new_tokens"))
    generator = np.random.default_rng(number)
    prompts = [
        {"prompt_token_ids": ids.tolist()} for ids in generator.integers(3, settings["vocabulary"], (batch, prompt_tokens))
    ]

    def seconds(tokens: int) -> float:
        params = vllm.SamplingParams(temperature=0, max_tokens=tokens, ignore_eos=True, detokenize=False)
        start = time.perf_counter()
        llm.generate(prompts, params, use_tqdm=False)
        return time.perf_counter() - start

    reading = seconds(1)
    writing = max(seconds(new_tokens) - reading, 1e-9)
    peak = sum(llm.collective_rpc("peak_bytes"))
    return {
        "prefill_tokens_per_s": batch * prompt_tokens / reading,
        "decode_tokens_per_s": batch * (new_tokens - 1) / writing,
        "peak_bytes": peak,
    }


def _requests(llm: Any, prompts: list[list[int]], max_tokens: int, end_ids: list[int]) -> dict[str, Any]:
    """Every request alone, and then all of them together."""
    import vllm

    params = vllm.SamplingParams(temperature=0, max_tokens=max_tokens, stop_token_ids=end_ids, detokenize=False)

    def answered(asked: list[list[int]]) -> tuple[float, int]:
        """The time in seconds, and the number of tokens."""
        start = time.perf_counter()
        found = llm.generate([{"prompt_token_ids": ids} for ids in asked], params, use_tqdm=False)
        return time.perf_counter() - start, sum(len(answer.outputs[0].token_ids) for answer in found)

    latencies = [answered([ids])[0] for ids in prompts]
    seconds, tokens = answered(prompts)
    return {"latencies": latencies, "seconds": seconds, "tokens": tokens}


if __name__ == "__main__":
    main()
