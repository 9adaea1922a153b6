"""Command-line parsers from options classes. One line for bad flags, exit status 2."""

from __future__ import annotations

import argparse
import sys
from collections.abc import Sequence
from typing import Any, NoReturn, TypeVar

from hunyuan_staged.errors import BAD_INPUT, InputError, one_line, write_stdout
from hunyuan_staged.flags import Option, options_of
from hunyuan_staged.options import DecodeOptions, DenoiseOptions, EncodeOptions
from hunyuan_staged.runtime.failure import is_first, say_error

Options = TypeVar("Options")

LAST_GROUPS = ("many videos", "other")


def refuse(message: str) -> NoReturn:
    """Print one error line, on the first process, and leave with the status of bad input."""
    say_error(message)
    sys.exit(BAD_INPUT)


class Parser(argparse.ArgumentParser):
    """An ArgumentParser that refuses in one line, takes no abbreviated flags, and speaks on the first process alone."""

    def parse_known_args(self, args: Any = None, namespace: Any = None) -> Any:
        words = sys.argv[1:] if args is None else list(args)
        for word in words:
            # Such bytes reach Python as lone surrogates, which neither tokenizers nor JSON files can hold.
            if any("\ud800" <= letter <= "\udfff" for letter in word):
                self.error(f"argument {word!a} is not UTF-8 text")
        return super().parse_known_args(words, namespace)

    def error(self, message: str) -> NoReturn:
        refuse(f"{one_line(message)} (see {self.prog} --help)")

    def print_help(self, file: Any = None) -> None:
        if not is_first():
            return
        try:
            write_stdout(self.format_help())
        except InputError as error:
            refuse(str(error))


class OpenParser(Parser):
    """Leaves the flags that it does not know in `flags`, for whoever is handed them; with the default takes_flags False,
    which a subcommand may have, it refuses them."""

    def parse_args(self, args: Any = None, namespace: Any = None) -> Any:
        found, flags = self.parse_known_args(args, namespace)
        if flags and not getattr(found, "takes_flags", True):
            self.error(f"unrecognized arguments: {' '.join(flags)}")
        found.flags = flags
        return found


def tool_parser(name: str, description: str | None, kind: type[Parser] = Parser) -> Parser:
    """The parser of a tool, `python -m NAME`, for errors.run_tool: --debug, and whatever is added."""
    raw = argparse.RawDescriptionHelpFormatter
    parser = kind(f"python -m {name}", description=description, formatter_class=raw, allow_abbrev=False)
    add_debug(parser)
    return parser


def add_debug(parser: argparse.ArgumentParser, default: object = False) -> None:
    """The flag that shows the traceback of an error."""
    parser.add_argument("--debug", action="store_true", default=default, help="show the traceback of an error")


class _StoreEach(argparse.Action):
    """Stores the last value, as argparse does, and beside it all of them; const: where."""

    def __call__(self, parser: Any, namespace: Any, values: Any, option_string: str | None = None) -> None:
        setattr(namespace, self.dest, values)
        setattr(namespace, str(self.const), (*getattr(namespace, str(self.const), ()), values))


def make_parser(cls: type, prog: str, description: str, examples: str) -> Parser:
    """The parser of an options class: the description, its flags by group, then the examples as they stand."""
    raw = argparse.RawDescriptionHelpFormatter
    parser = Parser(prog, description=description, epilog=examples, formatter_class=raw, allow_abbrev=False)
    found = options_of(cls)
    groups: dict[str, Any] = {}
    exclusive: dict[str, Any] = {}
    for option in sorted(
        found, key=lambda option: ("", *LAST_GROUPS).index(option.flag.group) if option.flag.group in LAST_GROUPS else 0
    ):
        title, _, about = option.flag.group.partition(": ")
        if title not in groups:
            groups[title] = parser.add_argument_group(title, about or None)
        place = groups[title]
        if option.flag.either:
            if option.flag.either not in exclusive:
                exclusive[option.flag.either] = place.add_mutually_exclusive_group()
            place = exclusive[option.flag.either]
        _add(place, option)
    return parser


def _add(place: Any, option: Option) -> None:
    flag = option.flag
    words: dict[str, Any] = {"help": flag.help, "default": option.default}
    if option.kind is bool:
        words["action"] = "store_true"
    else:
        words |= {"type": option.kind, "choices": flag.choices, "metavar": flag.metavar}
        if option.several:
            words |= {"action": "append", "default": None}
        if flag.each:
            words |= {"action": _StoreEach, "const": flag.each}
    place.add_argument(f"--{option.name}", **words)


def parse(cls: type[Options], parser: Parser, argv: Sequence[str] | None = None) -> Options:
    """The options that a command line gives; bad flags end the process as Parser.error does."""
    given = vars(parser.parse_args(argv))
    return cls(**{name: tuple(value) if isinstance(value, list) else value for name, value in given.items()})


def options_of_run(flags: Sequence[Sequence[str]]) -> list[Any]:
    """The options of a whole run's stages from the flags of each: stage 1, stage 2, that again for super resolution,
    stage 3, or the first so many of them."""
    classes = [EncodeOptions, *[DenoiseOptions] * max(1, len(flags) - 2), DecodeOptions][: len(flags)]
    return [
        parse(cls, make_parser(cls, "run_staged.sh", "", ""), words) for cls, words in zip(classes, flags, strict=True)
    ]
