# SPDX-License-Identifier: Apache-2.0
"""benchmarks/compiled_step.py counts a program's kernels and bytes, by its text, as it says."""

import importlib.util
import sys
from pathlib import Path

import pytest

SCRIPT = Path(__file__).parents[1] / "benchmarks/compiled_step.py"

TEXT = """\
HloModule jit_train_step

%taken (p.1: bf16[3,64,128], p.2: s32[]) -> bf16[64,128] {
  %p.1 = bf16[3,64,128]{2,1,0} parameter(0)
  %p.2 = s32[] parameter(1)
  %zero = s32[] constant(0)
  %slice = bf16[1,64,128]{2,1,0} dynamic-slice(%p.1, %p.2, %zero, %zero)
  ROOT %flat = bf16[64,128]{1,0} bitcast(%slice)
}

%in_place (p.3: bf16[3,64,128], p.4: s32[], p.5: f32[64,128]) -> bf16[3,64,128] {
  %p.3 = bf16[3,64,128]{2,1,0} parameter(0)
  %p.4 = s32[] parameter(1)
  %p.5 = f32[64,128]{1,0} parameter(2)
  %nil = s32[] constant(0)
  %cast = bf16[64,128]{1,0} convert(%p.5)
  %one = bf16[1,64,128]{2,1,0} bitcast(%cast)
  ROOT %updated = bf16[3,64,128]{2,1,0} dynamic-update-slice(%p.3, %one, %p.4, %nil, %nil)
}

%of_a_layer (p.6: bf16[3,64,128], p.7: s32[]) -> f32[64,128] {
  %p.6 = bf16[3,64,128]{2,1,0} parameter(0)
  %p.7 = s32[] parameter(1)
  %null = s32[] constant(0)
  %part = bf16[1,64,128]{2,1,0} dynamic-slice(%p.6, %p.7, %null, %null)
  %view = bf16[64,128]{1,0} bitcast(%part)
  ROOT %wide = f32[64,128]{1,0} convert(%view)
}

%whole (p.8: bf16[64,128]) -> bf16[64,128] {
  %p.8 = bf16[64,128]{1,0} parameter(0)
  ROOT %call.1 = bf16[64,128]{1,0} custom-call(%p.8), custom_call_target="__cudnn$fmha"
}

%packed (p.9: bf16[64,128]) -> bf16[64,128] {
  %p.9 = bf16[64,128]{1,0} parameter(0)
  ROOT %sum.1 = bf16[64,128]{1,0} add(%p.9, %p.9)
}

%body (state: (s32[], bf16[3,64,128], bf16[256,128])) -> (s32[], bf16[3,64,128]) {
  %state = (s32[], bf16[3,64,128]{2,1,0}, bf16[256,128]{1,0}) parameter(0)
  %i = s32[] get-tuple-element(%state), index=0
  %stack = bf16[3,64,128]{2,1,0} get-tuple-element(%state), index=1
  %x = bf16[256,128]{1,0} get-tuple-element(%state), index=2
  %weight = bf16[64,128]{1,0} fusion(%stack, %i), kind=kLoop, calls=%taken
  %wider = f32[64,128]{1,0} fusion(%stack, %i), kind=kLoop, calls=%of_a_layer
  %start = (bf16[3,64,128]{2,1,0}, bf16[64,128]{1,0}) fusion-start(%stack, %i), calls=%taken
  %done = bf16[64,128]{1,0} fusion-done(%start)
  %large = (bf16[256,128]{1,0}, s8[4096]{0}) custom-call(%x, %x), target="cublas"
  %small = (bf16[256,16]{1,0}, s8[4096]{0}) custom-call(%x, %x), target="cublas"
  %chosen = bf16[64,128]{1,0} conditional(%i, %weight), branch_computations={%packed, %whole}
  %kept = bf16[3,64,128]{2,1,0} fusion(%stack, %i, %wider), kind=kLoop, calls=%in_place
  ROOT %next = (s32[], bf16[3,64,128]{2,1,0}, bf16[256,128]{1,0}) tuple(%i, %kept, %x)
}

%until (state.1: (s32[], bf16[3,64,128], bf16[256,128])) -> pred[] {
  ROOT %go = pred[] constant(true)
}

ENTRY %main (a: bf16[3,64,128], b: bf16[256,128]) -> bf16[256,128] {
  %a = bf16[3,64,128]{2,1,0} parameter(0)
  %b = bf16[256,128]{1,0} parameter(1)
  %from = s32[] constant(0)
  %begin = (s32[], bf16[3,64,128]{2,1,0}, bf16[256,128]{1,0}) tuple(%from, %a, %b)
  %loop = (s32[], bf16[3,64,128]) while(%begin), body=%body, config={"known_trip_count":{"n":"3"}}
  %out = bf16[256,128]{1,0} get-tuple-element(%loop), index=2
  ROOT %twice = bf16[256,128]{1,0} add(%out, %out)
}
"""

LAYER, ROWS = 64 * 128 * 2, 256 * 128 * 2
"""Bytes of one layer's matrix, and of x."""

SMALL_PRODUCT = 2 * ROWS + 256 * 16 * 2

EXPECTED = {
    "copies out of stacks": (1, 2 * LAYER),
    "copies beside kernels": (1, 2 * LAYER),
    "stores into stacks": (1, 2 * LAYER + LAYER),  # reads float32, writes the slice
    "element-wise": (1, LAYER + 2 * LAYER),
    "small products": (1, SMALL_PRODUCT),
    "large products": (1, 3 * ROWS),
    "attention": (1, 2 * LAYER),
}
"""Kind -> kernels a layer, and their bytes."""


@pytest.fixture
def compiled_step(monkeypatch: pytest.MonkeyPatch):
    monkeypatch.syspath_prepend(str(SCRIPT.parent))
    spec = importlib.util.spec_from_file_location("compiled_step", SCRIPT)
    assert spec is not None and spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    monkeypatch.setitem(sys.modules, "compiled_step", module)
    spec.loader.exec_module(module)
    return module


def test_each_kernel_is_counted_as_often_as_it_runs_with_the_bytes_it_moves(compiled_step) -> None:
    found = compiled_step.table(TEXT, layers=3)
    assert found.keys() == EXPECTED.keys()
    for kind, (kernels, moved) in EXPECTED.items():  # but for the indices, 4 bytes each
        of_layer = found[kind]
        assert of_layer["kernels a layer"] == kernels, kind
        assert of_layer["GB a layer"] == pytest.approx(moved / 1e9, rel=1e-3), kind
        after = (1, 3 * ROWS) if kind == "element-wise" else (0, 0)  # the sum behind the loop
        assert of_layer["kernels a step"] == 3 * kernels + after[0]
        assert of_layer["GB a step"] == pytest.approx((3 * moved + after[1]) / 1e9, rel=1e-3)
