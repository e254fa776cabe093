"""The domains of recordings. Loader processes import them without the settings, and so without pydantic."""

DOMAINS = ("speech", "audio")
