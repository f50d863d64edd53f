"""Parts of `publish.py`: the files of a published folder, its model card, other formats, and the push to the Hub."""
