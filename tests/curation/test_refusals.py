import json
from pathlib import Path

from llmdistill.curation.refusals import refusal_in
from tests.curation.steps import apply_step, table

REFUSING = [
    "I'm sorry, but I can't assist with that request.",
    "I’m sorry, but I can’t help with that.",
    "I am very sorry, but as an assistant I am unable to provide medical advice.",
    "Sorry, I cannot fulfill this request.",
    "Unfortunately, I am not able to access the internet.",
    "My apologies for any inconvenience. I'm afraid I'm unable to assist you with your sauce.",
    "I cannot provide instructions for that.",
    "  I won't help you with this.",
    "As an AI language model, I do not have hobbies.",
    "That is a deep question. As an AI, I can only tell what I have read.",
    "Hello! I am an artificial intelligence made to be helpful.",
    "I'm ChatGPT, a large language model trained by OpenAI.",
    "I'm Claude, an AI assistant.",
    "I am Qwen, created by Alibaba Cloud.",
    "I was developed by a team at Hugging Face.",
    "My knowledge cutoff is in 2023, so I may be wrong.",
    "It tastes sweet, but I don't have personal experiences.",
    "As a chatbot, I am equipped with many facts.",
]
HONEST = [
    "Dear Ms Lee,\n\nI'm sorry, but I can't attend the meeting on Friday, and I cannot provide the report before Monday.",
    "I can't help but wonder at the wall before me.",
    "I'm sorry for your loss. I can't imagine how hard this is, but here are some words you could use.",
    "As an AI researcher, I work on speech.",
    "ChatGPT was developed by OpenAI, and Claude by Anthropic; both are large language models.",
    "I am a nurse, and my training took three years.",
    "I am Claude Monet, and these are my lilies.",
    "An AI cannot provide love, said the robot.",
    "Sorry! The correct answer is 12.",
    "You can't divide by zero, as there is no number that gives the dividend back.",
    "The assistant was created by the school board.",
]


def test_refusals_and_self_identification(tmp_path):
    reasons, _ = apply_step(tmp_path, {"refusals": None}, table(REFUSING + HONEST))
    missed = [text for text, reason in zip(REFUSING, reasons, strict=False) if reason is None]
    wrong = [(text, reason) for text, reason in zip(HONEST, reasons[len(REFUSING) :], strict=True) if reason is not None]
    assert (missed, wrong) == ([], [])


def test_patterns_of_ones_own(tmp_path):
    rows = table(["Made by ACME.", "Made by hand.", "x" * 40 + "!"])
    reasons, _ = apply_step(tmp_path, {"refusals": {"patterns": ["by acme", "^(x|xx)+$"]}}, rows)
    assert reasons[:2] == ["by ACME", None]
    assert (type(reasons[2]).__name__, reasons[2]) == ("Failed", "a pattern took more than 1 s")


def test_on_sentences_that_the_patterns_were_not_written_for():
    """Every second sentence of benchmarks/refusals.jsonl; benchmarks/refusals.py prints the counts of docs/curation.md."""
    lines = (Path(__file__).parents[2] / "benchmarks/refusals.jsonl").read_text().splitlines()
    sentences = [json.loads(line) for line in lines][1::2]
    found = [sentence["refusal"] for sentence in sentences if refusal_in(sentence["text"])]
    assert len(lines) > 300
    assert sum(found) / len(found) > 0.97
    assert sum(found) / sum(sentence["refusal"] for sentence in sentences) > 0.88
