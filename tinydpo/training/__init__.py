"""A run's folder: begun, sealed, stopped, resumed, finished, whatever the trainer.

In: checked arguments, then a trainer. Out: a folder that holds a finished run, or one from which the same command
goes on. First to open: `start` (what comes before a trainer), then `runs` (what comes with and after it).
Change this and you change what survives a kill, a full disk or a changed recipe (docs/reliability.md).
"""
