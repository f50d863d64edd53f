"""A GPT over the positions of a latent grid: the model, its layer, and its generation with a cache."""
