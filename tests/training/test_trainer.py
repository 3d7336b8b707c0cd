"""The trainer's loss: the right number, however the global batch is cut up."""

import copy
import functools

import numpy as np
import pytest
import torch
import trl
from accelerate.data_loader import prepare_data_loader, skip_first_batches
from torch.utils.data import DataLoader
from transformers import AutoTokenizer

from llmdistill import DistillConfig, DistillTrainer, load_dataset
from llmdistill.data import targets
from llmdistill.data.collator import DistillCollator
from llmdistill.errors import NonFiniteError
from llmdistill.losses import Objective, distillation_loss
from llmdistill.models.forward import completion_logits
from llmdistill.models.loading import load_model
from llmdistill.training.callbacks import trained_tokens
from llmdistill.training.trainer import rows_in_last_batch
from tests.factories import VOCAB, make_row, write_rows
from tests.training.steps import gradients_of_one_step

K = 6
ROUNDING = 1e-4  # of a gradient in float32, added up in another order; 6e-5 has been seen
LOSSES = ("loss", "ce", "kl", "eval_loss", "eval_ce", "eval_kl")


@pytest.fixture(scope="module", params=["topk", "sampled"])
def dataset_directory(request, tiny, tmp_path_factory):
    """Eight rows of uneven length, with the tiny model's own distribution as their soft targets, of either kind."""
    directory = tmp_path_factory.mktemp("data")
    generator = np.random.default_rng(0)
    model = load_model(str(tiny), dtype="float32")
    rows = []
    for number in range(8):
        prompt, completion = generator.integers(3, 2000, 3 + number % 3), generator.integers(3, 2000, 1 + 2 * number)
        ids = np.concatenate([prompt, completion])
        batch = DistillCollator(0)([{"input_ids": ids, "completion_start": len(prompt)}])
        with torch.inference_mode():
            logprobs = completion_logits(model, batch).log_softmax(-1)
        kind = targets.KINDS[request.param]
        ids = kind.keep(logprobs, K, torch.from_numpy(generator.random((len(logprobs), kind.uniforms(K)))))
        soft = kind.from_kept(ids.numpy(), logprobs.gather(1, ids).numpy())
        logprobs = logprobs.numpy()
        rows.append(make_row(str(number), prompt, completion, logprobs[np.arange(len(completion)), completion], soft))
    return write_rows(directory, rows, request.param)


@functools.cache
def tokenizer_of(directory):
    return AutoTokenizer.from_pretrained(directory)


def make_trainer(tiny, dataset_directory, output, model=None, teacher=None, rows=None, eval_dataset=None, **arguments):
    defaults = {
        "output_dir": str(output),
        "use_cpu": True,
        "bf16": False,
        "max_steps": 1,
        "learning_rate": 1e-3,
        "report_to": "none",
        "gradient_checkpointing": False,
        "save_strategy": "no",
        "logging_steps": 1,
        "disable_tqdm": True,
        "max_grad_norm": 0,
        "alpha": 0.7,
    }
    return DistillTrainer(
        model=model or load_model(str(tiny), dtype="float32"),
        args=DistillConfig(**{**defaults, **arguments}),
        train_dataset=rows or load_dataset(dataset_directory),
        teacher=teacher,
        eval_dataset=eval_dataset,
        processing_class=tokenizer_of(tiny),
    )


def different_student(tiny, by=0.05):
    model = load_model(str(tiny), dtype="float32")
    torch.manual_seed(7)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(torch.randn_like(parameter) * by)
    return model


@pytest.mark.parametrize("alpha", [0.0, 0.7, 1.0])
def test_one_batch_of_eight_equals_eight_accumulated_batches_of_one(tiny, dataset_directory, tmp_path, alpha):
    whole = make_trainer(tiny, dataset_directory, tmp_path, different_student(tiny), alpha=alpha, per_device_train_batch_size=8)
    parts = make_trainer(
        tiny, dataset_directory, tmp_path, different_student(tiny), alpha=alpha,
        per_device_train_batch_size=1, gradient_accumulation_steps=8,
    )  # fmt: skip
    want, got = gradients_of_one_step(whole), gradients_of_one_step(parts)
    assert want
    for name, gradient in want.items():
        assert (got[name] - gradient).norm() <= ROUNDING * gradient.norm(), name
    logs = [trainer.state.log_history[0] for trainer in (whole, parts)]
    for key in ("loss", "ce", "kl"):
        assert logs[0][key] == pytest.approx(logs[1][key], rel=1e-4)
    assert logs[0]["num_completion_tokens"] == logs[1]["num_completion_tokens"] == sum(1 + 2 * n for n in range(8))


@pytest.mark.slow
@pytest.mark.parametrize("arguments", [
    {"padding_free": True, "per_device_train_batch_size": 8},
    {"padding_free": True, "per_device_train_batch_size": 2, "gradient_accumulation_steps": 4},
    {"packing": True, "max_length": 24, "per_device_train_batch_size": 8},
    {"packing": True, "max_length": 18, "per_device_train_batch_size": 1, "gradient_accumulation_steps": 8},
])  # fmt: skip
@pytest.mark.parametrize("reduction", ["token", "sequence"])
def test_rows_in_a_line_have_the_gradients_of_rows_below_each_other(tiny, dataset_directory, tmp_path, arguments, reduction):
    """Packs included: all eight rows are in one step, so its gradient must be that of one padded batch of eight."""
    shape = {"per_device_train_batch_size": 8, "max_length": arguments.get("max_length"), "reduction": reduction}
    padded = make_trainer(tiny, dataset_directory, tmp_path, different_student(tiny), **shape)
    lined = make_trainer(tiny, dataset_directory, tmp_path, different_student(tiny), **{**shape, **arguments})
    want, got = gradients_of_one_step(padded), gradients_of_one_step(lined)
    for name, gradient in want.items():
        assert (got[name] - gradient).norm() <= ROUNDING * gradient.norm(), name
    logs = [trainer.state.log_history[0] for trainer in (padded, lined)]
    for key in ("loss", "ce", "kl", "agreement", "num_completion_tokens"):
        assert logs[0][key] == pytest.approx(logs[1][key], rel=1e-4)


def test_what_an_optimiser_averages_is_what_the_model_has_at_the_end(tiny, dataset_directory, tmp_path):
    class Averaging(torch.optim.SGD):
        """In the place of a schedule-free one, whose average is found in evaluation mode alone; here it is zero."""

        def train(self):
            pass

        @torch.no_grad()
        def eval(self):
            self.param_groups[0]["params"][0].zero_()

    trainer = make_trainer(tiny, dataset_directory, tmp_path, max_steps=2)
    trainer.optimizer = Averaging(trainer.model.parameters(), lr=1e-3)
    trainer.train()
    first, second, *_ = trainer.model.parameters()
    assert not first.any()
    assert second.any()


def test_batches_of_similar_length(tiny, dataset_directory, tmp_path):
    trainer = make_trainer(
        tiny, dataset_directory, tmp_path, train_sampling_strategy="group_by_length", per_device_train_batch_size=2
    )
    order = list(trainer._get_train_sampler())
    lengths = [len(trainer.train_dataset[number]["input_ids"]) for number in order]
    assert sorted(order) == list(range(8))
    assert max(lengths) == lengths[0], "the longest first: what does not fit fails at once"
    sampler = trainer._get_train_sampler()
    assert sampler.lengths == [len(row["input_ids"]) for row in trainer.train_dataset]
    torch.rand(7)  # what else draws random numbers, on one process more than on another, changes nothing
    assert list(sampler) == order == list(trainer._get_train_sampler())
    trainer.state.epoch = 1.25  # as after a resume
    assert list(sampler) != order


def test_a_model_that_lets_rows_see_each_other_is_refused(tiny, dataset_directory, tmp_path):
    class Mixing(type(load_model(str(tiny), dtype="float32"))):
        def forward(self, input_ids=None, position_ids=None, **kwargs):
            return super().forward(input_ids=input_ids, **kwargs)  # what stands in a line is one text to it

    model = load_model(str(tiny), dtype="float32")
    model.__class__ = Mixing
    with pytest.raises(ValueError, match="does not isolate packed rows"):
        make_trainer(tiny, dataset_directory, tmp_path, model, padding_free=True)


@pytest.mark.slow
@pytest.mark.parametrize("reduction", ["token", "sequence"])
@pytest.mark.parametrize("by", ["entropy", "certainty"])
def test_weighted_losses_do_not_depend_on_how_the_global_batch_is_cut(tiny, dataset_directory, tmp_path, by, reduction):
    weighting = {"position_weights": by, "reduction": reduction}
    whole = make_trainer(tiny, dataset_directory, tmp_path, different_student(tiny), per_device_train_batch_size=8, **weighting)
    parts = make_trainer(
        tiny, dataset_directory, tmp_path, different_student(tiny),
        per_device_train_batch_size=1, gradient_accumulation_steps=8, **weighting,
    )  # fmt: skip
    want, got = gradients_of_one_step(whole), gradients_of_one_step(parts)
    for name, gradient in want.items():
        assert (got[name] - gradient).norm() <= ROUNDING * gradient.norm(), name
    assert whole.state.log_history[0]["loss"] == pytest.approx(parts.state.log_history[0]["loss"], rel=1e-4)
    batch = whole.data_collator([whole.train_dataset[n] for n in range(8)])
    labels, logits = batch["labels"][batch["labels"] != -100], completion_logits(different_student(tiny), batch)
    each = [  # the loss of every token alone
        distillation_loss(logits, labels, {**batch, "token_weights": torch.eye(len(labels))[n]}, Objective(alpha=0.7))[0].item()
        for n in range(len(labels))
    ]
    weight = batch["token_weights"].double().numpy()
    assert whole.state.log_history[0]["loss"] == pytest.approx((weight * each).sum() / weight.sum(), rel=1e-4)
    assert whole.state.log_history[0]["ce"] == pytest.approx(torch.nn.functional.cross_entropy(logits, labels).item(), rel=1e-4)


def with_sampling(rows, temperature):
    """Rows that say they were sampled at a temperature, by a normaliser of 0.05 nats per token."""
    logprobs = [float(np.sum(row["token_logprobs"])) for row in rows]
    sampled = [lp / temperature - 0.05 * len(row["token_logprobs"]) for lp, row in zip(logprobs, rows, strict=True)]
    log_w = np.array(logprobs) - np.array(sampled)
    return rows.add_column("sampling_logprob", np.array(sampled, dtype=np.float32)).with_format("numpy"), log_w


def test_the_sequence_level_kl_is_weighted_by_importance(tiny, dataset_directory, tmp_path):
    """Its gradient and its value against float64 row by row; weights are normalised over the dataset, cut at √8."""
    rows, log_w = with_sampling(load_dataset(dataset_directory), 0.99)
    weights = np.exp(log_w - log_w.max())
    weights = np.minimum(weights / weights.mean(), 8**0.5)
    weights /= weights.mean()
    assert weights.max() > 1.5 * weights.min()
    reference, total, tokens = different_student(tiny).double(), 0.0, 0
    for row, weight in zip(rows, weights, strict=True):
        ids, start = torch.tensor(row["input_ids"])[None].long(), int(row["completion_start"])
        log_q = reference(ids).logits[0, start - 1 : -1].log_softmax(-1)
        log_q = log_q[range(len(log_q)), ids[0, start:]]
        total = total + weight * (torch.tensor(row["token_logprobs"]).double() - log_q).sum()
        tokens += len(log_q)
    (total / tokens).backward()
    arguments = {"alpha": 0.0, "sequence_alpha": 1.0, "per_device_train_batch_size": 2, "gradient_accumulation_steps": 4}
    trainer = make_trainer(tiny, dataset_directory, tmp_path, different_student(tiny), rows=rows, **arguments)
    got = gradients_of_one_step(trainer)
    for name, parameter in reference.named_parameters():
        assert (got[name] - parameter.grad).norm() <= 1e-4 * parameter.grad.norm(), name
    log = trainer.state.log_history[0]
    assert log["loss"] == pytest.approx((total / tokens).item(), rel=1e-4)
    assert log["sequence_kl"] == pytest.approx((total / tokens).item(), rel=1e-4)


def test_a_sequence_level_kl_of_text_from_elsewhere_is_refused(tiny, dataset_directory, tmp_path):
    with pytest.raises(ValueError, match="whose sampling probability is known"):
        make_trainer(tiny, dataset_directory, tmp_path, sequence_alpha=0.1)


def test_a_schedule_goes_from_the_first_step_to_the_last(tiny, dataset_directory, tmp_path):
    trainer = make_trainer(
        tiny, dataset_directory, tmp_path, different_student(tiny),
        alpha=0.2, alpha_end=0.8, max_steps=4, learning_rate=1e-9, per_device_train_batch_size=8,
    )  # fmt: skip
    trainer.train()
    logs = trainer.state.log_history[:4]
    assert [log["alpha"] for log in logs] == pytest.approx([0.2, 0.4, 0.6, 0.8])
    for log in logs:
        assert log["loss"] == pytest.approx((1 - log["alpha"]) * log["ce"] + log["alpha"] * log["kl"], rel=1e-4)


def test_evaluation_gives_exact_means_over_the_tokens(tiny, dataset_directory, tmp_path):
    """Over uneven batches: what one batch of all rows gives in training, which mean over batches would not."""
    rows = load_dataset(dataset_directory)
    trainer = make_trainer(
        tiny, dataset_directory, tmp_path, different_student(tiny), eval_dataset=rows,
        learning_rate=1e-12, per_device_train_batch_size=8, per_device_eval_batch_size=3, eval_strategy="steps", eval_steps=1,
    )  # fmt: skip
    trainer.train()
    train, held_out = trainer.state.log_history[:2]
    for name in ("loss", "ce", "kl", "agreement"):
        assert held_out[f"eval_{name}"] == pytest.approx(train[name], rel=1e-4), name
    metrics = trainer.evaluate()
    assert metrics["eval_kl"] == pytest.approx(train["kl"], rel=1e-4)


def test_the_logged_agreement_and_speed(tiny, dataset_directory, tmp_path):
    """Agreement against the student's own logits; operations against a count by hand for the tiny llama."""
    student, rows = different_student(tiny, 0.002), load_dataset(dataset_directory)
    kind = targets.kind_of(rows.column_names)
    agree, counts, squares, inputs = 0, 0, 0, 0
    for row in rows:
        ids, start = torch.tensor(row["input_ids"])[None].long(), int(row["completion_start"])
        with torch.inference_mode():
            top = student(ids).logits[0, start - 1 : -1].argmax(-1).numpy()
        soft = kind.of_rows([row], [len(top)])
        agree += (soft.ids_NK[np.arange(len(top)), soft.logweights().argmax(1)] == top).sum()
        counts, inputs, squares = counts + len(top), inputs + ids.shape[1], squares + ids.shape[1] ** 2
    trainer = make_trainer(tiny, dataset_directory, tmp_path, student, per_device_train_batch_size=8)
    trainer.train()
    log = trainer.state.log_history[0]
    assert log["agreement"] == pytest.approx(agree / counts)
    assert 0 < agree < counts
    # 4 layers: q and o 32 × 32, k and v 32 × 16, three of 32 × 64; 4 heads of 8; a vocabulary of 4,096.
    body = 6 * 4 * (2 * 32 * 32 + 2 * 32 * 16 + 3 * 32 * 64)
    total = body * inputs + 6 * 32 * VOCAB * counts + 4 * 6 * 32 * squares
    assert log["tflops"] * 1e12 / log["tokens_per_s"] * inputs == pytest.approx(total, rel=1e-6)
    assert "mfu" not in log, "what this CPU could do is not known"


def test_the_logged_loss_is_the_formula(tiny, dataset_directory, tmp_path):
    """Row by row in float64, without padding, against what the trainer logs for the whole batch."""
    student = different_student(tiny)
    rows = load_dataset(dataset_directory)
    kind = targets.kind_of(rows.column_names)
    ce = kl = tokens = 0.0
    for row in rows:
        start = int(row["completion_start"])
        ids = torch.tensor(row["input_ids"])[None].long()
        with torch.inference_mode():
            log_q = student.double()(ids).logits[0].log_softmax(-1).numpy()
        length = ids.shape[1] - start
        soft = kind.of_rows([row], [length])
        for t in range(length):
            here = log_q[start + t - 1]
            ce -= here[ids[0, start + t]]
            support = soft.ids_NK[t]
            if kind.name != "topk":
                kl += -(np.exp(soft.logweights()[t]) * here[support]).sum() - soft.entropy_N[t]
            else:
                p, q, r = np.exp(soft.logprobs_NK[t]), np.exp(here[support]), soft.tail_N[t]
                kl += (p * np.log(p / q)).sum() + r * np.log(r / (1 - q.sum()))
            tokens += 1
    trainer = make_trainer(tiny, dataset_directory, tmp_path, student.float(), per_device_train_batch_size=8)
    trainer.train()
    log = trainer.state.log_history[0]
    assert log["ce"] == pytest.approx(ce / tokens, rel=1e-5)
    assert log["kl"] == pytest.approx(kl / tokens, rel=1e-4)
    assert log["loss"] == pytest.approx((0.3 * ce + 0.7 * kl) / tokens, rel=1e-3)


CHECKPOINTING = {
    "as TRL does by default": {},
    "reentrant": {"gradient_checkpointing_kwargs": {"use_reentrant": True}},
    "not reentrant": {"gradient_checkpointing_kwargs": {"use_reentrant": False}},
}


@pytest.mark.parametrize("dataset_directory", ["topk"], indirect=True)
@pytest.mark.parametrize("how", CHECKPOINTING)
def test_gradient_checkpointing_changes_no_gradient(tiny, dataset_directory, tmp_path, how):
    arguments = {"per_device_train_batch_size": 4, "gradient_accumulation_steps": 2}
    want = gradients_of_one_step(make_trainer(tiny, dataset_directory, tmp_path, different_student(tiny), **arguments))
    arguments |= {"gradient_checkpointing": True, **CHECKPOINTING[how]}
    trainer = make_trainer(tiny, dataset_directory, tmp_path, different_student(tiny), **arguments)
    again = []
    trainer.model.model.layers[0].register_forward_pre_hook(lambda *_: again.append(torch.is_grad_enabled()))
    got = gradients_of_one_step(trainer)
    assert trainer._head is not None
    assert len(again) == 4, "each of two micro-batches went twice through the layer"
    assert want.keys() == got.keys()
    for name, gradient in want.items():
        torch.testing.assert_close(got[name], gradient, rtol=1e-5, atol=1e-7)


@pytest.mark.parametrize("dataset_directory", ["topk"], indirect=True)
@pytest.mark.parametrize("checkpointing", [False, True])
def test_lora_on_the_output_layer_trains_as_with_held_logits(tiny, dataset_directory, tmp_path, checkpointing):
    from peft import LoraConfig, get_peft_model

    lora, found = LoraConfig(r=4, target_modules=["q_proj", "lm_head"], init_lora_weights=False), []
    for fused_form in (True, False):
        torch.manual_seed(3)
        model = different_student(tiny)
        model.set_output_embeddings(copy.deepcopy(model.get_output_embeddings()))
        model = get_peft_model(model, lora)
        trainer = make_trainer(tiny, dataset_directory, tmp_path, model, gradient_checkpointing=checkpointing)
        assert trainer._head is not None
        if not fused_form:
            trainer._head = None
        found.append(gradients_of_one_step(trainer))
    assert any("lm_head.lora_B" in name for name in found[0])
    with pytest.raises(ValueError, match=r"adapters on model.embed_tokens, whose matrix is shared with lm_head"):
        make_trainer(tiny, dataset_directory, tmp_path, get_peft_model(different_student(tiny), lora))
    assert found[0].keys() == found[1].keys()
    for name, gradient in found[1].items():
        assert (found[0][name] - gradient).norm() <= 1e-4 * gradient.norm() + 1e-7, name


@pytest.mark.slow
@pytest.mark.parametrize("dataset_directory", ["sampled"], indirect=True)
def test_a_compiled_model_has_the_loss_of_every_step(tiny, dataset_directory, tmp_path):
    """Three steps of batches that differ, and an evaluation, against the same without the compiler."""
    logs = []
    for arguments in ({}, {"torch_compile": True, "torch_compile_backend": "eager"}):
        student = different_student(tiny)
        student.model.layers = student.model.layers[:1]  # every layer more is traced again
        trainer = make_trainer(
            tiny, dataset_directory, tmp_path, student, max_steps=3, per_device_train_batch_size=2,
            eval_dataset=load_dataset(dataset_directory), eval_strategy="steps", eval_steps=3, **arguments,
        )  # fmt: skip
        torch._dynamo.reset()
        torch._dynamo.utils.counters.clear()
        trainer.train()
        graphs = torch._dynamo.utils.counters["stats"]["unique_graphs"]
        assert (graphs > 0) == bool(arguments), "it was compiled"
        logs.append([{n: v for n, v in log.items() if n in LOSSES} for log in trainer.state.log_history[:-1]])
    torch._dynamo.reset()
    assert len(logs[0]) == 4
    for plain, compiled in zip(*logs, strict=True):
        assert compiled == pytest.approx(plain, rel=1e-4)


def test_a_teacher_that_is_its_own_student_has_nothing_to_learn(tiny, dataset_directory, tmp_path):
    """KL(teacher ‖ teacher) = 0 through the whole path: store, load, collate, loss. One token off would be far from it."""
    trainer = make_trainer(tiny, dataset_directory, tmp_path, per_device_train_batch_size=4)
    trainer.train()
    assert abs(trainer.state.log_history[0]["kl"]) < 5e-4
    batch = trainer.data_collator([trainer.train_dataset[n] for n in range(8)])
    off = completion_logits(load_model(str(tiny), dtype="float32"), {**batch, "positions": batch["positions"] - 1})
    _, sums = distillation_loss(off, batch["labels"][batch["labels"] != -100], batch, Objective())
    assert sums["kl"] / len(off) > 0.1


def test_a_temperature_that_sampled_targets_do_not_have_is_refused(tiny, dataset_directory, tmp_path):
    if targets.kind_of(load_dataset(dataset_directory).column_names).name != "topk":
        with pytest.raises(ValueError, match="unbiased only at temperature 1"):
            make_trainer(tiny, dataset_directory, tmp_path, temperature=2.0)
    else:
        trainer = make_trainer(tiny, dataset_directory, tmp_path, temperature=2.0)
        trainer.train()
        assert abs(trainer.state.log_history[0]["kl"]) < 5e-4


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"alpha": 1.5}, "alpha"),
        ({"temperature": 0.0}, "temperature"),
        ({"loss": "mse"}, "loss is 'mse'"),
        ({"beta": 0.5}, "forward_kl has no parameter beta"),
        ({"packing": True}, "packing needs max_length"),
        ({"packing": True, "max_length": 8, "train_sampling_strategy": "group_by_length"}, "no train_sampling_strategy"),
        ({"packing": True, "max_length": 8, "packing_strategy": "wrapped"}, "packing_strategy='wrapped' is not supported"),
        ({"assistant_only_loss": True}, "assistant_only_loss=True is not supported"),
        ({"completion_only_loss": False}, "completion_only_loss=False is not supported"),
        ({"average_tokens_across_devices": False}, "average_tokens_across_devices=False is not supported"),
        ({"loss_type": "dft"}, "loss_type='dft' is not supported"),
        ({"position_weights": "rank"}, "must be one of uniform, entropy, certainty"),
        ({"reduction": "batch"}, "must be one of token, sequence"),
        ({"sequence_alpha": 0.2}, "add up to at most 1"),
        ({"sequence_alpha": 0.1, "alpha_end": 1.0}, "add up to at most 1"),
        ({"loss": "jsd", "beta_end": 0.5}, "but beta is not set"),
    ],
)
def test_what_would_change_the_loss_in_silence_is_refused(tmp_path, arguments, message):
    with pytest.raises(ValueError, match=message):
        DistillConfig(output_dir=str(tmp_path), use_cpu=True, **arguments)


@pytest.mark.slow
@pytest.mark.parametrize(("loss", "temperature"), [("forward_kl", 1.0), ("forward_kl", 2.0), ("reverse_kl", 1.0)])
def test_a_teacher_beside_the_student_gives_its_whole_distribution(tiny, dataset_directory, tmp_path, loss, temperature):
    """The gradient of the dense loss, written down in float64 over the full vocabulary; the store is not looked at."""
    student, teacher = different_student(tiny), load_model(str(tiny), dtype="float32")
    rows, total, tokens = load_dataset(dataset_directory), 0.0, 0
    reference = different_student(tiny).double()
    for row in rows:
        ids, start = torch.tensor(row["input_ids"])[None].long(), int(row["completion_start"])
        with torch.no_grad():
            log_p = (teacher(ids).logits[0, start - 1 : -1].double() / temperature).log_softmax(-1)
        log_q = (reference(ids).logits[0, start - 1 : -1] / temperature).log_softmax(-1)
        first, second = (log_q, log_p) if loss == "forward_kl" else (log_p, log_q)
        total += torch.nn.functional.kl_div(first, second, reduction="sum", log_target=True) * temperature**2
        tokens += len(log_p)
    (total / tokens).backward()
    arguments = {"alpha": 1.0, "loss": loss, "temperature": temperature, "per_device_train_batch_size": 8}
    trainer = make_trainer(tiny, dataset_directory, tmp_path, student, load_model(str(tiny), dtype="float32"), **arguments)
    got = gradients_of_one_step(trainer)
    for name, parameter in reference.named_parameters():
        assert (got[name] - parameter.grad).norm() <= 1e-3 * parameter.grad.norm() + 1e-7, name
    assert trainer.state.log_history[0]["loss"] == pytest.approx((total / tokens).item(), rel=1e-4)


def test_no_soft_targets_and_no_silent_fallback(tiny, dataset_directory, tmp_path):
    rows = load_dataset(dataset_directory)
    text = rows.remove_columns([name for name in rows.column_names if name.startswith("target_")])
    arguments = {"output_dir": str(tmp_path), "use_cpu": True, "bf16": False}
    with pytest.raises(ValueError, match="has no soft targets"):
        DistillTrainer(model=load_model(str(tiny), dtype="float32"), args=DistillConfig(**arguments), train_dataset=text)


def test_trls_own_sft_trainer_trains_on_it_completions_only(tiny, dataset_directory, tmp_path):
    """The plain trainer takes the stored ids and masks the prompt: sequence-level distillation without this package."""
    import datasets

    rows = datasets.load_dataset("parquet", data_dir=str(dataset_directory), cache_dir=str(tmp_path / "cache"))["train"]
    trainer = trl.SFTTrainer(
        model=load_model(str(tiny), dtype="float32"),
        args=trl.SFTConfig(output_dir=str(tmp_path), use_cpu=True, bf16=False, max_steps=1, report_to="none", save_strategy="no"),
        train_dataset=rows,
        processing_class=tokenizer_of(tiny),
    )
    for stored, prepared in zip(rows, trainer.train_dataset, strict=True):
        start = stored["completion_start"]
        assert prepared["input_ids"] == stored["input_ids"]
        assert prepared["labels"] == [-100] * start + stored["input_ids"][start:]
    trainer.train()


@pytest.mark.parametrize("drop_last", [False, True])
@pytest.mark.parametrize("processes", [1, 2, 3])
@pytest.mark.parametrize("skipped", [0, 1])
def test_the_rows_in_the_last_batch_are_known_after_a_resume(processes, skipped, drop_last):
    """Counted by going through the loaders that accelerate makes for all processes: what comes a second time is filler."""
    for rows in (24, 25, 30):
        seen, last = set(), []
        loaders = []
        for process in range(processes):
            plain = DataLoader(range(rows), batch_size=5, drop_last=drop_last)
            loader = prepare_data_loader(plain, num_processes=processes, process_index=process, put_on_device=False)
            loaders.append(skip_first_batches(loader, skipped) if skipped else loader)
        seen = set(range(5 * processes * skipped))
        for batches in zip(*loaders, strict=True):
            last = [row for batch in batches for row in batch.tolist() if row not in seen]
            seen.update(last)
        want = 0 if len(last) == 5 * processes else len(last)
        assert rows_in_last_batch(loaders[0]) == want


def test_training_stops_at_the_first_loss_that_is_no_number(tiny, dataset_directory, tmp_path):
    """Of one row's targets; its step is named with its row, before the weights have taken anything from it."""

    def broken(row):
        if row["id"] == "5":
            row["target_logprobs"] = [float("nan")] * len(row["target_logprobs"])
            row |= {name: [float("nan")] * len(row[name]) for name in row.keys() & {"target_entropy"}}
        return row

    rows = load_dataset(dataset_directory)
    bad = rows.with_format(None).map(broken, features=rows.features).with_format("numpy")
    arguments = {"max_steps": 8, "per_device_train_batch_size": 1, "train_sampling_strategy": "sequential"}
    trainer = make_trainer(tiny, dataset_directory, tmp_path, different_student(tiny), rows=bad, **arguments)
    with pytest.raises(NonFiniteError, match=r"step 6: the loss is nan on the rows 5; .* there is no checkpoint"):
        trainer.train()
    assert all(parameter.isfinite().all() for parameter in trainer.model.parameters())


def test_training_stops_where_the_gradients_overflow(tiny, dataset_directory, tmp_path):
    steps = {"max_steps": 8, "save_strategy": "steps", "save_steps": 1}
    arguments = {**steps, "learning_rate": 1e30, "lr_scheduler_type": "constant"}
    trainer = make_trainer(tiny, dataset_directory, tmp_path, different_student(tiny), **arguments)
    with pytest.raises(NonFiniteError, match=r"step 2: the (loss|norm .*) is .*; .* the last .*checkpoint-1$"):
        trainer.train()


@pytest.mark.parametrize("arguments", [{}, {"packing": True}, {"padding_free": True}, {"alpha": 0.0}])
def test_rows_whose_completion_is_cut_away_are_left_out(tiny, dataset_directory, tmp_path, arguments):
    """Prompts have 3, 4 and 5 tokens: at a length of 4 a token is left where the prompt has 3, in rows 0, 3 and 6."""
    arguments = {"max_length": 4, "per_device_train_batch_size": 1, "max_steps": -1, "num_train_epochs": 1, **arguments}
    trainer = make_trainer(tiny, dataset_directory, tmp_path, different_student(tiny), **arguments)
    trainer.train()
    assert trainer.state.log_history[-2]["num_completion_tokens"] == 3
    with pytest.raises(ValueError, match="none of the 8 rows has a completion token within max_length, 3 tokens"):
        make_trainer(tiny, dataset_directory, tmp_path, different_student(tiny), **{**arguments, "max_length": 3})


def test_arguments_that_a_user_of_trl_passes(tiny, dataset_directory, tmp_path, monkeypatch):
    """None is as if it were not given; several datasets to evaluate on are measured each."""
    monkeypatch.chdir(tmp_path)
    rows = load_dataset(dataset_directory)
    common = {"processing_class": tokenizer_of(tiny), "compute_metrics": None, "data_collator": None, "callbacks": None}
    trainer = DistillTrainer(load_model(str(tiny), dtype="float32"), None, rows, eval_dataset=None, **common)
    assert trainer.args.output_dir == "tiny-distilled"
    both = {"first": rows.select(range(4)), "last": rows.select(range(4, 8))}
    trainer = make_trainer(tiny, dataset_directory, tmp_path, eval_dataset=both)
    assert trainer.evaluate().keys() >= {"eval_first_kl", "eval_last_kl"}


def test_what_the_arguments_say_holds_of_a_given_collator(tiny, dataset_directory, tmp_path):
    settings = {"position_weights": "certainty", "reduction": "sequence", "max_length": 12, "alpha": 1.0}
    args = DistillConfig(str(tmp_path), report_to="none", use_cpu=True, bf16=False, **settings)
    rows, batches = load_dataset(dataset_directory), []
    for given in (None, DistillCollator(7)):
        trainer = DistillTrainer(load_model(str(tiny), dtype="float32"), args, rows, data_collator=given)
        batches.append(trainer.data_collator([trainer.train_dataset[number] for number in range(8)]))
    assert batches[0]["input_ids"].shape == batches[1]["input_ids"].shape
    torch.testing.assert_close(batches[0]["token_weights"], batches[1]["token_weights"])
    assert batches[0]["token_weights"].sum().item() == pytest.approx(8)


@pytest.mark.parametrize(
    ("arguments", "error", "message"),
    [
        ({"args": trl.SFTConfig(report_to="none", use_cpu=True, bf16=False)}, TypeError, "args must be a DistillConfig"),
        ({"train_dataset": None}, TypeError, "train_dataset must be a datasets.Dataset"),
        ({"train_dataset": "stream"}, TypeError, r"without streaming\), got IterableDataset"),
        ({"eval_dataset": "text"}, ValueError, "eval_dataset has no soft targets"),
        ({"eval_dataset": {"a": "rows", "b": "text"}}, ValueError, "eval_dataset b has no soft targets"),
        ({"compute_metrics": len}, ValueError, "compute_metrics is not supported"),
        ({"data_collator": list}, TypeError, "data_collator must be a DistillCollator"),
        ({"teacher": "some/model"}, TypeError, "teacher must be a loaded model"),
    ],
)
def test_arguments_that_do_not_fit(tiny, dataset_directory, text_rows, tmp_path, arguments, error, message):
    rows = load_dataset(dataset_directory)
    named = {"stream": rows.to_iterable_dataset(), "text": load_dataset(text_rows), "rows": rows}

    def given(value):
        if isinstance(value, dict):
            return {name: named.get(name) or given(inner) for name, inner in value.items()}
        return named.get(value, value) if isinstance(value, str) else value

    fine = {"args": DistillConfig(str(tmp_path), report_to="none", use_cpu=True, bf16=False), "train_dataset": rows}
    arguments = {**fine, "processing_class": tokenizer_of(tiny), **{name: given(value) for name, value in arguments.items()}}
    with pytest.raises(error, match=message):
        DistillTrainer(load_model(str(tiny), dtype="float32"), **arguments)


def test_all_tokens_are_counted_where_the_last_steps_are_not_logged(tiny, dataset_directory, tmp_path):
    """An evaluation at the end leaves the model in another mode; the last steps come with the summary all the same."""
    rows = load_dataset(dataset_directory)
    arguments = {"max_steps": 3, "logging_steps": 2, "eval_strategy": "steps", "eval_steps": 3, "per_device_train_batch_size": 2}
    trainer = make_trainer(tiny, dataset_directory, tmp_path, rows=rows, eval_dataset=rows.select(range(4)), **arguments)
    seen = []
    count = trainer._count

    def counted(inputs, sums):
        if trainer.model.training:
            seen.append(len(inputs["positions"]))
        count(inputs, sums)

    trainer._count = counted
    trainer.train()
    assert len(seen) == 3
    assert trained_tokens(trainer.state.log_history) == sum(seen)
