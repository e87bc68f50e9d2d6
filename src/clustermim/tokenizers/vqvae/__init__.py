"""A learned vocabulary: an autoencoder whose bottleneck is a code for each patch (VQ-VAE, dVAE)."""
