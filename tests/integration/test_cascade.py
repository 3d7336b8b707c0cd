"""The confidence that a real vLLM server gives is the one that `eval` measures, and the documentation's cascade uses it."""

import json
import re

import pytest

from llmdistill.evaluation.own_tasks import read_own, run_own
from llmdistill.models.loading import end_token_ids, load_model, load_tokenizer
from tests.conftest import ROOT
from tests.factories import write_tiny_for_vllm
from tests.integration.servers import vllm_server

pytest.importorskip("vllm", reason="vLLM is not installed")
pytest.importorskip("openai", reason="openai is not installed")
pytestmark = pytest.mark.engine
ITEMS = 3


@pytest.fixture(scope="module")
def model(smollm2, tmp_path_factory):
    return write_tiny_for_vllm(tmp_path_factory.mktemp("model") / "tiny", smollm2)


@pytest.fixture(scope="module")
def port(model, tmp_path_factory):
    """One server that is both student and teacher."""
    options = ["--dtype", "float32", "--generation-config", "vllm"]
    log = tmp_path_factory.mktemp("server") / "log"
    with vllm_server(log, model, *options, "--served-model-name", "student", "teacher") as port:
        yield port


def test_the_documented_cascade(model, port, tmp_path, monkeypatch):
    own = read_own(ROOT / "configs/tasks/orders.yaml")
    student, tokenizer = load_model(str(model), dtype="float32"), load_tokenizer(str(model), None)
    ends = end_token_ids(str(model), None, student.config, tokenizer)
    rows, tables = run_own([own], {"student": student}, {"student": tokenizer}, {"student": ends}, 3, ITEMS)
    confidences = [sum(row["logprobs"]) for row in rows]
    kept = sorted(confidences)[ITEMS // 2]
    told = {"system": own.task.prompt("")[0]["content"], "max_tokens": tables["orders"]["max_tokens"]["student"]}
    told["template_args"] = {}
    told["thresholds"] = [{"target": 0.99, "threshold": kept - 1e-2}]
    (tmp_path / "cascade.json").write_text(json.dumps({"tasks": {"orders": told}}))

    (code,) = re.findall(r"```python\n(.*?)```", (ROOT / "docs/export.md").read_text(), re.DOTALL)
    code = code.replace("(8000, 8001)", f"({port}, {port})").replace("localhost", "127.0.0.1")
    code = code.replace("runs/orders/export/safetensors/", f"{tmp_path}/")
    example: dict = {}
    exec(code, example)
    asked, create = [], type(example["student"].chat.completions).create

    def recorded(self, **how):
        found = create(self, **how)
        content = found.choices[0].logprobs.content if how.get("logprobs") else []
        asked.append((how["model"], sum(token.logprob for token in content)))
        return found

    monkeypatch.setattr(type(example["student"].chat.completions), "create", recorded)
    for item, row, confidence in zip(own.items[:ITEMS], rows, confidences, strict=True):
        asked.clear()
        assert example["answer"](item.input).strip() == row["answer"]
        assert asked[0] == ("student", pytest.approx(confidence, abs=5e-3))
        assert [name for name, _ in asked] == (["student"] if confidence >= kept else ["student", "teacher"])
