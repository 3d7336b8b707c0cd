"""What `eval` says of a model as a draft, against the counters of the real vLLM on the same texts."""

import json
import subprocess
import sys

import numpy as np
import pytest
import torch

from llmdistill.evaluation.fidelity import fidelity
from llmdistill.evaluation.metrics import METRICS, Sums
from llmdistill.evaluation.statistics import Draws
from llmdistill.models.loading import load_model, load_tokenizer
from tests.conftest import ROOT

pytest.importorskip("vllm", reason="vLLM is not installed")
pytestmark = pytest.mark.engine
GAMMA = 3
DRAFT = next(metric for metric in METRICS if metric.name == "draft")


@pytest.fixture(scope="module")
def prompts(smollm2):
    tokenizer = load_tokenizer(str(smollm2), None)
    lines = (ROOT / "prompts/seeds/general.jsonl").read_text().splitlines()[:8]
    chats = [[{"role": "user", "content": json.loads(line)["instruction"]}] for line in lines]
    return [tokenizer.apply_chat_template(chat, add_generation_prompt=True, return_dict=False) for chat in chats]


@pytest.fixture(scope="module")
def cut(smollm2, tmp_path_factory):
    """The teacher without two of its thirty layers: about half of its choices are left."""
    directory = tmp_path_factory.mktemp("cut")
    model = load_model(str(smollm2), dtype="float32")
    layers = [layer for number, layer in enumerate(model.model.layers) if number not in (12, 20)]
    for number, layer in enumerate(layers):
        layer.self_attn.layer_idx = number
    model.model.layers, model.config.num_hidden_layers = torch.nn.ModuleList(layers), len(layers)
    model.save_pretrained(directory)
    load_tokenizer(str(smollm2), None).save_pretrained(directory)
    return directory


def served(directory, teacher, draft, prompts, method, tokens):
    """Texts and counters at temperatures 0 and 1, from an engine in a process of its own; see benchmarks/draft.py."""
    file = directory / "settings.json"
    asked = {"teacher": str(teacher), "draft": str(draft), "prompts": prompts, "method": method, "gamma": GAMMA, "tokens": tokens}
    file.write_text(json.dumps({**asked, "temperatures": [0, 1], "mended": True}))
    done = subprocess.run(
        [sys.executable, ROOT / "benchmarks/draft.py", "--serve", file], cwd=ROOT, capture_output=True, text=True, timeout=500
    )
    assert done.returncode == 0, done.stderr[-3000:]
    return json.loads(file.read_text())["runs"]


def predicted(models, texts, mode):
    """The entry of `metrics.json` for drafts of this length, on the texts that were written."""
    rows = [{"input_ids": np.array([*prompt, *text]), "completion_start": len(prompt)} for prompt, text in texts]
    draws = Draws.of([str(number) for number in range(len(rows))], 200, 0)
    return DRAFT.compute(Sums("student", fidelity(models, rows, 8), draws))[mode]["cycles"][GAMMA - 1]


def test_predictions_are_what_vllm_counts(smollm2, cut, prompts, tmp_path):
    """Greedy drafts, as vLLM makes by default. At temperature 0 on the same texts there is hardly any chance in it."""
    greedy, sampled = served(tmp_path, smollm2, cut, prompts, "greedy", 32)
    models = {name: load_model(str(path), dtype="float32") for name, path in (("teacher", smollm2), ("student", cut))}
    for run, mode, off in ((greedy, "temperature_0", 0.0), (sampled, "greedy", 3.5)):
        counted = np.array(run["accepted_by_place"]) / run["cycles"]
        want = predicted(models, run["texts"], mode)
        assert 0.1 < counted[0] < 0.95, "a draft model that is sometimes wrong"
        assert run["cycles"] > 80
        for place in range(GAMMA):
            p = want["by_place"][place]
            assert counted[place] == pytest.approx(p, abs=0.05 + off * (p * (1 - p) / run["cycles"]) ** 0.5), (mode, place)
        spread = GAMMA / 2 / run["cycles"] ** 0.5  # the most that a standard error of 0 to γ can be
        assert 1 + counted.sum() == pytest.approx(want["mean"], rel=0.05, abs=off * spread), mode


def test_a_teacher_that_drafts_for_itself_has_every_draft_accepted(smollm2, prompts, tmp_path):
    """At temperature 0, and at temperature 1 where vLLM samples drafts and keeps their probabilities."""
    for run in served(tmp_path, smollm2, smollm2, prompts[:3], "probabilistic", 20):
        assert run["cycles"] > 10
        assert run["accepted_by_place"] == [run["cycles"]] * GAMMA
