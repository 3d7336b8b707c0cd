"""A student with another tokenizer than its teacher's: what is shared, what a step costs, and what soft targets are worth.

    make demo && python benchmarks/across.py [--gemma DIR]

Shares: the demo's teacher against the tokenizers of `mistral_common` (byte-level BPE of 131,072 tokens, SentencePiece of 32,768)
and, if its directory is given, Gemma's, on the teacher's own text and on Python: positions with a soft target, and how much of
the teacher's entropy there the root classes keep, from its full distributions.

Cost: one training step of the demo's student with the first 32,768 tokens of Mistral's byte-level BPE on 16 sampled targets a
position over classes, against the same step with as many targets in its own tokens; interleaved, medians.

Outcome: that student, its embeddings made from the teacher's by the mean over each token's bytes, trained by soft targets over
root classes, by chunks (log-probabilities of the written tokens alone), by an online teacher, by TRL's GOLD and ULD losses
(online, byte offsets for alignment, merging "bayesian"), and by the text alone: equal rows, steps and seeds. Bits per byte of
the held-out text with 95% intervals by bootstrap over prompts; differences to the text alone are paired.
"""

import json
import shutil
import statistics
import tempfile
import time
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import synthetic
import torch
from found import argument_parser, report
from transformers import AutoTokenizer, LlamaTokenizerFast
from transformers.utils import logging

from llmdistill import DistillConfig, DistillTrainer, load_dataset
from llmdistill.config import Experiment, load_experiment
from llmdistill.config.machine import training_precision
from llmdistill.data.alignment import Side, Texts, align
from llmdistill.data.collator import DistillCollator, completion_labels, teacher_batch
from llmdistill.evaluation.fidelity import fidelity
from llmdistill.evaluation.statistics import draw_clusters, mean_interval
from llmdistill.losses import Objective, fused
from llmdistill.losses.classes import ClassTable
from llmdistill.models.forward import in_place_of_logits
from llmdistill.models.loading import load_model
from llmdistill.models.root_classes import RootClasses, Vocabulary, root_classes
from llmdistill.stages.retokenize import retokenize
from llmdistill.students.sides import Sides, sides_of

SOFT, CHUNKS, ONLINE, GOLD, ULD, TEXT = "root classes", "chunks", "root classes, online", "TRL GOLD", "TRL ULD", "text alone"
WAYS = [SOFT, TEXT, CHUNKS, ONLINE, GOLD, ULD]
SMALL = 32_768  # tokens of the student's tokenizer
TEMPLATE = (
    "{{ bos_token }}{% for message in messages %}{% if message['role'] == 'user' %}[INST] {{ message['content'] }} [/INST]"
    "{% else %}{{ message['content'] }}{{ eos_token }}{% endif %}{% endfor %}"
)
Array = np.ndarray[Any, Any]


def main() -> None:
    """Print the three tables and the aims."""
    parser = argument_parser(__doc__)
    parser.add_argument("--gemma", type=Path, help="directory with Gemma's tokenizer")
    parser.add_argument("--steps", type=int, default=40)
    parser.add_argument("--seeds", type=int, default=3)
    parser.add_argument("--ways", nargs="+", choices=WAYS, default=WAYS, help="to train the student")
    parser.add_argument("--only", choices=("shares", "cost", "outcome"))
    arguments = parser.parse_args()
    logging.set_verbosity_error()
    figures: dict[str, Any] = {}
    aims: dict[str, float] = {}
    with synthetic.demo(arguments.smoke, "generate", "curate", "prune") as tiny, tempfile.TemporaryDirectory() as scratch:
        experiment = load_experiment(Path("configs/demo.yaml"), tiny)
        if arguments.only in (None, "shares"):
            figures["shares"] = shares(experiment, arguments.gemma, 2 if arguments.smoke else 12)
            aims["soft_positions_prose"] = min(row["soft"] for name, row in figures["shares"].items() if "prose" in name)
            aims["entropy_kept_prose"] = min(row["entropy"] for name, row in figures["shares"].items() if "prose" in name)
        if arguments.only in (None, "cost", "outcome"):
            student = write_student(experiment, Path(scratch) / "student")
            own = own_experiment(experiment, student, Path(scratch) / "run")
            if arguments.only in (None, "cost"):
                figures["cost"] = cost(own, 1 if arguments.smoke else 7)
                aims["step_over_one_tokenizer"] = figures["cost"]["ratio"]
            if arguments.only in (None, "outcome"):
                steps, seeds = (2, 1) if arguments.smoke else (arguments.steps, arguments.seeds)
                ways = [way for way in WAYS if way in (SOFT, TEXT, *arguments.ways)]
                figures["outcome"] = outcome(own, Path(scratch), steps, seeds, ways)
                aims["bits_per_byte_below_text"] = -figures["outcome"][SOFT]["difference"]["high"]
    print()
    report(figures, aims, arguments.json)


def mistral(name: str) -> Any:
    """A tokenizer of mistral_common."""
    import mistral_common
    from transformers.integrations.mistral import convert_tekken_tokenizer

    data = Path(mistral_common.__file__).parent / "data"
    if name == "tekken":
        return convert_tekken_tokenizer(str(data / "tekken_240911.json"))
    if name == "small tekken":  # its tokens are in the order of their merges: the first ones are a tokenizer, too
        content = json.loads((data / "tekken_240911.json").read_text())
        content["config"]["default_vocab_size"] = SMALL
        with tempfile.TemporaryDirectory() as directory:
            file = Path(directory) / "tekken.json"
            file.write_text(json.dumps(content))
            tokenizer = convert_tekken_tokenizer(str(file))
        tokenizer.chat_template = TEMPLATE
        return tokenizer
    with tempfile.TemporaryDirectory() as directory:
        shutil.copy(data / "mistral_instruct_tokenizer_240323.model.v3", Path(directory) / "tokenizer.model")
        tokenizer = LlamaTokenizerFast.from_pretrained(directory)
    tokenizer.chat_template = TEMPLATE
    return tokenizer


def shares(experiment: Experiment, gemma: Path | None, texts: int) -> dict[str, dict[str, float]]:
    """Of every pair of tokenizers and kind of text, what is shared."""
    teacher, theirs = (
        load_model(experiment.teacher.model, dtype="float32"),
        AutoTokenizer.from_pretrained(experiment.teacher.model),
    )
    students = {"Mistral, tekken": mistral("tekken"), "Mistral, SentencePiece": mistral("v3")}
    if gemma:
        students["Gemma"] = AutoTokenizer.from_pretrained(gemma)
    rows = load_dataset(experiment.directory("curated"), "train").with_format(None)
    prose = [row["completion"][0]["content"] for row in list(rows)[:texts]]
    code = [
        file.read_text()[:1200]
        for file in sorted(Path("llmdistill").glob("*/*.py"), key=lambda file: file.stat().st_size)[-texts:]
    ]
    found = {}
    print("\n| student's tokenizer | text | classes | soft | inside a token | roots differ | entropy kept |\n|" + " --- |" * 7)
    for name, tokenizer in students.items():
        sides = (vocabulary(theirs, teacher.config.vocab_size), vocabulary(tokenizer, len(tokenizer)))
        classes = root_classes(*sides)
        for kind, written in (("prose", prose), ("code", code)):
            row = shared(teacher, theirs, tokenizer, sides, classes, written)
            found[f"{name}, {kind}"] = row
            values = " | ".join(f"{row[key]:.1%}" for key in ("soft", "inside", "disagree", "entropy"))
            print(f"| {name} | {kind} | {classes.count:,} | {values} |", flush=True)
    return found


def vocabulary(tokenizer: Any, size: int) -> Vocabulary:
    """A tokenizer's, whose texts end with its end token."""
    return Vocabulary.of(tokenizer, [tokenizer.eos_token_id], size, "tokenizer")


def shared(
    teacher: Any, theirs: Any, tokenizer: Any, sides: tuple[Vocabulary, Vocabulary], classes: RootClasses, texts: list[str]
) -> dict[str, float]:
    """The shares of positions, and of the entropy of the teacher's full distributions at the soft ones."""
    side, own = (
        Side(v.bytes_of, of, frozenset(v.end_ids)) for v, of in zip(sides, (classes.teacher_V, classes.student_V), strict=True)
    )
    counts: dict[str, int] = {}
    whole = kept = 0.0
    table = ClassTable.of(classes)
    for text in texts:
        ids = theirs(text, add_special_tokens=False)["input_ids"]
        own_ids = tokenizer(text, add_special_tokens=False)["input_ids"]
        found = align(Texts(side, own, np.array(ids), np.array(own_ids), 1, 1))
        for key, value in found.counted.items():
            counts[key] = counts.get(key, 0) + value
        with torch.inference_mode():
            log_p_NV = teacher(torch.tensor([ids])).logits[0, :-1].float().log_softmax(-1)
        p_SV = log_p_NV[torch.from_numpy(found.place_N[found.place_N >= 0])].exp()
        p_SC = torch.zeros(len(p_SV), table.count).index_add(1, table.teacher_V[0], p_SV)
        whole -= float(torch.special.xlogy(p_SV, p_SV).sum())
        kept -= float(torch.special.xlogy(p_SC, p_SC).sum())
    row = {name: counts[name] / counts["positions"] for name in ("soft", "inside", "disagree")}
    return row | {"entropy": kept / whole, "positions": counts["positions"]}


def write_student(experiment: Experiment, directory: Path) -> Path:
    """The demo's student before training with another tokenizer: each new embedding is the mean of the old ones of its bytes."""
    tokenizer, old = mistral("small tekken"), AutoTokenizer.from_pretrained(experiment.teacher.model)
    student = load_model(str(experiment.directory("student-before")), dtype="float32")
    before = student.get_input_embeddings().weight.detach().clone()
    sides = vocabulary(tokenizer, len(tokenizer))
    student.resize_token_embeddings(len(tokenizer), mean_resizing=False)
    rows = student.get_input_embeddings().weight
    with torch.no_grad():
        rows.copy_(before.mean(0).expand_as(rows))
        for token, string in enumerate(sides.bytes_of):
            if string and (ids := old(string.decode(errors="ignore"), add_special_tokens=False)["input_ids"]):
                rows[token] = before[ids].mean(0)
        rows[tokenizer.eos_token_id] = before[old.eos_token_id]
    for config in (student.config, student.generation_config):
        config.eos_token_id, config.bos_token_id, config.pad_token_id = tokenizer.eos_token_id, tokenizer.bos_token_id, None
    student.save_pretrained(directory)
    tokenizer.save_pretrained(directory)
    return directory


def own_experiment(experiment: Experiment, student: Path, output: Path) -> Experiment:
    """The demo with this student, whose dataset is brought into its tokens."""
    made = experiment.with_(
        output=str(output),
        student=experiment.student.with_(prune=None, model=str(student)),
        train=experiment.train.with_(dataset=str(experiment.directory("curated"))),
    )
    retokenize(made)
    return made


def cost(experiment: Experiment, rounds: int) -> dict[str, float]:
    """Seconds of a step, forward and backward, by the median of interleaved rounds."""
    assert experiment.student.model is not None
    directory = experiment.directory("retokenized")
    classes, rows = RootClasses.load(directory), load_dataset(directory)
    student = load_model(experiment.student.model, dtype="float32").train()
    batch = DistillCollator(0, classes=classes)([rows[number] for number in range(min(8, len(rows)))])
    generator = torch.Generator().manual_seed(0)
    plain = {name: value for name, value in batch.items() if name != "target_soft"}
    plain["target_ids"] = torch.randint(0, len(classes.student_V), batch["target_ids"].shape, generator=generator)
    inputs = {"one tokenizer": plain, "root classes": {**batch, "target_table": ClassTable.of(classes)}}
    head = fused.find_head(student)
    assert head is not None
    seconds: dict[str, list[float]] = {name: [] for name in inputs}
    for _ in range(rounds + 1):
        for name, given in inputs.items():
            student.zero_grad()
            started = time.perf_counter()
            step(student, head, given).backward()
            seconds[name].append(time.perf_counter() - started)
    medians = {name: statistics.median(values[1:] or values) for name, values in seconds.items()}
    ratio = medians["root classes"] / medians["one tokenizer"]
    print(f"\n| a step of {len(batch['positions']):,} positions | seconds | ratio |\n| --- | ---: | ---: |")
    for name, value in medians.items():
        print(f"| {name} | {value:.3f} | {value / medians['one tokenizer']:.3f} |", flush=True)
    return {**medians, "ratio": ratio}


def step(student: Any, head: fused.Head, batch: dict[str, Any]) -> torch.Tensor:
    """The loss of a batch by the fused form."""
    labels_N = completion_labels(batch)
    loss, _ = in_place_of_logits(
        student, batch, lambda hidden_ND: fused.distillation_loss(hidden_ND, head, labels_N, batch, Objective())
    )
    return loss / len(labels_N)


def outcome(experiment: Experiment, scratch: Path, steps: int, seeds: int, ways: list[str]) -> dict[str, Any]:
    """Bits per byte on the held-out rows of every way to train, and the paired difference to the text alone."""
    directory = experiment.directory("retokenized")
    test, classes = load_dataset(directory, "test"), RootClasses.load(directory)
    teacher = load_model(experiment.teacher.model, dtype="float32")
    sides = sides_of(experiment, read(directory))[""]
    found: dict[str, list[dict[str, Array]]] = {}
    for seed in range(seeds):
        for name, student in students(experiment, sides, teacher, ways, steps, seed, scratch):
            measured = fidelity({"teacher": teacher, "student": student}, test, 8, classes=classes)
            found.setdefault(name, []).append(measured)
            print(f"seed {seed}  {name:<22}{measured['student text_nll'].sum():.0f} nats", flush=True)
    return summary(found, test)


def read(directory: Path) -> dict[str, Any]:
    """The manifest of a dataset."""
    from llmdistill.data.manifest import read_manifest

    return read_manifest(directory)


def students(
    experiment: Experiment, sides: Sides, teacher: Any, ways: Sequence[str], steps: int, seed: int, scratch: Path
) -> Iterator[tuple[str, Any]]:
    """The student after training in every way, with one seed; and as it was, with the first."""
    assert experiment.student.model is not None
    directory = experiment.directory("retokenized")
    rows = load_dataset(directory)
    chunked = chunked_rows(experiment, scratch)
    if seed == 0:
        yield "before training", load_model(experiment.student.model, dtype="float32")
    recipe = {**experiment.train.args, "max_steps": steps, "seed": seed, "save_strategy": "no", "logging_strategy": "no"}
    recipe |= {"report_to": "none", "disable_tqdm": True, "use_cpu": not torch.accelerator.is_available()}
    recipe["bf16"] = training_precision(recipe["use_cpu"], None, False).dtype == "bfloat16"
    recipe = {key: value for key, value in recipe.items() if key not in ("logging_steps", "save_steps", "save_total_limit")}
    for name in ways:
        uld = trl_loss(sides, name == GOLD) if name in (GOLD, ULD) else None  # its configuration resets accelerate's state
        arguments = DistillConfig(output_dir=str(scratch / "training"), alpha=0.0 if name == TEXT else 1.0, **recipe)
        student = load_model(experiment.student.model, dtype="float32")
        kind = _Uld if name in (GOLD, ULD) else DistillTrainer
        trainer = kind(
            model=student,
            args=arguments,
            train_dataset=chunked if name == CHUNKS else rows,
            teacher=teacher if name in (ONLINE, GOLD, ULD) else None,
            classes=None if name == CHUNKS else sides.classes,
        )
        if isinstance(trainer, _Uld):
            trainer.prepare(sides, uld)
        trainer.train()
        yield name, student.eval()


def chunked_rows(experiment: Experiment, scratch: Path) -> Any:
    """The same rows as if the teacher had told no more than the log-probabilities of its tokens."""
    source, directory = Path(str(experiment.train.dataset)), scratch / "text"
    if not directory.exists():
        shutil.copytree(source, directory)
        manifest = json.loads((directory / "dataset.json").read_text())
        (directory / "dataset.json").write_text(json.dumps({**manifest, "targets": {"kind": "none"}}))
    made = experiment.with_(output=str(scratch / "chunks"), train=experiment.train.with_(dataset=str(directory)))
    retokenize(made)
    return load_dataset(made.directory("retokenized"))


class _WithStarts(DistillCollator):
    """Says, too, where the teacher's completions begin."""

    def __call__(self, rows: Any) -> dict[str, Any]:
        """One batch."""
        return {**super().__call__(rows), "starts": torch.tensor([int(row["teacher_start"]) for row in rows])}


class _Uld(DistillTrainer):
    """The same trainer with the losses of TRL's `GOLDTrainer` in the place of ours."""

    def prepare(self, sides: Sides, uld: Any) -> None:
        """What it needs beside the rows."""
        self._uld, self._sides = uld, sides
        collator = _WithStarts(0, classes=sides.classes, for_teacher=True)
        self.data_collator: Any = collator

    def compute_loss(self, model: Any, inputs: Any, return_outputs: bool = False, num_items_in_batch: Any = None) -> Any:
        """Theirs, of whole logits, with byte offsets of both sides."""
        theirs = teacher_batch(inputs)
        teacher_ids = theirs["input_ids"]
        with torch.no_grad():
            teacher_logits = self.teachers[0](input_ids=teacher_ids, attention_mask=theirs["attention_mask"]).logits
        logits = model(input_ids=inputs["input_ids"], attention_mask=inputs["attention_mask"]).logits
        teacher_labels = torch.full_like(teacher_ids, -100)
        for row, start in enumerate(inputs["starts"].tolist()):
            length = int(theirs["attention_mask"][row].sum())
            teacher_labels[row, start:length] = teacher_ids[row, start:length]
        offsets = [
            byte_offsets(side, ids, labels)
            for side, ids, labels in (
                (self._sides.student, inputs["input_ids"], inputs["labels"]),
                (self._sides.teacher, teacher_ids, teacher_labels),
            )
        ]
        loss = self._uld(logits, teacher_logits, inputs["labels"], teacher_labels, inputs["input_ids"], teacher_ids, *offsets)
        self._count(inputs, {"ce": loss.detach() * 0, "loss": loss.detach(), "weight": inputs["token_weights"].sum()})
        return loss / self.args.gradient_accumulation_steps


def trl_loss(sides: Sides, hybrid: bool) -> Any:
    """TRL's loss on sorted probabilities, or on matched tokens and sorted others (`hybrid`)."""
    from trl.experimental.gold.gold_config import GOLDConfig
    from trl.experimental.gold.gold_trainer import ULDLoss

    how: dict[str, Any] = {"use_cpu": True, "bf16": False, "report_to": "none"}
    config = GOLDConfig(
        output_dir=tempfile.gettempdir(),
        use_uld_loss=True,
        uld_use_hybrid_loss=hybrid,
        uld_token_merge_strategy="bayesian",
        **how,
    )
    return ULDLoss(config, sides.chat.tokenizer, sides.teacher_chat.tokenizer)


def byte_offsets(side: Side, ids_BT: torch.Tensor, labels_BT: torch.Tensor) -> torch.Tensor:
    """Where each completion token begins and ends in the completion, in bytes; (B, T, 2)."""
    found = torch.zeros(*ids_BT.shape, 2, dtype=torch.long)
    for row, (ids_T, labels_T) in enumerate(zip(ids_BT, labels_BT, strict=True)):
        places = (labels_T != -100).nonzero()[:, 0]
        ids = ids_T[places].numpy()
        begins = side.begins(ids)
        found[row, places] = torch.from_numpy(np.stack([begins, begins + side.length_V[ids]], axis=1))
    return found


def summary(found: dict[str, list[dict[str, Array]]], test: Any) -> dict[str, Any]:
    """Means over seeds with intervals over prompts."""
    prompts = [str(prompt) for prompt in test.with_format(None)["prompt"]]
    sizes = np.array([len(row["completion"][0]["content"].encode()) for row in test.with_format(None)])
    numbers = {prompt: number for number, prompt in enumerate(dict.fromkeys(prompts))}
    cluster = np.array([numbers[prompt] for prompt in prompts])
    draws = draw_clusters(len(numbers), 2000, seed=0)
    per_prompt = np.bincount(cluster, sizes)

    def bits(seeds: list[dict[str, Array]], quantity: str = "student text_nll") -> Array:
        return np.bincount(cluster, np.mean([measured[quantity] for measured in seeds], axis=0)) / np.log(2)

    table = {}
    print(
        "\n| trained by | bits per byte | minus the text alone | by seed | KL over classes |\n| --- | ---: | ---: | ---: | ---: |"
    )
    for name, seeds in found.items():
        mean = mean_interval(bits(seeds), per_prompt, draws)
        difference = mean_interval(bits(seeds) - bits(found[TEXT][: len(seeds)]), per_prompt, draws)
        by_seed = [
            float((bits([one]) - bits([text])).sum() / per_prompt.sum()) for one, text in zip(seeds, found[TEXT], strict=False)
        ]
        kl = float(np.mean([one["student kl"].sum() / one["tokens"].sum() for one in seeds]))
        table[name] = {"bits_per_byte": vars_of(mean), "difference": vars_of(difference), "by_seed": by_seed, "kl": kl}
        of_seeds = ", ".join(f"{value:+.3f}" for value in by_seed)
        print(
            f"| {name} | {mean.mean:.3f} ({mean.low:.3f} to {mean.high:.3f}) | {difference.mean:+.3f} ({difference.low:+.3f} to "
            f"{difference.high:+.3f}) | {of_seeds} | {kl:.3f} |"
        )
    teacher = bits(found[TEXT], "teacher text_nll").sum() / per_prompt.sum()
    print(f"the teacher itself: {teacher:.3f} bits per byte")
    return table | {"teacher": {"bits_per_byte": teacher}}


def vars_of(interval: Any) -> dict[str, float]:
    """The numbers of an interval."""
    return {name: float(getattr(interval, name)) for name in ("mean", "low", "high")}


if __name__ == "__main__":
    main()
