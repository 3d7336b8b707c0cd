"""The licence of a model, as given on its card, and what licences say about training on a model's output."""

import re
from pathlib import Path
from typing import Any

import yaml

# By the Hub's name of a licence. The facts follow the texts of the licences; a summary is not legal advice.
_OTHERS = "forbids using its output to improve language models outside its own family"
_NAMED = "requires a model trained on its output to have a name that begins with “Llama” and to include the licence"
_BINDS_OUTPUT = {
    "llama2": f"the Llama 2 licence {_OTHERS}",
    "llama3": f"the Llama 3 licence {_OTHERS}",
    "llama3.1": f"the Llama 3.1 licence {_NAMED}",
    "llama3.2": f"the Llama 3.2 licence {_NAMED}",
    "llama3.3": f"the Llama 3.3 licence {_NAMED}",
    "llama4": f"the Llama 4 licence {_NAMED}",
    "gemma": "the Gemma terms treat a model trained on its output or distributions as a derivative that they apply to",
}


def licence_of(model: str, revision: str | None = None) -> dict[str, str]:
    """The licence given on the card in a model's directory or in its repository on the Hub; empty if it cannot be read.

    Returns:
        `license`, and `license_name` and `license_link` if that is `other`.
    """
    card = Path(model) / "README.md"
    if not Path(model).is_dir():
        from huggingface_hub import hf_hub_download
        from huggingface_hub.errors import HfHubHTTPError, HFValidationError

        try:
            card = Path(hf_hub_download(model, "README.md", revision=revision))
        except (HfHubHTTPError, HFValidationError, OSError, ValueError):  # no such file, no such repository, no network
            return {}
    return _head(card)


def named(licence: str) -> dict[str, str]:
    """A licence given by the Hub's name for it, or by terms or their address, in the form of `licence_of`."""
    if re.fullmatch(r"[a-z0-9][a-z0-9.+-]*", licence):
        return {"license": licence}
    return {"license": "other", "license_link" if licence.startswith("http") else "license_name": licence}


def _head(card: Path) -> dict[str, str]:
    try:
        parts = card.read_text(encoding="utf-8").split("---", 2)
        head: Any = yaml.safe_load(parts[1]) if len(parts) == 3 and not parts[0].strip() else None
    except (OSError, ValueError, yaml.YAMLError, RecursionError):  # the YAML loader raises ValueError for an invalid date
        return {}
    names = ("license", "license_name", "license_link")
    return {name: str(head[name]) for name in names if name in head} if isinstance(head, dict) else {}


def restriction(licence: dict[str, str]) -> str | None:
    """What a licence says about models that learn from the output, if known."""
    name = (licence.get("license_name") or licence.get("license") or "").lower()
    if "-nc" in name:
        return f"the licence {name} allows no commercial use"
    return _BINDS_OUTPUT.get(name) or _BINDS_OUTPUT.get(licence.get("license", ""))


def sentence(licence: dict[str, str]) -> str:
    """The licence and its restrictions, for a card."""
    if not licence:
        return (
            "The licence of the teacher is not known to llmdistill. "
            "It and the licence of the prompts may apply to what is made from them."
        )
    bound = restriction(licence)
    warning = f" **Note: {bound}.**" if bound else ""
    return (
        f"The teacher has the licence `{_name(licence)}`. It and the licence of the prompts may apply to what is made from "
        f"them.{warning}"
    )


def of_weights(model: str, licence: dict[str, str]) -> str:
    """The licence of the weights that a student starts from, for a card."""
    told = f"has the licence `{_name(licence)}`, which" if licence else "has a licence that is not known to llmdistill, which"
    return f"The model that the student starts from, `{model}`, {told} applies to its weights."


def _name(licence: dict[str, str]) -> str:
    other = licence.get("license", "other") == "other"
    return licence.get("license_name") or (licence.get("license_link") if other else None) or licence.get("license") or "other"
