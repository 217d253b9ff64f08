# SPDX-License-Identifier: Apache-2.0
"""Whatever starts several processes, none of them takes itself for the only one."""

import sys
from types import ModuleType

import pytest

from dsjax.config.train_options import may_be_several, split_process_options
from dsjax.distributed import launchers
from dsjax.distributed.bootstrap import detect_process, refuse_several
from dsjax.distributed.launchers import ProcessSpec, Sign, detect
from dsjax.errors import ConfigError

SLURM = {
    "SLURM_JOB_ID": "4711",
    "SLURM_STEP_NODELIST": "node[07-08]",
    "SLURM_NTASKS": "8",
    "SLURM_PROCID": "7",
    "SLURM_LOCALID": "3",
    "SLURM_NODEID": "1",
    "SLURM_STEP_TASKS_PER_NODE": "4(x2)",
}
OPEN_MPI_4 = {
    "OMPI_MCA_orte_hnp_uri": "1531576320.0;tcp://10.96.0.1:34911",
    "OMPI_COMM_WORLD_SIZE": "8",
    "OMPI_COMM_WORLD_RANK": "7",
    "OMPI_COMM_WORLD_LOCAL_RANK": "3",
    "OMPI_COMM_WORLD_LOCAL_SIZE": "4",
}
SEVERAL = {
    "Open MPI 5": ({"OMPI_COMM_WORLD_SIZE": "4", "OMPI_COMM_WORLD_RANK": "0"}, "4 from mpirun"),
    "MPICH": ({"PMI_SIZE": "4", "PMI_RANK": "2"}, "4 from mpiexec"),
    "MVAPICH": ({"MV2_COMM_WORLD_SIZE": "4", "MV2_COMM_WORLD_RANK": "2"}, "4 from mpirun"),
    "torchrun": ({"WORLD_SIZE": "16", "RANK": "0", "LOCAL_RANK": "0"}, "16 from torchrun"),
    "SkyPilot": ({"SKYPILOT_NUM_NODES": "2", "SKYPILOT_NODE_RANK": "1"}, "2 from SkyPilot"),
    "LWS": ({"LWS_GROUP_SIZE": "2", "LWS_WORKER_INDEX": "1"}, "2 from a LeaderWorkerSet"),
    "JAXJob": ({"NUM_PROCESSES": "2", "PROCESS_ID": "1"}, "2 from a JAXJob"),
    "a step of Slurm": ({"SLURM_STEP_NUM_TASKS": "2", "SLURM_PROCID": "0"}, "2 from srun"),
    "another task of Slurm": ({"SLURM_NTASKS": "2", "SLURM_PROCID": "1"}, "2 from srun"),
    "an Indexed Job": (
        {"JOB_COMPLETION_INDEX": "0", "KUBERNETES_SERVICE_HOST": "10.0.0.1"},
        "pod 0 of a Kubernetes Indexed Job",
    ),
    "GKE": ({"TPU_WORKER_HOSTNAMES": "a,b,c", "TPU_WORKER_ID": "0"}, "3 hosts of a TPU slice"),
    "two slices": (
        {"TPU_WORKER_HOSTNAMES": "a", "MEGASCALE_NUM_SLICES": "2"},
        "2 TPU slices (MEGASCALE_NUM_SLICES)",
    ),
    "jax's own": ({"JAX_COORDINATOR_ADDRESS": "a:1"}, "an address of process 0"),
}
ALONE = {
    "nothing": {},
    "mpirun -np 1": {"OMPI_COMM_WORLD_SIZE": "1", "OMPI_COMM_WORLD_RANK": "0"},
    "torchrun for one": {"WORLD_SIZE": "1", "RANK": "0"},
    "no number": {"WORLD_SIZE": "", "RANK": "0", "PMI_SIZE": "many", "PMI_RANK": "x"},
    "a batch script": {
        "SLURM_JOB_ID": "1",
        "SLURM_NTASKS": "8",
        "SLURM_PROCID": "0",
        "SLURM_LOCALID": "0",
    },
    "a shell of salloc": {"SLURM_JOB_ID": "1", "SLURM_NTASKS": "8"},
    "a pod of a Deployment": {"KUBERNETES_SERVICE_HOST": "10.0.0.1"},
    "a TPU VM": {"TPU_WORKER_HOSTNAMES": "localhost", "JOB_COMPLETION_INDEX": "0"},
}


@pytest.fixture(autouse=True)
def elsewhere(monkeypatch: pytest.MonkeyPatch) -> None:
    """Where this machine's own launcher, if any, is not seen."""
    for names, *_ in launchers._COUNTS:
        monkeypatch.delenv(names, raising=False)


@pytest.fixture
def set_all(monkeypatch: pytest.MonkeyPatch):
    """Set variables of this process, which jax reads, and return all that are given."""

    def some(*environments: dict[str, str]) -> dict[str, str]:
        together = {name: value for one in environments for name, value in one.items()}
        for name, value in together.items():
            monkeypatch.setenv(name, value)
        return together

    return some


@pytest.mark.parametrize("name", SEVERAL)
def test_several_are_refused_with_the_fix(name: str, set_all):
    environment, found = SEVERAL[name]
    set_all(environment)
    assert may_be_several(environment)
    with pytest.raises(ConfigError) as error:
        detect_process({}, environment)
    assert str(error.value).startswith(f"processes: got {found}")
    assert "--coordinator" in str(error.value) or " 'jax[tpu]'" in str(error.value)
    sign = detect(environment, 1.0)
    assert isinstance(sign, Sign)
    with pytest.raises(ConfigError, match=f"dsjax.export runs as one .*env -u {sign.variable}"):
        refuse_several("dsjax.export", environment)
    assert detect({k: v for k, v in environment.items() if k != sign.variable}, 1.0) is None
    # What is typed wins.
    assert detect_process(split_process_options(["--processes", "1"])[0], environment) is None
    given = split_process_options(["--coordinator=h:7", "--processes=2", "--process=1"])[0]
    assert detect_process(given, environment) == ProcessSpec("h:7", 2, 1)


@pytest.mark.parametrize("name", ALONE)
def test_one_alone_is_not_refused(name: str, set_all):
    set_all(ALONE[name])
    assert detect_process({}, ALONE[name]) is None
    refuse_several("dsjax.export", ALONE[name])


@pytest.mark.parametrize("names", launchers._COUNTS, ids=lambda names: names[0])
def test_any_launcher_s_count_may_mean_several(names: tuple[str, str, str, str]):
    assert may_be_several({"JAX_PLATFORMS": "cpu", names[0]: "2"})
    assert not may_be_several({"JAX_PLATFORMS": "cpu", "HOME": "/root"})


def test_the_options_name_the_launchers_variables():
    with pytest.raises(ConfigError) as error:
        detect_process({}, {"WORLD_SIZE": "2", "RANK": "1"})
    options = "--coordinator $MASTER_ADDR:8476 --processes $WORLD_SIZE --process $RANK"
    assert f"expected {options}; or --processes 1" in str(error.value)


def test_a_cpu_process_on_a_tpu_host_is_alone():
    """As other refusals advise, also in the pods of a JobSet on GKE."""
    for name in ("GKE", "two slices"):
        pod = SEVERAL[name][0] | {"JOB_COMPLETION_INDEX": "1", "JAX_PLATFORMS": "cpu"}
        assert detect(pod, 1.0) is None


def test_a_launcher_within_a_launcher(set_all):
    """torchrun as the one task of Slurm still starts several."""
    one = set_all(SLURM, {"SLURM_NTASKS": "1", "WORLD_SIZE": "4", "RANK": "0"})
    sign = detect(one, 1.0)
    assert isinstance(sign, Sign) and sign.found.startswith("4 from torchrun")


def test_kubernetes_is_asked_where_its_package_is(monkeypatch: pytest.MonkeyPatch):
    package = ModuleType("kubernetes")
    monkeypatch.setitem(sys.modules, "kubernetes", package)
    monkeypatch.setattr(launchers, "find_spec", lambda name: package)
    index = {"JOB_COMPLETION_INDEX": "0"}
    assert "K8sCluster" in [c.__name__ for c in launchers._clusters(index)]
    assert "K8sCluster" not in [c.__name__ for c in launchers._clusters({})]


def test_a_pod_that_may_not_ask_kubernetes_is_told_what_to_give(
    monkeypatch: pytest.MonkeyPatch, set_all
):
    """What the package does without the token of a service account."""

    refusal = type("ConfigException", (Exception,), {})

    def load_incluster_config() -> None:
        raise refusal("Service token file does not exist.")

    package, config = ModuleType("kubernetes"), ModuleType("kubernetes.config")
    vars(config).update(ConfigException=refusal, load_incluster_config=load_incluster_config)
    vars(package)["config"] = config
    monkeypatch.setitem(sys.modules, "kubernetes", package)
    monkeypatch.setitem(sys.modules, "kubernetes.config", config)
    monkeypatch.setattr(launchers, "find_spec", lambda name: package)
    environment = set_all(SEVERAL["an Indexed Job"][0])
    with pytest.raises(ConfigError, match="processes: got pod 0 of a Kubernetes Indexed Job"):
        detect_process({}, environment)


@pytest.mark.parametrize("launcher", [SLURM, OPEN_MPI_4], ids=["slurm", "open mpi"])
@pytest.mark.parametrize(
    ("more", "devices"),
    [
        ({}, [3]),
        ({"CUDA_VISIBLE_DEVICES": "0,1,2,3"}, [3]),
        ({"CUDA_VISIBLE_DEVICES": "0,1,2,3,4,5,6,7"}, [3]),
        ({"CUDA_VISIBLE_DEVICES": "0", "SLURM_GPUS_PER_TASK": "1"}, None),  # its own is its first
        ({"CUDA_VISIBLE_DEVICES": "3"}, None),  # a wrapper's doing
        ({"CUDA_VISIBLE_DEVICES": "MIG-4f2a"}, None),
        ({"CUDA_VISIBLE_DEVICES": ""}, None),
        ({"CUDA_VISIBLE_DEVICES": "-1"}, None),
        ({"CUDA_VISIBLE_DEVICES": "0,1", "SLURM_GPUS_PER_TASK": "2"}, None),
        # With --gpu-bind=none all see all.
        ({"CUDA_VISIBLE_DEVICES": "0,1,2,3", "SLURM_GPUS_PER_TASK": "1"}, [3]),
        ({"CUDA_VISIBLE_DEVICES": "0,1,2,3,4,5,6,7", "SLURM_GPUS_PER_TASK": "h100:2"}, [6, 7]),
        ({"CUDA_VISIBLE_DEVICES": "2", "JAX_LOCAL_DEVICE_IDS": "0"}, None),
    ],
)
def test_which_devices_are_a_processs(launcher, more, devices, set_all):
    found = detect(set_all(launcher, more), 1.0)
    assert isinstance(found, ProcessSpec)
    assert (found.num_processes, found.process_id, found.local_device_ids) == (8, 7, devices)


def test_more_processes_than_gpus_are_refused(set_all):
    environment = set_all(SLURM, {"CUDA_VISIBLE_DEVICES": "0,1"})
    with pytest.raises(ConfigError, match="got 4 on one machine, of which number 3 sees 2 GPUs"):
        detect(environment, 1.0)


def test_the_only_process_of_a_machine_has_all_its_devices(set_all):
    tasks = {"SLURM_STEP_TASKS_PER_NODE": "4,1", "CUDA_VISIBLE_DEVICES": "0,1,2,3"}
    found = detect(set_all(SLURM, tasks), 1.0)
    assert isinstance(found, ProcessSpec) and found.local_device_ids is None


def test_an_address_without_a_port_is_refused(set_all):
    environment = set_all(SLURM, {"JAX_COORDINATOR_ADDRESS": "node07"})
    with pytest.raises(ConfigError, match="JAX_COORDINATOR_ADDRESS is 'node07', not HOST:PORT"):
        detect(environment, 1.0)
