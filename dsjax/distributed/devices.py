# SPDX-License-Identifier: Apache-2.0
"""What the makers say of each accelerator: its peak, its memory, its links.

In: `jax.Device.device_kind`. Out: figures to divide by (MFU) and to plan with (does it fit, how
fast could it be). Not done here: looking at the devices of this machine, or the network between
hosts.

Sources:

- TPU: Google Cloud's pages docs.cloud.google.com/tpu/docs/{v4,v5e,v5p,v6e} for peaks, bandwidths
  and "bidirectional ICI bandwidth per chip". The page of v4 does not state its links: 6 of 50 GB/s
  each way (Jouppi et al. 2023, arXiv:2304.01433, table 4). Memory is what the compiler says is
  there when it refuses a program that is too large ("exceeds available HBM", libtpu 0.0.42.1); the
  pages' 32, 16, 95 and 32 GB hold what the system keeps for itself too.
- GPU: NVIDIA's datasheets of A100, A10, L4, L40S, H100 and H200, the peak halved where the sheet
  states it with sparsity, and the Ada whitepaper (RTX 4090, float32 accumulation). Memory is what
  CUDA reports, less than nvidia-smi's: `device_memory_size` of XLA's target descriptions (A100 SXM,
  H100), deviceQuery (A10, L40S), PyTorch's "total capacity of" (the others, the least that was
  seen). XLA takes three quarters of it unless XLA_PYTHON_CLIENT_MEM_FRACTION says otherwise.
"""

from dataclasses import dataclass

GPU_MEMORY_SHARE = 0.92
"""Part of a GPU's memory that a run takes for itself (XLA_PYTHON_CLIENT_MEM_FRACTION); the rest is
for CUDA's context and NCCL."""


@dataclass(frozen=True)
class Device:
    """One accelerator as its maker describes it.

    Attributes:
        peak_flops: dense bfloat16 FLOP/s, without sparsity.
        memory_bytes: device memory that a program can have.
        memory_bandwidth: bytes/s between device memory and the compute units.
        link_bandwidth: bytes/s to other devices over all links and both directions together, as the
            makers count it: half of it each way. ICI on TPUs, NVLink on SXM boards, the PCIe bus on
            cards (A100 and H100 cards can be bridged in pairs; that is not counted).
    """

    peak_flops: float
    memory_bytes: int
    memory_bandwidth: float
    link_bandwidth: float


def _device(teraflops: float | int, gib: float, memory_gb_s: int, link_gb_s: int) -> Device:
    return Device(teraflops * 1e12, int(gib * 2**30), memory_gb_s * 1e9, link_gb_s * 1e9)


_V5E = _device(197, 15.75, 819, 400)
_V5P = _device(459, 95.74, 2765, 1200)
_V6E = _device(918, 31.25, 1638, 800)

# Names are matched whole, so that a MIG slice ("... MIG 1g.10gb") is unknown. A v4 or v5p device is
# a chip, both cores together ("megacore", what JAX shows on a real one).
DEVICES = {
    "TPU v4": _device(275, 30.75, 1200, 600),
    "TPU v5 lite": _V5E,
    "TPU v5e": _V5E,
    "TPU v5": _V5P,
    "TPU v5p": _V5P,
    "TPU v6 lite": _V6E,
    "TPU v6e": _V6E,
    "NVIDIA A100-SXM4-40GB": _device(312, 39.42, 1555, 600),
    "NVIDIA A100-SXM4-80GB": _device(312, 79.25, 2039, 600),
    "NVIDIA A100-PCIE-40GB": _device(312, 39.42, 1555, 64),  # memory: as the SXM board's
    "NVIDIA A100 80GB PCIe": _device(312, 79.10, 1935, 64),
    "NVIDIA A10": _device(125, 21.98, 600, 64),
    "NVIDIA L4": _device(121, 22.03, 300, 64),
    "NVIDIA L40S": _device(362, 44.52, 864, 64),
    "NVIDIA H100 80GB HBM3": _device(989, 79.14, 3350, 900),
    "NVIDIA H100 PCIe": _device(756, 79.11, 2000, 128),
    "NVIDIA H200": _device(989, 139.72, 4800, 900),
    "NVIDIA GeForce RTX 4090": _device(165.2, 23.61, 1008, 64),
}


def peak_flops(device_kind: str, dtype: str) -> float | None:
    """Return a device's published dense peak in FLOP/s, or None where none is known.

    Args:
        device_kind: `jax.Device.device_kind`.
        dtype: the compute dtype's name. float32 has no one published peak (TPUs and tensor cores
            run it in several passes); float16 has bfloat16's rate on GPUs, none on TPUs.
    """
    native = dtype == "bfloat16" or (dtype == "float16" and device_kind.startswith("NVIDIA"))
    device = DEVICES.get(device_kind) if native else None
    return None if device is None else device.peak_flops
