"""The section `retokenize` of the experiment: how a dataset is converted to the student's tokens."""

from typing import Literal

from llmdistill.config.section import Section


class Retokenize(Section):
    """How rows are converted for a student whose vocabulary differs from the teacher's."""

    special_tokens: Literal["hard_label", "leave_out"] = "hard_label"
    """What to do with a completion that contains special tokens other than its end token: learn the text without them, with a
    hard label after each, or leave the row out. Rows already in the student's tokens are not changed."""
