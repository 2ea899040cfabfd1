"""What a recipe will cost: its calendar, memory and bytes, computed before any GPU is touched."""
