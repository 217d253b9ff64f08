# SPDX-License-Identifier: Apache-2.0
"""The README.md of an export."""

import ast

import pytest
import yaml

from dsjax.export.model_card import CardFacts, markdown_table, source_license, write_model_card


def facts(**more):
    given = {
        "base_model": "deepseek-ai/deepseek-llm-7b-base",
        "library_name": "peft",
        "method": "LoRA",
        "step": 200,
        "hyperparameters": {"adapter.r": 16, "adapter.target_modules": "q_proj|v_proj"},
        "metrics": [
            *({"step": step, "loss": 2 / step} for step in range(1, 301)),
            {"step": 200, "eval_loss": 0.25},
            {"step": 200, "train_loss": 0.5},
        ],
        "license": {"license": "other", "license_name": "deepseek"},
    }
    return CardFacts(**(given | more))


def front_matter(text):
    _, front, _ = text.split("---\n", 2)
    return yaml.safe_load(front)


def test_front_matter_is_yaml_with_the_hubs_fields(tmp_path):
    text = write_model_card(tmp_path, facts()).read_text()
    assert front_matter(text) == {
        "base_model": "deepseek-ai/deepseek-llm-7b-base",
        "library_name": "peft",
        "pipeline_tag": "text-generation",
        "license": "other",
        "license_name": "deepseek",
        "tags": ["dsjax", "jax", "lora"],
    }


def test_card_states_hyperparameters_losses_and_versions(tmp_path):
    text = write_model_card(tmp_path, facts()).read_text()
    assert "| `adapter.r` | 16 |" in text
    assert "| `adapter.target_modules` | q_proj\\|v_proj |" in text
    assert "| 1 | 2.0000 |  |" in text
    assert "| 200 | 0.0100 | 0.2500 |" in text
    assert "| `jax` | " in text
    assert "| 201 |" not in text and "| 300 |" not in text
    assert text.split("## Loss")[1].split("## Versions")[0].count("\n| ") <= 2 + 27


def test_same_facts_give_the_same_bytes(tmp_path):
    first = write_model_card(tmp_path, facts()).read_bytes()
    assert write_model_card(tmp_path, facts()).read_bytes() == first


def test_run_without_a_logged_loss_has_no_loss_section(tmp_path):
    text = write_model_card(tmp_path, facts(metrics=[{"step": 1, "loss": None}])).read_text()
    assert "## Loss" not in text


@pytest.mark.parametrize(
    ("library", "loader"),
    [
        ("peft", "PeftModel.from_pretrained"),
        ("transformers", "AutoModelForCausalLM.from_pretrained"),
    ],
)
def test_snippet_is_python_that_loads_with_the_library(tmp_path, library, loader):
    base = 'a "quoted" directory'
    card = write_model_card(tmp_path, facts(library_name=library, base_model=base))
    snippet = card.read_text().split("```python\n")[1].split("```")[0]
    ast.parse(snippet)
    assert loader in snippet


def test_directory_as_base_model_is_pointed_out(tmp_path):
    note = "put the model's hub id there"
    for base in (str(tmp_path), "gs://bucket/model"):
        text = write_model_card(tmp_path, facts(base_model=base)).read_text()
        assert note in text and f"Trained from `{base}`" in text
        assert "base_model" not in front_matter(text)  # the hub would refuse the card
    assert note not in write_model_card(tmp_path, facts()).read_text()


def test_license_comes_from_the_sources_readme(tmp_path):
    fields = "license: other\nlicense_name: deepseek\nlicense_link: LICENSE\ntags: [a]\n"
    (tmp_path / "README.md").write_text(f"---\n{fields}---\n# Model\n")
    assert source_license(tmp_path, {"license": "mit"}) == {
        "license": "other",
        "license_name": "deepseek",
        "license_link": "LICENSE",
    }


@pytest.mark.parametrize(
    "readme",
    [
        *(None, "# Model\n", "---\nlicense: [\n---\n", "---\nlicense: mit", ""),
        *("---\ndate: 2026-13-45\n---\n", f"---\na: {'[' * 3_000}\n---\n"),
        "---\na: &a {b: *a}\n---\n",
    ],
)
def test_license_falls_back_to_the_config(tmp_path, readme):
    if readme is not None:
        (tmp_path / "README.md").write_text(readme)
    assert source_license(tmp_path, {"license": "mit"}) == {"license": "mit"}
    assert source_license(tmp_path, {}) == {}


def test_markdown_table_keeps_cells_out_of_its_syntax():
    assert markdown_table(("a",), [("x|y\nz",)]) == "| a |\n| --- |\n| x\\|y z |"


def test_what_a_reader_must_be_stands_below_how_to_load(tmp_path):
    text = write_model_card(tmp_path, facts(needs="For peft 0.21 or later.")).read_text()
    assert text.index("## How to load") < text.index("For peft 0.21") < text.index("## Hyper")
