"""The command line as a subprocess, on a tiny real model with the exact engine: the whole way, wrong input, kills."""

import json
import os
import re
import shutil
import time
from pathlib import Path

import pyarrow.parquet as pq
import pytest
import yaml

from llmdistill import cli, load_dataset
from llmdistill.data.manifest import read_manifest
from tests.conftest import ROOT, run_cli
from tests.factories import write_foreign
from tests.forked import start_forked


@pytest.fixture(scope="module")
def finished_run(tiny, tmp_path_factory):
    """One complete `llmdistill run`."""
    directory = tmp_path_factory.mktemp("experiment")
    (directory / "prompts.jsonl").write_text("".join(f'{{"prompt": "Say {n} in words."}}\n' for n in range(24)))
    file = directory / "experiment.yaml"
    file.write_text(
        f"""
output: {directory}/run
teacher: {{model: {tiny}, engine: transformers, dtype: float32, batch_size: 4}}
prompts: {{source: {directory}/prompts.jsonl}}
generate: {{max_tokens: 8, rows_per_shard: 6, samples: 2}}
targets: {{kind: sampled, n: 8}}
curate: [{{duplicates: }}]
student: {{prune: {{layers: 2}}}}
train:
  compare_text_only: true
  args: {{max_steps: 4, save_steps: 2, per_device_train_batch_size: 4, learning_rate: 1.0e-3, gradient_checkpointing: false}}
eval:
  {{held_out: 0.25, resamples: 200, samples: 1, sample_tokens: 4,
    tasks: [configs/tasks/facts.yaml, configs/tasks/copying.yaml], task_limit: 4,
    win_rate: {{judge: {{model: {tiny}, engine: transformers}}, prompts: 3, max_tokens: 2}}}}
"""
    )
    result = run_cli("run", file)
    assert result.returncode == 0, result.stderr
    return file, result.stdout


def output(file: Path) -> Path:
    return Path(yaml.safe_load(file.read_text())["output"])


def test_run_does_it_all(finished_run):
    file, stdout = finished_run
    run = output(file)
    metrics = json.loads((run / "eval/metrics.json").read_text())
    assert [model["name"] for model in metrics["models"]] == ["teacher", "student before", "student", "student, text only"]
    teacher, before, student, _ = metrics["models"]
    assert teacher["kl"]["mean"] == 0
    assert teacher["top1"]["mean"] == 1
    assert before["kl"]["low"] <= before["kl"]["mean"] <= before["kl"]["high"]
    assert student["parameters"] < teacher["parameters"]
    assert metrics["headline"] in stdout
    report = (run / "report.html").read_text()
    assert metrics["headline"].split(" · ")[0] in report
    card = (run / "student/README.md").read_text()
    assert "forward_kl" in card
    for stage in ("data", "curated", "student", "student-text-only", "eval"):
        record = json.loads((run / stage / "run.json").read_text())
        assert record["status"] == "done"
        assert record["inputs"]
        assert record["versions"]["llmdistill"]


def test_tasks_are_measured(finished_run):
    run = output(finished_run[0])
    measured = json.loads((run / "eval/metrics.json").read_text())["tasks"]
    assert [(task["name"], task["items"], task["chance"]) for task in measured["tasks"]] == [
        ("facts", 4, 0.25),
        ("copying", 4, None),
    ]
    assert measured["chat_template"]
    rows = pq.read_table(run / "eval/tasks.parquet").to_pylist()
    assert len(rows) == 2 * 4 * 4
    names = {row["model"] for row in rows}
    assert names == {"teacher", "student before", "student", "student, text only"}
    for task in measured["tasks"]:
        for name in names:
            scores = [row["score"] for row in rows if (row["task"], row["model"]) == (task["name"], name)]
            assert task["models"][name]["mean"] == sum(scores) / 4
    inputs = json.loads((run / "eval/run.json").read_text())["inputs"]
    assert {"configs/tasks/facts.yaml", "configs/tasks/facts.jsonl"} <= set(inputs)


def test_a_judge_that_is_no_judge_is_told(finished_run):
    run = output(finished_run[0])
    measured = json.loads((run / "eval/metrics.json").read_text())["win_rate"]
    assert measured["prompts"] + measured["without_verdict"] == 3
    assert measured["warnings"][0].startswith("the judge is the teacher itself")
    assert len(pq.read_table(run / "eval/verdicts.parquet")) == 3


def test_rows_in_are_rows_out(finished_run):
    run = output(finished_run[0])
    curated = json.loads((run / "curated/dataset.json").read_text())
    assert curated["rows_in"] == 48 == curated["rows"] + sum(step["rejected"] + step["failed"] for step in curated["steps"])
    train, test = load_dataset(run / "curated", "train"), load_dataset(run / "curated", "test")
    assert len(train) + len(test) == curated["rows"]


def test_a_second_run_does_nothing_twice(finished_run):
    file, _ = finished_run
    before = {path: path.stat().st_mtime_ns for path in output(file).rglob("*") if path.is_file() and "report" not in path.name}
    result = run_cli("run", file)
    assert result.returncode == 0, result.stderr
    assert result.stdout.count("is finished") == 6
    assert {path: path.stat().st_mtime_ns for path in before} == before


def test_the_student_loads_anywhere(finished_run):
    from transformers import AutoModelForCausalLM, AutoTokenizer

    directory = output(finished_run[0]) / "student"
    model = AutoModelForCausalLM.from_pretrained(directory)
    assert model.config.num_hidden_layers == 2
    assert AutoTokenizer.from_pretrained(directory).chat_template


def test_inspect(finished_run):
    result = run_cli("inspect", output(finished_run[0]) / "curated")
    assert result.returncode == 0, result.stderr
    for fact in ("sampled, n = 8", "bytes per position", "kept exactly", "train", "test", "Say"):
        assert fact in result.stdout


def test_inspect_top_k(experiment_file):
    assert run_cli("generate", experiment_file).returncode == 0
    result = run_cli("inspect", experiment_file.parent / "run/data")
    for fact in ("topk, k = 8", "bytes per position", "kept mass"):
        assert fact in result.stdout


def test_lora_by_two_lines_of_yaml(finished_run, tmp_path):
    """Adapters train, the saved student is whole: merged weights that differ from where they started."""
    import torch
    from transformers import AutoModelForCausalLM

    file, _ = finished_run
    overrides = ["--output", tmp_path, "--train.dataset", output(file) / "curated", "--train.compare_text_only", "false"]
    result = run_cli("train", file, *overrides, "--student.lora.r", 4, "--train.args.learning_rate", "1e-2")
    assert result.returncode == 0, result.stderr
    assert (tmp_path / "student/adapter/adapter_config.json").exists()
    trained = AutoModelForCausalLM.from_pretrained(tmp_path / "student").state_dict()
    before = AutoModelForCausalLM.from_pretrained(tmp_path / "student-before").state_dict()
    assert trained.keys() == before.keys()
    changed = {name for name in trained if not torch.equal(trained[name], before[name])}
    assert changed
    assert all("_proj" in name for name in changed)


def test_a_narrower_student(finished_run, tmp_path):
    """Cut by width on its own, said part by part, and trained from there without being cut again."""
    import torch
    from transformers import AutoModelForCausalLM

    file, _ = finished_run
    width = "{layers: 3, intermediate_size: 40, key_value_heads: 1, hidden_size: 24}"
    overrides = ["--output", tmp_path, "--train.dataset", output(file) / "curated", "--train.compare_text_only", "false"]
    overrides += ["--student.prune", width]
    pruned = run_cli("prune", file, *overrides)
    assert pruned.returncode == 0, pruned.stderr
    for part in (
        " of 4, by block influence: up to ",
        "keeps 40 of 64 feed-forward neurons",
        "1 of 2 key-value heads",
        "24 of 32 channels",
        "nats per token, ",
    ):
        assert part in pruned.stdout
    assert "is finished" in run_cli("prune", file, *overrides).stdout
    written = (tmp_path / "student-before/model.safetensors").stat().st_mtime_ns
    trained = run_cli("train", file, *overrides)
    assert trained.returncode == 0, trained.stderr
    assert (tmp_path / "student-before/model.safetensors").stat().st_mtime_ns == written
    student = AutoModelForCausalLM.from_pretrained(tmp_path / "student")
    assert student.get_input_embeddings().weight.shape[1] == 24
    assert torch.isfinite(student(torch.arange(9)[None]).logits).all()
    other = run_cli("prune", file, *overrides, "--student.prune.layers", 2)
    assert other.returncode == 2
    assert "student.prune.layers was 3, is 2" in other.stderr


STUDENTS = {
    "DoRA": "prune: {layers: [0, 2]}\n  lora: {r: 4, args: {use_dora: true}}",
    "QLoRA": "prune: {layers: 2, by: even}\n  lora: {}\n  quantize: nf4",
}


@pytest.mark.parametrize("student", STUDENTS)
def test_adapters_on_a_pruned_student_from_yaml_alone(finished_run, student, tmp_path):
    """No override and no learning rate: adapters get ten times that of training all weights, with warm-up, to zero."""
    import torch
    from peft import PeftModel
    from transformers import AutoModelForCausalLM

    if student == "QLoRA":
        pytest.importorskip("bitsandbytes")
    tree = yaml.safe_load(finished_run[0].read_text())
    tree |= {"output": f"{tmp_path}/run", "student": yaml.safe_load(f"  {STUDENTS[student]}")}
    args = {"max_steps": 4, "per_device_train_batch_size": 4, "logging_steps": 1}
    tree["train"] = {"dataset": f"{output(finished_run[0])}/curated", "args": args}
    file = tmp_path / "experiment.yaml"
    file.write_text(yaml.safe_dump(tree))
    result = run_cli("train", file)
    assert result.returncode == 0, result.stderr
    assert "warning   100% of the rows are cut off before they end" in result.stdout
    assert "raise generate.max_tokens" in result.stdout
    run = tmp_path / "run"
    history = json.loads((run / "student/trainer_state.json").read_text())["log_history"]
    rates = [entry["learning_rate"] for entry in history if "ce" in entry]
    assert rates == pytest.approx([0, 1e-3, 0.75e-3, 0.25e-3])
    trained = AutoModelForCausalLM.from_pretrained(run / "student")
    before = AutoModelForCausalLM.from_pretrained(run / "student-before")
    assert not torch.equal(trained.model.layers[0].mlp.up_proj.weight, before.model.layers[0].mlp.up_proj.weight)
    ids = torch.arange(9)[None]
    beside = PeftModel.from_pretrained(before, run / "student/adapter")
    torch.testing.assert_close(beside(ids).logits, trained(ids).logits, rtol=0, atol=1e-3)


def test_a_fresh_student(finished_run, tmp_path):
    """The teacher's architecture in other sizes, from random weights: made once, trained, evaluated, said on the card."""
    from transformers import AutoModelForCausalLM

    config = "{num_hidden_layers: 1, hidden_size: 16, num_attention_heads: 2, num_key_value_heads: 1}"
    file, _ = finished_run
    student = ["--student.config", config, "--train.dataset", output(file) / "curated", "--output", tmp_path]
    student += ["--train.compare_text_only", "false", "--train.args.max_steps", 2]
    for stage in ("train", "eval"):
        result = run_cli(stage, file, *student)
        assert result.returncode == 0, result.stderr
    models = json.loads((tmp_path / "eval/metrics.json").read_text())["models"]
    assert [model["name"] for model in models] == ["teacher", "student before", "student"]
    assert models[1]["path"] == f"{tmp_path}/student-before"
    before, after = (AutoModelForCausalLM.from_pretrained(tmp_path / name) for name in ("student-before", "student"))
    assert before.config.hidden_size == after.config.hidden_size == 16
    assert len(after.model.layers) == 1
    card = (tmp_path / "student/README.md").read_text()
    assert "random weights in the architecture of" in card
    assert "with num_hidden_layers 1, hidden_size 16" in card
    assert "base_model" not in card
    assert "is finished" in run_cli("train", file, *student).stdout
    other = run_cli("train", file, *student, "--student.config.hidden_size", 8)
    assert other.returncode == 2
    assert "student.config.hidden_size was 16, is 8" in other.stderr


def test_hidden_states_and_attention_maps_of_an_online_teacher(finished_run, tmp_path):
    """A narrower student, so with a projector; what it learned from is logged, said, and not in what is saved."""
    from safetensors import safe_open

    file, _ = finished_run
    overrides = ["--output", tmp_path, "--train.dataset", output(file) / "curated", "--targets.kind", "online"]
    overrides += ["--student.prune", "{layers: [0, 1, 3], hidden_size: 24}", "--train.args.gradient_checkpointing", "true"]
    overrides += ["--train.hidden", "{loss: mse, weight: 0.5}", "--train.attention.weight", "2"]
    result = run_cli("train", file, *overrides, "--train.compare_text_only", "false")
    assert result.returncode == 0, result.stderr
    history = json.loads((tmp_path / "student/trainer_state.json").read_text())["log_history"]
    for entry in history[:4]:
        want = 0.1 * entry["ce"] + 0.9 * entry["kl"] + 0.5 * entry["hidden"] + 2 * entry["attention"]
        assert entry["loss"] == pytest.approx(want, rel=1e-3)
    assert (tmp_path / "student/checkpoints/checkpoint-4/hidden_projector.safetensors").exists()
    with safe_open(tmp_path / "student/model.safetensors", "pt") as weights:
        assert not any("projector" in name for name in weights.keys())  # noqa: SIM118
    assert "0.5 × hidden states (mse) + 2 × attention maps" in (tmp_path / "student/README.md").read_text()


def test_an_existing_model_as_student(finished_run, tiny, tmp_path):
    """The teacher's twin: nothing to prune, and at distance zero before it trains."""
    file, _ = finished_run
    student = ["--student", f"{{model: {tiny}}}", "--train.dataset", output(file) / "curated", "--output", tmp_path]
    for stage in ("train", "eval", "report"):
        result = run_cli(stage, file, *student, "--train.compare_text_only", "false", "--train.args.max_steps", 1)
        assert result.returncode == 0, result.stderr
    models = json.loads((tmp_path / "eval/metrics.json").read_text())["models"]
    assert [model["name"] for model in models] == ["teacher", "student before", "student"]
    assert models[1]["kl"]["mean"] == pytest.approx(0, abs=1e-6)
    assert not (tmp_path / "student-before").exists()


def test_text_only_targets(experiment_file):
    assert run_cli("generate", experiment_file, "--targets.kind", "none").returncode == 0
    assert run_cli("curate", experiment_file, "--targets.kind", "none").returncode == 0
    refused = run_cli("train", experiment_file, "--targets.kind", "none")
    assert refused.returncode == 2
    assert "has no soft targets" in refused.stderr
    assert run_cli("train", experiment_file, "--train.alpha", 0, "--train.args.max_steps", 1).returncode == 0


# Wrong input: what is typed, and what the message says. {d} is the directory of the experiment.
WRONG = [
    (["generate", "{d}/nowhere.yaml"], "nowhere.yaml: no such file"),
    (["generate", "FILE", "--prompts.source", "{d}/nowhere.jsonl"], "nowhere.jsonl: no such file"),
    (["generate", "FILE", "--prompts.source", "{d}/empty.jsonl"], "empty.jsonl: contains no prompts"),
    (["generate", "FILE", "--prompts.source", "{d}/broken.jsonl"], "broken.jsonl line 2: not valid JSON"),
    (["generate", "FILE", "--generate.sampels", "2"], "no such key generate.sampels; did you mean generate.samples?"),
    (["generate", "FILE", "--generate.samples", "two"], "generate.samples should be a valid integer"),
    (["generate", "FILE", "--generate.samples"], "--generate.samples needs a value"),
    (["generate", "FILE", "--teacher.model", "./nowhere"], "teacher.model: ./nowhere is neither a model directory"),
    (["generate", "FILE", "--teacher.model", "some/where"], "teacher.model: cannot load some/where"),
    (["generate", "FILE", "--targets.k", "50000"], "targets.k is 50,000, but the vocabulary"),
    (["generate", "FILE", "--generate.max_tokens", "300"], "exceed the context of 256 tokens"),
    (["generate", "FILE", "--teacher.max_model_len", "500"], "teacher.max_model_len is 500, but"),
    (["generate", "FILE", "--output", "{d}/occupied"], "occupied/data contains files not written by `generate`"),
    (["curate", "FILE"], "run/data: no such dataset"),
    (["train", "FILE"], "run/curated: no such dataset"),
    (["eval", "FILE"], "run/curated: no such dataset"),
    (["eval", "FILE", "--eval.tasks", "[nowhere.yaml]"], "nowhere.yaml: no such file"),
    (["report", "FILE"], "metrics.json"),
    (["inspect", "{d}"], "it has no dataset.json"),
    (["generate", "FILE", "extra"], "unexpected argument extra"),
]


@pytest.mark.parametrize(("arguments", "message"), WRONG, ids=[" ".join(arguments) for arguments, _ in WRONG])
def test_wrong_input_is_one_message_and_status_2(experiment_file, arguments, message):
    directory = experiment_file.parent
    (directory / "empty.jsonl").write_text("\n")
    (directory / "broken.jsonl").write_text('{"prompt": "a"}\n{"prompt": \n')
    (directory / "occupied/data").mkdir(parents=True)
    (directory / "occupied/data/thesis.tex").write_text("five years of work")
    before = sorted(directory.rglob("*"))
    result = run_cli(*[argument.replace("FILE", str(experiment_file)).format(d=directory) for argument in arguments])
    assert result.returncode == 2, result.stderr
    assert message in result.stderr
    assert "Traceback" not in result.stderr
    assert sorted(directory.rglob("*")) == before, "something was written"


def test_wrong_training_input(finished_run, tmp_path, tiny, sigterm, capsys):
    """In one process, which imports the libraries once."""
    file, _ = finished_run
    base = ["train", file, "--output", tmp_path / "new", "--train.dataset", output(file) / "curated"]
    student, twin = ["--student", "{model: MODEL}"], ["--student", f"{{model: {tiny}}}"]
    for overrides, message in [
        (["--train.args.learning_rte", "1"], "did you mean train.args.learning_rate?"),
        (["--train.temperature", "2"], "sampled targets are unbiased only at temperature 1"),
        (["--train.loss", "jsd"], "train.loss is jsd, but sampled targets give an unbiased estimate of forward_kl only"),
        (["--train.args.alpha", "1"], "train.args.alpha is set by the key train.alpha"),
        (["--train.args.push_to_hub", "true"], "upload the trained student with `llmdistill push`"),
        (["--student.prune.layers", "9"], "student.prune.layers is 9, but the teacher has 4 layers"),
        ([student[0], student[1].replace("MODEL", "./nowhere")], "student.model: ./nowhere is neither a model directory"),
        (["--student.config", "{hidden_size: 30}"], "student.config: LlamaConfig cannot have hidden_size 30"),
        (["--student.lora.args", "{use_dorra: true}"], "did you mean student.lora.args.use_dora?"),
        ([*twin[:1], twin[1].replace("}", ", lora: {target_modules: [query]}}")], "student.lora: Target modules {'query'} not"),
        (["--train.hidden", "{}"], "train.hidden needs an online teacher; set targets.kind to online"),
        (
            [*twin, "--targets.kind", "online", "--train.hidden.layers", "[[0, 4]]"],
            "train.hidden.layers: there is no pair [0, 4]",
        ),
        (["--student", "{}"], "student needs one of the keys student.model, student.prune and student.config"),
    ]:
        with pytest.raises(SystemExit) as ended:
            cli.main([*map(str, base), *overrides])
        said = capsys.readouterr().err
        assert ended.value.code == 2, said
        assert message in said
        assert "Traceback" not in said
        assert not (tmp_path / "new").exists()


def test_teacher_and_student_of_different_vocabularies(finished_run, tiny, tmp_path):
    from tokenizers import Tokenizer, models
    from transformers import LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerFast

    other = tmp_path / "other"
    LlamaForCausalLM(
        LlamaConfig(
            vocab_size=7, hidden_size=8, intermediate_size=8, num_hidden_layers=1, num_attention_heads=2, num_key_value_heads=2
        )
    ).save_pretrained(other)
    tokenizer = Tokenizer(models.WordLevel({f"w{n}": n for n in range(7)}, unk_token="w0"))
    PreTrainedTokenizerFast(tokenizer_object=tokenizer, unk_token="w0", eos_token="w1").save_pretrained(other)
    file, _ = finished_run
    result = run_cli(
        "train",
        file,
        "--output",
        tmp_path / "new",
        "--train.dataset",
        output(file) / "curated",
        "--student.model",
        other,
    )
    assert result.returncode == 2
    assert "have different vocabularies, of" in result.stderr
    assert "run `retokenize` first" in result.stderr
    assert not (tmp_path / "new").exists()
    result = run_cli(
        "retokenize", file, "--output", tmp_path / "new", "--train.dataset", output(file) / "curated", "--student.model", other
    )
    assert result.returncode == 2
    assert "student.model: cannot determine the bytes of" in result.stderr
    assert not (tmp_path / "new").exists()


def test_another_configuration_in_the_same_directory_is_refused_with_the_difference(finished_run):
    file, _ = finished_run
    result = run_cli("generate", file, "--generate.temperature", "0.5", "--targets.n", "4")
    assert result.returncode == 2
    assert "generate.temperature was 1.0, is 0.5; targets.n was 8, is 4" in result.stderr


def test_a_damaged_shard_is_named(finished_run, tmp_path):
    file, _ = finished_run
    copy = tmp_path / "run"
    shutil.copytree(output(file), copy, ignore=shutil.ignore_patterns("checkpoints", "student*", "eval"))
    shard = sorted((copy / "curated").glob("train-*.parquet"))[0]
    content = bytearray(shard.read_bytes())
    content[100] ^= 1
    shard.write_bytes(content)
    for command in (["inspect", copy / "curated", "--verify"], ["train", file, "--output", copy]):
        result = run_cli(*command)
        assert result.returncode == 2, result.stderr
        assert f"{shard.name}: the checksum does not match" in result.stderr


def test_dry_run_writes_nothing_and_needs_no_torch(experiment_file, tmp_path):
    (tmp_path / "sitecustomize.py").write_text(
        "import sys\nclass Refuse:\n    def find_spec(self, name, *_):\n"
        "        if name in ('torch', 'transformers', 'vllm', 'trl'): raise ImportError(name)\n"
        "sys.meta_path.insert(0, Refuse())\n"
    )
    result = run_cli("run", experiment_file, "--generate.samples", 3, "--dry-run", PYTHONPATH=str(tmp_path))
    assert result.returncode == 0, result.stderr
    assert "24 prompts × 3 samples = 72 rows" in result.stdout
    assert "in 12 shards" in result.stdout
    assert not (tmp_path / "run").exists()


def test_train_that_is_ended_goes_on_with_the_same_losses(experiment_file):
    """SIGTERM: the step is finished, and kept whatever its number."""
    longer = ["--train.args.max_steps", "40", "--train.args.save_steps", "5"]
    for stage in ("generate", "curate"):
        assert run_cli(stage, experiment_file).returncode == 0
    undisturbed, err = experiment_file.parent / "undisturbed", experiment_file.parent / "err"
    dataset = ["--train.dataset", experiment_file.parent / "run/curated"]
    assert run_cli("train", experiment_file, *longer, *dataset, "--output", undisturbed).returncode == 0
    student = experiment_file.parent / "run/student"
    words = ["llmdistill", *map(str, ["train", experiment_file, *longer, *dataset])]
    process = start_forked(words, ROOT, os.environ, experiment_file.parent / "out", err)
    deadline = time.monotonic() + 120
    while not (student / "checkpoints/checkpoint-10/trainer_state.json").exists():
        assert process.is_alive(), "it ended before it was told to"
        assert time.monotonic() < deadline
        time.sleep(0.01)
    process.terminate()
    process.join(60)
    assert process.exitcode == 143
    step = int(re.search(r"run the same command to continue from step (\d+)", err.read_text())[1])
    assert (student / f"checkpoints/checkpoint-{step}/trainer_state.json").exists()
    assert json.loads((student / "run.json").read_text())["status"] == "unfinished"
    assert run_cli("train", experiment_file, *longer, *dataset).returncode == 0
    curves = []
    for directory in (undisturbed / "student", student):
        history = json.loads((directory / "trainer_state.json").read_text())["log_history"]
        names = ("kl", "ce", "num_completion_tokens")
        curves.append({entry["step"]: [entry[name] for name in names] for entry in history if "kl" in entry})
    assert curves[0].keys() == curves[1].keys() == set(range(1, 41))
    for step, values in curves[0].items():
        assert curves[1][step] == pytest.approx(values, rel=1e-5)


def test_the_shipped_configuration_of_two_tokenizers_runs_to_its_report(tiny, tmp_path):
    """`configs/other-tokenizer.yaml`, with the exact engine and small models, few prompts and few steps."""
    student, run = write_foreign(tmp_path / "student"), tmp_path / "run"
    train = "{max_steps: 3, save_steps: 3, per_device_train_batch_size: 4, learning_rate: 1.0e-3, gradient_checkpointing: false}"
    done = run_cli(
        "run", "configs/other-tokenizer.yaml", "--output", run, "--teacher.model", tiny, "--teacher.engine", "transformers",
        "--teacher.tensor_parallel_size", 1, "--prompts.limit", 8, "--generate.samples", 1, "--generate.max_tokens", 16,
        "--student.model", student, "--train.args", train,
        "--curate.0.finish_reason.keep", "[stop, length]",  # a model with random weights hardly ends an answer
        "--eval", "{held_out: 0.25, resamples: 200, own_prompts: 0, samples: 1, sample_tokens: 4}",
    )  # fmt: skip
    assert done.returncode == 0, done.stderr
    alignment = read_manifest(run / "retokenized")["alignment"]
    rows = [row for split in ("train", "test") for row in load_dataset(run / "retokenized", split)]
    assert alignment["positions"] == sum(len(row["input_ids"]) - int(row["completion_start"]) for row in rows)
    assert alignment["soft"] == sum(int((row["target_places"] >= 0).sum()) for row in rows) > 0
    share = f"{100 * alignment['soft'] / alignment['positions']:.1f}% with a soft target"
    assert share in done.stdout
    metrics = json.loads((run / "eval/metrics.json").read_text())
    (found,) = [model for model in metrics["models"] if model["name"] == "student"]
    for figure in ("kl", "bits_per_byte"):
        assert 0 <= found[figure]["low"] <= found[figure]["mean"] <= found[figure]["high"] > 0  # two prompts: it may begin at 0
    page = (run / "report.html").read_text()
    assert share in page
    assert f"{metrics['held_out']['classes']['count']:,} root classes" in page
