"""A gated PixelCNN over the positions of a latent grid: model, layer, generation."""
