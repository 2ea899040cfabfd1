"""Checkpoints of a run in an object store: copies of those on the disk, for a machine whose disk is lost."""
