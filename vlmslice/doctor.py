"""Examines the machine and the installation: what to look at before asking why something is slow or fails."""

from __future__ import annotations

import dataclasses
import os
import platform
import shutil
import tempfile
from dataclasses import dataclass
from importlib import metadata
from pathlib import Path
from typing import Any

import psutil
import torch
from packaging.requirements import Requirement

from vlmslice.matmul_peak import matmul_peak
from vlmslice.model_files import ModelError, find_model, find_weights
from vlmslice.weight_import import file_digest

_MIN_FREE_MEMORY_GB = 1.0
_MIN_FREE_DISK_GB = 1.0


@dataclass(frozen=True)
class Report:
    """What was found; values are numbers, strings or flat dicts of these.

    Attributes:
        system: Python, operating system, processor, cores.
        versions: Installed release of every requirement, optional ones included.
        threads: Threads of torch and the settings of OpenMP.
        compute: Accelerator, and speed of matrix products on the CPU in GFLOP/s.
        memory: Of the machine.
        disk: Free space where runs and temporary files would go.
        model: Folder, weight files with size and SHA-256.
        advice: What could be better.
        problems: What must be mended first.
    """

    system: dict[str, Any]
    versions: dict[str, str]
    threads: dict[str, Any]
    compute: dict[str, Any]
    memory: dict[str, float]
    disk: dict[str, float]
    model: dict[str, Any]
    advice: tuple[str, ...]
    problems: tuple[str, ...]

    def to_dict(self) -> dict[str, Any]:
        """The report, ready for JSON."""
        return dataclasses.asdict(self)

    def describe(self) -> str:
        """The report as lines for people."""
        lines = []
        for title, fields in self.to_dict().items():
            if isinstance(fields, dict):
                lines.append(title)
                lines += [f"  {name:<24} {value}" for name, value in fields.items()]
        lines += [f"advice: {line}" for line in self.advice]
        lines += [f"problem: {line}" for line in self.problems] or ["no problem found"]
        return "\n".join(lines)


def examine(model: str | None = None) -> Report:
    """Looks at everything; takes about a second.

    Args:
        model: Folder of the model to look at, by default the bundled one.
    """
    versions, problems = _examine_versions()
    advice = []
    try:
        model_fields = _examine_model(model)
    except ModelError as error:
        model_fields = {"folder": "none"}
        problems.append(str(error))
    memory = {
        "total GB": _gb(psutil.virtual_memory().total),
        "free GB": _gb(psutil.virtual_memory().available),
    }
    disk = {
        "free GB, this folder": _gb(shutil.disk_usage(Path.cwd()).free),
        "free GB, temporary": _gb(shutil.disk_usage(tempfile.gettempdir()).free),
    }
    if memory["free GB"] < _MIN_FREE_MEMORY_GB:
        problems.append(f"{memory['free GB']} GB of memory are free; expected {_MIN_FREE_MEMORY_GB} or more")
    if min(disk.values()) < _MIN_FREE_DISK_GB:
        advice.append(f"{min(disk.values())} GB of disk are free; checkpoints of a training run need more")
    compute = _examine_compute()
    if compute["bf16 GFLOP/s"] < compute["fp32 GFLOP/s"]:
        advice.append("bf16 is slower than fp32 on this CPU: train in fp32, or on an accelerator")
    return Report(
        system={
            "python": platform.python_version(),
            "platform": platform.platform(),
            "processor": _processor_name(),
            "cores": psutil.cpu_count(logical=False) or 0,
            "threads of the cores": psutil.cpu_count() or 0,
            "load of 1 minute": round(psutil.getloadavg()[0], 2),
        },
        versions=versions,
        threads={
            "torch": torch.get_num_threads(),
            "OMP_NUM_THREADS": os.environ.get("OMP_NUM_THREADS", "unset"),
            "OMP_WAIT_POLICY": os.environ.get("OMP_WAIT_POLICY", "unset"),
        },
        compute=compute,
        memory=memory,
        disk=disk,
        model=model_fields,
        advice=tuple(advice),
        problems=tuple(problems),
    )


def _examine_versions() -> tuple[dict[str, str], list[str]]:
    """Installed releases of the package's own requirements, and those that are missing or too old."""
    versions, problems = {"vlmslice": metadata.version("vlmslice")}, []
    for line in metadata.requires("vlmslice") or []:
        requirement = Requirement(line)
        optional = requirement.marker is not None  # the extras
        try:
            installed = metadata.version(requirement.name)
        except metadata.PackageNotFoundError:
            versions[requirement.name] = "not installed" + (" (optional)" if optional else "")
            if not optional:
                problems.append(f"{requirement.name} is not installed; pip install '{requirement}'")
            continue
        versions[requirement.name] = installed
        if not requirement.specifier.contains(installed, prereleases=True):
            problems.append(
                f"{requirement.name} {installed} is installed, expected {requirement.specifier}; "
                f"pip install --upgrade '{requirement.name}{requirement.specifier}'"
            )
    return dict(sorted(versions.items())), problems


def _examine_model(model: str | None) -> dict[str, Any]:
    folder = find_model(model)
    fields: dict[str, Any] = {"folder": str(folder)}
    for path in find_weights(folder):
        fields[path.name] = f"{path.stat().st_size / 1e6:.1f} MB, sha256 {file_digest(path)}"
    return fields


def _examine_compute() -> dict[str, Any]:
    accelerator = torch.accelerator.current_accelerator(check_available=True)
    return {
        "accelerator": str(accelerator or "none"),
        "instruction set": torch.backends.cpu.get_cpu_capability(),
        "fp32 GFLOP/s": round(matmul_peak(torch.float32) / 1e9),
        "bf16 GFLOP/s": round(matmul_peak(torch.bfloat16) / 1e9),
    }


def _processor_name() -> str:
    cpu_info = Path("/proc/cpuinfo")
    if cpu_info.exists():
        for line in cpu_info.read_text().splitlines():
            if line.startswith("model name"):
                return line.split(":", 1)[1].strip()
    return platform.processor()


def _gb(num_bytes: int) -> float:
    return round(num_bytes / 1e9, 1)
