# SPDX-License-Identifier: Apache-2.0
"""What documents show works: examples are read, links lead somewhere, both languages agree.

A page and its Chinese form are compared block by block: what reads the same in any language. A
sentence that changes its meaning with neither code, link nor number is not noticed.
"""

import json
import re
from itertools import zip_longest
from pathlib import Path

import pytest
import yaml

from dsjax.config import load_config
from dsjax.data.formats import FORMATS, detect_format, parse_row

ROOT = Path(__file__).resolve().parent.parent
DOCUMENTS = sorted([*ROOT.glob("*.md"), *(ROOT / "docs").rglob("*.md")])
CHINESE = {
    ROOT / "README.md": ROOT / "README.zh-CN.md",
    **{ROOT / "docs" / file.name: file for file in (ROOT / "docs/zh-CN").glob("*.md")},
}
"""A page -> its Chinese form."""
NEEDED = {"model": {"path": "m"}, "data": {"train": "rows.jsonl"}, "output_dir": "runs/x"}
"""What a configuration has to hold besides the part that a page shows."""


def name(file: Path) -> str:
    return str(file.relative_to(ROOT))


def code_blocks(file: Path) -> list[tuple[str, str]]:
    """The code blocks of a document, each with its language."""
    return re.findall(r"^```(\w*)\n(.*?)^```$", file.read_text("utf-8"), re.M | re.S)


@pytest.mark.parametrize("file", [file for file in DOCUMENTS if file.name == "data_formats.md"])
def test_the_example_rows_are_read_in_the_format_of_their_heading(file: Path):
    seen = set()
    for section in file.read_text("utf-8").split("\n## ")[1:]:
        heading = section.split("\n")[0]
        for line in re.findall(r'^\{".*\}$', section, re.M):
            row = json.loads(line)
            assert detect_format(row, "row") == heading
            parse_row(row, heading, "row")
            seen.add(heading)
    assert seen == set(FORMATS)


@pytest.mark.parametrize("file", DOCUMENTS, ids=name)
def test_configurations_are_read(file: Path, tmp_path: Path):
    for language, code in code_blocks(file):
        if language == "yaml":
            config = tmp_path / "shown.yaml"
            config.write_text(yaml.safe_dump(NEEDED | yaml.safe_load(code)))
            assert load_config(config)


@pytest.mark.parametrize("file", DOCUMENTS, ids=name)
def test_links_lead_somewhere(file: Path):
    targets = re.findall(r"\]\(([^)#:]+)\)", file.read_text("utf-8"))
    assert [target for target in targets if not (file.parent / target).exists()] == []


def blocks(file: Path) -> list[str]:
    """A page in pieces: code blocks, and what empty lines divide."""
    code, text = r"^```\w*\n(?s:.*?)^```$", r"(?:^(?!```).+\n?)+"
    return re.findall(f"{code}|{text}", file.read_text("utf-8"), re.M)


def links(block: str, file: Path) -> list[str | Path]:
    """Where a block leads: addresses, and files wherever the page lies."""
    targets = re.findall(r"\]\(([^)]+)\)", block)
    return [to if ":" in to else (file.parent / to.split("#")[0]).resolve() for to in targets]


def outline(block: str) -> dict[str, list[str]]:
    """What of a block reads the same in any language."""
    if block.startswith("```"):
        return {"code": re.sub(r"(^|\s)# .*$", r"\1#", block, flags=re.M).splitlines()}
    prose = re.sub(r"`[^`]+`|\]\([^)]+\)", " ", block)
    return {
        "headings, items and rows": re.findall(r"^(?:#+ |- |\|)", block, re.M),
        "code": sorted(" ".join(words.split()) for words in re.findall(r"`([^`]+)`", block)),
        "numbers": sorted(re.findall(r"(?<![A-Za-z\d.-])\d+(?:[.,]\d+)*", prose)),
    }


@pytest.mark.parametrize("file", CHINESE, ids=name)
def test_the_chinese_page_shows_the_same(file: Path):
    translation = CHINESE[file]
    english, chinese = blocks(file), blocks(translation)
    # Below the title each leads to the other language.
    assert links(english.pop(1), file) == [translation]
    assert links(chinese.pop(1), translation) == [file]
    for ours, theirs in zip_longest(english, chinese, fillvalue=""):
        assert outline(ours) == outline(theirs), f"{ours}\n{theirs}"
        wanted = [CHINESE.get(to, to) if isinstance(to, Path) else to for to in links(ours, file)]
        assert wanted == links(theirs, translation), f"{ours}\n{theirs}"


@pytest.mark.parametrize("file", CHINESE.values(), ids=name)
def test_comments_in_chinese_pages_are_translated(file: Path):
    comments = [
        comment
        for _, code in code_blocks(file)
        for comment in re.findall(r"(?:^|\s)# (.*)$", code, re.M)
    ]
    english = r"[a-z]{2,} [a-z]{2,}"
    assert [c for c in comments if re.search(english, c) and c.isascii()] == []


@pytest.mark.parametrize("recipe", sorted((ROOT / "configs").glob("*.yaml")), ids=lambda f: f.stem)
def test_the_head_of_a_recipe_tells_its_plans(recipe: Path):
    page = (ROOT / "docs/plans.md").read_text("utf-8")
    plans = re.findall(
        r"^#   --topology (.+)\n#     .*, ([\d.]+ GiB) of ([\d.]+ GiB) each: fits",
        recipe.read_text(),
        re.M,
    )
    assert plans
    for words, peak, room in plans:
        command = f"python -m dsjax.plan --config configs/{recipe.name} --topology {words}"
        # The page's plan may be of an evaluation as well.
        found = re.search(rf"^{re.escape(command)}(?: data\.eval=\S+)?\n", page, re.M)
        assert found
        section = page[found.end() :].partition("\n## ")[0]
        assert f"of a device, of {room}:" in section
        assert re.search(rf"^  peak +{peak} ", section, re.M)
