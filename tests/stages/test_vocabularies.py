"""Teachers of several vocabularies in one run: from their own tokens to the student's, its loss and its figures."""

import json
import shutil

import numpy as np
import pyarrow.parquet as pq
import pytest
import torch
from transformers import AutoTokenizer

from llmdistill.config import load_experiment
from llmdistill.data import batches
from llmdistill.data.collator import DistillCollator, completion_labels
from llmdistill.data.convert.exports import export_dataset
from llmdistill.data.dataset import load_dataset
from llmdistill.data.inspect import inspect
from llmdistill.data.manifest import read_manifest
from llmdistill.data.rows import metadata_and_provenance
from llmdistill.errors import InputError, UnusableError
from llmdistill.losses import Objective, distillation_loss
from llmdistill.losses.classes import ClassTable, class_logits
from llmdistill.models.forward import completion_logits
from llmdistill.models.loading import load_model
from llmdistill.models.root_classes import load_classes
from llmdistill.stages import retokenize as module
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
from tests.factories import VOCAB, write_foreign, write_noisy

pytestmark = [pytest.mark.filterwarnings("ignore::UserWarning"), pytest.mark.slow]

TEXT = "The cat number 7 sat on the mat, and said that it is so; the other did not. Say it in words."
NAMES = ("near", "far")


@pytest.fixture(scope="module")
def models(tiny, tmp_path_factory):
    """One with the demo teacher's vocabulary, and two with small ones of their own."""
    directory = tmp_path_factory.mktemp("models")
    return {
        "near": tiny,
        "far": write_foreign(directory / "far", TEXT, 400),
        "third": write_foreign(directory / "third", "words and cats, in a text of its own: " + TEXT[::-1], 330),
        "sibling": write_noisy(tiny, directory / "sibling", 3, padding=64),
    }


@pytest.fixture
def experiment(models, tmp_path):
    """An experiment with teachers of two vocabularies, by the field `domain` of 24 prompts."""
    lines = [{"prompt": f"Say {n} in words.", "domain": NAMES[n % 2]} for n in range(24)]
    (tmp_path / "prompts.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))

    def make(student, *changes, kind="topk"):
        common = "engine: transformers, dtype: float32, batch_size: 4"
        teachers = [f"  {name}: {{model: {models[name]}, {common}}}" for name in NAMES]
        file = tmp_path / "experiment.yaml"
        file.write_text(
            "\n".join([
                f"output: {tmp_path}/run",
                "teachers:", *teachers,
                "route: {column: domain}",
                f"prompts: {{source: {tmp_path}/prompts.jsonl}}",
                "generate: {max_tokens: 10, rows_per_shard: 5}",
                f"targets: {{kind: {kind}}}",
                f"student: {student if student.startswith('{') else '{model: ' + student + '}'}",
                "train:",
                "  compare_text_only: false",
                "  args: {max_steps: 2, per_device_train_batch_size: 4, learning_rate: 0, bf16: false}",
                "eval: {held_out: 0.4, own_prompts: 6, own_tokens: 6, samples: 2, sample_tokens: 4, resamples: 200}",
            ])
        )  # fmt: skip
        return load_experiment(file, list(changes))

    return make


def made(experiment):
    for stage in (generate, curate, retokenize):
        stage(experiment)
    return experiment


def readable(text):
    """Without control characters, of which the demo teacher's vocabulary does not have all, and without half characters."""
    return "".join(character for character in text if character.isprintable() and character not in " \ufffd")


def name_of(row):
    return metadata_and_provenance(str(row["metadata"]))[1]["teacher"]


def soft_logits(models, row):
    """A row's teacher's logits at the positions of its completion in its own tokens, and its classes' numbers."""
    ids, start = torch.from_numpy(row["teacher_ids"]).long(), int(row["teacher_start"])
    with torch.no_grad():
        return load_model(str(models[name_of(row)]), dtype="float32")(ids[None]).logits[0, start - 1 : -1]


def test_the_raw_rows_are_each_in_their_own_teachers_tokens(models, experiment, tmp_path, capsys):
    run = experiment(str(models["near"]))
    generate(run)
    directory = run.directory("data")
    manifest = read_manifest(directory)
    tokenizers = {name: AutoTokenizer.from_pretrained(models[name]) for name in NAMES}
    sizes = {name: one["tokenizer"]["vocab_size"] for name, one in manifest["teachers"].items()}
    assert sizes == {"near": VOCAB, "far": len(tokenizers["far"])}
    for row in load_dataset(directory):
        tokenizer, start = tokenizers[name_of(row)], int(row["completion_start"])
        assert row["completion"][0]["content"] == tokenizer.decode(row["input_ids"][start:], skip_special_tokens=True)
        assert row["prompt"][0]["content"] in tokenizer.decode(row["input_ids"][:start])
    inspect(directory, verify=True)
    assert f"12 rows, vocabulary {sizes['far']}" in " ".join(capsys.readouterr().out.split()), "wherever a long path wraps it"
    for form in ("axolotl", "distillkit"):
        with pytest.raises(InputError, match=rf"in the tokens of their own teachers, near, far, which {form} does not support"):
            export_dataset(directory, tmp_path / form, form)
    export_dataset(directory, tmp_path / "text", "jsonl")
    (shard, *_) = [directory / entry["file"] for entry in manifest["shards"]]
    table = pq.read_table(shard)
    assert {field.type for field in [pq.read_schema(directory / e["file"]).field("target_ids") for e in manifest["shards"]]} == {
        table.schema.field("target_ids").type
    }


@pytest.mark.parametrize("third", [False, True], ids=["of one teacher", "of none"])
@pytest.mark.parametrize("kind", ["topk", "sampled", "multinomial", "none"])
def test_from_prompts_to_figures(models, experiment, kind, third):
    """A student of the vocabulary of one teacher, and one where all three differ."""
    student = models["third" if third else "near"]
    run = made(experiment(str(student), *([("train.alpha", "0.9")] if kind == "none" else []), kind=kind))
    assert is_needed(run)
    manifest = read_manifest(run.directory("retokenized"))
    counts = manifest["alignment"]["teachers"]
    assert sum(one["positions"] for one in counts.values()) == manifest["alignment"]["positions"]
    classes = load_classes(run.directory("retokenized"))
    own, stored = AutoTokenizer.from_pretrained(student), {}
    for split in ("train", "test"):
        before = {str(row["id"]): row for row in load_dataset(run.directory("curated"), split)}
        for row in load_dataset(run.directory("retokenized"), split):
            stored[str(row["id"])] = row
            source = before[str(row["id"])]
            assert row["teacher"] == name_of(source)
            np.testing.assert_array_equal(row["teacher_ids"], source["input_ids"])
            text = own.decode(row["input_ids"][int(row["completion_start"]) :], skip_special_tokens=True)
            assert readable(text) == readable(source["completion"][0]["content"])
            if row["teacher"] == "near" and not third:
                np.testing.assert_array_equal(row["input_ids"], source["input_ids"])
                assert row["target_places"].tolist() == list(range(len(row["target_places"])))
    assert len(stored) == 24
    if not third:
        assert classes["near"].are_tokens
        assert counts["near"]["soft"] == counts["near"]["positions"] > 0
    train(run)
    evaluate(run)
    metrics = json.loads((run.directory("eval") / "metrics.json").read_text())
    check_figures(run, models, metrics, classes)
    report(run)
    text = (run.directory("eval").parent / "report.md").read_text()
    assert f"far {classes['far'].count:,}" in text
    assert "2 teachers: every row was compared with its own teacher." in text
    shared = f"near: of {counts['near']['positions']:,} positions"
    assert shared in text
    assert shared in (run.directory("retokenized") / "README.md").read_text()


def check_figures(run, models, metrics, classes):
    """KL over each row's own classes, and bits per byte, by teacher: with plain torch in float64."""
    path = str(run.directory("student"))
    student, tokenizer = load_model(path, dtype="float32"), AutoTokenizer.from_pretrained(path)
    sums = {name: [0.0, 0, 0.0, 0] for name in NAMES}
    for row in load_dataset(run.directory("retokenized"), "test"):
        found, own = sums[str(row["teacher"])], classes[str(row["teacher"])]
        theirs = soft_logits(models, row).double()
        ids, start = torch.from_numpy(row["input_ids"]).long(), int(row["completion_start"])
        with torch.no_grad():
            ours = student(ids[None]).logits[0, start - 1 : -1].double()
        for position, place in enumerate(row["target_places"].tolist()):
            if place >= 0:
                p = np.bincount(own.teacher_V, theirs[place].softmax(-1).numpy(), own.count)
                q = np.bincount(own.student_V, ours[position].softmax(-1).numpy(), own.count)
                tiny = np.finfo(np.float32).tiny
                found[0] += (p * (np.log(np.maximum(p, tiny)) - np.log(np.maximum(q, tiny)))).sum()
                found[1] += 1
        found[2] -= ours.log_softmax(-1).gather(1, ids[start:, None]).sum().item() / np.log(2)
        # Its own tokens: they lack the half of a character that a cut answer may end in.
        found[3] += max(len(tokenizer.decode(ids[start:], skip_special_tokens=True).encode()), 1)
    entries = {entry["name"]: entry for entry in metrics["teachers"]}
    for name, (kl, tokens, bits, size) in sums.items():
        (measured,) = [model for model in entries[name]["models"] if model["name"] == "student"]
        assert measured["kl"]["mean"] == pytest.approx(kl / tokens, rel=1e-3)
        assert measured["bits_per_byte"]["mean"] == pytest.approx(bits / size, rel=1e-4)
        assert entries[name]["classes"]["count"] == classes[name].count
    (teacher,) = [model for model in metrics["models"] if model["name"] == "teacher"]
    assert teacher["kl"]["mean"] == pytest.approx(0, abs=1e-6)


def test_all_rows_of_a_batch_may_be_left_out(models, experiment, monkeypatch):
    monkeypatch.setattr(batches, "ROW_GROUP", 5)
    run, tried, retokenized = experiment(str(models["near"])), [], module._row
    for step in (generate, curate):
        step(run)

    def refused(*args):
        tried.append(args)
        if len(tried) <= 5:
            raise UnusableError("no")
        return retokenized(*args)

    monkeypatch.setattr(module, "_row", refused)
    retokenize(run)
    manifest = read_manifest(run.directory("retokenized"))
    assert manifest["left_out"] == {"no": 5}
    assert {str(row["teacher"]) for row in load_dataset(run.directory("retokenized"))} == set(NAMES)


@pytest.mark.parametrize("packing", [False, True])
@pytest.mark.parametrize("third", [False, True])
def test_the_logged_loss_is_that_of_each_teachers_rows(models, experiment, packing, third):
    """A step on all rows at once, against the plain loss on held logits of each teacher's rows by themselves."""
    args = {"per_device_train_batch_size": 24, "max_steps": 1, "packing": packing, "max_length": 512}
    changes = [(f"train.args.{key}", json.dumps(value)) for key, value in args.items()]
    student = models["third" if third else "near"]
    run = made(experiment(str(student), *changes))
    directory = run.directory("retokenized")
    classes, rows, total, tokens = load_classes(directory), list(load_dataset(directory)), 0.0, 0
    model = load_model(str(student), dtype="float32")
    for name in NAMES:
        own = [row for row in rows if row["teacher"] == name]
        if classes[name].are_tokens:
            bare = [{key: value for key, value in row.items() if key != "target_places"} for row in own]
            batch = DistillCollator(0)(bare)
        else:
            batch = DistillCollator(0, classes=classes[name])(own) | {"target_table": ClassTable.of(classes[name])}
        with torch.no_grad():
            _, sums = distillation_loss(completion_logits(model, batch), completion_labels(batch), batch, Objective())
        total, tokens = total + float(sums["kl"]), tokens + len(batch["positions"])
    train(run)
    history = json.loads((run.directory("student") / "trainer_state.json").read_text())["log_history"]
    assert history[0]["kl"] == pytest.approx(total / tokens, rel=1e-4)


@pytest.mark.parametrize("packing", [False, True])
def test_online_each_teacher_scores_its_own_rows(models, experiment, packing):
    args = {"per_device_train_batch_size": 24, "max_steps": 1, "packing": packing, "max_length": 512}
    changes = [(f"train.args.{key}", json.dumps(value)) for key, value in args.items()]
    run = made(experiment(str(models["near"]), *changes, kind="online"))
    rows, classes = load_dataset(run.directory("retokenized")), load_classes(run.directory("retokenized"))
    student = load_model(str(models["near"]), dtype="float32")
    total, tokens = 0.0, 0
    for row in rows:
        own = classes[str(row["teacher"])]
        ids, start = torch.from_numpy(row["input_ids"]).long(), int(row["completion_start"])
        with torch.no_grad():
            ours = student(ids[None]).logits[0, start - 1 : -1]
        theirs = soft_logits(models, row)
        log_p = class_logits(theirs, torch.from_numpy(own.teacher_V), own.count)
        log_q = class_logits(ours, torch.from_numpy(own.student_V), own.count)
        nll = -ours.log_softmax(-1).gather(1, ids[start:, None])[:, 0]
        for position, place in enumerate(row["target_places"].tolist()):
            label = int(own.student_V[ids[start + position]])
            kl = (log_p[place].exp() * (log_p[place] - log_q[position])).sum() + nll[position] + log_q[position, label]
            total += float(kl if place >= 0 else nll[position])
        tokens += len(row["target_places"])
    train(run)
    history = json.loads((run.directory("student") / "trainer_state.json").read_text())["log_history"]
    assert history[0]["kl"] == pytest.approx(total / tokens, rel=1e-3)


def test_online_teachers_of_one_vocabulary_score_their_own_rows(models, experiment, tmp_path):
    changes = [("teachers.far.model", str(models["sibling"])), ("train.args.per_device_train_batch_size", "24")]
    run = experiment(str(models["near"]), *changes, ("train.args.max_steps", "1"), kind="online")
    generate(run)
    curate(run)
    assert not is_needed(run)
    train(run)
    student, total, tokens = load_model(str(models["near"])), 0.0, 0
    for row in load_dataset(run.directory("curated")):
        theirs = load_model(str(models[{"near": "near", "far": "sibling"}[name_of(row)]]))
        ids, start = torch.from_numpy(row["input_ids"]).long(), int(row["completion_start"])
        with torch.no_grad():
            p, q = (model(ids[None]).logits[0, start - 1 : -1, :VOCAB].double().log_softmax(-1) for model in (theirs, student))
        total, tokens = total + float((p.exp() * (p - q)).sum()), tokens + len(p)
    history = json.loads((run.directory("student") / "trainer_state.json").read_text())["log_history"]
    assert history[0]["kl"] == pytest.approx(total / tokens, rel=1e-4)


def test_a_student_that_is_cut_from_one_teacher_learns_from_the_other_too(models, experiment):
    run = experiment("{prune: {layers: 2}}")
    for stage in stages(run):
        STAGES[stage.command].function(stage.experiment)
    manifest = read_manifest(run.directory("retokenized"))
    assert manifest["alignment"]["teachers"]["near"]["soft"] == manifest["alignment"]["teachers"]["near"]["positions"]
    assert (run.directory("eval") / "metrics.json").is_file()


def test_text_is_read_by_its_own_teacher(models, experiment, tmp_path):
    """`score` of a dataset in two vocabularies, each row by the teacher that did not write it."""
    run = experiment(str(models["near"]))
    generate(run)
    swapped = {"near": "far", "far": "near"}
    again = experiment(
        str(models["near"]),
        ("score.source", str(run.directory("data"))),
        ("output", str(tmp_path / "again")),
        ("route", "{column: domain, values: {near: far, far: near}}"),
    )
    score(again)
    tokenizers = {name: AutoTokenizer.from_pretrained(models[name]) for name in NAMES}
    for row in load_dataset(again.directory("data")):
        fields, ours = metadata_and_provenance(str(row["metadata"]))
        assert ours["teacher"] == swapped[fields["domain"]]
        tokenizer, start = tokenizers[ours["teacher"]], int(row["completion_start"])
        text = tokenizer.decode(row["input_ids"][start:], skip_special_tokens=True)
        assert readable(text) == readable(row["completion"][0]["content"])
        model = load_model(str(models[ours["teacher"]])).double()
        ids = torch.from_numpy(row["input_ids"]).long()
        with torch.no_grad():
            logprobs = model(ids[None]).logits[0, start - 1 : -1].log_softmax(-1).gather(1, ids[start:, None])[:, 0]
        np.testing.assert_allclose(row["token_logprobs"], logprobs, atol=5e-4)


def test_a_base_student_gets_the_template_of_its_own_family(models, experiment, tmp_path):
    base = tmp_path / "base"
    shutil.copytree(models["near"], base)
    (base / "chat_template.jinja").unlink()
    run = made(experiment(str(base)))
    manifest = read_manifest(run.directory("retokenized"))
    assert manifest["tokenizer"]["chat_template"] == AutoTokenizer.from_pretrained(models["near"]).chat_template
    assert manifest["alignment"]["teachers"]["near"]["soft"] == manifest["alignment"]["teachers"]["near"]["positions"]


def test_what_cannot_work_is_said_before_anything_is_written(models, experiment, tmp_path):
    base = tmp_path / "base"
    shutil.copytree(models["third"], base)
    (base / "chat_template.jinja").unlink()
    with pytest.raises(InputError, match=r"student\.model: .*base has no chat template, and no teacher has its vocabulary"):
        generate(experiment(str(base)))
    assert not (tmp_path / "run/data/dataset.json").exists()


def test_a_dataset_in_several_vocabularies_is_not_read_as_one(models, experiment, tmp_path):
    run = experiment(str(models["near"]))
    generate(run)
    curate(run)
    with pytest.raises(InputError, match=r"teachers: the rows of .*curated are in the tokens of each; run `retokenize` first"):
        train(run)
    single = tmp_path / "single.yaml"
    single.write_text(
        f"output: {tmp_path}/single\nteacher: {{model: {models['near']}, engine: transformers}}\n"
        f"student: {{model: {models['near']}}}\ntrain: {{dataset: {run.directory('curated')}, compare_text_only: false}}\n"
    )
    with pytest.raises(InputError, match=r"teachers: .*curated has rows of the teachers near, far, each in its own tokens"):
        retokenize(load_experiment(single))


def test_a_manifest_that_says_nothing_of_a_teachers_tokens_is_refused(models, experiment):
    run = experiment(str(models["near"]))
    generate(run)
    file = run.directory("data") / "dataset.json"
    manifest = json.loads(file.read_text())
    del manifest["teachers"]["far"]["tokenizer"]["vocab_size"]
    file.write_text(json.dumps(manifest))
    with pytest.raises(InputError, match=r"teachers\.far\.tokenizer\.vocab_size must be .*, got nothing"):
        load_dataset(run.directory("data"))
    del manifest["teachers"]["far"]["tokenizer"]
    file.write_text(json.dumps(manifest))
    with pytest.raises(InputError, match=r"teachers\.far\.tokenizer must be a mapping"):
        load_dataset(run.directory("data"))


def test_a_row_with_ids_of_another_vocabulary_is_refused(models, experiment):
    """An id that the other teacher has, and the row's own does not."""
    from llmdistill.data.row_checks import check_rows

    run = experiment(str(models["near"]))
    generate(run)
    manifest = read_manifest(run.directory("data"))
    sizes = {name: one["tokenizer"]["vocab_size"] for name, one in manifest["teachers"].items()}
    file = run.directory("data") / manifest["shards"][0]["file"]
    check_rows(file, sizes)
    with pytest.raises(InputError, match=r"row 0: the token id \d+ is outside the vocabulary"):
        check_rows(file, {"near": 2, "far": VOCAB})
    with pytest.raises(InputError, match=r"row 0: is of the teacher 'near', but the dataset has far"):
        check_rows(file, {"far": VOCAB})


def test_reasoning_traces_are_read_in_their_own_teachers_tokens(models, experiment):
    """A trace ends with a letter that both models write sooner or later; it stands in the prompt, and its text beside it."""
    changes = [("generate.thinking", "masked"), ("generate.thinking_end", "s"), ("generate.max_tokens", "40")]
    run = experiment(str(models["near"]), *changes, ("curate", "[{finish_reason: {keep: [stop, length]}}]"))
    generate(run)
    tokenizers, ended = {name: AutoTokenizer.from_pretrained(models[name]) for name in NAMES}, dict.fromkeys(NAMES, 0)
    for row in load_dataset(run.directory("data")):
        trace = metadata_and_provenance(str(row["metadata"]))[1]["thinking"]
        tokenizer, ids, start = tokenizers[name_of(row)], row["input_ids"], int(row["completion_start"])
        assert tokenizer.decode(ids[:start], skip_special_tokens=True).endswith(trace)
        if str(row["finish_reason"]) != "no_answer":
            assert "s" in trace
            assert tokenizer.decode(ids[start:], skip_special_tokens=True) == row["completion"][0]["content"]
            ended[name_of(row)] += 1
    assert min(ended.values()) > 0
