# SPDX-License-Identifier: Apache-2.0
"""What a launcher says in the environment of the processes that it starts.

In: the environment. Out: where the processes meet and which one this is, as far as jax understands
the launcher (TPU VM, GKE and JobSet, Slurm, Open MPI 4); of others a sign that there are several,
so that none takes itself for the only one. Not done here: the options of a command line,
waiting for the others (`bootstrap`).
"""

import re
from collections.abc import Mapping
from dataclasses import dataclass
from importlib.util import find_spec

from dsjax.distributed.jax_internals import ClusterEnv, known_clusters
from dsjax.errors import ConfigError

WAIT = 45.0
"""Seconds after which a process that is not there is missing; with the start, within a minute."""


@dataclass(frozen=True)
class ProcessSpec:
    """This process among those of its run, in the words of `jax.distributed.initialize`.

    Attributes:
        coordinator_address: where process 0 listens, HOST:PORT.
        num_processes: how many there are.
        process_id: which one this is.
        local_device_ids: the devices that are this process's; None for all that it sees.
        wait: seconds to wait for the others.
    """

    coordinator_address: str
    num_processes: int
    process_id: int
    local_device_ids: list[int] | None = None
    wait: float = WAIT

    @property
    def address(self) -> tuple[str, int]:
        """Host and port of the coordinator."""
        host, _, port = self.coordinator_address.rpartition(":")
        return host.strip("[]"), int(port)


@dataclass(frozen=True)
class Sign:
    """Several processes of which nothing says how they meet.

    Attributes:
        found: how many there are, and who says so.
        fix: the options, or what else helps.
        variable: that says so.
    """

    found: str
    fix: str
    variable: str


_OPTIONS = "--coordinator {0} --processes ${1} --process ${2}"
_COUNTS = (
    # The number of processes, that of this one, who sets them, where process 0 is
    ("OMPI_COMM_WORLD_SIZE", "OMPI_COMM_WORLD_RANK", "mpirun", "HOST:PORT"),  # Open MPI 5
    ("MV2_COMM_WORLD_SIZE", "MV2_COMM_WORLD_RANK", "mpirun", "HOST:PORT"),
    ("PMI_SIZE", "PMI_RANK", "mpiexec", "HOST:PORT"),  # MPICH, Intel MPI
    ("JSM_NAMESPACE_SIZE", "JSM_NAMESPACE_RANK", "jsrun", "HOST:PORT"),
    ("FLUX_JOB_SIZE", "FLUX_TASK_RANK", "flux", "HOST:PORT"),
    ("SLURM_STEP_NUM_TASKS", "SLURM_PROCID", "srun", "HOST:PORT"),
    ("WORLD_SIZE", "RANK", "torchrun", "$MASTER_ADDR:8476"),
    ("LWS_GROUP_SIZE", "LWS_WORKER_INDEX", "a LeaderWorkerSet", "$LWS_LEADER_ADDRESS:8476"),
    ("JAX_NUM_PROCESSES", "JAX_PROCESS_ID", "the environment", "$JAX_COORDINATOR_ADDRESS"),
    (
        "NUM_PROCESSES",
        "PROCESS_ID",
        "a JAXJob",
        "$COORDINATOR_ADDRESS:$COORDINATOR_PORT",
    ),
    (
        "SKYPILOT_NUM_NODES",
        "SKYPILOT_NODE_RANK",
        "SkyPilot",
        '"$(echo "$SKYPILOT_NODE_IPS" | head -n 1):8476"',
    ),
)
_TPU_HOSTS = ("TPU_PROCESS_ADDRESSES", "TPU_WORKER_HOSTNAMES")
_INDEX = "JOB_COMPLETION_INDEX"


def detect(environment: Mapping[str, str], seconds: float) -> ProcessSpec | Sign | None:
    """Return what a launcher says; None for a process alone.

    Args:
        environment: of this process. jax reads the same one by itself.
        seconds: to wait for the coordinator's name to be known.

    Raises:
        ConfigError: what jax reads of it is not as it should be.
    """
    cluster = next((c for c in _clusters(environment) if _is_present(c)), None)
    if cluster is None:
        return _counted(environment) or _tpu_hosts(environment) or _indexed(environment)
    try:
        processes = cluster.get_process_count()
        if processes == 1:  # it may have started one that started several
            mine = cluster.__name__.startswith("Slurm")
            rest = {k: v for k, v in environment.items() if not (mine and k.startswith("SLURM_"))}
            return _counted(rest)
        port = environment.get("JAX_COORDINATOR_PORT")
        address = environment.get("JAX_COORDINATOR_ADDRESS")
        address = address or cluster.get_coordinator_address(int(seconds), port)
        if not re.fullmatch(r".+:\d+", address):
            raise ValueError(f"JAX_COORDINATOR_ADDRESS is {address!r}, not HOST:PORT")
        devices = _local_device_ids(cluster, environment)
        return ProcessSpec(address, processes, cluster.get_process_id(), devices, seconds)
    except (RuntimeError, OSError, KeyError, ValueError) as error:
        if isinstance(error, ConfigError):
            raise
        raise ConfigError(
            f"processes: got an environment of {cluster.__name__} that could not be read "
            f"({error}), expected one; or give --coordinator, --processes and --process"
        ) from error


def _clusters(environment: Mapping[str, str]) -> list[type[ClusterEnv]]:
    """List the environments to look for: Kubernetes' in a Job alone, a TPU's not without it."""
    left_out = []
    without_tpu = environment.get("JAX_PLATFORMS") == "cpu"
    if without_tpu:
        left_out += ["GceTpuCluster", "GkeTpuCluster"]
    asks = _INDEX in environment and find_spec("kubernetes") is not None
    if not asks or (without_tpu and _on_tpu_host(environment)):
        left_out.append("K8sCluster")
    return [c for c in known_clusters() if not c.opt_in_only_method and c.__name__ not in left_out]


def _is_present(cluster: type[ClusterEnv]) -> bool:
    """Whether jax finds itself in such an environment; what it cannot ask says nothing."""
    try:
        return cluster.is_env_present()
    except Exception as error:
        # Of a package that need not be there: a pod without the token of a service account.
        if type(error).__name__ != "ConfigException":
            raise
        return False


def _on_tpu_host(environment: Mapping[str, str]) -> bool:
    return any(name in environment for name in _TPU_HOSTS)


def _number(environment: Mapping[str, str], name: str, default: int) -> int:
    text = environment.get(name, "")
    return int(text) if text.isdecimal() else default


def _counted(environment: Mapping[str, str]) -> Sign | None:
    """Look for a count above one, of a launcher that jax does not know or that says too little."""
    for count, number, launcher, address in _COUNTS:
        processes = _number(environment, count, 1)
        # Names as general as NUM_PROCESSES may mean anything, but not beside the other one.
        if processes > 1 and (number in environment or count.endswith("_SIZE")):
            return Sign(
                f"{processes} from {launcher}, which does not say where process 0 is"
                if address == "HOST:PORT"
                else f"{processes} from {launcher} ({count})",
                _OPTIONS.format(address, count, number),
                count,
            )
    # A batch script has the job's count too, and is alone; what srun starts has a number.
    processes = _number(environment, "SLURM_NTASKS", 1)
    if processes > 1 and _number(environment, "SLURM_PROCID", 0) > 0:
        fix = _OPTIONS.format("HOST:PORT", "SLURM_NTASKS", "SLURM_PROCID")
        return Sign(f"{processes} from srun", fix, "SLURM_NTASKS")
    return None


def _tpu_hosts(environment: Mapping[str, str]) -> Sign | None:
    """Hosts of a TPU slice, or slices, on which jax does not see the TPU."""
    if environment.get("JAX_PLATFORMS") == "cpu":
        return None
    for name in _TPU_HOSTS:
        hosts = len(environment.get(name, "").split(","))
        if hosts > 1:
            found = f"{hosts} hosts of a TPU slice ({name}), whose chips jax does not see"
            return Sign(found, "them to be seen: pip install 'jax[tpu]'", name)
    slices = _number(environment, "MEGASCALE_NUM_SLICES", 1)
    if slices > 1:
        found = f"{slices} TPU slices (MEGASCALE_NUM_SLICES), whose chips jax does not see"
        return Sign(found, "them to be seen: pip install 'jax[tpu]'", "MEGASCALE_NUM_SLICES")
    return None


def _indexed(environment: Mapping[str, str]) -> Sign | None:
    """Look for a pod of an Indexed Job, which says which one it is, and not of how many."""
    if _INDEX in environment and not _on_tpu_host(environment):
        return Sign(
            f"pod {environment[_INDEX]} of a Kubernetes Indexed Job ({_INDEX}), which does not say "
            "of how many",
            f"--coordinator HOST:PORT --processes N --process ${_INDEX}, where HOST is pod 0's "
            "name in the Job's headless service; or the package by which jax asks Kubernetes (pip "
            "install 'jax[k8s]'), and a service account with its token that may read pods",
            _INDEX,
        )
    if "JAX_COORDINATOR_ADDRESS" in environment:
        return Sign(
            "an address of process 0 (JAX_COORDINATOR_ADDRESS) and no number of processes",
            "--coordinator $JAX_COORDINATOR_ADDRESS --processes N --process I",
            "JAX_COORDINATOR_ADDRESS",
        )
    return None


def _local_device_ids(
    cluster: type[ClusterEnv], environment: Mapping[str, str]
) -> list[int] | None:
    """One device for each of several processes of a machine; all for the only one on it.

    jax by itself would give one device also to the only process of a machine, and number it among
    the machine's where a process sees its own alone (Slurm's --gpus-per-task).
    """
    local = None if "tpu" in cluster.name else cluster.get_local_process_id()
    here = _processes_here(environment)
    if local is None or here == 1 or "JAX_LOCAL_DEVICE_IDS" in environment:  # jax reads the last
        return None
    visible = environment.get("CUDA_VISIBLE_DEVICES")
    if visible is None:
        return [local]
    # Empty or -1 hides all; else they may be numbers, or names that begin with GPU- or MIG-.
    seen = len([name for name in visible.split(",") if name.strip() not in ("", "-1")])
    each = re.search(r"(\d+)$", environment.get("SLURM_GPUS_PER_TASK", ""))
    own = int(each[1]) if each else 1
    if seen <= 1 or (each and seen == own):
        return None
    if seen < (local + 1) * own:
        raise ConfigError(
            f"processes: got {here or local + 1} on one machine, of which number {local} sees "
            f"{seen} GPUs (CUDA_VISIBLE_DEVICES={visible}), expected at least {own} for each; "
            "start fewer on a machine (Slurm: --ntasks-per-node), or give each its own "
            "(--gpus-per-task)"
        )
    return list(range(local * own, (local + 1) * own))


def _processes_here(environment: Mapping[str, str]) -> int | None:
    """How many processes this machine has; None if the launcher does not say."""
    if "OMPI_COMM_WORLD_LOCAL_SIZE" in environment:
        return _number(environment, "OMPI_COMM_WORLD_LOCAL_SIZE", 1)
    counts: list[int] = []
    for part in environment.get("SLURM_STEP_TASKS_PER_NODE", "").split(","):  # 4(x2),3
        found = re.fullmatch(r"(\d+)(?:\(x(\d+)\))?", part)
        counts += [int(found[1])] * int(found[2] or 1) if found else []
    node = _number(environment, "SLURM_NODEID", 0)
    return counts[node] if node < len(counts) else None
