"""A tokenizer in a GGUF file: its tokens and merges, and the pre-tokenizer of llama.cpp that corresponds to its own."""

import json
from typing import Any

from llmdistill.errors import InputError

# How text is split before its bytes are merged, by llama.cpp's name.
_SPLITS = {
    "llama-bpe": r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}{1,3}"
    r"| ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+",
    "qwen2": r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}| ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+",
}
# Text on which pre-tokenizers differ: cases, digits, marks, spaces, line ends, punctuation and many scripts.
_PROBE = (
    "Hello world, it's HERE'S camelCase WORDs don'T we'Re I'M 3.14 12345 1,000,000 ½ ²³ ٣٤٥ x2y 7a\n\n \n\t\t tab  two   "
    "three\r\n    indented(); // c++ ->\n!!!\n ...?? /a/b/\n\n\u00a0nbsp e\u0301te\u0301 naïve कान्ति ไทยนี้ 中文字符。 "
    "日本語 한국어 👩‍💻🚀🚀 _under_score_ $100 #tag @me <|x|> {'k': [1]}\u2028\u3000wide \ufeff end  "
)


def check_vocabulary(tokenizer: Any, vocab_size: int) -> None:
    """Refuse a tokenizer without an equivalent in llama.cpp.

    Raises:
        InputError: names the reason.
    """
    _splitting(tokenizer)
    if (largest := max(tokenizer.get_vocab().values())) >= vocab_size:
        raise InputError(
            f"export.formats has gguf: the tokenizer has a token {largest:,}, the student only {vocab_size:,} tokens"
        )


def write_vocabulary(writer: Any, tokenizer: Any, vocab_size: int, ends: list[int]) -> None:
    """Write tokens, merges, special tokens and the chat template.

    Args:
        writer: writer of the file.
        tokenizer: accepted by `check_vocabulary`.
        vocab_size: size of the embeddings, which may have more rows than there are tokens.
        ends: the tokens that end an answer.
    """
    import gguf

    texts, kinds = [f"[PAD{number}]" for number in range(vocab_size)], [gguf.TokenType.UNUSED] * vocab_size
    added = tokenizer.added_tokens_decoder
    for text, number in tokenizer.get_vocab().items():
        texts[number], kinds[number] = text, gguf.TokenType.NORMAL
        if number in added:
            kinds[number] = gguf.TokenType.CONTROL if added[number].special else gguf.TokenType.USER_DEFINED
    writer.add_tokenizer_model("gpt2")  # bytes, merged
    writer.add_tokenizer_pre(_splitting(tokenizer))
    writer.add_token_list(texts)
    writer.add_token_types(kinds)
    writer.add_token_merges([merge if isinstance(merge, str) else " ".join(merge) for merge in _definition(tokenizer)["merges"]])
    ids = {"bos": tokenizer.bos_token_id, "unk": tokenizer.unk_token_id, "pad": tokenizer.pad_token_id}
    own_first = sorted(ends, key=lambda end: end != tokenizer.eos_token_id)
    ids |= dict(zip(("eos", "eot", "eom"), own_first, strict=False))  # llama.cpp stops at each
    for name, number in ids.items():
        if number is not None:
            getattr(writer, f"add_{name}_token_id")(number)
    writer.add_add_bos_token(adds_begin(tokenizer))
    writer.add_add_eos_token(False)
    if tokenizer.chat_template:
        writer.add_chat_template(tokenizer.chat_template)


def adds_begin(tokenizer: Any) -> bool:
    """Whether it writes its first token before every text."""
    return tokenizer.bos_token_id is not None and tokenizer("a")["input_ids"][0] == tokenizer.bos_token_id


def _definition(tokenizer: Any) -> dict[str, Any]:
    """The model of `tokenizer.json`; one without a type for a tokenizer that has no such file."""
    backend = getattr(tokenizer, "backend_tokenizer", None)
    return dict(json.loads(backend.to_str())["model"]) if backend else {"type": None}


def _splitting(tokenizer: Any) -> str:
    """llama.cpp's name for the tokenizer's way of splitting text: the one that splits a difficult text identically.

    Raises:
        InputError: if it is not a byte-level BPE, or splits or normalises text differently from all of them.
    """
    from tokenizers import Regex, pre_tokenizers

    plain = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)
    gpt2 = pre_tokenizers.ByteLevel(add_prefix_space=False)
    ways = {"gpt-2": gpt2, "smollm": pre_tokenizers.Sequence([pre_tokenizers.Digits(individual_digits=True), gpt2])}
    for name, regex in _SPLITS.items():
        ways[name] = pre_tokenizers.Sequence([pre_tokenizers.Split(Regex(regex), "isolated"), plain])
    definition = _definition(tokenizer)
    if definition["type"] == "BPE" and not definition.get("byte_fallback"):
        backend = tokenizer.backend_tokenizer
        normalises = backend.normalizer is not None and type(backend.normalizer).__name__ != "NFC"
        if backend.pre_tokenizer is not None and not normalises:
            pieces = backend.pre_tokenizer.pre_tokenize_str(_PROBE)
            for name, way in ways.items():
                if way.pre_tokenize_str(_PROBE) == pieces:
                    return name
    known = ", ".join(ways)
    raise InputError(f"export.formats has gguf, which is written for tokenizers that merge bytes and split text as {known} do")
