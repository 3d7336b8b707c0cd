"""The fast engine: vLLM in this process, with continuous batching and the top of the distribution in the same pass."""

import math
import os
import subprocess
import sys
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import replace
from typing import Any

import numpy as np

from llmdistill.config import Generate
from llmdistill.config.machine import count_cores
from llmdistill.data.targets import Array
from llmdistill.errors import InputError
from llmdistill.runs.quiet import quiet_libraries
from llmdistill.teachers import Completion, Engine, EngineSpec, Request, Said, guard
from llmdistill.teachers.vllm_worker import ASKED

# Concurrent requests in the engine: more than it runs at once, so that it is never idle while a shard is written.
_QUEUE = 2048
_READ_BYTES = 1 << 30  # of float32 log-probabilities at a time when scoring finished text; some copies come on top
_SEQUENCES = 256  # sequences scored at a time
_MOST, _SPARE = 0.92, 0.03  # shares of a GPU's memory: vLLM's default, and what is left free
# On a CPU with at most this many cores, vLLM runs in this process: the processes that it starts otherwise wait for each other
# in busy loops that occupy a core, and each takes time to start. On two cores that doubles the speed (docs/teachers.md).
_FEW_CORES = 8
_SECOND_RUNNER = "VLLM_USE_V2_MODEL_RUNNER"  # if not set, vLLM uses its second model runner on a GPU


class VllmEngine(Engine):
    """Streams requests through one `vllm.LLM`; log-probabilities are the model's own, before temperature and penalties."""

    def __init__(self, spec: EngineSpec) -> None:
        prepare_environment()
        _choose_process(spec)
        self.kept = spec.kept
        self.end_ids = spec.end_ids
        self.sampling = spec.sampling
        # The correction of a log-probability for the temperature comes as one more value at each position.
        self.tempered = spec.sampling.shows_everything and spec.sampling.temperature != 1
        self.tokens = 0
        self.asked = spec.asked
        extended = bool(self.tempered or not spec.kept.stored.most_likely or spec.known_ids is not None or spec.asked)
        self._sleep_level = _sleep_level(spec)
        self._rests = False
        arguments = self._arguments(spec)
        if extended or spec.beside_training:
            _check_runner()
            arguments["worker_extension_cls"] = "llmdistill.teachers.vllm_worker.SampleTargets"
        import vllm

        self._guard = _end_with_this_process()
        self.llm = vllm.LLM(**{**arguments, **spec.teacher.engine_args})
        if extended:
            temperature = spec.sampling.temperature if self.tempered else None
            settings = (spec.kept.stored.name, spec.kept.kept, spec.seed, temperature, spec.known_ids, spec.asked or 0)
            self.llm.collective_rpc("sample_targets", args=settings)
        self._params = vllm.SamplingParams
        self._sampling = self._sampling_arguments(spec.sampling, spec.end_ids)

    def _arguments(self, spec: EngineSpec) -> dict[str, Any]:
        """Arguments of `vllm.LLM`, before `teacher.engine_args`."""
        from vllm.platforms import current_platform

        teacher = spec.teacher
        arguments: dict[str, Any] = {
            "model": teacher.model,
            "revision": teacher.revision,
            "tokenizer_revision": teacher.revision,
            "dtype": teacher.dtype,
            "tensor_parallel_size": teacher.tensor_parallel_size,
            "trust_remote_code": teacher.trust_remote_code,
            "max_model_len": spec.max_model_len,
            "max_logprobs": max(spec.kept.kept + max(self.tempered, spec.asked or 0), 1),
            "logprobs_mode": "raw_logprobs",
            "use_tqdm_on_load": False,
        }
        if (share := _share_of_memory(bool(spec.reads_with))) is not None:
            arguments["gpu_memory_utilization"] = share
        if self._sleep_level:
            arguments["enable_sleep_mode"] = True
        if spec.reads_with:
            # Every token of a prefill then gets a full distribution, which vLLM does not account for: it has to fit.
            arguments["max_num_batched_tokens"] = max(_READ_BYTES // (4 * spec.reads_with), _SEQUENCES)
            arguments |= {"max_num_seqs": _SEQUENCES, "enable_chunked_prefill": True}
        if current_platform.is_cpu():
            arguments["enforce_eager"] = True
        if current_platform.is_cpu() and (not spec.reads_with or spec.sampling.rereads):
            # Seeded requests stop vLLM's CPU engine when a prompt is prefilled in pieces ("CPU Generator does not use
            # offset"), so every prompt has to fit into one.
            arguments |= {"enable_chunked_prefill": False, "max_num_batched_tokens": max(spec.max_model_len, 2048)}
        return arguments

    def _sampling_arguments(self, sampling: Generate, end_ids: Sequence[int]) -> dict[str, Any]:
        """Arguments of `vllm.SamplingParams`, except the seed of the request."""
        from vllm.sampling_params import StructuredOutputsParams

        schema = sampling.json_schema
        return {
            "temperature": sampling.temperature,
            "top_p": sampling.top_p,
            "top_k": sampling.top_k,
            "max_tokens": sampling.max_tokens,
            "min_tokens": sampling.min_tokens,
            "stop_token_ids": list(end_ids),
            "logprobs": None if sampling.rereads else self.kept.kept + self.tempered,
            "flat_logprobs": True,
            "detokenize": False,
            **({"structured_outputs": StructuredOutputsParams(json=schema)} if schema is not None else {}),
        }

    def generate(self, batches: Iterable[Sequence[Request]]) -> Iterator[Completion]:
        """Continue every request, keeping the engine's queue filled across batches."""
        for output in self._outputs(batches, lambda request: self._params(**self._sampling, seed=request.seed)):
            completion = output.outputs[0]
            ids = np.asarray(completion.token_ids, dtype=np.int64)
            if self.sampling.rereads:
                yield Completion(int(output.request_id), ids, completion.finish_reason, np.empty(0), None)
                continue
            made = self._completion(output.request_id, ids, completion.finish_reason, completion.logprobs)
            yield replace(made, sampling_logprob=self._sampling_logprob(made, completion.logprobs))

    def score(self, batches: Iterable[Sequence[Request]]) -> Iterator[Completion]:
        """Score every request's text in one prefill; the extra token that vLLM insists on generating is dropped."""
        wanted = {"prompt_logprobs": self.kept.kept + (self.asked or 0), "flat_logprobs": True, "detokenize": False}
        params = self._params(temperature=0, max_tokens=1, **wanted)
        starts: dict[str, int] = {}

        def remember(request: Request) -> Any:
            starts[str(request.index)] = len(request.prompt_ids)
            if request.asked_NJ is None:
                return params
            # The distribution of a token is in the row of the previous one.
            asked = {"first_row": len(request.prompt_ids) - 1, "ids": request.asked_NJ.astype(np.int32).tobytes()}
            return self._params(temperature=0, max_tokens=1, **wanted, extra_args={ASKED: asked})

        for output in self._outputs(batches, remember, reads=True):
            start = starts.pop(output.request_id)
            self.tokens += len(output.prompt_token_ids) - start
            ids = np.asarray(output.prompt_token_ids[start:], dtype=np.int64)
            reason = "stop" if ids[-1] in self.end_ids else "length"
            # The first token of a prompt has no distribution: entry 1 is that of the second token.
            yield self._completion(output.request_id, ids, reason, output.prompt_logprobs[start:])

    def _outputs(
        self, batches: Iterable[Sequence[Request]], params_of: Callable[[Request], Any], reads: bool = False
    ) -> Iterator[Any]:
        """The finished outputs, as they come."""
        engine = self.llm.llm_engine
        waiting = (request for batch in batches for request in batch)
        more = True
        while more or engine.has_unfinished_requests():
            while more and engine.get_num_unfinished_requests() < _QUEUE:
                request = next(waiting, None)
                if request is None:
                    more = False
                else:
                    ids = [*request.prompt_ids, *request.completion_ids]
                    engine.add_request(str(request.index), {"prompt_token_ids": ids}, params_of(request))
            # If it runs in a separate process, a step without a request would wait for one forever.
            outputs = engine.step() if engine.has_unfinished_requests() else []
            self.tokens += 0 if reads else len(outputs)  # each step generates one token for each
            yield from (output for output in outputs if output.finished)

    def _sampling_logprob(self, completion: Completion, flat: Any) -> float | None:
        if not self.sampling.shows_everything:
            return None
        written = completion.token_logprobs.sum(dtype=np.float64)
        if not self.tempered:
            return float(written)
        normalisers = np.asarray(flat.logprobs, dtype=np.float64)[self.kept.kept + 1 :: self.kept.kept + 2]
        return float(written / self.sampling.temperature - normalisers.sum())

    def rest(self) -> None:
        """Free the accelerator's memory; the teacher's weights move to the machine's memory, the student's are dropped."""
        if self._sleep_level and not self._rests:
            self.llm.sleep(level=self._sleep_level)
            self._rests = True

    def wake(self, weights: Iterable[tuple[str, Any]] | None = None) -> None:
        """Take the memory back, with new weights if given; everything computed with the old ones is discarded."""
        if self._rests:
            self.llm.wake_up(tags=["weights"])
        if weights is not None:
            self.llm.collective_rpc("take_weights", args=(weights,))
            if not self.llm.reset_prefix_cache():
                raise RuntimeError("vLLM kept its prefix cache, which belongs to the old weights")
        if self._rests:
            self.llm.wake_up(tags=["kv_cache"])
            self._rests = False

    def close(self) -> None:
        """Stop vLLM's processes, or release the model if it runs in this one."""
        from vllm.distributed import cleanup_dist_env_and_memory

        self.llm.llm_engine.engine_core.shutdown()
        del self.llm
        cleanup_dist_env_and_memory()

    def _completion(self, request_id: str, ids: Array, finish_reason: str, flat: Any) -> Completion:
        token_logprobs, kept_ids, kept_logprobs = flat_logprobs(flat, self.kept.kept + (self.asked or 0))
        if len(ids) != len(token_logprobs):
            raise RuntimeError(f"vLLM returned {len(ids)} tokens with {len(token_logprobs)} distributions")
        if self.asked is not None:
            said = Said.of(kept_ids, kept_logprobs, self.kept.kept)
            return Completion(int(request_id), ids, finish_reason, token_logprobs, None, said=said)
        targets = self.kept.stored.from_kept(kept_ids, kept_logprobs)
        return Completion(int(request_id), ids, finish_reason, token_logprobs, targets)


def prepare_environment(kv_cache_gib: int = 2) -> None:
    """Set environment variables for vLLM's processes; those set by the user are kept.

    Args:
        kv_cache_gib: memory for keys and values on a CPU, in GiB.
    """
    quiet_libraries()
    os.environ.setdefault("VLLM_CPU_KVCACHE_SPACE", str(kv_cache_gib))
    os.environ.setdefault(_SECOND_RUNNER, "0")
    from vllm.platforms import current_platform

    if current_platform.is_cpu() and count_cores() <= _FEW_CORES:
        os.environ.setdefault("VLLM_ENABLE_V1_MULTIPROCESSING", "0")


def _share_of_memory(reads: bool) -> float | None:
    """The share of a GPU's memory that vLLM may use: its own default, but no more than is free; None leaves it to vLLM.

    Args:
        reads: whether prompts get log-probabilities, whose memory vLLM does not account for.
    """
    from vllm.platforms import current_platform

    if not current_platform.is_cuda():
        return None
    from vllm.third_party import pynvml  # which creates no CUDA context in this process

    try:
        pynvml.nvmlInit()
        device = pynvml.nvmlDeviceGetHandleByIndex(current_platform.visible_device_id_to_physical_device_id(0))
        memory = pynvml.nvmlDeviceGetMemoryInfo(device)
        pynvml.nvmlShutdown()
    except pynvml.NVMLError:  # a GPU without NVML, such as a Jetson's
        return None
    beside = 2 * _READ_BYTES if reads else 0
    return math.floor(100 * (min(_MOST, memory.free / memory.total - _SPARE) - beside / memory.total)) / 100


def _check_runner() -> None:
    """Refuse the model runner whose sampler the worker extension does not support.

    Raises:
        InputError: if the environment selects it.
    """
    if (found := os.environ[_SECOND_RUNNER]) != "0":
        raise InputError(
            f"{_SECOND_RUNNER} is {found} in the environment, but teacher.engine vllm needs vLLM's first model runner for "
            "these targets; unset it, or set teacher.engine to transformers"
        )


def _sleep_level(spec: EngineSpec) -> int:
    """How deeply the engine sleeps while the student trains: 1 keeps the weights in the machine's memory, 2 does not.

    0 means not at all: on a CPU vLLM has no such mode.
    """
    from vllm.platforms import current_platform

    if spec.beside_training is None or current_platform.is_cpu():
        return 0
    return {"teacher": 1, "student": 2}[spec.beside_training]


def _choose_process(spec: EngineSpec) -> None:
    """Run the student's engine in this process, so that weights are passed by reference.

    vLLM lets only one engine per process sleep, so the teacher's runs in another one.
    """
    from vllm import envs
    from vllm.platforms import current_platform

    if spec.beside_training == "student" or (spec.beside_training and not current_platform.is_cpu()):
        os.environ["VLLM_ENABLE_V1_MULTIPROCESSING"] = str(int(spec.beside_training == "teacher"))
        envs.disable_envs_cache()  # an engine started earlier in this process has already read it


def _end_with_this_process() -> "subprocess.Popen[bytes]":
    """Have everything that vLLM starts killed when this process is gone; keep the returned object alive."""
    return subprocess.Popen(
        [sys.executable, "-I", "-S", guard.__file__, str(os.getpid())],
        stdin=subprocess.PIPE,
        stdout=subprocess.DEVNULL,
        stderr=subprocess.DEVNULL,
        start_new_session=True,
    )


def flat_logprobs(flat: Any, count: int) -> tuple[Array, Array, Array]:
    """The written tokens' log-probabilities, and the ids and log-probabilities of so many others, from vLLM's `FlatLogprobs`.

    vLLM puts the written token first at every position, before those requested, whatever its rank; it appears twice if it is
    one of them.
    """
    positions = len(flat.start_indices)
    logprobs = np.asarray(flat.logprobs, dtype=np.float32).reshape(positions, -1)[:, : count + 1]
    ids = np.asarray(flat.token_ids, dtype=np.int64).reshape(positions, -1)[:, : count + 1]
    return logprobs[:, 0], ids[:, 1:], logprobs[:, 1:]
