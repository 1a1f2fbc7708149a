"""Everything measured in a run folder as one HTML page, `report.html`. Start with `page`."""
