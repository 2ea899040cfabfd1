"""Figures of runs, drawn from what is in their directories. Needs matplotlib, and neither torch nor deepspeed."""
