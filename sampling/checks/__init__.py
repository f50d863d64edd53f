"""Looking at what is on disk without touching it: is it whole, does it fit what lies beside it, will it be read?

Each function here looks at one kind of thing and yields a `Finding` for each part of it. Nothing is written, nothing is
unpickled. What a file holds is read by the code that its commands read it with.
"""
