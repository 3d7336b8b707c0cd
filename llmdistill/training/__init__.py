"""What `train` is made of beside the loss: the fused form, packing, other objectives, adapters, smaller and rounded students."""
