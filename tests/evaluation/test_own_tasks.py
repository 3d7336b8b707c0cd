import json
import math

import pyarrow as pa
import pytest

from llmdistill.errors import InputError, UnusableError
from llmdistill.evaluation import own_tasks
from llmdistill.evaluation.examples import apart
from llmdistill.evaluation.own_tasks import agrees, run_own
from llmdistill.evaluation.parts import Parts
from llmdistill.evaluation.task_scores import summarise
from llmdistill.evaluation.tasks import SCHEMA, About, files_of, load_tasks, read_tasks
from llmdistill.evaluation.writing import Written
from llmdistill.models.loading import load_model, load_tokenizer
from tests.tasks.make import make_task, write_task

LINES = {
    "extract": [{"name": "Ann"}, {"name": "Bob", "age": 3}, {"name": "Cat"}],
    "classify": ["good", "bad", "good"],
    "sql": ["SELECT name FROM people", "SELECT 1", "SELECT 2"],
    "tools": [{"name": "now"}, {"name": "book", "arguments": {"city": "Rome"}}, {"name": "now"}],
    "generate": ["Yes.", "No.", "A longer answer."],
}


def write(directory, kind, lines=None):
    file = write_task(directory, kind, "test: test.jsonl")
    rows = [{"input": f"Number {n}.", "output": output, "id": f"i{n}"} for n, output in enumerate(lines or LINES[kind])]
    (directory / "test.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    return str(file)


def test_every_model_answers_greedily_through_its_template(tmp_path, tiny):
    """Each prompt alone through transformers' own `generate`, against answers in batches of two."""
    model, tokenizer = load_model(str(tiny), dtype="float32"), load_tokenizer(str(tiny), None)
    own = read_tasks([write(tmp_path, "classify")])
    rows, tables = run_own(own, {"a": model, "b": model}, dict.fromkeys("ab", tokenizer), {"a": [2], "b": [2]}, 2, None)
    assert [(row["model"], row["item"]) for row in rows] == [(name, f"i{n}") for name in "ab" for n in range(3)]
    assert [row["target"] for row in rows] == LINES["classify"] * 2
    longest = 3 * max(len(tokenizer(label, add_special_tokens=False)["input_ids"]) for label in ("good", "bad")) + 64
    for row, number in zip(rows, (0, 1, 2, 0, 1, 2), strict=True):
        messages = [
            {"role": "system", "content": "Do it.\n\nAnswer with one of these labels alone:\ngood\nbad"},
            {"role": "user", "content": f"Number {number}."},
        ]
        ids = tokenizer.apply_chat_template(messages, add_generation_prompt=True, return_dict=True, return_tensors="pt")
        written = model.generate(**ids, do_sample=False, max_new_tokens=longest, eos_token_id=[2], pad_token_id=2)
        text = tokenizer.decode(written[0, ids["input_ids"].shape[1] :], skip_special_tokens=True).strip()
        assert (row["answer"], row["score"]) == (text, float(text == row["target"]))
    assert set(tables) == {"classify"}
    assert tables["classify"]["valid"] == dict.fromkeys("ab", sum(row["answer"] in ("good", "bad") for row in rows[:3]) / 3)
    assert tables["classify"]["confusion"]["a"]["labels"] == ["good", "bad", "(no label)"]


def test_answers_that_an_interrupted_run_had_are_not_written_again(tmp_path, tiny, monkeypatch):
    model, tokenizer = load_model(str(tiny), dtype="float32"), load_tokenizer(str(tiny), None)
    own, names, asked = read_tasks([write(tmp_path, "classify")]), ("teacher", "student"), []
    answer = own_tasks.write_answers

    def counted(*how):
        asked.append(1)
        if len(asked) == 2:
            raise KeyboardInterrupt
        return answer(*how)

    def run(parts):
        return run_own(
            own, dict.fromkeys(names, model), dict.fromkeys(names, tokenizer), {name: [2] for name in names}, 2, None, parts=parts
        )

    monkeypatch.setattr(own_tasks, "write_answers", counted)
    parts = Parts(tmp_path / "parts")
    with pytest.raises(KeyboardInterrupt):
        run(parts)
    assert run(parts) == run(None)
    assert len(asked) == 2 + 1 + 2


@pytest.mark.parametrize("kind", LINES)
def test_right_answers_are_scored_one_and_wrong_ones_less(tmp_path, tiny, monkeypatch, kind):
    """A model that writes the targets, and one that writes the first of them always."""
    file = write(tmp_path, kind)
    own = read_tasks([file])
    targets = [item.output for item in own[0].items]
    written = iter([[Written(text, [-0.1]) for text in texts] for texts in (targets, [targets[0]] * 3)])
    monkeypatch.setattr(own_tasks, "write_answers", lambda *_: next(written))
    model, tokenizer = load_model(str(tiny), dtype="float32"), load_tokenizer(str(tiny), None)
    model.config.max_position_embeddings = 1024  # nothing is written
    names = ("teacher", "student")
    models, ends = dict.fromkeys(names, model), {name: [2] for name in names}
    rows, tables = run_own(own, models, dict.fromkeys(names, tokenizer), ends, 2, None)
    assert [row["score"] for row in rows[:4]] == [1, 1, 1, 1]
    assert rows[4]["score"] < 1
    assert tables[kind]["valid"] == {"teacher": 1, "student": 1}

    about = {kind: About(file, "m", None, tables[kind])}
    (entry,) = summarise(pa.Table.from_pylist(rows, SCHEMA), about, 200, 0)["tasks"]
    assert entry["models"]["teacher"]["mean"] == 1
    assert entry["kept"]["mean"] == pytest.approx(sum(row["score"] for row in rows[3:]) / 3)
    assert entry["valid"] == {"teacher": 1, "student": 1}
    beside = {"extract": {"fields"}, "classify": {"confusion"}}
    assert {"fields", "confusion"} & entry.keys() == beside.get(kind, set())
    assert ("cascade" in entry) == (kind != "generate")
    lost = [row["item"] for row in rows[3:] if row["score"] < 1]
    assert (entry["apart"]["worse"], entry["apart"]["better"], entry["apart"]["won"]) == (len(lost), 0, [])
    assert sorted(found["item"] for found in entry["apart"]["lost"]) == lost
    for found in entry["apart"]["lost"]:
        number = int(found["item"][1:])
        answers = (found["input"], found["target"], found["teacher"], found["student"])
        assert answers == (f"Number {number}.", targets[number], targets[number], targets[0])
        assert found["probability"] == pytest.approx(math.exp(-0.1))
    if kind != "generate":  # the teacher's answers are right, so that to agree is to be right
        assert entry["cascade"]["agreement"]["mean"] == entry["models"]["student"]["mean"]


@pytest.mark.parametrize(
    ("kind", "teacher", "same", "other"),
    [
        ("extract", '{"name": "Ann", "age": 3}', '```json\n{"age": 3.0, "name": "Ann"}\n```', '{"name": "Ann"}'),
        ("extract", "no JSON", "no JSON", '{"name": "Ann"}'),
        ("extract", '{"age": 3}', '{"age": 3}', '{"age":3}'),
        ("classify", "good", "good", "bad"),
        ("classify", "so-so", "so-so", "so so"),
        ("sql", "SELECT name FROM people WHERE age < 25", "SELECT 'Bob'", "SELECT 'Ann'"),
        ("sql", "SELECT nothing", "SELECT nothing", "SELECT  nothing"),
        (
            "tools",
            '{"name": "book", "arguments": {"city": "Rome"}}',
            '{"name":"book","arguments":{"nights":1,"city":"Rome"}}',
            "{}",
        ),
        ("tools", "{}", "{}", '{"name": "now"}'),
    ],
)
def test_an_answer_agrees_by_the_measure_of_its_kind(tmp_path, kind, teacher, same, other):
    """Equal records, rows and calls; an answer of the teacher that cannot be accepted is met by the same text alone."""
    task = make_task(tmp_path, kind)
    assert agrees(task, same, teacher) is True
    assert agrees(task, other, teacher) is False


def test_free_text_neither_agrees_nor_disagrees(tmp_path):
    assert agrees(make_task(tmp_path, "generate"), "Yes.", "Yes.") is None


def test_agreement_with_a_teacher_that_answered_elsewhere(tmp_path, tiny):
    model, tokenizer = load_model(str(tiny), dtype="float32"), load_tokenizer(str(tiny), None)
    own = read_tasks([write(tmp_path, "classify")])
    rows, tables = run_own(own, {"student": model}, {"student": tokenizer}, {"student": [2]}, 2, None)
    assert [row["agrees"] for row in rows] == [None] * 3
    longest = tables["classify"]["max_tokens"]["student"]
    assert all(1 <= len(row["logprobs"]) <= longest and max(row["logprobs"]) < 0 for row in rows)
    told = {("classify", "i0"): rows[0]["answer"], ("classify", "i1"): "good"}
    again, _ = run_own(own, {"student": model}, {"student": tokenizer}, {"student": [2]}, 2, None, references=told)
    assert [row["agrees"] for row in again] == [True, False, None]


def test_no_lm_eval_is_needed(tmp_path, monkeypatch):
    monkeypatch.setattr("importlib.util.find_spec", lambda name: None)
    file = write(tmp_path, "sql")
    own = read_tasks([file])
    assert list(load_tasks(own, None)) == ["sql"]
    assert set(files_of(own)) == {file, *(str(tmp_path / name) for name in ("people.sql", "test.jsonl"))}
    with pytest.raises(InputError, match="needs lm-eval"):
        read_tasks([file, "hellaswag"])


def test_what_is_wrong_is_said_before_a_model_is_loaded(tmp_path):
    file = write(tmp_path, "classify", ["good", "ugly"])
    with pytest.raises(InputError, match=r"test.jsonl line 2: output: not a label: ugly"):
        read_tasks([file])
    with pytest.raises(InputError, match=r"1 item of the task .*classify.yaml, but an interval needs at least 2"):
        read_tasks([write(tmp_path, "classify", ["good"])])
    write_task(tmp_path, "classify")
    with pytest.raises(InputError, match=r"classify.yaml: the key test is missing"):
        read_tasks([file])
    own = read_tasks([write(tmp_path, "classify")])
    (tmp_path / "more").mkdir()
    with pytest.raises(InputError, match="are both called classify"):
        read_tasks([file, write(tmp_path / "more", "classify")])
    lines = [json.dumps({"input": "x", "output": "good", "cluster": str(n // 2)}) for n in range(4)]
    (tmp_path / "test.jsonl").write_text("\n".join(lines))
    own = read_tasks([file])
    assert load_tasks(own, None)
    with pytest.raises(InputError, match=r"1 item of the task .*classify.yaml"):
        load_tasks(own, 2)


def test_a_template_that_refuses_and_a_prompt_that_does_not_fit(tmp_path, tiny):
    model, tokenizer = load_model(str(tiny), dtype="float32"), load_tokenizer(str(tiny), None)
    own = read_tasks([write(tmp_path, "classify", ["good", "bad"])])

    def run():
        return run_own(own, {"a": model}, {"a": tokenizer}, {"a": [2]}, 2, None)

    tokenizer.chat_template = "{% for m in messages if m.role == 'user' %}{{ m.content }}{% endfor %}"
    with pytest.raises(UnusableError, match=r"test.jsonl line 1: the chat template does not show"):
        run()
    tokenizer.chat_template = "{% for m in messages %}{{ m.content }}\n{% endfor %}"
    model.config.max_position_embeddings = 40
    with pytest.raises(InputError, match=r"test.jsonl line 1: \d+ tokens plus 70 for an answer exceed the context of 40"):
        run()


def test_the_items_that_differ_most_and_of_these_the_most_certain_are_first():
    def table(scores, logprobs):
        texts = {name: ["x"] * 4 for name in ("input", "target", "answer")}
        return pa.table({"item": list("abcd"), "score": scores, "logprobs": [[value] for value in logprobs], **texts})

    found = apart(table([0.5, 0.0, 0.0, 1.0], [-1.0, -3.0, -2.0, -1.0]), table([1.0, 1.0, 1.0, 0.5], [0.0] * 4))
    assert [item["item"] for item in found["lost"]] == ["c", "b", "a"]
    assert [item["item"] for item in found["won"]] == ["d"]
    assert (found["worse"], found["better"]) == (3, 1)
    assert found["lost"][0]["probability"] == pytest.approx(math.exp(-2))
