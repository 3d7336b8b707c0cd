"""`llmdistill init`: a first experiment, from flags and a few questions."""
