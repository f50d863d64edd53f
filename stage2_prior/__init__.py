"""Stage two: a prior over the codes of a frozen tokenizer. The letters in shapes are those of `stage1_tokenizer`.

Reading order: train.py (the loop), base.py (what a prior is), gpt/, pixelcnn/, generation.py, tokens.py.
"""
