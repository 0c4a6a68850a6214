"""What `ftk demo` draws: colourful pictures, and a small world of captioned scenes with a checker that reads them back."""

from ftk.demo.pictures import draw_pictures

__all__ = ["draw_pictures"]
