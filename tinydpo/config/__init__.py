"""What a recipe says, and what the machine makes of it.

In: a YAML recipe and flags. Out: checked arguments, and one line on what runs: processes, device, precision, batch.
First to open: `arguments` (the flags beyond TRL's), then `machine` (who decides on device, precision and batch),
`parsing`, and `refused` (flags that could have no effect).
Change this and you change what every script accepts, and how a mistake in a recipe is told.
"""
