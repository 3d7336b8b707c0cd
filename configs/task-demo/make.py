"""Write the training and test data of `make task-demo`: `python configs/task-demo/make.py --out runs/task-demo`.

A grammar generates notes on invoices, payments and refunds, each with its record: who, when, how much. The same seed gives the
same bytes. No note is in two files, and no party of the held-out notes is in another file.
"""

import argparse
import calendar
import datetime
import json
import shutil
from collections.abc import Iterator, Sequence
from pathlib import Path
from random import Random
from typing import Any
from zlib import crc32

from llmdistill.tasks.task import read_task

SEED = 20
HERE = Path(__file__).parent
HELD_OUT = 5  # one in this many parties is kept for the held-out notes
Record = dict[str, Any]

FIRST = """
    Alder Amber Apex Arbor Aspen Atlas Aurora Azure Beacon Birch Bluebell Bright Cedar Cobalt Copper Coral Crescent Crystal Delta
    Eagle Echo Elm Ember Falcon Fern Forest Garnet Glacier Golden Granite Grove Harbour Hawthorn Hazel Heron Horizon Indigo Iris
    Ivory Jade Juniper Keystone Lantern Laurel Lime Linden Lunar Magnolia Maple Marble Meadow Meridian Midland Mint Moss Nimbus
    North Oak Olive Onyx Opal Orchid Otter Pearl Pine Pioneer Poplar Prism Quartz Raven River Robin Rowan Saffron Sage Sapphire
    Silver Sierra Solar Sparrow Spruce Sterling Stone Summit Swift Thistle Timber Topaz Tulip Union Velvet Violet Willow Zenith"""
SECOND = """
    Analytics Bakery Bikes Books Builders Catering Cleaning Clinic Coffee Consulting Dairy Design Electric Energy Farms Films
    Foods Freight Furniture Garage Gardens Glass Hotels Insurance Interiors Kitchens Labs Logistics Media Metals Motors Music
    Optics Outfitters Paints Paper Partners Pharmacy Plumbing Press Printing Roofing Security Software Sports Studio Supplies
    Systems Telecom Textiles Tools Toys Travel Windows"""
ENDINGS = ["", "", "", " Ltd", " Inc", " GmbH", " & Co", " Group"]
MONTHS = list(calendar.month_name)[1:]
SIGNS = {"EUR": "€", "USD": "$", "GBP": "£"}
WORDS = {"EUR": "euros", "USD": "dollars", "GBP": "pounds"}
NOTES = {
    "invoice": [
        "Invoice from {party} dated {date} over {amount}.",
        "{party} has billed us {amount} on {date}.",
        "On {date} we were invoiced {amount} by {party}.",
        "New bill: {party}, {amount}, issued {date}.",
        "Please check the invoice of {date} from {party}; they ask for {amount}.",
        "We owe {party} {amount} as invoiced on {date}.",
        "{party} sent a bill for {amount}. It is dated {date}.",
        "A bill of {amount} came in from {party} on {date}.",
    ],
    "payment": [
        "We paid {amount} to {party} on {date}.",
        "Payment of {amount} to {party} was made on {date}.",
        "On {date}, {amount} went out to {party}.",
        "{party} was paid {amount} on {date}.",
        "Transfer to {party}: {amount}, executed {date}.",
        "The transfer of {date} to {party} came to {amount}.",
        "Please note that we settled with {party} on {date} and paid {amount}.",
        "{date}: sent {amount} to {party}.",
    ],
    "refund": [
        "{party} refunded {amount} on {date}.",
        "On {date} we got {amount} back from {party}.",
        "Refund from {party}: {amount}, received {date}.",
        "{party} returned {amount} to us on {date}.",
        "Our money back: {amount} from {party}, {date}.",
        "A refund of {amount} by {party} arrived on {date}.",
        "{party} gave us back {amount}. Date of the refund: {date}.",
        "The refund of {date} from {party} was {amount}.",
    ],
}


def main(argv: Sequence[str] | None = None) -> None:
    """Write the files into a directory."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--out", type=Path, required=True)
    parser.add_argument("--examples", type=int, default=1000, help="notes with right answers, for the teacher")
    parser.add_argument("--inputs", type=int, default=2000, help="notes without, which the teacher answers for the student")
    parser.add_argument("--tests", type=int, default=1000, help="held-out notes")
    arguments = parser.parse_args(argv)
    out: Path = arguments.out
    out.mkdir(parents=True, exist_ok=True)
    for name in ("payments.yaml", "payments.schema.json"):
        shutil.copyfile(HERE / name, out / name)
    task = read_task(out / "payments.yaml", "task")
    seen: set[str] = set()
    examples = notes("examples", arguments.examples, seen)
    write(
        out / "examples.jsonl",
        ({"prompt": task.prompt(note), "completion": [answer(record)]} for note, record in examples),
    )
    write(out / "inputs.jsonl", ({"input": note} for note, _ in notes("inputs", arguments.inputs, seen)))
    tests = notes("test", arguments.tests, seen, held_out=True)
    write(out / "test.jsonl", ({"input": note, "output": record} for note, record in tests))


def write(file: Path, rows: Iterator[Any]) -> None:
    file.write_text("".join(json.dumps(row, ensure_ascii=False) + "\n" for row in rows), encoding="utf-8")


def answer(record: Record) -> dict[str, str]:
    """The turn that the teacher learns."""
    return {"role": "assistant", "content": json.dumps(record, ensure_ascii=False)}


def notes(name: str, count: int, seen: set[str], held_out: bool = False) -> Iterator[tuple[str, Record]]:
    """This number of notes with their records. None of them is in `seen`, to which they are added."""
    random = Random(f"{SEED} {name}")
    made = 0
    while made < count:
        note, record = a_note(random, held_out)
        if note not in seen:
            seen.add(note)
            made += 1
            yield note, record


def a_note(random: Random, held_out: bool) -> tuple[str, Record]:
    """A note with its record."""
    kind, party = random.choice(sorted(NOTES)), a_party(random, held_out)
    day = datetime.date(2015, 1, 1) + datetime.timedelta(days=random.randrange(366 * 15))
    currency, cents = random.choice(sorted(SIGNS)), an_amount(random)
    fields = {"party": party, "date": written_date(random, day), "amount": written_amount(random, cents, currency)}
    amount = cents // 100 if cents % 100 == 0 else cents / 100
    note = random.choice(NOTES[kind]).format(**fields)
    return note, {"kind": kind, "party": party, "date": day.isoformat(), "amount": amount, "currency": currency}


def a_party(random: Random, held_out: bool) -> str:
    """A company; its name decides whether it is held out."""
    while True:
        party = f"{random.choice(FIRST.split())} {random.choice(SECOND.split())}"
        if (crc32(party.encode()) % HELD_OUT == 0) == held_out:
            return party + random.choice(ENDINGS)


def an_amount(random: Random) -> int:
    """In cents, up to 99,999 whole units: few digits as often as many, and with cents as often as without."""
    whole = random.randrange(*random.choice([(1, 100), (100, 1000), (1000, 10_000), (10_000, 100_000)]))
    return 100 * whole + random.choice([0, random.randrange(100)])


def written_date(random: Random, day: datetime.date) -> str:
    """In one of the formats that people write; all are unambiguous, since 05.03.2024 is 5 March."""
    month, short = MONTHS[day.month - 1], MONTHS[day.month - 1][:3]
    end = "th" if day.day in (11, 12, 13) else {1: "st", 2: "nd", 3: "rd"}.get(day.day % 10, "th")
    return random.choice(
        [
            f"{day.day} {month} {day.year}",
            f"{month} {day.day}, {day.year}",
            f"{day.day} {short} {day.year}",
            f"{short} {day.day}, {day.year}",
            f"{month} {day.day}{end}, {day.year}",
            f"the {day.day}{end} of {month} {day.year}",
            f"{day.day:02d}.{day.month:02d}.{day.year}",
            day.isoformat(),
        ]
    )


def written_amount(random: Random, cents: int, currency: str) -> str:
    """With or without commas between thousands; whole amounts with or without zeros for the cents."""
    whole, rest = divmod(cents, 100)
    number = random.choice([f"{whole:,}", str(whole)])
    if rest or random.random() < 0.5:
        number += f".{rest:02d}"
    return random.choice(
        [f"{SIGNS[currency]}{number}", f"{currency} {number}", f"{number} {currency}", f"{number} {WORDS[currency]}"]
    )


if __name__ == "__main__":
    main()
