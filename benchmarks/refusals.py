"""How many refusals the step `refusals` of `curate` finds, and how much of what it finds is one.

    python benchmarks/refusals.py

On the sentences of benchmarks/refusals.jsonl, written by hand: refusals and models speaking of themselves, and others that use
the same words. The patterns were written by looking at every second sentence, beginning with the first; those between were
looked at afterwards, to count. The counts on them are what to expect elsewhere.
"""

import json
from pathlib import Path

from found import argument_parser, report

from llmdistill.curation.refusals import refusal_in

SENTENCES = Path(__file__).with_suffix(".jsonl")


def main() -> None:
    """Print a table, and the sentences that the step gets wrong."""
    arguments = argument_parser(__doc__).parse_args()
    sentences = [json.loads(line) for line in SENTENCES.read_text(encoding="utf-8").splitlines()]
    table = []
    print("| sentences | refusals | found | recall | precision |\n| --- | ---: | ---: | ---: | ---: |")
    for name, part in (("looked at", sentences[::2]), ("not looked at", sentences[1::2])):
        found = [sentence for sentence in part if refusal_in(sentence["text"])]
        right = sum(sentence["refusal"] for sentence in found)
        refusals = sum(sentence["refusal"] for sentence in part)
        row = {"sentences": name, "count": len(part), "refusals": refusals, "found": len(found)}
        row |= {"recall": right / refusals, "precision": right / len(found)}
        table.append(row)
        print(f"| {len(part)} {name} | {refusals} | {len(found)} | {row['recall']:.1%} | {row['precision']:.1%} |")
    wrong = [sentence for sentence in sentences if bool(refusal_in(sentence["text"])) != sentence["refusal"]]
    print("".join(f"\n{'missed' if sentence['refusal'] else 'no refusal'}: {sentence['text']}" for sentence in wrong))
    aims = {f"refusals_{key}": table[1][key] for key in ("recall", "precision")}
    report({"table": table}, aims, arguments.json)


if __name__ == "__main__":
    main()
