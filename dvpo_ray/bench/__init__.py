"""Measurements of this system against the bare libraries it stands on, side by side in one run."""
