"""The steps of `curate`: each keeps, rejects or changes rows, and says why."""
