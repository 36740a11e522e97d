"""One training run: flags, checks, latents, folder, guards. May import evaluation and below."""
