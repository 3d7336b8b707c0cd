"""Acceptance in speculative decoding as `eval` predicts it, against what the engine counts.

    llmdistill run configs/draft.yaml && python benchmarks/draft.py

The student of a run drafts for its teacher, and the teacher for itself, in the real vLLM, on the run's held-out prompts. What
`eval` computes from the weights, on the texts that vLLM has written, stands beside vLLM's own counters: the share of first drafts
that are accepted, and the tokens a cycle. At temperature 0, drafts are greedy; at temperature 1, they are too by default, and
sampled with `draft_sample_method: probabilistic`.

The CPU build of vLLM 0.32 has a defect: what expands the temperature of requests to their drafts writes into a copy. So drafts
are checked at a temperature that is whatever lay in the memory, and text at any temperature above 0 is wrong. Where the defect is
found, that function is replaced by what it says, and a last row has the counters without that.
With `--smoke` a plain loop over transformers drafts instead of vLLM.
"""

import json
import os
import subprocess
import sys
import tempfile
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import synthetic
from found import argument_parser, report

# Who drafts, at which temperature, with which `draft_sample_method`, and what of `eval` predicts it.
RUNS = (
    ("student", 0, "greedy", "temperature_0"),
    ("student", 1, "greedy", "greedy"),
    ("student", 1, "probabilistic", "sampled"),
    ("teacher", 0, "greedy", "temperature_0"),
    ("teacher", 1, "probabilistic", "sampled"),
)
COUNTERS = "vllm:spec_decode_num_"


def main() -> None:
    """Print a row for each way of drafting, and the aims."""
    parser = argument_parser(__doc__)
    parser.add_argument("--config", type=Path, default=Path("configs/draft.yaml"))
    parser.add_argument("--output", help="of the run, if it is not that of the configuration")
    parser.add_argument("--prompts", type=int, default=24)
    parser.add_argument("--tokens", type=int, default=96)
    parser.add_argument("--gamma", type=int, default=3)
    parser.add_argument("--serve", type=Path, help="settings of one engine as JSON; what it counts is written there, too")
    arguments = parser.parse_args()
    if arguments.serve:
        settings = json.loads(arguments.serve.read_text())
        arguments.serve.write_text(json.dumps(settings | served(settings)))
        return
    table = []
    with synthetic.demo(arguments.smoke, "generate", "curate", "prune") as tiny:
        print("| drafts by | temperature | drafts | first accepted, predicted | counted | tokens a cycle, predicted | counted |")
        print("| --- | ---: | --- | ---: | ---: | ---: | ---: |")
        for row in measure(arguments, tiny):
            table.append(row)
            found = f"{row['first']:.1%} | {row['first_counted']:.1%} | {row['tokens']:.3f} | {row['tokens_counted']:.3f}"
            print(f"| {row['drafts by']} | {row['temperature']} | {row['drafts']} | {found} |", flush=True)
    right = [row for row in table if "defect" not in row["drafts"]]
    aims = {"draft_tokens_off": max(abs(row["tokens"] / row["tokens_counted"] - 1) for row in right)}
    print()
    report({"gamma": arguments.gamma, "table": table}, aims, arguments.json)


def measure(arguments: Any, tiny: list[tuple[str, str]]) -> Iterator[dict[str, Any]]:
    """A row for each of `RUNS`."""
    from llmdistill import load_dataset
    from llmdistill.config import load_experiment
    from llmdistill.models.loading import load_model

    output = [("output", arguments.output)] if arguments.output else []
    experiment = load_experiment(Path("configs/demo.yaml") if tiny else arguments.config, tiny or output)
    student = experiment.directory("student-before" if tiny else "student")
    paths = {"teacher": experiment.teacher.model, "student": str(student)}
    models = {name: load_model(path, dtype="float32") for name, path in paths.items()}
    rows = load_dataset(experiment.directory("curated"), "test")
    prompts = dict.fromkeys(tuple(row["input_ids"][: int(row["completion_start"])].tolist()) for row in rows)
    size = (2, 12) if tiny else (arguments.prompts, arguments.tokens)
    asked = {"teacher": paths["teacher"], "gamma": arguments.gamma, "tokens": size[1], "mended": True}
    asked |= {"prompts": [*map(list, prompts)][: size[0]]}
    for name, temperature, method, mode in RUNS:
        how = asked | {"draft": paths[name], "method": method, "temperatures": [temperature]}
        if tiny:
            (found,) = plain_loop(models["teacher"], models[name], how)
        else:
            answer = in_process(how)
            (found,) = answer["runs"]
        yield {"drafts by": name, "temperature": temperature, "drafts": method, **figures(found, models, name, mode)}
    if not tiny and answer["defect"]:
        (found,) = in_process(how | {"mended": False})["runs"]
        broken = {"drafts by": name, "temperature": temperature, "drafts": f"{method}, with the defect"}
        yield broken | figures(found, models, name, mode)


def figures(found: dict[str, Any], models: dict[str, Any], name: str, mode: str) -> dict[str, float]:
    """The first drafts that are accepted and the tokens a cycle: by `eval`, on the same texts, and by the counters."""
    from llmdistill.evaluation.fidelity import fidelity

    rows = [{"input_ids": np.array([*p, *t]), "completion_start": len(p)} for p, t in found["texts"]]
    measured = fidelity({"teacher": models["teacher"], name: models[name]}, rows, 8)
    gamma = found["gamma"]
    starts = measured[f"{name} {mode} cycles"][:, gamma - 1].sum()
    accepted_K = measured[f"{name} {mode} accepted"][:, gamma - 1].sum(axis=0)
    counted_K = np.array(found["accepted_by_place"]) / found["cycles"]
    return {
        "cycles": found["cycles"],
        "first": accepted_K[0] / starts,
        "first_counted": counted_K[0],
        "tokens": 1 + accepted_K.sum() / starts,
        "tokens_counted": 1 + counted_K.sum(),
    }


def in_process(settings: dict[str, Any]) -> dict[str, Any]:
    """What `served` returns, from a process of its own: vLLM does not give back what it took."""
    with tempfile.TemporaryDirectory() as directory:
        file = Path(directory) / "settings.json"
        file.write_text(json.dumps(settings))
        done = subprocess.run([sys.executable, __file__, "--serve", file], capture_output=True, text=True)
        if done.returncode:
            raise RuntimeError(f"vLLM failed: {done.stderr[-2000:]}")
        return dict(json.loads(file.read_text()))


def served(settings: dict[str, Any]) -> dict[str, Any]:
    """The texts that vLLM writes at each temperature, and its counters.

    Returns:
        `runs`, one for each temperature: `texts`, pairs of prompt and completion ids, `cycles`, and `accepted_by_place` in the
        draft; and whether the `defect` was found.
    """
    os.environ["VLLM_ENABLE_V1_MULTIPROCESSING"] = "0"  # the function is replaced in this process
    from llmdistill.teachers.vllm import prepare_environment

    prepare_environment(kv_cache_gib=1)
    import torch
    import vllm
    from vllm.platforms import current_platform
    from vllm.v1.sample import rejection_sampler

    expand = rejection_sampler.expand_batch_to_tokens
    if settings["mended"]:
        rejection_sampler.expand_batch_to_tokens = expanded
    drafts = {"method": "draft_model", "model": settings["draft"], "num_speculative_tokens": settings["gamma"]}
    llm = vllm.LLM(
        settings["teacher"],
        dtype="float32",
        max_model_len=max(map(len, settings["prompts"])) + settings["tokens"] + 64,  # drafts that reach beyond it are cut
        max_num_seqs=24,
        enforce_eager=current_platform.is_cpu(),
        disable_log_stats=False,
        use_tqdm_on_load=False,
        seed=0,
        speculative_config={**drafts, "draft_sample_method": settings["method"]},
    )
    here = {"device": torch.accelerator.current_accelerator() if torch.accelerator.is_available() else "cpu"}
    asked = torch.tensor([0.5, 2.0], **here), torch.tensor([1, 3], dtype=torch.int32, **here), 3
    right = bool(torch.equal(expand(*asked), expanded(*asked)))
    found, before = [], counters(llm)
    for temperature in settings["temperatures"]:
        params = vllm.SamplingParams(temperature=temperature, max_tokens=settings["tokens"], detokenize=False)
        prompts = [{"prompt_token_ids": ids} for ids in settings["prompts"]]
        outputs = llm.generate(prompts, params, use_tqdm=False)
        after = counters(llm)
        counted = {"cycles": int(after[0] - before[0]), "accepted_by_place": (after[1:] - before[1:]).tolist()}
        texts = [(list(output.prompt_token_ids), list(output.outputs[0].token_ids)) for output in outputs]
        found.append({"gamma": settings["gamma"], "texts": texts, **counted})
        before = after
    return {"runs": found, "defect": not right}


def counters(llm: Any) -> Any:
    """Of vLLM since its start: cycles, and how many kept the first draft, the first two, …"""
    found = {metric.name.removeprefix(COUNTERS): metric for metric in llm.get_metrics() if metric.name.startswith(COUNTERS)}
    return np.array([found["drafts"].value, *found["accepted_tokens_per_pos"].values])


def expanded(values: Any, ends: Any, count: int, replace_from: float = 0, replace_to: float = 0) -> Any:
    """`vllm.v1.sample.rejection_sampler.expand_batch_to_tokens`: the value of each request for each of its drafts."""
    import torch

    lengths = torch.diff(ends.long(), prepend=ends.new_zeros(1).long())
    return torch.where(values == replace_from, torch.full_like(values, replace_to), values).repeat_interleave(lengths)


def plain_loop(teacher: Any, draft: Any, settings: dict[str, Any]) -> list[dict[str, Any]]:
    """As `served`'s runs, without an engine: Leviathan et al. 2023, algorithm 1, token by token."""
    import torch

    def distribution(model: Any, ids: list[int], temperature: float) -> Any:
        logits = model(torch.tensor(ids)[None]).logits[0, -1]
        return logits.softmax(-1) if temperature else torch.nn.functional.one_hot(logits.argmax(), len(logits)).float()

    found = []
    torch.manual_seed(0)
    for temperature in settings["temperatures"]:
        cycles, kept, texts = 0, np.zeros(settings["gamma"]), []
        for prompt in settings["prompts"]:
            ids = [*prompt, int(distribution(teacher, prompt, temperature).multinomial(1))]
            while len(ids) - len(prompt) + settings["gamma"] <= settings["tokens"]:
                cycles += 1
                for place in range(settings["gamma"] + 1):
                    p = distribution(teacher, ids, temperature)
                    if place == settings["gamma"]:
                        ids.append(int(p.multinomial(1)))
                        break
                    q = distribution(draft, ids, temperature if settings["method"] == "probabilistic" else 0)
                    token = int(q.multinomial(1))
                    if float(torch.rand(())) < p[token] / q[token]:
                        ids.append(token)
                        kept[place] += 1
                    else:
                        ids.append(int((p - q).clamp(min=0).multinomial(1)))
                        break
            texts.append((list(prompt), ids[len(prompt) :]))
        found.append({"gamma": settings["gamma"], "texts": texts, "cycles": cycles, "accepted_by_place": kept.tolist()})
    return found


if __name__ == "__main__":
    main()
