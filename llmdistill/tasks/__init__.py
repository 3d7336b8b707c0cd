"""A user's own tasks, by kind: the format of an answer, and how it is scored. Needs neither torch nor a model."""
