"""Everything measured, as one HTML page that loads nothing.

In: a recipe's run folder. Out: `report.html`. Start with `page` (what is read and shown), then `templates/page.html`,
`figures` and `tokens`.
"""
