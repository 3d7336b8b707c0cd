"""What the tests of the trainer ask of a training step."""


def gradients_of_one_step(trainer):
    """The gradients that reach the optimiser."""
    found = {}
    step = trainer.create_optimizer

    def create(*args, **kwargs):
        optimizer = step(*args, **kwargs)
        optimizer.register_step_pre_hook(
            lambda *_: found.update({n: p.grad.clone() for n, p in trainer.model.named_parameters() if p.grad is not None})
        )
        return optimizer

    trainer.create_optimizer = create
    trainer.train()
    return found
