"""The measuring instruments of evaluation: features, distances between sets of pictures, intervals, nearest pictures.

N pictures, B of them in a batch, C H W their channels and pixels (uint8), D features of an extractor.
"""
