"""The steps of `curate`: each keeps, rejects or changes rows, with a reason."""
