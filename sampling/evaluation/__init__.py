"""The measuring tools of evaluation: features, distances between sets of images, confidence intervals, nearest images.

Letters: N images, B images in a batch, C channels and H x W pixels of an image (uint8), D features of an extractor.
"""
