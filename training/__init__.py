"""Training of models with DPQ tables: `torchrun -m training RECIPE`, see README.md beside this file.

`command_line` -> a `config` of one of the `recipes` -> `trainer`, the loop over epochs and steps. What differs between
recipes is a `task`, in `models`; `data` makes batches, `distributed` shards, `evaluation` measures the artifact.
"""
