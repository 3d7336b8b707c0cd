import json

import numpy as np
import pytest

from llmdistill.errors import InputError
from llmdistill.evaluation import tasks
from llmdistill.evaluation.parts import Parts
from llmdistill.evaluation.tasks import TaskFile, files_of, load_tasks, read_tasks, run_tasks
from llmdistill.models.loading import load_model, load_tokenizer

CHOICES = """
task: colours
dataset_path: json
dataset_kwargs: {data_files: {test: colours.jsonl}}
test_split: test
output_type: multiple_choice
doc_to_text: "{{question}}"
doc_to_choice: "{{choices}}"
doc_to_target: answer
metric_list: [{metric: acc}]
"""
WRITTEN = """
task: echo
dataset_path: json
dataset_kwargs: {data_files: {test: [echo.jsonl]}}
test_split: test
output_type: generate_until
doc_to_text: "Write {{word}}"
doc_to_target: "{{word}}"
generation_kwargs: {until: ["\\n"], do_sample: false, max_gen_toks: 4}
metric_list: [{metric: exact_match}]
"""


@pytest.fixture
def files(tmp_path):
    (tmp_path / "colours.yaml").write_text(CHOICES)
    (tmp_path / "echo.yaml").write_text(WRITTEN)
    colours = [
        {"id": f"c{n}", "question": f"Item {n}?", "choices": ["red", "dark green", "blue"][: 2 + n % 2], "answer": n % 2}
        | ({"cluster": "first"} if n < 2 else {"cluster": f"c{n}"})
        for n in range(6)
    ]
    (tmp_path / "colours.jsonl").write_text("".join(json.dumps(row) + "\n" for row in colours))
    (tmp_path / "echo.jsonl").write_text("".join(json.dumps({"word": word}) + "\n" for word in ("sun", "moon", "star")))
    return tmp_path


@pytest.fixture
def run(tmp_path):
    def run(names, models, tokenizer, limit=None, parts="parts"):
        found = load_tasks(read_tasks([str(name) for name in names]), limit)
        return run_tasks(found, models, dict.fromkeys(models, tokenizer), 2, limit, None, Parts(tmp_path / parts))

    return run


def test_scores_are_those_of_the_likelihood_worked_out_here(files, tiny, run):
    """Every choice alone through the model, with the teacher's chat template, in float64."""
    import torch

    model, tokenizer = load_model(str(tiny), dtype="float32"), load_tokenizer(str(tiny), None)
    table, about, warnings = run([files / "colours.yaml"], {"a": model}, tokenizer)
    assert about["colours"].metric == "acc"
    assert about["colours"].chance == pytest.approx((3 * 1 / 2 + 3 * 1 / 3) / 6)
    assert warnings == []
    for number, row in enumerate(map(json.loads, (files / "colours.jsonl").read_text().splitlines())):
        message = [{"role": "user", "content": row["question"]}]
        head = tokenizer.apply_chat_template(message, tokenize=False, add_generation_prompt=True)
        likelihood = []
        for choice in row["choices"]:
            start, whole = (tokenizer.encode(text, add_special_tokens=False) for text in (head, head + choice))
            with torch.inference_mode():
                logprobs = model(torch.tensor([whole])).logits[0].double().log_softmax(-1)
            positions = range(len(start), len(whole))
            likelihood.append(sum(logprobs[place - 1, whole[place]].item() for place in positions))
        got = {name: table[name][number].as_py() for name in table.column_names}
        best = int(np.argmax(likelihood))
        assert got == {
            "task": "colours",
            "item": row["id"],
            "cluster": row["cluster"],
            "model": "a",
            "score": float(best == row["answer"]),
            "answer": row["choices"][best],
            "target": row["choices"][row["answer"]],
            **dict.fromkeys(("input", "logprobs", "agrees")),
        }


def test_written_answers_are_kept_as_text(files, tiny, run):
    model, tokenizer = load_model(str(tiny), dtype="float32"), load_tokenizer(str(tiny), None)
    table, about, _ = run([files / "echo.yaml"], {"a": model, "b": model}, tokenizer, limit=2)
    assert about["echo"].chance is None
    assert table["model"].to_pylist() == ["a", "a", "b", "b"]
    assert table["item"].to_pylist() == ["0", "1", "0", "1"]
    assert table["target"].to_pylist() == ["sun", "moon"] * 2
    ids = tokenizer.apply_chat_template(
        [{"role": "user", "content": "Write sun"}], add_generation_prompt=True, return_dict=True, return_tensors="pt"
    )
    written = model.generate(**ids, do_sample=False, max_new_tokens=4, pad_token_id=2)[0, ids["input_ids"].shape[1] :]
    expected = tokenizer.decode(written, skip_special_tokens=True).split("\n")[0]
    assert table["answer"][0].as_py() == expected


def test_what_an_interrupted_run_had_scored_is_not_scored_again(files, tiny, run, monkeypatch):
    model, tokenizer = load_model(str(tiny), dtype="float32"), load_tokenizer(str(tiny), None)
    names, models = [files / "colours.yaml", files / "echo.yaml"], {"a": model, "b": model}
    measure, asked = tasks._run, []

    def counted(runner, name, *rest):
        asked.append(name)
        if len(asked) == 3:
            raise KeyboardInterrupt
        return measure(runner, name, *rest)

    monkeypatch.setattr(tasks, "_run", counted)
    with pytest.raises(KeyboardInterrupt):
        run(names, models, tokenizer)
    table, about, warnings = run(names, models, tokenizer)
    assert asked == ["colours", "echo", "colours", "colours", "echo"]
    assert (table, about, warnings) == run(names, models, tokenizer, parts="in one go")


def test_a_score_of_another_scale_than_0_to_1_is_passed_over_for_every_model(files, tiny, run):
    """Of a model that writes nothing the first metric is always 0, and could be a share; of the other one it is not."""
    import torch
    from lm_eval.api.registry import register_metric

    @register_metric(metric="letters", higher_is_better=True, aggregation="mean")
    def letters(references, predictions):
        return float(len(predictions[0]))

    file = files / "echo.yaml"
    file.write_text(WRITTEN.replace("[{metric: exact_match}]", "[{metric: letters}, {metric: exact_match}]"))
    model, silent, tokenizer = load_model(str(tiny)), load_model(str(tiny)), load_tokenizer(str(tiny), None)
    with torch.no_grad():
        for parameter in silent.parameters():
            parameter.zero_()  # its choice is token 0, a special one
    table, about, _ = run([file], {"silent": silent, "a": model}, tokenizer)
    assert max(map(len, table["answer"].to_pylist()[3:])) > 1
    assert about["echo"].metric == "exact_match"
    assert table["score"].to_pylist() == [float(row["answer"] == row["target"]) for row in table.to_pylist()]
    file.write_text(WRITTEN.replace("exact_match", "letters"))
    with pytest.raises(InputError, match=r"echo.yaml: none of its metrics scores single items from 0 to 1: letters"):
        run([file], {"silent": silent, "a": model}, tokenizer, parts="others")


def test_too_long_requests_are_told(files, tiny, run):
    """Three of four, of which two are in one batch."""
    words = ["short", "long " * 400, "longer " * 300, "longest " * 500]
    (files / "echo.jsonl").write_text("".join(json.dumps({"word": word}) + "\n" for word in words))
    model, tokenizer = load_model(str(tiny), dtype="float32"), load_tokenizer(str(tiny), None)
    _, _, warnings = run([files / "echo.yaml"], {"a": model}, tokenizer)
    assert warnings == ["echo: 3 requests were too long for a and were truncated at the start"]


def test_too_long_choices_are_told_one_by_one(files, tiny, run):
    rows = [{"question": "long " * (400 * number), "choices": ["red", "dark green"], "answer": 0} for number in (0, 1)]
    (files / "colours.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    model, tokenizer = load_model(str(tiny), dtype="float32"), load_tokenizer(str(tiny), None)
    _, _, warnings = run([files / "colours.yaml"], {"a": model}, tokenizer)
    assert warnings == ["colours: 2 requests were too long for a and were truncated at the start"]


def test_too_few_items_are_refused_before_a_model_is_loaded(files):
    (files / "echo.jsonl").write_text('{"word": "sun"}\n')
    with pytest.raises(InputError, match=r"1 item of the task .*echo.yaml, but an interval needs at least 2"):
        load_tasks(read_tasks([str(files / "echo.yaml")]), None)
    colours = [json.dumps({"question": "?", "choices": ["a", "b"], "answer": 0, "cluster": "one"}) + "\n"] * 5
    (files / "colours.jsonl").write_text("".join(colours))
    with pytest.raises(InputError, match=r"1 item of the task .*colours.yaml"):
        load_tasks(read_tasks([str(files / "colours.yaml")]), None)


def test_files_of(files):
    (task,) = read_tasks([str(files / "echo.yaml")])
    assert isinstance(task, TaskFile)
    assert files_of([task, "hellaswag"]) == {str(files / name): files / name for name in ("echo.yaml", "echo.jsonl")}


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (("task: colours", "task: colours\ninclude: other.yaml"), "colours.yaml: include is not supported"),
        (("task: colours\n", ""), "colours.yaml: the key task is missing"),
        (("colours.jsonl", "nowhere.jsonl"), "colours.yaml: dataset_kwargs.data_files: nowhere.jsonl not found next to it"),
        (("dataset_kwargs: {data_files: {test: colours.jsonl}}", ""), "the key dataset_kwargs.data_files is missing"),
        (("doc_to_target: answer", "doc_to_target: !function utils.target"), "colours.yaml: not valid YAML"),
        (("doc_to_target: answer", "doc_to_target: ["), "colours.yaml: not valid YAML"),
    ],
)
def test_a_broken_file_is_refused(files, change, message):
    file = files / "colours.yaml"
    file.write_text(CHOICES.replace(*change))
    with pytest.raises(InputError, match=message):
        read_tasks([str(file)])


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (("{{question}}", "{{question"), "colours.yaml: cannot be loaded: "),
        (("test_split: test", "test_split: train"), "colours.yaml: cannot be loaded: "),
        (("multiple_choice", "essay"), "colours.yaml: cannot be loaded: .*essay"),
        (("metric: acc", "metric: beauty"), "colours.yaml: cannot be loaded: "),
        (("doc_to_target", "unsafe_code: true\ndoc_to_target"), "colours.yaml: runs code written by the model"),
        (("doc_to_target", "colour: red\ndoc_to_target"), "colours.yaml: cannot be loaded: .*colour"),
    ],
)
def test_a_task_that_cannot_run_is_refused_before_a_model_is_loaded(files, change, message):
    file = files / "colours.yaml"
    file.write_text(CHOICES.replace(*change))
    with pytest.raises(InputError, match=message):
        load_tasks(read_tasks([str(file)]), None)


def test_broken_data_is_refused(files):
    (files / "colours.jsonl").write_text('{"question": "a"\n')
    with pytest.raises(InputError, match=r"colours.yaml: cannot be loaded: "):
        load_tasks(read_tasks([str(files / "colours.yaml")]), None)


@pytest.mark.slow
def test_unknown_tasks_and_tasks_without_a_network(monkeypatch):
    import lm_eval.tasks

    manager = lm_eval.tasks.TaskManager()  # once: it reads the index of all of lm-eval's tasks
    monkeypatch.setattr("lm_eval.tasks.TaskManager", lambda include_defaults: manager)
    with pytest.raises(InputError, match=r"eval.tasks: nonsense is neither a task of lm-eval nor a file"):
        load_tasks(read_tasks(["nonsense"]), None)
    with pytest.raises(InputError, match=r"sciq: cannot be loaded: HF_HUB_OFFLINE is set, and its data is on the Hub"):
        load_tasks(read_tasks(["sciq"]), None)


def test_two_tasks_of_one_name_and_a_missing_file(files):
    file = str(files / "echo.yaml")
    with pytest.raises(InputError, match="are both called echo"):
        read_tasks([file, file])
    with pytest.raises(InputError, match=r"nowhere.yaml: no such file"):
        read_tasks(["nowhere.yaml"])


def test_without_the_extra(monkeypatch):
    monkeypatch.setattr("importlib.util.find_spec", lambda name: None)
    with pytest.raises(InputError, match=r"eval\.tasks needs lm-eval, which is not installed: pip install 'llmdistill\[tasks\]'"):
        read_tasks(["configs/tasks/facts.yaml"])
    assert read_tasks([]) == []
