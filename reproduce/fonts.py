"""Fonts that PyPI packages ship, and which of them only validation and test may see.

A model that reads the fonts it was trained on has learnt shapes; one that reads others has learnt letters.
"""

from __future__ import annotations

import importlib.util
from functools import lru_cache
from pathlib import Path
from typing import Any

__all__ = ["FONTS", "MONO", "TEST", "TRAIN", "VALIDATION", "load_font"]

_FOLDERS = {
    "matplotlib": "mpl-data/fonts/ttf",
    "font_caladea": "files",
    "font_hanken_grotesk": "files",
    "font_lato": "files",
    "font_manrope": "files",
    "font_rhd": "files",
    "font_source_sans_pro": "files",
    "font_source_serif_pro": "files",
}

# name: package, file, factor that brings digits to the width of DejaVu Sans Mono's at the same nominal size
FONTS: dict[str, tuple[str, str, float]] = {
    "dejavu-mono": ("matplotlib", "DejaVuSansMono.ttf", 1.0),
    "dejavu-mono-bold": ("matplotlib", "DejaVuSansMono-Bold.ttf", 1.0),
    "dejavu-sans": ("matplotlib", "DejaVuSans.ttf", 0.95),
    "dejavu-serif": ("matplotlib", "DejaVuSerif.ttf", 0.95),
    "stix": ("matplotlib", "STIXGeneral.ttf", 1.15),
    "computer-modern-mono": ("matplotlib", "cmtt10.ttf", 1.15),
    "lato": ("font_lato", "Lato-Regular.ttf", 1.05),
    "manrope": ("font_manrope", "Manrope-Medium.ttf", 1.0),
    "source-sans": ("font_source_sans_pro", "SourceSansPro-Regular.ttf", 1.2),
    "source-serif": ("font_source_serif_pro", "SourceSerifPro-Regular.ttf", 1.15),
    "red-hat": ("font_rhd", "RedHatDisplay-Medium.ttf", 1.0),
    "caladea": ("font_caladea", "Caladea-Regular.ttf", 1.1),
    "lato-bold": ("font_lato", "Lato-Bold.ttf", 1.05),
    "source-sans-semibold": ("font_source_sans_pro", "SourceSansPro-Semibold.ttf", 1.2),
    "hanken": ("font_hanken_grotesk", "HankenGrotesk-Medium.otf", 1.0),
}
VALIDATION = ("source-sans-semibold", "hanken")
TEST = ("caladea", "dejavu-mono-bold")
TRAIN = tuple(name for name in FONTS if name not in (*VALIDATION, *TEST))
MONO = ("dejavu-mono", "computer-modern-mono", "dejavu-mono-bold")


@lru_cache(maxsize=512)
def load_font(name: str, size: int) -> Any:
    """A Pillow font whose digits are about as wide as those of DejaVu Sans Mono at ``size`` pixels.

    Raises:
        ModuleNotFoundError: the package that ships it is not installed.
    """
    from PIL import ImageFont

    package, file, factor = FONTS[name]
    found = importlib.util.find_spec(package)
    if found is None or found.origin is None:
        pip = package.replace("_", "-")
        raise ModuleNotFoundError(f"the font {name} comes with the package {pip}: pip install 'vico_ext[reproduce]'")
    path = Path(found.origin).parent / _FOLDERS[package] / file
    return ImageFont.truetype(str(path), round(size * factor))
