"""The judge's score is the mean of its distribution over the digits, taken here from one plain forward pass."""

from pathlib import Path

import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import torch

from llmdistill.curation import judge as module
from llmdistill.curation.judge import as_text, digit_ids
from llmdistill.curation.steps import Failed
from llmdistill.errors import InputError
from llmdistill.models.loading import load_model, load_tokenizer
from llmdistill.prompting.template import PromptTemplate
from llmdistill.teachers import Request
from llmdistill.teachers.remote import given_up
from tests.curation.steps import apply_step, table
from tests.factories import VOCAB

ROWS = table(["It is 4.", "It is a fish.", "Four"], prompts=["What is 2 + 2?", "What is 2 + 2?", "And 1 + 3?"])


def step(model, **settings):
    return {"judge": {"teacher": {"model": str(model), "engine": "transformers", "dtype": "float32"}, **settings}}


def expected(model, prompt, answer):
    """Mean digit and mass over every token that reads as a digit from 1 to 5."""
    tokenizer = load_tokenizer(str(model), None)
    messages = PromptTemplate(Path("prompts/judge.yaml"), "").render({"prompt": prompt, "answer": answer}, "")
    ids = tokenizer.apply_chat_template(messages, add_generation_prompt=True, return_dict=True)["input_ids"]
    with torch.inference_mode():
        p = load_model(str(model), dtype="float32")(torch.tensor([ids])).logits[0, -1].double().softmax(-1)
    digits = [tokenizer.decode([token]).strip() for token in range(len(tokenizer))]
    mass = {digit: sum(float(p[token]) for token, text in enumerate(digits) if text == str(digit)) for digit in range(1, 6)}
    return sum(digit * value for digit, value in mass.items()) / sum(mass.values()), sum(mass.values())


def test_scores_are_those_of_a_forward_pass_and_are_kept(tiny, tmp_path, monkeypatch):
    monkeypatch.setattr(module, "_K", VOCAB)  # a random model has no digits among its most likely tokens
    reasons, _ = apply_step(tmp_path, step(tiny, min_mass=1e-9, min_score=5), ROWS)
    (file,) = (tmp_path / "judge").rglob("*.parquet")
    kept = {row["id"]: row for row in pq.read_table(file).to_pylist()}
    for number, (prompt, answer) in enumerate([("What is 2 + 2?", "It is 4."), ("What is 2 + 2?", "It is a fish.")]):
        score, mass = expected(tiny, prompt, answer)
        assert kept[f"row{number}"]["score"] == pytest.approx(score, rel=1e-3)
        assert kept[f"row{number}"]["mass"] == pytest.approx(mass, rel=1e-3)
        assert reasons[number] == f"score {kept[f'row{number}']['score']:.2f}"

    # Another threshold, another group size, the rows in another order: nobody is asked again.
    monkeypatch.setattr(module, "open_engine", lambda *_: pytest.fail("the judge was started"))
    backwards = ROWS.take(pa.array([2, 1, 0]))
    assert apply_step(tmp_path, step(tiny, min_mass=1e-9, min_score=1), backwards, group=1)[0] == [None] * 3
    failed, *_ = apply_step(tmp_path, step(tiny, min_mass=1), backwards)[0]
    assert isinstance(failed, Failed)
    assert failed == f"the judge assigns the digits a probability of {kept['row2']['mass']:.2f}"


def test_only_new_questions_are_asked(tiny, tmp_path, monkeypatch):
    apply_step(tmp_path, step(tiny, min_mass=1e-9, min_score=1, scale=[1, 5]), ROWS.slice(0, 2))
    asked = []
    opened = module.open_engine

    def watch(*arguments):
        engine = opened(*arguments)
        generate = engine.generate
        engine.generate = lambda batches: generate([asked.extend(batch) or batch for batch in batches])
        return engine

    monkeypatch.setattr(module, "open_engine", watch)
    apply_step(tmp_path, step(tiny, min_mass=1e-9, min_score=1), ROWS)
    assert len(asked) == 1


def test_a_judge_with_another_system_message_or_another_member_is_asked_anew(tiny, tmp_path):
    for number, more in enumerate(({}, {"system": "Be strict."}, {"ensemble": [{"model": str(tiny)}]}), start=1):
        settings = step(tiny, min_mass=1e-9, min_score=1)
        settings["judge"]["teacher"] |= more
        apply_step(tmp_path, settings, ROWS)
        assert len(list((tmp_path / "judge").iterdir())) == number


def test_a_row_that_is_too_long_has_failed(tiny, tmp_path):
    long = table(["word " * 300, "short"])
    settings = step(tiny, min_mass=1e-9, min_score=1)
    settings["judge"]["teacher"]["max_model_len"] = 256
    reasons, _ = apply_step(tmp_path, settings, long)
    assert isinstance(reasons[0], Failed)
    assert reasons[0].endswith("tokens are too long for the judge")


def test_a_row_that_the_judge_cannot_be_asked_or_does_not_answer_has_failed(tiny, tmp_path, monkeypatch):
    """The others have their scores, which are kept; the failed one is asked again."""
    monkeypatch.setattr(module, "_K", VOCAB)
    start = module.open_engine

    class Unsure:
        def __init__(self, *how):
            self.engine = start(*how)

        def generate(self, parts):
            for done in self.engine.generate(parts):
                yield given_up(Request(done.index, [], 0), "an answer of another shape") if done.index == 1 else done

    monkeypatch.setattr(module, "open_engine", Unsure)
    rows = table(["fine", "given up", "a <|im_end|> \U0010ff00 b", "fine, too"])
    reasons, _ = apply_step(tmp_path, step(tiny, min_mass=1e-9, min_score=1), rows)
    assert [isinstance(reason, Failed) for reason in reasons] == [False, True, True, False]
    assert reasons[1] == "the judge gave no answer: an answer of another shape"
    assert reasons[2].startswith("the judge cannot be asked: ")
    assert sum(pq.read_metadata(file).num_rows for file in (tmp_path / "judge").rglob("*.parquet")) == 2


def test_what_cannot_judge_is_refused(tmp_path, tiny):
    with pytest.raises(InputError, match=r"curate\.0\.judge\.teacher\.model: nowhere"):
        apply_step(tmp_path, step("nowhere/at/all/x"), ROWS)
    template = tmp_path / "t.yaml"
    template.write_text("name: t\ndescription: d\nvariables: [question]\nmessages: [{role: user, content: '{{ question }}'}]")
    with pytest.raises(InputError, match=r"t\.yaml: needs the field question, a judge's template gets prompt and answer"):
        apply_step(tmp_path, step(tiny, template=str(template)), ROWS)


def test_digits_are_found_in_a_vocabulary(tiny):
    tokenizer = load_tokenizer(str(tiny), None)
    found = digit_ids(tokenizer, [1, 5])
    assert set(found.values()) == {1, 2, 3, 4, 5}
    for token, digit in found.items():
        assert tokenizer.decode([token]).strip() == str(digit)
    assert tokenizer.encode("3", add_special_tokens=False)[0] in found


def test_a_conversation_as_text():
    assert as_text([{"role": "user", "content": "a"}]) == "a"
    turns = [{"role": "system", "content": "s"}, {"role": "user", "content": "u"}]
    assert as_text(turns) == "system: s\n\nuser: u"
