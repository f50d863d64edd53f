"""The run report: one self-contained HTML page about a run, which needs no server and asks the network for nothing.

run_folder.py reads a run; page.py, markup.py, charts.py, pictures.py, page.css and page.js are the page's machinery;
tokenizer.py says which sections the page of a tokenizer has, and the other files are one of these sections each.
"""
