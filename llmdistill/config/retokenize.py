"""The section `retokenize` of the experiment: how a dataset is brought into a student's own tokens."""

from typing import Literal

from llmdistill.config.section import Section


class Retokenize(Section):
    """How rows are given to a student that has another vocabulary than the teacher."""

    special_tokens: Literal["hard_label", "leave_out"] = "hard_label"
    """What to do with a completion that has special tokens in it, other than the one that ends it: learn the text without them,
    with a hard label behind each, or leave the row out. Rows that are in the student's tokens already stay as they are."""
