"""A dataset in the tokens of a student with another vocabulary, and what is learnt from it."""

import json
import shutil

import numpy as np
import pytest
import torch
from transformers import AutoModelForCausalLM, AutoTokenizer

from llmdistill.config import load_experiment
from llmdistill.data.collator import DistillCollator, completion_labels
from llmdistill.data.conversations import stored_ids
from llmdistill.data.dataset import load_dataset
from llmdistill.data.manifest import read_manifest
from llmdistill.data.rows import Row
from llmdistill.errors import InputError
from llmdistill.losses import Objective, distillation_loss
from llmdistill.losses.classes import ClassTable
from llmdistill.models.chat_template import ChatTemplate
from llmdistill.models.forward import completion_logits
from llmdistill.models.loading import vocabulary_hash
from llmdistill.models.root_classes import RootClasses
from llmdistill.stages.curate import curate
from llmdistill.stages.evaluate import evaluate
from llmdistill.stages.generate import generate
from llmdistill.stages.report import report
from llmdistill.stages.retokenize import retokenize
from llmdistill.stages.score import score
from llmdistill.stages.table import STAGES
from llmdistill.stages.train import train
from llmdistill.students.sides import is_needed
from llmdistill.workflow.plan import stages
from tests.factories import write_foreign, write_rows

pytestmark = [pytest.mark.filterwarnings("ignore::UserWarning"), pytest.mark.slow]

TEXTS = [f"The cat number {number} sat on the mat, and said that it is so; the other did not." for number in range(12)]


@pytest.fixture(scope="module")
def foreign(tmp_path_factory):
    """A small model with a tokenizer of its own."""
    return write_foreign(tmp_path_factory.mktemp("models") / "foreign", " ".join(TEXTS))


@pytest.fixture(scope="module")
def renumbered(foreign, tmp_path_factory):
    """The same model, whose tokens have other numbers: another vocabulary, and the same distribution."""
    directory = tmp_path_factory.mktemp("models") / "renumbered"
    shutil.copytree(foreign, directory)
    content = json.loads((directory / "tokenizer.json").read_text())
    size = len(content["model"]["vocab"])
    number = np.random.default_rng(0).permutation(size)
    content["model"]["vocab"] = {token: int(number[old]) for token, old in content["model"]["vocab"].items()}
    for token in content["added_tokens"]:
        token["id"] = int(number[token["id"]])
    (directory / "tokenizer.json").write_text(json.dumps(content))
    model = AutoModelForCausalLM.from_pretrained(directory)
    with torch.no_grad():
        rows = model.get_input_embeddings().weight
        rows.copy_(rows[torch.from_numpy(np.argsort(number))])
    end = int(number[model.config.eos_token_id])
    for config in (model.config, model.generation_config):
        config.eos_token_id, config.pad_token_id, config.bos_token_id = end, end, int(number[0])
    model.save_pretrained(directory)
    return directory


@pytest.fixture
def experiment(tmp_path):
    """An experiment of two models; its dataset is written or read by the first."""
    rows = [
        {"messages": [{"role": "user", "content": f"Say {n}."}, {"role": "assistant", "content": t}]} for n, t in enumerate(TEXTS)
    ]
    (tmp_path / "rows.jsonl").write_text("\n".join(map(json.dumps, rows)))
    (tmp_path / "prompts.jsonl").write_text("\n".join(json.dumps({"prompt": f"Say {n}."}) for n in range(12)))

    def make(teacher, student, kind, *changes, scored=True):
        source = f"score: {{source: {tmp_path}/rows.jsonl}}" if scored else f"prompts: {{source: {tmp_path}/prompts.jsonl}}"
        file = tmp_path / "experiment.yaml"
        file.write_text(f"""
output: {tmp_path}/run
teacher: {{model: {teacher}, engine: transformers, dtype: float32, batch_size: 4}}
{source}
generate: {{max_tokens: 12}}
targets: {{kind: {kind}}}
student: {{model: {student}}}
train:
  compare_text_only: false
  args: {{max_steps: 2, per_device_train_batch_size: 3, learning_rate: 0.0, gradient_checkpointing: false, bf16: false}}
eval: {{held_out: 0.25}}
""")
        made = load_experiment(file, list(changes))
        (score if scored else generate)(made)
        curate(made)
        retokenize(made)
        return made

    return make


def trained(experiment):
    train(experiment)
    directory = experiment.directory("student")
    return json.loads((directory / "trainer_state.json").read_text())["log_history"]


@pytest.mark.parametrize("kind", ["sampled", "multinomial", "topk", "online"])
def test_a_teacher_with_its_tokens_renumbered_is_no_way_from_itself(foreign, renumbered, experiment, kind):
    """From the engine to the logged loss: KL(teacher ‖ teacher) = 0, and every position has its soft target."""
    made = experiment(foreign, renumbered, kind)
    assert is_needed(made)
    alignment = read_manifest(made.directory("retokenized"))["alignment"]
    assert alignment["soft"] == alignment["positions"] > 0
    for entry in [entry for entry in trained(made) if "kl" in entry]:
        # Stored log-probabilities are float16. A sample cannot tell the entropy within the class of special tokens.
        assert entry["kl"] == pytest.approx(0, abs=1e-5 if kind == "online" else 2e-3 if kind == "topk" else 1e-2)
        assert entry["agreement"] > 0.99 or kind in ("sampled", "multinomial")  # what was drawn may not be the most likely


def test_text_alone_becomes_chunks(foreign, renumbered, experiment):
    made = experiment(foreign, renumbered, "none", ("train.alpha", "0.9"))
    manifest = read_manifest(made.directory("retokenized"))
    assert manifest["targets"]["kind"] == "chunks"
    for entry in [entry for entry in trained(made) if "kl" in entry]:
        assert entry["kl"] == pytest.approx(0, abs=1e-5)


@pytest.mark.parametrize("kind", ["sampled", "topk", "online"])
def test_a_student_of_another_family_learns(tiny, foreign, experiment, kind):
    changes = [("train.args.learning_rate", "1e-2"), ("train.args.max_steps", "12")]
    history = [entry["kl"] for entry in trained(experiment(tiny, foreign, kind, *changes)) if "kl" in entry]
    assert np.mean(history[-3:]) < np.mean(history[:3])


def test_no_id_of_the_teacher_goes_past_the_collator(tiny, foreign, experiment):
    """The teacher has 49,152 tokens, the student some hundred: classes are below their count, ids below the student's."""
    made = experiment(tiny, foreign, "sampled")
    directory = made.directory("retokenized")
    classes, rows = RootClasses.load(directory), load_dataset(directory)
    size = len(classes.student_V)
    for packed in (False, True):
        batch = DistillCollator(0, padding_free=packed, classes=classes)([rows[number] for number in range(4)])
        assert batch["input_ids"].max() < size
        assert batch["target_ids"].max() < classes.count < 49_152
        weights = batch["target_logweights"][batch["target_soft"]].exp().sum(-1)
        torch.testing.assert_close(weights, torch.ones_like(weights))
    with pytest.raises(ValueError, match="pass the classes"):
        DistillCollator(0)([rows[0]])


def test_the_text_is_the_same_in_both(tiny, foreign, experiment):
    made = experiment(tiny, foreign, "topk")
    rows = load_dataset(made.directory("retokenized"))
    theirs, own = AutoTokenizer.from_pretrained(tiny), AutoTokenizer.from_pretrained(foreign)
    for row in rows:
        told = theirs.decode(row["teacher_ids"][int(row["teacher_start"]) :], skip_special_tokens=True)
        assert own.decode(row["input_ids"][int(row["completion_start"]) :], skip_special_tokens=True) == told
        assert told in TEXTS
        places = row["target_places"]
        assert places[0] == 0
        assert places[-1] == len(row["teacher_ids"]) - int(row["teacher_start"]) - 1  # the end is an end


def test_a_teacher_that_reads_along_must_have_the_tokens_of_the_rows(tiny, foreign, experiment):
    """Else it would take the ids for those of its own vocabulary, and the student would learn what that makes of them."""
    made = experiment(tiny, foreign, "online")
    other = made.with_(teacher=made.teacher.with_(model=str(foreign)))
    message = rf"teacher\.model: the vocabulary of {foreign} differs from that of "
    for dry in (True, False):
        with pytest.raises(InputError, match=message):
            train(other, dry)
    assert not made.directory("student").exists()


def test_special_tokens_inside_can_be_left_out(tiny, foreign, experiment, tmp_path):
    made = experiment(
        tiny, foreign, "topk", ("retokenize.special_tokens", "leave_out"), ("generate.max_tokens", "4"), scored=False
    )
    manifest = read_manifest(made.directory("retokenized"))
    before = read_manifest(made.directory("curated"))
    left = manifest.get("left_out", {}).get("its completion contains special tokens", 0)
    assert manifest["rows"] + sum(manifest.get("left_out", {}).values()) == before["rows"]
    special = set(before["tokenizer"]["special_token_ids"]) - {2}
    inside = [
        row for split in ("train", "test") for row in load_dataset(made.directory("curated"), split)
        if special & set(row["input_ids"][int(row["completion_start"]) :].tolist())
    ]  # fmt: skip
    assert left == len(inside)


def test_a_student_of_the_same_vocabulary_needs_none(tiny, experiment):
    with pytest.raises(InputError, match=r"student\.model: .* has the vocabulary of .*; there is nothing to retokenize"):
        experiment(tiny, tiny, "topk")


def test_a_student_without_an_end_is_refused(tiny, foreign, experiment, tmp_path):
    directory = tmp_path / "endless"
    shutil.copytree(foreign, directory)
    for name in ("config.json", "generation_config.json", "tokenizer_config.json"):
        content = json.loads((directory / name).read_text())
        content.pop("eos_token_id", None), content.pop("eos_token", None), content.pop("chat_template", None)
        (directory / name).write_text(json.dumps(content))
    (directory / "chat_template.jinja").write_text("{% for message in messages %}{{ message['content'] }}\n{% endfor %}")
    with pytest.raises(
        InputError, match=r"student\.model: neither the configuration nor the tokenizer of .* names a token that ends"
    ):
        experiment(tiny, directory, "topk")


def test_train_says_to_retokenize_first(tiny, foreign, experiment, tmp_path):
    made = experiment(tiny, foreign, "topk")
    shutil.rmtree(made.directory("retokenized"))
    message = r"student\.model: .*curated have different vocabularies, of [\d,]+ and 4,096 tokens; run `retokenize` first"
    with pytest.raises(InputError, match=message):
        train(made)


@pytest.fixture
def other_tokenizer(smollm2):
    """The demo's with one more token: another vocabulary."""
    tokenizer = AutoTokenizer.from_pretrained(smollm2)
    tokenizer.add_tokens(["<new>"])
    assert vocabulary_hash(tokenizer)
    return tokenizer


def stored(directory, rows):
    made = []
    for number, (prompt, answer, reason) in enumerate(rows):
        messages = [{"role": role, "content": text} for role, text in prompt]
        completion = [{"role": "assistant", "content": answer}]
        made.append(Row(str(number), messages, completion, [3, 4], np.array([5, 6]), reason, np.full(2, np.nan), None))
    return load_dataset(write_rows(directory, made, kind="none")).with_format(None)


def test_only_whole_answers_end(other_tokenizer, tmp_path):
    """A cut answer has neither an end token nor half a character, and no answer goes on after its own end."""
    user = [("user", "q")]
    rows = stored(tmp_path / "rows", [(user, "It is so.", "stop"), (user, "It is", "length"), (user, "It\ufffd", "length")])
    chat = ChatTemplate(other_tokenizer, [2])
    assert [other_tokenizer.decode(stored_ids(row, chat)[1]) for row in rows] == ["It is so.<|im_end|>", "It is", "It"]


def evaluated(experiment):
    train(experiment)
    evaluate(experiment)
    return json.loads((experiment.directory("eval") / "metrics.json").read_text())


EVAL = [("eval.own_prompts", "4"), ("eval.own_tokens", "8"), ("eval.samples", "1"), ("eval.sample_tokens", "4")]


def test_a_model_with_its_tokens_renumbered_is_evaluated_as_itself(foreign, renumbered, experiment):
    """KL zero, the same choices, as many bits a byte, and its own text is the teacher's."""
    metrics = evaluated(experiment(foreign, renumbered, "topk", *EVAL))
    teacher, _, student = metrics["models"][:3]
    assert metrics["held_out"]["classes"]["positions"] == 1
    assert metrics["held_out"]["classes"]["entropy"] == pytest.approx(1, abs=0.02)
    assert student["kl"]["mean"] == pytest.approx(0, abs=1e-5)
    assert student["top1"]["mean"] == 1
    assert student["bits_per_byte"]["mean"] == pytest.approx(teacher["bits_per_byte"]["mean"], rel=1e-5)
    assert student["own_text"]["reverse_kl"]["mean"] == pytest.approx(0, abs=1e-5)


def test_evaluation_across_vocabularies_equals_its_definitions(tiny, foreign, experiment):
    """Bits a byte and the KL over classes, row by row with plain torch in float64."""
    made = experiment(tiny, foreign, "sampled", *EVAL, ("train.compare_text_only", "true"))
    metrics = evaluated(made)
    directory = made.directory("retokenized")
    rows, classes = load_dataset(directory, "test"), RootClasses.load(directory)
    bits, size, kl, soft = {"teacher": 0.0, "student": 0.0}, 0, 0.0, 0
    models = {"teacher": tiny, "student": made.directory("student")}
    models = {name: AutoModelForCausalLM.from_pretrained(path, dtype=torch.float32) for name, path in models.items()}
    for row in rows:
        log_p = {}
        for name, (ids, start) in {
            "teacher": ("teacher_ids", "teacher_start"),
            "student": ("input_ids", "completion_start"),
        }.items():
            tokens, begin = torch.from_numpy(row[ids]).long(), int(row[start])
            with torch.no_grad():
                log_p[name] = models[name](tokens[None]).logits[0, begin - 1 : -1].double().log_softmax(-1)
            bits[name] -= log_p[name].gather(1, tokens[begin:, None]).sum().item() / np.log(2)
        size += len(row["completion"][0]["content"].encode())
        for position, place in enumerate(row["target_places"].tolist()):
            if place < 0:
                continue
            p, q = np.zeros(classes.count), np.zeros(classes.count)
            np.add.at(p, classes.teacher_V, log_p["teacher"][place].exp().numpy())
            np.add.at(q, classes.student_V, log_p["student"][position].exp().numpy())
            kl += (p[p > 0] * np.log(p[p > 0] / np.maximum(q[p > 0], np.finfo(np.float32).tiny))).sum()
            soft += 1
    found = {model["name"]: model for model in metrics["models"]}
    for name, value in bits.items():
        assert found[name]["bits_per_byte"]["mean"] == pytest.approx(value / size, rel=1e-4)
    assert found["student"]["kl"]["mean"] == pytest.approx(kl / soft, rel=1e-3)
    assert {d["metric"] for d in metrics["differences"]} == {"kl", "top1", "bits_per_byte"}
    report(made)
    page = (made.directory("eval").parent / "report.html").read_text()
    assert "bits per byte" in page
    assert f"{classes.count:,} root classes" in page


@pytest.mark.parametrize("packing", [False, True])
def test_the_logged_loss_is_that_of_all_rows(tiny, foreign, experiment, packing):
    """A step on all rows at once, padded or packed, against the plain loss on held logits."""
    args = {"per_device_train_batch_size": 8, "max_steps": 1, "packing": packing, "max_length": 512}
    made = experiment(tiny, foreign, "topk", *((f"train.args.{key}", json.dumps(value)) for key, value in args.items()))
    directory = made.directory("retokenized")
    classes, rows = RootClasses.load(directory), list(load_dataset(directory))
    batch = DistillCollator(0, classes=classes)(rows) | {"target_table": ClassTable.of(classes)}
    with torch.no_grad():
        logits = completion_logits(AutoModelForCausalLM.from_pretrained(foreign), batch)
        _, sums = distillation_loss(logits, completion_labels(batch), batch, Objective())
    assert trained(made)[0]["kl"] == pytest.approx(float(sums["kl"]) / len(batch["positions"]), rel=1e-4)


def test_rounds_and_export_read_the_students_tokens(tiny, foreign, experiment, tmp_path):
    """Every stage of a run with a round: what the student writes is read by the teacher in its own tokens, and comes back."""
    changes = [("rounds", "1"), *EVAL, ("export", "{formats: [int8]}"), ("train.args.save_steps", "1")]
    made = experiment(tiny, foreign, "topk", *changes)
    done = []
    for stage in stages(made):
        STAGES[stage.command].function(stage.experiment)
        done.append(stage.name)
    assert done[1:4] == ["curate", "retokenize", "train"]
    assert "round-1-retokenize" in done
    round_one = read_manifest(tmp_path / "run/rounds/1/retokenized")
    assert round_one["alignment"]["positions"] > 0
    assert round_one["alignment"]["classes_hash"] == read_manifest(tmp_path / "run/retokenized")["alignment"]["classes_hash"]
    results = json.loads((tmp_path / "run/export/export.json").read_text())
    assert results["formats"][0]["name"] == "int8"


def test_a_template_that_refuses_every_row_leaves_nothing_behind(tiny, foreign, experiment, tmp_path):
    directory = tmp_path / "refusing"
    shutil.copytree(foreign, directory)
    (directory / "chat_template.jinja").write_text("{{ raise_exception('no') }}")
    with pytest.raises(InputError, match="the chat template refuses it: no; none of the 11 other rows is usable"):
        experiment(tiny, directory, "topk")
    assert not (tmp_path / "run/retokenized").exists()


def test_what_is_in_a_students_tokens_is_not_retokenized_again(tiny, foreign, experiment, tmp_path):
    made = experiment(tiny, foreign, "topk")
    again = made.with_(output=str(tmp_path / "again"), train=made.train.with_(dataset=str(made.directory("retokenized"))))
    with pytest.raises(InputError, match=r"is in the tokens of .*foreign; retokenize what it was made from"):
        retokenize(again)
