"""Many devices, one training: a file for each way to use them, and processes.py, which all of them need."""
