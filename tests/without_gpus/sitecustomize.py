"""Python runs this at its start, in every process that a test starts: what `tests.devices` says of GPUs stays true.

DeepSpeed's launcher numbers CUDA_VISIBLE_DEVICES for its ranks anew, also where the launcher itself saw no GPU.
"""

import os

os.environ["CUDA_VISIBLE_DEVICES"] = ""
