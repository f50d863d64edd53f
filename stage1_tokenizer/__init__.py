"""Stage one: a learned image tokenizer (VQ-VAE / VQGAN), and the code that all three packages share.

Letters in the shape comments of the whole project:

    B    images of a batch           D    channels of the latent
    b    images of a micro-batch     h w  height and width of the latent grid
    C    channels of an image        K    codes per grid position (1, or the depth of a residual quantizer)
    H W  height and width of images  L    sequence length, h * w * K
    V    codebook size               d    dimension of codebook vectors
    N    number of things in a set   ()   a scalar

Reading order: train.py (the training loop), tokenizer.py (the model), objective.py (the losses), bottlenecks/ (vector
quantization and its alternatives), networks/ (encoders and decoders), discriminator.py, perceptual.py (LPIPS),
metrics.py, validation.py. Everything that any training program has is in engine/, config/ and data/; what examines
results is in diagnostics/, analyze.py and compare.py.
"""
