"""Training stages on transformers' Trainer: the same step on any number of processes, resumable at any second.

- `stage`: what a stage is, and how processes share its batch
- `run`: runs one, from its last checkpoint to its saved model
- `trainer`: the Trainer's step, log and optimizer as a stage wants them
- `guards`: steps that would spoil the weights
- `stopping`: signals
- `whereabouts`: which process the others wait for
- `checkpoints`: folders that are whole or not there
- `freezing`: which parts of a model train
- `optimizer`: Muon and AdamW as one
- `progress`: what is seen meanwhile
- `throughput`: what a step computes
- `diagnostics`: which parts learn
- `estimate`: what a run will cost
- `runs`: what runs there are
"""

import os
import sys
from typing import TYPE_CHECKING

# As in `vlmslice`: the command `vlmslice runs` needs no torch, and does not wait for it.
if TYPE_CHECKING or "vlmslice_command" not in sys.modules:
    import torch

    if not torch.accelerator.is_available():
        os.environ.setdefault("DS_ACCELERATOR", "cpu")

    from vlmslice.training.guards import GuardConfig
    from vlmslice.training.run import run_stage  # DeepSpeed reads the environment when it is imported
    from vlmslice.training.stage import Stage, TrainingError, share_batch

__all__ = ["GuardConfig", "Stage", "TrainingError", "run_stage", "share_batch"]
