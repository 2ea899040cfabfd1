"""What is saved, and how a run resumes from it."""
