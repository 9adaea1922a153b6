"""How an option is declared: a field of an options class, whose flag on the command line follows from it.

An options class is a frozen dataclass; parsers, job files and docs/flags.md are made from its fields. Knows no torch.
"""

from dataclasses import MISSING, Field, dataclass, field, fields
from types import NoneType, UnionType
from typing import Any, get_args, get_origin, get_type_hints

FLAG = "flag"  # the key of a field's metadata


@dataclass(frozen=True)
class Flag:
    """What the command line says of an option. either: the name of a set of which only one may be given. each: the field
    that gets all values of an option that may be given several times, each time for a job of its own."""

    help: str
    group: str
    choices: tuple[str, ...] | None = None
    metavar: str | None = None
    either: str | None = None
    each: str | None = None


def flag(
    help: str,
    *,
    group: str,
    default: Any = None,
    choices: tuple[str, ...] | None = None,
    metavar: str | None = None,
    either: str | None = None,
    each: str | None = None,
) -> Any:
    """A field of an options class. In `help` %(default)s stands for the default."""
    return field(default=default, metadata={FLAG: Flag(help, group, choices, metavar, either, each)})


@dataclass(frozen=True)
class Option:
    """One option of a class. kind: bool, str, int or float, of one value; several: it may be given several times."""

    name: str
    kind: type
    several: bool
    default: Any
    flag: Flag


def options_of(cls: type) -> list[Option]:
    """The options of an options class, in the order of its fields, bases first."""
    hints = get_type_hints(cls)
    return [_option(one, hints[one.name]) for one in fields(cls) if FLAG in one.metadata]


def _option(one: Field[Any], hint: Any) -> Option:
    assert one.default is not MISSING, f"{one.name} has no default"
    kinds = get_args(hint) if get_origin(hint) is UnionType else (hint,)
    (kind,) = (kind for kind in kinds if kind is not NoneType)
    several = get_origin(kind) is tuple
    return Option(one.name, get_args(kind)[0] if several else kind, several, one.default, one.metadata[FLAG])
