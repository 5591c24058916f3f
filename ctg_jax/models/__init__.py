"""Language models, encoders and diffusion models; the only place with `flax.linen`."""
