"""A GPT over the positions of a latent grid: model, layer, CPU and GPU operations, key/value cache, generation."""
