"""vLLM on a CPU, in this process, with one thread."""

import os
import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).parent))
from running import SETTINGS

for key, value in SETTINGS.items():
    os.environ.setdefault(key, value)
