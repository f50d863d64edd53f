"""Stage one: a learned image tokenizer (VQ-VAE / VQGAN), and what all three stages share.

The letters in every shape comment of the project:

    B  batch                      D    channels of the latent
    C  image channels             h w  height and width of the latent grid
    H W  image height and width   K    codes per grid position (1, or the depth of a residual quantizer)
    V  codebook size              L    sequence length, h * w * K
    N  number of images or vectors in a set

Reading order: train.py (the loop), tokenizer.py (what is trained), objective.py (what is minimised), bottlenecks/,
networks/. The machinery is in engine/, config/ and diagnostics/.
"""
