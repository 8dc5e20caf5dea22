"""Prints the registers and memory of each CUDA kernel in the built extension, for each architecture.

Shared memory is what the kernel declares; from 9.0 on 1 KiB that the system keeps comes on top.
"""

import re
import subprocess
import sysconfig
from pathlib import Path

from rich.console import Console
from rich.table import Table

import cross_entropy

# Of the package nvidia-cuda-cuobjdump, since not every toolkit has one.
CUOBJDUMP = Path(sysconfig.get_path("purelib")) / "nvidia/cu13/bin/cuobjdump"


def main() -> None:
    command = [str(CUOBJDUMP), "--dump-resource-usage", cross_entropy._C.__file__]
    dump = subprocess.run(command, check=True, capture_output=True, text=True).stdout
    names = subprocess.run(["c++filt", "-p"], input=dump, check=True, capture_output=True, text=True).stdout
    table = Table("kernel", "architecture")
    for column in ["registers", "shared", "stack", "local"]:
        table.add_column(column, justify="right")
    rows, architecture = [], ""
    pattern = r"arch = sm_(\w+)|Function (.+):\n\s*REG:(\d+) STACK:(\d+) SHARED:(\d+) LOCAL:(\d+)"
    for arch, name, registers, stack, shared, local in re.findall(pattern, names):
        architecture = arch or architecture
        if name:
            short = re.sub(r"_GLOBAL__N__\w+?::|\(anonymous namespace\)::|ce::cuda::|^void ", "", name)
            rows.append((short, f"{architecture[:-1]}.{architecture[-1]}", registers, shared, stack, local))
    for row in sorted(rows, key=lambda row: (row[0], float(row[1]))):
        table.add_row(*row)
    Console(width=150).print(table)


if __name__ == "__main__":
    main()
