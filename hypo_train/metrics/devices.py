"""What devices can do by their data sheets, and what share of it a prediction assumes."""

from __future__ import annotations

import re
from dataclasses import dataclass

# Dense bf16 FLOP/s of the vendor's data sheets, whose larger figures are for sparse weights. The first name that is
# found in a device's name counts.
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


def peak_bf16(device_name: str) -> float | None:
    """What a device could do in bf16, FLOP/s; None where that is not known. Laptops' parts are others."""
    if "Laptop" in device_name:
        return None
    return next((peak for name, peak in PEAK_BF16.items() if re.search(rf"\b{name}\b", device_name)), None)


@dataclass(frozen=True)
class Device:
    """Bandwidths in bytes a second."""

    gib: int  # of memory
    peak: float  # FLOP/s in bf16
    memory: float
    link: float  # to the others of its node, each way
    network: float | None  # its own part of what connects nodes, each way; None: machines differ


# Data sheets too: of the SXM parts, and of the vendor's DGX machines for the network, with an adapter of 400 Gb/s for
# each device (200 in DGX A100). An NVLink figure there counts both ways, and is halved here.
DEVICES = {
    "A100": Device(80, PEAK_BF16["A100"], 2.039e12, 300e9, 25e9),
    "H100": Device(80, PEAK_BF16["H100"], 3.35e12, 450e9, 50e9),
    "H200": Device(141, PEAK_BF16["H200"], 4.8e12, 450e9, 50e9),
    "B200": Device(180, PEAK_BF16["B200"], 8e12, 900e9, 50e9),
    "L40S": Device(48, PEAK_BF16["L40S"], 0.864e12, 32e9, None),  # PCIe 4
}

# Llama 3's passes reached 38 to 43 % of the peak on H100s (arXiv 2407.21783, table 4), and large collectives commonly
# reach four fifths of their links. Nothing here has been measured with this code on a GPU.
OF_MEMORY = 0.6
OF_LINKS = 0.8


@dataclass(frozen=True)
class Assumed:
    """What a prediction assumes beside the device; bandwidths in bytes a second, None: the data sheet's."""

    mfu: float = 0.4  # the share of its peak that a pass reaches
    devices_per_node: int = 8
    link: float | None = None
    network: float | None = None


def bandwidth(device: Device, count: int, assumed: Assumed) -> float | None:
    """Bytes a second that each of ``count`` devices can send in a ring over all of them; None where it is not known.

    Collectives run several rings at once, each through a network adapter of its own: what enters and leaves a node is
    shared by all of its adapters.
    """
    link = assumed.link or device.link
    if count <= assumed.devices_per_node:
        return link
    network = assumed.network or device.network
    return None if network is None else min(link, network * assumed.devices_per_node)
