"""Checks whether the parts of a model to keep exist, from its `config.json` alone, without torch."""

from collections.abc import Mapping
from typing import Any

from llmdistill.config.student import Prune
from llmdistill.errors import InputError

# Keys of `student.prune`, and of a model's configuration.
_KEYS = {"intermediate_size": "intermediate_size", "key_value_heads": "num_key_value_heads", "hidden_size": "hidden_size"}


def check_sizes(prune: Prune, config: Mapping[str, Any]) -> None:
    """Refuse to keep more than there is. Sizes missing from the configuration are checked after loading the model.

    Args:
        prune: the section of the configuration.
        config: the teacher's `config.json`, or its text part.

    Raises:
        InputError: names the key.
    """
    if (count := config.get("num_hidden_layers")) is not None:
        _check_layers(prune.layers, count)
    for key, of in _KEYS.items():
        asked, size = getattr(prune, key), config.get(of)
        if asked is not None and size is not None and asked > size:
            raise InputError(f"student.prune.{key} is {asked:,}, but the teacher has {size:,}")


def _check_layers(layers: int | list[int] | None, count: int) -> None:
    if isinstance(layers, list):
        if not layers or sorted(set(layers)) != layers or not 0 <= layers[0] <= layers[-1] < count:
            raise InputError(f"student.prune.layers must be ascending layer numbers from 0 to {count - 1}, got {layers}")
    elif layers is not None and not 1 <= layers <= count:
        raise InputError(f"student.prune.layers is {layers}, but the teacher has {count} layers")
