"""Checkpoints that also take images, as teachers and students of text: from the dataset to weights that load elsewhere."""

import pytest
import torch
from transformers import AutoConfig, AutoModelForCausalLM, AutoTokenizer

from llmdistill.config import load_experiment
from llmdistill.data.dataset import load_dataset
from llmdistill.errors import InputError
from llmdistill.models.loading import load_model
from llmdistill.stages.curate import curate
from llmdistill.stages.evaluate import evaluate
from llmdistill.stages.generate import generate
from llmdistill.stages.prune import prune
from llmdistill.stages.train import train
from tests.factories import write_experiment

TEXT = {"hidden_size": 32, "intermediate_size": 64, "num_hidden_layers": 4, "num_attention_heads": 4, "num_key_value_heads": 2}
TEXT |= {"head_dim": 8, "vocab_size": 49152, "max_position_embeddings": 256}
VISION = {"hidden_size": 16, "intermediate_size": 32, "num_hidden_layers": 1, "num_attention_heads": 2, "patch_size": 4}


def gemma3():
    """Gemma 3 with its vision tower."""
    from transformers import Gemma3Config, Gemma3ForConditionalGeneration

    text = {**TEXT, "sliding_window": 64, "tie_word_embeddings": True}
    config = Gemma3Config(text_config=text, vision_config={**VISION, "image_size": 16}, mm_tokens_per_image=4)
    return Gemma3ForConditionalGeneration(config)


def qwen3_5():
    """Qwen 3.5 with its vision tower, three layers of linear attention and one of full."""
    from transformers import Qwen3_5Config, Qwen3_5ForConditionalGeneration

    layers = ["linear_attention"] * 3 + ["full_attention"]
    linear = {"linear_key_head_dim": 8, "linear_value_head_dim": 8, "linear_num_key_heads": 2, "linear_num_value_heads": 4}
    text = {**TEXT, **linear, "layer_types": layers, "tie_word_embeddings": True}
    vision = {"hidden_size": 16, "intermediate_size": 32, "depth": 1, "num_heads": 2, "patch_size": 4, "out_hidden_size": 32}
    return Qwen3_5ForConditionalGeneration(Qwen3_5Config(text_config=text, vision_config=vision))


@pytest.fixture(scope="module", params=[gemma3, qwen3_5], ids=["gemma3", "qwen3_5"])
def model(request, smollm2, tmp_path_factory):
    """A random multimodal model with the demo teacher's tokenizer, in a directory."""
    torch.manual_seed(0)
    directory = tmp_path_factory.mktemp("multimodal")
    made = request.param()
    for config in (made.config, made.generation_config):
        config.bos_token_id, config.eos_token_id, config.pad_token_id = 1, 2, 2
    made.save_pretrained(directory)
    AutoTokenizer.from_pretrained(smollm2).save_pretrained(directory)
    return directory


@pytest.fixture(scope="module")
def experiment_file(model, tmp_path_factory):
    directory = tmp_path_factory.mktemp("run")
    file = write_experiment(model, directory)
    experiment = load_experiment(file, [("student", f"{{model: {model}}}")])
    generate(experiment)
    curate(experiment)
    return file


@pytest.mark.parametrize("lora", ["null", "{r: 4}"])
def test_it_teaches_and_learns_as_text(model, experiment_file, tmp_path, lora):
    data = experiment_file.parent / "run/curated"
    changes = [("student", f"{{model: {model}, lora: {lora}}}"), ("output", str(tmp_path)), ("train.dataset", str(data))]
    changes += [("eval.own_prompts", "0"), ("eval.tasks", "[]")]
    experiment = load_experiment(experiment_file, changes)
    train(experiment)
    before, after = load_model(str(model), dtype="float32"), AutoModelForCausalLM.from_pretrained(tmp_path / "student")
    row = load_dataset(data, "test")[0]
    ids = torch.as_tensor(row["input_ids"])[None]
    with torch.inference_mode():
        first, last = before(input_ids=ids).logits, after(input_ids=ids).logits
    assert first.shape == last.shape
    assert not torch.allclose(first, last), "it has learned"
    evaluate(experiment)
    assert AutoConfig.from_pretrained(tmp_path / "student").architectures == [type(after).__name__]


def test_it_is_not_cut(model, experiment_file, tmp_path):
    changes = [("output", str(tmp_path / "out")), ("train.dataset", str(experiment_file.parent / "run/curated"))]
    with pytest.raises(InputError, match=r"student\.prune|cannot be pruned|teacher\.model"):
        prune(load_experiment(experiment_file, changes))
    assert not (tmp_path / "out").exists()
