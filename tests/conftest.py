"""Settings that must stand before torch is imported."""
import os

os.environ.setdefault("OMP_NUM_THREADS", "2")
os.environ.setdefault("GOMP_SPINCOUNT", "1000")  # libgomp's spinning threads collapse beside other work
