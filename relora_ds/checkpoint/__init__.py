"""What is saved, and how a run goes on from it."""
