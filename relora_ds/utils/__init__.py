"""Small helpers that every room may use. They import nothing of relora_ds, and no torch."""
