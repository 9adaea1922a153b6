"""Numbers of the VAE that its plan needs, too. Knows no torch."""

SCORES_AT_ONCE = 2**27  # of the mid block's attention
# Of the published VAE, where a config does not say.
VAE_CHANNELS = (128, 256, 512, 1024, 1024)
VAE_LAYERS = 2
