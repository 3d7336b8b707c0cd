"""Steps of `curate` for what a chat model says that is no answer: refusals, itself, and the marks of a broken chat."""

import re
from collections.abc import Iterator

import pyarrow as pa
import regex

from llmdistill.config.curate import Malformed, Refusals
from llmdistill.curation.steps import Check, Failed, Work, answers, completion_ids, excerpt, questions

_SECONDS = 1.0  # for one pattern of the user's on one row

_CANNOT = r"(?:can(?:no|')t|can not|(?:am|'m) (?:not able|unable) to|won't|will not|must decline to)"
_SORRY = (
    r"(?:(?:i'm|i am|my) (?:very |so |really |truly |sincere |deepest )?(?:sorry|apologies|afraid)|sorry|apologies"
    r"|unfortunately|regrettably|i (?:do )?apologi[sz]e)"
)
_NAMES = (
    r"(?:chat ?gpt|gpt-?\d[\w.-]*|claude|llama|qwen|tongyi qianwen|mistral|mixtral|deepseek|smol ?lm|gemini|gemma|grok|copilot"
    r"|ernie bot|kimi|chatglm|baichuan|vicuna|doubao|hunyuan|phi-\d)"
)
_MAKERS = (
    r"(?:open ?ai|anthropic|google|deepmind|meta\b|facebook|alibaba|mistral|deepseek|microsoft|hugging ?face|x ?ai\b|baidu"
    r"|moonshot|zhipu|tencent|bytedance|nvidia|cohere|ibm)"
)
# What an answer begins with; further on, the same words may be a letter's or a character's.
_REFUSALS = [
    rf"^\W*{_SORRY}\b.{{0,120}}?\b(?:i|we) ?{_CANNOT} (?:\w+ ){{0,2}}?(?:help|assist|fulfil|comply|provide|answer"
    r"|do (?:that|this)|discuss|engage|support|continue|create|generate|write|share|give|offer|respond|access|browse|complete"
    r"|find|process|recommend)",
    rf"^\W*(?:i|we) ?{_CANNOT} (?:\w+ ){{0,2}}?(?:help (?:you|with)|assist|fulfil|comply|provide|engage in|discuss"
    r"|answer (?:this|that|your)|access (?:the internet|external|real))",
]
# Of itself, anywhere; a person may work on AI, so what follows counts.
_SELF = [
    r"\bas an? (?:ai|artificial intelligence)(?:[- ](?:powered|based))?(?: (?:language|text|chat))?"
    r"(?: (?:model|assistant|chatbot|bot|system|program))?(?:,| (?:developed|created|trained|designed|i|my)\b)",
    r"\bas a (?:large )?language model\b",
    r"\bas a (?:chatbot|chat bot|computer program)(?:,| (?:with|developed|created|trained|designed|i|my)\b)",
    r"\bi(?:'m| am) (?:just |only |simply |merely )?an? (?:\w+[- ]){0,3}?(?:ai|artificial intelligence|language model|chatbot)\b"
    r"(?! (?:researcher|engineer|scientist|developer|student|expert|enthusiast|company|start-?up|professional|specialist|ethicist"
    r"|consultant|designer))",
    rf"\b(?:i(?:'m| am)|my name is|you can call me) (?:an? )?{_NAMES}\b(?!(?-i: [A-Z]))",  # no surname
    r"\bi (?:was|am|have been)\b[^.!?\n]{0,60}\b(?:created|made|developed|trained|built|designed|fine-?tuned) by (?:\w+ ){0,3}?"
    rf"{_MAKERS}",
    r"\bmy (?:knowledge cut-?off|training data|last (?:knowledge )?update)\b",
    r"\bi (?:don't|do not) (?:have|possess) (?:any )?(?:personal (?:experience|opinion|feeling|belief|preference|emotion)s?"
    r"|feelings or emotions|human emotions|consciousness|a physical (?:body|form)|access to real-time|real-time"
    r"|the (?:ability|capability) to (?:browse|access|feel|experience|see|hear|taste))",
]
# Shapes of the tokens that mark turns in chat templates, where they were written as text.
_MARKERS = re.compile(
    r"<\|[a-z_]{2,30}\|>|<｜[^｜\n]{2,30}｜>|</?s>|\[/?INST\]|<</?SYS>>|<(?:start|end)_of_turn>|<(?:bos|eos|pad|unk)>"
    r"|^\s*### ?(?:Instruction|Response|Input|Human|Assistant)\b:?",
    re.MULTILINE,
)
_ROLE = re.compile(r"^\s*\**(User|Human|Assistant)\**\s*:", re.MULTILINE)
_FENCE = re.compile(r"^\s{0,3}(?:[-*+>] |\d+[.)] )*\s*(`{3,}|~{3,})(.*)$", re.MULTILINE)


def refusals(settings: Refusals, work: Work) -> Check:
    """By refusals at the beginning, self-identification anywhere, and the user's own patterns."""
    own = [regex.compile(pattern, regex.IGNORECASE) for pattern in settings.patterns]
    known = [re.compile(pattern, re.IGNORECASE) for pattern in [*_REFUSALS, *_SELF]]

    def check(rows: pa.Table) -> Iterator[str | None]:
        for answer in answers(rows):
            text = re.sub(r"\s+", " ", answer.replace("’", "'"))
            match = next((found for found in (pattern.search(text) for pattern in known) if found), None)
            if match is None:
                try:
                    matches = (pattern.search(answer, timeout=_SECONDS) for pattern in own)
                    match = next((found for found in matches if found), None)
                except TimeoutError:
                    yield Failed(f"a pattern took more than {_SECONDS:g} s")
                    continue
            yield excerpt(match[0]) if match else None

    return check


def malformed(settings: Malformed, work: Work) -> Check:
    """By what a whole answer of one turn does not have."""
    special = set(work.manifest["tokenizer"].get("special_token_ids", []))

    def check(rows: pa.Table) -> Iterator[str | None]:
        for question, answer, ids in zip(questions(rows), answers(rows), completion_ids(rows), strict=True):
            inside = special.intersection(ids[:-1].tolist())
            yield f"the special token {min(inside)} inside" if inside else malformation(question, answer)

    return check


def malformation(question: str, answer: str) -> str | None:
    """What is wrong with the form of an answer, or None."""
    if not answer.strip():
        return "empty"
    prose = _without_code(answer)
    if prose is None:
        return "a code fence is left open"
    marker = next((m[0].strip() for m in _MARKERS.finditer(prose) if m[0].strip() not in question), None)
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
