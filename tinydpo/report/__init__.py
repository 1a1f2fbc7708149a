"""Everything measured, as one HTML page that loads nothing.

In: a recipe's run folder. Out: `report.html`. First to open: `page` (what stands on it), `templates/` (how it looks),
then `figures` and `material` (what is read).
Change this and you change how results look, and none of them.
"""
