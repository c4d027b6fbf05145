"""The vLLM plugin's Triton kernel without a GPU: interpreted, on numbers, and compiled, for GPUs that are not there."""

import importlib.util
import os
import subprocess
import sys
from pathlib import Path

import pytest

pytestmark = pytest.mark.skipif(
    importlib.util.find_spec("triton") is None, reason="needs Triton: make test-triton, or pip install --no-deps triton"
)


@pytest.mark.parametrize("interpret", ["1", "0"])
def test_the_cases(interpret, tmp_path):
    settings = {"TRITON_INTERPRET": interpret, "TRITON_CACHE_DIR": str(tmp_path), "TRITON_DEFAULT_FP_FUSION": "1"}
    command = [sys.executable, "-m", "pytest", "-q", "-p", "no:cacheprovider", "kernel_cases.py"]
    done = subprocess.run(
        command, cwd=Path(__file__).parent, env={**os.environ, **settings}, capture_output=True, text=True, check=False
    )
    assert done.returncode == 0, done.stdout[-4000:] + done.stderr[-2000:]
    assert "passed" in done.stdout
