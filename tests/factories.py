"""What tests are made of: small real models, rows, datasets and experiments."""

import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

VOCAB = 4096  # tokens of the tiny model: a twelfth of the demo teacher's, and all steps over the vocabulary that much faster


def write_tiny(directory: Path, smollm2: Path, vocab_size: int = VOCAB) -> Path:
    """A random llama with the first tokens of the demo teacher's vocabulary: 4 layers, hidden size 32, in float32."""
    import torch
    from transformers import AutoTokenizer

    directory.mkdir(parents=True)
    AutoTokenizer.from_pretrained(smollm2).save_pretrained(directory)
    file = directory / "tokenizer.json"
    tree = json.loads(file.read_text())
    bpe = tree["model"]  # a merge makes a token of two that come before it
    bpe["vocab"] = {token: number for token, number in bpe["vocab"].items() if number < vocab_size}
    bpe["merges"] = [pair for pair in bpe["merges"] if "".join(pair) in bpe["vocab"]]
    file.write_text(json.dumps(tree))
    torch.manual_seed(0)
    sizes = {"num_hidden_layers": 4, "max_position_embeddings": 256, "initializer_range": 0.4}
    return _write_llama(directory, AutoTokenizer.from_pretrained(directory), vocab_size, 1, 2, **sizes)


def write_tiny_for_vllm(directory: Path, smollm2: Path) -> Path:
    """A random llama that vLLM runs on a CPU, where heads have to have at least 32 channels; with 512 positions."""
    import torch
    from transformers import AutoTokenizer

    torch.manual_seed(0)
    sizes = {"hidden_size": 128, "num_hidden_layers": 2, "max_position_embeddings": 512, "initializer_range": 0.3}
    return _write_llama(directory, AutoTokenizer.from_pretrained(smollm2), 49152, 1, 2, **sizes)


def _write_llama(directory: Path, tokenizer: Any, vocab_size: int, begin: int, end: int, **sizes: Any) -> Path:
    """A random llama of hidden size 32, if not told otherwise, with its tokenizer; `begin` and `end` are tokens."""
    from transformers import GenerationConfig, LlamaConfig, LlamaForCausalLM

    ids = {"bos_token_id": begin, "eos_token_id": end, "pad_token_id": end}
    config = LlamaConfig(
        vocab_size=vocab_size,
        intermediate_size=64,
        num_attention_heads=4,
        num_key_value_heads=2,
        tie_word_embeddings=True,
        **ids,
        **{"hidden_size": 32, **sizes},
    )
    model = LlamaForCausalLM(config)
    model.generation_config = GenerationConfig(**ids)
    model.save_pretrained(directory)
    tokenizer.save_pretrained(directory)
    return directory


def nearby(model: Path) -> Any:
    """The model with noise on every weight, as a student that is not far."""
    import torch

    from llmdistill.models.loading import load_model

    torch.manual_seed(3)
    student = load_model(str(model))
    with torch.no_grad():
        for parameter in student.parameters():
            parameter.add_(torch.randn_like(parameter) * 0.03)
    return student


def write_noisy(model: Path, directory: Path, seed: int, noise: float = 0.1, padding: int = 0) -> Path:
    """A model that is like another one but for some noise, with its output layer padded by some tokens."""
    import torch
    from transformers import AutoTokenizer

    from llmdistill.models.loading import load_model

    other = load_model(str(model), dtype="float32")
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for parameter in other.parameters():
            parameter.add_(torch.randn(parameter.shape, generator=generator) * noise)
    if padding:
        other.resize_token_embeddings(other.config.vocab_size + padding, mean_resizing=False)
    other.save_pretrained(directory)
    AutoTokenizer.from_pretrained(model).save_pretrained(directory)
    return directory


def sized(kind: str, size: int) -> Any:
    """Targets of a kind with so many tokens a position."""
    from llmdistill.config import Targets
    from llmdistill.data.targets import KINDS

    of_kind = KINDS[kind].size
    return Targets(kind=kind, **({of_kind: size} if of_kind else {}))


def most_likely(logprobs_NV: Any, k: int) -> Any:
    """Top-k targets of full distributions; equal log-probabilities are taken in the order of their ids."""
    import numpy as np

    from llmdistill.data.targets import TopK

    ids_NK = np.argsort(-logprobs_NV, axis=1, kind="stable")[:, :k]
    return TopK.from_kept(ids_NK, np.take_along_axis(logprobs_NV, ids_NK, axis=1))


def make_row(name: str, prompt_ids: Any, completion_ids: Any, token_logprobs: Any = None, soft: Any = None) -> Any:
    """A row whose prompt and answer read as its name; the teacher's log-probabilities are zero unless given."""
    import numpy as np

    from llmdistill.data.rows import Row

    message = [{"role": "user", "content": name}]
    logprobs = np.zeros(len(completion_ids)) if token_logprobs is None else token_logprobs
    return Row(name, message, message, list(prompt_ids), completion_ids, "stop", logprobs, soft)


def described(kind: str = "none", vocab_size: int = VOCAB, **of_targets: Any) -> dict[str, Any]:
    """What a `dataset.json` has to say before its shards."""
    tokenizer = {"vocabulary_hash": "x", "end_token_ids": [2], "special_token_ids": [0, 2], "chat_template": None}
    return {
        "teacher": {"model": "t", "engine": "x"},
        "tokenizer": {"vocab_size": vocab_size, **tokenizer},
        "sampling": {},
        "targets": {"kind": kind, **of_targets},
        "seed": 0,
        "determinism": "none",
    }


def write_rows(directory: Path, rows: Sequence[Any], kind: str, vocab_size: int = VOCAB, **of_targets: Any) -> Path:
    """A dataset of one shard, with the manifest that training needs."""
    from llmdistill.data.manifest import write_manifest
    from llmdistill.data.rows import rows_to_table
    from llmdistill.data.shard_writer import finished_shards, write_shard
    from llmdistill.data.targets import KINDS

    if size := KINDS[kind].size:
        of_targets.setdefault(size, rows[0].targets.ids_NK.shape[1])
    write_shard(directory, "train", 0, 1, rows_to_table(list(rows), vocab_size))
    write_manifest(directory, finished_shards(directory, "train"), described(kind, vocab_size, **of_targets))
    return directory


def write_experiment(tiny: Path, directory: Path) -> Path:
    """A complete small experiment on the tiny model with the exact engine."""
    prompts = directory / "prompts.jsonl"
    prompts.write_text("".join(f'{{"prompt": "Say {number} in words."}}\n' for number in range(24)))
    file = directory / "experiment.yaml"
    file.write_text(f"""
output: {directory}/run
teacher: {{model: {tiny}, engine: transformers, dtype: float32, batch_size: 4}}
prompts: {{source: {prompts}}}
generate: {{max_tokens: 8, rows_per_shard: 6}}
targets: {{kind: topk, k: 8}}
student: {{prune: {{layers: 2}}}}
train:
  args: {{max_steps: 3, per_device_train_batch_size: 2, learning_rate: 1.0e-3, gradient_checkpointing: false, bf16: false}}
eval: {{held_out: 0.25, resamples: 200, samples: 1, sample_tokens: 4}}
""")
    return file


def write_cut_experiment(smollm2: Path, directory: Path) -> Path:
    """Six prompts for the real vLLM, whose answers are all cut, so that `curate` finds nothing to train on and ends the run."""
    file = directory / "experiment.yaml"
    file.write_text(f"""
output: {directory}/run
teacher: {{model: {smollm2}, engine: vllm}}
prompts: {{source: prompts/seeds/general.jsonl, template: prompts/instruct.yaml, limit: 6}}
generate: {{max_tokens: 4, rows_per_shard: 2}}
curate: [{{finish_reason: }}]
student: {{prune: {{layers: 20}}}}
eval: {{held_out: 0.3}}
""")
    return file


CHATML = (
    "{% for message in messages %}<|im_start|>{{ message['role'] }}\n{{ message['content'] }}<|im_end|>\n{% endfor %}"
    "{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}"
)
INST = (
    "{{ bos_token }}{% for message in messages %}{% if message['role'] == 'user' %}[INST] {{ message['content'] }} [/INST]"
    "{% else %} {{ message['content'] }}{{ eos_token }}{% endif %}{% endfor %}"
)


def tekken_tokenizer() -> Any:
    """Mistral's byte-level tokenizer of 131,072 tokens, from mistral_common."""
    import mistral_common
    from transformers.integrations.mistral import convert_tekken_tokenizer

    return convert_tekken_tokenizer(str(Path(mistral_common.__file__).parent / "data" / "tekken_240911.json"))


def sentencepiece_tokenizer() -> Any:
    """Mistral's SentencePiece tokenizer of 32,768 tokens, with byte fallback and a space in front, and a template."""
    import shutil
    import tempfile

    import mistral_common
    from transformers import LlamaTokenizerFast

    with tempfile.TemporaryDirectory() as directory:
        source = Path(mistral_common.__file__).parent / "data" / "mistral_instruct_tokenizer_240323.model.v3"
        shutil.copy(source, Path(directory) / "tokenizer.model")
        tokenizer = LlamaTokenizerFast.from_pretrained(directory)
    tokenizer.chat_template = INST
    return tokenizer


def small_tokenizer(text: str, size: int = 600) -> Any:
    """A byte-level BPE learnt on some text, with ChatML."""
    from tokenizers import AddedToken, Tokenizer, decoders, models, pre_tokenizers, trainers
    from transformers import PreTrainedTokenizerFast

    made = Tokenizer(models.BPE())
    made.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    made.decoder = decoders.ByteLevel()
    special = ["<|endoftext|>", "<|im_start|>", "<|im_end|>"]
    alphabet = pre_tokenizers.ByteLevel.alphabet()
    made.train_from_iterator([text], trainers.BpeTrainer(vocab_size=size, special_tokens=special, initial_alphabet=alphabet))
    made.add_special_tokens([AddedToken(name, special=True) for name in special])
    tokenizer = PreTrainedTokenizerFast(tokenizer_object=made, eos_token="<|im_end|>", bos_token="<|endoftext|>")
    tokenizer.chat_template = CHATML
    return tokenizer


def write_foreign(
    directory: Path, text: str = "the cat sat on the mat, and then the other cat said that ", size: int = 600
) -> Path:
    """A random llama of 2 layers whose tokenizer is not the demo teacher's; in float32."""
    import torch

    tokenizer = small_tokenizer(text, size)
    torch.manual_seed(1)
    end = tokenizer.convert_tokens_to_ids("<|im_end|>")
    return _write_llama(directory, tokenizer, len(tokenizer), 0, end, num_hidden_layers=2, max_position_embeddings=512)
