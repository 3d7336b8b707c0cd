"""The cost of serving models: prefill and decoding speed and memory, measured in turns."""

import importlib.util
import json
import math
import statistics
import subprocess
import sys
import time
from collections.abc import Mapping
from contextlib import suppress
from dataclasses import asdict, dataclass
from typing import Any

import numpy as np
import psutil

from llmdistill.config.machine import inference_precision, torch_device
from llmdistill.errors import not_installed
from llmdistill.evaluation.writing import answer_length
from llmdistill.models.loading import continue_prompts, free_memory, load_config, model_bytes, model_precision, torch_dtype
from llmdistill.runs.progress import StageBar, working

ROUNDS = {"vllm": 5, "transformers": 3}
PROMPT_TOKENS = {"vllm": 128, "transformers": 16}
_ENGINE_BYTES = 2 << 30  # a generous estimate of what vLLM needs besides twice the weights and the cache
_LEAST_CACHE = 1 << 30
_PAGE = 128  # maximum block size of vLLM's cache, in tokens
_WARM_UP = 4  # tokens written before anything is timed


@dataclass(frozen=True)
class Served:
    """A model whose cost is measured; `revision` is that on the Hub."""

    name: str
    path: str
    revision: str | None = None
    trust_remote_code: bool = False
    tensor_parallel_size: int = 1


@dataclass(frozen=True)
class Requests:
    """The requests on which a model is timed besides random tokens: token ids, where answers are cut off, and end tokens."""

    prompts: list[list[int]]
    max_tokens: int
    end_ids: list[int]

    @property
    def longest(self) -> int:
        """Number of tokens of the longest prompt with its answer."""
        return max(map(len, self.prompts)) + self.max_tokens


Tasks = Mapping[str, Mapping[str, Requests]]
"""Requests by task and model."""


def check_vllm(key: str) -> None:
    """Refuse vLLM if it is not installed.

    Raises:
        InputError: names what to install.
    """
    if importlib.util.find_spec("vllm") is None:
        raise not_installed(f"{key} vllm", "vllm", "generate", instead="set it to transformers")


def by_vllm(models: list[Served], batch: int, new_tokens: int, tasks: Tasks) -> dict[str, Any]:
    """Prefill speed, decoding speed and peak memory of every model, each in its own engine.

    The engines run side by side and take turns, so that other load on the machine affects all of them; if they do not fit into
    memory together, they run one after the other. Prompts are random tokens, which cost the same as text.

    Args:
        models: the first is the one that the others are compared with.
        batch: number of concurrent sequences.
        new_tokens: tokens generated after each prompt.
        tasks: requests of tasks.

    Returns:
        How it was measured, and under `models` one entry each, in order: `prefill` and `decode` in tokens per second and
        `decode_ratio` to the first model per round, each with `median`, `low` and `high`, the lowest and highest round;
        `peak_bytes`, of weights, cache and engine; `kv_cache_bytes`, from `cache_bytes`; `requests` of each task, from
        `request_figures`; or `failed`, the reason why vLLM does not load it.
    """
    settings = {"batch": batch, "prompt_tokens": PROMPT_TOKENS["vllm"], "new_tokens": max(new_tokens, 2)}
    asked = [requests.longest for by_model in tasks.values() for requests in by_model.values()]
    longest = max(settings["prompt_tokens"] + settings["new_tokens"], *asked, 0)
    caches = {model.name: cache_bytes(model, batch, longest) for model in models}
    together, rounds = _fit_together(models, caches), ROUNDS["vllm"]
    found: dict[str, list[dict[str, float]]] = {model.name: [] for model in models}
    requests: dict[str, dict[str, Any]] = {}
    failed: dict[str, str] = {}
    version = ""
    with StageBar("speed", rounds * len(models)) as bar:
        for group in [models] if together else [[model] for model in models]:
            fixed = {**settings, "max_model_len": longest}
            engines = {model.name: _Engine(model, {**fixed, "kv_cache_bytes": caches[model.name]}) for model in group}
            try:
                for name, engine in engines.items():
                    with working("speed", f"starting vLLM for {name}"):
                        started = engine.start()
                    version = started.get("version", version)
                    failed |= {name: started["failed"]} if "failed" in started else {}
                for _ in range(rounds):
                    for name, engine in engines.items():
                        if name not in failed:
                            found[name].append(engine.ask())
                        bar.advance()
                for task, by_model in tasks.items():
                    for name, engine in engines.items():
                        if name not in failed:
                            answered = engine.ask(json.dumps(asdict(by_model[name])))
                            requests.setdefault(name, {})[task] = request_figures(**answered)
            finally:
                for engine in engines.values():
                    engine.stop()
    entries = [
        {"name": model.name, "failed": failed[model.name]}
        if model.name in failed
        else {
            "name": model.name,
            "prefill": spread([values["prefill_tokens_per_s"] for values in found[model.name]]),
            **_decoding([values["decode_tokens_per_s"] for values in found[model.name]], found[models[0].name]),
            "peak_bytes": int(max(values["peak_bytes"] for values in found[model.name])),
            "kv_cache_bytes": caches[model.name],
            **({"requests": requests[model.name]} if tasks else {}),
        }
        for model in models
    ]
    about = {"engine": "vllm", "version": version, **settings, "rounds": rounds, "in_turns": together}
    return {**about, "models": entries}


def cache_bytes(model: Served, batch: int, length: int) -> int:
    """Size of the keys and values of all sequences on each device; at least one GiB.

    An overestimate if they are compressed or of a sliding window only.

    Args:
        model: served in the precision of this machine.
        batch: number of sequences.
        length: tokens per sequence.
    """
    how = (model.path, model.revision)
    told: dict[str, Any] = {"trust_remote_code": model.trust_remote_code, "key": f"the model `{model.name}`"}
    config = load_config(*how, **told).get_text_config()
    asked = model_precision(*how, **told).dtype
    width = torch_dtype(config.dtype if asked == "auto" else asked).itemsize
    heads = getattr(config, "num_attention_heads", None) or 0  # 0 for a model without attention
    channels = getattr(config, "head_dim", None) or (config.hidden_size // heads if heads else 0)
    on_device = math.ceil((getattr(config, "num_key_value_heads", None) or heads) / model.tensor_parallel_size)
    tokens = (batch * math.ceil(length / _PAGE) + 1) * _PAGE  # vLLM keeps one page empty
    return max(_LEAST_CACHE, tokens * 2 * config.num_hidden_layers * on_device * channels * width)


def by_transformers(models: dict[str, Any], batch: int, new_tokens: int, tasks: Tasks) -> dict[str, Any]:
    """Greedy decoding of loaded models in turns; as `by_vllm`, with only the decoding speed and the requests.

    The models are converted to the preferred precision of this machine and stay converted.
    """
    import torch
    import transformers

    precision = inference_precision()
    for model in models.values():
        model.to(torch_dtype(precision.dtype))

    prompt_tokens, rounds = PROMPT_TOKENS["transformers"], ROUNDS["transformers"]
    speeds: dict[str, list[dict[str, float]]] = {name: [] for name in models}

    def seconds(model: Any, tokens: int) -> float:
        ids, start = torch.full((batch, prompt_tokens), 3, device=model.device), time.perf_counter()
        model.generate(
            ids,
            attention_mask=torch.ones_like(ids),
            do_sample=False,
            min_new_tokens=tokens,
            max_new_tokens=tokens,
            pad_token_id=0,
        )
        return time.perf_counter() - start

    with torch.inference_mode(), working("speed", "timing"):
        for model in models.values():
            seconds(model, _WARM_UP)
        for _ in range(rounds):
            for name, model in models.items():
                speeds[name].append({"decode_tokens_per_s": batch * new_tokens / seconds(model, new_tokens)})
    first = next(iter(speeds.values()))
    requests = {task: _answered_in_turn(models, by_model, batch) for task, by_model in tasks.items()}
    entries = [
        {
            "name": name,
            **_decoding([value["decode_tokens_per_s"] for value in values], first),
            **({"requests": {task: figures[name] for task, figures in requests.items()}} if requests else {}),
        }
        for name, values in speeds.items()
    ]
    about = {"engine": "transformers", "version": transformers.__version__, "dtype": precision.dtype}
    about |= {"batch": batch, "prompt_tokens": prompt_tokens}
    return {**about, "new_tokens": new_tokens, "rounds": rounds, "in_turns": True, "models": entries}


def _answered_in_turn(models: dict[str, Any], requests: Mapping[str, Requests], batch: int) -> dict[str, dict[str, float]]:
    """The cost of requests for every model: each request alone, in turns, and then all together."""
    seconds: dict[str, list[float]] = {name: [] for name in models}
    together: dict[str, dict[str, float]] = {}

    def answer(name: str, prompts: list[list[int]]) -> tuple[float, int]:
        """The time in seconds, and the number of tokens."""
        asked, start = requests[name], time.perf_counter()
        written_BT = continue_prompts(models[name], prompts, asked.max_tokens, asked.end_ids, do_sample=False).tolist()
        return time.perf_counter() - start, sum(answer_length(ids, asked.end_ids) for ids in written_BT)

    count = len(next(iter(requests.values())).prompts)
    with StageBar("speed", 2 * count * len(models)) as bar:
        for number in range(count):
            for name in models:
                seconds[name].append(answer(name, [requests[name].prompts[number]])[0])
                bar.advance()
        for name in models:
            batches = [answer(name, requests[name].prompts[first : first + batch]) for first in range(0, count, batch)]
            together[name] = {"seconds": sum(time for time, _ in batches), "tokens": sum(tokens for _, tokens in batches)}
            bar.advance(count)
    return {name: request_figures(seconds[name], **together[name]) for name in models}


def request_figures(latencies: list[float], seconds: float, tokens: float) -> dict[str, float]:
    """`p50_s` and `p95_s`, latency of single requests; `per_s` and `tokens_per_s`, throughput of concurrent ones.

    Args:
        latencies: latency of every single request, in seconds.
        seconds: time that all took together.
        tokens: number of tokens of all answers.
    """
    p50, p95 = np.percentile(latencies, [50, 95])
    per_s = {"per_s": len(latencies) / seconds, "tokens_per_s": tokens / seconds}
    return {"count": len(latencies), "p50_s": float(p50), "p95_s": float(p95), **per_s}


def spread(values: list[float]) -> dict[str, float]:
    """Median, minimum and maximum."""
    return {"median": statistics.median(values), "low": min(values), "high": max(values)}


def _decoding(values: list[float], reference: list[dict[str, float]]) -> dict[str, Any]:
    ratios = [value / other["decode_tokens_per_s"] for value, other in zip(values, reference, strict=False)]
    return {"decode": spread(values), **({"decode_ratio": spread(ratios)} if ratios else {})}


def _fit_together(models: list[Served], caches: Mapping[str, int]) -> bool:
    """Whether all engines fit into the free memory of the accelerator or else the machine."""
    sizes = [model_bytes(model.path) for model in models]
    if any(size is None for size in sizes) or any(model.tensor_parallel_size > 1 for model in models):
        return False
    free = free_memory(torch_device())
    return sum(2 * (size or 0) + _ENGINE_BYTES + caches[model.name] for size, model in zip(sizes, models, strict=True)) < free


class _Engine:
    """One model in its own process, see serving_worker.py."""

    def __init__(self, model: Served, settings: dict[str, int]) -> None:
        config = load_config(model.path, model.revision, model.trust_remote_code, f"the model `{model.name}`")
        arguments: dict[str, Any] = {"model": model.path, "revision": model.revision, "tokenizer_revision": model.revision}
        arguments |= {"trust_remote_code": model.trust_remote_code, "tensor_parallel_size": model.tensor_parallel_size}
        self.settings = {**settings, "model": arguments, "vocabulary": config.get_text_config().vocab_size}
        self.process: subprocess.Popen[str] | None = None

    def start(self) -> dict[str, Any]:
        """Load the model; returns the version of vLLM, or why it `failed`."""
        self.process = subprocess.Popen(
            [sys.executable, "-m", "llmdistill.evaluation.serving_worker"],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            stderr=subprocess.DEVNULL,
            text=True,
        )
        return self.ask(json.dumps(self.settings))

    def ask(self, line: str = "") -> dict[str, Any]:
        """The worker's answer to a line."""
        assert self.process is not None
        assert self.process.stdin is not None
        assert self.process.stdout is not None
        self.process.stdin.write(f"{line}\n")
        self.process.stdin.flush()
        answer = self.process.stdout.readline()
        if not answer:
            raise RuntimeError(f"vLLM exited with status {self.process.wait()} while timing {self.settings['model']['model']}")
        return dict(json.loads(answer))

    def stop(self) -> None:
        """Stop it and everything that it has started."""
        if self.process is None:
            return
        with suppress(psutil.NoSuchProcess):
            for process in psutil.Process(self.process.pid).children(recursive=True):
                process.kill()
        self.process.kill()
        self.process.wait()
