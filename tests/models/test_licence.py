"""The licence that a model's card tells, whatever else stands there, and that no card costs a run."""

import pytest

from llmdistill.data.cards import write_card
from llmdistill.models.licence import licence_of, restriction, sentence


@pytest.mark.parametrize(
    ("head", "found", "said"),
    [
        ("license: apache-2.0", {"license": "apache-2.0"}, "has the licence `apache-2.0`"),
        ("license: other\nlicense_name: mine", {"license": "other", "license_name": "mine"}, "has the licence `mine`"),
        ("license_link: https://x.org/l", {"license_link": "https://x.org/l"}, "has the licence `https://x.org/l`"),
        ("license: llama3.1", {"license": "llama3.1"}, "Note: the Llama 3.1 licence"),
        ("license: [mit, apache-2.0]", {"license": "['mit', 'apache-2.0']"}, "has the licence"),
        ("date: 2024-13-45", {}, "is not known to llmdistill"),
        ("license: *nothing", {}, "is not known to llmdistill"),
        ("- a list", {}, "is not known to llmdistill"),
        ("a: " + "[" * 2000, {}, "is not known to llmdistill"),
    ],
)
def test_whatever_the_card_says(tmp_path, head, found, said):
    (tmp_path / "README.md").write_text(f"---\n{head}\n---\n# A model\n")
    assert licence_of(str(tmp_path)) == found
    assert said in sentence(found)
    restriction(found)


def test_a_card_that_cannot_be_made_is_a_warning(tmp_path, capsys):
    def fails():
        raise KeyError("license")

    write_card(tmp_path / "README.md", fails)
    assert not list(tmp_path.iterdir())
    assert "README.md: not written: KeyError: 'license'" in capsys.readouterr().out
