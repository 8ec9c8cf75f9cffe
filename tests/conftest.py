import os

os.environ["OMP_NUM_THREADS"] = "1"  # before torch is imported, for subprocesses too: tiny models only lose by threads
