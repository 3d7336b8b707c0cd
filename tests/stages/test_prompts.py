"""Prompts as `generate` gets them, and the steps by which the teacher makes them: what goes in comes out or has a reason."""

import json
import re
import shutil
from collections import Counter
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from llmdistill.config import load_experiment
from llmdistill.config.prompts import Prompts
from llmdistill.data.left_out import LeftOut
from llmdistill.data.shards import Share
from llmdistill.errors import InputError, RemoteError
from llmdistill.models.loading import load_tokenizer
from llmdistill.prompting import asking
from llmdistill.runs import lock, record
from llmdistill.stages.generate import generate
from llmdistill.stages.prompts import claims, load_prompts, prepared_prompts, prompts
from llmdistill.tasks.task import read_task
from llmdistill.teachers import Completion, prompt_encoding
from llmdistill.teachers.remote import given_up
from tests.tasks.make import write_task

TEMPLATE = """
name: capital
description: Ask for a capital.
variables: [country]
messages:
  - {role: system, content: Be short.}
  - {role: user, content: "What is the capital of {{ country }}?"}
"""


@pytest.fixture
def write(tmp_path):
    def write(name, text):
        path = tmp_path / name
        path.write_text(text, encoding="utf-8")
        return str(path)

    return write


def test_prompts_messages_and_repeats(write):
    turns = [{"role": "user", "content": "a"}, {"role": "assistant", "content": "b"}, {"role": "user", "content": "c"}]
    lines = [{"prompt": "one"}, {"messages": turns}, {"prompt": "one"}, {"prompt": [{"role": "user", "content": "two"}]}]
    source = write("p.jsonl", "\n".join(map(json.dumps, lines)) + "\n\n")
    prompts = load_prompts(Prompts(source=source, system="S"))
    system = {"role": "system", "content": "S"}
    assert [prompt.messages for prompt in prompts] == [
        [system, {"role": "user", "content": "one"}],
        [system, *turns],
        [system, {"role": "user", "content": "two"}],
    ]
    assert prompts[1].origin.endswith("p.jsonl line 2")
    assert prompts[1].lineage == {"source": {"file": source, "line": 2}, "template": None}
    assert len(load_prompts(Prompts(source=source, limit=2))) == 2


def test_what_a_line_says_beside_the_conversation_is_kept(write):
    source = write("p.jsonl", json.dumps({"country": "Peru", "answer": "Lima", "topic": {"of": ["geography"]}}))
    (prompt,) = load_prompts(Prompts(source=source, template=write("t.yaml", TEMPLATE)))
    assert prompt.metadata == {"answer": "Lima", "topic": {"of": ["geography"]}}
    (prompt,) = load_prompts(Prompts(source=write("q.jsonl", '{"prompt": "a", "answer": 1}')))
    assert prompt.metadata == {"answer": 1}


@pytest.mark.parametrize(
    ("row", "kept"),
    [
        ({"prompt": "What is 29 - 14?", "answer": "15"}, {"answer": "15"}),
        ({"question": "What is 29 - 14?", "answer": "29 - 14 = 15 #### 15"}, {"answer": "29 - 14 = 15 #### 15"}),
        ({"problem": "What?", "solution": "29 - 14 = 15", "answer": "15"}, {"solution": "29 - 14 = 15", "answer": "15"}),
        ({"instruction": "Add", "input": "1 and 2", "output": "3", "level": 1}, {"output": "3", "level": 1}),
        ({"prompt": "What?", "completion": "15", "topic": "sums"}, {"completion": "15", "topic": "sums"}),
    ],
)
def test_an_expected_answer_is_kept_under_its_name(write, row, kept):
    """GSM8K, MATH and the like, whose answers are text, are checked against the teacher's by `math`."""
    (prompt,) = load_prompts(Prompts(source=write("p.jsonl", json.dumps(row))))
    assert prompt.metadata == kept


def test_fields_that_a_template_does_not_use_are_kept_whatever_their_names(write):
    row = {"country": "Peru", "completion": "18", "tools": "hammer", "messages": 3, "prompt": "mine", "x": 1}
    (prompt,) = load_prompts(Prompts(source=write("p.jsonl", json.dumps(row)), template=write("t.yaml", TEMPLATE)))
    assert prompt.metadata == {name: value for name, value in row.items() if name != "country"}


def test_a_row_without_a_field_of_the_template_is_left_out(write):
    rows = [{"country": f"country {number}"} for number in range(30)] + [{"city": "Lima"}]
    source, left_out = write("p.jsonl", "\n".join(map(json.dumps, rows))), LeftOut()
    section = Prompts(source=source, template=write("t.yaml", TEMPLATE))
    assert len(load_prompts(section, left_out=left_out)) == 30
    assert list(left_out.reasons) == ["the template capital needs the field country; the line has city"]
    with pytest.raises(InputError, match=r"p\.jsonl line 31: the template capital needs the field country"):
        load_prompts(section.model_copy(update={"on_bad_rows": "refuse"}))


def test_json_that_is_nested_too_deep_is_a_bad_row(write):
    deep = '{"prompt": "a", "x": ' + "[" * 600 + '"\\ud83d"' + "]" * 600 + "}"
    source, left_out = write("p.jsonl", "\n".join([deep, *(f'{{"prompt": "{number}"}}' for number in range(20))])), LeftOut()
    assert len(load_prompts(Prompts(source=source), left_out=left_out)) == 20
    assert "nested more than 100 deep" in str(left_out.reasons)


def test_a_reserved_field_is_named_with_its_line_before_the_teacher_works(write):
    source = write("p.jsonl", '{"prompt": "a"}\n{"prompt": "b", "llmdistill": {"a": 1}}')
    with pytest.raises(InputError, match=r"p.jsonl line 2: has a field llmdistill, which is reserved"):
        load_prompts(Prompts(source=source, max_bad_rows=0))


def test_a_table_and_a_folder_of_documents_become_prompts(write, tmp_path):
    template = write("t.yaml", TEMPLATE)
    source = write("p.csv", "country,topic\nPeru,x\nChad,y\nPeru,z\n")
    assert [prompt.messages[1]["content"][-5:] for prompt in load_prompts(Prompts(source=source, template=template))] == [
        "Peru?",
        "Chad?",
    ]
    (tmp_path / "docs").mkdir()
    write("docs/a.md", "# A\n\n" + "Some text. " * 30)
    (prompt,) = load_prompts(Prompts(source=str(tmp_path / "docs"), template="prompts/summarise.yaml"))
    assert prompt.lineage["source"]["lines"] == [1, 3]
    assert prompt.metadata == {"document": f"{tmp_path}/docs/a.md", "heading": "A"}


@pytest.mark.parametrize(
    ("source", "template", "message"),
    [
        ("", None, "contains no prompts"),
        ("\n\n", None, "contains no prompts"),
        ('{"prompt": "a"}\n{"prompt": \n', None, "p.jsonl line 2: not valid JSON"),
        ('{"prompt": "a"}\n[1]\n', None, "p.jsonl line 2: must be a JSON object"),
        ('{"title": "a"}', None, "line 1: has no conversation in a known format, only title"),
        ('{"messages": []}', None, "messages must be a list"),
        ('{"messages": [{"role": "assistant", "content": "x"}]}', None, "with a turn for the assistant to answer"),
        ('{"country": "x"}\n{"city": "y"}', TEMPLATE, "line 2: the template capital needs the field country"),
        ('{"country": "x"}', TEMPLATE.replace("country }}", "land }}"), r"t\.yaml: messages\.1\.content uses land"),
        ('{"country": "x"}', TEMPLATE.replace("country }}", "country.__class__.__mro__ }}"), "cannot be rendered"),
        ('{"country": "x"}', TEMPLATE.replace("variables", "variable"), "no such key variable"),
    ],
)
def test_bad_input_names_file_and_line(write, source, template, message):
    section = Prompts(source=write("p.jsonl", source), template=template and write("t.yaml", template))
    with pytest.raises(InputError, match=message):
        load_prompts(section)


def test_a_csv_without_the_column(write):
    with pytest.raises(InputError, match=r"p\.csv line 2: the template capital needs the field country; the line has city"):
        load_prompts(Prompts(source=write("p.csv", "city\nLima\n"), template=write("t.yaml", TEMPLATE)))


def test_the_seed_lists_are_what_they_say(write):
    tasks = load_prompts(Prompts(source="prompts/seeds/general.jsonl", template="prompts/instruct.yaml"))
    assert len(tasks) == 240
    assert set(Counter(task.metadata["topic"] for task in tasks).values()) == {12}
    persona = TEMPLATE.replace("country", "persona")
    assert len(load_prompts(Prompts(source="prompts/seeds/personas.jsonl", template=write("t.yaml", persona)))) == 100


def test_a_task_asks_about_the_input_of_a_row_as_evaluation_does(write, tmp_path):
    task = write_task(tmp_path, "classify")
    source = write("p.jsonl", '{"input": "Fine {{ 1 }}.", "output": "good", "topic": "x"}\n')
    (prompt,) = load_prompts(Prompts(source=source, task=str(task)))
    assert prompt.messages == read_task(task, "eval.tasks").prompt("Fine {{ 1 }}.")
    assert prompt.metadata == {"output": "good", "topic": "x"}
    assert prompt.lineage["template"] == str(task)
    task.write_text(task.read_text().replace("Do it.", "Do it well."))
    assert load_prompts(Prompts(source=source, task=str(task)))[0].messages[0]["content"].startswith("Do it well.")


@pytest.mark.parametrize(
    ("row", "message"),
    [
        ('{"text": "x"}', "line 1: prompts.task needs the field input; the line has text"),
        ('{"input": ["x"]}', "line 1: input must be text"),
        ('{"input": " "}', "line 1: input must be text"),
    ],
)
def test_a_row_without_an_input_is_refused(write, tmp_path, row, message):
    with pytest.raises(InputError, match=message):
        load_prompts(Prompts(source=write("p.jsonl", row), task=str(write_task(tmp_path, "classify"))))


def test_rows_without_an_input_are_left_out_and_counted(write, tmp_path):
    rows = [{"input": ""}, {"input": 5}, *({"input": f"x {number}"} for number in range(18))]
    source, left_out = write("p.jsonl", "\n".join(map(json.dumps, rows))), LeftOut()
    assert len(load_prompts(Prompts(source=source, task=str(write_task(tmp_path, "classify"))), left_out=left_out)) == 18
    assert left_out.reasons == {"input must be text (prompts.task)": 2}


def test_repeats_count_among_the_rows_of_which_some_cannot_be_read(write):
    lines = [json.dumps({"prompt": f"q {number % 5}"}) for number in range(27)]
    assert len(load_prompts(Prompts(source=write("p.jsonl", "\n".join([*lines, *["no JSON"] * 3]))))) == 5
    with pytest.raises(InputError, match=r"4 of 31 rows cannot be read, more than max_bad_rows, 10%"):
        load_prompts(Prompts(source=write("q.jsonl", "\n".join([*lines, *["no JSON"] * 4]))))


def test_a_task_is_there_and_takes_no_other_messages(write, tmp_path):
    source = write("p.jsonl", '{"input": "x"}')
    with pytest.raises(InputError, match=r"nowhere.yaml: no such file \(prompts.task\)"):
        load_prompts(Prompts(source=source, task="nowhere.yaml"))
    for other in ("template", "system"):
        with pytest.raises(ValueError, match=f"remove prompts.{other}"):
            Prompts(source=source, task="t.yaml", **{other: "x"})


QUESTION = """
name: question
description: Ask about a text.
variables: [text]
answer: {field: instruction, form: lines, pattern: '(.*[?])', without: [the text]}
messages: [{role: user, content: "Ask about {{ text }}."}]
"""
HARDER = """
name: harder
description: Harder.
variables: [instruction]
answer: {field: instruction}
messages: [{role: user, content: "Make harder: {{ instruction }}"}]
"""
OTHER = HARDER.replace("arder", "ther").replace("Make", "Turn")
MORE = """
name: more
description: More.
variables: [examples]
answer: {field: instruction, form: lines}
messages: [{role: user, content: "More like {{ examples | join(' / ') }}"}]
"""


class Scripted:
    """A teacher whose answers are known: `reply` makes them of what it sees. One that ends in … was cut."""

    def __init__(self, tokenizer, reply):
        self.tokenizer, self.reply, self.asked, self.tokens = tokenizer, reply, [], 0
        self.fails = lambda seen: False

    def generate(self, batches):
        for batch in batches:
            for request in reversed(batch):  # engines give completions in any order
                seen = self.tokenizer.decode(request.prompt_ids)
                if self.fails(seen):
                    self.asked.append(seen)
                    yield given_up(request, "a refusal (message.refusal)")
                    continue
                text = self.reply(re.search(r"<\|im_start\|>user\n(.*?)<\|im_end\|>\n|$", seen, re.DOTALL)[1] or seen, request)
                self.asked.append(seen)
                ids = self.tokenizer(text, add_special_tokens=False)["input_ids"] + [2] * (not text.endswith("…"))
                self.tokens += len(ids)
                yield Completion(
                    request.index, np.array(ids), "stop" if ids[-1] == 2 else "length", np.zeros(len(ids), np.float32), None
                )


@pytest.fixture(scope="module")
def tokenizer(tiny):
    return load_tokenizer(str(tiny), None)


@pytest.fixture
def teach(tokenizer, monkeypatch):
    """Put a scripted teacher in the place of the engine."""

    def teach(reply):
        teacher = Scripted(tokenizer, reply)
        monkeypatch.setattr(asking, "open_engine", lambda *_: teacher)
        monkeypatch.setattr(prompt_encoding, "load_tokenizer", lambda *_: tokenizer)
        return teacher

    return teach


@pytest.fixture
def experiment(tiny, tmp_path, write):
    """An experiment with some steps, over a source of some fields."""
    both = "{form: json, field: instruction, json_schema: {required: [instruction, input]}}"
    texts = {
        "question": QUESTION,
        "harder": HARDER,
        "other": OTHER,
        "more": MORE,
        "evolved": HARDER.replace("field: instruction", "field: evolved"),
        "both": re.sub("answer: .*", f"answer: {both}", MORE),
        "uses": HARDER.replace("[instruction]", "[instruction, input]"),
    }
    for name, text in texts.items():
        write(f"{name}.yaml", text)

    def experiment(steps, rows=None, **changes):
        section = {"steps": steps, "template": "prompts/instruct.yaml", "sampling": {"max_tokens": 32}, **changes}
        if rows is not None:
            section["source"] = write("source.jsonl", "".join(json.dumps(row) + "\n" for row in rows))
        tree = {
            "output": f"{tmp_path}/run",
            "teacher": {"model": str(tiny), "engine": "transformers", "dtype": "float32"},
            "prompts": section,
            "generate": {"max_tokens": 8, "rows_per_shard": 2},
            "targets": {"kind": "topk", "k": 4},
        }
        return load_experiment(Path(write("experiment.yaml", json.dumps(tree).replace("@", f"{tmp_path}/"))))

    return experiment


def outcome(experiment):
    """The prompts' last messages, the lineage of each, the counts of the steps, and what was left with its reason."""
    directory = experiment.directory("prompts")
    made = pq.read_table(directory / "prompts.parquet").to_pylist()
    results = json.loads((directory / "run.json").read_text())["results"]
    left = pq.read_table(directory / "rejected.parquet").to_pylist()
    for step in results["steps"]:
        assert step["rows_in"] == step["kept"] + step["rejected"] + step["failed"]
        assert sum(step["reasons"].values()) == step["rejected"] + step["failed"]
    assert len(left) == sum(step["rejected"] + step["failed"] for step in results["steps"])
    assert results["prompts"] == len(made) == results["steps"][-1]["kept"]
    return (
        [row["prompt"][-1]["content"] for row in made],
        [json.loads(row["lineage"]) for row in made],
        {step.pop("name"): step for step in results["steps"]},
        [(row["step"], row["verdict"], row["reason"], row["text"]) for row in left],
    )


def test_questions_about_texts_are_asked_read_and_counted(experiment, teach):
    answers = {
        "Ask about water.": ["1. Is it wet?\n2. No question\n3. What is the text?", "1. Is it wet?\n2. Is it blue…"],
        "Ask about fire.": ["Is it hot?", ""],
    }
    teacher = teach(lambda seen, _: answers[seen].pop())
    chosen = experiment(
        [{"ask": {"template": "@question.yaml", "samples": 2}}], [{"text": "water", "topic": "x"}, {"text": "fire"}]
    )
    prompts(chosen)
    made, lineages, steps, left = outcome(chosen)
    assert len(teacher.asked) == 4
    assert sorted(made) == ["Is it hot?", "Is it wet?"]
    assert steps["source"] == {"rows_in": 2, "kept": 2, "rejected": 0, "failed": 0, "reasons": {}}
    assert steps["1 ask"] == {
        "rows_in": 7,
        "kept": 3,
        "rejected": 2,
        "failed": 2,
        "reasons": {"cut at max_tokens": 1, "empty": 1, "holds “the text”": 1, "no match": 1},
    }
    assert steps["template"]["reasons"] == {"duplicate": 1}
    assert sorted(left) == [
        ("1 ask", "failed", "cut at max_tokens", "Is it blue…"),
        ("1 ask", "failed", "empty", ""),
        ("1 ask", "rejected", "holds “the text”", "What is the text?"),
        ("1 ask", "rejected", "no match", "No question"),
        ("template", "rejected", "duplicate", "Is it wet?"),
    ]
    water = lineages[made.index("Is it wet?")]
    assert water["source"] == {"file": chosen.prompts.source, "line": 1}
    assert water["template"] == "prompts/instruct.yaml"
    (step,) = water["steps"]
    assert step["template"].endswith("question.yaml")
    assert (step["step"], step["entry"], step["gave"]) == ("ask", 0, {"instruction": "Is it wet?"})
    asked = pq.read_table(chosen.directory("prompts") / "1-ask").to_pylist()
    assert "Is it wet?" in next(row["text"] for row in asked if row["id"] == step["answer"])


def test_a_reasoning_trace_is_no_prompt(experiment, teach):
    """Neither its questions nor its text become items; one that does not end leaves no answer."""
    answers = {
        "Ask about water.": "<think>\nShall I ask this?\n</think>\n\nIs it wet?",
        "Ask about fire.": "<think>Shall I ask that?",
    }
    teach(lambda seen, _: answers[seen])
    chosen = experiment([{"ask": {"template": "@question.yaml"}}], [{"text": "water"}, {"text": "fire"}])
    prompts(chosen)
    made, _, steps, _ = outcome(chosen)
    assert made == ["Is it wet?"]
    assert steps["1 ask"]["reasons"] == {"empty": 1}


def test_what_an_endpoint_gives_up_is_no_answer(experiment, teach):
    """One is counted with its reason; where all of a shard are, it is asked for again."""
    teacher = teach(lambda seen, _: "Is it wet?")
    rows = [{"text": text} for text in ("water", "fire", "earth", "air")]
    chosen = experiment([{"ask": {"template": "@question.yaml"}}], rows)
    teacher.fails = lambda seen: "water" in seen or "fire" in seen
    with pytest.raises(RemoteError, match=r"2 of 2 answers had a refusal \(message\.refusal\); not stored"):
        prompts(chosen)
    teacher.fails = lambda seen: "fire" in seen
    prompts(chosen)
    _, _, steps, left = outcome(chosen)
    assert steps["1 ask"]["reasons"] == {"a refusal (message.refusal)": 1}
    assert ("1 ask", "failed", "a refusal (message.refusal)", "") in left


def test_the_same_question_twice_is_two_samples_of_it(experiment, teach):
    seeds = []
    teach(lambda seen, request: seeds.append(request.seed) or f"Is it number {len(seeds)}?")
    chosen = experiment([{"ask": {"template": "@question.yaml"}}], [{"text": "water", "n": 1}, {"text": "water", "n": 2}])
    prompts(chosen)
    assert len(outcome(chosen)[0]) == 2
    assert len(set(seeds)) == 2


def test_novelty_keeps_the_first_of_what_is_alike(experiment, teach):
    rows = [
        {"instruction": text} for text in ("Name three red birds.", "name three RED birds", "Name three blue birds.", "Sing.")
    ]
    chosen = experiment([{"novelty": {"max_overlap": 0.7}}], rows)
    prompts(chosen)
    made, _, steps, left = outcome(chosen)
    assert made == ["Name three red birds.", "Sing."]  # the third overlaps by 2 · 3 / (4 + 4) = 0.75
    assert steps["1 novelty"]["reasons"] == {"overlap": 2}
    assert [text for *_, text in left] == ["name three RED birds", "Name three blue birds."]


def test_what_is_like_a_held_out_example_is_no_prompt(experiment, teach, write, tmp_path):
    held_out = write("test.jsonl", '{"input": "Where is my blue parcel?", "output": "good"}\n')
    task = write_task(tmp_path, "classify")
    lines = [
        "Here are more:",
        "1. Where is my red parcel?",
        "2. I was charged twice.",
        "3. My cup is broken.",
        "4. The lamp is late.",
    ]
    teacher = teach(lambda seen, _: "\n".join(lines))
    steps = [
        {"self_instruct": {"template": "prompts/inputs.yaml", "samples": 1, "examples": 2, "keep_parents": False}},
        {"novelty": {"field": "input", "against": [held_out]}},
    ]
    rows = [{"input": "My cup is broken!", "output": "bad"}, {"input": "All is well.", "output": "good"}]
    chosen = experiment(steps, rows, template=None, task=str(task))
    prompts(chosen)
    made, lineages, counts, left = outcome(chosen)
    assert made == ["I was charged twice.", "The lamp is late."]
    assert ("2 novelty", "rejected", "overlap", "Where is my red parcel?") in left
    assert counts["1 self_instruct"]["reasons"] == {"overlap": 1}, "the seed itself"
    assert lineages[0]["template"] == str(task)
    told = read_task(task, "eval.tasks").prompt("")[0]["content"]
    assert f"Task:\n{told}\n\nInputs of the task:\n" in teacher.asked[0]
    asked = pq.read_table(chosen.directory("prompts") / "prompts.parquet").to_pylist()[0]["prompt"]
    assert asked == read_task(task, "eval.tasks").prompt("I was charged twice.")
    inputs = json.loads((chosen.directory("prompts") / "run.json").read_text())["inputs"]
    assert {held_out, str(task)} <= set(inputs)
    rejected = pq.read_table(chosen.directory("prompts") / "rejected.parquet").to_pylist()
    (step,) = [json.loads(row["lineage"])["steps"][-1] for row in rejected if row["step"] == "2 novelty"]
    assert (step["with"], step["overlap"]) == (f"{held_out} line 1", 0.8)  # four of five words each: 2 · 4 / (5 + 5)


def test_files_to_keep_apart_from_are_checked_before_anything_is_asked(experiment, write):
    for file, message in (
        ("nowhere.jsonl", r"nowhere.jsonl: no such file \(prompts.steps.0.novelty.against\)"),
        (write("other.jsonl", '{"text": "x"}\n'), r"line 1: prompts.steps.0.novelty.against needs the field instruction"),
    ):
        with pytest.raises(InputError, match=message):
            prompts(experiment([{"novelty": {"against": [file]}}], [{"instruction": "x"}]), dry_run=True)


def test_evolving_rewrites_what_the_round_before_has_made(experiment, teach):
    def reply(seen, _):
        verb, text = seen.split(": ")
        return text if text == "Stay." else f"{text} {'more' if verb.startswith('Make') else 'other'}"

    teach(reply)
    chosen = experiment(
        [{"evolve": {"templates": ["@harder.yaml", "@other.yaml"], "rounds": 2}}],
        [{"instruction": text} for text in ("Stay.", *(f"Go {n}" for n in range(8)))],
    )
    prompts(chosen)
    made, lineages, steps, left = outcome(chosen)
    assert made[:9] == ["Stay.", *(f"Go {n}" for n in range(8))]
    assert steps["1 evolve"] == {"rows_in": 9 + 9 + 8, "kept": 25, "rejected": 1, "failed": 0, "reasons": {"unchanged": 1}}
    assert [text for *_, text in left] == ["Stay."]
    assert [len(text.split()) for text in made[9:]] == [3] * 8 + [4] * 8
    assert {text.split()[-1] for text in made[9:]} == {"more", "other"}, "both templates were drawn"
    last = lineages[-1]
    assert [step["round"] for step in last["steps"]] == [1, 2]
    assert last["steps"][0]["gave"]["instruction"] == " ".join(made[-1].split()[:3])


def test_fewer_items_than_examples_are_refused_before_anything_is_written(experiment):
    chosen = experiment([{"self_instruct": {"template": "@more.yaml", "examples": 4}}], [{"instruction": "a", "topic": "x"}])
    for dry_run in (True, False):
        with pytest.raises(InputError, match=r"prompts\.steps\.0\.self_instruct\.examples is 4, but .* has only 1 items"):
            prompts(chosen, dry_run=dry_run)
    assert not Path(chosen.output).exists()


def test_self_instruct_shows_examples_and_keeps_what_is_new(experiment, teach):
    number = iter(range(100))

    def reply(seen, _):
        n = next(number)
        return f"1. Write about {n} things {n}a {n}b.\n2. Task number zero of the seeds"

    teacher = teach(reply)
    chosen = experiment(
        [{"self_instruct": {"template": "@more.yaml", "rounds": 2, "samples": 3, "examples": 4}}],
        [{"instruction": f"Task number {word} of the seeds", "topic": "x"} for word in ("zero", "six", "ten", "two", "red")],
    )
    prompts(chosen)
    made, lineages, steps, _ = outcome(chosen)
    assert len(made) == 5 + 6
    assert steps["1 self_instruct"]["rows_in"] == 5 + 2 * 3 * 2
    assert steps["1 self_instruct"]["reasons"] == {"overlap": 6}
    shown = [seen.split("More like ")[1].split("<|im_end|>")[0].split(" / ") for seen in teacher.asked]
    own = [sum(example.startswith("Write") for example in examples) for examples in shown]
    assert [len(set(examples)) for examples in shown] == [4] * 6
    assert sorted(own) == [0, 0, 0, 1, 1, 1], "a quarter of the second round's are the teacher's own"
    record = lineages[-1]["steps"][0]
    assert (record["round"], len(record["examples"])) == (2, 4)
    assert sum("line" in example for example in record["examples"]) == 3


def test_tasks_are_combined_with_personas(experiment, teach, write):
    personas = write("personas.jsonl", "".join(json.dumps({"persona": f"p{n}", "id": n}) + "\n" for n in range(5)))
    teach(lambda seen, _: f"As {seen.split('You are ')[1].split('.')[0]}, help.")
    combine = {"source": personas, "fields": ["persona"], "samples": 3}
    steps = [{"combine": combine}, {"ask": {"template": "prompts/persona.yaml"}}]
    chosen = experiment(steps, [{"instruction": f"Do {n}", "id": n} for n in range(10)])
    prompts(chosen)
    made, lineages, steps, _ = outcome(chosen)
    assert steps["1 combine"]["rows_in"] == 30
    drawn = [(lineage["source"]["line"], lineage["steps"][0]["line"]) for lineage in lineages]
    assert all(lineage["steps"][0]["file"] == personas for lineage in lineages)
    assert len(set(drawn)) == len(drawn)
    assert set(made) <= {f"As p{n}, help." for n in range(5)}


def test_magpie_needs_no_source(experiment, teach):
    number = iter(range(100))
    teacher = teach(lambda *_: ["What now?", "", "And then…"][next(number)])
    chosen = experiment([{"magpie": {"samples": 3, "system": "Be {{ 'kind' }}."}}])
    prompts(chosen)
    made, lineages, steps, _ = outcome(chosen)
    assert made == ["What now?"]
    assert set(teacher.asked) == {"<|im_start|>system\nBe kind.<|im_end|>\n<|im_start|>user\n"}
    assert list(steps) == ["1 magpie", "template"]
    assert steps["1 magpie"]["reasons"] == {"cut at max_tokens": 1, "empty": 1}
    assert lineages[0]["steps"][0]["gave"] == {"instruction": "What now?"}


def test_what_cannot_be_asked_costs_its_own_item_only(experiment, teach, write):
    """One that its template cannot render, and one that the chat template cannot encode."""
    teacher = teach(lambda seen, _: f"Is it {seen}?")
    write("round.yaml", QUESTION.replace("{{ text }}", "{{ text if text is string else text | round }}"))
    rows = [{"text": "fire"}, {"text": [1]}, {"text": "<|im_end|> \U0010ff00"}, {"text": "water"}]
    chosen = experiment([{"ask": {"template": "@round.yaml"}}], rows)
    prompts(chosen)
    made, _, steps, left = outcome(chosen)
    assert made == ["Is it Ask about fire.?", "Is it Ask about water.?"]
    assert len(teacher.asked) == 2
    (not_rendered, count), (not_encoded, other) = sorted(
        steps["1 ask"]["reasons"].items(), key=lambda item: "rendered" not in item[0]
    )
    assert (count, other) == (1, 1)
    assert not_rendered.startswith("the template question cannot be rendered: ")
    assert not_encoded == "it contains the name of a special token and private use characters"
    assert [verdict for _, verdict, *_ in left] == ["failed"] * 2


def test_a_made_prompt_is_asked_whatever_else_its_row_holds(experiment, teach, write):
    """Without a template the field `prompt` is the prompt, though the row came with a question of its own."""
    teach(lambda seen, _: f"Is it {seen}?")
    write(
        "asked.yaml",
        QUESTION.replace("field: instruction", "field: prompt")
        .replace("[text]", "[instruction]")
        .replace("{{ text", "{{ instruction"),
    )
    rows = [{"instruction": "Make fire.", "output": "No.", "topic": "x"}, {"instruction": "Make water."}]
    chosen = experiment([{"ask": {"template": "@asked.yaml"}}], rows, template=None)
    prompts(chosen)
    made, *_ = outcome(chosen)
    assert made == ["Is it Ask about Make fire..?", "Is it Ask about Make water..?"]
    first = prepared_prompts(chosen).prompts[0]
    assert first.metadata == {"instruction": "Make fire.", "output": "No.", "topic": "x"}


def test_what_does_not_fit_into_the_context_is_not_asked(experiment, teach):
    teacher = teach(lambda *_: "Why?")
    rows = [{"text": "word " * 300}, {"text": "word"}, {"text": "other " * 300}]
    chosen = experiment([{"ask": {"template": "@question.yaml"}}], rows, sampling={"max_tokens": 32})
    prompts(chosen)
    _, _, steps, left = outcome(chosen)
    assert len(teacher.asked) == 1
    assert steps["1 ask"]["reasons"] == {"longer than the context": 2}
    assert len(left) == 2


def test_an_interrupted_run_asks_only_what_is_missing(experiment, teach):
    rows = [{"text": f"thing {n}"} for n in range(8)]
    steps = [{"ask": {"template": "@question.yaml"}}, {"evolve": {"templates": ["@harder.yaml"]}}]

    def reply(seen, _):
        if len(teacher.asked) == limit:
            raise KeyboardInterrupt
        return f"Is it {seen}?" if seen.startswith("Ask") else f"{seen} Really?"

    limit = 5
    teacher = teach(reply)
    chosen = experiment(steps, rows)
    with pytest.raises(KeyboardInterrupt):
        prompts(chosen)
    assert len(list((chosen.directory("prompts") / "1-ask").glob("train-*.parquet"))) == 2
    limit = 9
    teacher = teach(reply)
    with pytest.raises(KeyboardInterrupt):
        prompts(chosen)
    limit = None
    teacher = teach(reply)
    prompts(chosen)
    assert len(teacher.asked) == 8 - 4
    resumed = {file.name: file.read_bytes() for file in chosen.directory("prompts").rglob("*.parquet")}
    teacher = teach(reply)
    again = chosen.model_copy(update={"output": f"{chosen.output}-again"})
    prompts(again)
    assert {file.name: file.read_bytes() for file in again.directory("prompts").rglob("*.parquet")} == resumed
    assert not list(chosen.directory("prompts").rglob(".*"))


def test_workers_share_the_questions_of_a_step(experiment, teach, capsys):
    teacher = teach(lambda seen, _: f"Is it {seen}?")
    chosen = experiment([{"ask": {"template": "@question.yaml"}}], [{"text": f"thing {n}"} for n in range(7)])
    prompts(chosen, worker=Share(0, 2))
    assert "2 of 4 shards finished" in capsys.readouterr().out
    assert len(teacher.asked) == 4
    prompts(chosen, worker=Share(1, 2))
    assert len(teacher.asked) == 7
    assert len(outcome(chosen)[0]) == 7
    prompts(chosen, worker=Share(0, 2))
    assert "is finished (7 prompts)" in capsys.readouterr().out


def test_workers_that_share_are_done_after_as_many_passes_as_the_section_says(experiment, teach):
    """Started one after the other, and all of them again; the prompts are those of one worker."""
    teach(lambda seen, _: f"Is it {seen}?" if seen.startswith("Ask") else f"{seen} Really?")
    evolve = {"evolve": {"templates": ["@harder.yaml"], "rounds": 2}}
    steps = [{"ask": {"template": "@question.yaml"}}, {"novelty": {"max_overlap": 1}}, evolve]
    chosen = experiment(steps, [{"text": f"thing {n}"} for n in range(7)])
    alone = chosen.with_(output=f"{chosen.output}-alone")
    prompts(alone)
    finished = []
    for _ in range(chosen.prompts.passes):
        for number in range(3):
            prompts(chosen, worker=Share(number, 3))
        finished.append(json.loads((chosen.directory("prompts") / "run.json").read_text())["status"] == "done")
    assert finished == [False, False, True]
    assert outcome(chosen) == outcome(alone)


def test_other_settings_or_another_template_are_refused_with_the_difference(experiment, teach, write):
    teach(lambda *_: "Why?")
    steps, rows = [{"ask": {"template": "@question.yaml"}}], [{"text": "x"}]
    prompts(experiment(steps, rows))
    with pytest.raises(InputError, match=r"prompts.sampling.temperature was 1.0, is 0.5"):
        prompts(experiment(steps, rows, sampling={"temperature": 0.5, "max_tokens": 32}))
    with pytest.raises(InputError, match=r"prompts.sampling.temperature was 1.0, is 0.5"):
        generate(experiment(steps, rows, sampling={"temperature": 0.5, "max_tokens": 32}))
    chosen = experiment(steps, rows)
    write("question.yaml", QUESTION.replace("Ask about", "Say about"))
    with pytest.raises(InputError, match=r"input\..*question\.yaml was"):
        prompts(chosen)


@pytest.mark.parametrize(
    ("steps", "rows", "changes", "message"),
    [
        ([], [{"prompt": "x"}], {}, "the key prompts.steps is missing"),
        ([{"ask": {"template": "@none.yaml"}}], [{"text": "x"}], {}, "none.yaml: no such file"),
        ([{"ask": {"template": "prompts/grounded.yaml"}}], [{"text": "x"}], {}, "grounded.yaml: the key answer is missing"),
        (
            [{"ask": {"template": "@question.yaml"}}],
            [{"text": "x"}, {"txt": "y"}],
            {},
            "line 2: the template question needs the field",
        ),
        ([{"ask": {"template": "@question.yaml"}}], [{"text": None}], {}, "line 1: .* the line has an empty text"),
        ([{"novelty": {"field": "instruktion"}}], [{"instruction": "x"}], {}, "line 1: prompts.steps.0.novelty needs the field"),
        ([{"novelty": {}}], [{"instruction": "x"}], {"template": None}, "line 1: prompts.template needs the field prompt"),
        ([{"magpie": {"field": "turn"}}], None, {}, "prompts.template needs the field instruction; .* provide turn"),
        ([{"magpie": {"system": "You are {{ persona }}"}}], None, {}, "magpie.system needs the field persona"),
        ([{"magpie": {"system": "{{"}}], None, {}, "prompts.steps.0.magpie.system: line 1 is not valid Jinja"),
        (
            [{"self_instruct": {"template": "@question.yaml"}}],
            [{"instruction": "x"}],
            {},
            "must have the variable examples and no",
        ),
        (
            [{"self_instruct": {"template": "@more.yaml"}}, {"novelty": {"field": "topic"}}],
            [{"instruction": "x", "topic": "y"}],
            {},
            "prompts.steps.1.novelty needs the field topic; the previous steps provide instruction",
        ),
        (
            [{"evolve": {"templates": ["@evolved.yaml"]}}],
            [{"instruction": "x"}],
            {},
            "line 1: prompts.steps.0.evolve needs the field evolved",
        ),
        (
            [{"self_instruct": {"template": "@both.yaml"}}],
            [{"instruction": "x", "input": "y"}],
            {"template": "@uses.yaml"},
            "prompts.template needs the field input; the previous steps provide instruction",
        ),
        (
            [{"combine": {"source": "prompts/seeds/general.jsonl"}}],
            [{"instruction": "x", "topic": "y"}],
            {},
            "has the field topic, which prompts.steps.0.combine also adds",
        ),
        ([{"combine": {"source": "nowhere.jsonl"}}], [{"instruction": "x"}], {}, "nowhere.jsonl: no such file"),
        (
            [{"combine": {"source": "prompts/seeds/personas.jsonl", "samples": 101}}],
            [{"instruction": "x"}],
            {},
            "prompts.steps.0.combine.samples is 101, but prompts/seeds/personas.jsonl has 100 entries",
        ),
        (
            [{"combine": {"source": "prompts/seeds/personas.jsonl", "fields": ["name"]}}],
            [{"instruction": "x"}],
            {},
            r"personas.jsonl line 1: has no field name \(prompts.steps.0.combine.fields\), only persona",
        ),
        ([{"novelty": {}}], [], {}, "contains no prompts"),
        (
            [{"magpie": {}}],
            None,
            {"sampling": {"max_tokens": 256}},
            "prompts.sampling.max_tokens: the shortest question and the longest answer exceed the context of 256",
        ),
    ],
)
def test_bad_input_is_named_before_the_teacher_is_loaded(experiment, steps, rows, changes, message):
    chosen = experiment(steps, rows, **changes)
    with pytest.raises(InputError, match=message):
        prompts(chosen)
    assert not chosen.directory("prompts").exists()


def test_a_dry_run_counts_and_writes_nothing(experiment, capsys):
    steps = [{"ask": {"template": "@question.yaml", "samples": 2}}, {"evolve": {"templates": ["@harder.yaml"], "rounds": 3}}]
    chosen = experiment(steps, [{"text": "x"}, {"text": "y"}], sampling={"max_tokens": 10})
    prompts(chosen, dry_run=True)
    said = capsys.readouterr().out
    assert "source    2 in = 2 kept" in said
    assert "ask       4 questions, up to 40 tokens" in said
    assert "evolve    at most 3 questions about every remaining item, up to 10 tokens each" in said
    generate(chosen, dry_run=True)
    assert "all prompts made by `prompts`" in capsys.readouterr().out
    assert not chosen.directory("prompts").exists()
    with pytest.raises(InputError, match="run/prompts: does not exist; run `prompts` first"):
        generate(chosen)


def test_a_line_that_cannot_be_read_is_left_out_and_a_null_is_no_item(experiment, teach, write):
    """Neither stops the step: the line is one of 25, and the teacher's answer is rejected with its reason."""
    answers = ['{"instruction": null}', '{"instruction": " "}', '[1] says {"instruction": "Why?"}']
    answers += [json.dumps({"instruction": f"Is it {n}?"}) for n in range(3, 24)]
    teach(lambda seen, _: answers[int(re.search(r"\d+", seen)[0])])
    write("json.yaml", re.sub("answer: .*", "answer: {form: json, field: instruction}", QUESTION))
    chosen = experiment([{"ask": {"template": "@json.yaml"}}], [{"text": f"text {n}"} for n in range(24)])
    with Path(chosen.prompts.source).open("a") as file:
        file.write("\n{broken\n")
    prompts(chosen)
    made = [prompt.messages[-1]["content"] for prompt in prepared_prompts(chosen).prompts]
    assert made == ["Why?", *(f"Is it {n}?" for n in range(3, 24))]
    rejected = pq.read_table(chosen.directory("prompts") / "rejected.parquet").to_pylist()
    assert [row["reason"] for row in rejected if row["step"] == "1 ask"] == ["has no instruction"] * 2


def test_nothing_left_is_an_error_that_says_where_to_look(experiment, teach):
    teach(lambda *_: "nothing to ask")
    with pytest.raises(InputError, match=r"no prompts are left; rejected.parquet says why"):
        prompts(experiment([{"ask": {"template": "@question.yaml"}}], [{"text": "x"}]))


def test_every_row_of_the_dataset_knows_its_ancestors(experiment, teach):
    teach(lambda seen, _: f"Is it {seen}?")
    chosen = experiment([{"ask": {"template": "@question.yaml"}}], [{"text": "x", "topic": "t"}, {"text": "y"}])
    prompts(chosen)
    generate(chosen)
    table = pq.read_table(sorted(chosen.directory("data").glob("train-*.parquet")))
    metadata = [json.loads(text) for text in table["metadata"].to_pylist()]
    lineages = [row.pop("llmdistill")["lineage"] for row in metadata]
    assert [(row["source"]["line"], row["steps"][0]["step"]) for row in lineages] == [
        (1, "ask"),
        (2, "ask"),
    ]
    assert (metadata[0]["topic"], metadata[0]["text"]) == ("t", "x")
    manifest = json.loads((chosen.directory("data") / "dataset.json").read_text())
    assert [step["name"] for step in manifest["prompts"]] == ["source", "1 ask", "template"]
    assert list(manifest["source"]) == [str(chosen.directory("prompts") / "prompts.parquet"), chosen.teacher.model]


def test_made_prompts_are_a_source_for_another_experiment(experiment, teach):
    teach(lambda seen, _: f"Is it {seen}?")
    chosen = experiment([{"ask": {"template": "@question.yaml"}}], [{"text": "x"}])
    prompts(chosen)
    (other,) = load_prompts(Prompts(source=str(chosen.directory("prompts") / "prompts.parquet")))
    assert other.messages == prepared_prompts(chosen).prompts[0].messages


def test_made_prompts_keep_their_tools_and_what_is_known_of_them(tmp_path):
    tools = [{"type": "function", "function": {"name": "weather"}}]
    messages = [{"role": "user", "content": "Rain?"}]
    rows = [{"prompt": messages, "with_tools": json.dumps({"messages": messages, "tools": tools}), "lineage": "{}"}]
    rows = [{**rows[0], "metadata": json.dumps({"topic": "w", "answer": 3})}]
    pq.write_table(pa.Table.from_pylist(rows), tmp_path / "prompts.parquet")
    (prompt,) = load_prompts(Prompts(source=str(tmp_path / "prompts.parquet")))
    assert (prompt.messages, prompt.tools, prompt.metadata) == (messages, tools, {"topic": "w", "answer": 3})


def test_another_end_of_the_trace_makes_other_prompts(experiment, teach):
    """Answers are stored without their traces, so that none of those that were read by another mark may stay."""
    teach(lambda *_: "Hm.</think>Why?")
    steps, rows = [{"ask": {"template": "@question.yaml"}}], [{"text": "x"}]
    chosen = experiment(steps, rows)
    prompts(chosen)
    assert outcome(chosen)[0] == ["Why?"]
    assert claims(chosen)[0].settings["generate"] == {"rows_per_shard": 2}, "as in runs that are there already"
    other = chosen.with_(generate=chosen.generate.with_(thinking_end="<end>"))
    with pytest.raises(InputError, match=r'generate\.thinking_end was null, is "<end>"'):
        prompts(other)
    shutil.rmtree(chosen.directory("prompts"))  # as `run --remake`
    prompts(other)
    assert outcome(other)[0] != ["Why?"]


def begun(experiment):
    """The directory of the answers to the first step, in a run that another process has begun."""
    record.begin(*claims(experiment)[0], experiment.seed)
    directory = experiment.directory("prompts") / "1-ask"
    directory.mkdir()
    return directory


def test_two_that_ask_at_once_share_the_questions(experiment, teach):
    """Another process has the first shard in hand, and has answered it when this one comes back to it."""
    steps, rows = [{"ask": {"template": "@question.yaml"}}], [{"text": f"thing {n}"} for n in range(7)]
    chosen = experiment(steps, rows)
    alone = chosen.with_(output=f"{chosen.output}-alone")
    teach(lambda seen, _: f"Is it {seen}?")
    prompts(alone)
    (answered,) = (alone.directory("prompts") / "1-ask").glob("train-00000-*")
    directory = begun(chosen)

    def reply(seen, _):
        if len(teacher.asked) == 2:
            shutil.copy(answered, directory)
        return f"Is it {seen}?"

    teacher = teach(reply)
    with lock.InHand(directory) as other:
        assert other.take("0")
        prompts(chosen)
    assert len(teacher.asked) == 5
    assert outcome(chosen) == outcome(alone)


def test_what_another_has_in_hand_is_asked_last(experiment, teach):
    """It may never answer."""
    steps, rows = [{"ask": {"template": "@question.yaml"}}], [{"text": f"thing {n}"} for n in range(7)]
    chosen = experiment(steps, rows)
    teacher = teach(lambda seen, _: f"Is it {seen}?")
    directory = begun(chosen)
    with lock.InHand(directory) as other:
        assert other.take("1")
        prompts(chosen)
    numbers = [int(re.search(r"thing (\d)", seen)[1]) for seen in teacher.asked]
    assert numbers == [1, 0, 5, 4, 6, 3, 2]
    assert len(outcome(chosen)[0]) == 7
