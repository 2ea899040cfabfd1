"""`relora watch`: runs as they train, read from their directories alone."""
