"""Training: pairs in packed rows through TRL's trainers, into a run's folder from which the same command resumes.

Start with `setup` (everything before the trainer) and `train` (everything with and after it). `packing`,
`packed_forward` and `trainers` compute the loss; `callbacks` and `checkpoints` make a run stop and resume safely.
"""
