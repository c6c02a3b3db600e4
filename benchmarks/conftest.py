"""So that ``python -m pytest benchmarks/bench_linear_loss.py`` finds the modules beside it."""

import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).parent))
