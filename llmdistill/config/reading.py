"""Reading an experiment from a YAML file and overrides, and the messages for invalid ones."""

import copy
import difflib
import re
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any, Literal, get_args, get_origin

import yaml
from pydantic import ValidationError

from llmdistill.config.curate import CurateStep
from llmdistill.config.experiment import Experiment
from llmdistill.config.prompts import PromptStep
from llmdistill.config.section import Empty, Section, Step
from llmdistill.config.shipped import find
from llmdistill.config.student import ORIGINS
from llmdistill.data.targets import KINDS
from llmdistill.errors import InputError

_CHARACTERS = 10_000_000
_DEPTH = 100
_NODES = 1_000_000


_STEPS: dict[str, type[Step]] = {"curate.N": CurateStep, "prompts.steps.N": PromptStep}


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
    """Read the experiment in `file` and apply dotted overrides: `("train.alpha", "0.5")`, with the value read as YAML.

    Raises:
        InputError: if it is invalid; names the file and the key.
    """
    tree = read_yaml(file, loader=_ConfigurationLoader)
    given = {key for key, _ in overrides}
    for key, value in overrides:
        try:
            read = _read(value)
            _set(tree, key.split("."), read)
            if key == "targets.kind":  # a size in the file may belong to another kind
                sizes = {"n", "k"} - {KINDS[read].size if read in KINDS else None}
                for name in sizes - {name.removeprefix("targets.") for name in given}:
                    tree["targets"].pop(name, None)
            origin = key.split(".")[1] if key.startswith("student.") and read is not None else None
            if origin in ORIGINS:  # they are alternatives: one on the command line replaces another in the file
                tree["student"] = {name: kept for name, kept in tree["student"].items() if name == origin or name not in ORIGINS}
        except (yaml.YAMLError, LookupError, TypeError, ValueError, AttributeError):
            raise InputError(f"{file}: cannot set {key} to {value!r}") from None
    try:
        return Experiment.model_validate(tree)
    except ValidationError as error:
        raise InputError("\n".join(f"{file}: {explain(detail)}" for detail in error.errors())) from None


def _read(word: str) -> Any:
    """Read a command-line argument as YAML; plain text continues after a `#`, as there are no comments here."""
    node = yaml.compose(word, Loader=_ConfigurationLoader)
    is_plain = node is None or (isinstance(node, yaml.ScalarNode) and node.style is None)
    return word if is_plain and re.search(r"(^|\s)#", word) else yaml.load(word, Loader=_ConfigurationLoader)


def dump_experiment(experiment: Experiment) -> str:
    """YAML of the settings of an experiment, which `load_experiment` reads back unchanged; defaults are left out."""
    # A default that is written down would be a choice: `student.prune.refit: true` is refused where the default is not.
    # Null is allowed only where it is the default, so it need not be written either.
    return dump_yaml(experiment.model_dump(exclude_unset=True, exclude_none=True))


def dump_yaml(tree: dict[str, Any]) -> str:
    """YAML that `read_yaml` reads back as the same mapping."""
    return yaml.dump(tree, Dumper=_Dumper, sort_keys=False, allow_unicode=True, width=1000)


def read_yaml(file: Path, key: str | None = None, loader: "type[_Loader] | None" = None) -> dict[str, Any]:
    """Read a YAML file that contains a mapping.

    Args:
        file: the file.
        key: the key that names the file, for the error if it is missing.
        loader: the loader for experiments; in other files, a key without a value is null.

    Raises:
        InputError: if the file is missing or invalid.
    """
    try:
        with find(file).open(encoding="utf-8") as stream:
            text = stream.read(_CHARACTERS + 1)
        if len(text) > _CHARACTERS:
            raise InputError(f"{file}: longer than {_CHARACTERS:,} characters, so it is not a configuration")
        tree = yaml.load(text, Loader=loader or _Loader)
    except FileNotFoundError:
        raise InputError(f"{file}: no such file" + (f" ({key})" if key else "")) from None
    except (OSError, UnicodeDecodeError) as error:
        raise InputError(f"{file}: cannot be read: {error}") from None
    except yaml.YAMLError as error:
        raise InputError(f"{file}: not valid YAML: {' '.join(str(error).split())}") from None
    if not isinstance(tree, dict):
        raise InputError(f"{file}: must contain a mapping of keys to values")
    return tree


def keys(section: type[Section] = Experiment, prefix: str = "", optional: str = "") -> Iterator[tuple[str, str, str]]:
    """Every key of the configuration with its type and help text, in the order of the file.

    Args:
        section: the section whose keys to list.
        prefix: prefix of their names.
        optional: the innermost enclosing section that is optional.
    """
    texts = section.help_texts()
    for name, field in section.model_fields.items():
        text = texts.get(name, "")
        inner = [t for t in (field.annotation, *get_args(field.annotation)) if isinstance(t, type) and issubclass(t, Section)]
        if inner and issubclass(inner[0], Step):
            yield f"{prefix}{name}", "LIST", text
            for step, settings in inner[0].step_types().items():
                yield from keys(settings, f"{prefix}{name}.N.{step}.", f"{prefix}{name}.N.{step}")
        elif inner and get_origin(field.annotation) is list:
            yield f"{prefix}{name}", "LIST", text
            yield from keys(inner[0], f"{prefix}{name}.N.", f"{prefix}{name}.N")
        elif inner and get_origin(field.annotation) is dict:
            yield f"{prefix}{name}", "DICT", text
            within = f"{prefix}{name}.{'NAME' if name == 'teachers' else 'STAGE'}"
            yield from keys(inner[0], f"{within}.", within)
        elif inner:
            yield from keys(inner[0], f"{prefix}{name}.", optional if field.is_required() else f"{prefix}{name}")
        else:
            yield f"{prefix}{name}", _type_name(field.annotation), _with_default(field, text, optional)


def _with_default(field: Any, text: str, optional: str) -> str:
    if field.is_required():
        return f"{text} (required{f' with {optional}' if optional else ''})"
    return text if field.default in (None, {}, []) else f"{text} (default {field.default})"


def _type_name(annotation: Any) -> str:
    if hasattr(annotation, "__metadata__"):  # constraints on the value are not its type
        return _type_name(annotation.__origin__)
    values = [v for v in get_args(annotation) if v is not type(None)]
    if getattr(annotation, "__origin__", None) is Literal:
        return "|".join(str(v) for v in values)
    if getattr(annotation, "__origin__", None) in (list, dict):
        return str(annotation.__origin__.__name__).upper()
    return "|".join(_type_name(v) for v in values) if values else str(annotation.__name__).upper()


def _set(tree: Any, path: list[str], value: Any) -> None:
    """Set a dotted key; missing sections are created, list items are addressed by number.

    Everything along the path is copied, as aliases may use it elsewhere too.
    """
    *parents, last = path
    for part in parents:
        key: Any = int(part) if isinstance(tree, list) else part
        inner = tree[key] if isinstance(tree, list) else tree.get(key)
        tree[key] = {} if inner is None or isinstance(inner, Empty) else copy.copy(inner)
        tree = tree[key]
    if isinstance(tree, list):
        tree[int(last)] = value
    else:
        tree[last] = value


def explain(detail: Any) -> str:
    """One validation error as a sentence that names the key."""
    key = ".".join(str(part) for part in detail["loc"] if not _is_type_label(part))
    if detail["type"] == "extra_forbidden":
        return f"no such key {key}{_hint(key)}"
    if detail["type"] == "missing":
        return f"the key {key} is missing"
    if detail["type"] == "value_error":
        return f"{key + ': ' if key else ''}{detail['ctx']['error']}"
    message, given = detail["msg"].removeprefix("Input "), detail["input"]
    if detail["type"] == "model_type":
        in_list = isinstance(given, str) and isinstance(detail["loc"][-1], int)
        hint = f"; a step with its defaults is `- {given}:`" if in_list else ""
        return f"{key} should be a mapping of keys to values, got {given!r}{hint}"
    return f"{key} {message}, got {'nothing' if given == {} else repr(given)}"


def _hint(key: str) -> str:
    """Suggest what an unknown key may have meant."""
    known = [name for name, _, _ in keys()]
    known += sorted({prefix for name in known for prefix in _prefixes(name)})
    named = re.sub(r"\.stages\.[\w-]+\.", ".stages.STAGE.", re.sub(r"\.\d+\.", ".N.", key))
    named = re.sub(r"^teachers\.[^.]+\.", "teachers.NAME.", named)
    if named in known:
        return ", with dots in it; in a file, nest the keys instead"
    above = named.rpartition(".")[0]
    if above in _STEPS:
        beside = list(_STEPS[above].step_types())
        near = difflib.get_close_matches(named.rpartition(".")[2], beside, n=1, cutoff=0.7)
        return f"; did you mean {key.rpartition('.')[0]}.{near[0]}?" if near else f"; available are {', '.join(beside)}"
    if near := difflib.get_close_matches(named, known, n=1, cutoff=0.75):
        return f"; did you mean {near[0]}?"
    if key.startswith("train."):
        return f"; arguments of trl.SFTConfig go under train.args (train.args.{key.removeprefix('train.')})"
    return ""


def _is_type_label(part: Any) -> bool:
    """Whether part of a location is not a key: pydantic adds the branch of a union (`int`, `list[int]`) and `[key]`."""
    return isinstance(part, str) and bool(re.fullmatch(r"(int|str|float|bool|none|\[key\]|(list|literal)\[.*\])", part))


def _prefixes(key: str) -> Iterator[str]:
    parts = key.split(".")
    return (".".join(parts[:n]) for n in range(1, len(parts)))


class _Loader(yaml.SafeLoader):
    """YAML's safe loader, in which a duplicate key is an error.

    As in YAML 1.2, `1e-4` is a number, while `12:00:00`, dates and `=` are text.

    Also errors are ways for a small file to become large, deep or endless: nesting, and anchors that refer to each other or
    to themselves.
    """

    def __init__(self, stream: Any) -> None:
        super().__init__(stream)
        self._depth = self._nodes = 0
        self._sizes: dict[int, int] = {}  # of composed nodes, including everything inside

    def compose_node(self, parent: Any, index: Any) -> Any:
        """Compose a node, and count its size with every alias expanded."""
        is_alias, mark = self.check_event(yaml.AliasEvent), self.peek_event().start_mark  # type: ignore[no-untyped-call]
        before, self._depth = self._nodes, self._depth + 1
        if self._depth > _DEPTH:
            raise yaml.composer.ComposerError(None, None, f"nested more than {_DEPTH} deep", mark)
        node = super().compose_node(parent, index)
        if is_alias and id(node) not in self._sizes:
            raise yaml.composer.ComposerError(None, None, "an alias inside the node that it refers to", mark)
        if isinstance(node, yaml.ScalarNode) and re.search("[\ud800-\udfff]", node.value):
            raise yaml.composer.ComposerError(None, None, "half of a surrogate pair, which is not a character", mark)
        self._nodes += self._sizes[id(node)] if is_alias else 1
        if self._nodes > _NODES:
            raise yaml.composer.ComposerError(None, None, f"more than {_NODES:,} values after expanding aliases", mark)
        self._sizes.setdefault(id(node), self._nodes - before)
        self._depth -= 1
        return node

    def construct_mapping(self, node: yaml.MappingNode, deep: bool = False) -> dict[Any, Any]:
        """Refuse duplicate keys, of which the last would silently win."""
        seen = set()
        for key_node, _ in node.value:
            if key_node.tag == "tag:yaml.org,2002:merge":
                continue
            key = self.construct_object(key_node, deep=True)
            if isinstance(key, dict | list):
                why = "a key that is a mapping or a list; text that begins with { or [ needs quotes"
                raise yaml.constructor.ConstructorError(None, None, why, key_node.start_mark)
            if key in seen:
                raise yaml.constructor.ConstructorError(None, None, f"duplicate key {key}", key_node.start_mark)
            seen.add(key)
        return super().construct_mapping(node, deep)


class _Dumper(yaml.SafeDumper):
    """Writes YAML that `_Loader` reads back: text that looks like a number is quoted."""

    def ignore_aliases(self, data: object) -> bool:
        """Write repeated values in full."""
        return True


def _text(dumper: _Dumper, text: str) -> yaml.ScalarNode:
    """Escape characters that YAML 1.2 does not treat as line breaks; the loader would read them as spaces."""
    style = '"' if re.search("[\x85\u2028\u2029]", text) else None
    return dumper.represent_scalar("tag:yaml.org,2002:str", text, style=style)


_Dumper.add_representer(str, _text)

# Integers of YAML 1.2, and 1_000: not the sexagesimal ones of YAML 1.1, where 12:00:00 is 43200, nor the octal 010.
_INT = re.compile(r"^([-+]?[0-9]+(_[0-9]+)*|0o[0-7]+|0x[0-9a-fA-F]+)$")
_Loader.add_constructor(
    "tag:yaml.org,2002:int",
    lambda loader, node: int(node.value, 0 if node.value[1:2] in ("o", "x") else 10),
)
_Loader.yaml_implicit_resolvers = {
    first: [(tag, pattern) for tag, pattern in resolvers if not tag.endswith((":float", ":int", ":timestamp", ":value"))]
    for first, resolvers in yaml.SafeLoader.yaml_implicit_resolvers.items()
}
for _either in (_Loader, _Dumper):
    _either.add_implicit_resolver("tag:yaml.org,2002:int", _INT, list("-+0123456789"))
    _either.add_implicit_resolver(
        "tag:yaml.org,2002:float",
        re.compile(r"^[-+]?((\d+(\.\d*)?|\.\d+)([eE][-+]?\d+)?|\.(inf|Inf|INF))$|^\.(nan|NaN|NAN)$"),
        list("-+.0123456789"),
    )


class _ConfigurationLoader(_Loader):
    """Distinguishes a key without a value from one that is null: without a value, a section has its defaults."""

    def construct_null(self, node: yaml.ScalarNode) -> Empty | None:
        """Construct `Empty` for no value, and None for a null that is written out."""
        return None if node.value else Empty()


_ConfigurationLoader.add_constructor("tag:yaml.org,2002:null", _ConfigurationLoader.construct_null)
