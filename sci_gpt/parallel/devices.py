"""Devices: peak rates, memory and links of accelerators, as pages quote data sheets, and of this machine."""

from __future__ import annotations

import os
import time
from dataclasses import dataclass, replace
from typing import Literal

import psutil
import torch

from sci_gpt.errors import ConfigError

_WIDEST = 1024  # of the matrix product that is measured
_COPIED = 2**25  # bytes of the copy that is measured
_LOOPBACK, _ETHERNET = 1e9, 1.25e9  # assumed: gloo between processes of a machine, and over 10 Gbit/s


@dataclass(frozen=True, kw_only=True)
class Device:
    """What one process computes on. Rates are per second and per device; links count one direction.

    Attributes:
        name: key of the table, or measured.
        peak: FLOPs by dtype, dense; what MFU is a share of. fp32 is that of torch's default, without TF32.
        memory: bytes.
        reserved: bytes of it that libraries and the allocator take.
        bandwidth: bytes to and from the device's own memory.
        link: bytes between devices of a node, all of a device's links together.
        link_peers: 0: links meet in a switch; else the other devices to which each of them leads.
        network: bytes between nodes, this device's share of the node's adapters.
        host_link: bytes between the device and its host's memory.
        host_memory: bytes of the host, this device's share; a CPU's own memory is all there is.
        kind: cpu or gpu: a CPU's host is itself.
        attainable: shares of peak, bandwidth and links that training reaches.
    """

    name: str
    peak: dict[str, float]
    memory: float
    reserved: float
    bandwidth: float
    link: float
    network: float
    host_link: float
    host_memory: float
    kind: Literal["cpu", "gpu"] = "gpu"
    link_peers: int = 0
    attainable: float = 0.6
    attainable_bandwidth: float = 0.8


def _gpu(
    name: str,
    *,
    bf16: float,
    fp32: float,
    gigabytes: float,
    bandwidth: float,
    link: float,
    network: float,
    host: float,
) -> Device:
    return Device(
        name=name,
        peak={"bf16": bf16 * 1e12, "fp32": fp32 * 1e12},
        memory=gigabytes * 1e9,
        reserved=3e9,  # the driver's context, NCCL's and cuBLAS' buffers, what the allocator cannot use
        bandwidth=bandwidth * 1e9,
        link=link * 1e9,
        network=network * 1e9,
        host_link=host * 1e9,
        host_memory=250e9,
    )


# TFLOP/s (dense: half of what a data sheet prints "with sparsity"), GB, GB/s; links in one direction. Compared with
# DGX user guides and with public tables that quote the data sheets (ml-engineering's accelerators and networks,
# torchtitan's peaks, llm-analysis' GPUs); the sheets themselves were not opened. A card of "80 GB" reports some % more.
# a100: NVIDIA A100 data sheet (2021): 312, 19.5; 80 GB at 2,039 GB/s (40 GB at 1,555); NVLink 600 GB/s both ways.
#   Network: DGX A100 data sheet: 8 x 200 Gbit/s for 8 GPUs.
# h100: NVIDIA H100 data sheet (SXM5, 2022): 1,979 with sparsity, 67; 80 GB at 3.35 TB/s; NVLink 900 GB/s both ways.
# h200: NVIDIA H200 data sheet (SXM): as H100, 141 GB at 4.8 TB/s. DGX H100/H200: 8 x 400 Gbit/s.
# b200: NVIDIA's HGX B200 column, an eighth: 4,500 with sparsity, 75 (older tables: 80), 7.7 TB/s (older: 8); DGX B200
#   user guide: 1,440 GB, NVLink 14.4 TB/s both ways, 8 x 400 Gbit/s.
# l40s: NVIDIA L40S data sheet: 362 (dense), 91.6; 48 GB at 864 GB/s; PCIe 4 x16, no NVLink; 200 Gbit/s assumed.
# mi300x: AMD Instinct MI300X data sheet: 1,307, 163.4; 192 GB at 5.3 TB/s; 7 links of 128 GB/s both ways, one to
#   each of the other seven; 400 Gbit/s for a device (Azure's ND MI300X v5).
# host: 2 TB for 8 devices (the DGX data sheets; DGX A100 of 40 GB: 1 TB), assumed for l40s and mi300x too; PCIe x16 of
#   the generation that the data sheet names, one direction: 32 (4) or 64 (5).
DEVICES: dict[str, Device] = {
    device.name: device
    for device in (
        _gpu("a100", bf16=312, fp32=19.5, gigabytes=80, bandwidth=2039, link=300, network=25, host=32),
        replace(
            _gpu("a100-40gb", bf16=312, fp32=19.5, gigabytes=40, bandwidth=1555, link=300, network=25, host=32),
            host_memory=125e9,
        ),
        _gpu("h100", bf16=989.4, fp32=67, gigabytes=80, bandwidth=3350, link=450, network=50, host=64),
        _gpu("h200", bf16=989.4, fp32=67, gigabytes=141, bandwidth=4800, link=450, network=50, host=64),
        _gpu("b200", bf16=2250, fp32=75, gigabytes=180, bandwidth=7700, link=900, network=50, host=64),
        _gpu("l40s", bf16=362, fp32=91.6, gigabytes=48, bandwidth=864, link=32, network=25, host=32),
        replace(
            _gpu("mi300x", bf16=1307.4, fp32=163.4, gigabytes=192, bandwidth=5300, link=448, network=50, host=64),
            link_peers=7,
        ),
    )
}
MEASURED = "measured"
NAMES = (*DEVICES, MEASURED)


def device_named(name: str, *, width: int, tokens: int, threads: int, processes: int) -> Device:
    """A row of the table, or this machine's CPU as one process of `processes` has it.

    Args:
        name: a key of DEVICES, or measured.
        width, tokens: of the matrix product that is measured.
        threads: of a process.
        processes: that share this machine's memory.

    Raises:
        ConfigError: no such device.
    """
    if name == MEASURED:
        return measured(width=width, tokens=tokens, threads=threads, processes=processes)
    check_name(name)
    return DEVICES[name]


def check_name(name: str) -> None:
    """Raises ConfigError for a name that is none of NAMES."""
    if name not in NAMES:
        raise ConfigError(f"--gpu is one of {', '.join(NAMES)}, got {name!r}")


def measured(*, width: int, tokens: int, threads: int, processes: int) -> Device:
    """This machine's CPU: the rate of a matrix product and of a copy, now; takes 0.3 s. Its links are assumed."""
    rate = matmul_rate(width, tokens, threads=threads)
    return Device(
        name=MEASURED,
        peak={"fp32": rate, "bf16": rate},
        memory=_machine_memory() / processes,
        reserved=5e8,  # Python and its libraries
        bandwidth=_copy_rate(),
        link=_LOOPBACK,
        network=_ETHERNET,
        host_link=float("inf"),
        host_memory=0.0,
        kind="cpu",
        attainable=1.0,  # the rates are measured, not peaks
        attainable_bandwidth=1.0,
    )


def matmul_rate(width: int, tokens: int, *, threads: int) -> float:
    """FLOPs per second of (tokens, width) x (width, 4 width) on this machine with a process's threads; takes 0.2 s.

    Beyond _WIDEST, from where on the rate hardly rises, that width is measured.
    """
    width = min(width, _WIDEST)
    before = torch.get_num_threads()
    torch.set_num_threads(threads)
    try:
        left, right = torch.ones(tokens, width), torch.ones(width, 4 * width)
        begun, count = time.perf_counter(), 0
        while time.perf_counter() - begun < 0.2:
            left @ right
            count += 1
        return 8.0 * tokens * width * width * count / (time.perf_counter() - begun)
    finally:
        torch.set_num_threads(before)


def _copy_rate() -> float:
    """Bytes read and written per second by one thread's copy."""
    source, target = torch.ones(_COPIED // 4), torch.empty(_COPIED // 4)
    target.copy_(source)
    begun, count = time.perf_counter(), 0
    while time.perf_counter() - begun < 0.05:
        target.copy_(source)
        count += 1
    return 2.0 * _COPIED * count / (time.perf_counter() - begun)


def _machine_memory() -> float:
    """Bytes that this machine, or the container, has."""
    limit = "/sys/fs/cgroup/memory.max"
    total = float(psutil.virtual_memory().total)
    if os.path.exists(limit):
        with open(limit, encoding="ascii") as file:
            said = file.read().strip()
        total = min(total, float(said)) if said.isdigit() else total
    return total
