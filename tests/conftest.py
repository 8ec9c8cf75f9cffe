import os

os.environ["OMP_NUM_THREADS"] = "1"  # before torch is imported, for subprocesses too: tiny models only lose by threads
os.environ.setdefault("TRITON_INTERPRET", "1")  # before triton is: kernels run on the CPU, as Python
