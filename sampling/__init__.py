"""Sampling: images from a trained prior, their evaluation, and checks of files on disk.

The letters in shapes are those of `stage1_tokenizer`.
"""
