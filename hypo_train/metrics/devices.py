"""Device names, data-sheet figures of known devices, and the assumptions of the prediction of step time."""

from __future__ import annotations

import platform
import re
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

if TYPE_CHECKING:  # the command line reads the table below and should not load torch
    import torch

# Dense bf16 FLOP/s from the vendor's data sheets, whose larger figures hold for sparse weights. The first name that
# occurs in a device's name counts.
PEAK_BF16 = {
    "GB200": 2500e12,
    "B200": 2250e12,
    "GH200": 990e12,
    "H200 NVL": 835e12,
    "H200": 989e12,
    "H100 PCIe": 756e12,
    "H100 NVL": 835e12,
    "H100": 989e12,
    "A100": 312e12,
    "L40S": 362e12,
    "RTX 4090": 165e12,
}


@dataclass(frozen=True)
class Device:
    """Data-sheet figures of one device; bandwidths in bytes a second."""

    gib: int  # memory size
    peak: float  # FLOP/s in bf16
    memory: float  # memory bandwidth
    link: float  # to the other devices of its node, in each direction
    network: float | None  # one device's part of the network between nodes, in each direction; None: not known


# SXM variants. The network is that of the vendor's DGX machines: one adapter of 400 Gb/s for each device (200 in DGX
# A100). Data sheets add both directions of NVLink, so their figure is halved here.
DEVICES = {
    "A100": Device(80, PEAK_BF16["A100"], 2.039e12, 300e9, 25e9),
    "H100": Device(80, PEAK_BF16["H100"], 3.35e12, 450e9, 50e9),
    "H200": Device(141, PEAK_BF16["H200"], 4.8e12, 450e9, 50e9),
    "B200": Device(180, PEAK_BF16["B200"], 8e12, 900e9, 50e9),
    "L40S": Device(48, PEAK_BF16["L40S"], 0.864e12, 32e9, None),  # PCIe 4
}

# Llama 3's passes reached 38 to 43 % of the peak on H100s (arXiv 2407.21783, table 4), and large collectives commonly
# reach four fifths of their links. None of these was measured with this code on a GPU.
OF_MEMORY = 0.6
OF_LINKS = 0.8


@dataclass(frozen=True)
class Assumed:
    """Assumptions of a prediction of step time; bandwidths in bytes a second, None: the data sheet's."""

    mfu: float = 0.4  # model FLOPs as a fraction of the peak
    devices_per_node: int = 8
    link: float | None = None
    network: float | None = None


def device_name(device: torch.device) -> str:
    """Return the name of the GPU, or "cpu: " and the processor's name."""
    if device.type == "cuda":
        import torch

        return torch.cuda.get_device_name(device)
    return f"{device.type}: {_processor_name()}"


def peak_bf16(device_name: str) -> float | None:
    """Return the peak bf16 FLOP/s of a device; None if the name is not in the table. Laptop GPUs are left out."""
    if "Laptop" in device_name:
        return None
    return next((peak for name, peak in PEAK_BF16.items() if re.search(rf"\b{name}\b", device_name)), None)


def bandwidth(device: Device, count: int, assumed: Assumed) -> float | None:
    """Return the bytes a second that each of ``count`` devices can send in a ring over all of them.

    Collectives run several rings at once, each through another network adapter, so all adapters of a node share its
    traffic. None if the network's bandwidth is not known.
    """
    link = assumed.link or device.link
    if count <= assumed.devices_per_node:
        return link
    network = assumed.network or device.network
    return None if network is None else min(link, network * assumed.devices_per_node)


def _processor_name() -> str:
    try:  # only Linux has this file
        lines = Path("/proc/cpuinfo").read_text(encoding="utf-8", errors="replace").splitlines()
    except OSError:
        lines = []
    models = (line.partition(":")[2].strip() for line in lines if line.startswith("model name"))
    return next(models, "") or platform.processor() or platform.machine()
