# SPDX-License-Identifier: Apache-2.0
"""Each command that a page shows is one that exists, and takes the words that it is shown with.

dsjax's own are read as the command reads them, up to where it would begin; of `make` and `python`
the target or file is looked for. What they do is tested elsewhere: the READMEs' blocks are run by
`make walk`, whose tables are checked here.
"""

import re
import shlex
import sys
from collections.abc import Callable, Mapping
from pathlib import Path

import pytest
import yaml

from dsjax.config import load_config, split_arguments
from dsjax.config.commands import COMMANDS
from dsjax.config.convert_config import main as convert_config
from dsjax.config.evaluate_options import parse_words
from dsjax.config.train_options import split_process_options
from dsjax.errors import ConfigError
from dsjax.export.options import make_parser as export_parser
from dsjax.generate.options import make_parser as generate_parser
from dsjax.plan.options import split_words
from dsjax.view.command import make_parser as view_parser

ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT / "tools"))

import walk  # noqa: E402

PAGES = sorted(
    page
    for page in (*ROOT.glob("*.md"), *(ROOT / "docs").rglob("*.md"))
    if page.name != "CHANGELOG.md"  # of commands as they once were
)
OURS = re.compile(r"(?:.*/)?python -m dsjax\.(\w+)|(?:.*/)?dsjax ([\w-]+)")
SHOWN = re.compile(r"(?:\S*/)?(?:python |dsjax [a-z]|make )")
NEEDED = {"model": {"path": "m"}, "data": {"train": "rows.jsonl"}, "output_dir": "runs/x"}


def name(file: Path) -> str:
    return str(file.relative_to(ROOT))


def commands(page: Path) -> list[str]:
    """The commands that a page shows, in its blocks and between its lines."""
    text = page.read_text("utf-8").replace("\\\n", " ")
    blocks = re.findall(r"^```(?:bash)?\n(.*?)^```$", text, re.M | re.S)
    lines = [line for block in blocks for line in block.splitlines()]
    variables = {f"${key}": value for key, value in re.findall(r'^(\w+)="(.*)"$', text, re.M)}
    for variable, value in variables.items():
        lines = [line.replace(variable, value) for line in lines]
    prose = re.sub(r"^```.*?^```$", "", text, flags=re.M | re.S)
    spans = [" ".join(span.split()) for span in re.findall(r"`([^`]+)`", prose)]
    return [shown for shown in (*lines, *spans) if SHOWN.match(shown)]


def words_of(command: str) -> list[str]:
    """What the shell hands over; a result that goes into a file is not for the command."""
    words = shlex.split(command, comments=True)
    return words[: words.index(">")] if ">" in words else words


def read_config(words: list[str], needed: Path) -> None:
    path, overrides, flags = split_arguments(words)
    if path is not None:
        load_config(ROOT / path if (ROOT / path).exists() else needed, overrides)
    else:
        assert not words or flags


def evaluate(words: list[str], needed: Path) -> None:
    given = parse_words(words)
    if given.config is not None:
        read_config([given.config, *given.overrides], needed)


def convert(words: list[str], needed: Path) -> None:
    with pytest.raises(ConfigError, match=r"^\S+\.yaml: got No such file"):
        convert_config(words)


READERS: Mapping[str, Callable[[list[str], Path], object]] = {
    "train": lambda words, needed: read_config(split_process_options(words)[1], needed),
    "plan": lambda words, needed: read_config(split_words(words)[2], needed),
    "evaluate": evaluate,
    "generate": lambda words, needed: generate_parser().parse_args(words),
    "export": lambda words, needed: export_parser().parse_intermixed_args(words),
    "view": lambda words, needed: view_parser().parse_args(words),
    "convert-config": convert,
}


@pytest.mark.parametrize("page", PAGES, ids=name)
def test_each_command_of_a_page_is_one(page: Path, tmp_path: Path):
    needed = tmp_path / "reader.yaml"
    needed.write_text(yaml.safe_dump(NEEDED))
    targets = re.findall(r"^([\w-]+):", (ROOT / "Makefile").read_text(), re.M)
    for shown in commands(page):
        words = words_of(shown)
        ours = OURS.match(shown)
        if ours is not None:
            command = ours[1] or ours[2]
            assert command in COMMANDS, shown
            rest = words[3 if ours[1] else 2 :]
            if rest and "--help" not in rest:
                READERS[command](rest, needed)
        elif words[0] == "make":
            assert set(words[1:]) <= set(targets), shown
        elif words[1:] and words[1].endswith(".py"):
            assert (ROOT / words[1]).is_file(), shown


def test_the_walk_knows_each_block_of_the_readmes():
    pages = [walk.steps((ROOT / page).read_text("utf-8")) for page in walk.PAGES]
    assert walk.unmatched([step for page in pages for step in page]) == []
    english, chinese = ([step.run for step in page] for page in pages)
    assert english == chinese and len(english) > 10


def test_the_walk_refuses_what_it_does_not_know():
    assert walk.unmatched([]) == [
        f"nothing shows this any more: {key}" for key in (*walk.NOT_RUN, *walk.IN_PLACE)
    ]
    with pytest.raises(ValueError, match="a block is 'console'"):
        walk.steps("```console\n$ make\n```\n")


@pytest.mark.parametrize(
    ("shown", "code", "said"),
    [
        ("exact: 0.0 % -> 98.3 %", 0, "every block was walked\n"),
        (
            "exact: 0.0 % -> 99.2 %",
            0,
            "every block was walked\n"
            "OTHER FIGURES, page.md: 'exact: 0.0 % -> 99.2 %' was here 'exact: 0.0 % -> 98.3 %'\n",
        ),
        ("inexact: 98.3 %", 1, "page.md: failed: inexact: 98.3 %\n"),
    ],
)
def test_the_walk_says_where_a_pages_figures_are_others(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], shown: str, code: int, said: str
):
    page = walk.steps(f"```bash\necho 'exact: 0.0 % -> 98.3 %'\n```\n```\n{shown}\n```\n")
    assert walk.Walk(tmp_path).through({"page.md": page}) == code
    assert capsys.readouterr().out.endswith(f" GiB\n{said}")
