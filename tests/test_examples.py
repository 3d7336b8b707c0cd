"""The flat example computes what the package computes; the scripts beside TRL's run."""

import difflib
import importlib.util
import json
import runpy

import numpy as np
import pytest
import torch

from llmdistill.data.collator import DistillCollator
from llmdistill.data.rows import Row
from llmdistill.data.targets import Sampled, TopK
from llmdistill.losses import Objective, distillation_loss
from llmdistill.models.forward import completion_logits
from llmdistill.models.loading import load_model, load_tokenizer
from tests.conftest import ROOT
from tests.factories import VOCAB, write_rows

spec = importlib.util.spec_from_file_location("distill_loop", ROOT / "examples/distill_loop.py")
loop = importlib.util.module_from_spec(spec)
spec.loader.exec_module(loop)


def test_it_fits_on_a_page():
    assert len((ROOT / "examples/distill_loop.py").read_text().splitlines()) < 150


def test_its_draw_keeps_the_same_tokens_with_the_same_weights():
    """The package's sampler and its weights, given the same random number."""
    log_p = (torch.randn(200, 500, generator=torch.Generator().manual_seed(0), dtype=torch.float64) * 3).log_softmax(-1)
    torch.manual_seed(1)
    ids, weights = loop.draw(log_p.exp(), 12)
    torch.manual_seed(1)
    want = Sampled.keep(log_p, 12, torch.rand(200, 1, dtype=torch.float64))
    soft = Sampled.from_kept(want.numpy(), log_p.gather(1, want).numpy())
    order = ids.argsort(1)
    other = torch.from_numpy(soft.ids_NK).argsort(1)
    assert (ids.gather(1, order) == torch.from_numpy(soft.ids_NK).gather(1, other)).all()
    stored = torch.from_numpy(soft.logweights_NK).exp().gather(1, other)
    torch.testing.assert_close(weights.gather(1, order), stored, rtol=2e-2, atol=1e-4)  # the package stores float16


def test_its_loss_is_that_of_the_package(tiny):
    """On the same row, for a student that is not the teacher, up to the float16 of what is stored."""
    teacher, tokenizer = load_model(str(tiny)), load_tokenizer(str(tiny), None)
    torch.manual_seed(0)
    row = loop.write(teacher, tokenizer, "Say it.", 12, 8)
    student = loop.half(teacher, 2)
    soft = Sampled.from_kept(row["targets"].numpy(), row["logprobs"].numpy())
    columns = Sampled.encode([soft], VOCAB)
    stored = {name: column[0].values.to_numpy() for name, column in columns.items()}
    batch = DistillCollator(0)([{"input_ids": row["ids"][0].numpy(), "completion_start": row["start"], **stored}])
    labels = batch["labels"][batch["labels"] != -100]
    want, _ = distillation_loss(completion_logits(student, batch), labels, batch, Objective(alpha=0.7))
    np.testing.assert_allclose(loop.loss(student, row, 0.7).item(), want.item(), rtol=2e-3)


def test_ten_lines_make_a_trl_script_distil():
    plain, ours = ((ROOT / f"examples/trl_{name}.py").read_text().splitlines() for name in ("sft", "distill"))
    changes = [line for line in difflib.ndiff(plain, ours) if line[0] in "+-"]
    assert 0 < sum(line[0] == "+" for line in changes) <= 10
    assert 0 < sum(line[0] == "-" for line in changes) <= 10


@pytest.mark.parametrize("script", ["trl_sft", "trl_distill"])
def test_trl_scripts_run(script, tiny, tmp_path, monkeypatch):
    """Both on one dataset, by the arguments of TRL's own command line; the loss of the second has its parts."""
    data = tmp_path / "data"
    rows, generator = [], torch.Generator().manual_seed(0)
    for number in range(4):
        log_p = torch.randn(5, VOCAB, generator=generator).log_softmax(-1)
        ids = log_p.topk(4).indices
        soft = TopK.from_kept(ids.numpy(), log_p.gather(1, ids).numpy())
        asked, said = ([{"role": role, "content": str(number)}] for role in ("user", "assistant"))
        rows.append(Row(str(number), asked, said, [5, 6, 7], np.arange(8, 13), "stop", np.zeros(5), soft))
    write_rows(data, rows, "topk", k=4)
    monkeypatch.setattr("datasets.config.HF_DATASETS_CACHE", str(tmp_path / "cache"))
    options = {
        "model_name_or_path": tiny,
        "dataset_name": data,
        "output_dir": tmp_path / "out",
        "max_steps": 2,
        "logging_steps": 1,
    }
    options |= {"logging_steps": 1, "report_to": "none", "use_cpu": True, "bf16": False, "save_steps": 2}
    arguments = [word for name, value in options.items() for word in (f"--{name}", str(value))]
    monkeypatch.setattr("sys.argv", [script, *arguments])
    runpy.run_path(str(ROOT / f"examples/{script}.py"), run_name="__main__")
    load_model(str(tmp_path / "out"))
    history = json.loads((tmp_path / "out/checkpoint-2/trainer_state.json").read_text())["log_history"]
    assert len(history) == 2
    assert ("kl" in history[0]) == (script == "trl_distill")
