"""Update rules of optimizers that need the whole gradient of a matrix, in plain PyTorch and one process.

A rule is a `MatrixOptimizer` (`optimizer.py`): from the gradient of a weight and the weight's state it computes what to
add to the weight. Who has the whole gradient, and where weight and state are, is not known here.
"""
