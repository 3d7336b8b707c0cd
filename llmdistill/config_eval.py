"""The `eval.win_rate` section of the experiment."""

from typing import Literal

from pydantic import Field

from llmdistill.section import Section, Teacher


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
