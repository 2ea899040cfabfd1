"""Which network: presets (LLaMA shapes), Hugging Face configurations and checkpoints, and the Control baseline."""
