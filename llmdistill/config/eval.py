"""The section `eval` of the experiment."""

from typing import Literal

from pydantic import Field

from llmdistill.config.section import Dtype, Section
from llmdistill.config.teacher import Teacher


class WinRate(Section):
    """How often a judge prefers the student's answers to another model's."""

    judge: Teacher
    """The judge; best a model of another family than the teacher's."""
    against: Literal["teacher", "student before", "student, text only"] = "teacher"
    """Whose answers the student's are compared with."""
    prompts: int = Field(default=200, ge=2)
    """Held-out prompts that both answer; all of them if there are fewer."""
    max_tokens: int = Field(default=256, ge=1)
    """Longest answer."""
    template: str = "prompts/compare.yaml"
    """A template with the variables `prompt`, `answer_1` and `answer_2` that asks for one digit: 1, 2, or 0 for a tie."""
    min_mass: float = Field(default=0.5, gt=0, le=1)
    """Least probability that the judge gives the three digits together; with less it has given no verdict."""


class Eval(Section):
    """How the student is measured against the teacher, on rows held out of training."""

    held_out: float = Field(default=0.05, ge=0, lt=1)
    """Share of the prompts that `curate` keeps out of training; with 0 there is nothing for `eval` to measure on."""
    batch_size: int = Field(default=8, ge=1)
    """Sequences in one forward pass."""
    dtype: Dtype = "auto"
    """Precision in which all models are measured, here and by `export`; `auto` is what this machine is good at."""
    resamples: int = Field(default=2000, ge=100)
    """Bootstrap resamples behind every interval."""
    samples: int = Field(default=4, ge=0)
    """Held-out prompts that every model answers for the report."""
    sample_tokens: int = Field(default=64, ge=1)
    """Length of those answers, and of the decoding that is timed."""
    own_prompts: int = Field(default=24, ge=0)
    """Held-out prompts that every model answers by sampling, to be measured on its own text; 0 leaves it out."""
    own_tokens: int = Field(default=64, ge=1)
    """Where such an answer is cut."""
    speed: Literal["transformers", "vllm"] = "transformers"
    """The engine in which models are timed, here and by `export`: `vllm` as they will be served, reading and memory included, for
    a start of vLLM each."""
    tasks: list[str] = []
    """Tasks for every model: YAML files in lm-eval's format, such as configs/tasks/facts.yaml, or names of lm-eval's own, whose
    data is on the Hub."""
    task_limit: int | None = Field(default=None, ge=2)
    """The first items of each task only."""
    win_rate: WinRate | None = None
    """Let a judge compare the student's answers with another model's."""
