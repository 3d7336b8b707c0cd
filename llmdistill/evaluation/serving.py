"""What models cost while they serve: how fast they read and write, and the memory they take, measured in turns."""

import importlib.util
import json
import statistics
import subprocess
import sys
import time
from contextlib import suppress
from dataclasses import dataclass
from typing import Any

import psutil

from llmdistill.config.machine import inference_precision
from llmdistill.errors import InputError
from llmdistill.evaluation.serving_worker import KV_CACHE_BYTES
from llmdistill.models.loading import load_config, model_bytes
from llmdistill.runs.progress import StageBar, working

_ROUNDS = {"vllm": 5, "transformers": 3}
_PROMPT_TOKENS = {"vllm": 128, "transformers": 16}
_ENGINE_BYTES = 3 << 30  # that vLLM takes beside twice the weights, generously


@dataclass(frozen=True)
class Served:
    """A model whose cost is measured; `revision` is of the Hub."""

    name: str
    path: str
    revision: str | None = None
    trust_remote_code: bool = False
    tensor_parallel_size: int = 1


def check_vllm(key: str) -> None:
    """Refuse vLLM where it is not installed.

    Raises:
        InputError: naming what to install.
    """
    if importlib.util.find_spec("vllm") is None:
        raise InputError(f"{key} is vllm, which is not installed: install the extra `generate`, or use transformers")


def by_vllm(models: list[Served], batch: int, new_tokens: int) -> dict[str, Any]:
    """Reading speed, writing speed and peak memory of every model in an engine of its own.

    The engines run beside each other and take turns, so that what the machine does besides hits all of them; where they do
    not fit into the memory together, one runs after the other. Prompts are random tokens, which costs the same as text.

    Args:
        models: the first is what the others are compared with.
        batch: sequences at a time.
        new_tokens: tokens written after each prompt.

    Returns:
        How it was measured, and under `models` one entry each, in order: `prefill` and `decode` in tokens a second and
        `decode_ratio` to the first model round by round, each with `median`, `low` and `high`, the lowest and highest round;
        `peak_bytes`, of weights, cache and engine; or `failed`, why vLLM does not load it.
    """
    settings = {"batch": batch, "prompt_tokens": _PROMPT_TOKENS["vllm"], "new_tokens": max(new_tokens, 2)}
    together, rounds = _fit_together(models), _ROUNDS["vllm"]
    found: dict[str, list[dict[str, float]]] = {model.name: [] for model in models}
    failed: dict[str, str] = {}
    version = ""
    with StageBar("speed", rounds * len(models)) as bar:
        for group in [models] if together else [[model] for model in models]:
            engines = {model.name: _Engine(model, settings) for model in group}
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
        }
        for model in models
    ]
    about = {"engine": "vllm", "version": version, **settings, "rounds": rounds, "in_turns": together}
    return {**about, "kv_cache_bytes": KV_CACHE_BYTES, "models": entries}


def by_transformers(models: dict[str, Any], batch: int, new_tokens: int) -> dict[str, Any]:
    """Greedy decoding of loaded models, which take turns; as `by_vllm`, with the writing speed alone.

    The models are converted to the precision that this machine is good at, and stay so.
    """
    import torch
    import transformers

    precision = inference_precision()
    for model in models.values():
        model.to(getattr(torch, precision.dtype))

    prompt_tokens, rounds = _PROMPT_TOKENS["transformers"], _ROUNDS["transformers"]
    speeds: dict[str, list[dict[str, float]]] = {name: [] for name in models}
    with torch.inference_mode(), working("speed", "timing"):
        for _ in range(rounds):
            for name, model in models.items():
                ids = torch.full((batch, prompt_tokens), 3, device=model.device)
                start = time.perf_counter()
                model.generate(
                    ids,
                    attention_mask=torch.ones_like(ids),
                    do_sample=False,
                    min_new_tokens=new_tokens,
                    max_new_tokens=new_tokens,
                    pad_token_id=0,
                )
                speeds[name].append({"decode_tokens_per_s": batch * new_tokens / (time.perf_counter() - start)})
    first = next(iter(speeds.values()))
    entries = [
        {"name": name, **_decoding([value["decode_tokens_per_s"] for value in values], first)} for name, values in speeds.items()
    ]
    about = {"engine": "transformers", "version": transformers.__version__, "dtype": precision.dtype}
    about |= {"batch": batch, "prompt_tokens": prompt_tokens}
    return {**about, "new_tokens": new_tokens, "rounds": rounds, "in_turns": True, "models": entries}


def spread(values: list[float]) -> dict[str, float]:
    """Their median, and the lowest and highest."""
    return {"median": statistics.median(values), "low": min(values), "high": max(values)}


def _decoding(values: list[float], reference: list[dict[str, float]]) -> dict[str, Any]:
    ratios = [value / other["decode_tokens_per_s"] for value, other in zip(values, reference, strict=False)]
    return {"decode": spread(values), **({"decode_ratio": spread(ratios)} if ratios else {})}


def _fit_together(models: list[Served]) -> bool:
    """Whether all engines fit into what memory is free, of the accelerator or else the machine."""
    import torch

    sizes = [model_bytes(model.path) for model in models]
    if any(size is None for size in sizes) or any(model.tensor_parallel_size > 1 for model in models):
        return False
    accelerator = torch.accelerator.is_available()
    free = torch.accelerator.get_memory_info()[0] if accelerator else psutil.virtual_memory().available
    return sum(2 * (size or 0) + _ENGINE_BYTES for size in sizes) < free


class _Engine:
    """One model in a process of its own, see serving_worker.py."""

    def __init__(self, model: Served, settings: dict[str, int]) -> None:
        config = load_config(model.path, model.revision, model.trust_remote_code, f"the model `{model.name}`")
        arguments: dict[str, Any] = {"model": model.path, "revision": model.revision, "tokenizer_revision": model.revision}
        arguments |= {"trust_remote_code": model.trust_remote_code, "tensor_parallel_size": model.tensor_parallel_size}
        self.settings = {**settings, "model": arguments, "vocabulary": config.get_text_config().vocab_size}
        self.process: subprocess.Popen[str] | None = None

    def start(self) -> dict[str, Any]:
        """Load the model; the version of vLLM, or why it `failed`."""
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
            raise RuntimeError(f"vLLM ended with status {self.process.wait()} while {self.settings['model']['model']} was timed")
        return dict(json.loads(answer))

    def stop(self) -> None:
        """End it, and what it has started."""
        if self.process is None:
            return
        with suppress(psutil.NoSuchProcess):
            for process in psutil.Process(self.process.pid).children(recursive=True):
                process.kill()
        self.process.kill()
        self.process.wait()
