"""One student of two specialists, each of which teaches its own domain.

    make demo && python benchmarks/routes.py

The demo's teacher is trained further on two made-up tasks, additions and dates, to be a specialist of each. A run with
`teachers` and `route` lets each answer the prompts of its domain, and trains the demo's teacher as it was on both. What is
printed is the share of right answers to held-out prompts, with 95% intervals, of the student and of all teachers on both
domains, and for each domain how many points the student is below its specialist: the aim is two at most.
"""

import calendar
import json
import random
import tempfile
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import synthetic
import torch
from found import argument_parser, report
from transformers.utils import logging

from llmdistill.config import load_experiment
from llmdistill.evaluation.statistics import pairs_interval, share_interval
from llmdistill.models.chat_template import ChatTemplate
from llmdistill.models.loading import continue_prompts, end_token_ids, load_config, load_model, load_tokenizer
from llmdistill.stages.table import STAGES

MONTHS = [calendar.month_name[number] for number in range(1, 13)]
SYSTEM = "Be exact."
Line = dict[str, str]


def addition(generator: random.Random) -> tuple[str, str]:
    """Two small numbers, and their sum."""
    first, second = generator.randint(10, 60), generator.randint(2, 30)
    return f"Add {first} and {second}.", str(first + second)


def date(generator: random.Random) -> tuple[str, str]:
    """A date in words, and as ISO 8601 has it."""
    day, month, year = generator.randint(1, 28), generator.randint(1, 12), generator.randint(1900, 2099)
    return f"Normalise: {MONTHS[month - 1]} {day}, {year}.", f"{year}-{month:02d}-{day:02d}"


DOMAINS = {"sums": addition, "dates": date}


def main() -> None:
    """Train the specialists and the student; print the table and the aims."""
    parser = argument_parser(__doc__)
    parser.add_argument("--model", default="models/SmolLM2-135M-Instruct")
    parser.add_argument(
        "--steps", type=int, default=120, help="of each specialist, of eight rows; the student has four times as many"
    )
    parser.add_argument("--prompts", type=int, default=1200, help="of each domain, for the specialist to answer")
    parser.add_argument("--tests", type=int, default=400, help="held-out prompts of each domain")
    arguments = parser.parse_args()
    logging.set_verbosity_error()
    with tempfile.TemporaryDirectory() as name:
        directory = Path(name)
        if arguments.smoke:
            arguments.model = synthetic.teacher(directory / "teacher")
            arguments.steps, arguments.prompts, arguments.tests = 2, 8, 6
        table = measure(arguments, directory)
    print("| model | domain | right |\n| --- | --- | ---: |")
    for row in table:
        print(f"| {row['model']} | {row['domain']} | {row['right']:.1%} ({row['low']:.1%} to {row['high']:.1%}) |")
    by_name = {(row["model"], row["domain"]): row for row in table}
    aims = {}
    for domain in DOMAINS:
        below = by_name["student", domain]["below"]
        ends = f"{below['low']:.1f} to {below['high']:.1f}"
        print(f"\n{domain}: the student is {below['mean']:.1f} points below its specialist ({ends})")
        aims[f"routes_{domain}_points_below"] = below["mean"]
    print()
    report({"table": table}, aims, arguments.json)


def measure(arguments: Any, directory: Path) -> list[dict[str, Any]]:
    """The share of right answers of every model in every domain."""
    tests = {domain: list(lines(domain, arguments.tests, seed=1)) for domain in DOMAINS}
    held_out = {line["prompt"] for some in tests.values() for line in some}
    models = {"before": arguments.model}
    for domain in DOMAINS:
        taught = (line for line in lines(domain, 16 * arguments.steps, seed=2) if line["prompt"] not in held_out)
        models[domain] = str(specialist(arguments.model, list(taught), arguments.steps, directory / domain))
    models["student"] = distil(arguments, directory, models, held_out)
    right = {(name, domain): answered(model, tests[domain]) for name, model in models.items() for domain in DOMAINS}
    table = []
    for (name, domain), hits in right.items():
        ones = np.ones(len(hits))
        draws = np.random.default_rng(0).multinomial(len(hits), ones / len(hits), 2000)
        share = share_interval(hits, ones, draws)
        row: dict[str, Any] = {"model": name, "domain": domain, "right": share.mean, "low": share.low, "high": share.high}
        if name == "student":
            below = pairs_interval(right[domain, domain] - hits)
            row["below"] = {"mean": 100 * below.mean, "low": 100 * below.low, "high": 100 * below.high}
        table.append(row)
    return table


def lines(domain: str, count: int, seed: int) -> Iterator[Line]:
    """Different prompts of a domain with their answers."""
    generator, seen = random.Random(f"{domain} {seed}"), set()
    for _ in range(20 * count):
        prompt, answer = DOMAINS[domain](generator)
        if prompt not in seen:
            seen.add(prompt)
            yield {"prompt": prompt, "answer": answer, "domain": domain}
        if len(seen) == count:
            return


def chat_of(model: str) -> tuple[ChatTemplate, list[int]]:
    """What makes token ids of its text, and those that end it."""
    tokenizer = load_tokenizer(model, None, False)
    ends = end_token_ids(model, None, load_config(model, None, False), tokenizer)
    return ChatTemplate(tokenizer, ends, {}), ends


def asked(line: Line) -> list[dict[str, str]]:
    """The prompt, as the run has it."""
    return [{"role": "system", "content": SYSTEM}, {"role": "user", "content": line["prompt"]}]


def specialist(base: str, taught: list[Line], steps: int, directory: Path, rows: int = 8) -> Path:
    """Train a model on the answers of a domain, by cross-entropy on their tokens."""
    chat, _ = chat_of(base)
    model = load_model(base, dtype="float32").train()
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-4, weight_decay=0.0)
    turns = [chat.turn_ids(asked(line), {"role": "assistant", "content": line["answer"]}, None) for line in taught]
    for step in range(steps):
        batch = [turns[(step * rows + number) % len(turns)] for number in range(rows)]
        width = max(len(prompt) + len(answer) for prompt, answer in batch)
        ids, labels = torch.zeros(rows, width, dtype=torch.long), torch.full((rows, width), -100)
        for number, (prompt, answer) in enumerate(batch):
            ids[number, : len(prompt) + len(answer)] = torch.tensor([*prompt, *answer])
            labels[number, len(prompt) : len(prompt) + len(answer)] = torch.tensor(answer)
        with torch.autocast("cpu", torch.bfloat16):
            loss = model(ids, labels=labels).loss
        loss.backward()
        optimizer.step()
        optimizer.zero_grad()
        for group in optimizer.param_groups:
            group["lr"] = 1e-4 * (1 - (step + 1) / steps)
        if step % 20 == 0 or step + 1 == steps:
            print(f"{directory.name}: step {step + 1} of {steps}, loss {loss.item():.3f}", flush=True)
    model.save_pretrained(directory)
    load_tokenizer(base, None, False).save_pretrained(directory)
    return directory


def distil(arguments: Any, directory: Path, models: dict[str, str], held_out: set[str]) -> str:
    """The run: each specialist answers the prompts of its domain, and one student learns from both."""
    prompts = [line for domain in DOMAINS for line in lines(domain, arguments.prompts, seed=3) if line["prompt"] not in held_out]
    file, configuration = directory / "prompts.jsonl", directory / "routes.yaml"
    file.write_text("".join(json.dumps({name: line[name] for name in ("prompt", "domain")}) + "\n" for line in prompts))
    configuration.write_text(
        json.dumps(
            {
                "output": str(directory / "run"),
                "teachers": {name: {"model": models[name], "engine": "transformers", "batch_size": 32} for name in DOMAINS},
                "route": {"column": "domain"},
                "prompts": {"source": str(file), "system": SYSTEM},
                "generate": {"max_tokens": 16},
                "student": {"model": arguments.model},
                "train": {
                    "args": {
                        "max_steps": 4 * arguments.steps,
                        "per_device_train_batch_size": 8,
                        "learning_rate": 1e-4,
                        "gradient_checkpointing": False,
                        "save_strategy": "no",
                    }
                },
                "eval": {"held_out": 0.05},
            }
        )
    )
    experiment = load_experiment(configuration)
    for stage in ("generate", "curate", "train"):
        STAGES[stage].function(experiment)
    return str(experiment.directory("student"))


def answered(model: str, tests: list[Line]) -> Any:
    """Whether each answer, the most likely token at a time, is the right one."""
    chat, ends = chat_of(model)
    loaded = load_model(model, dtype="float32")
    hits = np.zeros(len(tests))
    prompts = [chat.prompt_ids(asked(line), None) for line in tests]
    order = sorted(range(len(tests)), key=lambda number: len(prompts[number]))
    for first in range(0, len(order), 32):
        chosen = order[first : first + 32]
        answers_BT = continue_prompts(loaded, [tuple(prompts[number]) for number in chosen], 16, ends, do_sample=False).numpy()
        for number, ids in zip(chosen, answers_BT, strict=True):
            found = np.flatnonzero(np.isin(ids, ends))
            text = chat.decode(ids[: found[0]] if len(found) else ids)
            hits[number] = text.strip() == tests[number]["answer"]
    return hits


if __name__ == "__main__":
    main()
