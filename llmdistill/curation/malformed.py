"""The step of `curate` that finds signs of a broken conversation."""

import re
from collections.abc import Iterator

import pyarrow as pa

from llmdistill.config.curate import Malformed
from llmdistill.curation.steps import Check, CurationStep, StepContext, answers, completion_ids, questions
from llmdistill.data.manifest import has_several_tokenizers
from llmdistill.data.rows import teacher_names

# Shapes of the tokens that mark turns in chat templates, where they were written as text.
_MARKERS = re.compile(
    r"<\|[a-z_]{2,30}\|>|<｜[^｜\n]{2,30}｜>|</?s>|\[/?INST\]|<</?SYS>>|<(?:start|end)_of_turn>|<(?:bos|eos|pad|unk)>"
    r"|^[ \t]*### ?(?:Instruction|Response|Input|Human|Assistant):",
    re.MULTILINE,
)
_STRUCK = re.compile(r"<s>(?:(?!</?s>).)*</s>", re.DOTALL)  # text struck through in HTML
_ROLE = re.compile(r"^[ \t]*\**(User|Human|Assistant)\**[ \t]*:", re.MULTILINE)
_FENCE = re.compile(r"^[ \t]{0,3}(?:[-*+>] |\d+[.)] )*[ \t]*(`{3,}|~{3,})(.*)$", re.MULTILINE)


def malformed(settings: Malformed, context: StepContext) -> Check:
    """By signs that a complete answer does not have."""
    several = has_several_tokenizers(context.manifest)
    of_each = {name: teacher["tokenizer"] for name, teacher in context.manifest["teachers"].items()} if several else {}
    described = of_each or {"": context.manifest["tokenizer"]}
    special = {name: set(tokenizer.get("special_token_ids", [])) for name, tokenizer in described.items()}

    def check(rows: pa.Table) -> Iterator[str | None]:
        names = teacher_names(rows) if several else [""] * len(rows)
        for question, answer, ids, name in zip(questions(rows), answers(rows), completion_ids(rows), names, strict=True):
            inside = special[name].intersection(ids[:-1].tolist())
            yield f"the special token {min(inside)} inside" if inside else malformation(question, answer)

    return check


def malformation(question: str, answer: str) -> str | None:
    """The problem with the format of an answer, or None."""
    if not answer.strip():
        return "empty"
    prose = _without_code(answer)
    if prose is None:
        return "a code fence is left open"
    unmarked = _STRUCK.sub("", prose)
    marker = next((m[0].strip() for m in _MARKERS.finditer(unmarked) if m[0].strip() not in question), None)
    if marker:
        return f"the marker {marker}"
    role = next((m for m in _ROLE.finditer(prose) if m[1].lower() not in question.lower()), None)
    if role:
        return f"the role {role[1]}:"
    thoughts = re.findall(r"</?think(?:ing)?>", prose)
    # A template may have opened the thought already, in the prompt.
    if "".join("c" if tag.startswith("</") else "o" for tag in thoughts) not in ("", "oc", "c"):
        return f"the tags {' '.join(thoughts[:6])}"
    return None


def _without_code(text: str) -> str | None:
    """The text without its code, in fences and inside lines; None if a fence is not closed."""
    kept, fence, place = [], "", 0
    for match in _FENCE.finditer(text):
        marks, info = match[1], match[2]
        if not fence:
            if marks[0] == "`" and "`" in info:
                continue  # code inside a line
            kept.append(text[place : match.start()])
            fence = marks
        elif marks.startswith(fence) and not info.strip():
            fence, place = "", match.end()
    return None if fence else re.sub(r"`[^`\n]+`", "", "".join([*kept, text[place:]]))


STEP = CurationStep(malformed)
