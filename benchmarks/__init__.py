"""The parts of bench.py and compare.py: clocks, what is measured, and the tables and pictures drawn from it."""
