"""In and out: what other libraries read."""
