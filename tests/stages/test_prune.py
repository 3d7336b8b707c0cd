"""The stage `prune`: what it needs, what it says, what it writes."""

import json

import numpy as np
import pytest
import torch
from transformers import AutoModelForCausalLM, AutoTokenizer, Gemma2Config, Gemma2ForCausalLM

from llmdistill import load_dataset
from llmdistill.config import Experiment
from llmdistill.errors import InputError
from llmdistill.models.loading import load_model
from llmdistill.stages.prune import ensure_pruned, prune


@pytest.fixture
def experiment(tiny, text_rows, tmp_path):
    """An experiment on eight rows without a held-out split, with this section `student.prune`."""

    def make(teacher=tiny, dataset=text_rows, **section):
        return Experiment(
            output=str(tmp_path / "run"),
            teacher={"model": str(teacher)},
            student={"prune": section},
            train={"dataset": str(dataset)},
        )

    return make


@pytest.fixture(scope="module")
def gemma(tiny, tmp_path_factory):
    """A random gemma2: a norm stands behind its MLP."""
    directory = tmp_path_factory.mktemp("models") / "gemma"
    sizes = {"hidden_size": 24, "intermediate_size": 48, "num_hidden_layers": 4, "head_dim": 8}
    heads = {"num_attention_heads": 4, "num_key_value_heads": 2}
    torch.manual_seed(0)
    Gemma2ForCausalLM(Gemma2Config(vocab_size=49152, **sizes, **heads)).save_pretrained(directory)
    AutoTokenizer.from_pretrained(tiny).save_pretrained(directory)
    return directory


def results_of(experiment):
    return json.loads((experiment.directory("student-before") / "run.json").read_text())["results"]


def test_the_refit_is_measured_on_other_rows_and_said(experiment, text_rows, tiny, capsys):
    experiment = experiment(layers=2, calibration_rows=5)
    assert ensure_pruned(experiment)
    results = results_of(experiment)
    near = results["kl_from_teacher"]
    assert near["rows"] == 3
    line = f"prune     KL from the teacher {near['cut']:.2f} nats per token, {near['refitted']:.2f} after the refit (3 rows)"
    assert line in capsys.readouterr().out
    assert [layer["layer"] for layer in results["refit"]] == results["layers"]
    assert all(layer["after"] <= layer["before"] for layer in results["refit"])
    student = AutoModelForCausalLM.from_pretrained(experiment.directory("student-before"))
    teacher, sums = load_model(str(tiny)), []
    for row in list(load_dataset(text_rows))[5:]:
        ids = torch.from_numpy(row["input_ids"].astype(np.int64))[None]
        predicting = slice(row["completion_start"] - 1, -1)
        with torch.no_grad():
            p, q = (model(ids).logits[0, predicting].double().log_softmax(-1) for model in (teacher, student))
        sums.append((p.exp() * (p - q)).sum(-1))
    assert near["refitted"] == pytest.approx(torch.cat(sums).mean().item(), rel=1e-4)
    assert not ensure_pruned(experiment)


def test_a_student_is_saved_in_the_precision_of_its_teacher(experiment, tiny, tmp_path):
    """It is solved in float32: what is in the file is that, rounded once."""
    load_model(str(tiny)).bfloat16().save_pretrained(tmp_path / "teacher")
    AutoTokenizer.from_pretrained(tiny).save_pretrained(tmp_path / "teacher")
    experiment = experiment(teacher=tmp_path / "teacher", layers=[0, 1, 2, 3], calibration_rows=5)
    ensure_pruned(experiment)
    student = AutoModelForCausalLM.from_pretrained(experiment.directory("student-before"), dtype="auto")
    teacher = AutoModelForCausalLM.from_pretrained(tmp_path / "teacher", dtype="auto")
    assert student.dtype == torch.bfloat16
    torch.testing.assert_close(student.state_dict(), teacher.state_dict(), rtol=0, atol=0)
    near = results_of(experiment)["kl_from_teacher"]
    assert [near["cut"], near["refitted"]] == pytest.approx([0, 0], abs=1e-6)


def test_where_no_row_is_left_that_is_said(experiment, capsys):
    experiment = experiment(layers=2)
    ensure_pruned(experiment)
    assert "none is left for the KL from the teacher" in capsys.readouterr().out
    assert results_of(experiment).keys() == {"parameters_before", "parameters", "layers", "refit"}


def test_without_the_refit_and_with_listed_layers_no_dataset_is_needed(experiment, tiny, tmp_path):
    experiment = experiment(dataset=tmp_path / "nowhere", layers=[0, 3], refit=False)
    ensure_pruned(experiment)
    student, teacher = (AutoModelForCausalLM.from_pretrained(path) for path in (experiment.directory("student-before"), tiny))
    assert torch.equal(student.model.layers[1].mlp.down_proj.weight, teacher.model.layers[3].mlp.down_proj.weight)
    assert results_of(experiment).keys() == {"parameters_before", "parameters", "layers"}


@pytest.mark.parametrize("section", [{"layers": [0, 3]}, {"layers": 2, "refit": False}, {"layers": 2, "by": "even"}])
def test_without_a_dataset_the_message_says_what_it_is_for(experiment, tmp_path, section):
    experiment = experiment(dataset=tmp_path / "nowhere", **section)
    with pytest.raises(InputError, match=r"nowhere: no such dataset; student.prune needs its rows, .*student.prune.refit false"):
        ensure_pruned(experiment)
    assert not experiment.directory("student-before").exists()


def test_with_a_norm_behind_the_mlp_the_refit_comes_nearer(experiment, gemma):
    ensure_pruned(experiment(teacher=gemma, layers=2, calibration_rows=5))
    results = results_of(experiment(teacher=gemma, layers=2, calibration_rows=5))
    assert all(layer["after"] <= layer["before"] for layer in results["refit"])
    assert results["kl_from_teacher"].keys() == {"cut", "refitted", "rows"}


def test_a_teacher_that_cannot_be_refitted_is_refused(experiment, tiny, monkeypatch):
    norm = "transformers.models.llama.modeling_llama.LlamaMLP.forward"
    monkeypatch.setattr(norm, lambda self, x: self.down_proj(self.act_fn(self.gate_proj(x)) * self.up_proj(x)).tanh())
    case = experiment(teacher=tiny, layers=2, calibration_rows=5)
    with pytest.raises(InputError, match=r"student.prune.refit: layer 0 of Llama.* is linear neither in .*; set it to false"):
        ensure_pruned(case)
    assert not case.directory("student-before").exists()


def test_a_dry_run_says_what_would_be_read(experiment, text_rows, capsys, tmp_path):
    prune(experiment(layers=2), dry_run=True)
    prune(experiment(layers=[0, 1], refit=False), dry_run=True)
    first, second = capsys.readouterr().out.splitlines()
    assert first == f"prune     would write {tmp_path}/run/student-before by rows of {text_rows}"
    assert second == f"prune     would write {tmp_path}/run/student-before"
