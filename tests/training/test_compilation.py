# SPDX-License-Identifier: Apache-2.0
"""The remat policy of a step: the first whose compiled program fits, and a clear word if none does.

The memory of the devices is made up. What the programs need is their compiler's word in the slow
test, and made up in the others.
"""

import threading
from dataclasses import replace
from types import SimpleNamespace
from typing import Any

import jax
import numpy as np
import pytest
import tiny_steps
from process_threads import DictStore, in_threads

from dsjax.config import DataSection, TrainingSection
from dsjax.data import Example, Loader
from dsjax.data.store import ExampleStore
from dsjax.distributed.compiled import memory_of
from dsjax.distributed.processes import Hosts
from dsjax.errors import ConfigError
from dsjax.models.decoder import POLICIES
from dsjax.training import compilation
from dsjax.training.compilation import Attempt, compile_evaluation, compile_step
from dsjax.training.state import StepConfig, policies_of
from dsjax.training.step import lower_train_step

ROWS, LENGTH = 8, 256
NEEDED = {"none": 80, "dots": 60, "names": 40, "full": 20}
"""Remat policy -> GiB of a step that was made up."""


@pytest.fixture(scope="module")
def step() -> StepConfig:
    """A tiny step."""
    return tiny_steps.start(training={"gradient_accumulation_steps": 1}).config


@pytest.fixture
def loader() -> Loader:
    """Batches of one full row over and over."""
    store = ExampleStore()
    ids = np.arange(LENGTH, dtype=np.int32)
    for _ in range(ROWS):
        store.append(Example(ids, ids, np.ones(LENGTH, np.float32)))
    store.finalize()
    return Loader(store, DataSection(train=["x"], max_length=LENGTH), ROWS, seed=0)


@pytest.fixture
def made_up(monkeypatch: pytest.MonkeyPatch) -> list[str]:
    """Let steps need what NEEDED says; returns the policies that were compiled."""
    compiled: list[str] = []

    def lower(step: StepConfig, *_: int) -> Any:
        peak = NEEDED[step.remat] * 2**30
        program = SimpleNamespace(remat=step.remat, peak=peak)
        return SimpleNamespace(compile=lambda: compiled.append(step.remat) or program)

    monkeypatch.setattr(compilation, "lower_train_step", lower)
    monkeypatch.setattr(compilation, "memory_of", lambda program, _: program)
    return compiled


def give(monkeypatch: pytest.MonkeyPatch, size: int | None) -> None:
    """Let devices have so many bytes."""
    monkeypatch.setattr(compilation, "memory_limit", lambda _: size)


@pytest.mark.parametrize(
    ("gib", "chosen"), [(80, "none"), (79, "dots"), (40, "names"), (39, "full"), (None, "none")]
)
def test_the_least_is_computed_again_that_fits(
    step: StepConfig,
    loader: Loader,
    made_up: list[str],
    monkeypatch: pytest.MonkeyPatch,
    gib: int | None,
    chosen: str,
):
    give(monkeypatch, None if gib is None else gib * 2**30)
    program, policy = compile_step(step, POLICIES, loader, Hosts())
    assert program.remat == policy == chosen == made_up[-1]
    assert made_up == list(POLICIES[: POLICIES.index(chosen) + 1])  # nothing for nothing


def test_every_attempt_is_told(
    step: StepConfig,
    loader: Loader,
    made_up: list[str],
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
):
    give(monkeypatch, 60 * 2**30)
    compile_step(step, POLICIES, loader, Hosts())
    said = capsys.readouterr().err
    assert "s with remat none; it needs 80.00 GiB per device of 60.00\n" in said
    assert "s with remat dots; it needs 60.00 GiB per device\n" in said


@pytest.mark.parametrize("policies", [POLICIES, ("names",)])
def test_a_step_that_does_not_fit_is_refused(
    step: StepConfig,
    loader: Loader,
    made_up: list[str],
    monkeypatch: pytest.MonkeyPatch,
    policies: tuple[str, ...],
):
    give(monkeypatch, 10 * 2**30)
    with pytest.raises(ConfigError) as error:
        compile_step(step, policies, loader, Hosts())
    needed = f"{NEEDED[policies[-1]]}.00 GiB per device of 10.00"
    assert str(error.value).startswith(
        f"training.batch_size: got {ROWS} rows of {LENGTH} tokens in 1 microbatches, whose step "
        f"with remat {policies[-1]} needs {needed}, expected it to fit; raise"
    )


def test_what_does_not_say_what_it_needs_counts_as_full_alone(
    step: StepConfig, loader: Loader, made_up: list[str], monkeypatch: pytest.MonkeyPatch
):
    def unknown(*_: object) -> None:
        raise jax.errors.JaxRuntimeError("FAILED_PRECONDITION: no plan is kept")

    monkeypatch.setattr(compilation, "memory_of", unknown)
    assert compile_step(step, POLICIES, loader, Hosts())[1] == "full"
    assert compile_step(step, ("dots",), loader, Hosts())[1] == "dots"


def test_what_the_compiler_refuses_does_not_fit(
    step: StepConfig, loader: Loader, monkeypatch: pytest.MonkeyPatch
):
    def refuse() -> None:
        raise jax.errors.JaxRuntimeError("RESOURCE_EXHAUSTED: Ran out of memory in hbm.")

    lowered = SimpleNamespace(compile=refuse)
    for name, compiled in (
        ("lower_train_step", lambda: compile_step(step, POLICIES, loader, Hosts())),
        ("lower_eval_step", lambda: compile_evaluation(step, loader, Hosts())),
    ):
        monkeypatch.setattr(compilation, name, lambda *_: lowered)
        with pytest.raises(ConfigError, match="needs too much: RESOURCE_EXHAUSTED: Ran out"):
            compiled()


@pytest.mark.parametrize("other", [0, 1])
@pytest.mark.parametrize(
    ("fits_the_other", "chosen"),
    [
        ({"none": False, "dots": None, "names": True, "full": True}, "names"),
        ({"none": False, "dots": False, "names": None, "full": None}, "full"),
        (dict.fromkeys(POLICIES, False), "with remat full needs too much: its compiler says so,"),
    ],
)
def test_all_processes_take_what_fits_all_of_them(
    step: StepConfig,
    loader: Loader,
    monkeypatch: pytest.MonkeyPatch,
    other: int,
    fits_the_other: dict[str, bool | None],
    chosen: str,
):
    """Everything fits one process; the compiler of the other refuses some, or says nothing."""
    thread = threading.local()

    def compile_(lower: Any, beside: int) -> Attempt:
        policy = lower.args[0].remat
        if thread.index != other or fits_the_other[policy]:
            return Attempt(policy, "1 GiB", True)
        if fits_the_other[policy] is None:
            return Attempt(policy, "what the cache does not say", None)
        return Attempt(None, "too much: its compiler says so", False)

    def decide(hosts: Hosts) -> tuple[Any, str] | str:
        thread.index = hosts.index
        try:
            return compile_step(step, POLICIES, loader, hosts)
        except ConfigError as error:
            return str(error)

    monkeypatch.setattr(compilation, "_compile", compile_)
    store = DictStore()
    processes = [Hosts(index, 2, store) for index in range(2)]
    decided = in_threads([lambda hosts=hosts: decide(hosts) for hosts in processes])
    if chosen in POLICIES:
        assert decided == [(chosen, chosen)] * 2
    else:
        assert decided[0] == decided[1] and chosen in str(decided[0])


def test_a_later_start_begins_where_an_earlier_one_ended():
    auto = TrainingSection()
    assert auto.gradient_checkpointing == "auto" and list(policies_of(auto)) == list(POLICIES)
    assert list(policies_of(auto, "names")) == ["names", "full"]
    assert list(policies_of(TrainingSection(gradient_checkpointing="dots"), "full")) == ["dots"]


@pytest.mark.slow
def test_real_programs_are_told_apart(
    step: StepConfig, loader: Loader, monkeypatch: pytest.MonkeyPatch
):
    """A device that has just what a policy needs gets that policy, or one that computes less."""
    lowered = (lower_train_step(replace(step, remat=p), ROWS, LENGTH) for p in POLICIES)
    peaks = [memory_of(program.compile(), "cpu").peak for program in lowered]
    assert peaks[0] > peaks[-1]
    for peak in peaks:
        give(monkeypatch, peak)
        _, policy = compile_step(step, POLICIES, loader, Hosts())
        assert policy == next(
            p for p, needed in zip(POLICIES, peaks, strict=True) if needed <= peak
        )
