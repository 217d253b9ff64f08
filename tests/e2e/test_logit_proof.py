# SPDX-License-Identifier: Apache-2.0
"""A merged export whose weights are well written, and wrong, is refused; what is right passes."""

import gc
import json
import weakref
from dataclasses import replace
from pathlib import Path
from typing import Any

import jax
import numpy as np
import pytest
import small_run
import tiny
from safetensors.numpy import load_file

from dsjax import train
from dsjax.adapters import lora_method
from dsjax.errors import ConfigError
from dsjax.export import command as export
from dsjax.export import verify
from dsjax.training.loop import Loop
from dsjax.training.run_dir import MANIFEST

TARGETS = {"llama_gqa": ["q_proj", "v_proj"], "deepseek_v3_fp8_mtp_hub": ["o_proj", "kv_b_proj"]}
MESHES = {"llama_gqa": {}, "deepseek_v3_fp8_mtp_hub": {"expert": 2, "fsdp": 2, "data": 2}}
WRONG = {
    "forgotten": lambda low, high, scaling: replace(
        WITH_UPDATE(low, high, scaling), apply=lambda source, factors: source.astype(np.float32)
    ),
    "subtracted": lambda low, high, scaling: WITH_UPDATE(low, high, -scaling),
}
WITH_UPDATE = lora_method._with_update


@pytest.fixture(
    scope="module",
    params=["llama_gqa", pytest.param("deepseek_v3_fp8_mtp_hub", marks=pytest.mark.slow)],
)
def config(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A finished run of LoRA on a checkpoint in 16 bits or fewer; its export passed the proof."""
    folder = tmp_path_factory.mktemp("proof")
    config = small_run.write_inputs(
        folder,
        "lora",
        variant=request.param,
        adapter={"target_modules": TARGETS[request.param], "lora_dropout": 0.0},
        training={"max_steps": 6, "eval_steps": None},
        data={"eval": None},
        optimizer={"warmup_ratio": 0.0, "learning_rate": 0.05},
        export={"format": "merged"},
        mesh=MESHES[request.param],
    )
    if request.param == "llama_gqa":
        tiny.build_checkpoint(folder / "model", request.param, dtype="bfloat16")
    assert train.main(["--config", str(config)]) == 0
    return config


def test_what_is_kept_is_told(config: Path) -> None:
    out = config.parent / "run/export"
    kept = json.loads((out / "dsjax_export.json").read_text("utf-8"))["kept"]
    assert 0.9 <= kept < 1.0
    assert f"keep {kept:.1%} of what training changed" in (out / "README.md").read_text("utf-8")


@pytest.mark.parametrize("wrong", WRONG)
def test_a_wrong_merge_is_refused(
    config: Path, wrong: str, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    monkeypatch.setattr(lora_method, "_with_update", WRONG[wrong])
    words = ["--run", str(config.parent / "run"), "--out", str(tmp_path / "out")]
    with pytest.raises(RuntimeError, match="logits differ from the trained model's by"):
        export.main([*words, "--format", "merged"])
    assert not (tmp_path / "out").exists()


@pytest.mark.slow
def test_a_float64_checkpoint_passes(tmp_path: Path) -> None:
    config = small_run.write_inputs(
        tmp_path, "lora", training={"max_steps": 1, "eval_steps": None}, data={"eval": None}
    )
    tiny.build_checkpoint(tmp_path / "model", "llama_gqa", dtype="float64")
    words = ["--config", str(config), "model.dtype=float32", "export.format=merged"]
    assert train.main(words) == 0
    files = [*(tmp_path / "run/export").glob("*.safetensors")]
    arrays = [array for file in files for array in load_file(file).values()]
    assert {array.dtype.name for array in arrays} == {"float64"}


BRIEF: dict[str, Any] = {
    "training": {"max_steps": 2, "eval_steps": None},
    "export": {"format": "merged"},
}
NO_MEMORY = jax.errors.JaxRuntimeError("RESOURCE_EXHAUSTED: Out of memory\nallocating 9.0G")
WHERE: dict[str, tuple[str, int, Exception]] = {
    "trained": ("sample_logits", 1, NO_MEMORY),
    "merged": ("sample_logits", 2, MemoryError("on the host")),
    "load": ("load_base", 1, KeyError("a fault of ours")),
}
"""What fails, at which call, and how."""


def fail_at(name: str, call: int, error: Exception, monkeypatch: pytest.MonkeyPatch) -> None:
    """Let a function of the proof raise when it is called for so many times."""
    real, calls = getattr(verify, name), []

    def fails(*given: Any, **named: Any) -> Any:
        calls.append(given)
        if len(calls) == call:
            raise error
        return real(*given, **named)

    monkeypatch.setattr(verify, name, fails)


@pytest.fixture(scope="module")
def finished(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A finished run of LoRA, of which the adapter alone is exported."""
    folder = tmp_path_factory.mktemp("finished")
    config = small_run.write_inputs(folder, "lora", data={"eval": None}, **BRIEF)
    assert train.main(["--config", str(config), "export.format=peft"]) == 0
    return folder / "run"


def export_words(run: Path, out: Path) -> list[str]:
    return ["--run", str(run), "--out", str(out), "--format", "merged"]


@pytest.mark.slow
@pytest.mark.parametrize("place", WHERE)
def test_a_proof_that_cannot_be_computed_leaves_the_export(
    place: str,
    finished: Path,
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    out, error = tmp_path / "out", WHERE[place][2]
    with monkeypatch.context() as patched:
        fail_at(*WHERE[place], patched)
        with pytest.raises(type(error)) as raised:
            export.main(export_words(finished, out))
    assert raised.value is error
    said, reason = capsys.readouterr().err, f"{type(error).__name__}: {error}".splitlines()[0]
    assert f"the proof of the export did not run: {reason}\n" in said
    assert f"exported step 2 as merged to {out}, unproven; the reason follows" in said
    card, marker = (out / "README.md").read_text(), json.loads((out / MANIFEST).read_text())
    assert "**Not proven.**" in card and reason in card and "allocating" not in card
    assert marker["proof"] == f"did not run: {reason}"
    unproven = small_run.contents(out)

    # Started again, it tries again; the weights are the same, and nothing is left of the failure.
    assert export.main(export_words(finished, out)) == 0
    proven = small_run.contents(out)
    assert {name for name in proven if proven[name] != unproven[name]} == {"README.md", MANIFEST}
    assert "proof" not in json.loads((out / MANIFEST).read_text())
    assert b"Not proven" not in proven["README.md"]


@pytest.mark.slow
@pytest.mark.parametrize(
    "refusal",
    [ConfigError("config.json: got ..."), OSError(5, "Input/output error", "model.safetensors")],
    ids=["folder", "disk"],
)
def test_an_export_that_cannot_be_read_is_refused(
    refusal: Exception, finished: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    fail_at("load_base", 1, refusal, monkeypatch)
    with pytest.raises(ConfigError):
        export.main(export_words(finished, tmp_path / "out"))
    assert not (tmp_path / "out").exists()


@pytest.mark.slow
def test_the_proof_has_the_room_of_the_optimizer_and_ends_the_run_by_what_it_lacks(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    config, run = small_run.write_inputs(tmp_path, "lora", **BRIEF), tmp_path / "run"
    words = ["--config", str(config), "data.eval=null"]
    loops: list[weakref.ref[Loop]] = []
    optimizer: list[jax.Array] = []
    steps = Loop.steps

    def keep(loop: Loop, *given: Any) -> Any:
        loops.append(weakref.ref(loop))
        state, stopped = steps(loop, *given)
        optimizer.extend(jax.tree.leaves(state.opt_state))
        return state, stopped

    def look(*_: Any) -> None:
        gc.collect()
        assert loops[0]() is None  # and with it the compiled steps
        assert len(optimizer) > 4 and all(array.is_deleted() for array in optimizer)
        raise NO_MEMORY

    with monkeypatch.context() as patched:
        patched.setattr(Loop, "steps", keep)
        patched.setattr(verify, "prove", look)
        with pytest.raises(jax.errors.JaxRuntimeError, match="RESOURCE_EXHAUSTED"):
            train.main(words)
    assert f"exported merged to {run / 'export'}, unproven" in capsys.readouterr().err
    assert "Not proven" in (run / "export/README.md").read_text()
    assert (run / "training_loss.png").is_file()
    assert train.main(words) == 0
    assert "Not proven" not in (run / "export/README.md").read_text()
    assert train.main(words) == 0
    assert "nothing to do" in capsys.readouterr().err


def test_a_failed_evaluation_and_a_failed_proof_are_both_told() -> None:
    train.raise_failures([None, None])
    with pytest.raises(MemoryError):
        train.raise_failures([None, MemoryError()])
    evaluation = jax.errors.JaxRuntimeError("RESOURCE_EXHAUSTED: in the evaluation")
    with pytest.raises(ExceptionGroup) as raised:
        train.raise_failures([evaluation, NO_MEMORY])
    assert raised.value.exceptions == (evaluation, NO_MEMORY)


@pytest.mark.slow
@pytest.mark.parametrize(("dtype", "rate"), [("float32", 1e-12), ("bfloat16", 1e-5)])
def test_what_is_lost_is_refused_and_nothing_is_said_so(
    dtype: str, rate: float, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    config = small_run.write_inputs(
        tmp_path, "lora", training={"max_steps": 1, "eval_steps": None}, data={"eval": None}
    )
    tiny.build_checkpoint(tmp_path / "model", "llama_gqa", dtype=dtype)
    words = ["--config", str(config), "export.format=merged", f"optimizer.learning_rate={rate}"]
    if dtype == "float32":
        assert train.main(words) == 0
        assert "training changed no logits beyond rounding" in capsys.readouterr().err
        return
    with pytest.raises(ConfigError, match=r"export\.min_kept: got .*, expected at least 0\.9"):
        train.main(words)
    assert [path.name for path in (tmp_path / "run").iterdir() if "export" in path.name] == []
    assert train.main([*words, "export.min_kept=null"]) == 0
    assert "of what training changed" in (tmp_path / "run/export/README.md").read_text("utf-8")


def test_the_distance_is_that_of_the_middle_token() -> None:
    expected = np.ones((5, 4), np.float32)
    logits = expected * np.array([[1.0], [1.1], [1.2], [9.0], [1.0]], np.float32)
    assert verify.distance(logits, expected) == pytest.approx(0.1, rel=1e-5)


@pytest.mark.parametrize("part", [0.0, 0.3, 1.0])
def test_what_is_kept_is_a_part_of_what_training_changed(part: float) -> None:
    base, learnt = np.random.default_rng(0).standard_normal((2, 32, 300)).astype(np.float32)
    trained = base + 1e-2 * learnt
    exported = base + part * (trained - base)
    assert verify.kept(exported, trained, base) == pytest.approx(part, abs=1e-4)


def test_a_token_that_went_to_another_expert_does_not_decide_what_is_kept() -> None:
    base, learnt, other = np.random.default_rng(0).standard_normal((3, 32, 300)).astype(np.float32)
    trained = base + 1e-2 * learnt
    trained[3] = other[3]  # by the training: nearly all of |trained - base|
    nothing = base.copy()
    nothing[3] = other[3]
    assert verify.kept(nothing, trained, base) == pytest.approx(0.0, abs=0.05)
    most = base + 0.95e-2 * learnt
    most[3], most[4] = other[3], other[4]  # token 4 by the rounding
    assert verify.kept(most, trained, base) == pytest.approx(0.95, abs=0.05)


def test_there_is_no_part_of_nothing() -> None:
    base = np.random.default_rng(0).standard_normal((32, 300)).astype(np.float32)
    assert verify.kept(base, base, base) is None
    assert verify.kept(base, base * (1 + 1e-6), base) is None
