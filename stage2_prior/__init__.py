"""Stage two: a prior over the codes of a frozen tokenizer. Letters in shapes are those of `stage1_tokenizer`.

Reading order: train.py (the training loop), base.py (the interface of a prior), gpt/model.py and pixelcnn/model.py (the
two kinds), output_head.py, generation.py (the sampling loop), guidance.py, windows.py, likelihood.py, tokens.py (codes
on disk), prior.py (loading). score.py and plan.py are commands.
"""
