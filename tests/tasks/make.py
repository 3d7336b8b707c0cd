"""Tasks of each kind, in a directory."""

import json

from llmdistill.tasks.task import Item, read_task

SCHEMA = {
    "type": "object",
    "properties": {
        "name": {"type": "string"},
        "age": {"type": "integer"},
        "tags": {"type": "array", "items": {"type": "string"}},
    },
    "required": ["name"],
    "additionalProperties": False,
}
TOOLS = [
    {
        "type": "function",
        "function": {
            "name": "book",
            "parameters": {
                "type": "object",
                "properties": {
                    "city": {"type": "string"},
                    "nights": {"type": "integer", "default": 1},
                    "room": {"type": "object", "properties": {"beds": {"type": "integer", "default": 2}}},
                },
                "required": ["city"],
            },
        },
    },
    {"type": "function", "function": {"name": "now"}},
]
SQL = """
CREATE TABLE people (name TEXT, age INTEGER, height REAL);
INSERT INTO people VALUES ('Ann', 31, 1.7), ('Bob', 22, 1.8), ('Cat', 31, 0.3), ('Dan', NULL, NULL);
"""
KINDS = {
    "extract": ("schema: person.json", {"person.json": json.dumps(SCHEMA)}),
    "classify": ("labels: [good, bad]", {}),
    "sql": ("database: people.sql", {"people.sql": SQL}),
    "tools": ("tools: tools.json", {"tools.json": json.dumps(TOOLS)}),
    "generate": ("", {}),
}


def write_task(directory, kind, more=""):
    needs, files = KINDS[kind]
    for name, content in files.items():
        (directory / name).write_text(content)
    file = directory / f"{kind}.yaml"
    file.write_text(f"kind: {kind}\ndescription: Do it.\n{needs}\n{more}\n")
    return file


def make_task(directory, kind):
    return read_task(write_task(directory, kind), "eval.tasks")


def items(*outputs):
    texts = [output if isinstance(output, str) else json.dumps(output) for output in outputs]
    return [Item(f"test.jsonl line {n}", str(n), str(n), "input", text) for n, text in enumerate(texts, start=1)]
