"""Models with random weights and rows with random targets, for benchmarks that need neither a download nor a teacher."""

from collections.abc import Sequence
from typing import Any

import numpy as np

SHAPES = {
    "tiny": {"hidden_size": 32, "intermediate_size": 64, "num_hidden_layers": 2, "num_attention_heads": 2},
    # 141M parameters beside the embeddings.
    "small": {"hidden_size": 1024, "intermediate_size": 2816, "num_hidden_layers": 12, "num_attention_heads": 16},
    # SmolLM2-135M-Instruct, and what configs/showcase.yaml leaves of it.
    "teacher": {"hidden_size": 576, "intermediate_size": 1536, "num_hidden_layers": 30, "num_attention_heads": 9},
    "showcase": {"hidden_size": 576, "intermediate_size": 1536, "num_hidden_layers": 14, "num_attention_heads": 9},
}
KEY_VALUE_HEADS = {"tiny": 1, "small": 8, "teacher": 3, "showcase": 3}


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
    """One that trainers accept; nothing is tokenised."""
    from tokenizers import Tokenizer, models
    from transformers import PreTrainedTokenizerFast

    words = {"<pad>": 0, "<s>": 1, "</s>": 2}
    bare = Tokenizer(models.WordLevel(words, unk_token="<pad>"))
    return PreTrainedTokenizerFast(tokenizer_object=bare, pad_token="<pad>", bos_token="<s>", eos_token="</s>")


def rows(vocab: int, lengths: Sequence[tuple[int, int]], kind: str, kept: int, seed: int = 0) -> list[Any]:
    """A `Row` for each pair of prompt and completion lengths, its targets, if any, of random probabilities.

    Args:
        vocab: size of the vocabulary.
        lengths: tokens of each prompt and completion.
        kind: of the targets, as in `targets.kind`.
        kept: tokens a position.
        seed: of the random numbers.
    """
    from llmdistill.data.dataset import Row
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

    from llmdistill.data.dataset import rows_to_table

    return datasets.Dataset(rows_to_table(list(made), vocab)).with_format("numpy")


def plain(made: Sequence[Any]) -> Any:
    """The rows for `trl.SFTTrainer`: ids and labels alone."""
    import datasets

    ids = [[*map(int, row.prompt_ids), *map(int, row.completion_ids)] for row in made]
    labels = [[-100] * len(row.prompt_ids) + list(map(int, row.completion_ids)) for row in made]
    return datasets.Dataset.from_dict({"input_ids": ids, "labels": labels})
