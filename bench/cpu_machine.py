"""bench/cpu.py: on what, by what and when was measured."""

from __future__ import annotations

import os
import platform
import subprocess
import sys
from contextlib import suppress
from datetime import UTC, datetime
from importlib.metadata import version
from pathlib import Path

import psutil

from prima_numpy.kernels import Kernels


def machine() -> dict[str, object]:
    facts = Kernels(1).describe()
    return {
        "date": datetime.now(UTC).isoformat(timespec="seconds"),
        "cpu": cpu_name(),
        "cpu_features": facts["cpu"],
        "cpu_variants": facts["variants"],
        "physical_cores": psutil.cpu_count(logical=False),
        "logical_cores": psutil.cpu_count(),
        "load_average_1_min": psutil.getloadavg()[0],
        "memory_bytes": psutil.virtual_memory().total,
        "memory_available_bytes": psutil.virtual_memory().available,
        "os": platform.platform(),
        "native_build": facts["build"],
        "python": platform.python_version(),
        "numpy": version("numpy"),
        "prima": version("prima-llm"),
    }


def cpu_name() -> str:
    """As its maker calls it, where the system tells."""
    with suppress(OSError, subprocess.CalledProcessError):
        if sys.platform == "darwin":
            command = ["sysctl", "-n", "machdep.cpu.brand_string"]
            return subprocess.run(command, capture_output=True, text=True, check=True).stdout.strip()
        for line in Path("/proc/cpuinfo").read_text().splitlines():
            if line.startswith("model name"):
                return line.partition(":")[2].strip()
    return os.environ.get("PROCESSOR_IDENTIFIER") or platform.processor() or platform.machine()
