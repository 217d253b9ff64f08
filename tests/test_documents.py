# SPDX-License-Identifier: Apache-2.0
"""What documents show works: example rows are read, links lead somewhere, the READMEs agree."""

import json
import re
from pathlib import Path

import pytest

from dsjax.data.formats import FORMATS, detect_format, parse_row

ROOT = Path(__file__).resolve().parent.parent
DOCUMENTS = sorted([*ROOT.glob("*.md"), *(ROOT / "docs").glob("*.md")])


def code_blocks(file: Path) -> list[tuple[str, str]]:
    """The code blocks of a document, each with its language."""
    return re.findall(r"^```(\w*)\n(.*?)^```$", file.read_text("utf-8"), re.M | re.S)


def test_the_example_rows_are_read_in_the_format_of_their_heading():
    text = (ROOT / "docs/data_formats.md").read_text("utf-8")
    seen = set()
    for section in text.split("\n## ")[1:]:
        heading = section.split("\n")[0]
        for line in re.findall(r'^\{".*\}$', section, re.M):
            row = json.loads(line)
            assert detect_format(row, "row") == heading
            parse_row(row, heading, "row")
            seen.add(heading)
    assert seen == set(FORMATS)


@pytest.mark.parametrize("file", DOCUMENTS, ids=lambda file: file.name)
def test_links_lead_somewhere(file: Path):
    targets = re.findall(r"\]\(([^)#:]+)\)", file.read_text("utf-8"))
    assert [target for target in targets if not (file.parent / target).exists()] == []


def test_both_readmes_show_the_same():
    english, chinese = ROOT / "README.md", ROOT / "README.zh-CN.md"
    assert code_blocks(english) == code_blocks(chinese)

    def links(file: Path) -> set[str]:
        found = re.findall(r"\]\(([^)]+)\)", file.read_text("utf-8"))
        return {target for target in found if not target.startswith("README")}

    assert links(english) == links(chinese)


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
