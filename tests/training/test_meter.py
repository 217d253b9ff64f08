# SPDX-License-Identifier: Apache-2.0
"""Means, speed and sums of a run's steps, also over a restore."""

import json

import numpy as np

from dsjax.objectives import SFT
from dsjax.training import meter as meter_module
from dsjax.training.meter import Meter


def add(meter, loss, weight, correct, tokens, **more):
    """Tell a meter of a step's sums."""
    sums = {"loss": loss, "weight": weight, "correct": correct} | more
    arrays = {name: np.float32(value) for name, value in sums.items()}
    meter.add(arrays | {"tokens": np.int32(tokens)})


def test_meter_gives_token_means_since_the_last_values():
    meter = Meter(SFT)
    add(meter, 6.0, 2.0, 1.0, 4)
    add(meter, 2.0, 2.0, 2.0, 4)
    first = meter.values()
    assert (first["loss"], first["accuracy"], first["tokens"]) == (2.0, 0.75, 8)
    add(meter, 5.0, 1.0, 0.0, 4)
    second = meter.values()
    assert (second["loss"], second["accuracy"], second["tokens"]) == (5.0, 0.0, 12)
    assert meter.summary()["train_loss"] == 13 / 5


def test_steps_without_a_trained_token_have_no_loss_and_are_counted():
    meter = Meter(SFT)
    add(meter, 2.0, 1.0, 1.0, 8)
    assert "untrained_steps" not in meter.values() | meter.summary() | meter.state()
    add(meter, 0.0, 0.0, 0.0, 8)
    values = meter.values()
    assert values["loss"] is None and values["accuracy"] is None
    assert (values["tokens"], values["untrained_steps"]) == (16, 1)
    add(meter, 0.0, 0.0, 0.0, 0)  # a step that float16 skipped: it tells of nothing
    add(meter, 4.0, 1.0, 1.0, 8)
    add(meter, 0.0, 0.0, 0.0, 8)
    after = Meter(SFT)
    after.restore(json.loads(json.dumps(meter.state())))
    for each in (meter, after):
        values = each.values()
        assert (values["loss"], values["untrained_steps"]) == (4.0, 2)
        assert each.summary()["train_loss"] == 3.0 and each.summary()["untrained_steps"] == 2


def test_what_an_earlier_version_summed_up_ahead_is_gone_on_with():
    meter = Meter(SFT)
    add(meter, 2.0, 1.0, 1.0, 8)
    meter.restore(meter.state() | {"ahead": {"loss": 6.0, "weight": 4.0}})
    assert meter.values()["mtp_loss"] == 1.5


def test_a_run_that_trains_nothing_has_no_loss():
    meter = Meter(SFT)
    add(meter, 0.0, 0.0, 0.0, 8)
    assert meter.summary()["train_loss"] is None


def test_the_loss_ahead_is_a_mean_of_its_own_and_survives_a_restore():
    meter, plain = Meter(SFT), Meter(SFT)
    add(plain, 2.0, 2.0, 1.0, 2)
    assert "mtp_loss" not in plain.values() and "mtp_loss" not in plain.state()["since_log"]
    add(meter, 2.0, 2.0, 1.0, 2, mtp_loss=3.0, mtp_weight=1.0)
    after = Meter(SFT)
    after.restore(json.loads(json.dumps(meter.state())))
    for each in (meter, after):
        add(each, 2.0, 2.0, 1.0, 2, mtp_loss=1.0, mtp_weight=3.0)
        values = each.values()
        assert (values["loss"], values["mtp_loss"]) == (1.0, 1.0)
        add(each, 2.0, 2.0, 1.0, 2, mtp_loss=0.0, mtp_weight=0.0)
        assert each.values()["mtp_loss"] is None


def test_meter_restored_in_the_middle_gives_the_unbroken_numbers():
    sums = np.random.default_rng(0).uniform(1, 9, (6, 3)).astype(np.float32)
    whole, before, after = Meter(SFT), Meter(SFT), Meter(SFT)
    for row in sums:
        add(whole, *row, 8)
    for row in sums[:4]:
        add(before, *row, 8)
    after.restore(json.loads(json.dumps(before.state())))
    for row in sums[4:]:
        add(after, *row, 8)
    expected, seen = whole.values(), after.values()
    assert [seen[key] for key in ("loss", "accuracy", "tokens")] == [
        expected[key] for key in ("loss", "accuracy", "tokens")
    ]
    assert whole.summary()["train_loss"] == after.summary()["train_loss"]


def test_meter_speed_leaves_out_pauses(monkeypatch):
    clock = iter([0.0, 2.0, 12.0, 14.0])
    monkeypatch.setattr(meter_module.time, "monotonic", lambda: next(clock))
    meter = Meter(SFT, flops_per_token=3.0, peak_flops=60.0)
    add(meter, 1.0, 1.0, 1.0, 40)
    with meter.paused():
        pass
    values = meter.values()
    assert values["tokens_per_second"] == 10.0
    assert values["mfu"] == 0.5
    assert values["step_time"] == 4.0


def test_meter_leaves_out_what_came_before_the_first_step(monkeypatch):
    clock = iter([0.0, 100.0, 104.0, 109.0, 110.0])
    monkeypatch.setattr(meter_module.time, "monotonic", lambda: next(clock))
    meter = Meter(SFT)
    meter.start()
    for tokens in (20, 20):
        add(meter, 1.0, 1.0, 1.0, tokens)
    values = meter.values()
    assert (values["tokens_per_second"], values["step_time"]) == (10.0, 2.0)
    assert meter.values()["step_time"] is None  # no step since
    assert meter.summary()["train_runtime"] == 10.0


def test_meter_without_a_known_peak_has_no_mfu():
    meter = Meter(SFT, flops_per_token=3.0, peak_flops=None)
    add(meter, 1.0, 1.0, 1.0, 40)
    assert meter.values()["mfu"] is None
