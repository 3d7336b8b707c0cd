"""Cards: whose licence is carried over, and the results of an evaluation."""

import re

import pytest
import yaml

from llmdistill.config import Experiment
from llmdistill.data.cards import dataset_card, model_card, with_results
from llmdistill.models.licence import licence_of, restriction, sentence
from llmdistill.training.trainer import DistillConfig
from tests.stages.test_report import HEADLINE, metrics


@pytest.mark.parametrize(
    ("head", "licence", "bound"),
    [
        ("license: apache-2.0", {"license": "apache-2.0"}, None),
        ("license: llama3", {"license": "llama3"}, "forbids using its output to improve language models"),
        ("license: gemma", {"license": "gemma"}, "treats? a model trained"),
        (
            "license: other\nlicense_name: llama3.1\nlicense_link: LICENSE",
            {"license": "other", "license_name": "llama3.1", "license_link": "LICENSE"},
            "a name that begins with “Llama”",
        ),
        ("license: cc-by-nc-4.0", {"license": "cc-by-nc-4.0"}, "no commercial use"),
        ("tags: [a]", {}, None),
        ("license: [unclosed", {}, None),
    ],
)
def test_the_licence_is_that_of_the_card(tmp_path, head, licence, bound):
    (tmp_path / "README.md").write_text(f"---\n{head}\n---\n# A model\n")
    assert licence_of(str(tmp_path)) == licence
    found = restriction(licence)
    assert (found is None) == (bound is None)
    if bound:
        assert found in sentence(licence)
        assert re.search(bound, found)


def test_a_model_without_a_card_has_no_known_licence(tmp_path):
    assert licence_of(str(tmp_path)) == {}
    assert licence_of("nobody/nothing-of-this-name") == {}
    assert "not known to llmdistill" in sentence({})


def test_a_dataset_carries_the_licence_of_its_teacher():
    teacher = {"model": "big", "engine": "vllm", "licence": {"license": "llama3"}}
    manifest = {"teacher": teacher, "sampling": {}, "targets": {"kind": "none"}, "shards": [], "rows": 0, "completion_tokens": 0}
    card = dataset_card(manifest)
    assert yaml.safe_load(card.split("---")[1])["license"] == "llama3"
    assert "**Note: the Llama 3 licence forbids" in card


def test_text_that_the_teacher_has_only_read_is_not_called_its_own():
    teacher = {"model": "big", "engine": "vllm", "licence": {"license": "llama3"}}
    manifest = {"teacher": teacher, "sampling": {}, "targets": {"kind": "none"}, "shards": [], "rows": 0, "completion_tokens": 0}
    head = yaml.safe_load(dataset_card(manifest).split("---")[1])
    assert "synthetic" in head["tags"]
    card = dataset_card(manifest | {"text_from": "mine/books.jsonl"})
    head = yaml.safe_load(card.split("---")[1])
    assert "synthetic" not in head["tags"]
    assert "license" not in head
    assert "| text | from `books.jsonl`, scored by `big` |" in card


def test_a_student_has_the_licence_of_the_weights_that_it_starts_from(tmp_path):
    """And not the teacher's, which its card names beside it."""
    teacher = {"model": "big", "engine": "vllm", "licence": {"license": "llama3"}}
    manifest = {"teacher": teacher, "targets": {"kind": "topk", "k": 4}, "shards": []}
    arguments = DistillConfig(str(tmp_path), use_cpu=True, bf16=False)

    def card(**student):
        parts = {"output": str(tmp_path), "teacher": {"model": "big"}, "student": student}
        return model_card(Experiment.model_validate(parts), manifest, "student", arguments, {"steps": 1})

    def licence(text):
        return yaml.safe_load(text.split("---")[1])["license"]

    (tmp_path / "small").mkdir()
    assert licence(card(model=str(tmp_path / "small"))) == "other", "it is not known"
    (tmp_path / "small/README.md").write_text("---\nlicense: apache-2.0\n---\n")
    own = card(model=str(tmp_path / "small"))
    assert licence(own) == "apache-2.0"
    assert "small`, has the licence `apache-2.0`, which applies to its weights." in own
    assert "The teacher has the licence `llama3`." in own
    for derived in ({"model": "big"}, {"prune": {"layers": 2}}):
        assert licence(card(**derived)) == "llama3"


def test_results_stand_before_the_configuration_once():
    card = "---\ntags: []\n---\n\n# student\n\n## Configuration\n\nseed: 0\n"
    once = with_results(card, metrics(), {})
    assert once == with_results(once, metrics(), {})
    assert once.index(HEADLINE) < once.index("## Configuration")
    assert "| KL(teacher ‖ student), nats per token | 2.13 (95% CI 2.08 to 2.18) |" in once
    assert once.endswith("## Configuration\n\nseed: 0\n")


def test_results_say_whose_text_was_measured_and_by_which_score():
    found, card = metrics(), "---\ntags: []\n---\n"
    found["tasks"]["tasks"][0]["metric"] = "rouge_l"
    wrote, read = with_results(card, found, {}), with_results(card, found, {"text_from": "mine/books.jsonl"})
    assert "| <b>|facts, rouge_l, % | 50.0% (95% CI 40.0 to 60.0), teacher 50.0% |" in wrote
    assert "right" not in wrote
    assert "On 3,903 tokens that the teacher wrote for 48 prompts" in wrote
    assert "On 3,903 tokens that the teacher scored for 48 prompts" in read
    for text, how in ((wrote, "wrote"), (read, "scored")):
        results = yaml.safe_load(text.split("---\n")[1])["model-index"][0]["results"]
        assert results[0]["dataset"]["name"] == f"held-out text that the teacher {how}"
        assert results[1]["metrics"][0] == {"type": "rouge_l", "name": "rouge_l", "value": 0.5}


def test_with_another_tokenizer_the_results_are_those_of_the_reports_first_table():
    """Of the text of both, bits per byte: the NLL is that of classes there."""
    found = metrics()
    found["held_out"]["classes"] = {}
    card = with_results("---\ntags: []\n---\n", found, {})
    assert "nats per token | 2.98" not in card
    assert "bits per byte | 2.98 (95% CI 2.89 to 3.08) |" in card
    assert "On 3,903 positions that both vocabularies share, of the text that the teacher wrote for 48 prompts" in card
    head = yaml.safe_load(card.split("---\n")[1])
    assert [metric["type"] for metric in head["model-index"][0]["results"][0]["metrics"]] == ["kl", "top1", "bits_per_byte"]
