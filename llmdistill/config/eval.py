"""The section `eval` of the experiment."""

from typing import Literal

from pydantic import Field

from llmdistill.config.section import Dtype, Section
from llmdistill.config.teacher import Teacher


class WinRate(Section):
    """How often a judge prefers the student's answers to another model's."""

    judge: Teacher
    """The judge, preferably from a different model family than the teacher."""
    against: Literal["teacher", "student before", "student, text only"] = "teacher"
    """The model to compare the student with."""
    prompts: int = Field(default=200, ge=2)
    """Held-out prompts that both models answer; all if there are fewer."""
    max_tokens: int = Field(default=256, ge=1)
    """Maximum answer length in tokens."""
    template: str = "prompts/compare.yaml"
    """Template with the variables `prompt`, `answer_1` and `answer_2` that asks for one digit: 1, 2, or 0 for a tie."""
    min_mass: float = Field(default=0.5, gt=0, le=1)
    """Minimum total probability that the judge must assign to the three digits; below it there is no verdict."""


class Eval(Section):
    """How the student is evaluated against the teacher on the held-out split."""

    held_out: float = Field(default=0.05, ge=0, lt=1)
    """Share of the prompts that `curate` holds out from training. `eval` needs more than 0."""
    batch_size: int = Field(default=8, ge=1)
    """Sequences per forward pass."""
    dtype: Dtype = "float32"
    """Compute precision for comparing models, here and in `export`. The teacher and all students are in memory at once. `auto`
    depends on the hardware. In bfloat16, a model disagrees with itself on 3% of next tokens. Speed is always measured in the
    hardware's preferred precision."""
    resamples: int = Field(default=2000, ge=100)
    """Bootstrap resamples for confidence intervals."""
    samples: int = Field(default=4, ge=0)
    """Held-out prompts that every model answers as examples for the report."""
    sample_tokens: int = Field(default=64, ge=1)
    """Length of those answers in tokens, and of the timed decoding."""
    own_prompts: int = Field(default=24, ge=0)
    """Held-out prompts to which every model samples an answer, to be measured on its own text; 0 skips this."""
    own_tokens: int = Field(default=64, ge=1)
    """Maximum length of these answers in tokens."""
    speed: Literal["transformers", "vllm"] = "transformers"
    """Engine for measuring speed, here and in `export`. `vllm` measures prefill, decoding and memory as served; it starts vLLM
    once per model."""
    tasks: list[str] = []
    """Tasks: your own, as YAML files with the key `kind`, such as configs/tasks/orders.yaml; YAML files in lm-eval's format,
    such as configs/tasks/facts.yaml; or names of lm-eval's built-in tasks, whose data is on the Hub."""
    task_limit: int | None = Field(default=None, ge=2)
    """Use only the first N items of each task."""
    timed_requests: int = Field(default=32, ge=0)
    """Items of each of your own tasks on which every model is timed, one at a time and then together; 0 skips this."""
    price_per_hour: float | None = Field(default=None, gt=0)
    """Price of the machine per hour, in any currency; the report then gives the cost of a million requests of each task."""
    win_rate: WinRate | None = None
    """Judged win rate of the student's answers against another model's."""
