"""Makes the `benchmarks` package importable, also where pytest was not started as ``python -m pytest``."""

import sys
from pathlib import Path

ROOT = str(Path(__file__).resolve().parents[2])
if ROOT not in sys.path:
    sys.path.append(ROOT)
