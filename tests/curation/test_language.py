import pytest

from llmdistill.errors import InputError
from tests.curation.steps import apply_step, table

ENGLISH = (
    "The tide rises and falls because the moon pulls at the sea, and because the earth turns under that pull "
    "twice a day; the sun helps a little, most of all when it stands in one line with the moon."
)
GERMAN = (
    "Ebbe und Flut entstehen, weil der Mond am Meer zieht und die Erde sich unter diesem Zug dreht; die Sonne "
    "hilft ein wenig, vor allem dann, wenn sie mit dem Mond in einer Linie steht und beide gemeinsam wirken."
)
JAPANESE = "潮の満ち引きは、月が海を引っぱる力と地球の自転によって一日に二回起こります。" * 4


def test_language_of_the_prose(tmp_path):
    lines = "wert = berechne(der_wert, und_noch_ein_wert)  # Ergebnis der Rechnung\n" * 8
    code = f"Here it is:\n```python\n{lines}```\n{ENGLISH}"
    short = "Ebbe und Flut macht der Mond."
    quoting = f"{ENGLISH} The German word for it is “Gezeiten”, and in French it is called “la marée”."
    rows = table([ENGLISH, GERMAN, JAPANESE, code, short, quoting, "12 + 30 = 42", ""])
    assert apply_step(tmp_path, {"language": {"keep": ["en"]}}, rows)[0] == [None, "de", "ja", None, None, None, None, None]
    assert apply_step(tmp_path, {"language": {"keep": ["de", "ja"]}}, rows)[0][:3] == ["en", None, None]
    asked = table([GERMAN, GERMAN], prompts=["Put this into German: …", "Say it in French: …"])
    assert apply_step(tmp_path, {"language": {"keep": ["en"]}}, asked)[0] == [None, "de"]
    with pytest.raises(InputError, match=r"curate\.0\.language\.keep: xx is not a language that lingua knows; it knows af, "):
        apply_step(tmp_path, {"language": {"keep": ["xx"]}}, rows)
