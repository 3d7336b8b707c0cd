"""The fused loss under FSDP2: two processes, each with half of the rows, have the gradients of one with all of them."""

import pytest
import torch
import torch.multiprocessing
from torch.distributed.fsdp import MixedPrecisionPolicy, fully_shard

from llmdistill.data.collator import DistillCollator
from llmdistill.losses import Objective, fused
from llmdistill.models.forward import in_place_of_logits
from tests.losses.test_divergences import topk
from tests.losses.test_fused import SMALL, K, build

pytestmark = pytest.mark.slow

BF16 = MixedPrecisionPolicy(param_dtype=torch.bfloat16, reduce_dtype=torch.float32, output_dtype=torch.bfloat16)
# Of each: the model; which modules are sharded, with what, before the root; whether layers are computed again; and adapters.
CASES = {
    "root alone": ("llama", [], {}, False, False),
    "root alone, tied": ("llama tied", [], {}, False, False),
    "layers": ("llama", ["layers"], {}, False, False),
    "layers, tied": ("llama tied", ["layers"], {}, False, False),
    "layers, kept whole until the backward pass": ("llama tied", ["layers"], {"reshard_after_forward": False}, False, False),
    "head on its own": ("llama", ["layers", "head"], {}, False, False),
    "head on its own, kept whole": ("llama", ["layers", "head"], {"reshard_after_forward": False}, False, False),
    "as accelerate does": ("llama", ["layers", "embedding", "norm and head"], {}, False, False),
    "as accelerate does, tied": ("llama tied", ["layers", "norm and embedding and head"], {}, False, False),
    "layers computed again": ("llama", ["layers", "norm and head"], {}, True, False),
    "layers computed again, tied": ("llama tied", ["layers"], {}, True, False),
    "scaled and capped": ("gemma2", ["layers", "norm and embedding and head"], {}, False, False),
    "with a bias": ("phi", ["layers", "head"], {}, False, False),
    "in bfloat16": ("llama", ["layers", "norm and head"], {"mp_policy": BF16}, False, False),
    "in bfloat16, tied": ("llama tied", ["layers", "norm and embedding and head"], {"mp_policy": BF16}, True, False),
    "adapters": ("llama", ["layers", "norm and head"], {}, False, True),
    "adapters, tied": ("llama tied", ["layers"], {}, True, True),
}


def batch_of(rows):
    """Three sequences of unlike length, or some of them, with targets."""
    generator = torch.Generator().manual_seed(3)
    sequences = [torch.randint(3, SMALL["vocab_size"], (length,), generator=generator) for length in (9, 12, 5, 7)]
    starts = (4, 3, 4, 1)
    ids, logprobs, tail = topk(torch.randn(sum((5, 9, 1, 6)), SMALL["vocab_size"], generator=generator), K)
    whole = [{"input_ids": s.numpy(), "completion_start": start} for s, start in zip(sequences, starts, strict=True)]
    edges = [0, 5, 14, 15, 21]
    here = torch.cat([torch.arange(edges[row], edges[row + 1]) for row in rows])
    batch = DistillCollator(0)([whole[row] for row in rows])
    targets = {"target_ids": ids[here], "target_logprobs": logprobs[here], "target_tail": tail[here]}
    return {**batch, **targets, "target_kind": "topk"}


def loss_of(model, head, rows):
    batch = batch_of(rows)
    labels = batch["labels"][batch["labels"] != -100]
    objective = Objective("jsd", 0.6)
    return in_place_of_logits(model, batch, lambda hidden: fused.distillation_loss(hidden, head, labels, batch, objective))[0]


def model_of(name, again, adapters):
    model, _, _ = build(name)
    model.train()
    if adapters:
        from peft import LoraConfig, get_peft_model

        model = get_peft_model(model, LoraConfig(r=2, target_modules="all-linear", init_lora_weights=False))
    if again:
        model.gradient_checkpointing_enable(gradient_checkpointing_kwargs={"use_reentrant": False})
        model.enable_input_require_grads()
    return model, fused.find_head(model)


def shard(model, parts, options):
    base = model.get_base_model() if hasattr(model, "get_base_model") else model
    decoder, head = base.get_decoder(), base.get_output_embeddings()
    norm = getattr(decoder, "norm", None) or decoder.final_layernorm
    groups = {
        "embedding": decoder.embed_tokens,
        "head": head,
        "norm and head": [norm, head],
        "norm and embedding and head": [norm, decoder.embed_tokens, head],
    }
    for part in parts:
        for module in decoder.layers if part == "layers" else [groups[part]]:
            fully_shard(module, **options)
    fully_shard(model, **options)


def work(rank, store, file):
    torch.set_num_threads(1)
    torch.distributed.init_process_group("gloo", init_method=f"file://{store}", rank=rank, world_size=2)
    found = {}
    for name, (family, parts, options, again, adapters) in CASES.items():
        model, head = model_of(family, again, adapters)
        shard(model, parts, options)
        assert head.is_in(model), f"{name}: the fused form is used"
        for _ in range(2):  # what one step leaves behind must not disturb the next
            model.zero_grad()
            model.set_requires_gradient_sync(False)  # as under gradient accumulation
            (loss_of(model, head, [2 * rank]) * 2).backward()
            model.set_requires_gradient_sync(True)
            loss = loss_of(model, head, [2 * rank + 1])
            (loss * 2).backward()
        found[name] = {key: p.grad.full_tensor() for key, p in model.named_parameters() if p.grad is not None}
        assert loss.dtype == torch.float32
    if rank == 0:
        torch.save(found, file)
    torch.distributed.destroy_process_group()


@pytest.fixture(scope="module")
def sharded(tmp_path_factory):
    directory = tmp_path_factory.mktemp("sharded")
    torch.multiprocessing.spawn(work, (str(directory / "store"), str(directory / "found.pt")), nprocs=2)
    return torch.load(directory / "found.pt", weights_only=True)


def gradients(model, head):
    model.zero_grad()
    loss_of(model, head, [0, 1, 2, 3]).backward()
    return {key: p.grad.float() for key, p in model.named_parameters() if p.grad is not None}


@pytest.mark.parametrize("name", CASES)
def test_gradients_are_those_of_one_process(sharded, name):
    family, _, options, again, adapters = CASES[name]
    model, head = model_of(family, again, adapters)
    exact = gradients(model, head)
    # Float32 rounds by the shapes of the products, differently on every processor: as far from float64 as one process is, but
    # for chance.
    wide = model_of(family, again, adapters)[0].double()
    truth = gradients(wide, fused.find_head(wide))
    errors = {key: 1e-5 * gradient.norm() + 5 * (truth[key] - gradient).norm() for key, gradient in exact.items()}
    if "mp_policy" in options:  # no farther from the exact ones than a process of its own in bfloat16, but for chance
        rounded = gradients(model.bfloat16(), head)
        errors = {key: 1.5 * (rounded[key] - gradient).norm() for key, gradient in exact.items()}
    assert sharded[name].keys() == exact.keys()
    for key, gradient in exact.items():
        assert (sharded[name][key] - gradient).norm() <= errors[key], key


def test_a_weight_that_zero_3_spread_is_not_for_the_fused_form():
    model, _, _ = build("llama")
    model.get_output_embeddings().weight.ds_id = 0
    assert fused.find_head(model) is None
