import pytest

from llmdistill.curation.personal_data import is_example
from tests.curation.steps import apply_step, table

ALL = ["email", "phone", "credit_card", "iban", "ip_address", "us_ssn"]
PRIVATE = {
    "Write to maria.lopez@gmail.com today.": "email",
    "Call me at +49 30 901820, please.": "phone",
    "His number is (212) 736-5000.": "phone",
    "The card is 4539 5787 6362 1486.": "credit_card",
    "Pay to DE89 3704 0044 0532 0130 00.": "iban",
    "The server is 8.8.8.8.": "ip_address",
    "SSN: 536-22-8726": "us_ssn",
}
HARMLESS = [
    "Write to jane@example.com or bob@mail.example.org, or to root@localhost.",
    "Call (212) 555-0143.",
    "The card 4539 5787 6362 1487 has a wrong checksum.",
    "The router is at 192.168.1.1, and 127.0.0.1 is you; 203.0.113.7 is for documents.",
    "In 1999, 12,500 of 314,159 people lived there; π is 3.14159265358979.",
    "DE00 3704 0044 0532 0130 00 is no account.",
    "Version 1.2.3 was released on 2024-05-06 at 10:30.",
    "536228726 is a number.",
    "This gives us 0.028571428571428, or 1.4539578763621486.",
]


def test_what_is_private_and_what_only_looks_like_it(tmp_path):
    rows = table([*PRIVATE, *HARMLESS])
    reasons, _ = apply_step(tmp_path, {"personal_data": {"kinds": ALL}}, rows)
    kinds = [reason and reason.split(" at character")[0].replace(" ", "_") for reason in reasons]
    assert kinds == [*PRIVATE.values(), *[None] * len(HARMLESS)]
    for text, reason in zip(PRIVATE, reasons, strict=False):
        assert not any(word in reason for word in text.split() if any(map(str.isdigit, word)) or "@" in word), (
            "it says what it is"
        )


def test_code_and_versions_are_no_addresses_on_the_internet(tmp_path):
    rows = table(["nums[1::2] and arr[10::5]", "Face::Add(x); use abc::de;", "version 3.11.4.2", "ping 2607:f8b0:4005:805::200e"])
    found = apply_step(tmp_path, {"personal_data": {"kinds": ["ip_address"]}}, rows)[0]
    assert found == [None, None, None, "ip address at character 16"]


def test_prompts_are_looked_at_too_and_kinds_can_be_chosen(tmp_path):
    rows = table(["a", "b"], prompts=["I am maria.lopez@gmail.com", "The server is 8.8.8.8"])
    assert apply_step(tmp_path, {"personal_data": None}, rows)[0] == ["email at character 5", None]
    assert apply_step(tmp_path, {"personal_data": {"kinds": ["ip_address"]}}, rows)[0] == [None, "ip address at character 14"]


@pytest.mark.parametrize(
    ("kind", "text", "example"),
    [
        ("email", "a@example.com", True),
        ("email", "a@example.company.com", False),
        ("email", "a@myexample.com", False),
        ("phone", "+1 (212) 555-0199", True),
        ("phone", "+1 (212) 555-0200", False),
        ("ip_address", "10.0.0.1/8", True),
        ("ip_address", "2001:4860:4860::8888", False),
        ("ip_address", "1::2", True),
        ("ip_address", "::ffff:8.8.8.8", False),
        ("ip_address", "Face::Add", True),
        ("iban", "x", False),
    ],
)
def test_examples(kind, text, example):
    assert is_example(kind, text) is example


@pytest.mark.parametrize(
    "text",
    [
        "Newton wrote it in 1687.",
        "The budget rose by 3000 - 2920 = 80.",
        "color: #333333;",
        "cos C = -0.3571428571",
        "The lake is 1680 m deep.",
        "In 2019-2020 it was warm.",
        "on 2023-10-05 he left",
        "1 000 000 people and 12 345 678 apples",
        "He paid $2127365000.",
        "30 + 2127365000",
        "ISBN 978-0-306-40615-7",
        "the years 1999 2000 2001",
        "The router is at 192.168.10.12.",
        "RGB (255) 128 64 32",
        "the code 12-34-56-78-90",
        "the bytes 00 11 22 33 44 55",
        "9876543210 calls were made",
    ],
)
def test_numbers_are_no_phones(tmp_path, text):
    assert apply_step(tmp_path, {"personal_data": {"kinds": ["phone"]}}, table([text]))[0] == [None]


@pytest.mark.parametrize(
    "text",
    [
        "Call +1 212-736-5000 now",
        "(212) 736-5000",
        "212-736-5000",
        "my phone is 2127365000",
        "020 7946 0958",
        "+49 171 2345678",
        "0049 170 1234567",
        "9876543210 call me",
        "2127365000 is my number",
        "06 12 34 56 78",
        "(030) 90 18 20",
        "(11) 98765-4321",
    ],
)
def test_phones_are_phones(tmp_path, text):
    (reason,), _ = apply_step(tmp_path, {"personal_data": {"kinds": ["phone"]}}, table([text]))
    assert reason.startswith("phone at character")
