"""The exported forms: the same weights, or those that rounding by hand gives, and what that costs."""

import json
import re
import shutil
from pathlib import Path
from typing import get_args

import numpy as np
import pytest
import torch
from transformers import AutoModelForCausalLM, AutoTokenizer

from llmdistill.config import keys, load_experiment
from llmdistill.config.export import Form
from llmdistill.data.dataset import load_dataset
from llmdistill.errors import InputError
from llmdistill.models.loading import load_model, load_tokenizer
from llmdistill.stages.curate import curate
from llmdistill.stages.export import export
from llmdistill.stages.generate import generate
from llmdistill.stages.train import _settings, train
from llmdistill.students.formats import FORMATS
from llmdistill.students.quantization import fake_quantise, unfake
from tests.conftest import ROOT, run_cli
from tests.factories import write_experiment

pytestmark = pytest.mark.slow

QUANTISED = ("q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj")


@pytest.fixture(scope="module")
def tiny(whole_tiny):
    """With the whole vocabulary, by which the sizes and costs here are told."""
    return whole_tiny


@pytest.fixture(scope="module")
def trained(tiny, tmp_path_factory):
    """The small experiment up to a student trained by LoRA."""
    file = write_experiment(tiny, tmp_path_factory.mktemp("export"))
    experiment = load_experiment(file, [("student.lora", "{r: 4}")])
    for step in (generate, curate, train):
        step(experiment)
    return file


@pytest.fixture
def run(trained, tmp_path, capsys):
    """Export with some settings into a copy of that run: the experiment's directory, what `export.json` says, and the screen."""
    shutil.copytree(trained.parent / "run", tmp_path / "run")

    def exported(**settings):
        overrides = [(f"export.{key}", json.dumps(value)) for key, value in {"rounding": "nearest", **settings}.items()]
        export(load_experiment(trained, [("output", str(tmp_path / "run")), *overrides]))
        made = json.loads((tmp_path / "run/export/export.json").read_text())
        return tmp_path / "run", {form["name"]: form for form in made["formats"]}, "".join(capsys.readouterr())

    return exported


def weights(directory: Path) -> dict[str, torch.Tensor]:
    return load_model(str(directory), device="cpu").state_dict()


@pytest.mark.parametrize("source", ["student", "student/adapter"])
def test_the_whole_student_is_the_trained_one_bit_for_bit(run, tmp_path, source):
    """Also where the adapters are merged by `export`: into the base that they were trained on."""
    output, made, screen = run(formats=["safetensors"], model=str(tmp_path / "run" / source))
    student, exported = weights(output / "student"), weights(output / "export/safetensors")
    assert student.keys() == exported.keys()
    assert all(torch.equal(student[name], exported[name]) for name in student)
    assert any(not torch.equal(student[name], start) for name, start in weights(output / "student-before").items())
    assert made["safetensors"]["kl"] == {"mean": 0, "low": 0, "high": 0}
    assert made["safetensors"]["top1"]["mean"] == 1
    against = "the student" if source == "student" else output / source
    assert f"0.000 nats from {against}" in screen
    assert f"nats per token from {against} before export" in (output / "export/safetensors/README.md").read_text()
    tokenizers = [load_tokenizer(str(output / name), None) for name in ("student", "export/safetensors")]
    assert tokenizers[0].get_vocab() == tokenizers[1].get_vocab()
    assert tokenizers[0].chat_template == tokenizers[1].chat_template
    ends = [
        json.loads((output / name / "generation_config.json").read_text())["eos_token_id"]
        for name in ("student", "export/safetensors")
    ]
    assert ends[0] == ends[1]
    assert not list((output / "export").glob(".*"))


def rounded(weight, bits, group):
    """To the nearest multiple of a group's scale, its largest magnitude over half the range."""
    groups = weight.double().numpy().reshape(weight.shape[0], -1, group or weight.shape[1])
    scale = np.float64(np.float32(np.abs(groups).max(-1, keepdims=True) / ((2**bits - 1) / 2)))
    steps = np.clip(np.round(groups / scale), -(2 ** (bits - 1)), 2 ** (bits - 1) - 1)
    return (steps * scale).reshape(weight.shape), scale.repeat(groups.shape[-1], -1).reshape(weight.shape)


@pytest.mark.parametrize(("form", "bits", "group"), [("w4a16", 4, 32), ("w4a16", 4, 16), ("w8a8", 8, None)])
def test_quantised_weights_are_those_rounded_by_hand(run, form, bits, group):
    output, made, _ = run(formats=[form], **({"group_size": group} if group == 16 else {}))
    student, model = weights(output / "student"), FORMATS[form].load(str(output / "export" / form), "auto")
    found = model.state_dict()
    for name, weight in student.items():
        if not name.removesuffix(".weight").endswith(QUANTISED):
            assert torch.equal(found[name], weight)
            continue
        by_hand, scale = rounded(weight, bits, group)
        off = np.abs(found[name].double().numpy() - by_hand)
        tie = np.abs(weight.double().numpy() / scale % 1 - 0.5) < 1e-4  # half a step, which precision may decide either way
        assert (off[~tie] < 1e-6).all()
        assert (off <= scale * (1 + 1e-6)).all()
        assert tie.mean() < 1 / (group or 32) + 0.01  # a group's largest is at half a step: 7.5
    config = json.loads((output / "export" / form / "config.json").read_text())["quantization_config"]
    assert config["format"] == {"w4a16": "pack-quantized", "w8a8": "int-quantized"}[form]
    assert config["ignore"] == ["lm_head"]
    linear = sum(weight.numel() for name, weight in student.items() if name.removesuffix(".weight").endswith(QUANTISED))
    others = sum(
        weight.numel() for name, weight in student.items() if name.removesuffix(".weight").endswith(("norm", "embed_tokens"))
    )
    least = linear * bits / 8 + others * 4
    assert least < made[form]["bytes"] < 1.1 * least + 8192


def test_what_it_costs_is_the_divergence_from_the_student(run):
    output, made, screen = run(formats=["w4a16"])
    models = [load_model(str(output / name), device="cpu").double() for name in ("student", "export/w4a16")]
    kl, same = [], []
    for row in load_dataset(output / "curated", "test"):
        ids, start = torch.tensor(row["input_ids"], dtype=torch.long)[None], int(row["completion_start"])
        p, q = (model(ids).logits[0, start - 1 : -1].log_softmax(-1) for model in models)
        kl.append(torch.nn.functional.kl_div(q, p, reduction="none", log_target=True).sum(-1))
        same.append((p.argmax(-1) == q.argmax(-1)).double())
    cost = made["w4a16"]
    assert cost["kl"]["mean"] == pytest.approx(torch.cat(kl).mean().item(), rel=2e-3)
    assert cost["top1"]["mean"] == pytest.approx(torch.cat(same).mean().item(), abs=0.01)
    assert 0 < cost["kl"]["low"] < cost["kl"]["mean"] < cost["kl"]["high"]
    assert cost["held_out"]["tokens"] == sum(map(len, kl))
    assert f"{cost['kl']['mean']:.3f} nats from the student" in screen
    assert "Compressing" not in screen


def test_eight_bit_weights_by_torchao(run):
    pytest.importorskip("torchao")
    output, made, _ = run(formats=["int8"])
    files = {file.suffix for file in (output / "export/int8").iterdir()}
    assert not files & {".bin", ".pt", ".pth", ".pkl"}
    student, model = weights(output / "student"), load_model(str(output / "export/int8"), device="cpu")
    for name, weight in model.state_dict().items():
        if name.removesuffix(".weight").endswith(QUANTISED):
            _, scale = rounded(student[name], 8, None)
            assert (np.abs((weight.dequantize() - student[name]).double().numpy()) <= scale * 0.5001).all()
        else:
            assert torch.equal(weight, student[name])
    assert 0 < made["int8"]["kl"]["mean"] < 0.1


def test_gguf_is_a_file_in_each_of_three_types(run):
    """With rows of 32 and 64 weights there are no blocks of 256."""
    pytest.importorskip("libgguf", reason="the extra `gguf` is not installed")
    output, made, screen = run(formats=["gguf"])
    assert list(made) == ["gguf-f16", "gguf-q8_0", "gguf-q4_k_m"]
    costs = [made[name]["kl"]["mean"] for name in made]
    assert costs[0] < 1e-4 < costs[1] < costs[2] / 10
    linear, others = 0, 0
    for weight in weights(output / "student").values():
        linear, others = linear + (weight.ndim > 1) * weight.numel(), others + (weight.ndim == 1) * weight.numel()
    linear -= 49152 * 32  # the output layer is the embeddings
    header = made["gguf-f16"]["bytes"] - 2 * linear - 4 * others  # the tokenizer, above all
    assert 1e6 < header < 2e6
    assert abs(made["gguf-q8_0"]["bytes"] - linear * 34 / 32 - 4 * others - header) < 2000
    assert made["gguf-f16"]["how"] == "weights by type: 15 in F16, 5 in F32"
    odd = "15 of them in a wider type, as their rows are not whole blocks"
    assert made["gguf-q4_k_m"]["how"] == f"weights by type: 5 in F32, 12 in Q5_0, 3 in Q8_0; {odd}"
    assert "Q4_K_M: 15 weights in a wider type, as rows are not whole blocks" in screen
    assert "Converting" not in screen
    directory = output / "export/gguf-q8_0"
    assert (directory / "Modelfile").read_text().startswith('FROM ./model-Q8_0.gguf\nTEMPLATE """{{ range .Messages }}')
    assert "Exported by llmdistill as gguf-q8_0: weights by type: 5 in F32, 15 in Q8_0" in (directory / "README.md").read_text()
    assert not list((output / "export").glob(".*"))


def test_what_a_gguf_file_costs_is_the_divergence_of_what_transformers_reads_from_it(run, tmp_path):
    pytest.importorskip("gguf", reason="the extra `gguf` is not installed")
    output, made, _ = run(formats=["gguf-q8_0"])
    directory = output / "export/gguf-q8_0"
    read = AutoModelForCausalLM.from_pretrained(directory, gguf_file="model-Q8_0.gguf", dtype=torch.float32).double()
    student, kl = load_model(str(output / "student"), device="cpu").double(), []
    for row in load_dataset(output / "curated", "test"):
        ids, start = torch.tensor(row["input_ids"], dtype=torch.long)[None], int(row["completion_start"])
        p, q = (model(ids).logits[0, start - 1 : -1].log_softmax(-1) for model in (student, read))
        kl.append(torch.nn.functional.kl_div(q, p, reduction="none", log_target=True).sum(-1))
    assert made["gguf-q8_0"]["kl"]["mean"] == pytest.approx(torch.cat(kl).mean().item(), rel=0.02)
    (tmp_path / "alone").mkdir()  # beside the tokenizer's own files transformers does not read the template in this one
    (tmp_path / "alone/model.gguf").symlink_to(directory / "model-Q8_0.gguf")
    tokenizers = [
        AutoTokenizer.from_pretrained(output / "student"),
        AutoTokenizer.from_pretrained(tmp_path / "alone", gguf_file="model.gguf"),
    ]
    assert tokenizers[0].chat_template == tokenizers[1].chat_template
    texts = [row["prompt"][0]["content"] for row in load_dataset(output / "curated", "test")]
    assert tokenizers[0](texts)["input_ids"] == tokenizers[1](texts)["input_ids"]


def test_a_stopped_export_leaves_no_half_of_a_file(run, tmp_path, monkeypatch):
    gguf = pytest.importorskip("gguf", reason="the extra `gguf` is not installed")
    write, weights_written = gguf.GGUFWriter.write_tensor_data, []

    def stop(writer, *arguments, **options):
        weights_written.append(write(writer, *arguments, **options))
        if len(weights_written) == 5:
            raise KeyboardInterrupt

    monkeypatch.setattr(gguf.GGUFWriter, "write_tensor_data", stop)
    with pytest.raises(KeyboardInterrupt):
        run(formats=["gguf-f16"])
    assert not list((tmp_path / "run/export").rglob("*.gguf"))
    monkeypatch.undo()
    _, made, _ = run(formats=["gguf-f16"])
    assert made["gguf-f16"]["kl"]["mean"] < 1e-4


def test_a_student_that_gguf_cannot_hold_is_refused_before_anything_is_written(run, tmp_path):
    pytest.importorskip("gguf", reason="the extra `gguf` is not installed")
    file = tmp_path / "run/student/config.json"
    file.write_text(file.read_text().replace('"hidden_act": "silu"', '"hidden_act": "gelu"'))
    with pytest.raises(
        InputError, match=r"export\.formats has gguf, which is not written for a student whose hidden_act is gelu"
    ):
        run(formats=["safetensors", "gguf-f16"])
    assert not (tmp_path / "run/export").exists()


def test_finished_forms_are_kept_and_more_can_be_asked_for(run):
    output, first, _ = run(formats=["safetensors"])
    written = (output / "export/safetensors/model.safetensors").stat().st_mtime_ns
    _, both, screen = run(formats=["safetensors", "w8a8"])
    assert list(both) == ["safetensors", "w8a8"]
    assert both["safetensors"] == first["safetensors"]
    assert (output / "export/safetensors/model.safetensors").stat().st_mtime_ns == written
    assert "safetensors" not in screen
    _, again, screen = run(formats=["safetensors", "w8a8"])
    assert again == both
    assert "is finished" in screen
    (output / "export/export.json").unlink()  # as if it had been stopped while the first was measured
    _, again, _ = run(formats=["w8a8"])
    assert again["w8a8"] == both["w8a8"]


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        (
            {"formats": ["w4a16"], "group_size": 24},
            "export.group_size 24 does not divide the 32 inputs of model.layers.0.self_attn",
        ),
        ({"model": "nowhere/at/all"}, "export.model: nowhere/at/all is neither a model directory"),
        ({"formats": ["int8", "int8"]}, "export: formats lists int8 twice"),
        ({"formats": ["gguf", "gguf-f16"]}, "export: formats lists gguf-f16 twice"),
        ({"formats": ["awq"]}, "export.formats"),
        ({"formats": []}, "export.formats"),
    ],
)
def test_wrong_input_is_refused_before_anything_is_written(run, tmp_path, settings, message):
    with pytest.raises(InputError, match=message):
        run(**settings)
    assert not (tmp_path / "run/export").exists()


def test_other_settings_and_missing_libraries_are_refused(run, tmp_path, monkeypatch):
    monkeypatch.setattr("importlib.util.find_spec", lambda name: None)
    with pytest.raises(InputError, match=r"pip install 'llmdistill\[gptq\]', or set export.rounding to nearest"):
        run(formats=["w8a8"], rounding="gptq")
    with pytest.raises(InputError, match="int8 needs torchao"):
        run(formats=["int8"])
    with pytest.raises(InputError, match=r"gguf-f16 needs gguf, which is not installed: pip install 'llmdistill\[gguf\]'"):
        run(formats=["gguf"])
    monkeypatch.undo()
    assert not (tmp_path / "run/export").exists()
    run(formats=["safetensors"])
    with pytest.raises(InputError, match=r"export\.dtype was \"auto\", is \"float16\""):
        run(formats=["safetensors"], dtype="float16")


def test_a_student_with_other_tokens_is_refused(run, tmp_path):
    tokenizer = load_tokenizer(str(tmp_path / "run/student"), None)
    tokenizer.add_tokens(["antidisestablishmentarianism"])
    tokenizer.save_pretrained(tmp_path / "run/student")
    with pytest.raises(InputError, match="student and the dataset have different vocabularies"):
        run(formats=["safetensors"])
    assert not (tmp_path / "run/export").exists()


def test_a_students_output_layer_may_be_padded_further_than_the_teachers(run, tmp_path):
    """As those of Qwen2.5 are, by size."""
    model = load_model(str(tmp_path / "run/student"), device="cpu")
    model.resize_token_embeddings(49_280)
    model.save_pretrained(tmp_path / "run/student")
    output, made, _ = run(formats=["safetensors"])
    assert made["safetensors"]["top1"]["mean"] == 1
    assert weights(output / "export/safetensors")["model.embed_tokens.weight"].shape[0] == 49_280


def test_a_dry_run_says_what_would_be_written(trained, tmp_path):
    result = run_cli("export", trained, "--export.formats", "[safetensors, w8a8]", "--output", tmp_path / "out", "--dry-run")
    assert result.returncode == 0, result.stderr
    assert f"would write {tmp_path}/out/export/safetensors, {tmp_path}/out/export/w8a8" in result.stdout
    assert not (tmp_path / "out").exists()


def test_formats_are_those_of_the_configuration_and_documented():
    assert tuple(FORMATS) == get_args(Form)
    page, (help_text,) = (ROOT / "docs/export.md").read_text(), [text for name, _, text in keys() if name == "export.formats"]
    for name, entry in FORMATS.items():
        assert re.search(rf"^\| `{name}` \|.*\| {re.escape(entry.loaded_by)} \|$", page, re.MULTILINE)
        assert f"`{name}`" in help_text


def test_the_card_of_a_copy_says_what_it_is_and_who_loads_it(run):
    output, made, _ = run(formats=["w8a8"])
    card = (output / "export/w8a8/README.md").read_text()
    assert card.startswith((output / "student/README.md").read_text().rstrip())
    how = "8-bit weights with a scale per row, and 8-bit activations, rounded to nearest"
    assert made["w8a8"]["how"] == how
    assert f"## This copy\n\nExported by llmdistill as w8a8: {how}. Loaded by vLLM and transformers.\n" in card
    assert "nats per token from the student before export" in card
    assert "## Results" not in card, "those are of the student before it was exported"


def test_training_sees_the_weights_that_export_writes(tiny):
    """A layer works with its weights rounded by hand; the gradient is that of the weights themselves."""
    pytest.importorskip("torchao")
    model = load_model(str(tiny), device="cpu")
    fake_quantise(model, 16)
    layers = [(name, module) for name, module in model.named_modules() if name.endswith(QUANTISED)]
    assert len(layers) == 4 * 7
    assert type(model.lm_head) is torch.nn.Linear
    for _, module in layers:
        seen = module(torch.eye(module.in_features)).T  # of unit vectors a layer makes its weights
        by_hand, scale = rounded(module.weight.detach(), 4, 16)
        steps = module.weight.detach().double().numpy() / scale
        clear = torch.from_numpy((np.abs(steps % 1 - 0.5) > 1e-4) & (np.abs(steps) < 7.4))  # neither a tie nor cut off
        torch.testing.assert_close(seen[clear], torch.from_numpy(by_hand).float()[clear])
        assert clear.double().mean() > 0.85
        given = torch.randn(module.out_features, module.in_features, generator=torch.Generator().manual_seed(0))
        seen.backward(given)
        torch.testing.assert_close(module.weight.grad[clear], given[clear])
    unfake(model)
    assert all(type(model.get_submodule(name)) is torch.nn.Linear for name, _ in layers)
    assert all(
        torch.equal(found, weight) for found, weight in zip(model.state_dict().values(), weights(tiny).values(), strict=True)
    )


def test_the_groups_that_training_rounds_in_are_a_setting_of_it(tiny, tmp_path):
    rounded = [("train.fake_quantize", "w4a16"), ("export", "{formats: [w4a16], rounding: nearest, group_size: 16}")]
    file = write_experiment(tiny, tmp_path)
    assert _settings(load_experiment(file, rounded))["export"] == {"group_size": 16}
    assert "export" not in _settings(load_experiment(file, rounded[1:]))


def test_a_student_trained_with_rounded_weights(tiny, tmp_path):
    pytest.importorskip("torchao")
    file = write_experiment(tiny, tmp_path)
    experiment = load_experiment(file, [("train.fake_quantize", "w4a16"), ("export", "{formats: [w4a16], rounding: nearest}")])
    for step in (generate, curate, train, export):
        step(experiment)
    assert "weight_fake_quantizer" not in " ".join(weights(tmp_path / "run/student"))
    with pytest.raises(InputError, match=r"train\.fake_quantize trains all weights, so it does not work with student\.lora"):
        load_experiment(file, [("train.fake_quantize", "w4a16"), ("student.lora", "{}")])
