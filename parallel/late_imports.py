"""What an engine imports when it is made, 2.5 s of it: the optimizers' compiler, and deepspeed's list of optimizers.

For a process that forks ranks, to import before it does.
"""

import deepspeed.runtime.zero.muon.muon_optimizer
import torch._dynamo
