"""Adapters: what is saved is what was trained, whole and beside its base, whatever peft is told."""

import json

import pytest
import torch
from peft import LoraConfig, PeftModel, get_peft_model
from transformers import AutoTokenizer, LlamaConfig, LlamaForCausalLM

from llmdistill.config import Experiment
from llmdistill.config.student import Lora, Student
from llmdistill.errors import InputError
from llmdistill.models.loading import load_model
from llmdistill.students.adapters import attach, lora_config, merge_adapters
from llmdistill.students.origins import begin_student, load_student, save_student
from tests.training.test_trainer import make_trainer

IDS = torch.arange(5, 25).view(2, 10)


@pytest.fixture(scope="module")
def bases(tiny, tmp_path_factory):
    """Small models with a tied output matrix, with one of its own, and with that in bfloat16."""
    found = {}
    for name, tied, dtype in (("tied", True, "float32"), ("untied", False, "float32"), ("half", False, "bfloat16")):
        torch.manual_seed(0)
        config = LlamaConfig(
            vocab_size=96, hidden_size=64, intermediate_size=128, num_hidden_layers=3, num_attention_heads=4,
            num_key_value_heads=2, tie_word_embeddings=tied, initializer_range=0.2,
        )  # fmt: skip
        found[name] = tmp_path_factory.mktemp(name)
        LlamaForCausalLM(config).to(getattr(torch, dtype)).save_pretrained(found[name])
    found["tokenizer"] = AutoTokenizer.from_pretrained(tiny)
    return found


def experiment_of(model, output, **student):
    return Experiment(output=str(output), teacher={"model": str(model)}, student={"model": str(model), **student})


def learn(model, steps=2):
    """Change everything that trains a good deal."""
    parameters = [parameter for parameter in model.parameters() if parameter.requires_grad]
    optimizer = torch.optim.Adam(parameters, lr=0.05)
    for _ in range(steps):
        model(IDS, labels=IDS).loss.backward()
        optimizer.step()
        optimizer.zero_grad()
    return model.eval()


@torch.no_grad()
def logits(model):
    return model(IDS).logits.float()


ARGS = [
    {},
    {"use_dora": True},
    {"use_rslora": True},
    {"init_lora_weights": "gaussian"},
    {"init_lora_weights": "pissa"},
    {"init_lora_weights": "pissa_niter_4", "use_rslora": True},
    {"init_lora_weights": "olora"},
    {"modules_to_save": ["lm_head"]},
    {"modules_to_save": ["embed_tokens", "norm"]},
    {"trainable_token_indices": [7]},
]


@pytest.mark.slow
@pytest.mark.parametrize("base", ["tied", "untied"])
@pytest.mark.parametrize("args", ARGS, ids=str)
def test_the_saved_student_and_its_adapter_are_the_trained_model(args, base, bases, tmp_path):
    experiment = experiment_of(bases[base], tmp_path, lora={"r": 4, "args": args})
    model = load_student(experiment)
    start = logits(model)
    torch.testing.assert_close(start, logits(load_model(str(bases[base]))), rtol=0, atol=1e-4)
    begin_student(model, tmp_path)
    trained = logits(learn(model))
    assert (trained - start).abs().max() > 0.1
    save_student(model, bases["tokenizer"], experiment, tmp_path, [2])
    saved = load_model(str(tmp_path))
    torch.testing.assert_close(logits(saved), trained, rtol=0, atol=1e-3)
    assert saved.generation_config.eos_token_id == [2]
    assert saved.config.use_cache
    beside = PeftModel.from_pretrained(load_model(str(bases[base])), tmp_path / "adapter").eval()
    torch.testing.assert_close(logits(beside), trained, rtol=0, atol=1e-3)


@pytest.mark.parametrize("args", [{}, {"modules_to_save": ["lm_head", "norm"]}, {"trainable_token_indices": [7]}], ids=str)
def test_all_that_trains_beside_a_base_in_half_precision_is_in_float32(args, bases):
    """In bfloat16 a weight near 1 does not change by a step of less than 2^-9."""
    model = attach(load_model(str(bases["half"]), dtype="checkpoint"), lora_config(Lora(r=2, args=args)), seed=0)
    dtypes = {trains: {p.dtype for p in model.parameters() if p.requires_grad == trains} for trains in (True, False)}
    assert dtypes == {True: {torch.float32}, False: {torch.bfloat16}}


@pytest.mark.parametrize("kind", ["nf4", "int8"])
def test_a_quantised_base_is_saved_unquantised_with_the_adapter_merged(kind, bases, tmp_path):
    """Weights without an adapter are those of the checkpoint to the bit; the others are it plus alpha / r · B A."""
    pytest.importorskip("bitsandbytes")
    experiment = experiment_of(bases["half"], tmp_path, lora={"r": 2, "alpha": 8}, quantize=kind)
    model = load_student(experiment)
    layer = {"nf4": "Linear4bit", "int8": "Linear8bitLt"}[kind]
    assert type(model.get_base_model().model.layers[0].mlp.up_proj.base_layer).__name__ == layer
    whole = logits(load_model(str(bases["half"])))
    assert 0.001 < (logits(model) - whole).norm() / whole.norm() < 0.7  # quantised, and still that model
    learn(model)
    save_student(model, bases["tokenizer"], experiment, tmp_path, None)
    assert "quantization_config" not in json.loads((tmp_path / "config.json").read_text())
    before, after = (load_model(str(path), dtype="checkpoint").state_dict() for path in (bases["half"], tmp_path))
    trained = dict(model.named_parameters())
    assert before.keys() == after.keys()
    for name, weight in after.items():
        assert weight.dtype == torch.bfloat16
        place = f"base_model.model.{name.removesuffix('weight')}"
        if f"{place}lora_A.default.weight" in trained:
            a, b = (trained[f"{place}lora_{matrix}.default.weight"].detach().double() for matrix in "AB")
            want = before[name].double() + 4 * b @ a
            assert not torch.equal(weight, before[name])
            torch.testing.assert_close(weight.double(), want, rtol=2**-7, atol=2**-8 * want.abs().max().item())
        else:
            assert torch.equal(weight, before[name]), name


@pytest.mark.parametrize("kind", ["nf4", "int8"])
def test_gradients_go_through_quantised_weights_also_after_an_evaluation(kind, bases, tmp_path):
    """They are those of a model that holds the same rounded weights as ordinary numbers."""
    pytest.importorskip("bitsandbytes")
    quantised = load_student(experiment_of(bases["untied"], tmp_path, lora={"r": 2}, quantize=kind))
    plain = load_student(experiment_of(bases["untied"], tmp_path, lora={"r": 2}))
    with torch.no_grad():
        for name, module in quantised.named_modules():
            if type(module).__name__ in ("Linear4bit", "Linear8bitLt") and "lora" not in name:
                plain.get_submodule(name).weight.copy_(rounded(module))
        for model in (quantised, plain):
            for name, parameter in model.named_parameters():
                if "lora_B" in name:
                    parameter.copy_(torch.sin(torch.arange(parameter.numel())).view_as(parameter) * 0.1)
    logits(quantised)
    for model in (quantised, plain):
        model.train()
        model(IDS, labels=IDS).loss.backward()
    close = {"nf4": 1e-4, "int8": 0.03}[kind]  # int8 rounds the inputs, too
    got, want = (dict(model.named_parameters()) for model in (quantised, plain))
    for name, parameter in want.items():
        if "lora_" in name:
            assert (got[name].grad - parameter.grad).norm() <= close * parameter.grad.norm(), name


@pytest.mark.slow
@pytest.mark.parametrize(
    "student",
    [{"lora": {"r": 2, "args": {"init_lora_weights": "pissa"}}}, {"lora": {"r": 2}, "quantize": "nf4"}],
    ids=["PiSSA", "QLoRA"],
)
def test_training_that_resumes_goes_on_with_the_same_losses(student, tiny, text_rows, tmp_path):
    """From a base that is loaded, quantised or taken apart anew."""
    if "quantize" in student:
        pytest.importorskip("bitsandbytes")

    def make(name):
        model = load_student(experiment_of(tiny, tmp_path, **student))
        settings = {"alpha": 0.0, "max_steps": 4, "save_strategy": "steps", "save_steps": 2, "learning_rate": 1e-2}
        return make_trainer(tiny, text_rows, tmp_path / name, model, **settings)

    whole, again = make("whole"), make("again")
    whole.train()
    again.train(resume_from_checkpoint=str(tmp_path / "whole/checkpoint-2"))
    losses = [[entry["loss"] for entry in run.state.log_history if "loss" in entry] for run in (whole, again)]
    assert len(set(losses[0])) == 4
    assert losses[1] == pytest.approx(losses[0], rel=1e-5)


def rounded(layer):
    """The weights of a quantised layer as float32."""
    from bitsandbytes.functional import dequantize_4bit

    if type(layer).__name__ == "Linear4bit":
        return dequantize_4bit(layer.weight.data, layer.weight.quant_state)
    return layer.weight.CB.float() * layer.weight.SCB[:, None] / 127


@pytest.mark.parametrize(
    ("args", "message"),
    [
        ({"use_dorra": True}, "no such key student.lora.args.use_dorra: .* did you mean student.lora.args.use_dora?"),
        ({"r": 8}, "student.lora.args.r is set by student.lora.r"),
        ({"lora_alpha": 8}, "student.lora.args.lora_alpha is set by student.lora.alpha"),
        (
            {"alora_invocation_tokens": [1]},
            "alora_invocation_tokens is not supported: the saved student is merged",
        ),
        ({"init_lora_weights": "eva"}, "init_lora_weights is eva, must be one of true, false, gaussian"),
        ({"init_lora_weights": "pissa", "use_dora": True}, "use_dora and init_lora_weights pissa"),
        ({"init_lora_weights": "pissa", "modules_to_save": ["embed_tokens"]}, "modules_to_save and init_lora_weights pissa"),
        ({"init_lora_weights": "olora", "trainable_token_indices": [2]}, "trainable_token_indices and init_lora_weights olora"),
        ({"init_lora_weights": "olora", "bias": "all"}, "bias and init_lora_weights olora"),
        (
            {"init_lora_weights": "pissa", "use_rslora": True, "rank_pattern": {"q_proj": 4}},
            "rank_pattern with use_rslora and init_lora_weights pissa",
        ),
        ({"layers_to_transform": [0]}, "student.lora.args: .*layers_to_transform"),
        ({"modules_to_save": ["lmhead"]}, "student.lora.args.modules_to_save: LlamaForCausalLM has no module lmhead"),
        ({"bias": "some"}, "student.lora: .*bias"),
    ],
)
def test_what_peft_would_not_do(args, message, tiny):
    with pytest.raises(InputError, match=message):
        attach(load_model(str(tiny)), lora_config(Lora(args=args)), seed=0)


def test_modules_that_are_not_there(tiny):
    with pytest.raises(InputError, match=r"student.lora: Target modules .*query.* not found"):
        attach(load_model(str(tiny)), lora_config(Lora(target_modules=["query"])), seed=0)


def test_adapters_depend_on_the_seed(tiny):
    models = [attach(load_model(str(tiny)), lora_config(Lora(r=2)), seed).state_dict() for seed in (3, 3, 4)]
    name = next(name for name in models[0] if "lora_A" in name)
    assert torch.equal(models[0][name], models[1][name])
    assert not torch.equal(models[0][name], models[2][name])


def test_without_bitsandbytes(tiny, tmp_path, monkeypatch):
    monkeypatch.setattr("importlib.util.find_spec", lambda name: None)
    with pytest.raises(
        InputError, match=r"student.quantize nf4 needs bitsandbytes, which is not installed: pip install bitsandbytes"
    ):
        load_student(experiment_of(tiny, tmp_path, lora={}, quantize="nf4"))


@pytest.mark.parametrize(
    ("student", "message"),
    [
        ({"model": "m", "quantize": "nf4"}, "quantize is nf4, but quantised weights cannot be trained; add lora"),
        ({"config": {}, "lora": {}}, "those of student.config are random; remove lora"),
        ({"config": {}, "model": "m"}, "give either student.model or student.config, not both"),
        ({"model": "m", "quantize": "nf3", "lora": {}}, "nf4"),
    ],
)
def test_students_that_make_no_sense(student, message):
    with pytest.raises(ValueError, match=message):
        Student(**student)


TIED = [
    {"target_modules": ["q_proj", "embed_tokens"]},
    {"target_modules": ["q_proj", "lm_head"]},
    {"target_modules": ["q_proj", "embed_tokens"], "args": {"ensure_weight_tying": True}},
    {"target_modules": ["q_proj"], "args": {"target_parameters": ["embed_tokens.weight"]}},
]


@pytest.mark.parametrize("lora", TIED, ids=str)
def test_an_adapter_on_a_shared_matrix_is_refused_and_on_one_of_its_own_is_merged(lora, bases, tmp_path):
    """Merged, it would change the embeddings and the output layer alike, of which it was trained on one."""
    with pytest.raises(InputError, match=r"student.lora: adapters on .*(embed_tokens|lm_head).*cannot be merged"):
        load_student(experiment_of(bases["tied"], tmp_path, lora={"r": 4, **lora}))
    if "ensure_weight_tying" in lora.get("args", {}):
        return
    experiment = experiment_of(bases["untied"], tmp_path, lora={"r": 4, **lora})
    trained = logits(learn(model := load_student(experiment)))
    save_student(model, bases["tokenizer"], experiment, tmp_path, [2])
    torch.testing.assert_close(logits(load_model(str(tmp_path))), trained, rtol=0, atol=1e-3)


def test_export_merges_no_adapter_on_a_shared_matrix(bases, tmp_path):
    config = LoraConfig(target_modules=["embed_tokens"], task_type="CAUSAL_LM")
    get_peft_model(load_model(str(bases["tied"])), config).save_pretrained(tmp_path / "adapter")
    with pytest.raises(InputError, match=r"export.model: .*adapter: adapters on model.embed_tokens.*cannot be merged"):
        merge_adapters(tmp_path / "adapter", "float32", [2], tmp_path / "whole")
    assert not (tmp_path / "whole").exists()
