# SPDX-License-Identifier: Apache-2.0
"""What a configuration accepts, what it refuses and in which words."""

from pathlib import Path

import hypothesis.strategies as st
import pytest
from hypothesis import given, settings

from dsjax.config import (
    AdapterSection,
    ExportSection,
    describe,
    export_format,
    json_schema,
    load_config,
    to_yaml,
)
from dsjax.errors import ConfigError

SMALLEST = """
model: {path: checkpoint}
data: {train: rows.jsonl}
output_dir: runs/smallest
"""


@pytest.fixture
def smallest(tmp_path: Path) -> Path:
    return _file(tmp_path, SMALLEST)


def _file(folder: Path, text: str) -> Path:
    file = folder / "run.yaml"
    file.write_text(text, encoding="utf-8")
    return file


def _refusal(path: Path | None, overrides: list[str]) -> str:
    with pytest.raises(ConfigError) as caught:
        load_config(path, overrides)
    return str(caught.value)


def test_defaults_are_the_documented_ones(smallest: Path):
    config = load_config(smallest)
    assert config.model.dtype == "bfloat16"
    assert (config.adapter.r, config.adapter.lora_alpha) == (16, 32)
    assert config.adapter.target_modules == "all-linear"
    assert (config.data.max_length, config.data.overlong) == (2048, "truncate")
    assert (config.optimizer.learning_rate, config.optimizer.warmup_ratio) == (2e-4, 0.03)
    assert (config.training.batch_size, config.training.seed) == (16, 42)
    assert (config.mesh.data, config.mesh.fsdp, config.mesh.tensor) == (1, -1, 1)
    assert (config.checkpoint.save_steps, config.checkpoint.save_total_limit) == (500, 3)
    assert config.logging.report_to == ["tensorboard"]
    assert config.export.format == "merged"


def test_overrides_are_yaml_and_the_last_one_holds(smallest: Path):
    words = [
        "data.train=[a.jsonl,b.jsonl]",
        "data.eval=c.jsonl",
        "adapter.peft_type=LORA",
        "adapter.rank_pattern={q_proj: 4}",
        "adapter.layers_to_transform=0",
        "adapter.r=2",
        "adapter.r=8",
        "adapter.lora_alpha=1.5",
        "logging.report_to=[]",
        "training.max_steps=null",
        "model.revision=",
        "data.packing=off",
        "output_dir=runs/other",
    ]
    config = load_config(smallest, words)
    assert config.data.train == ["a.jsonl", "b.jsonl"]
    assert config.data.eval == ["c.jsonl"]
    assert config.adapter.rank_pattern == {"q_proj": 4}
    assert config.adapter.layers_to_transform == [0]
    assert (config.adapter.r, config.adapter.lora_alpha) == (8, 1.5)
    assert config.logging.report_to == []
    assert config.training.max_steps is None
    assert config.model.revision is None
    assert config.data.packing is False
    assert config.output_dir == "runs/other"


@pytest.mark.parametrize("text", ["1e-4", "1E-4", "1.e-4", "+1e-4", ".1e-3", "0.0001"])
def test_exponents_are_numbers_in_files_and_overrides(tmp_path: Path, text: str):
    file = _file(tmp_path, SMALLEST + f"optimizer: {{learning_rate: {text}}}\n")
    assert load_config(file).optimizer.learning_rate == 1e-4
    assert load_config(file, [f"optimizer.weight_decay={text}"]).optimizer.weight_decay == 1e-4


def test_an_empty_section_is_its_defaults(tmp_path: Path):
    config = load_config(_file(tmp_path, SMALLEST + "adapter:\nmesh: {}\n"))
    assert config.adapter.peft_type is None
    assert config.mesh.fsdp == -1
    assert load_config(_file(tmp_path, SMALLEST + "mesh:\n"), ["mesh.data=2"]).mesh.data == 2


def test_a_section_knows_which_keys_were_given(smallest: Path):
    adapter = load_config(smallest, ["adapter.path=old", "adapter.r=16"]).adapter
    assert adapter.model_fields_set == {"path", "r"}


def test_all_problems_are_in_one_message(tmp_path: Path):
    text = """
model: {path: checkpoint, dtype: fp32}
adapter: {peft_type: LORA, r: -1, rr: 3, lora_dropout: 1}
data: {train: []}
learning_rate: 1e-4
trainig: {}
training: {warmup_steps: 3, num_train_epochs: .nan}
mesh: 8
"""
    assert _refusal(_file(tmp_path, text), []).splitlines() == [
        'model.dtype: got "fp32", expected bfloat16, float32 or float16',
        "adapter.r: got -1, expected an integer >= 1 and <= 65536",
        "adapter.lora_dropout: got 1, expected a number >= 0 and < 1",
        "adapter.rr: got an unknown key, expected a key of adapter; did you mean r?",
        "data.train: got [], expected text or a list of text, and not empty",
        "training.num_train_epochs: got NaN, expected a number > 0",
        "training.warmup_steps: got an unknown key, expected a key of training; "
        "did you mean optimizer.warmup_steps?",
        "mesh: got 8, expected a mapping of keys",
        "output_dir: got nothing, expected text: Directory of the run; running again with the "
        "same one resumes.",
        "learning_rate: got an unknown key, expected a section; "
        "did you mean optimizer.learning_rate?",
        "trainig: got an unknown key, expected a section; did you mean training?",
    ]


@pytest.mark.parametrize(
    ("override", "message"),
    [
        ("model.quantization=fp4", 'got "fp4", expected nf4, int8, fp8 or null'),
        (
            "adapter.peft_type=BOTTLENECK",
            'got "BOTTLENECK", which is not built yet, expected LORA, IA3, PREFIX_TUNING or null',
        ),
        ("adapter.use_dora=1", "got 1, expected true or false"),
        (
            "adapter.init_lora_weights=1",
            "got 1, expected true, gaussian, pissa, olora or pissa_niter_4",
        ),
        (
            "adapter.init_lora_weights=eva",
            'got "eva", expected true, gaussian, pissa, olora or pissa_niter_4',
        ),
        ("adapter.peft_type=lora", 'got "lora", expected LORA, IA3, PREFIX_TUNING or null'),
        ("adapter.r=true", "got true, expected an integer >= 1 and <= 65536"),
        ("adapter.r='8'", 'got "8", expected an integer >= 1 and <= 65536'),
        ("adapter.lora_alpha=0", "got 0, expected a number > 0 and <= 1000000000"),
        ("adapter.lora_dropout=-0.1", "got -0.1, expected a number >= 0 and < 1"),
        ("adapter.target_modules=[]", "got [], expected text or a list of text, and not empty"),
        (
            "adapter.layers_to_transform=[0, -1]",
            "got [0, -1], expected an integer >= 0, a list of integer >= 0 or null",
        ),
        (
            "adapter.rank_pattern={q_proj: 0}",
            'got {"q_proj": 0}, expected a mapping from text to an integer >= 1 and <= 65536',
        ),
        ("data.max_length=1", "got 1, expected an integer >= 2"),
        ("data.overlong=cut", 'got "cut", expected truncate, drop or error'),
        ("data.train=[1]", "got [1], expected text or a list of text"),
        ("optimizer.optim=sgd", 'got "sgd", expected adamw or lion'),
        ("optimizer.learning_rate=-1", "got -1, expected a number >= 0"),
        ("optimizer.learning_rate=.inf", "got Infinity, expected a number >= 0"),
        ("optimizer.warmup_ratio=1.5", "got 1.5, expected a number >= 0 and <= 1"),
        ("optimizer.warmup_steps=-1", "got -1, expected an integer >= 0 or null"),
        ("training.max_steps=0", "got 0, expected an integer >= 1 or null"),
        ("training.seed=-1", "got -1, expected an integer >= 0 and < 4294967296"),
        (
            "training.gradient_checkpointing=true",
            "got true, expected auto, none, dots, names or full",
        ),
        ("mesh.tensor=0", "got 0, expected -1 or an integer >= 1"),
        (
            "logging.report_to=[mlflow]",
            'got ["mlflow"], expected a list of tensorboard, wandb, trackio or swanlab',
        ),
        (
            "logging.profile_steps=[3]",
            "got [3], expected a list of 2, each an integer >= 1 or null",
        ),
        ("export.format=gguf", 'got "gguf", expected merged, peft or null'),
        ("output_dir=2024-01-01", 'got "2024-01-01", expected text; put it in quotes'),
        ("output_dir=''", 'got "", expected text, and not empty'),
    ],
)
def test_a_wrong_value_is_named_with_the_rule(smallest: Path, override: str, message: str):
    path = override.partition("=")[0]
    assert _refusal(smallest, [override]) == f"{path}: {message}"


@pytest.mark.parametrize(
    ("overrides", "message"),
    [
        (
            ["training.batch_size=6", "training.gradient_accumulation_steps=4"],
            "training.batch_size: got 6, expected a multiple of "
            "training.gradient_accumulation_steps (4)",
        ),
        (
            ["training.eval_steps=5"],
            "training.eval_steps: got 5 without data.eval, expected null; "
            "or name files in data.eval, or set data.val_size",
        ),
        (
            ["logging.profile_steps=[3,3]"],
            "logging.profile_steps: got [3, 3], expected a first number below the second; "
            "[a, b] traces steps a + 1 to b",
        ),
        (
            ["mesh.data=-1"],
            "mesh.data and mesh.fsdp: got -1, expected -1 on one axis; give the others a size",
        ),
        (
            ["adapter.r=8"],
            "adapter.peft_type: got nothing beside adapter.r, expected LORA, IA3, PREFIX_TUNING, "
            "or null for full training",
        ),
        (
            ["export.format=peft"],
            'export.format: got "peft" without an adapter, expected merged or null; '
            "or set adapter.peft_type",
        ),
        (
            ["export.format=merged", "adapter.peft_type=PREFIX_TUNING"],
            'export.format: got "merged" with PREFIX_TUNING, expected peft or null; '
            "a prefix has no merged form",
        ),
    ],
)
def test_a_contradiction_names_both_keys(smallest: Path, overrides: list[str], message: str):
    assert _refusal(smallest, overrides) == message


def test_full_training_may_be_asked_for_in_an_adapter_recipe(smallest: Path):
    config = load_config(smallest, ["adapter.r=8", "adapter.peft_type=null"])
    assert config.adapter.peft_type is None


def test_a_prefix_is_exported_as_peft_unless_told_otherwise():
    assert export_format(ExportSection(), "PREFIX_TUNING") == "peft"
    assert export_format(ExportSection(format=None), "PREFIX_TUNING") is None
    assert export_format(ExportSection(), "LORA") == "merged"
    assert export_format(ExportSection(), None) == "merged"
    with pytest.raises(ConfigError, match="a prefix has no merged form"):
        export_format(ExportSection(format="merged"), "PREFIX_TUNING")


@pytest.mark.parametrize(
    ("word", "message"),
    [
        ("adapter.r", "adapter.r: got a word without `=`, expected section.key=value; "),
        ("adaptr.r=8", "adaptr.r: got an unknown section, expected section.key=value; "),
        ("adapter.q=8", "adapter.q: got an unknown key, expected section.key=value; "),
        ("adapter.r.q=8", "adapter.r.q: got an unknown key, expected section.key=value; "),
        ("adapter=null", "adapter: got a whole section, expected section.key=value; "),
        (
            "lora_alpha=8",
            "lora_alpha: got an unknown section, expected section.key=value; did you "
            "mean adapter.lora_alpha?",
        ),
        (
            "adapter.target_modules=[*_proj]",
            "adapter.target_modules: got [*_proj], expected a value "
            "written as YAML; quote text: adapter.target_modules='\"...\"'",
        ),
        ("adapter.rank_pattern={q: 1, q: 2}", "adapter.rank_pattern: got {q: 1, q: 2}, expected"),
    ],
)
def test_a_wrong_override_is_refused(smallest: Path, word: str, message: str):
    assert _refusal(smallest, [word]).startswith(message)


def test_all_wrong_overrides_are_named(smallest: Path):
    assert len(_refusal(smallest, ["nonsense", "model.pth=x"]).splitlines()) == 2


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("", "run.yaml: got an empty file, expected sections such as `model:`"),
        ("# nothing\n", "run.yaml: got an empty file, expected sections such as `model:`"),
        ("- a\n", "run.yaml: got list, expected sections such as `model:`"),
        ("model: {path: x\ndata: 3\n", "run.yaml:2: got expected ',' or '}', but got ':'"),
        (
            "model:\n\tpath: x\n",
            "run.yaml:2: got found character '\\t' that cannot start any token",
        ),
        ("mesh: {}\nmodel: {}\nmesh: {}\n", "run.yaml:3: got the key mesh twice, expected valid"),
        ("mesh:\n  data: 1\n  data: 2\n", "run.yaml:3: got the key data twice, expected valid"),
        ("? [a, b]\n: c\n", "run.yaml:1: got found unhashable key, expected valid YAML"),
        ("a: 1\n---\nb: 2\n", "run.yaml:2: got but found another document, expected valid YAML"),
        ("model: \x07\n", "run.yaml: got unacceptable character #x0007"),
        ("model: !!python/object:os.system {}\n", "run.yaml:1: got could not determine a constr"),
    ],
)
def test_a_file_that_is_no_configuration_is_refused(tmp_path: Path, text: str, message: str):
    refusal = _refusal(_file(tmp_path, text), [])
    assert refusal.startswith(f"{tmp_path}/{message}")
    assert len(refusal.splitlines()) == 1


def test_a_recipe_is_found_by_its_name(tmp_path: Path):
    refusal = _refusal(tmp_path / "configs" / "quickstart.yaml", [])
    found = refusal.split("; the recipe of this name is ")[1]
    assert load_config(found, ["data.train=a.jsonl"]).output_dir


def test_a_file_that_cannot_be_read_is_refused(tmp_path: Path):
    assert "no.yaml: got No such file or directory, expected a YAML file; recipes are in " in (
        _refusal(tmp_path / "no.yaml", [])
    )
    assert _refusal(tmp_path, []).endswith("got Is a directory, expected a YAML file")
    (tmp_path / "latin.yaml").write_bytes(b"model: {path: caf\xe9}\n")
    assert "latin.yaml: got bytes that are not UTF-8" in _refusal(tmp_path / "latin.yaml", [])
    assert _refusal(None, []).startswith("--config: got nothing, expected a YAML file")


@settings(max_examples=40)
@given(
    path=st.text(min_size=1, alphabet=st.characters(exclude_categories=("Cs", "Cc"))),
    rate=st.floats(0, 1),
    names=st.lists(st.sampled_from(["1e-4", "null", "yes", "a: b", "- a", "'", "1e5"]), min_size=1),
)
def test_what_is_written_reads_back_as_the_same(
    tmp_path_factory: pytest.TempPathFactory, path: str, rate: float, names: list[str]
):
    folder = tmp_path_factory.mktemp("config")
    config = load_config(_file(folder, SMALLEST), ["adapter.peft_type=LORA"])
    changed = config.model_copy(
        update={
            "model": config.model.model_copy(update={"path": path}),
            "optimizer": config.optimizer.model_copy(update={"learning_rate": rate}),
            "adapter": AdapterSection(peft_type="LORA", target_modules=names),
        }
    )
    assert load_config(_file(folder, to_yaml(changed))) == changed


@pytest.mark.parametrize(
    "overrides",
    [
        ["adapter.path=old"],
        ["adapter.peft_type=PREFIX_TUNING"],
        ["adapter.path=old", "adapter.r=4"],
    ],
)
def test_defaults_that_an_adapter_decides_are_not_written_down(
    tmp_path: Path, smallest: Path, overrides: list[str]
):
    config = load_config(smallest, overrides)
    again = load_config(_file(tmp_path, to_yaml(config)))
    assert again == config
    assert export_format(again.export, "PREFIX_TUNING") == "peft"
    if config.adapter.path:
        assert again.adapter.model_fields_set == config.adapter.model_fields_set


@pytest.mark.parametrize("key", ["warmup_ratio=0.03", "warmup_steps=1"])
def test_constant_has_no_warm_up(tmp_path: Path, smallest: Path, key: str):
    constant = "optimizer.lr_scheduler_type=constant"
    name, _, value = key.partition("=")
    with pytest.raises(ConfigError, match=rf"optimizer.{name}: got {value} with .* use constant_"):
        load_config(smallest, [constant, f"optimizer.{key}"])
    load_config(smallest, ["optimizer.lr_scheduler_type=constant_with_warmup", f"optimizer.{key}"])
    load_config(smallest, [constant, f"optimizer.{name}=0"])
    config = load_config(smallest, [constant])
    assert load_config(_file(tmp_path, to_yaml(config))) == config


def test_a_minimum_is_asked_for_by_its_name(tmp_path: Path, smallest: Path):
    named = "optimizer.lr_scheduler_type=cosine_with_min_lr"
    with pytest.raises(ConfigError, match=r"optimizer.min_lr_ratio: got nothing with .* a tenth"):
        load_config(smallest, [named])
    config = load_config(smallest, [named, "optimizer.min_lr_ratio=0.1"])
    assert load_config(_file(tmp_path, to_yaml(config))) == config


def test_help_and_schema_name_every_key():
    text, schema = describe(), json_schema()
    for section, part in schema["properties"].items():
        if "$ref" not in part:
            assert f"  {section}: " in text
            continue
        for key, field in schema["$defs"][part["$ref"].rpartition("/")[2]]["properties"].items():
            assert f"  {section}.{key}: " in text
            assert field["description"]
    assert (
        "  adapter.lora_alpha: a number > 0 and <= 1000000000 (default 32)\n      LoRA: the update"
        in text
    )
    assert "  model.path: text (required)" in text
    assert schema["additionalProperties"] is False
