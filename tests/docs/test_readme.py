"""The READMEs and docs/ against the code: every flag of every script, both ways; the commands; the modules."""

import re

import pytest
from conftest import ROOT

import stage1_text_encoder
import stage2_transformer
import stage3_vae_decoder
from hunyuan_staged import fit_preview
from hunyuan_staged.bench import cards
from hunyuan_staged.bench import command as bench_command
from hunyuan_staged.cluster import command as cluster_command
from hunyuan_staged.compare import command
from hunyuan_staged.demo import adapter, caches, evaluate, quality
from hunyuan_staged.demo import super_resolution as demo_super_resolution
from hunyuan_staged.download import command as download_command
from hunyuan_staged.gallery import command as gallery_command
from hunyuan_staged.verify import command as verify_command

READMES = ("README.md", "README.zh.md")
PAGES = (*READMES, "CONTRIBUTING.md", *sorted(str(path.relative_to(ROOT)) for path in (ROOT / "docs").glob("*.md")))
# In the order of their tables
COMMANDS = (
    *(stage1_text_encoder, stage2_transformer, stage3_vae_decoder),
    *(command, download_command, verify_command, fit_preview, gallery_command),
    cluster_command,
)
STAGES = COMMANDS[:3]


def read(page: str) -> str:
    return (ROOT / page).read_text(encoding="utf-8")


def flags_of(parser) -> set[str]:
    return {flag for action in parser._actions for flag in action.option_strings if flag.startswith("--")} - {"--help"}


def tables(page: str) -> list[set[str]]:
    """The flags in the first column of each table that lists flags."""
    found = []
    for block in re.split(r"\n(?!\|)", read(page)):
        flags = re.findall(r"^\| `(--\w+)` \|", block, flags=re.MULTILINE)
        if flags:
            found.append(set(flags))
    return found


def main_flags(readme: str) -> list[list[str]]:
    """The flags in README's row of each stage."""
    rows = re.findall(r"^\| \d \| `stage\d_\w+\.py` \|.*$", read(readme), flags=re.MULTILINE)
    return [re.findall(r"`(--\w+)`", row) for row in rows]


def test_the_flag_tables_are_the_parsers():
    assert tables("docs/flags.md") == [flags_of(module.build_parser()) for module in COMMANDS]


@pytest.mark.parametrize("readme", READMES)
def test_the_main_flags_are_five_of_each_stage(readme):
    found = main_flags(readme)
    assert [len(flags) for flags in found] == [5, 5, 5]
    for flags, module in zip(found, STAGES, strict=True):
        assert set(flags) <= flags_of(module.build_parser())


@pytest.mark.parametrize("page", PAGES)
def test_every_flag_in_the_text_exists(page):
    tools = (adapter, caches, evaluate, quality, demo_super_resolution)
    known = set().union(*(flags_of(module.build_parser()) for module in (*COMMANDS, *tools)))
    stages = next(action for action in bench_command.build_parser()._actions if isinstance(action.choices, dict))
    known |= set().union(*(flags_of(parser) for parser in stages.choices.values()))
    known |= set(re.findall(r'"(--\w+)"', read("hunyuan_staged/demo/train.py")))
    # torchrun's, the hub's and modelscope's own, the launchers', and docs/build.py's
    others = {"--gpus", "--help", "--nproc", "--local", "--local_dir", "--model", "--include", "--check", "--version"}
    others |= {"--no_compile"}  # bench's, in commands of older commits
    others |= {"--head", "--port", "--address"}  # Ray's, and sbatch's:
    others |= {"--job", "--array", "--requeue", "--time", "--ntasks", "--gpus", "--cpus", "--signal"}
    assert set(re.findall(r"(?<![\w-])--[a-z]\w*", read(page))) - others <= known


def test_the_computed_memory_is_what_the_plan_computes():
    rows = cards.table()
    for row in rows:
        assert f"| {' | '.join(row)} |" in read("docs/memory.md")
    # README's rows say of each card how many blocks of stage 2 at 720p stay in host memory.
    blocks = {row[0]: re.findall(r"(\d+) of (\d+)", row[2]) for row in rows}
    english, chinese = (re.findall(r"^\| [\w ]+, (\d+ GB) \| (.*?) \|", read(page), re.MULTILINE) for page in READMES)
    assert (
        [card for card, _ in english] == [card for card, _ in chinese] == ["12 GB", "16 GB", "24 GB", "24 GB", "80 GB"]
    )
    for (card, said), (_, said_in_chinese) in zip(english, chinese, strict=True):
        assert re.findall(r"(\d+) of (\d+)", said) == blocks[card]
        assert [(a, b) for b, a in re.findall(r"(\d+) 个块中的 (\d+) 个", said_in_chinese)] == blocks[card]


@pytest.mark.parametrize("readme", READMES)
def test_the_two_commands_and_the_licence_are_there(readme):
    text = read(readme)
    needed = (
        "bash run_staged.sh",
        "bash tests/run.sh",
        "python -m pytest",
        "Apache-2.0",
        "Tencent Hunyuan Community License",
    )
    for words in needed:
        assert words in text, words
    assert re.search(r"python -m pytest|tests/run\.sh", read(".ci/run"))


def test_the_architecture_names_every_module():
    text = read("docs/architecture.md")
    for path in [*ROOT.glob("*.py"), *ROOT.glob("*.sh")]:
        assert path.name in text, path.name
    folders = dict(re.findall(r"^\| \*\*(\S+)/\*\* \| \|\n((?:\| `.*\n)+)", text, re.MULTILINE))
    for path in (ROOT / "hunyuan_staged").rglob("*.py"):
        if path.name not in ("__init__.py", "__main__.py"):
            folder = str(path.parent.relative_to(ROOT))
            assert f"| `{path.name}` |" in folders.get(folder, ""), f"run python docs/build.py: {folder}/{path.name}"


def test_both_languages_have_the_same_sections():
    parts = [re.split(r"^## ", read(readme), flags=re.MULTILINE) for readme in READMES]
    assert len(parts[0]) == len(parts[1]) > 11
    for english, chinese in zip(*parts, strict=True):
        for shown in (
            lambda text: re.findall(r"^((?:bash|hf|modelscope) \S.*?)\s*(?:#.*)?$", text, re.MULTILINE),
            lambda text: re.findall(r"!\[.*?\]\((.*?)\)", text),
            lambda text: re.findall(r"\]\((docs/\w+\.md|C\w+\.md)\)", text),
        ):
            assert sorted(shown(english)) == sorted(shown(chinese))
