"""Speed of every step of `curate` alone, on one core: rows a second.

    python benchmarks/curation.py
    python benchmarks/curation.py --rows 20000 --characters 2000

The rows are synthetic: answers of so many characters from sentences of this repository's documentation, every fifth with a
block of code, every tenth with numbers, an address and a heading; three of a thousand stand there twice. A step's time is
what `curate` itself notes for it, the second time in a process, so without the import of its library. The steps that ask a
model (`judge`) or a reward are left out.
"""

import json
import os
import random
import tempfile
import time
from pathlib import Path
from typing import Any

import numpy as np
import synthetic
from found import argument_parser, report

STEPS: dict[str, Any] = {
    "finish_reason": {"finish_reason": {}},
    "length": {"length": {"min_tokens": 1}},
    "language": {"language": {"keep": ["en"]}},
    "repetition": {"repetition": {}},
    "refusals": {"refusals": {}},
    "malformed": {"malformed": {}},
    "python": {"python": {}},
    "regex": {"regex": {"pattern": "[Tt]he .{0,40}question", "keep": "others"}},
    "duplicates": {"duplicates": {}},
    "near_duplicates": {"near_duplicates": {}},
    "contamination": {"contamination": {"against": ["TESTS"]}},
    "personal_data": {"personal_data": {}},
}


def main() -> None:
    """Print a row a step, and the slowest as the aim."""
    parser = argument_parser(__doc__)
    parser.add_argument("--rows", type=int, default=5000)
    parser.add_argument("--characters", type=int, default=500, help="of an answer")
    arguments = parser.parse_args()
    if hasattr(os, "sched_setaffinity"):
        os.sched_setaffinity(0, {min(os.sched_getaffinity(0))})
    rows = 200 if arguments.smoke else arguments.rows
    found: dict[str, float] = {}
    with tempfile.TemporaryDirectory() as name:
        directory = Path(name)
        write_data(directory, rows, arguments.characters)
        write_data(directory / "few", 60, arguments.characters)
        print("| step | rows/s |\n| --- | ---: |")
        for step, settings in STEPS.items():
            seconds(directory / "few", step, settings)
            found[step] = rows / seconds(directory, step, settings)
            print(f"| `{step}` | {found[step]:,.0f} |", flush=True)
        found["convert --to jsonl"] = rows / convert(directory)
        print(f"| `convert --to jsonl` | {found['convert --to jsonl']:,.0f} |\n")
    report({"rows_a_second": found}, {"slowest_step_rows_a_second": min(found.values())}, arguments.json)


def write_data(directory: Path, rows: int, characters: int) -> None:
    from llmdistill.data.manifest import write_manifest
    from llmdistill.data.rows import Row, rows_to_table
    from llmdistill.data.shard_writer import finished_shards, write_shard

    text = " ".join(" ".join(page.read_text() for page in sorted(Path("docs").glob("*.md"))).split())
    sentences = [sentence for sentence in text.split(". ") if 20 < len(sentence) < 200 and "|" not in sentence]
    chance = random.Random(0)
    asked, sentences = sentences[::5], [sentence for number, sentence in enumerate(sentences) if number % 5]
    made: list[tuple[str, str]] = []
    for number in range(rows):
        answer = ""
        while len(answer) < characters:
            answer += chance.choice(sentences) + ". "
        if number % 5 == 0:
            code, half = f"```python\nfor i in range({number}):\n    print(i)\n```", characters // 2
            answer = f"{answer[:half]}\n\n{code}\n{answer[half:]}"
        if number % 10 == 0:
            answer = (
                f"# Part {number}\n\n{answer} Costs 1,234,567 in 2019-2024, call 020 7946 0958 or write to a.b@example.org.\n"
            )
        if number % 333 == 0 and made:
            answer = made[-1][1]
        made.append((f"Question {number // 2} about {chance.choice(sentences)[:60]}?", answer))
    ids = np.arange(3, 3 + characters // 4, dtype=np.int64)
    table = [
        Row(
            str(number), [{"role": "user", "content": question}], [{"role": "assistant", "content": answer}],
            [1, 2], ids, "stop", np.zeros(len(ids), np.float32), None,
        )
        for number, (question, answer) in enumerate(made)
    ]  # fmt: skip
    data = directory / "run/data"
    write_shard(data, "train", 0, 1, rows_to_table(table, 49152))
    write_manifest(data, finished_shards(data, "train"), synthetic.described("none", 49152))
    (directory / "tests.jsonl").write_text("".join(json.dumps({"question": sentence}) + "\n" for sentence in asked))


def seconds(directory: Path, step: str, settings: dict[str, Any]) -> float:
    """What `curate` notes for the step."""
    from llmdistill.config import Experiment
    from llmdistill.stages import curate as module
    from llmdistill.stages.curate import curate

    stage: Any = module
    text = json.dumps(settings).replace("TESTS", str(directory / "tests.jsonl"))
    experiment = Experiment.model_validate({
        "output": str(directory / "run"), "teacher": {"model": "t"}, "curate": [json.loads(text)], "eval": {"held_out": 0.2},
    })  # fmt: skip
    spent: list[float] = []
    results = stage._results

    def watched(manifest: Any, accounts: Any, *more: Any) -> Any:
        spent.append(accounts[0].seconds)
        return results(manifest, accounts, *more)

    stage._results = watched
    try:
        curate(experiment)
    finally:
        stage._results = results
    (directory / "run/curated").rename(directory / f"curated-{step}")
    return max(spent[0], 1e-6)


def convert(directory: Path) -> float:
    from llmdistill.data.convert.exports import export_dataset

    begin = time.perf_counter()
    export_dataset(directory / "curated-length", directory / "jsonl", "jsonl")
    return time.perf_counter() - begin


if __name__ == "__main__":
    main()
