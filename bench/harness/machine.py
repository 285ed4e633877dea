"""What ran where: processor, GPU, versions, commit. Measures nothing."""

from __future__ import annotations

import contextlib
import os
import platform
import subprocess
from importlib import metadata
from pathlib import Path
from typing import Any

import torch

from fused_adam import __version__

# Whatever the versions of which change a number.
PACKAGES = (
    "triton",
    "numpy",
    "torch-optimi",
    "flashoptim",
    "torchao",
    "bitsandbytes",
    "apex",
    "transformer-engine",
    "deepspeed",
)


def cpu_name() -> str:
    """The processor in words."""
    with contextlib.suppress(OSError):
        for line in Path("/proc/cpuinfo").read_text().splitlines():
            if line.startswith("model name"):
                return line.partition(":")[2].strip()
    return platform.processor() or platform.machine()


def cpu_memory_bytes() -> tuple[int, int]:
    """Memory of this machine: all of it, and what is free to be taken."""
    values = {}
    with contextlib.suppress(OSError):
        for line in Path("/proc/meminfo").read_text().splitlines():
            key, _, rest = line.partition(":")
            values[key] = int(rest.split()[0]) * 1024
    total = values.get("MemTotal", 0)
    return total, values.get("MemAvailable", total)


def cache_bytes(device: torch.device) -> int:
    """Size of the last cache before memory; 32 MiB where it cannot be found out."""
    if device.type == "cuda":
        return int(torch.cuda.get_device_properties(device).L2_cache_size)
    sizes = [0]
    for file in Path("/sys/devices/system/cpu/cpu0/cache").glob("index*/size"):
        with contextlib.suppress(OSError, ValueError):
            text = file.read_text().strip()
            sizes.append(int(text[:-1]) * {"K": 1 << 10, "M": 1 << 20, "G": 1 << 30}[text[-1]])
    return max(sizes) or 32 << 20


def free_bytes(device: torch.device) -> int:
    """Memory of the device that is free to be taken; 0 if that cannot be found out."""
    return torch.cuda.mem_get_info(device)[0] if device.type == "cuda" else cpu_memory_bytes()[1]


def versions() -> dict[str, str]:
    """Of everything that is installed and matters."""
    found = {
        "fused_adam": __version__,
        "torch": torch.__version__,
        "python": platform.python_version(),
    }
    for package in PACKAGES:
        with contextlib.suppress(metadata.PackageNotFoundError):
            found[package] = metadata.version(package)
    return found


def commit() -> str | None:
    """Of the checkout this runs from, `-dirty` behind it if files differ from it; None outside a
    checkout.
    """

    def git(*arguments: str) -> str:
        command = ["git", "-C", str(Path(__file__).parent), *arguments]
        return subprocess.run(command, capture_output=True, text=True, check=True).stdout.strip()

    try:
        # Installed into a virtual environment inside some checkout, this is none of that checkout's
        # files.
        git("ls-files", "--error-unmatch", Path(__file__).name)
        # Recorded runs are written into the checkout itself.
        dirty = git("status", "--porcelain", "--untracked-files=no", "--", ":/", ":!/bench/results")
        return git("rev-parse", "--short=12", "HEAD") + ("-dirty" if dirty else "")
    except (OSError, subprocess.CalledProcessError):
        return None


def describe(device: torch.device) -> dict[str, Any]:
    """The machine, as it goes into every record. Sizes in bytes."""
    load = os.getloadavg()[0] if hasattr(os, "getloadavg") else None
    found: dict[str, Any] = {
        "device": device.type,
        "cpu": cpu_name(),
        "cores": len(os.sched_getaffinity(0))
        if hasattr(os, "sched_getaffinity")
        else os.cpu_count(),
        "threads": torch.get_num_threads(),
        "memory_bytes": cpu_memory_bytes()[0],
        "cache_bytes": cache_bytes(device),
        "load": load,
        "system": f"{platform.system()} {platform.machine()}",
        "versions": versions(),
        "commit": commit(),
    }
    if device.type == "cuda":
        properties = torch.cuda.get_device_properties(device)
        found |= {
            "gpu": properties.name,
            "gpu_memory_bytes": properties.total_memory,
            "gpu_capability": f"{properties.major}.{properties.minor}",
            "gpu_runtime": torch.version.cuda or torch.version.hip,
        }
    return found


def line(machine: dict[str, Any]) -> str:
    """The machine in one line, from a record."""
    place = (
        machine.get("gpu")
        or f"{machine['cpu']}, {machine['cores']} cores, {machine['threads']} threads"
    )
    versions = machine["versions"]
    software = [
        f"{name} {versions[name]}"
        for name in ("torch", "triton", "python", "fused_adam")
        if name in versions
    ]
    return f"{place}; {', '.join(software)}; commit {machine['commit'] or 'unknown'}"
