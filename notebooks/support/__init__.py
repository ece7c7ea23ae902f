"""What the pages import: a module for what all of them share, and one or two for each platform."""

import os
import sys
from pathlib import Path

# Read when torch is loaded: how long its idle threads spin, at the cost of other programs (benchmarks/README.md).
os.environ.setdefault("GOMP_SPINCOUNT", "3000")
os.environ["MPLBACKEND"] = "module://matplotlib_inline.backend_inline"  # figures show, whatever it was for other work
sys.path[:0] = [str(Path(__file__).resolve().parents[2])]  # the programs that the pages write
