"""Settings that must stand before torch is imported, and a place for what tests of several rooms share."""
import os
import sys
from pathlib import Path

os.environ.setdefault("OMP_NUM_THREADS", "2")
os.environ.setdefault("GOMP_SPINCOUNT", "1000")  # libgomp's spinning threads collapse beside other work
sys.path.append(str(Path(__file__).parent))      # pytest's importlib mode does not: small_models lies here
