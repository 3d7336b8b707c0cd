"""The step of `curate` that finds refusals, and answers in which the model refers to itself."""

import re
from collections.abc import Iterator
from typing import Any

import pyarrow as pa
import regex

from llmdistill.config.curate import Refusals
from llmdistill.curation.steps import Check, CurationStep, Failed, StepContext, excerpt, final_answers

_SECONDS = 1.0  # for one pattern of the user's on one row
_CANNOT = r"(?:can(?:no|')t|can not|cannot|(?:am|'m) (?:not able|unable) to|won't(?: be able to)?|will not|shouldn't)"
_SORRY = (
    r"(?:(?:i'm|i am|we're|we are|my) (?:very |so |really |truly |sincere |deepest )?(?:sorry|apologies|afraid)|sorry|apologies"
    r"|unfortunately|regrettably|i (?:do )?apologi[sz]e)"
)
_BEGIN = r"^\W*(?:(?:no|oh no|hmm|well|oh)\W+)?"  # an answer begins, perhaps with an interjection
_ME = r"(?:i|we) ?"
# What only a model says that it cannot do, or what is asked of it.
_ASKED = (
    r"(?:help (?:you|with)|assist|fulfil+|comply|engage in|discuss|answer (?:this|that|your)|respond to (?:this|that|your)"
    r"|talk about (?:this|that)|condone|do (?:this|that)[.,!]|participate in (?:this|that)|continue (?:this|with this|with that)"
    r"|access (?:the internet|external|real|your)|browse|provide (?:that|this|you|any|instructions|information|personal|medical"
    r"|legal|financial|assistance|help|details|guidance|advice|content)|offer (?:medical|legal|financial)"
    r"|give (?:you |out )?(?:medical|legal|financial|instructions|advice)|(?:create|generate|write"
    r"|produce) (?:this|that|such|content"
    r"|hateful|violent|sexual|explicit|threats|harmful|malicious)|share (?:this|that|details|personal)"
    r"|open (?:links|files)|view (?:the|this|that) (?:image|picture|photo)|see (?:your|the) (?:screen|image|picture)"
    r"|remember previous)"
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
    rf"{_BEGIN}{_SORRY}\b.{{0,120}}?\b{_ME}{_CANNOT} (?:\w+ ){{0,2}}?(?:help|assist|fulfil|comply|provide|answer"
    r"|do (?:that|this)|discuss|engage|support|continue|create|generate|write|share|give|offer|respond|access|browse|complete"
    r"|find|process|recommend|translate|impersonate|explain|verify)",
    rf"{_BEGIN}{_SORRY}\b.{{0,60}}?\b(?:that|this|it)(?:'s| is) (?:not possible for me|against my|illegal|unethical)",
    rf"{_BEGIN}{_ME}{_CANNOT}(?:,? (?:and|in good conscience|in any way|ethically|legally|directly|knowingly),?(?: will not,?)?)?"
    rf" (?:\w+ ){{0,1}}?{_ASKED}",
    rf"{_BEGIN}{_ME}(?:must|have to|need to|will have to|(?:am|'m) going to have to|would like to|respectfully) (?:\w+ )?"
    r"(?:decline|refuse)(?: (?:this|that|your|the request|to (?:answer|write|help|assist|comply|continue|do))|[.,;!]|$)",
    rf"{_BEGIN}{_ME}(?:decline|refuse)(?:[.,;!]|$| (?:this|that|your request|to (?:answer|write|help|assist"
    rf"|comply|continue|create"
    r"|provide|engage)))",
    rf"{_BEGIN}{_ME}(?:'d|would) (?:rather|prefer) not(?: to)? (?:answer|write|discuss|continue|say|do|help|engage|talk about)",
    rf"{_BEGIN}{_ME}(?:(?:am|'m) not|do not feel|don't feel|would not feel) comfortable (?:with (?:this|that) (?:request|topic)"
    r"|discussing|writing|answering|helping|providing|creating|sharing)",
    rf"{_BEGIN}{_ME}(?:am|'m) not going to (?:help|write|provide|answer|do (?:this|that)|assist|generate|create)",
    rf"{_BEGIN}(?:that|this)(?:'s| is)? not something i(?:'m| am)? (?:can|could|will|able to|willing to|comfortable) ?"
    r"(?:help|assist|do|discuss|write|with)",
    rf"{_BEGIN}(?:that|this|your) (?:request )?(?:goes against|violates) (?:my|our|the) (?:usage |content |safety )?"
    r"(?:guideline|polic|principle|value|rule)",
    rf"{_BEGIN}(?:it (?:is|would be|wouldn't be|is not|isn't)|it's|it's not) (?:inappropriate|unethical"
    rf"|not possible|not appropriate"
    r"|possible|appropriate|right|wrong) for me to",
    rf"{_BEGIN}(?:as much as i(?:'d| would) like|while i (?:understand|appreciate)|i (?:understand|appreciate)|thank you for"
    rf"|i(?:'m| am) here to help|i(?:'d| would) be happy)\b.{{0,80}}?\bi ?{_CANNOT} (?:\w+ )?(?:help|assist"
    rf"|do (?:that|this)|share"
    r"|answer|explain|provide|write|discuss|support|take)",
    r"^[^.!?\n]{0,80}[;,.] i(?:'m| am)? ?(?:can't|cannot|not able to|unable to|won't) (?:discuss|help with) (?:this|that)\b",
]
# Of itself, anywhere; a person may work on AI, so what follows counts.
_WHAT_FOLLOWS = (
    r"(?=[.,;:!?)]|$| (?:language |text |chat )?(?:model|assistant|system|program|bot|chatbot)\b(?! (?:trainer|builder|designer"
    r"|developer|engineer|reviewer|maker))| (?:and|so|that|which|but|here|without|with|by|developed|created"
    r"|designed|trained|built"
    r"|made)\b(?! (?:ml|machine|data|robotics)))"
)
_SELF = [
    r"\bas an? (?:ai|artificial intelligence)(?:[- ](?:powered|based))?(?: (?:language|text|chat))?"
    r"(?: (?:model|assistant|chatbot|bot|system|program))?(?:,| (?:developed|created|trained|designed|i|my)\b)(?! you\b)",
    r"\bas a (?:large )?language model\b",
    r"\bas a (?:chatbot|chat bot|computer program)(?:,| (?:with|developed|created|trained|designed|i|my)\b)",
    rf"\b(?:i(?:'m| am)|being) (?:just |only |simply |merely )?an? (?:\w+[- ]){{0,3}}?(?:ai"
    rf"|artificial intelligence|language model"
    rf"|machine learning model|chatbot|computer program|virtual assistant){_WHAT_FOLLOWS}",
    rf"\b(?:i(?:'m| am)|my name is|you can call me) (?:an? )?{_NAMES}\b(?!(?-i: [A-Z]))(?=[.!?]?$|,? (?:an? "
    rf"|the )?(?:\w+ ){{0,2}}"
    r"(?:ai|model|assistant|language|chatbot|created|made|developed|trained|by)\b)",
    r"\bi (?:was|am|have been)\b[^.!?\n]{0,60}\b(?:created|made|developed|trained|built|designed|fine-?tuned) by (?:\w+ ){0,3}?"
    rf"{_MAKERS}",
    r"\bi(?:'m| am) (?:programmed|designed) to (?:be (?:helpful|harmless|safe)|avoid|assist|provide|follow)",
    r"\bmy (?:knowledge cut-?off|training data|last knowledge update|responses are based on)\b",
    r"\bi (?:don't|do not) (?:have|possess) (?:any )?(?:personal (?:experience|opinion|feeling|belief|preference|emotion)s?"
    r"|feelings or emotions|human emotions|consciousness|a physical (?:body|form)|access to (?:real-time|the internet|your)"
    r"|real-time|the (?:ability|capability) to (?:browse|access|feel|experience|see|hear|taste|send))",
]


_PATTERNS = [re.compile(pattern, re.IGNORECASE) for pattern in (*_REFUSALS, *_SELF)]


def refusals(settings: Refusals, context: StepContext) -> Check:
    """By refusals at the beginning, self-identification anywhere, and the user's own patterns."""
    own = [regex.compile(pattern, regex.IGNORECASE) for pattern in settings.patterns]

    def check(rows: pa.Table) -> Iterator[str | None]:
        for answer in final_answers(rows, context.experiment):
            match: Any = refusal_in(answer)
            if match is None:
                try:
                    matches = (pattern.search(answer, timeout=_SECONDS) for pattern in own)
                    match = next((found for found in matches if found), None)
                except TimeoutError:
                    yield Failed(f"a pattern took more than {_SECONDS:g} s")
                    continue
            yield excerpt(match[0]) if match else None

    return check


def refusal_in(answer: str) -> re.Match[str] | None:
    """Where an answer refuses, or refers to itself as a model."""
    text = re.sub(r"\s+", " ", answer.replace("’", "'"))
    return next((found for found in (pattern.search(text) for pattern in _PATTERNS) if found), None)


STEP = CurationStep(refusals)
