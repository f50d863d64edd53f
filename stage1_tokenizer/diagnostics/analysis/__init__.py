"""Pictures that explain a trained tokenizer, one file each; `stage1_tokenizer/analyze.py` draws them all."""
