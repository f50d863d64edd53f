"""The run report: one self-contained HTML page about a run, which needs no server and asks the network for nothing.

run_folder.py reads a run; markup.py, charts.py, pictures.py, page.py, page.css and page.js are the page's machinery;
run_sections.py has the sections of any run, ../views those on a tokenizer, and tokenizer.py puts its page together.
"""
