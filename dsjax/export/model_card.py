# SPDX-License-Identifier: Apache-2.0
"""The README.md of an export: what it is, how it was trained, how to load it.

In: facts of a finished or interrupted run. Out: the file, the same bytes for the same facts and
installed versions (no time stamps, no speeds), so that repeating an export changes nothing.
Not done here: copying the source's licence files (`weights.model_files`).
"""

import importlib.metadata
import json
import platform
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import yaml

from dsjax import adapters
from dsjax.config import RunConfig
from dsjax.config.paths import is_url
from dsjax.config.yaml_file import parse_yaml
from dsjax.errors import ConfigError
from dsjax.training.setup import Assembly
from dsjax.weights.generation_config import added_stop

LICENSE_KEYS = ("license", "license_name", "license_link")
_PACKAGES = ("dsjax", "jax", "flax", "optax", "transformers", "safetensors")
_MOST_ROWS = 25

_LOAD = {
    "peft": """\
from peft import PeftModel
from transformers import AutoModelForCausalLM, AutoTokenizer

tokenizer = AutoTokenizer.from_pretrained({base_model})
base = AutoModelForCausalLM.from_pretrained({base_model}, dtype="auto")
model = PeftModel.from_pretrained(base, "path/to/this/folder")""",
    "transformers": """\
from transformers import AutoModelForCausalLM, AutoTokenizer

tokenizer = AutoTokenizer.from_pretrained("path/to/this/folder")
model = AutoModelForCausalLM.from_pretrained("path/to/this/folder", dtype="auto")""",
}

UNPROVEN = (
    "**Not proven.** Every tensor was read back as it was written, but the logits were not "
    "compared with the trained model's. The proof did not run: {}"
)


@dataclass(frozen=True)
class CardFacts:
    """What a model card states.

    Args:
        base_model: the hub id or directory that training started from.
        library_name: what loads the export: `peft` for an adapter, `transformers` for a model.
        method: how it was trained, such as `LoRA` or `full fine-tuning`; becomes a tag as well.
        step: the optimizer step that is exported; losses of later steps are left out.
        hyperparameters: config keys and values, in the order to be shown.
        metrics: the rows of `metrics.jsonl`.
        license: from `source_license`.
        needs: which programs read it, beside the one that is shown; empty: nothing to say.
        stops: where generation has to stop; empty if the base model's files say so.
        unproven: why the export's proof did not run; empty if it did.
        kept: of what training changed in the logits, the part that merged weights still give; None
            for an adapter, and where there is nothing to compare.
    """

    base_model: str
    library_name: str
    method: str
    step: int
    hyperparameters: Mapping[str, object]
    metrics: Sequence[Mapping[str, Any]] = ()
    license: Mapping[str, str] = field(default_factory=dict)
    needs: str = ""
    stops: str = ""
    unproven: str = ""
    kept: float | None = None


def write_model_card(directory: Path, facts: CardFacts) -> Path:
    """Write `README.md` into an export's directory and return its path."""
    path = directory / "README.md"
    path.write_text(card_text(facts), encoding="utf-8", newline="\n")
    return path


def card_text(facts: CardFacts) -> str:
    """Return the card: YAML front matter, then Markdown."""
    name = facts.base_model.rstrip("/").split("/")[-1]
    paragraphs = [
        f"---\n{_front_matter(facts)}---",
        f"# {name}, {facts.method}",
        f"Trained from `{facts.base_model}` with dsjax ({facts.method}, {facts.step:,} steps).",
        *([UNPROVEN.format(facts.unproven)] if facts.unproven else []),
        f"## How to load\n\n```python\n{_snippet(facts)}\n```",
        *([facts.needs] if facts.needs else []),
        *([facts.stops] if facts.stops else []),
        *([kept_text(facts.kept)] if facts.kept is not None else []),
        f"## Hyper-parameters\n\n{_pairs('key', 'value', facts.hyperparameters)}",
        *_loss_section(facts),
        f"## Versions\n\n{_pairs('framework', 'version', _versions())}",
    ]
    if not _is_hub_id(facts.base_model):
        note = (
            "The lines above have no `base_model`, and what else names the model names a place of "
            "the machine that trained it: put the model's hub id there to publish this."
        )
        paragraphs.insert(3, note)
    return "\n\n".join(paragraphs) + "\n"


def kept_text(kept: float) -> str:
    """Say what is left of a training in merged weights."""
    return f"The merged weights keep {kept:.1%} of what training changed in the logits."


def source_license(directory: Path, config: Mapping[str, object]) -> dict[str, str]:
    """Return the license fields of a source's README.md front matter, else of its config.json."""
    readme = directory / "README.md"
    stated = _read_front_matter(readme) if readme.is_file() else {}
    chosen = stated if "license" in stated else config
    return {key: str(chosen[key]) for key in LICENSE_KEYS if isinstance(chosen.get(key), str)}


def markdown_table(header: Sequence[str], rows: Sequence[Sequence[str]]) -> str:
    """Return a Markdown table; a `|` or a line break inside a cell is kept out of its syntax."""
    lines = [header, ["---"] * len(header), *rows]
    cells = [[cell.replace("|", "\\|").replace("\n", " ") for cell in line] for line in lines]
    return "\n".join(f"| {' | '.join(line)} |" for line in cells)


def _is_hub_id(base_model: str) -> bool:
    """Whether a model was read from the hub, not from a folder or a URL."""
    return not is_url(base_model) and not Path(base_model).exists()


def _front_matter(facts: CardFacts) -> str:
    fields = {
        # The hub takes no card whose `base_model` is something else.
        **({"base_model": facts.base_model} if _is_hub_id(facts.base_model) else {}),
        "library_name": facts.library_name,
        "pipeline_tag": "text-generation",
        **facts.license,
        "tags": ["dsjax", "jax", facts.method.lower().replace(" ", "-")],
    }
    return yaml.safe_dump(fields, sort_keys=False, allow_unicode=True, width=1000)


def _read_front_matter(readme: Path) -> Mapping[str, object]:
    """Return the mapping between a README's first two `---` lines; {} where there is none."""
    lines = readme.read_text(encoding="utf-8", errors="replace").splitlines()
    if not lines or lines[0].strip() != "---" or "---" not in lines[1:]:
        return {}
    try:
        fields = parse_yaml("\n".join(lines[1 : lines.index("---", 1)]), str(readme))
    except ConfigError:  # somebody else's card, of which only the licence is wanted
        return {}
    return fields if isinstance(fields, dict) else {}


def _snippet(facts: CardFacts) -> str:
    return _LOAD[facts.library_name].format(base_model=json.dumps(facts.base_model))


def _pairs(left: str, right: str, pairs: Mapping[str, object]) -> str:
    rows = [(f"`{key}`", _text(value)) for key, value in pairs.items()]
    return markdown_table((left, right), rows)


def _text(value: object) -> str:
    return value if isinstance(value, str) else json.dumps(value, default=str)


def _loss_section(facts: CardFacts) -> list[str]:
    """Return the loss-by-step section, evenly thinned to about 25 rows; nothing without a loss."""
    by_step: dict[int, dict[str, float]] = {}
    for row in facts.metrics:
        shown = {key: row[key] for key in ("loss", "eval_loss") if row.get(key) is not None}
        if shown and row["step"] <= facts.step:
            by_step.setdefault(row["step"], {}).update(shown)
    if not by_step:
        return []
    steps = sorted(by_step)
    stride = -(-len(steps) // _MOST_ROWS)
    kept = [step for step in steps if "eval_loss" in by_step[step]]
    kept = sorted({*steps[::stride], *kept[:: -(-len(kept) // _MOST_ROWS) or 1], steps[-1]})
    rows = [
        (f"{step:,}", *(_loss(by_step[step].get(key)) for key in ("loss", "eval_loss")))
        for step in kept
    ]
    header = ("step", "training loss", "evaluation loss")
    return [f"## Loss\n\n{markdown_table(header, rows)}"]


def _loss(value: float | None) -> str:
    return "" if value is None else f"{value:.4f}"


def _versions() -> dict[str, str]:
    versions = {"Python": platform.python_version()}
    for package in _PACKAGES:
        # A clone that runs without being installed has no version of its own to state.
        try:
            versions[package] = importlib.metadata.version(package)
        except importlib.metadata.PackageNotFoundError:
            continue
    return versions


TURN_END = (
    "Turns end with `{1}` (token {0}), at which the base model's own files do not stop: generate "
    "with `eos_token_id={2}`, which the generation_config.json of a merged model says already."
)


def card_facts(config: RunConfig, setup: Assembly, form: str, step: int, rows: list) -> CardFacts:
    """Return what the model card says of a run."""
    stop = added_stop(setup.source)
    return CardFacts(
        base_model=config.model.path,
        library_name="peft" if form == "peft" else "transformers",
        method=setup.spec.peft_type if setup.spec else "full fine-tuning",
        step=step,
        hyperparameters={
            **config.optimizer.model_dump(),
            **config.training.model_dump(),
            **(vars(setup.spec) if setup.spec else {}),
            "max_length": config.data.max_length,
            "packing": config.data.packing,
        },
        metrics=rows,
        license=source_license(setup.source.directory, setup.source.config),
        needs=adapters.readers(setup.model, setup.spec) if form == "peft" else "",
        stops="" if stop is None else TURN_END.format(*stop),
    )
