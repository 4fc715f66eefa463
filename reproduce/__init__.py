"""The reproduction: a small InternVL learns to read rendered pages, then ViCO's recipe is run on it."""
