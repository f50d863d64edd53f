"""The run report: one self-contained HTML page about a run, which works without a server and without a network.

run_folder.py reads a run's folder. markup.py, charts.py, embedded_images.py, page.py, page.css and page.js build the
page. run_sections.py has the sections that every run has, ../views those about a tokenizer; tokenizer.py joins them.
"""
