"""What surrounds the tests' processes: set when it is imported, before torch and LeRobot are."""

import os
import signal
import tempfile
from pathlib import Path

from ray_jobs.cli.terminal import quiet

quiet()
# Before torch is imported. Threads that wait for others by spinning keep a core from them, where several processes train on
# two: steps take ten times as long.
os.environ.setdefault("OMP_WAIT_POLICY", "passive")
# Nor shall it matter which processor the tests run on: with AVX-512 sums are rounded in another order. In 20 steps of
# diffusion our losses and LeRobot's came apart by 1.1e-4 of that alone on a new one, and by 1.1e-5 without.
os.environ.setdefault("ATEN_CPU_CAPABILITY", "avx2")
os.environ.setdefault("ONEDNN_MAX_CPU_ISA", "AVX2")
# In the background of a shell Ctrl-C is ignored, and would be by all that tests start.
signal.signal(signal.SIGINT, signal.default_int_handler)

if "RAY_JOBS_CACHE" not in os.environ:  # the processes that tests start share it
    CACHE = tempfile.TemporaryDirectory(prefix="ray_jobs_cache_")  # decoded frames of all tests
    os.environ["RAY_JOBS_CACHE"] = CACHE.name

# Where Ray's workers and other processes find the tests' plugins.
os.environ["PYTHONPATH"] = str(Path(__file__).parent.parent)
