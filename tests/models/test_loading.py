"""Loading models of Hugging Face: what published checkpoints have and what must be writable again."""

import json
import shutil

import pytest

from llmdistill.models.loading import continue_prompts, load_model


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
    saved = json.loads((tmp_path / "saved/generation_config.json").read_text())
    assert {name: saved.get(name) for name in kept} == kept


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
