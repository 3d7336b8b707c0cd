"""Tasks of a user's own, by kind: what an answer must look like, and how it is scored. Needs neither torch nor a model."""
