# SPDX-License-Identifier: Apache-2.0
"""`make quickstart` names the extra for a GPU or TPU that is here and would not be used."""

import os
import shutil
import subprocess
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parent.parent
VERSION = "3.11.0"
HEADER = "| NVIDIA-SMI 570.86  Driver Version: 570.86  CUDA Version: {}  |"
GPU = "an NVIDIA GPU is here, and not used: EXTRAS={} make quickstart\n"


def program(file: Path, text: str) -> None:
    file.parent.mkdir(parents=True, exist_ok=True)
    file.write_text(f"#!/bin/sh\n{text}\n")
    file.chmod(0o755)


def quickstart(folder: Path, *words: str, cuda: str = "", stamp: str = "") -> str:
    """What `make quickstart` says in an installed environment, whose Python does nothing."""
    shutil.copy(ROOT / "Makefile", folder)
    for name in ("pyproject.toml", "constraints.txt"):
        (folder / name).touch()
    program(folder / ".venv/bin/python", f'[ "$1" = -c ] && echo {VERSION} || true')
    for name in {"", stamp}:
        (folder / f".venv/package-{VERSION}{name}").touch()
    program(folder / "bin/nvidia-smi", f"echo '{HEADER.format(cuda)}'" if cuda else "exit 9")
    done = subprocess.run(
        ["make", "quickstart", *words],
        cwd=folder,
        env={"PATH": f"{folder / 'bin'}:{os.environ['PATH']}"},
        capture_output=True,
        text=True,
    )
    assert done.returncode == 0, done.stderr
    return done.stdout.replace(".venv/bin/python tools/quickstart.py\n", "")


@pytest.mark.parametrize(("cuda", "extra"), [("13.0", "cuda"), ("12.8", "cuda12")])
def test_a_gpu_is_named_with_the_extra_of_its_driver(tmp_path: Path, cuda: str, extra: str):
    assert quickstart(tmp_path, "TPU_DEVICE=", cuda=cuda) == GPU.format(extra)


def test_a_tpu_is_named(tmp_path: Path):
    said = quickstart(tmp_path, "TPU_DEVICE=/dev/accel0")
    assert said == "a TPU is here, and not used: EXTRAS=tpu make quickstart\n"


def test_what_is_not_here_or_is_installed_is_not_named(tmp_path: Path):
    assert quickstart(tmp_path, "TPU_DEVICE=") == ""
    assert quickstart(tmp_path, "TPU_DEVICE=/dev/accel0", cuda="13.0", stamp="-cuda") == ""
