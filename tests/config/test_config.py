import subprocess
import sys
from typing import get_args

import pytest

from llmdistill.config import Experiment, dump_experiment, keys, load_experiment, read_yaml
from llmdistill.config.export import Export
from llmdistill.config.jobs import Slurm
from llmdistill.config.reading import dump_yaml
from llmdistill.config.section import Section
from llmdistill.config.student import Lora
from llmdistill.config.targets import Targets
from llmdistill.errors import InputError
from tests.conftest import ROOT

MINIMAL = "output: out\nteacher: {model: some/teacher}\nstudent: {prune: {layers: 4}}\n"


@pytest.fixture
def file(tmp_path):
    path = tmp_path / "experiment.yaml"
    path.write_text(MINIMAL)
    return path


@pytest.mark.parametrize("path", sorted(ROOT.glob("configs/*.yaml")), ids=lambda path: path.name)
def test_every_shipped_configuration_is_valid(path):
    load_experiment(path)


@pytest.mark.parametrize("path", sorted(ROOT.glob("configs/*.yaml")), ids=lambda path: path.name)
def test_what_is_written_is_read_back_as_the_same(path, file):
    """What is set stays set, and a default stays one: `student.prune.refit: true` is refused where its default is not."""
    args = "{run_name: '1e5', notes: ['on', '0x1f', '2020-01-01', 'a: b # c', \"two\\nlines\"], eps: 1.0e-8, none: null}"
    main = "teachers.default" if load_experiment(path).teachers else "teacher"
    experiment = load_experiment(path, [("train.args", args), (f"{main}.engine_args.until", "2020-01-01")])
    file.write_text(dump_experiment(experiment))
    again = load_experiment(file)
    assert again == experiment
    assert again.train.args["notes"] == ["on", "0x1f", "2020-01-01", "a: b # c", "two\nlines"]
    assert again.model_dump(exclude_unset=True, exclude_none=True) == experiment.model_dump(exclude_unset=True, exclude_none=True)


def test_null_is_the_default_of_every_key_that_may_be_null():
    """So null need not be written."""

    def sections(section):
        yield section
        for inner in section.__subclasses__():
            yield from sections(inner)

    fields = [(name, field) for section in sections(Section) for name, field in section.model_fields.items()]
    assert len(fields) > 100
    assert not [name for name, field in fields if type(None) in get_args(field.annotation) and field.default is not None]


def test_a_variant_keeps_the_rest_and_is_checked(file):
    experiment = load_experiment(file, [("train.alpha", "0.5")])
    variant = experiment.with_(output="other", train=experiment.train.with_(loss="reverse_kl"), targets=Targets(kind="topk"))
    assert (variant.output, variant.train.loss, variant.train.alpha) == ("other", "reverse_kl", 0.5)
    assert (experiment.output, experiment.train.loss) == ("out", "forward_kl")
    assert variant.student == experiment.student
    with pytest.raises(ValueError, match="sampled targets give an unbiased estimate of forward_kl only"):
        experiment.with_(train=experiment.train.with_(loss="reverse_kl"))
    with pytest.raises(ValueError, match="trian"):
        experiment.with_(trian=None)


@pytest.mark.parametrize(
    ("key", "value", "attribute", "expected"),
    [
        ("train.alpha", "0.5", "train.alpha", 0.5),
        ("train.args.learning_rate", "1e-5", "train.args", {"learning_rate": 1e-5}),
        ("train.args.report_to", "[wandb]", "train.args", {"report_to": ["wandb"]}),
        ("student.lora.r", "8", "student.lora.r", 8),
        ("student.model", "x", "student.prune", None),
        ("student.config", "{num_hidden_layers: 2}", "student.prune", None),
        ("student.config.hidden_size", "8", "student.config", {"hidden_size": 8}),
        ("student.prune.layers", "[0, 3]", "student.prune.layers", [0, 3]),
        ("teacher.max_model_len", "null", "teacher.max_model_len", None),
    ],
)
def test_overrides(file, key, value, attribute, expected):
    found = load_experiment(file, [(key, value)])
    for part in attribute.split("."):
        found = getattr(found, part)
    assert found == expected


def test_taking_away_what_another_origin_has_replaced_changes_nothing(file):
    found = load_experiment(file, [("student.model", "x"), ("student.prune", "null")])
    assert (found.student.model, found.student.prune) == ("x", None)


@pytest.mark.parametrize(
    ("key", "value", "message"),
    [
        ("train.aplha", "0.5", "no such key train.aplha; did you mean train.alpha?"),
        ("teecher.model", "x", "no such key teecher; did you mean teacher?"),
        ("train.learning_rate", "1e-5", "go under train.args (train.args.learning_rate)"),
        ("train.alpha", "lots", "train.alpha should be a valid number"),
        ("train.alpha", "1.5", "train.alpha should be less than or equal to 1, got 1.5"),
        (
            "targets.kind",
            "top",
            "targets.kind should be 'sampled', 'sampled_logprobs', 'sampled_by_student', 'multinomial', 'topk', ",
        ),
        ("student", "{model: x, prune: {layers: 2}}", "either student.model or student.prune"),
        ("curate", "[{repetition: {}, length: {}}]", "exactly one key"),
        ("curate", "[{repetiton: {}}]", "did you mean curate.0.repetition?"),
        ("curate", "[{nope: {}}]", "no such key curate.0.nope; available are finish_reason, length, language"),
        (
            "curate",
            "[duplicates]",
            "curate.0 should be a mapping of keys to values, got 'duplicates'; a step with its defaults is `- d",
        ),
        ("targets", "{k: 64}", "targets: k has no effect with kind sampled, only with topk"),
        ("targets", "{kind: topk, n: 16}", "targets: n has no effect with kind topk, only with sampled, "),
        ("output", "~/runs", "output: ~/runs begins with ~, which only a shell expands; write the full path"),
        ("output.x", "1", "cannot set output.x"),
        ("train.loss", "mse", "train.loss should be 'forward_kl', 'reverse_kl', 'jsd'"),
        ("train.loss", "jsd", "train.loss is jsd, but sampled targets give an unbiased estimate of forward_kl only"),
        ("train.hidden", "{}", "train.hidden needs an online teacher; set targets.kind to online"),
        ("train.attention.weight", "0", "train.attention.weight should be greater than 0"),
        ("student", "{model: x, quantize: nf4}", "quantize is nf4, but quantised weights cannot be trained; add lora"),
        ("train.temperature", "2", "sampled targets are unbiased only at temperature 1; set targets.kind to topk"),
        ("train.beta", "0.5", "beta is 0.5, but forward_kl has no parameter beta"),
        ("train", "{loss: jsd, beta: 1}", "train.beta should be less than 1"),
        ("train.args.hub_token", "hf_abc", "hub_token would be written to run.json"),
        ("teacher.engine_args.hf_token", "hf_abc", "hf_token would be written to run.json"),
        ("train.args.model_init_kwargs", "{token: hf_abc}", "token would be written to run.json"),
    ],
)
def test_a_wrong_override_names_file_and_key(file, key, value, message):
    with pytest.raises(InputError) as error:
        load_experiment(file, [(key, value)])
    assert str(error.value).startswith(str(file))
    assert message in str(error.value)


@pytest.mark.parametrize("section", ["train", "rounds"])
@pytest.mark.parametrize(
    ("name", "value", "message"),
    [
        ("learning_rate", "fast", "learning_rate is 'fast': it should be a valid number"),
        ("learning_rate", ".nan", "learning_rate is nan: it should be a finite number"),
        ("learning_rate", "-1", "learning_rate is -1: it should be greater than or equal to 0"),
        ("num_train_epochs", "[2]", r"num_train_epochs is [2]: it should be a valid number"),
        ("max_steps", "0", "max_steps is 0: it should be greater than or equal to 1"),
        ("per_device_train_batch_size", "true", "per_device_train_batch_size is True: it should be a valid integer"),
        ("gradient_accumulation_steps", "1.5", "gradient_accumulation_steps is 1.5: it should be a valid integer"),
        ("weight_decay", "-1", "weight_decay is -1: it should be greater than or equal to 0"),
        ("max_length", "long", "max_length is 'long': it should be a valid integer"),
        ("seed", "20261123182849", "seed is 20261123182849: it should be less than 4294967296"),
    ],
)
def test_numbers_that_transformers_would_stumble_over_late_are_refused(file, section, name, value, message):
    with pytest.raises(InputError) as error:
        load_experiment(file, [("rounds", "{n: 1}"), (f"{section}.args.{name}", value)])
    assert str(error.value) == f"{file}: {section}.args: {message}"


@pytest.mark.parametrize("args", ["{max_steps: -1, max_length: null, weight_decay: 0}", "{learning_rate: 1e-4, save_steps: 0.1}"])
def test_numbers_that_can_be_are_taken(file, args):
    assert load_experiment(file, [("train.args", args)]).train.args


@pytest.mark.parametrize("key", ["generate.temperature", "prompts.sampling.temperature"])
def test_a_temperature_that_vllm_would_raise_in_silence_is_refused(file, key):
    file.write_text(f"{MINIMAL}prompts: {{source: prompts.jsonl}}\n")
    for value in ("0", "0.01"):
        load_experiment(file, [(key, value)])
    load_experiment(file, [(key, "0.005"), ("teacher.engine", "transformers")])
    for engine in ([], [("teacher.engine", "server"), ("teacher.url", "http://host")]):
        with pytest.raises(InputError, match=rf"{key} is 0\.005, but engine .* set it to 0 or to at least 0\.01"):
            load_experiment(file, [(key, "0.005"), *engine])


def test_a_seed_is_one_that_every_library_takes(file):
    with pytest.raises(InputError, match=r"seed should be less than 2147483648"):
        load_experiment(file, [("seed", "20261123182849")])


def test_a_loss_of_the_rounds_that_does_not_fit_is_named_before_the_first_stage(file):
    changes = [("targets", "{kind: topk}"), ("train", "{loss: jsd, beta: 0.3}"), ("rounds", "{loss: reverse_kl}")]
    with pytest.raises(InputError) as error:
        load_experiment(file, changes)
    assert str(error.value) == f"{file}: rounds.loss: train.beta is 0.3, but reverse_kl has no parameter beta"


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("a: [1", "not valid YAML"),
        ("- 1", "must contain a mapping"),
        (MINIMAL + "output: again\n", "duplicate key output"),
        ("output: out\n", "the key teacher is missing"),
        (MINIMAL + "train: {args: !!python/object/apply:os.system [true]}\n", "not valid YAML"),
        (MINIMAL + 'prompts: {source: a.jsonl, system: "Be \\ud83d brief."}\n', "half of a surrogate pair"),
    ],
)
def test_a_wrong_file(file, text, message):
    file.write_text(text)
    with pytest.raises(InputError, match=message):
        load_experiment(file)


def nested(depth):
    return "a: " + "[" * depth + "]" * depth + "\n"


BOMB = "a0: &a0 [x, x]\n" + "".join(f"a{n}: &a{n} [*a{n - 1}, *a{n - 1}, *a{n - 1}, *a{n - 1}]\n" for n in range(1, 30))


@pytest.mark.parametrize(
    ("text", "message"),
    [
        (nested(3000), "nested more than 100 deep"),
        ("a: " + "{b: " * 3000 + "1" + "}" * 3000, "nested more than 100 deep"),
        (BOMB, "more than 1,000,000 values after expanding aliases"),
        ("a: &a [*a]\n", "an alias inside the node that it refers to"),
        ("a: &a {b: *a}\n", "an alias inside the node that it refers to"),
        ("output: {{ name }}\n", r"text that begins with \{ or \[ needs quotes"),
        ("? [1, 2]\n: 3\n", r"text that begins with \{ or \[ needs quotes"),
        ("x" * 10_000_001, "longer than 10,000,000 characters"),
    ],
)
@pytest.mark.timeout(60)
def test_a_file_that_would_be_large_deep_or_endless(file, text, message):
    file.write_text(text)
    with pytest.raises(InputError, match=message):
        load_experiment(file)


def test_mappings_may_be_merged_and_times_are_text(file):
    file.write_text(
        "output: out\nteacher: &one {model: some/teacher, dtype: float32}\n"
        "curate: [{judge: {teacher: {<<: *one, dtype: bfloat16}, template: prompts/judge.yaml}}]\n"
        "jobs: {slurm: {time: 12:00:00}}\n"
    )
    found = load_experiment(file)
    judge = found.curate[0].settings.teacher
    assert (judge.model, judge.dtype, found.teacher.dtype) == ("some/teacher", "bfloat16", "float32")
    assert found.jobs.slurm.time == "12:00:00"
    assert load_experiment(file, [("seed", "0x10")]).seed == 16


def test_an_override_below_a_value_is_no_key(file):
    with pytest.raises(InputError, match=r"experiment\.yaml: cannot set output\.foo\.bar to '1'"):
        load_experiment(file, [("output.foo.bar", "1")])


def test_an_override_below_a_key_without_a_value(file):
    file.write_text(MINIMAL + "generate:\n  json_schema:\ntrain: {args: {lr_scheduler_kwargs: }}\n")
    overrides = [("generate.json_schema.type", "object"), ("train.args.lr_scheduler_kwargs.num_cycles", "2")]
    found = load_experiment(file, overrides)
    assert found.generate.json_schema == {"type": "object"}
    assert found.train.args == {"lr_scheduler_kwargs": {"num_cycles": 2}}


def test_an_override_of_what_stands_in_two_places_by_an_alias_changes_one(file):
    file.write_text(MINIMAL + "curate: [length: &one {min_tokens: 1}, length: *one]\n")
    steps = load_experiment(file, [("curate.1.length.min_tokens", "9")]).curate
    assert [step.settings.min_tokens for step in steps] == [1, 9]


def test_text_with_line_ends_of_unicode_is_handed_on_as_it_is(file):
    found = load_experiment(file, [("teacher.system", '"a\\x85b\\u2028c"')])
    assert found.teacher.system == "a\x85b\u2028c"
    file.write_text(dump_experiment(found))
    assert load_experiment(file).teacher.system == "a\x85b\u2028c"


def test_a_missing_file(tmp_path):
    with pytest.raises(InputError, match=r"nowhere.yaml: no such file"):
        load_experiment(tmp_path / "nowhere.yaml")


def test_numbers_with_an_exponent_are_numbers(file):
    file.write_text(MINIMAL + "train: {args: {learning_rate: 1e-4, weight_decay: 1E-2, run_name: 1e}}\n")
    assert load_experiment(file).train.args == {"learning_rate": 1e-4, "weight_decay": 1e-2, "run_name": "1e"}


def test_a_step_without_settings_has_its_defaults(file):
    file.write_text(MINIMAL + "curate:\n  - duplicates:\n  - repetition: {max_share: 0.1}\n")
    steps = load_experiment(file).curate
    assert [step.name for step in steps] == ["duplicates", "repetition"]
    assert steps[1].settings.max_share == 0.1


def test_every_key_has_a_description():
    assert all(text for _, _, text in keys())
    assert {name.split(".")[0] for name, _, _ in keys()} == set(Experiment.model_fields)


def test_configuration_needs_no_torch_and_imports_fast():
    code = "import sys, llmdistill.cli; print([m for m in ('torch', 'transformers', 'vllm', 'trl') if m in sys.modules])"
    run = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert run.stdout.strip() == "[]"


@pytest.mark.parametrize(
    ("more", "message"),
    [
        ({"targets": {"kind": "sampled_logprobs"}}, "needs the full distribution of the ensemble"),
        (
            {"generate": {"thinking": "removed"}, "curate": [{"finish_reason": {}}]},
            "which an ensemble with engine vllm does not support",
        ),
    ],
)
def test_an_ensemble_among_several_teachers_is_one(more, message):
    teachers = {"math": {"model": "a", "ensemble": [{"model": "b"}]}, "default": {"model": "c"}}
    tree = {"output": "run", "teachers": teachers, "route": {"column": "kind"}, "prompts": {"source": "p.jsonl"}}
    Experiment.model_validate(tree)
    with pytest.raises(ValueError, match=message):
        Experiment.model_validate(tree | more)


def test_an_empty_value_is_a_section_with_its_defaults_and_null_is_none(tmp_path):
    """As `- duplicates:` is in a list of steps; what is no section needs a value."""
    file = tmp_path / "experiment.yaml"
    lines = "output: o\nteacher: {model: t}\nstudent: {model: s, lora: }\nexport:\njobs: {slurm: }\ncurate:\n  - duplicates:\n"
    file.write_text(lines)
    experiment = load_experiment(file)
    assert (experiment.student.lora, experiment.export, experiment.jobs.slurm) == (Lora(), Export(), Slurm())
    file.write_text(dump_experiment(experiment))
    assert load_experiment(file) == experiment
    file.write_text(lines.replace("lora: ", "lora: null").replace("export:", "export: ~"))
    assert (load_experiment(file).student.lora, load_experiment(file).export) == (None, None)
    more = "prompts: {source: p.jsonl, limit: }\ngenerate: {json_schema: }\ntrain: {args: {max_length: }}\n"
    file.write_text(lines + more)
    experiment = load_experiment(file)
    assert (experiment.prompts.limit, experiment.generate.json_schema, experiment.train.args) == (
        None,
        None,
        {"max_length": None},
    )
    file.write_text(lines + "seed:\n")
    with pytest.raises(InputError, match=r"seed should be a valid integer, got nothing"):
        load_experiment(file)


def test_another_kind_of_targets_on_the_command_line_has_its_own_size(tmp_path):
    file = tmp_path / "experiment.yaml"
    file.write_text("output: o\nteacher: {model: t}\ntargets: {kind: sampled, n: 8}\n")
    topk = ("targets.kind", "topk")
    assert load_experiment(file, [topk]).targets.k == 64
    for kind in ("sampled", "multinomial"):  # whose size is n, too
        assert load_experiment(file, [("targets.kind", kind)]).targets.n == 8
    for overrides in ([topk, ("targets.k", "9")], [("targets.k", "9"), topk]):
        assert load_experiment(file, overrides).targets.k == 9


@pytest.mark.parametrize(
    ("text", "value"),
    [("010", 10), ("008", 8), ("-07", -7), ("0o17", 15), ("0x1F", 31), ("1_000", 1000), ("12:00:00", "12:00:00")],
)
def test_numbers_are_those_of_yaml_1_2(text, value, tmp_path):
    """A day of the year as a seed, 008 or 010, is what it looks like; what is written down is read back as it was."""
    (tmp_path / "a.yaml").write_text(f"a: {text}\n")
    assert read_yaml(tmp_path / "a.yaml") == {"a": value}
    for written in (text, value):
        (tmp_path / "b.yaml").write_text(dump_yaml({"a": written}))
        assert read_yaml(tmp_path / "b.yaml") == {"a": written}


@pytest.mark.parametrize(
    ("key", "value", "found"),
    [
        ("output", "runs/exp #2", "runs/exp #2"),
        ("teacher.system", "Reply in JSON. # no prose", "Reply in JSON. # no prose"),
        ("teacher.system", "#1 rule: be brief", "#1 rule: be brief"),
        ("teacher.system", "C#", "C#"),
        ("teacher.system", "'quoted # text' # comment", "quoted # text"),
    ],
)
def test_a_word_of_the_command_line_holds_no_comment(file, key, value, found):
    section, _, name = key.rpartition(".")
    experiment = load_experiment(file, [(key, value)])
    assert getattr(getattr(experiment, section) if section else experiment, name) == found


def test_a_number_with_a_comment_is_none(file):
    with pytest.raises(InputError, match=r"train\.alpha should be a valid number"):
        load_experiment(file, [("train.alpha", "0.5 # half")])


def test_dates_and_signs_are_text_as_in_yaml_1_2(file):
    file.write_text(f"{MINIMAL}curate: [{{length: {{min_tokens: 2}}}}]\n".replace(
        "some/teacher", "some/teacher, template_args: {date_string: 2024-07-26, at: 2024-07-26 10:00:00, sign: =}"
    ))  # fmt: skip
    args = {"date_string": "2024-07-26", "at": "2024-07-26 10:00:00", "sign": "="}
    experiment = load_experiment(file)
    assert experiment.teacher.template_args == args
    file.write_text(dump_experiment(experiment))
    assert load_experiment(file) == experiment


@pytest.mark.parametrize(
    "schema",
    [
        "{type: string, enum: [yes, no]}",
        "{type: object, properties: {answer: {type: string, const: on}}}",
        "{anyOf: [{type: integer}, {type: string, enum: [maybe, off]}]}",
    ],
)
def test_a_schema_with_words_that_yaml_takes_for_booleans_is_refused(file, schema):
    with pytest.raises(InputError, match=r"json_schema allows (true|false) for a string; quote words such as yes"):
        load_experiment(file, [("generate.json_schema", schema)])


@pytest.mark.parametrize("schema", ["{type: string, enum: ['yes', 'no']}", "{type: boolean, const: true}", "{enum: [yes, 1]}"])
def test_a_schema_may_have_booleans(file, schema):
    load_experiment(file, [("generate.json_schema", schema)])
