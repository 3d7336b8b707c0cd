"""Losses between the layers of a student and those of an online teacher: hidden states and attention maps.

As in `losses`: pure functions of tensors, with one value per completion token, computed in float32. The values are those at
the positions that predict completion tokens; several pairs of layers are averaged. Shapes: N completion tokens, D hidden
size, H attention heads, S positions that may be attended to.
"""

from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

import torch
from safetensors.torch import load_file, save_file
from torch import Tensor

from llmdistill.losses.divergences import wide

Pairs = Sequence[tuple[int, int]]  # [student's layer, teacher's layer], counted from 0
Seen = dict[tuple[str, int], Tensor]  # recorded values, by "hidden" or "attention" and the number of the layer
_FILE = "hidden_projector.safetensors"
_ATTENTION = ("self_attn", "attn", "attention")  # what a layer calls its own


def cosine(student_ND: Tensor, teacher_ND: Tensor) -> Tensor:
    """1 − cos(student, teacher), from 0 to 2, whatever their lengths (DistilBERT, Sanh et al. 2019, arXiv 1910.01108)."""
    return 1 - torch.nn.functional.cosine_similarity(wide(student_ND), wide(teacher_ND), dim=1)


def mse(student_ND: Tensor, teacher_ND: Tensor) -> Tensor:
    """‖student − teacher‖² / D, in the teacher's units (TinyBERT, Jiao et al. 2019, arXiv 1909.10351)."""
    return (wide(student_ND) - wide(teacher_ND)).square().mean(dim=1)


def attention_kl(student_NHS: Tensor, teacher_NHS: Tensor) -> Tensor:
    """Mean over heads of KL(teacher's map ‖ student's map), nats (MiniLM, Wang et al. 2020, arXiv 2002.10957).

    If teacher and student have different numbers of heads, the maps are averaged over heads first.

    Args:
        student_NHS: attention probabilities of the position that predicts each completion token.
        teacher_NHS: the teacher's, possibly with a different number of heads.
    """
    if student_NHS.shape[1] != teacher_NHS.shape[1]:
        student_NHS, teacher_NHS = (wide(maps).mean(dim=1, keepdim=True) for maps in (student_NHS, teacher_NHS))
    # Rounded to bfloat16 they do not sum to one, and without a distribution the divergence may be negative.
    q_NHS, p_NHS = (maps / maps.sum(dim=2, keepdim=True) for maps in (wide(student_NHS), wide(teacher_NHS)))
    tiny = torch.finfo(q_NHS.dtype).tiny
    return (p_NHS * (p_NHS.clamp(min=tiny).log() - q_NHS.clamp(min=tiny).log())).sum(dim=2).mean(dim=1)


LOSSES = {"cosine": cosine, "mse": mse}


def evenly(student_layers: int, teacher_layers: int) -> list[tuple[int, int]]:
    """Every layer of the student with the teacher's layer at the same relative depth, the last with the last."""
    return [(layer, max(round((layer + 1) * teacher_layers / student_layers) - 1, 0)) for layer in range(student_layers)]


def of_pruned(kept: Sequence[int], teacher_layers: int) -> list[tuple[int, int]]:
    """For a student made of these layers of the teacher: each layer also stands for those removed after it.

    Its output is the input of the next kept layer, so it should equal that layer's former input: the output of the layer before
    it. The last one stands for the teacher's last.
    """
    return list(enumerate([*(layer - 1 for layer in kept[1:]), teacher_layers - 1]))


@dataclass(frozen=True)
class Hidden:
    """Hidden states as part of the loss.

    Args:
        weight: weight relative to the other parts.
        loss: `cosine` or `mse`.
        layers: pairs [student's layer, teacher's layer] whose outputs are compared; `evenly` if not given.

    Raises:
        ValueError: if one of them is out of range.
    """

    weight: float = 1.0
    loss: str = "cosine"
    layers: Pairs | None = None

    def __post_init__(self) -> None:
        if self.loss not in LOSSES:
            raise ValueError(f"loss is {self.loss!r}, must be one of {', '.join(LOSSES)}")
        _check_weight(self.weight)


@dataclass(frozen=True)
class Attention:
    """Attention maps as part of the loss; the arguments are those of `Hidden`."""

    weight: float = 1.0
    layers: Pairs | None = None

    def __post_init__(self) -> None:
        _check_weight(self.weight)


class Projector(torch.nn.Linear):
    """From the student's hidden size to the teacher's. Part of the model in training, but not of the saved one."""

    def __init__(self, student_size: int, teacher_size: int, seed: int) -> None:
        super().__init__(student_size, teacher_size, bias=False, dtype=torch.float32)
        # Lengths and angles are initially preserved.
        torch.nn.init.orthogonal_(self.weight, generator=torch.Generator().manual_seed(seed))

    def _save_to_state_dict(self, *args: Any, **kwargs: Any) -> None:
        pass

    def _load_from_state_dict(self, *args: Any, **kwargs: Any) -> None:
        pass


class LayerMatch:
    """Compares layers of a student with layers of its teacher while both run.

    Args:
        student: the model that learns; if the sizes differ, it gets a `Projector`, called `hidden_projector`.
        teacher: the online teacher.
        hidden: how to compare hidden states, if at all.
        attention: how to compare attention maps; both models are set to eager attention, since no other returns them.
        seed: seed of the projector's weights.

    Raises:
        ValueError: a layer that is not there, or one whose attention is not found.
    """

    def __init__(self, student: Any, teacher: Any, hidden: Hidden | None, attention: Attention | None, seed: int = 0) -> None:
        self.hidden, self.attention = hidden, attention
        sizes = [len(decoder_layers(model)) for model in (student, teacher)]
        self.pairs = {name: resolve(part.layers, *sizes) for name, part in (("hidden", hidden), ("attention", attention)) if part}
        if attention:
            for model in (student, teacher):
                if _attention(decoder_layers(model)[0]) is None:
                    names = f"{', '.join(_ATTENTION[:-1])} or {_ATTENTION[-1]}"
                    raise ValueError(
                        f"attention: the layers of {type(model).__name__} have no {names}, so their attention maps cannot "
                        "be compared; compare hidden states instead"
                    )
                model.set_attn_implementation("eager")
        widths = [model.config.get_text_config().hidden_size for model in (student, teacher)]
        self.projector: Projector | None = None
        if hidden and widths[0] != widths[1]:
            self.projector = Projector(widths[0], widths[1], seed).to(student.device)
            student.add_module("hidden_projector", self.projector)

    @contextmanager
    def watch(self, model: Any, side: Literal["student", "teacher"]) -> Iterator[Seen]:
        """Within this context, a forward pass of the model records the outputs of its watched layers here."""
        seen: Seen = {}
        layers, place = decoder_layers(model), ("student", "teacher").index(side)
        watched = {
            (name, pair[place]): _attention(layers[pair[place]]) if name == "attention" else layers[pair[place]]
            for name, pairs in self.pairs.items()
            for pair in pairs
        }
        handles = [module.register_forward_hook(_keep(seen, key)) for key, module in watched.items()]
        try:
            yield seen
        finally:
            for handle in handles:
                handle.remove()

    def loss(self, student: Seen, teacher: Seen, batch: Mapping[str, Tensor]) -> tuple[Tensor, dict[str, Tensor]]:
        """The loss, weighted and summed over tokens, and the detached, unweighted sums of its parts `hidden` and `attention`.

        Args:
            student: the recorded values of the student.
            teacher: the recorded values of the teacher.
            batch: batch of the collator, with `positions` and `token_weights`, shape (N,).
        """
        positions = batch["positions"]
        total, sums = torch.zeros((), device=positions.device), {}
        with torch.autocast(positions.device.type, enabled=False):
            for name, part in (("hidden", self.hidden), ("attention", self.attention)):
                if part is None:
                    continue
                compare = self._compare_hidden if name == "hidden" else _compare_attention
                values = [
                    compare(_alive(student[name, mine]), teacher[name, theirs], positions) for mine, theirs in self.pairs[name]
                ]
                value_N = torch.stack(values).mean(dim=0)
                total = total + part.weight * (batch["token_weights"] * value_N).sum()
                sums[name] = value_N.detach().sum()
        return total, sums

    def _compare_hidden(self, student_BTD: Tensor, teacher_BTD: Tensor, positions: Tensor) -> Tensor:
        assert self.hidden is not None
        student_ND, teacher_ND = (states.flatten(0, 1)[positions] for states in (student_BTD, teacher_BTD))
        if self.projector is not None:
            student_ND = self.projector(wide(student_ND))
        return LOSSES[self.hidden.loss](student_ND, teacher_ND)

    def save(self, directory: str | Path) -> None:
        """Save the projector, if there is one, next to a checkpoint."""
        if self.projector is not None:
            save_file({"weight": self.projector.weight.detach().cpu().contiguous()}, Path(directory) / _FILE)

    def load(self, directory: str | Path) -> None:
        """Load the projector from a checkpoint."""
        if self.projector is not None:
            with torch.no_grad():
                self.projector.weight.copy_(load_file(Path(directory) / _FILE)["weight"])


def decoder_layers(model: Any) -> Any:
    """The model's layers, whether or not DDP or peft wrap it, and whatever its family calls them.

    Raises:
        ValueError: if it has no such list of layers.
    """
    whole = getattr(model, "module", model)
    count = whole.config.get_text_config().num_hidden_layers
    found = [module for module in whole.modules() if isinstance(module, torch.nn.ModuleList) and len(module) == count]
    decoder = next((layers for layers in found if type(layers[0]) is type(layers[-1])), None)
    if decoder is None:
        raise ValueError(f"{type(whole).__name__} has no list of {count} layers whose hidden states could be compared")
    return decoder


def resolve(layers: Pairs | None, student_layers: int, teacher_layers: int) -> Pairs:
    """The pairs of layers, by position if none are given.

    Raises:
        ValueError: if there are none, or a layer does not exist.
    """
    if layers is None:
        return evenly(student_layers, teacher_layers)
    for mine, theirs in layers:
        if not (0 <= mine < student_layers and 0 <= theirs < teacher_layers):
            raise ValueError(
                f"layers: there is no pair [{mine}, {theirs}]: the student has layers 0 to {student_layers - 1}, "
                f"the teacher 0 to {teacher_layers - 1}"
            )
    if not layers:
        raise ValueError("layers: no pair is given")
    return layers


def _attention(layer: Any) -> Any:
    """The attention of a layer; None if it has none by a name that is known."""
    return next((getattr(layer, name) for name in _ATTENTION if hasattr(layer, name)), None)


def _keep(seen: Seen, key: tuple[str, int]) -> Any:
    """A hook that computes nothing: under gradient checkpointing it runs inside what is computed twice."""

    def hook(module: Any, args: Any, output: Any) -> None:
        outputs = output if isinstance(output, tuple) else (output,)
        seen[key] = outputs[1 if key[0] == "attention" else 0]

    return hook


def _alive(watched: Tensor) -> Tensor:
    """The recorded values, if gradients reach them where they should.

    Raises:
        RuntimeError: for reentrant gradient checkpointing, which first computes without a graph.
    """
    if torch.is_grad_enabled() and not watched.requires_grad:
        raise RuntimeError(
            "no gradient reaches the student's layers: set gradient_checkpointing_kwargs to {'use_reentrant': False}, "
            "and train at least one weight at or before each layer that is compared"
        )
    return watched


def _compare_attention(student_BHTS: Tensor, teacher_BHTS: Tensor, positions: Tensor) -> Tensor:
    row, column = positions // student_BHTS.shape[2], positions % student_BHTS.shape[2]
    return attention_kl(student_BHTS[row, :, column], teacher_BHTS[row, :, column])


def _check_weight(weight: float) -> None:
    if not weight > 0:
        raise ValueError(f"weight must be above 0, got {weight}")
