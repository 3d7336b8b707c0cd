"""The complete algorithm in one file: a teacher writes, its distributions are sampled, and a student learns from both.

    python examples/distill_loop.py models/SmolLM2-135M-Instruct --layers 15 --steps 60

It is not fast, does not resume and stores nothing on disk; that is what the package is for. A test checks that the loss is
the same. Shapes: N completion tokens, V vocabulary, n targets per position.
"""

import argparse
import json
from pathlib import Path

import torch
from transformers import AutoModelForCausalLM, AutoTokenizer


def main():
    """Generate, prune the student, train, and print its distance from the teacher on held-out rows every ten steps."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("teacher")
    parser.add_argument("--prompts", default="prompts/seeds/general.jsonl")
    parser.add_argument("--rows", type=int, default=48, help="prompts; every sixth is held out")
    parser.add_argument("--tokens", type=int, default=64, help="longest completion")
    parser.add_argument("--layers", type=int, default=15, help="layers that the student keeps")
    parser.add_argument("--n", type=int, default=16, help="targets per position")
    parser.add_argument("--steps", type=int, default=60)
    parser.add_argument("--alpha", type=float, default=0.9, help="weight of the soft targets; the rest is cross-entropy")
    parser.add_argument("--learning-rate", type=float, default=1e-3)
    arguments = parser.parse_args()
    torch.manual_seed(0)

    tokenizer = AutoTokenizer.from_pretrained(arguments.teacher)
    teacher = AutoModelForCausalLM.from_pretrained(arguments.teacher, dtype=torch.float32).eval()
    lines = Path(arguments.prompts).read_text().splitlines()[: arguments.rows]
    questions = [json.loads(line)["instruction"] for line in lines]
    rows = [write(teacher, tokenizer, question, arguments.tokens, arguments.n) for question in questions]
    held_out, rows = rows[::6], [row for number, row in enumerate(rows) if number % 6]

    student = half(teacher, arguments.layers)
    optimizer = torch.optim.AdamW(student.parameters(), lr=arguments.learning_rate, weight_decay=0.0)
    print(f"before: {distance(teacher, student, held_out):.3f} nats per token from the teacher")
    for step in range(arguments.steps):
        batch = [rows[(step * 4 + offset) % len(rows)] for offset in range(4)]
        tokens = sum(len(row["logprobs"]) for row in batch)
        for row in batch:  # one at a time, so no padding; the sum is divided by the tokens of the batch
            (loss(student, row, arguments.alpha) / tokens).backward()
        torch.nn.utils.clip_grad_norm_(student.parameters(), 1.0)
        optimizer.step()
        optimizer.zero_grad()
        if step % 10 == 9:
            print(f"step {step + 1}: {distance(teacher, student, held_out):.3f}", flush=True)


@torch.no_grad()
def write(teacher, tokenizer, question, tokens, n):
    """The teacher answers a question at temperature 1, and n tokens of its distribution are drawn at every position."""
    chat = [{"role": "user", "content": question}]
    prompt = tokenizer.apply_chat_template(chat, add_generation_prompt=True, return_tensors="pt", return_dict=True)["input_ids"]
    ids = teacher.generate(prompt, max_new_tokens=tokens, do_sample=True, top_k=0, top_p=1.0, pad_token_id=0)
    start = prompt.shape[1]
    log_p = teacher(ids).logits[0, start - 1 : -1].log_softmax(-1)  # the distribution of token t is at t − 1
    targets, weights = draw(log_p.exp().double(), n)
    return {"ids": ids, "start": start, "targets": targets, "weights": weights, "logprobs": log_p.gather(1, targets)}


def draw(p, n):
    """Draw n tokens per position so that Σ weight · f has the mean Σ p · f, for any f: ids and weights, both (N, n).

    A token is kept with probability min(1, p/τ), and these add up to n. Tokens above τ are always kept, with their own
    probability as weight; the others by systematic sampling, with weight τ.
    """
    top = p.topk(n)
    before = top.values.cumsum(1) - top.values
    tau = (1 - before).clamp(min=0) / (n - torch.arange(n))  # if the first 0, 1, … n − 1 tokens are above it
    above = (top.values > tau).int().cumprod(1).bool()
    above[:, -1] = False
    exact = above.sum(1, keepdim=True)
    rest = p.scatter(1, top.indices, torch.where(above, 0.0, top.values)).cumsum(1)
    left = rest[:, -1:]
    places = (torch.rand(len(p), 1, dtype=p.dtype) + torch.arange(n)) / (n - exact) * left  # one in each of n − exact parts
    drawn = torch.searchsorted(rest, places.clamp(max=left * (1 - 1e-12)), right=True).clamp(max=p.shape[1] - 1)
    drawn = drawn.gather(1, (torch.arange(n) - exact).clamp(min=0))
    weights = torch.where(above, top.values, left / (n - exact))
    return torch.where(above, top.indices, drawn), weights.float()


def loss(student, row, alpha):
    """Summed over the completion: (1 − α) · cross-entropy + α · KL(teacher ‖ student), the KL estimated from the sample."""
    ids, start = row["ids"], row["start"]
    log_q = student(ids).logits[0, start - 1 : -1].float().log_softmax(-1)
    cross_entropy = -log_q.gather(1, ids[0, start:, None]).sum()
    entropy = -(row["weights"] * row["logprobs"]).sum()
    kl = -(row["weights"] * log_q.gather(1, row["targets"])).sum() - entropy
    return (1 - alpha) * cross_entropy + alpha * kl


def half(teacher, layers):
    """The teacher with this number of its layers, evenly spaced."""
    student = AutoModelForCausalLM.from_pretrained(teacher.name_or_path, dtype=torch.float32)
    kept = [round(number) for number in torch.linspace(0, len(student.model.layers) - 1, layers).tolist()]
    student.model.layers = torch.nn.ModuleList(student.model.layers[number] for number in kept)
    student.config.num_hidden_layers = layers
    for number, layer in enumerate(student.model.layers):
        layer.self_attn.layer_idx = number
    return student


@torch.no_grad()
def distance(teacher, student, rows):
    """KL(teacher ‖ student) over the full vocabulary, in nats per token."""
    total, tokens = 0.0, 0
    for row in rows:
        log_p, log_q = (model(row["ids"]).logits[0, row["start"] - 1 : -1].log_softmax(-1) for model in (teacher, student))
        total += float((log_p.exp() * (log_p - log_q)).sum())
        tokens += len(log_p)
    return total / tokens


if __name__ == "__main__":
    main()
