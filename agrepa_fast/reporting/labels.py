"""Names, units and colours of measures and domains in pictures."""

COLOURS = {"speech": "#1f77b4", "audio": "#ff7f0e"}
NAMES = {"foga": "FoG-A", "foga-vjp": "FoG-A by vjp", "gradnorm": "gradient norm"}
NAMES |= {"lasp": "LASP", "ridge": "ridge", "cka": "CKA"}
UNITS = {"foga": "relative velocity change", "foga-vjp": "relative velocity change", "gradnorm": "gradient norm"}
UNITS |= {"lasp": "cosine", "ridge": "cosine", "cka": "CKA"}
STORAGE_MARKERS = {  # Okabe and Ito's colours, other than those of the domains
    "lasp": {"color": "#000000", "marker": "o", "mfc": "none"},
    "ridge": {"color": "#009E73", "marker": "s", "mfc": "none"},
    "cka": {"color": "#CC79A7", "marker": "^", "mfc": "none"},
}


def name_with_recipe(measure: str, recipe: str) -> str:
    """Return a measure's name, and its recipe if that is not the default."""
    return NAMES[measure] if recipe == "corrected" else f"{NAMES[measure]} ({recipe} recipe)"


def count_clips(clips: str | int) -> str:
    """Return "1 clip" or "<n> clips"."""
    return f"{clips} clip" if int(clips) == 1 else f"{clips} clips"
