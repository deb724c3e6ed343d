"""How many FLOPs attention on a CPU takes, for the counter of PyTorch: by the formulas of the benchmarks."""

import runpy
from pathlib import Path

ATTENTION = runpy.run_path(str(Path(__file__).parents[1] / "benchmarks" / "cpu_flops.py"))["CPU_ATTENTION"]
