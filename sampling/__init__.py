"""Sampling: pictures from a trained prior. The letters in shapes are those of `stage1_tokenizer`."""
