"""From a YAML file and overrides to an experiment, and what is said where they do not fit it."""

import difflib
import re
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any, Literal, get_args, get_origin

import yaml
from pydantic import ValidationError

from llmdistill.config.experiment import Experiment
from llmdistill.config.section import Section, Step
from llmdistill.config.shipped import find
from llmdistill.config.student import ORIGINS
from llmdistill.errors import InputError

_CHARACTERS = 10_000_000
_DEPTH = 100
_NODES = 1_000_000


def overrides_of(rest: list[str]) -> list[tuple[str, str]]:
    """Pairs of dotted key and value from `--key value` and `--key=value`."""
    pairs = []
    words = iter(rest)
    for word in words:
        if not word.startswith("--") or len(word) == 2:
            raise InputError(f"unexpected argument {word}; an override is --KEY VALUE")
        key, equals, value = word[2:].partition("=")
        if not equals:
            following = next(words, None)
            if following is None:
                raise InputError(f"--{key} needs a value")
            value = following
        pairs.append((key, value))
    return pairs


def load_experiment(file: Path, overrides: Sequence[tuple[str, str]] = ()) -> Experiment:
    """The experiment in `file` with dotted overrides applied: `("train.alpha", "0.5")`, the value read as YAML.

    Raises:
        InputError: naming the file and the key.
    """
    tree = read_yaml(file)
    for key, value in overrides:
        try:
            read = yaml.load(value, Loader=_Loader)
            _set(tree, key.split("."), read)
            origin = key.split(".")[1] if key.startswith("student.") and read is not None else None
            if origin in ORIGINS:  # they are alternatives: one on the command line replaces another in the file
                tree["student"] = {name: kept for name, kept in tree["student"].items() if name == origin or name not in ORIGINS}
        except (yaml.YAMLError, LookupError, TypeError, ValueError, AttributeError):
            raise InputError(f"{file}: cannot set {key} to {value!r}") from None
    try:
        return Experiment.model_validate(tree)
    except ValidationError as error:
        raise InputError("\n".join(f"{file}: {explain(detail)}" for detail in error.errors())) from None


def dump_experiment(experiment: Experiment) -> str:
    """YAML of what is set in an experiment, which `load_experiment` reads back as the same one; defaults are left out."""
    # A default that is written down would be a choice: `student.prune.refit: true` is refused where the default is not.
    # No key has another default than null and may be null, so that null need not be written either.
    return dump_yaml(experiment.model_dump(exclude_unset=True, exclude_none=True))


def dump_yaml(tree: dict[str, Any]) -> str:
    """YAML that `read_yaml` reads back as the same mapping."""
    return yaml.dump(tree, Dumper=_Dumper, sort_keys=False, allow_unicode=True, width=1000)


def read_yaml(file: Path, key: str | None = None) -> dict[str, Any]:
    """A YAML file that holds a mapping; `key` is the one that names it, for the error if it is not there.

    Raises:
        InputError: it is not there, or no such file.
    """
    try:
        with find(file).open(encoding="utf-8") as stream:
            text = stream.read(_CHARACTERS + 1)
        if len(text) > _CHARACTERS:
            raise InputError(f"{file}: is longer than {_CHARACTERS:,} characters, so it is no configuration")
        tree = yaml.load(text, Loader=_Loader)
    except FileNotFoundError:
        raise InputError(f"{file}: no such file" + (f" ({key})" if key else "")) from None
    except (OSError, UnicodeDecodeError) as error:
        raise InputError(f"{file}: cannot be read: {error}") from None
    except yaml.YAMLError as error:
        raise InputError(f"{file}: not valid YAML: {' '.join(str(error).split())}") from None
    if not isinstance(tree, dict):
        raise InputError(f"{file}: must hold a mapping of keys to values")
    return tree


def keys(section: type[Section] = Experiment, prefix: str = "") -> Iterator[tuple[str, str, str]]:
    """Every key of the configuration with its type and its help, in the order of the file."""
    texts = section.help_texts()
    for name, field in section.model_fields.items():
        text = texts.get(name, "")
        inner = [t for t in (field.annotation, *get_args(field.annotation)) if isinstance(t, type) and issubclass(t, Section)]
        if inner and issubclass(inner[0], Step):
            yield f"{prefix}{name}", "LIST", text
            for step, settings in inner[0].step_types().items():
                yield from keys(settings, f"{prefix}{name}.N.{step}.")
        elif inner and get_origin(field.annotation) is list:
            yield f"{prefix}{name}", "LIST", text
            yield from keys(inner[0], f"{prefix}{name}.N.")
        elif inner and get_origin(field.annotation) is dict:
            yield f"{prefix}{name}", "DICT", text
            yield from keys(inner[0], f"{prefix}{name}.{'NAME' if name == 'teachers' else 'STAGE'}.")
        elif inner:
            yield from keys(inner[0], f"{prefix}{name}.")
        else:
            yield f"{prefix}{name}", _type_name(field.annotation), _with_default(field, text)


def _with_default(field: Any, text: str) -> str:
    if field.is_required():
        return f"{text} (required)"
    return text if field.default in (None, {}, []) else f"{text} (default {field.default})"


def _type_name(annotation: Any) -> str:
    if hasattr(annotation, "__metadata__"):  # what else is asked of the value is not its type
        return _type_name(annotation.__origin__)
    values = [v for v in get_args(annotation) if v is not type(None)]
    if getattr(annotation, "__origin__", None) is Literal:
        return "|".join(str(v) for v in values)
    if getattr(annotation, "__origin__", None) in (list, dict):
        return str(annotation.__origin__.__name__).upper()
    return "|".join(_type_name(v) for v in values) if values else str(annotation.__name__).upper()


def _set(tree: Any, path: list[str], value: Any) -> None:
    """Set a dotted key; sections that are not there yet are made, list items are addressed by number."""
    *parents, last = path
    for part in parents:
        if isinstance(tree, list):
            tree = tree[int(part)]
        else:
            if tree.get(part) is None:
                tree[part] = {}
            tree = tree[part]
    if isinstance(tree, list):
        tree[int(last)] = value
    else:
        tree[last] = value


def explain(detail: Any) -> str:
    """One validation error as a sentence that names the key."""
    key = ".".join(str(part) for part in detail["loc"] if not _is_type_label(part))
    if detail["type"] == "extra_forbidden":
        known = [name for name, _, _ in keys()]
        known += sorted({prefix for name in known for prefix in _prefixes(name)})
        named = re.sub(r"\.stages\.[\w-]+\.", ".stages.STAGE.", re.sub(r"\.\d+\.", ".N.", key))
        named = re.sub(r"^teachers\.[^.]+\.", "teachers.NAME.", named)
        near = difflib.get_close_matches(named, known, n=1, cutoff=0.75)
        hint = f"; did you mean {near[0]}?" if near else ""
        if not near and key.startswith("train."):
            hint = f"; arguments of trl.SFTConfig go under train.args (train.args.{key.removeprefix('train.')})"
        return f"no such key {key}{hint}"
    if detail["type"] == "missing":
        return f"the key {key} is missing"
    if detail["type"] == "value_error":
        return f"{key + ': ' if key else ''}{detail['ctx']['error']}"
    message = detail["msg"].removeprefix("Input ")
    return f"{key} {message}, got {detail['input']!r}"


def _is_type_label(part: Any) -> bool:
    """Pydantic puts the branch of a union into the location (`int`, `list[int]`, and `[key]`); that is no key of ours."""
    return isinstance(part, str) and bool(re.fullmatch(r"(int|str|float|bool|none|\[key\]|(list|literal)\[.*\])", part))


def _prefixes(key: str) -> Iterator[str]:
    parts = key.split(".")
    return (".".join(parts[:n]) for n in range(1, len(parts)))


class _Loader(yaml.SafeLoader):
    """YAML's safe loader; numbers are as in YAML 1.2, where `1e-4` is one and `12:00:00` is none; a key given twice is an error.

    What a small file can make large, deep or endless is one, too: nesting, and anchors that name each other or themselves.
    """

    def __init__(self, stream: Any) -> None:
        super().__init__(stream)
        self._depth = self._nodes = 0
        self._sizes: dict[int, int] = {}  # of the nodes that are composed, with all that is in them

    def compose_node(self, parent: Any, index: Any) -> Any:
        """Compose a node, and count what it would be if every alias were written out."""
        is_alias, mark = self.check_event(yaml.AliasEvent), self.peek_event().start_mark  # type: ignore[no-untyped-call]
        before, self._depth = self._nodes, self._depth + 1
        if self._depth > _DEPTH:
            raise yaml.composer.ComposerError(None, None, f"nested more than {_DEPTH} deep", mark)
        node = super().compose_node(parent, index)
        if is_alias and id(node) not in self._sizes:
            raise yaml.composer.ComposerError(None, None, "an alias inside of what it names", mark)
        self._nodes += self._sizes[id(node)] if is_alias else 1
        if self._nodes > _NODES:
            raise yaml.composer.ComposerError(None, None, f"more than {_NODES:,} values, aliases written out", mark)
        self._sizes.setdefault(id(node), self._nodes - before)
        self._depth -= 1
        return node

    def construct_mapping(self, node: yaml.MappingNode, deep: bool = False) -> dict[Any, Any]:
        """Refuse a key that is there twice: the later one would win in silence."""
        seen = set()
        for key_node, _ in node.value:
            if key_node.tag == "tag:yaml.org,2002:merge":
                continue
            key = self.construct_object(key_node, deep=True)
            if isinstance(key, dict | list):
                why = "a key that is a mapping or a list; text that begins with { or [ needs quotes"
                raise yaml.constructor.ConstructorError(None, None, why, key_node.start_mark)
            if key in seen:
                raise yaml.constructor.ConstructorError(None, None, f"the key {key} is there twice", key_node.start_mark)
            seen.add(key)
        return super().construct_mapping(node, deep)


class _Dumper(yaml.SafeDumper):
    """YAML that `_Loader` reads back: text that it would take for a number is quoted."""

    def ignore_aliases(self, data: object) -> bool:
        """Write what is there twice twice."""
        return True


# Without the sexagesimal numbers of YAML 1.1, by which 12:00:00 is 43200.
_INT = re.compile(r"^[-+]?(0b[01_]+|0[0-7_]+|0x[0-9a-fA-F_]+|(0|[1-9][0-9_]*))$")
_Loader.yaml_implicit_resolvers = {
    first: [(tag, _INT if tag.endswith(":int") else pattern) for tag, pattern in resolvers if not tag.endswith(":float")]
    for first, resolvers in yaml.SafeLoader.yaml_implicit_resolvers.items()
}
for _either in (_Loader, _Dumper):
    _either.add_implicit_resolver(
        "tag:yaml.org,2002:float",
        re.compile(r"^[-+]?((\d+(\.\d*)?|\.\d+)([eE][-+]?\d+)?|\.(inf|Inf|INF))$|^\.(nan|NaN|NAN)$"),
        list("-+.0123456789"),
    )
