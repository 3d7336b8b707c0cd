"""Write the items of the included tasks: `python configs/tasks/make.py` reproduces the files in this directory byte for byte.

Everything is written by hand in this file or assembled from its lists, so nothing is from a public test set.
"""

import argparse
import json
from collections.abc import Iterator
from pathlib import Path
from random import Random
from typing import Any

from passages import PASSAGES

Item = dict[str, Any]
SEED = 20

# Pairs: "France=Paris". Wrong choices are the right ones of the other entries on the same line.
PAIRS = {
    "What is the capital of {}?": """
        France=Paris, Germany=Berlin, Italy=Rome, Spain=Madrid, Japan=Tokyo, China=Beijing, Russia=Moscow, Egypt=Cairo,
        Greece=Athens, Portugal=Lisbon, Austria=Vienna, Hungary=Budapest, Poland=Warsaw, Ireland=Dublin, Norway=Oslo,
        Sweden=Stockholm, Denmark=Copenhagen, Finland=Helsinki, Cuba=Havana, Peru=Lima, Canada=Ottawa, Iran=Tehran, Iraq=Baghdad,
        Thailand=Bangkok, Vietnam=Hanoi, South Korea=Seoul, Kenya=Nairobi, Belgium=Brussels, Ukraine=Kyiv, Bulgaria=Sofia,
        Croatia=Zagreb, Syria=Damascus, Lebanon=Beirut, Afghanistan=Kabul, Nepal=Kathmandu, Australia=Canberra,
        New Zealand=Wellington, Iceland=Reykjavik, the Philippines=Manila, Senegal=Dakar""",
    "On which continent is {}?": """
        Brazil=South America, Argentina=South America, Peru=South America, Colombia=South America, Chile=South America,
        Nigeria=Africa, Kenya=Africa, Ghana=Africa, Ethiopia=Africa, Morocco=Africa, India=Asia, Japan=Asia, Thailand=Asia,
        Vietnam=Asia, Mongolia=Asia, Poland=Europe, Sweden=Europe, Portugal=Europe, Hungary=Europe, Belgium=Europe""",
    "Which language do most people speak in {}?": """
        Brazil=Portuguese, Mexico=Spanish, Austria=German, Egypt=Arabic, Italy=Italian, Japan=Japanese, France=French,
        Australia=English, Russia=Russian, Greece=Greek, Poland=Polish, Sweden=Swedish, Hungary=Hungarian, Turkey=Turkish""",
    "Which chemical element has the symbol {}?": """
        Au=gold, Ag=silver, Fe=iron, Cu=copper, Pb=lead, Na=sodium, K=potassium, H=hydrogen, O=oxygen, N=nitrogen, C=carbon,
        He=helium, Ca=calcium, Zn=zinc, Hg=mercury, Sn=tin, U=uranium, Cl=chlorine""",
    "What is a young {} called?": """
        dog=puppy, cat=kitten, cow=calf, horse=foal, sheep=lamb, pig=piglet, bear=cub, duck=duckling, goose=gosling, frog=tadpole,
        deer=fawn, swan=cygnet, kangaroo=joey, hen=chick""",
    "Which kind of animal is the {}?": """
        salmon=a fish, shark=a fish, tuna=a fish, trout=a fish, eagle=a bird, sparrow=a bird, penguin=a bird, owl=a bird,
        ant=an insect, bee=an insect, butterfly=an insect, beetle=an insect, snake=a reptile, lizard=a reptile,
        crocodile=a reptile, turtle=a reptile, dolphin=a mammal, bat=a mammal, whale=a mammal, elephant=a mammal""",
    "Which month comes right after {}?": """
        January=February, February=March, March=April, April=May, May=June, June=July, July=August, August=September,
        September=October, October=November, November=December, December=January""",
    "Which day comes right after {}?": """
        Monday=Tuesday, Tuesday=Wednesday, Wednesday=Thursday, Thursday=Friday, Friday=Saturday, Saturday=Sunday,
        Sunday=Monday""",
    "What colour is {}?": """
        fresh grass=green, a ripe banana=yellow, a clear sky at noon=blue, fresh snow=white, coal=black, a ruby=red,
        an emerald=green, milk=white, blood=red, a carrot=orange, chocolate=brown, a sapphire=blue""",
    "Who wrote {}?": """
        Hamlet=William Shakespeare, Pride and Prejudice=Jane Austen, the Odyssey=Homer, Nineteen Eighty-Four=George Orwell,
        Don Quixote=Miguel de Cervantes, War and Peace=Leo Tolstoy, Oliver Twist=Charles Dickens, Frankenstein=Mary Shelley,
        Dracula=Bram Stoker, The Hobbit=J. R. R. Tolkien, Alice's Adventures in Wonderland=Lewis Carroll,
        Moby-Dick=Herman Melville, Faust=Johann Wolfgang von Goethe, Les Misérables=Victor Hugo,
        Crime and Punishment=Fyodor Dostoevsky, Adventures of Huckleberry Finn=Mark Twain""",
    "What is the opposite of '{}'?": """
        hot=cold, big=small, fast=slow, early=late, open=closed, happy=sad, light=dark, wet=dry, full=empty, strong=weak,
        old=young, rich=poor, loud=quiet, thick=thin, deep=shallow, true=false""",
    "Where would you most likely find {}?": """
        a pillow=on a bed, a stove=in a kitchen, a blackboard=in a classroom, a tent=at a campsite, an anchor=on a ship,
        a scarecrow=in a field, a cash register=in a shop, a steering wheel=in a car, a stethoscope=in a hospital,
        an altar=in a church""",
}
COUNTS = """
    How many days are there in a week?=7; How many months are there in a year?=12; How many hours are there in a day?=24;
    How many minutes are there in an hour?=60; How many sides does a triangle have?=3; How many sides does a square have?=4;
    How many sides does a pentagon have?=5; How many sides does a hexagon have?=6; How many sides does an octagon have?=8;
    How many legs does a spider have?=8; How many legs does an insect have?=6; How many legs does a dog have?=4;
    How many legs does a chicken have?=2; How many wheels does a bicycle have?=2; How many wheels does a tricycle have?=3;
    How many strings does a violin have?=4; How many letters are there in the English alphabet?=26;
    How many days are there in a leap year?=366; How many centimetres are there in a metre?=100;
    How many planets are there in the Solar System?=8; How many players does a football team have on the pitch?=11;
    How many degrees are there in a right angle?=90; How many squares are there on a chessboard?=64;
    How many arms does an octopus have?=8; How many years are there in a century?=100;
    How many years are there in a decade?=10; How many eggs are there in a dozen?=12; How many humps does a dromedary have?=1"""
WORDS = """
    apple river window garden silver mountain pencil candle bridge yellow market rabbit winter forest button dragon orange
    kitchen planet shadow ticket summer harbour velvet copper lantern meadow pocket thunder basket island feather hammer
    castle violin marble lemon tunnel pepper anchor"""
SENTENCES = """
    The train leaves at noon.|My sister plays the piano.|A small bird sat on the fence.|Please close the door.|We walked home
    in the rain.|The soup is too hot.|He forgot his umbrella again.|The lights went out at nine.|Her garden is full of roses.|
    They painted the boat blue.|The old clock has stopped.|I like bread with butter.|The dog slept by the fire.|Snow fell all
    night long.|The shop opens on Monday.|Two boys were flying a kite.|The baker wakes up early.|Our teacher lives near the
    river.|The moon is bright tonight.|A cat crossed the empty road.|The letter came from Spain.|She counts the coins twice.|
    The farmer sold three cows.|His shoes are under the table.|The bridge was built long ago."""
NAMES = [
    "Anna",
    "Ben",
    "Clara",
    "David",
    "Emma",
    "Felix",
    "Grace",
    "Henry",
    "Ida",
    "Jack",
    "Lena",
    "Max",
    "Nora",
    "Oscar",
    "Paula",
    "Rosa",
    "Sam",
    "Tina",
]
THINGS = ["apples", "coins", "books", "shells", "cards", "pens", "eggs", "stamps", "marbles", "cookies", "stones", "tickets"]
BELONGINGS = ["ball", "kite", "hat", "bag", "cup", "bike", "scarf", "box", "chair", "lamp"]
COLOURS = ["red", "blue", "green", "yellow", "black", "white", "brown", "grey"]
PLACES = ["kitchen", "garden", "cellar", "attic", "garage", "bathroom", "office", "hallway"]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--out", type=Path, default=Path(__file__).parent)
    out = parser.parse_args().out
    for name, make in {
        "arithmetic": arithmetic,
        "copying": copying,
        "facts": facts,
        "format": formats,
        "orders": orders,
        "reading": reading,
    }.items():
        random = Random(f"{SEED} {name}")
        items = list(make(random))
        random.shuffle(items)  # so that the first n are a mixture
        lines = [json.dumps({"id": f"{name}-{number}", **item}, ensure_ascii=False) for number, item in enumerate(items)]
        (out / f"{name}.jsonl").write_text("\n".join(lines) + "\n", encoding="utf-8")


def choice(random: Random, question: str, right: str, wrong: list[str], **more: Any) -> Item:
    """A question with its choices in any order."""
    choices = [right, *wrong]
    assert len(set(choices)) == len(choices) > 1, question
    random.shuffle(choices)
    return {"question": question, "choices": choices, "answer": choices.index(right), **more}


def number(random: Random, question: str, right: int, **more: Any) -> Item:
    """A question for a number; the wrong choices are close to it."""
    near = {right + by for by in (-10, -3, -2, -1, 1, 2, 3, 10)} - {right}
    wrong = random.sample(sorted(value for value in near if value >= 0 and len(str(value)) == len(str(right))), 3)
    return choice(random, question, str(right), [str(value) for value in wrong], **more)


def arithmetic(random: Random) -> Iterator[Item]:
    asked = set()
    while len(asked) < 110:
        operation = random.choice("++--×")
        a, b = (random.randint(2, 9), random.randint(2, 9)) if operation == "×" else (random.randint(2, 40), random.randint(2, 9))
        if (operation == "-" and b > a) or (a, operation, b) in asked:
            continue
        asked.add((a, operation, b))
        result = {"+": a + b, "-": a - b, "×": a * b}[operation]
        word = {"+": "plus", "-": "minus", "×": "times"}[operation]
        question = random.choice(
            [f"What is {a} {operation} {b}?", f"What is {a} {word} {b}?", f"Calculate: {a} {operation} {b} ="]
        )
        yield number(random, question, result)
    for _ in range(40):
        name, other = random.sample(NAMES, 2)
        thing, a, b = random.choice(THINGS), random.randint(5, 20), random.randint(2, 4)
        question, result = random.choice(
            [
                (f"{name} has {a} {thing} and gets {b} more. How many {thing} does {name} have now?", a + b),
                (f"{name} has {a} {thing} and gives {b} to {other}. How many {thing} does {name} have left?", a - b),
                (f"There are {b} boxes with {a} {thing} in each. How many {thing} are there?", a * b),
                (f"{name} has {a} {thing}, {other} has {b}. How many {thing} do they have together?", a + b),
            ]
        )
        yield number(random, question, result)


def facts(random: Random) -> Iterator[Item]:
    for question, text in PAIRS.items():
        pairs = [entry.strip().split("=") for entry in " ".join(text.split()).split(", ")]
        rights = sorted({right for _, right in pairs})
        for subject, right in pairs:
            wrong = random.sample([other for other in rights if other != right], 3)
            yield choice(random, question.format(subject), right, wrong)
    for entry in " ".join(COUNTS.split()).split("; "):
        question, right = entry.split("=")
        wrong = random.sample([value for value in ("2", "3", "4", "6", "7", "8", "12", "24", "60", "100") if value != right], 3)
        yield choice(random, question, right, wrong)


def copying(random: Random) -> Iterator[Item]:
    words, sentences = WORDS.split(), " ".join(SENTENCES.split()).replace("| ", "|").split("|")
    for n in range(100):
        if n % 4 == 0:
            what, text = "sentence", sentences[n // 4]
        elif n % 4 == 1:
            what, text = "words", " ".join(random.sample(words, random.randint(2, 4)))
        elif n % 4 == 2:
            what, text = "number", str(random.randint(100, 999_999))
        else:
            what, text = "list", ", ".join(random.sample(words, random.randint(3, 5)))
        order = random.choice(
            [
                f"Repeat this {what} and write nothing else:",
                f"Copy this {what} exactly:",
                f"Write the following {what} once more:",
            ]
        )
        yield {"question": f"{order} {text}", "answer": text}


def formats(random: Random) -> Iterator[Item]:
    """New content has to be written in the format of an example; the wrong choices have the same content in other formats."""
    for n in range(26):
        *shown, one, two, three = random.sample(WORDS.split(), 6)
        new = [one, two, three]
        marks = ["- {}", "* {}", "({})", "<{}>", "{};", '"{}"']
        wanted = marks[n % len(marks)]
        wrong = random.sample([mark for mark in marks if mark != wanted], 3)
        lines = "\n".join(wanted.format(word) for word in shown)
        asked = f"Write the word {new[0]} in the same form as these:\n{lines}"
        yield choice(random, asked, wanted.format(new[0]), [mark.format(new[0]) for mark in wrong])
        joints = [", ", "-", "/", "+", " > ", " | "]
        wanted = joints[n % len(joints)]
        wrong = random.sample([joint for joint in joints if joint != wanted], 3)
        asked = f"Join the words {' '.join(new)} in the same form as here: {wanted.join(shown)}"
        yield choice(random, asked, wanted.join(new), [joint.join(new) for joint in wrong])
        cases = [str.upper, str.lower, str.capitalize, lambda word: word[:-1] + word[-1].upper()]
        wanted_case = cases[n % len(cases)]
        asked = f"Write the word {new[1]} in the same form as these: {' '.join(wanted_case(word) for word in shown)}"
        right = wanted_case(new[1])
        yield choice(random, asked, right, [case(new[1]) for case in cases if case is not wanted_case])
        (somebody, other), (this, that) = random.sample(NAMES, 2), random.sample(range(20, 80), 2)
        records = [
            '{{"name": "{}", "age": {}}}',
            "{} is {} years old.",
            "{};{}",
            "{}: {} years",
            "<person>{}, {}</person>",
        ]
        wanted = records[n % len(records)]
        wrong = random.sample([record for record in records if record != wanted], 3)
        asked = (
            f"Write for {other}, who is {that}, what stands here for {somebody}, who is {this}: {wanted.format(somebody, this)}"
        )
        yield choice(random, asked, wanted.format(other, that), [record.format(other, that) for record in wrong])


def orders(random: Random) -> Iterator[Item]:
    """An item of a task of your own: an input and its output."""
    forms = [
        "{name} would like {count} {colour}{item}, please.",
        "Please put aside {count} {colour}{item} for {name}.",
        "Hello, this is {name}. I need {count} {colour}{item} by Friday.",
        "{count} {colour}{item} for {name}, as every week.",
    ]
    for n, name in enumerate(random.sample(NAMES, 10) * 2):
        item, count = random.choice(THINGS), random.randint(2, 12)
        colour = random.choice(COLOURS) if n % 4 else None
        text = forms[n % len(forms)].format(name=name, count=count, item=item, colour=f"{colour} " if colour else "")
        yield {"input": text, "output": {"customer": name, "item": item, "colour": colour, "count": count}}


def reading(random: Random) -> Iterator[Item]:
    for number_, passage in enumerate(PASSAGES):
        lines = [line.strip() for line in passage.strip().split("\n")]
        text = " ".join(line for line in lines if "|" not in line)
        for line in lines:
            question, *choices = line.split("|")
            if not choices:
                continue
            yield choice(random, question, choices[0], choices[1:], passage=text, cluster=f"passage {number_}")
    for number_ in range(36):
        people, things = random.sample(NAMES, 4), random.sample(BELONGINGS, 4)
        colours, places = random.sample(COLOURS, 4), random.sample(PLACES, 4)
        told = list(zip(people, things, colours, places, strict=True))
        sentences = [
            random.choice([f"{p} has a {c} {t}. It is in the {w}.", f"In the {w} there is a {c} {t}. It belongs to {p}."])
            for p, t, c, w in told
        ]
        more: Item = {"passage": " ".join(sentences), "cluster": f"things {number_}"}
        for asked in random.sample(range(3), 2):
            person, thing, colour, place = random.choice(told)
            if asked == 0:
                yield choice(random, f"What colour is the {thing}?", colour, [c for c in colours if c != colour], **more)
            elif asked == 1:
                yield choice(random, f"Whose is the {thing}?", f"{person}'s", [f"{p}'s" for p in people if p != person], **more)
            else:
                wrong = [f"in the {w}" for w in places if w != place]
                yield choice(random, f"Where is the {thing} of {person}?", f"in the {place}", wrong, **more)


if __name__ == "__main__":
    main()
