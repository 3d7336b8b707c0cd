"""The bytes that each token of a vocabulary stands for.

A token is a string of bytes, not always of characters: a character may be split between tokens. Supported are byte-level BPE
(GPT-2's alphabet of 256 characters, one per byte) and SentencePiece with byte fallback (`▁` for a space, `<0x0A>` for a byte).
The result is checked against the tokenizer itself on a difficult text.
"""

import json
import re
from collections.abc import Sequence
from typing import Any

from llmdistill.errors import InputError

_BYTE = re.compile(r"<0x([0-9A-Fa-f]{2})>")
_SPACE = "\u2581"
# Runs of spaces, a contraction, CRLF, a tab, digits, characters of two to four bytes, joined emoji, code.
_PROBE = (
    "Hello  world, don't\r\n\t 12345 caf\u00e9 \U0001f600 \u65e5\u672c\u8a9e \U0001f468\u200d\U0001f469 \u0627\u0644\n\n"
    "def f(x):\n    return x"
)


def token_bytes(tokenizer: Any, key: str = "tokenizer") -> list[bytes | None]:
    """The bytes of each token by its id; None for special tokens, which are not text, and for unused ids.

    Args:
        tokenizer: a fast tokenizer of transformers.
        key: key of the configuration, for the error.

    Raises:
        InputError: if the bytes of its tokens cannot be determined.
    """
    vocabulary: dict[str, int] = tokenizer.get_vocab()
    added = tokenizer.added_tokens_decoder
    read = _byte_level if is_byte_level(tokenizer) else _sentencepiece
    found: list[bytes | None] = [None] * (max(vocabulary.values(), default=-1) + 1)
    for text, number in vocabulary.items():
        if number not in added:
            found[number] = read(text)
        elif not added[number].special:
            found[number] = added[number].content.encode()
    ids = tokenizer(_PROBE, add_special_tokens=False)["input_ids"]
    together = b"".join(found[number] or b"\xff" for number in ids)
    if together not in (_PROBE.encode(), b" " + _PROBE.encode()):
        raise InputError(
            f"{key}: cannot determine the bytes of {tokenizer.name_or_path}'s tokens: it is neither byte-level BPE nor "
            "SentencePiece with byte fallback, or it alters the text that it encodes"
        )
    return found


def is_byte_level(tokenizer: Any) -> bool:
    """Whether the tokens are written in GPT-2's alphabet, one character per byte."""
    decoder = tokenizer.backend_tokenizer.decoder
    decoder = {} if decoder is None else json.loads(decoder.__getstate__())
    return any(part.get("type") == "ByteLevel" for part in (decoder, *decoder.get("decoders", [])))


def alphabet() -> dict[str, int]:
    """GPT-2's characters for the 256 bytes: printable ones represent themselves, the others follow from U+0100."""
    printing = [*range(ord("!"), ord("~") + 1), *range(0xA1, 0xAD), *range(0xAE, 0x100)]
    others = [byte for byte in range(256) if byte not in printing]
    return {chr(byte): byte for byte in printing} | {chr(0x100 + place): byte for place, byte in enumerate(others)}


_BYTE_OF = alphabet()
_CHARACTER = {byte: character for character, byte in _BYTE_OF.items()}


def _byte_level(text: str) -> bytes:
    return bytes(_BYTE_OF[character] for character in text) if all(c in _BYTE_OF for c in text) else text.encode()


def _sentencepiece(text: str) -> bytes:
    if match := _BYTE.fullmatch(text):
        return bytes([int(match[1], 16)])
    return text.replace(_SPACE, " ").encode()


def first_tokens(tokenizer: Any, bytes_of: Sequence[bytes | None], strings: Sequence[bytes]) -> list[bytes]:
    """The first token of the encoding of each byte string, as bytes: a prefix of it.

    If the tokenizer would alter the string (a leading space, the name of a special token), or it is not a sequence of whole
    characters, only the merges are used, without the tokenizer's preprocessing; if they do not know it, the result is the first
    byte if it is in the vocabulary, else nothing.

    Args:
        tokenizer: a fast tokenizer of transformers.
        bytes_of: from `token_bytes`.
        strings: none of them empty.
    """
    found = [b""] * len(strings)
    texts = {place: text for place, string in enumerate(strings) if (text := _text(string)) is not None}
    if texts:
        encoded = tokenizer(list(texts.values()), add_special_tokens=False)["input_ids"]
        for place, ids in zip(texts, encoded, strict=True):
            found[place] = (bytes_of[ids[0]] if ids else None) or b""
    written = _in_alphabet if is_byte_level(tokenizer) else _with_marks
    known = {string for string in bytes_of if string and len(string) == 1}
    for place, string in enumerate(strings):
        if found[place] and string.startswith(found[place]):
            continue
        form = written(string)
        parts = tokenizer.backend_tokenizer.model.tokenize(form) if form else []
        found[place] = (bytes_of[parts[0].id] if parts else None) or b""
        if not found[place] or not string.startswith(found[place]):
            found[place] = string[:1] if string[:1] in known else b""
    return found


def _text(string: bytes) -> str | None:
    try:
        return string.decode()
    except UnicodeDecodeError:
        return None


def _in_alphabet(string: bytes) -> str:
    return "".join(_CHARACTER[byte] for byte in string)


def _with_marks(string: bytes) -> str | None:
    text = _text(string)
    return None if text is None else text.replace(" ", _SPACE)
