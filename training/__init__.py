"""What train.py and its siblings stand on: run folders, checkpoints, losses, schedules, signals."""
