"""The figures that come out of rounds; the engine itself is under test in tests/integration/test_export.py."""

import json
import math

import pytest

from llmdistill.config.machine import Precision
from llmdistill.errors import InputError
from llmdistill.evaluation import serving
from llmdistill.models.loading import load_config

WRITES = {"teacher": [100, 50, 100, 100, 100], "student": [200, 150, 300, 200, 200], "broken": []}


class Worker:
    """In the place of a process with vLLM in it."""

    asked: list[str] = []

    def __init__(self, model, settings):
        self.name, self.rounds, self.running = model.name, iter(WRITES[model.name]), False
        assert settings["max_model_len"] == 128 + 32
        assert settings["kv_cache_bytes"] == 1 << 30

    def start(self):
        self.asked.append(f"start {self.name}")
        self.running = True
        return {"failed": "no such format"} if self.name == "broken" else {"version": "9.9"}

    def ask(self, line=""):
        assert self.running
        if line:
            assert json.loads(line) == {"prompts": [[3, 4]] * 4, "max_tokens": 9, "end_ids": [2]}
            self.asked.append(f"requests {self.name}")
            return {"latencies": [1.0, 2.0, 3.0, 4.0], "seconds": 5.0, "tokens": 40}
        self.asked.append(self.name)
        speed = next(self.rounds)
        return {"prefill_tokens_per_s": 10 * speed, "decode_tokens_per_s": speed, "peak_bytes": 1000 + speed}

    def stop(self):
        self.running = False
        self.asked.append(f"stop {self.name}")


@pytest.fixture
def measured(tiny, monkeypatch):
    def measure(together):
        monkeypatch.setattr(serving, "_Engine", Worker)
        monkeypatch.setattr(serving, "_fit_together", lambda models, caches: together)
        monkeypatch.setattr(Worker, "asked", [])
        requests = serving.Requests([[3, 4]] * 4, 9, [2])
        models = [serving.Served(name, str(tiny)) for name in WRITES]
        return serving.by_vllm(models, 8, 32, {"t": dict.fromkeys(WRITES, requests)})

    return measure


@pytest.mark.parametrize("together", [True, False])
def test_figures_of_rounds(measured, together):
    teacher, student, broken = (found := measured(together))["models"]
    assert student["decode"] == {"median": 200, "low": 150, "high": 300}
    assert student["prefill"] == {"median": 2000, "low": 1500, "high": 3000}
    assert student["decode_ratio"] == {"median": 2, "low": 2, "high": 3}  # 150 and 50 tokens/s were one slow moment
    assert teacher["decode_ratio"] == {"median": 1, "low": 1, "high": 1}
    assert student["peak_bytes"] == 1300
    assert student["kv_cache_bytes"] == 1 << 30
    assert broken == {"name": "broken", "failed": "no such format"}
    wanted = {"count": 4, "p50_s": 2.5, "p95_s": pytest.approx(3.85), "per_s": 0.8, "tokens_per_s": 8}
    assert teacher["requests"] == student["requests"] == {"t": wanted}
    assert (found["version"], found["in_turns"], found["rounds"]) == ("9.9", together, 5)
    turns = [name for name in Worker.asked if " " not in name]
    assert [name for name in Worker.asked if "requests" in name] == ["requests teacher", "requests student"]
    assert turns == (["teacher", "student"] * 5 if together else ["teacher"] * 5 + ["student"] * 5)
    first_stop = next(n for n, what in enumerate(Worker.asked) if what.startswith("stop"))
    assert (first_stop > Worker.asked.index("start student")) == together
    assert sum(what.startswith("stop") for what in Worker.asked) == 3


def test_engines_are_stopped_when_one_dies(measured, monkeypatch):
    monkeypatch.setitem(WRITES, "student", [200])
    with pytest.raises(StopIteration):
        measured(True)
    assert Worker.asked[-3:] == ["stop teacher", "stop student", "stop broken"]


def test_they_run_together_only_where_they_fit(monkeypatch, tmp_path):
    (tmp_path / "model.safetensors").write_bytes(b"x" * 1000)
    small, hub = serving.Served("a", str(tmp_path)), serving.Served("b", "name/on-the-hub")
    monkeypatch.setattr("torch.accelerator.is_available", lambda: False)
    monkeypatch.setattr("psutil.virtual_memory", lambda: type("Memory", (), {"available": 7 << 30}))
    caches = dict.fromkeys("ab", 1 << 30)
    assert serving._fit_together([small, small], caches)
    assert not serving._fit_together([small, small], {"a": 2 << 30})
    assert not serving._fit_together([small, small, small], caches)
    assert not serving._fit_together([small, hub], caches)


def write_config(directory, **sizes):
    """Of Qwen3-8B, in bfloat16."""
    told = {"num_hidden_layers": 36, "num_attention_heads": 32, "num_key_value_heads": 8, "head_dim": 128, "hidden_size": 4096}
    directory.mkdir()
    (directory / "config.json").write_text(json.dumps({"model_type": "qwen3", "dtype": "bfloat16", **told, **sizes}))
    return str(directory)


@pytest.mark.parametrize(
    ("batch", "length", "devices", "sizes", "heads_on_device"),
    [
        (64, 192, 1, {}, 8),
        (64, 192, 4, {}, 2),
        (64, 192, 16, {}, 1),  # of 8 heads, which cannot be divided further
        (8, 4600, 1, {"num_hidden_layers": 64}, 8),  # Qwen3-32B
        (8, 192, 1, {}, 8),
    ],
)
def test_the_cache_holds_all_sequences_at_once(tmp_path, monkeypatch, batch, length, devices, sizes, heads_on_device):
    """Keys and values of 2 bytes in every layer and head; not much more, but for whole pages, and a GiB at least."""
    monkeypatch.setattr(serving, "model_precision", lambda *args, **more: Precision("bfloat16", "as on a GPU"))
    model = serving.Served("teacher", write_config(tmp_path / "model", **sizes), tensor_parallel_size=devices)
    a_token = sizes.get("num_hidden_layers", 36) * 2 * heads_on_device * 128 * 2
    got = serving.cache_bytes(model, batch, length)
    assert got >= max(batch * length * a_token, 1 << 30)
    pages = math.ceil(length / 128) * batch + 1
    assert got == max(pages * 128 * a_token, 1 << 30)


def test_of_a_quantised_checkpoint_the_cache_is_in_the_precision_that_it_names(tmp_path):
    quantised = {"quant_method": "fp8", "weight_block_size": [128, 128]}
    path = write_config(tmp_path / "model", quantization_config=quantised, dtype="float32")
    assert str(load_config(path, None).dtype) == "torch.float32"
    assert serving.cache_bytes(serving.Served("a", path), 64, 128) == 65 * 128 * 36 * 2 * 8 * 128 * 4


def test_a_missing_vllm_is_named(monkeypatch):
    monkeypatch.setattr("importlib.util.find_spec", lambda name: None)
    with pytest.raises(InputError, match=r"eval\.speed vllm needs vllm, which is not installed"):
        serving.check_vllm("eval.speed")


def spied(model):
    """How many tokens a model is asked to write, call by call."""
    generate, asked = model.generate, []

    def counted(*args, **more):
        asked.append(more["max_new_tokens"])
        return generate(*args, **more)

    model.generate = counted
    return asked


def test_transformers_models_take_turns(tiny):
    from llmdistill.models.loading import load_model

    models = {name: load_model(str(tiny), device="cpu") for name in ("teacher", "student")}
    written = [(name, spied(model)) for name, model in models.items()]
    requests = {"teacher": serving.Requests([[5, 6, 7], [8, 9], [5]], 4, [2]), "student": serving.Requests([[5, 6]] * 3, 2, [2])}
    found = serving.by_transformers(models, 2, 3, {"t": requests})
    for entry in found["models"]:
        figures = entry["requests"]["t"]
        assert figures["count"] == 3
        assert 0 < figures["p50_s"] <= figures["p95_s"]
    figures = {entry["name"]: entry["requests"]["t"] for entry in found["models"]}
    tokens = {name: figure["tokens_per_s"] / figure["per_s"] for name, figure in figures.items()}
    assert tokens == {"teacher": pytest.approx(4), "student": pytest.approx(2)}, "no answer ended by itself"
    assert found["engine"] == "transformers"
    for entry in found["models"]:
        assert 0 < entry["decode"]["low"] <= entry["decode"]["median"] <= entry["decode"]["high"]
    assert found["models"][0]["decode_ratio"]["low"] == 1
    for name, lengths in written:
        assert lengths[:4] == [4, 3, 3, 3], f"{name}: once before it is timed, then three rounds"
