"""Models with random weights and rows with random targets, for benchmarks that need neither a download nor a teacher."""

import tempfile
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import numpy as np

SHAPES: dict[str, dict[str, Any]] = {
    # Random weights so large that it matters which of them are there.
    "tiny": {
        "hidden_size": 64,
        "intermediate_size": 128,
        "num_hidden_layers": 2,
        "num_attention_heads": 4,
        "initializer_range": 0.2,
    },
    # 141M parameters beside the embeddings.
    "small": {"hidden_size": 1024, "intermediate_size": 2816, "num_hidden_layers": 12, "num_attention_heads": 16},
    # SmolLM2-135M-Instruct, and what configs/showcase.yaml leaves of it.
    "teacher": {"hidden_size": 576, "intermediate_size": 1536, "num_hidden_layers": 30, "num_attention_heads": 9},
    "showcase": {"hidden_size": 576, "intermediate_size": 1536, "num_hidden_layers": 14, "num_attention_heads": 9},
}
TINY_VOCAB = 512
KEY_VALUE_HEADS = {"tiny": 2, "small": 8, "teacher": 3, "showcase": 3}


def described(kind: str, vocab_size: int, **of_targets: Any) -> dict[str, Any]:
    """What the `dataset.json` of made-up rows has to say before its shards."""
    tokenizer = {"vocabulary_hash": "none", "end_token_ids": [2], "special_token_ids": [], "chat_template": None}
    return {
        "teacher": {"model": "synthetic", "engine": "none"},
        "tokenizer": {"vocab_size": vocab_size, **tokenizer},
        "sampling": {},
        "targets": {"kind": kind, **of_targets},
        "seed": 0,
        "determinism": "synthetic",
        "source": {},
    }


def llama(shape: str, vocab: int, dtype: str = "float32", **how: Any) -> Any:
    """A llama of one of `SHAPES` with tied embeddings and random weights; `how` is given to `from_config`."""
    import torch
    from transformers import AutoModelForCausalLM, LlamaConfig

    torch.manual_seed(0)
    config = LlamaConfig(
        vocab_size=vocab, num_key_value_heads=KEY_VALUE_HEADS[shape], max_position_embeddings=8192, tie_word_embeddings=True,
        bos_token_id=1, eos_token_id=2, pad_token_id=0, **SHAPES[shape],
    )  # fmt: skip
    return AutoModelForCausalLM.from_config(config, dtype=getattr(torch, dtype), **how)


def tokenizer() -> Any:
    """A token for every byte, and a chat template."""
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers
    from transformers import PreTrainedTokenizerFast

    words = ["<pad>", "<s>", "</s>", *sorted(pre_tokenizers.ByteLevel.alphabet())]
    bare = Tokenizer(models.BPE({word: number for number, word in enumerate(words)}, []))
    bare.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    bare.decoder = decoders.ByteLevel()
    made = PreTrainedTokenizerFast(tokenizer_object=bare, pad_token="<pad>", bos_token="<s>", eos_token="</s>")
    made.chat_template = (
        "{% for message in messages %}{{ message.role + ': ' + message.content + '</s>' }}{% endfor %}"
        "{% if add_generation_prompt %}assistant: {% endif %}"
    )
    return made


def teacher(directory: Path) -> str:
    """The directory of a tiny model with its tokenizer, which is written there."""
    llama("tiny", TINY_VOCAB).save_pretrained(directory)
    tokenizer().save_pretrained(directory)
    return str(directory)


@contextmanager
def demo(smoke: bool, *stages: str) -> Iterator[list[tuple[str, str]]]:
    """Overrides for `configs/demo.yaml`: none, or those of its smallest form, in a directory where its stages are made.

    Args:
        smoke: whether the smallest form is wanted: a tiny teacher, twelve prompts, the engine `transformers`.
        stages: of the smallest form, to be made first.
    """
    if not smoke:
        yield []
        return
    from llmdistill.config import load_experiment
    from llmdistill.stages.table import STAGES

    with tempfile.TemporaryDirectory() as directory:
        settings = {
            "output": f"{directory}/run",
            "teacher.model": teacher(Path(directory) / "teacher"),
            "teacher.engine": "transformers",
            "prompts.limit": 12,
            "generate.max_tokens": 8,
            "generate.rows_per_shard": 6,
            "curate": "[]",
            "student.prune": "{layers: 1, calibration_rows: 4}",
        }
        overrides = [(key, str(value)) for key, value in settings.items()]
        for stage in stages:
            STAGES[stage].function(load_experiment(Path("configs/demo.yaml"), overrides))
        yield overrides


def rows(vocab: int, lengths: Sequence[tuple[int, int]], kind: str, kept: int, seed: int = 0) -> list[Any]:
    """A `Row` for each pair of prompt and completion lengths, its targets, if any, of random probabilities.

    Args:
        vocab: size of the vocabulary.
        lengths: tokens of each prompt and completion.
        kind: of the targets, as in `targets.kind`.
        kept: tokens a position.
        seed: of the random numbers.
    """
    from llmdistill.data.rows import Row
    from llmdistill.data.targets import KINDS

    generator, made = np.random.default_rng(seed), []
    for number, (prompt, completion) in enumerate(lengths):
        step = vocab // kept  # so that the ids of a position differ
        ids_NK = generator.integers(0, step, (completion, kept)) + step * np.arange(kept)
        scores_NK = generator.normal(size=(completion, kept)) * 2
        logprobs_NK = scores_NK - np.log(np.exp(scores_NK).sum(1, keepdims=True)) - 0.2
        soft = KINDS[kind].from_kept(ids_NK, logprobs_NK.astype(np.float32))
        written = generator.integers(3, vocab, completion)
        message = [{"role": "user", "content": ""}]
        given = generator.integers(3, vocab, prompt)
        rest = ("length", np.full(completion, -1.0, dtype=np.float32), soft)
        made.append(Row(str(number), message, message, given, written, *rest))
    return made


def dataset(made: Sequence[Any], vocab: int) -> Any:
    """The rows as `load_dataset` would give them, from memory."""
    import datasets

    from llmdistill.data.rows import rows_to_table

    return datasets.Dataset(rows_to_table(list(made), vocab)).with_format("numpy")


def plain(made: Sequence[Any]) -> Any:
    """The rows for `trl.SFTTrainer`: ids and labels alone."""
    import datasets

    ids = [[*map(int, row.prompt_ids), *map(int, row.completion_ids)] for row in made]
    labels = [[-100] * len(row.prompt_ids) + list(map(int, row.completion_ids)) for row in made]
    return datasets.Dataset.from_dict({"input_ids": ids, "labels": labels})
