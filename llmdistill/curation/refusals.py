"""The step of `curate` that finds refusals, and answers in which the model speaks of itself."""

import re
from collections.abc import Iterator

import pyarrow as pa
import regex

from llmdistill.config.curate import Refusals
from llmdistill.curation.steps import Check, CurationStep, Failed, StepContext, answers, excerpt

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


def refusals(settings: Refusals, context: StepContext) -> Check:
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


STEP = CurationStep(refusals)
