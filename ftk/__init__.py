"""ftk: fine-tune flow-matching and diffusion image models; training is a data pipeline of three stages that meet on disk."""

__version__ = "0.1.0"
