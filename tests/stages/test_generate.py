"""What the teacher is asked: tools, roles and the variables of its template; and which prompts it cannot be asked."""

import json
import shutil

import pyarrow.parquet as pq
import pytest
import torch

from llmdistill import load_dataset
from llmdistill.config import load_experiment
from llmdistill.data.manifest import read_manifest
from llmdistill.errors import InputError
from llmdistill.models.loading import load_model, load_tokenizer
from llmdistill.stages.curate import curate
from llmdistill.stages.evaluate import evaluate
from llmdistill.stages.generate import generate
from llmdistill.stages.train import train
from tests.factories import VOCAB

TEMPLATE = """{% if tools %}TOOLS {{ tools | tojson }}
{% endif %}{% for message in messages %}<|im_start|>{{ message.role }}
{{ message.content }}<|im_end|>
{% endfor %}{% if add_generation_prompt %}<|im_start|>assistant
{% if enable_thinking is defined and not enable_thinking %}<think></think>
{% endif %}{% endif %}"""


def written(file, rows, *overrides):
    source = file.parent / "asked.jsonl"
    source.write_text("".join(json.dumps(row) + "\n" for row in rows))
    experiment = load_experiment(file, [("prompts.source", str(source)), *overrides])
    generate(experiment)
    return load_dataset(experiment.directory("data")), read_manifest(experiment.directory("data"))


@pytest.fixture
def teacher(tiny, tmp_path):
    directory = tmp_path / "teacher"
    shutil.copytree(tiny, directory)
    (directory / "chat_template.jinja").write_text(TEMPLATE)
    return directory


def prompts_of(rows, model):
    tokenizer = load_tokenizer(str(model), None)
    return [tokenizer.decode(row["input_ids"][: int(row["completion_start"])]) for row in rows]


def test_tools_reach_the_teacher_and_stay_with_the_row(experiment_file, teacher):
    tools = [{"type": "function", "function": {"name": "area", "description": "of a square"}}]
    asked = [{"messages": [{"role": "user", "content": "area?"}], "tools": tools}, {"prompt": "plain"}]
    rows, _ = written(experiment_file, asked, ("teacher.model", str(teacher)))
    first, second = prompts_of(rows, teacher)
    assert first.startswith('TOOLS [{"type": "function"')
    assert not second.startswith("TOOLS")
    ours = json.loads(str(rows[0]["metadata"]))["llmdistill"]
    assert (ours["tools"], ours["messages"][0]) == (tools, asked[0]["messages"][0])


def test_variables_of_the_template_are_used_and_recorded(experiment_file, teacher):
    chosen = [("teacher.model", str(teacher)), ("teacher.template_args", "{enable_thinking: false}")]
    rows, manifest = written(experiment_file, [{"prompt": "q"}], *chosen)
    assert prompts_of(rows, teacher)[0].endswith("<|im_start|>assistant\n<think></think>\n")
    assert manifest["teacher"]["template_args"] == {"enable_thinking": False}
    other, _ = written(experiment_file, [{"prompt": "q"}], chosen[0], ("output", str(experiment_file.parent / "other")))
    assert other[0]["id"] != rows[0]["id"], "it is another prompt to the teacher"


def test_a_prompt_that_is_too_long_is_left_out_and_counted(experiment_file):
    rows, manifest = written(experiment_file, [{"prompt": "a"}, {"prompt": "x " * 400}, {"prompt": "b"}])
    assert [row["prompt"][0]["content"] for row in rows] == ["a", "b"]
    assert manifest["left_out"] == {"its prompt and generate.max_tokens 8 exceed the context of 256 tokens": 1}
    with pytest.raises(InputError, match="exceed the context of 256 tokens"):
        written(experiment_file, [{"prompt": "x " * 400}], ("output", str(experiment_file.parent / "other")))
    assert not (experiment_file.parent / "other").exists()


def test_a_line_that_cannot_be_read_is_left_out_counted_said_and_kept(experiment_file, capsys):
    source, directory = experiment_file.parent / "prompts.jsonl", experiment_file.parent / "run/data"
    source.write_text(source.read_text() + "no JSON\n")
    generate(load_experiment(experiment_file))
    assert "left out 1 of 25 rows: " in capsys.readouterr().out
    assert list(read_manifest(directory)["left_out"].values()) == [1]
    (row,) = pq.read_table(directory / "rejected.parquet").to_pylist()
    assert row["place"] == f"{source} line 25"


@pytest.mark.slow
@pytest.mark.parametrize("kind", ["{kind: topk, k: 40}", "{kind: sampled, n: 12}", "{kind: multinomial, n: 30}"])
def test_ids_that_pad_the_output_layer_are_never_written_kept_or_learned(experiment_file, tiny, tmp_path, kind):
    """A teacher padded further than its student; its padding is likelier than any token."""
    padded = tmp_path / "padded"
    model = load_model(str(tiny))
    model.resize_token_embeddings(VOCAB + 256, mean_resizing=False)
    with torch.no_grad():
        model.get_output_embeddings().weight[VOCAB:] = 4 * model.get_output_embeddings().weight[:256]
    model.save_pretrained(padded)
    load_tokenizer(str(tiny), None).save_pretrained(padded)
    chosen = [("teacher.model", str(padded)), ("targets", kind), ("student", f"{{model: {tiny}}}"), ("eval.own_prompts", "2")]
    experiment = load_experiment(experiment_file, chosen)
    for stage in (generate, curate, train, evaluate):
        stage(experiment)
    for row in load_dataset(experiment.directory("data")):
        assert row["input_ids"].max() < VOCAB
    metrics = json.loads((experiment.directory("eval") / "metrics.json").read_text())
    assert metrics["models"][0]["kl"]["mean"] == 0
