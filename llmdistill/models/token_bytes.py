"""A stand-in until the module is there: byte-level BPE alone."""

from typing import Any

from llmdistill.errors import InputError


def token_bytes(tokenizer: Any) -> list[bytes | None]:
    """The bytes of every token by its id; None for special tokens."""
    visible = [*range(33, 127), *range(161, 173), *range(174, 256)]
    hidden = [value for value in range(256) if value not in visible]
    byte_of = {chr(value): value for value in visible} | {chr(256 + place): value for place, value in enumerate(hidden)}
    found: list[bytes | None] = [None] * (max(tokenizer.get_vocab().values()) + 1)
    added = tokenizer.added_tokens_decoder
    for token, number in tokenizer.get_vocab().items():
        if number in added:
            found[number] = None if added[number].special else added[number].content.encode()
        elif any(character not in byte_of for character in token):
            raise InputError("the bytes of the tokens cannot be told")
        else:
            found[number] = bytes(byte_of[character] for character in token)
    return found
