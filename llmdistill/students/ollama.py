"""The `Modelfile` with which Ollama serves a model in a GGUF file."""

from dataclasses import dataclass
from typing import Any

from llmdistill.students.gguf_vocabulary import adds_begin

_CONVERSATIONS = (["user"], ["system", "user"], ["user", "assistant", "user"], ["system", "user", "assistant", "user"])


@dataclass(frozen=True)
class Turns:
    """A chat template that writes one turn after another, each between two texts determined by its role.

    Attributes:
        start: text before everything.
        around: text before and after a message, for each role.
        prompt: text that prompts for an answer.
        system: the default system message.
    """

    start: str
    around: dict[str, tuple[str, str]]
    prompt: str
    system: str | None

    def render(self, roles: list[str]) -> str:
        """A conversation in which the text of a role is its name, as rendered by the tokenizer."""
        texts = [(role, _text(role)) for role in roles]
        if self.system is not None and roles[0] != "system":
            texts.insert(0, ("system", self.system))
        return self.start + "".join(self.around[role][0] + text + self.around[role][1] for role, text in texts) + self.prompt

    def for_ollama(self, begin: str) -> str:
        """As a Go template, without the token that Ollama writes before every prompt."""
        text = self.start.removeprefix(begin) + "{{ range .Messages }}"
        for role, (before, after) in self.around.items():
            condition = "if" if role == "system" else "else if"
            text += f'{{{{ {condition} eq .Role "{role}" }}}}{before}{{{{ .Content }}}}{after}'
        return text + "{{ end }}{{ end }}" + self.prompt


def modelfile(file: str, tokenizer: Any, ends: list[int], generation: Any) -> str:
    """The text of a `Modelfile`.

    Ollama does not run the chat template in the file (Jinja). It has its own templates (Go) for those that it knows, and uses
    none for others, so one is written here.

    Args:
        file: the GGUF file next to it.
        tokenizer: the model's tokenizer.
        ends: the tokens that end an answer.
        generation: the model's generation configuration; None if it has none.
    """
    lines, turns = [f"FROM ./{file}"], turns_of(tokenizer)
    if turns:
        begin = tokenizer.bos_token if adds_begin(tokenizer) else ""
        lines.append(f'TEMPLATE """{turns.for_ollama(begin)}"""')
        if turns.system is not None:
            lines.append(f'SYSTEM """{turns.system}"""')
    elif tokenizer.chat_template:
        lines.append("# TEMPLATE is left to Ollama: the chat template in the file does more than write one turn after another.")
    lines += [f'PARAMETER stop "{tokenizer.decode([end])}"' for end in ends]
    settings = {name: getattr(generation, name, None) for name in ("temperature", "top_p", "top_k")}
    lines += [f"PARAMETER {name} {value}" for name, value in settings.items() if value is not None]
    return "\n".join(lines) + "\n"


def turns_of(tokenizer: Any) -> Turns | None:
    """The pieces of a chat template that only writes turns; None for other templates, and if there is none."""
    template = tokenizer.chat_template
    if not isinstance(template, str) or "strftime_now" in template:  # the day of the export must not become part of a template
        return None
    try:
        turns = _read(tokenizer)
        same = turns is not None and all(turns.render(roles) == _rendered(tokenizer, roles) for roles in _CONVERSATIONS)
    except Exception:  # templates may raise anything
        return None
    pieces = [*turns.around.values(), (turns.start, turns.prompt), (turns.system or "", "")] if turns else []
    quotable = not any(mark in text for pair in pieces for text in pair for mark in ("{{", '"""'))
    return turns if same and quotable else None


def _read(tokenizer: Any) -> Turns | None:
    """The pieces, from conversations that each are one turn longer."""
    roles, around = ["system", "user", "assistant"], {}
    begin = tokenizer.bos_token if adds_begin(tokenizer) else ""
    whole = begin = begin if _rendered(tokenizer, roles).startswith(begin) else ""
    for number, role in enumerate(roles, 1):
        longer = _rendered(tokenizer, roles[:number], prompt=False)
        if not longer.startswith(whole):
            return None
        before, _, after = longer.removeprefix(whole).partition(_text(role))
        around[role], whole = (before, after), longer
    prompt = _rendered(tokenizer, roles).removeprefix(whole)
    turn = around["user"][0] + _text("user") + around["user"][1]
    first = _rendered(tokenizer, ["user"], prompt=False).removeprefix(begin).removesuffix(turn)
    before, after = around["system"]
    if first.startswith(before) and first.endswith(after) and len(first) > len(before + after):
        return Turns(begin, around, prompt, first.removeprefix(before).removesuffix(after))
    around["system"] = (before.removeprefix(first), after)
    return Turns(begin + first, around, prompt, None)


def _text(role: str) -> str:
    return f"THE-TEXT-OF-{role.upper()}"


def _rendered(tokenizer: Any, roles: list[str], prompt: bool = True) -> str:
    messages = [{"role": role, "content": _text(role)} for role in roles]
    return str(tokenizer.apply_chat_template(messages, tokenize=False, add_generation_prompt=prompt))
