"""The README against the code: every flag of every script, both ways, in both languages; the commands; the file tree."""

import re

import pytest
from conftest import ROOT

import stage1_text_encoder
import stage2_transformer
import stage3_vae_decoder
from hunyuan_staged.bench import command as bench_command
from hunyuan_staged.bench import memory
from hunyuan_staged.compare import command
from hunyuan_staged.demo import adapter, caches, evaluate

READMES = ("README.md", "README.zh.md")
# In the order of their tables
COMMANDS = (stage1_text_encoder, stage2_transformer, stage3_vae_decoder, command)


def flags_of(parser) -> set[str]:
    return {flag for action in parser._actions for flag in action.option_strings if flag.startswith("--")} - {"--help"}


def tables(readme: str) -> list[set[str]]:
    """The flags in the first column of each table that lists flags."""
    found = []
    for block in re.split(r"\n(?!\|)", (ROOT / readme).read_text(encoding="utf-8")):
        flags = re.findall(r"^\| `(--\w+)` \|", block, flags=re.MULTILINE)
        if flags:
            found.append(set(flags))
    return found


@pytest.mark.parametrize("readme", READMES)
def test_the_flag_tables_are_the_parsers(readme):
    assert tables(readme) == [flags_of(module.build_parser()) for module in COMMANDS]


@pytest.mark.parametrize("readme", READMES)
def test_every_flag_in_the_text_exists(readme):
    known = set().union(*(flags_of(module.build_parser()) for module in (*COMMANDS, adapter, caches, evaluate)))
    stages = next(action for action in bench_command.build_parser()._actions if isinstance(action.choices, dict))
    known |= set().union(*(flags_of(parser) for parser in stages.choices.values()))
    # torchrun's, the hub's and modelscope's own, and the launchers'
    others = {"--gpus", "--help", "--nproc", "--local", "--local_dir", "--model"}
    text = (ROOT / readme).read_text(encoding="utf-8")
    assert set(re.findall(r"(?<![\w-])--[a-z]\w*", text)) - others <= known


def test_the_computed_memory_is_what_the_plan_computes():
    english, chinese = ((ROOT / readme).read_text(encoding="utf-8") for readme in READMES)
    for row in memory.table():
        line = f"| {' | '.join(row)} |"
        assert line in english
        numbers = re.findall(r"[\d.]+", line.replace(" of ", "/"))
        matching = [found for found in chinese.splitlines() if found.startswith(f"| {row[0]} |")]
        assert len(matching) == 1 and re.findall(r"[\d.]+", matching[0]) == numbers


@pytest.mark.parametrize("readme", READMES)
def test_the_two_commands_and_the_licence_are_there(readme):
    text = (ROOT / readme).read_text(encoding="utf-8")
    for needed in ("bash run_staged.sh", "python -m pytest", "Apache-2.0", "Tencent Hunyuan Community License"):
        assert needed in text, needed
    assert "python -m pytest" in (ROOT / ".ci" / "run").read_text()


@pytest.mark.parametrize("readme", READMES)
def test_the_file_tree_names_every_module(readme):
    text = (ROOT / readme).read_text(encoding="utf-8")
    for path in [*ROOT.glob("*.py"), *ROOT.glob("*.sh"), *(ROOT / "hunyuan_staged").glob("*.py")]:
        if path.name != "__init__.py":
            assert path.name in text, path.name


def test_both_languages_have_the_same_sections():
    counts = [len(re.findall(r"^## ", (ROOT / readme).read_text(encoding="utf-8"), re.MULTILINE)) for readme in READMES]
    assert counts[0] == counts[1] > 10
