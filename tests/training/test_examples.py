import json

import pytest

from llmdistill.config.train import Examples
from llmdistill.errors import InputError, UnusableError
from llmdistill.models.loading import load_tokenizer
from llmdistill.training.examples import example_rows, read_examples
from tests.tasks.make import write_task


def write(directory, examples, test=(("held out", "good"), ("other", "bad"))):
    for name, pairs in (("examples", examples), ("test", test)):
        lines = [json.dumps({"input": text, "output": output}) for text, output in pairs]
        (directory / f"{name}.jsonl").write_text("\n".join(lines))
    return Examples(task=str(write_task(directory, "classify", "test: test.jsonl")), file=str(directory / "examples.jsonl"))


def test_rows_are_the_conversations_as_the_template_writes_them(tmp_path, tiny):
    tokenizer = load_tokenizer(str(tiny), None)
    examples = [("first", "good"), ("second one", "bad")]
    rows = example_rows(write(tmp_path, examples), tokenizer, [2], {})
    assert len(rows) == 2
    for row, (text, output) in zip(rows, examples, strict=True):
        prompt = [
            {"role": "system", "content": "Do it.\n\nAnswer with one of these labels alone:\ngood\nbad"},
            {"role": "user", "content": text},
        ]
        asked = tokenizer.apply_chat_template(prompt, add_generation_prompt=True, return_dict=False)
        whole = tokenizer.apply_chat_template([*prompt, {"role": "assistant", "content": output}], return_dict=False)
        assert row["completion_start"] == len(asked)
        assert row["input_ids"].tolist() == whole[: whole.index(2, len(asked)) + 1]


def test_no_held_out_item_is_trained_on(tmp_path):
    told = write(tmp_path, [("first", "good"), (" Held  \uff4fut\n", "good")])
    with pytest.raises(InputError, match=r"examples.jsonl line 2: its input equals that of .*test.jsonl line 1, which is held"):
        read_examples(told)


def test_what_is_wrong_is_named(tmp_path, tiny):
    with pytest.raises(InputError, match=r"examples.jsonl line 1: output: not a label: ugly"):
        read_examples(write(tmp_path, [("first", "ugly")]))
    told = write(tmp_path, [("first", "good")])
    with pytest.raises(InputError, match=r"no.jsonl: no such file \(train.compare_examples.file\)"):
        read_examples(told.with_(file=str(tmp_path / "no.jsonl")))
    with pytest.raises(InputError, match=r"train.compare_examples.task"):
        read_examples(told.with_(task=str(tmp_path / "no.yaml")))
    tokenizer = load_tokenizer(str(tiny), None)
    tokenizer.chat_template = "{% for m in messages if m.role == 'user' %}{{ m.content }}{% endfor %}"
    with pytest.raises(UnusableError, match=r"examples.jsonl line 1: the chat template does not show"):
        example_rows(told, tokenizer, [2], {})


def test_every_file_is_an_input(tmp_path):
    _, items, inputs = read_examples(write(tmp_path, [("first", "good")]))
    assert [item.input for item in items] == ["first"]
    assert set(inputs) == {str(tmp_path / name) for name in ("classify.yaml", "examples.jsonl", "test.jsonl")}
