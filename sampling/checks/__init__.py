"""Checks of files on disk: is each one undamaged, does it fit the files beside it, and can this version read it?

Each function checks one kind of thing and yields a `Finding` for each part of it. Nothing is written and nothing is
unpickled. The content of a file is read by the same code that the commands read it with.
"""
