"""The parts of `train` other than the loss: the trainer and its arguments, packing, rounds, FLOPs, checks."""
