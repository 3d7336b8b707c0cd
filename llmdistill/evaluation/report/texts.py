"""Individual texts: the answer that training changed most, and held-out text token by token."""

import difflib
from typing import Any

from llmdistill.evaluation.report.words import visible

Json = dict[str, Any]


def largest_change(samples: list[Json]) -> Json | None:
    """The sample whose answer training has brought closest to the teacher's; None if there is none."""

    def gain(sample: Json) -> float:
        teacher, before, after = (sample["answers"][name].split() for name in ("teacher", "student before", "student"))
        return _likeness(teacher, after) - _likeness(teacher, before)

    both = [sample for sample in samples if {"teacher", "student before", "student"} <= sample["answers"].keys()]
    best = max(both, key=gain, default=None)
    return best if best and gain(best) > 0 else None


def _likeness(first: list[str], second: list[str]) -> float:
    """The share of words that two texts have in common, in the same order."""
    return difflib.SequenceMatcher(None, first, second, autojunk=False).ratio()


# Lower bounds of a token's KL in nats for the darker shades.
_SHADES = (0.05, 0.2, 0.5, 1.0, 2.0)


def view_of_tokens(view: Json) -> Json:
    """A text token by token, in words that do not break across lines; tokens have a shade and both models' predictions."""
    words: list[Json] = []
    for token in view["tokens"]:
        before, shown, after = _parts(token["text"])
        if not words or before or words[-1]["tokens"][-1]["after"]:
            words.append({"tokens": [], "letters": 0})
        shade = sum(token["kl"] >= least for least in _SHADES)
        words[-1]["tokens"].append({**token, "shade": shade, "before": before, "shown": shown, "after": after})
        words[-1]["letters"] += len(shown)
    kl = [token["kl"] for token in view["tokens"]]
    return {"prompt": view["prompt"], "words": words, "kl": sum(kl) / max(len(kl), 1), "count": len(kl)}


def _parts(token: str) -> tuple[str, str, str]:
    """A token's leading and trailing white space, and the rest; if there is nothing else, white space is shown as symbols."""
    if not token.strip():
        return "", visible(token), "\n" if "\n" in token else ""
    shown = token.strip()
    before, _, after = token.partition(shown)
    return before, shown, after
