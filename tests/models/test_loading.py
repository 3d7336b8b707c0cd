"""Loading models of Hugging Face: what published checkpoints have and what must be writable again."""

import json
import shutil

import pytest
import torch

from llmdistill.errors import InputError
from llmdistill.models import loading
from llmdistill.models.loading import continue_prompts, generation_config, load_model, model_bytes


@pytest.mark.parametrize(
    ("published", "kept"),
    [
        ({"temperature": 0.9, "top_p": 0.6}, {"do_sample": True, "temperature": 0.9, "top_p": 0.6}),
        ({"top_k": 20}, {"do_sample": True, "top_k": 20}),
        ({"do_sample": False, "temperature": 0.7}, {"do_sample": False, "temperature": None}),
        ({"num_beams": 1, "early_stopping": True}, {"num_beams": 1}),
        ({"temperature": 0.9, "num_beams": 1, "early_stopping": True}, {"do_sample": True, "temperature": 0.9}),
        ({"do_sample": True, "temperature": 0.6, "eos_token_id": [2, 3]}, {"temperature": 0.6, "eos_token_id": [2, 3]}),
    ],
    ids=str,
)
def test_a_generation_config_that_transformers_reads_but_does_not_write(published, kept, tiny, tmp_path):
    """Several published models have one: training would end at its first checkpoint."""
    shutil.copytree(tiny, tmp_path / "model")
    (tmp_path / "model/generation_config.json").write_text(json.dumps(published))
    model = load_model(str(tmp_path / "model"))
    model.save_pretrained(tmp_path / "saved")
    generation_config(str(tmp_path / "model"), None).save_pretrained(tmp_path / "alone")
    for name in ("saved", "alone"):
        saved = json.loads((tmp_path / name / "generation_config.json").read_text())
        assert {name: saved.get(name) for name in kept} == kept


def test_weights_are_counted_in_whatever_files_they_are(tmp_path, monkeypatch):
    """Of several kinds those that are loaded; of none nothing is known."""
    assert model_bytes("name/on-the-hub") is None
    assert model_bytes(str(tmp_path)) is None
    for name, size in {"training_args.bin": 5, "model-q.gguf": 70}.items():
        (tmp_path / name).write_bytes(b"x" * size)
    assert model_bytes(str(tmp_path)) == 70
    for name, size in {"pytorch_model-00001-of-00002.bin": 300, "pytorch_model-00002-of-00002.bin": 200}.items():
        (tmp_path / name).write_bytes(b"x" * size)
    assert model_bytes(str(tmp_path)) == 500
    (tmp_path / "model.safetensors").write_bytes(b"x" * 100)
    assert model_bytes(str(tmp_path)) == 100
    (tmp_path / "model.safetensors.index.json").write_text(json.dumps({"weight_map": {"a": "pytorch_model-00001-of-00002.bin"}}))
    assert model_bytes(str(tmp_path)) == 300


@pytest.mark.parametrize("dtype", ["float32", "bfloat16", "auto"])
def test_weights_are_counted_in_the_precision_that_they_are_loaded_in(tiny, dtype):
    """A tied matrix once, as it is stored; the file has a header, too."""
    model = load_model(str(tiny), dtype="checkpoint" if dtype == "auto" else dtype, device="cpu")
    want = sum(parameter.numel() * parameter.element_size() for parameter in model.parameters())
    assert loading._weight_bytes(str(tiny), None, dtype, False, "k") == pytest.approx(want, rel=0.02 if dtype == "auto" else 0)


@pytest.mark.parametrize(("devices", "spread"), [(1, True), (2, False)])
def test_a_model_that_is_too_large_for_an_accelerator_is_refused(tiny, monkeypatch, devices, spread):
    pretend_accelerators(monkeypatch, devices)
    with pytest.raises(InputError, match=r"teacher\.model: the weights of .* GB in float32, but only 0\.0 GB are free on cuda"):
        load_model(str(tiny), dtype="float32", spread=spread)


def test_a_model_that_is_too_large_for_one_accelerator_is_laid_over_all(tiny, monkeypatch):
    """By transformers, which finds nothing here but a CPU; the outputs are the same."""
    ids = torch.arange(5, 20)[None]
    with torch.inference_mode():
        want = load_model(str(tiny), dtype="float32", device="cpu")(ids).logits
        pretend_accelerators(monkeypatch, 2)
        model = load_model(str(tiny), dtype="float32", spread=True)
        torch.testing.assert_close(model(ids).logits, want)
    assert model._hf_hook.io_same_device


def pretend_accelerators(monkeypatch, count):
    """As on a machine with so many of them, which hold less than the model."""
    monkeypatch.setattr(torch.accelerator, "is_available", lambda: True)
    monkeypatch.setattr(torch.accelerator, "current_accelerator", lambda: torch.device("cuda"))
    monkeypatch.setattr(torch.accelerator, "device_count", lambda: count)
    monkeypatch.setattr(loading, "free_memory", lambda device: 500_000)


def test_a_model_ends_by_its_own_tokens_where_none_are_named(tiny):
    """The model is forced to write its end token, as `generate` would without any argument."""
    model = load_model(str(tiny), device="cpu")
    end = int(model.generation_config.eos_token_id)

    def force(ids, scores):
        scores[:] = -float("inf")
        scores[:, end] = 0
        return scores

    for ends, written in ((), [end]), ([end], [end]), ([end + 1], [end] * 4):
        answer_BT = continue_prompts(model, [[5, 6]], 4, ends, do_sample=False, logits_processor=[force])
        assert answer_BT.tolist() == [written]


def test_of_a_quantised_checkpoint_the_files_count_whatever_precision_is_asked_for(tiny, tmp_path):
    """Its weights are not what its configuration would make."""
    shutil.copytree(tiny, tmp_path / "quantised")
    config = json.loads((tmp_path / "quantised/config.json").read_text())
    config["quantization_config"] = {"quant_method": "awq", "bits": 4}
    (tmp_path / "quantised/config.json").write_text(json.dumps(config))
    stored = model_bytes(str(tiny))
    for dtype in ("float32", "bfloat16", "auto"):
        assert loading._weight_bytes(str(tmp_path / "quantised"), None, dtype, False, "k") == stored
