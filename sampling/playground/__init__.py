"""Behind `app.py`: `tasks.py` makes the pictures, `page.py` shows them, `server.py` lets the page be reached."""
