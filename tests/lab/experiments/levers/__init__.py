"""What decides how well a one-sided chain learns: variants of GaLore at the scale `tiny`, in plain PyTorch.

Most of them are not in the product, and the measurements here decide what comes into it.

    python -m tests.lab.experiments.levers NAME ... [--seed N]    # measure variants, and keep what they find
    python -m tests.lab.experiments.levers                        # those that are missing
"""
