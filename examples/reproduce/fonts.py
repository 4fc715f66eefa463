"""Fonts that PyPI packages ship, and which of them only validation and test may see.

A model that reads the fonts it was trained on has learnt shapes; one that reads others has learnt letters.
"""

from __future__ import annotations

import importlib.util
from collections.abc import Iterable
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
    "font_roboto": "files",
    "font_source_sans_pro": "files",
    "font_source_serif_pro": "files",
}

# family: package, and per face its file; the factor brings digits to the width of DejaVu Sans Mono's at the same size
_FAMILIES: dict[str, tuple[str, float, tuple[str, ...]]] = {
    "dejavu-mono": ("matplotlib", 1.0, ("DejaVuSansMono.ttf", "DejaVuSansMono-Bold.ttf")),
    "dejavu-sans": ("matplotlib", 0.95, ("DejaVuSans.ttf", "DejaVuSans-Bold.ttf")),
    "dejavu-serif": ("matplotlib", 0.95, ("DejaVuSerif.ttf", "DejaVuSerif-Bold.ttf")),
    "stix": ("matplotlib", 1.15, ("STIXGeneral.ttf", "STIXGeneralBol.ttf")),
    "computer-modern": ("matplotlib", 1.15, ("cmtt10.ttf", "cmr10.ttf", "cmss10.ttf", "cmb10.ttf")),
    "roboto": ("font_roboto", 1.0, ("Roboto-Regular.ttf", "Roboto-Medium.ttf", "Roboto-Bold.ttf")),
    "lato": ("font_lato", 1.05, ("Lato-Regular.ttf", "Lato-Bold.ttf")),
    "source-sans": ("font_source_sans_pro", 1.2, (
        "SourceSansPro-Regular.ttf", "SourceSansPro-Semibold.ttf", "SourceSansPro-Bold.ttf",
    )),
    "source-serif": ("font_source_serif_pro", 1.15, (
        "SourceSerifPro-Regular.ttf", "SourceSerifPro-Semibold.ttf", "SourceSerifPro-Bold.ttf",
    )),
    "red-hat": ("font_rhd", 1.0, ("RedHatDisplay-Regular.ttf", "RedHatDisplay-Medium.ttf", "RedHatDisplay-Bold.ttf")),
    "hanken": ("font_hanken_grotesk", 1.0, ("HankenGrotesk-Regular.otf", "HankenGrotesk-SemiBold.otf")),
    "caladea": ("font_caladea", 1.1, ("Caladea-Regular.ttf", "Caladea-Bold.ttf")),
    "manrope": ("font_manrope", 1.0, ("Manrope-Regular.ttf", "Manrope-Bold.ttf")),
}  # fmt: skip
# Whole families are held out: a bold face is no news to a model that knows the regular one.
_VALIDATION, _TEST = ("hanken",), ("caladea", "manrope")
# name: package, file, factor
FONTS: dict[str, tuple[str, str, float]] = {
    file.rpartition(".")[0]: (package, file, factor) for package, factor, files in _FAMILIES.values() for file in files
}


def _faces(families: Iterable[str]) -> tuple[str, ...]:
    return tuple(file.rpartition(".")[0] for family in families for file in _FAMILIES[family][2])


VALIDATION, TEST = _faces(_VALIDATION), _faces(_TEST)
TRAIN = _faces(family for family in _FAMILIES if family not in (*_VALIDATION, *_TEST))
MONO = (*_faces(["dejavu-mono"]), "cmtt10")


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
