"""The mathematics of ReLoRA in plain PyTorch: one process, neither DeepSpeed nor torch.distributed."""
