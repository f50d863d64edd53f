"""The page of `app.py`: `tasks.py` makes images, `page.py` shows them, `guard.py` and `server.py` serve the page."""
