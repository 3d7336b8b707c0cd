"""Cost of soft targets in generating and scoring: `generate` and `score` compared with a bare vLLM loop.

    python benchmarks/generate.py

One engine, one after the other in turn, the same prompts with the same seeds:
writing, `generate`'s own loop with targets encoded and shards on the disk, against `LLM.generate` without log-probabilities;
reading, `score`'s own loop over what was written, against bare requests with as many `prompt_logprobs`.
More prompts wait than run at once, as in any long run, so that shards are encoded while the engine goes on.
Then what sampled targets add to a step of the model, each part alone, over a distribution for every sequence: its time, and its
share of the bare loop's step.
With `--smoke` the engine is `transformers`, and the bare loop is its own, with nothing stored.
Figures are tokens per second (of completions in writing, of whole texts in reading), of the median round.
"""

import importlib
import statistics
import tempfile
import time
import timeit
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

import synthetic
from found import argument_parser, report

from llmdistill.config import load_experiment
from llmdistill.data import shards
from llmdistill.data.rows import rows_to_table
from llmdistill.data.shard_writer import write_shard
from llmdistill.data.targets import KINDS
from llmdistill.models.loading import load_config
from llmdistill.stages.generate import _Prompts
from llmdistill.stages.prompts import prepared_prompts
from llmdistill.teachers import EngineSpec, Request, fingerprints, open_engine, vllm_worker
from llmdistill.teachers.prompt_encoding import PromptEncoder

MEASURED = ("topk", "sampled")


def main() -> None:
    """Print a row for each kind of targets, and the aims from top-k."""
    parser = argument_parser(__doc__)
    parser.add_argument("--config", default="configs/demo.yaml")
    parser.add_argument("--targets", nargs="+", choices=MEASURED, default=MEASURED)
    parser.add_argument("--prompts", type=int, default=72)
    parser.add_argument("--at-once", type=int, default=24, help="concurrent sequences in vLLM")
    parser.add_argument("--rounds", type=int, default=4)
    arguments = parser.parse_args()
    print("| targets | | bare | llmdistill | ratio |\n| --- | --- | ---: | ---: | ---: |")
    table = []
    size = [("prompts.limit", str(arguments.prompts)), ("generate.rows_per_shard", "12")]
    size += [("teacher.engine_args.max_num_seqs", str(arguments.at_once))]
    with synthetic.demo(arguments.smoke) as tiny:
        overrides = tiny or size
        experiments = {kind: load_experiment(Path(arguments.config), [("targets.kind", kind), *overrides]) for kind in MEASURED}
        for kind in arguments.targets:
            for row in measure(experiments[kind], 1 if arguments.smoke else arguments.rounds):
                table.append({"targets": kind, **row})
                print(f"| {kind} | {row['what']} | {row['bare']:.0f} | {row['ours']:.0f} | {row['ratio']:.3f} |", flush=True)
        bare = next(row["bare"] for row in table if row["what"] == "write")
        shares = parts(experiments["sampled"], arguments.at_once, arguments.at_once / bare)
    aims = {f"{row['what']}_ratio_{row['targets']}": row["ratio"] for row in table}
    print("\ntokens per second")
    report({"table": table, "parts": shares}, aims, arguments.json)


def parts(experiment: Any, rows: int, step: float) -> dict[str, float]:
    """The shares of a step of so many seconds that the parts of sampled targets take, which are printed with their times."""
    import torch

    torch.manual_seed(0)
    kind, on_accelerator = KINDS["sampled"], torch.accelerator.is_available()
    here: dict[str, Any] = {"device": torch.accelerator.current_accelerator() if on_accelerator else "cpu"}  # as the engine
    logits = 3 * torch.randn(rows, load_config(experiment.teacher.model, experiment.teacher.revision).vocab_size, **here)
    log_softmax, uniform = vllm_worker.LogSoftmax(), torch.rand(rows, 1, dtype=torch.float64, **here)
    logprobs = log_softmax(logits)
    work: dict[str, Callable[[], Any]] = {
        "log-softmax": lambda: log_softmax(logits),
        "drawing the sample": lambda: kind.keep(logprobs, experiment.targets.kept, uniform),
        "normaliser of the temperature": lambda: vllm_worker._log_sum(logprobs, 0.7),
    }
    print(f"\n| part of a step of {rows} sequences | ms | share |\n| --- | ---: | ---: |")
    shares = {}

    def whole(function: Callable[[], Any]) -> None:
        function()
        if on_accelerator:
            torch.accelerator.synchronize()

    for name, function in work.items():
        whole(function)
        seconds = statistics.median(timeit.repeat(partial(whole, function), number=1, repeat=50))
        shares[name] = seconds / step
        print(f"| {name} | {1000 * seconds:.2f} | {shares[name]:.1%} |", flush=True)
    return shares


def measure(experiment: Any, rounds: int) -> Any:
    """Writing and reading with one engine: each a dictionary of medians."""
    vllm: Any = importlib.import_module("vllm") if experiment.teacher.engine == "vllm" else None
    prepared = prepared_prompts(experiment)
    assert prepared is not None
    chat = PromptEncoder(experiment, fingerprints(experiment.teacher)[1])
    source = _Prompts(experiment, {"": chat}, prepared, [""] * len(prepared.prompts))
    chat, requests = source.chat, list(source.requests)
    longest = source.parts[0].max_model_len
    spec = EngineSpec(
        experiment.teacher,
        experiment.generate,
        experiment.targets,
        chat.end_ids,
        longest + 1,
        experiment.seed,
    )
    engine: Any = open_engine(spec)
    sampling = experiment.generate

    def bare_writing():
        if vllm is None:
            return sum(len(completion.ids) for completion in engine.generate([requests]))
        params = [
            vllm.SamplingParams(
                temperature=sampling.temperature, top_p=sampling.top_p, max_tokens=sampling.max_tokens, seed=request.seed
            )
            for request in requests
        ]
        prompts = [{"prompt_token_ids": list(request.prompt_ids)} for request in requests]
        outputs = engine.llm.generate(prompts, params, use_tqdm=False)
        return sum(len(output.outputs[0].token_ids) for output in outputs)

    def stored(made):
        """The loop of `shards`, into a directory that is thrown away."""
        layout, tokens = shards.Layout([len(requests)], sampling.rows_per_shard), 0

        with tempfile.TemporaryDirectory() as directory:

            def store(index, completions):
                table = rows_to_table([source.row(completion) for completion in completions], chat.vocab_size)
                write_shard(Path(directory), "train", index, len(layout), table)

            for completion in shards._by_shard(made, layout, store):
                tokens += len(completion.ids)
                texts[completion.index] = completion.ids
        return tokens

    texts: dict[int, Any] = {}

    def our_writing():
        return stored(engine.generate([requests]))

    def whole():
        return [Request(r.index, r.prompt_ids, r.seed, texts[r.index].tolist()) for r in requests]

    def bare_reading():
        if vllm is None:
            list(engine.score([whole()]))
            return sum(len(request.prompt_ids) + len(request.completion_ids) for request in whole())
        params = vllm.SamplingParams(
            temperature=0, max_tokens=1, prompt_logprobs=experiment.targets.kept, flat_logprobs=True, detokenize=False
        )
        prompts = [{"prompt_token_ids": [*request.prompt_ids, *request.completion_ids]} for request in whole()]
        outputs = engine.llm.generate(prompts, params, use_tqdm=False)
        return sum(len(output.prompt_token_ids) for output in outputs)

    def our_reading():
        stored(engine.score([whole()]))
        return sum(len(request.prompt_ids) + len(request.completion_ids) for request in whole())

    for what, bare, ours in (("write", bare_writing, our_writing), ("read", bare_reading, our_reading)):
        speeds: dict[Any, list[float]] = {bare: [], ours: []}
        for turn in range(rounds + 1):  # the first warms up
            for way in (bare, ours) if turn % 2 else (ours, bare):
                start = time.perf_counter()
                tokens = way()
                if turn:
                    speeds[way].append(tokens / (time.perf_counter() - start))
        medians = {way: statistics.median(values) for way, values in speeds.items()}
        ratio = statistics.median(mine / theirs for mine, theirs in zip(speeds[ours], speeds[bare], strict=True))
        yield {"what": what, "bare": medians[bare], "ours": medians[ours], "ratio": ratio}


if __name__ == "__main__":
    main()
