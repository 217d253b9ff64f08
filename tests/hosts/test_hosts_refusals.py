# SPDX-License-Identifier: Apache-2.0
"""What several processes are refused for, and that all of them say so and end."""

import json
import shutil
import time
from pathlib import Path

import multi_process
import pytest
import small_run
from clock_lines import without_clocks

from dsjax import evaluate
from dsjax.config.train_options import split_process_options
from dsjax.distributed.bootstrap import detect_process, wait_for_all
from dsjax.distributed.launchers import ProcessSpec
from dsjax.distributed.processes import Hosts
from dsjax.errors import ConfigError
from dsjax.training import run_lock
from dsjax.training.run_dir import RunDir

SLURM = {
    "SLURM_JOB_ID": "4711",
    "SLURM_STEP_NODELIST": "node[07-09]",
    "SLURM_NTASKS": "3",
    "SLURM_PROCID": "2",
    "SLURM_LOCALID": "0",
}


@pytest.fixture(scope="module")
def config(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A config file."""
    return small_run.write_inputs(tmp_path_factory.mktemp("refused"), "lora")


def spec_of(*words: str, **environment: str) -> ProcessSpec | None:
    return detect_process(split_process_options(words)[0], environment)


@pytest.mark.parametrize(
    ("words", "told"),
    [
        ("--coordinator host:1", "--processes: got nothing, expected it beside --coordinator and"),
        ("--processes 2", "--coordinator: got nothing, expected it beside --processes and"),
        (
            "--coordinator host --processes 2 --process 0",
            "--coordinator: got 'host', expected HOST",
        ),
        (
            "--coordinator h:70000 --processes 2 --process 0",
            "--coordinator: got 'h:70000', expected",
        ),
        ("--coordinator h:² --processes 2 --process 0", "--coordinator: got 'h:²', expected HOST"),
        ("--coordinator h:1 --processes 2 --process 2", "--process: got 2, expected 0 to 1"),
        ("--coordinator h:1 --processes 0 --process 0", "--processes: got '0', expected an intege"),
        ("--coordinator h:1 --processes 2 --process x", "--process: got 'x', expected an integer"),
        ("--wait soon", "--wait: got 'soon', expected seconds"),
    ],
)
def test_options(words: str, told: str):
    with pytest.raises(ConfigError) as error:
        spec_of(*words.split())
    assert told in str(error.value)


def test_options_are_taken_out():
    words = ["--config", "f", "--process=1", "a.b=1", "--coordinator", "h:7", "--processes", "2"]
    given, rest = split_process_options(words)
    assert rest == ["--config", "f", "a.b=1"]
    assert detect_process(given, {}) == ProcessSpec("h:7", 2, 1)
    assert detect_process({**given, "--coordinator": "[::1]:7"}, {}).address == ("::1", 7)


def test_a_process_alone_needs_nobody(monkeypatch: pytest.MonkeyPatch):
    assert spec_of() is None
    assert spec_of("--coordinator", "h:7", "--processes", "1", "--process", "0") is None
    alone = Hosts()
    assert (
        alone.primary
        and alone.all_gather_text("a") == ["a"]
        and alone.broadcast_from_primary(lambda: 3) == 3
    )
    alone.assert_equal({"anything": 1})
    assert alone.reached_preemption() is None and alone.any_preemption() is None
    alone.ask_to_stop(15)
    assert alone.reached_preemption() == 15 and alone.any_preemption() == 15


def test_slurm_tells_where(monkeypatch: pytest.MonkeyPatch):
    for name, value in SLURM.items():
        monkeypatch.setenv(name, value)
    port = 4711 % 2**12 + 65535 - 2**12 + 1
    assert detect_process({}, SLURM) == ProcessSpec(f"node07:{port}", 3, 2, [0])
    one_each = SLURM | {"SLURM_STEP_TASKS_PER_NODE": "1(x3)"}  # then all devices of the machine
    assert detect_process({}, one_each) == ProcessSpec(f"node07:{port}", 3, 2, None)
    two_each = SLURM | {"SLURM_STEP_TASKS_PER_NODE": "2,1"}
    assert detect_process({}, two_each) == ProcessSpec(f"node07:{port}", 3, 2, [0])
    with pytest.raises(ConfigError, match="processes: got 3, expected 1; dsjax.evaluate runs as"):
        evaluate.main(["--model", "m", "--data", "d"])
    monkeypatch.setenv("SLURM_NTASKS", "1")
    assert detect_process({}, SLURM) is None


def test_open_mpi_does_not_tell_where():
    with pytest.raises(ConfigError, match="processes: got 4 from mpirun, which does not say where"):
        spec_of(OMPI_COMM_WORLD_SIZE="4")


def test_nobody_at_the_coordinator():
    port = multi_process.free_port()
    began = time.monotonic()
    with pytest.raises(ConfigError) as error:
        wait_for_all(ProcessSpec(f"localhost:{port}", 3, 2, wait=0.5))
    assert time.monotonic() - began < 10
    told = (
        f"--coordinator: got localhost:{port}, where process 2 did not reach process 0 within 0.5"
    )
    assert str(error.value).startswith(told)


@pytest.mark.slow
def test_an_unreachable_coordinator_ends_the_command(config: Path, run_cli):
    address = f"localhost:{multi_process.free_port()}"
    options = ["--coordinator", address, "--processes=2", "--process=1"]
    done = run_cli("train", "--config", config, *options, "--wait", "1", timeout=60)
    assert done.returncode == 2 and "Traceback" not in done.stderr
    began, told = without_clocks(done.stderr).splitlines()
    assert began.endswith(f": train {config}")
    assert told.startswith("error: --coordinator: got localhost:")


def test_the_others_do_not_come(capsys: pytest.CaptureFixture[str]):
    port = multi_process.free_port()
    with pytest.raises(
        ConfigError, match="processes: got 1 of 3 within 0.5 s, expected all; proce"
    ):
        wait_for_all(ProcessSpec(f"localhost:{port}", 3, 0, wait=0.5))
    assert f"waiting for 2 other processes at localhost:{port}" in capsys.readouterr().err
    multi_process.socket.create_server(("", port)).close()  # the port is free again


def test_the_port_is_taken():
    with multi_process.socket.create_server(("", 0)) as server:
        port = server.getsockname()[1]
        with pytest.raises(
            ConfigError, match="expected a port that is free on process 0's machine"
        ):
            wait_for_all(ProcessSpec(f"localhost:{port}", 2, 0, wait=0.5))


@pytest.mark.slow
def test_processes_that_disagree_are_refused(config: Path):
    own = [["training.seed=1"], ["training.seed=2", "mesh.data=2"]]
    began = time.monotonic()
    run = multi_process.train(config, processes=2, own_words=own)
    assert run.codes(120) == [2, 2]
    for process in range(2):
        told = run.said(process)
        assert "error: training.seed: got 1 on process 0 and 2 on process 1, expected the" in told
        assert "mesh.data: got 1 on process 0 and 2 on process 1" in told
        assert "Traceback" not in told
    assert time.monotonic() - began < 60
    assert not (config.parent / "run").exists()


@pytest.mark.slow
def test_numbers_that_do_not_fit(config: Path):
    own = [[], ["--process=0"]]
    run = multi_process.train(config, "--wait=20", processes=2, own_words=own)
    assert set(run.codes(120)) <= {2}
    own = [[], [], ["--processes=4"]]
    run = multi_process.train(config, "--wait=20", processes=3, own_words=own)
    assert run.codes(120) == [2, 2, 2]
    assert "--processes: got 3 on process 0 and 4 on process 2" in run.said(0)


@pytest.mark.slow
def test_other_data_on_one_host(config: Path, tmp_path: Path):
    for name in ("here", "there"):
        (tmp_path / name).mkdir()
        shutil.copy(config.parent / "train.jsonl", tmp_path / name / "train.jsonl")
    with (tmp_path / "there" / "train.jsonl").open("a") as file:
        file.write(json.dumps({"input_ids": [7, 8, 9]}) + "\n")
    words = ["data.train=train.jsonl", f"output_dir={tmp_path / 'run'}"]
    folders = [tmp_path / "here", tmp_path / "there"]
    run = multi_process.train(config, *words, processes=2, folders=folders)
    assert run.codes(120) == [2, 2]
    for process in range(2):
        assert "data.train: got " in run.said(process)
        assert "expected the same on all processes" in run.said(process)
    assert not (tmp_path / "run").exists()


@pytest.mark.slow
def test_output_that_is_not_shared(config: Path, tmp_path: Path):
    folders = [tmp_path / "here", tmp_path / "there"]
    for folder in folders:
        folder.mkdir()
    run = multi_process.train(config, "output_dir=run", processes=2, folders=folders)
    assert run.codes(120) == [2, 2]
    for process in range(2):
        told = "output_dir: got 'run', which is another folder for process 1 than for process 0"
        assert told in run.said(process)
    assert [list(folder.iterdir()) for folder in folders] == [[], []]


def test_a_process_in_a_shallower_folder_is_told_of_another(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
):
    above = len(tmp_path.parts) + 1  # process 0 begins that far below the root

    class Second(Hosts):
        def broadcast_from_primary(self, choose: object) -> tuple[int, str]:
            return above, ".dsjax-0123"

        def all_gather_text(self, text: str) -> list[str]:
            return ["true", text]

    monkeypatch.chdir(tmp_path)
    with pytest.raises(ConfigError, match="which is another folder for process 1 than for"):
        run_lock.check_shared(RunDir(Path("run")), Second(1, 2), 0.1)


def test_a_folder_that_does_not_appear(tmp_path: Path):
    with pytest.raises(
        ConfigError, match="output_dir: got no '.*checkpoints' here 0.1 s after proc"
    ):
        run_lock._await_folder(tmp_path / "checkpoints", 0.1)


@pytest.mark.slow
def test_a_failure_on_one_ends_all(config: Path, tmp_path: Path):
    """Process 1 alone has no model: process 0 says so too."""
    folders = [tmp_path / "here", tmp_path / "there"]
    for folder in folders:
        folder.mkdir()
    (folders[0] / "model").symlink_to(config.parent / "model")
    words = ["model.path=./model", f"output_dir={tmp_path / 'run'}"]
    run = multi_process.train(config, *words, processes=2, folders=folders)
    assert run.codes(60) == [2, 2]
    assert "error: model.path: got './model', expected a directory" in run.said(1)
    assert "process 1 failed: model.path: got './model', expected a directory" in run.said(0)
