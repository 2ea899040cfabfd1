"""What engines that are islands exchange, and what becomes of it. The link between them is in `relora_ds.islands`."""
