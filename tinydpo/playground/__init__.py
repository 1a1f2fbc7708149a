"""Policy and reference side by side in the browser: `side_by_side` asks them, `app` is the page."""
