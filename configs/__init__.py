"""configs: what a run is.

Here: frozen, typed configuration (pydantic), its YAML presets, the error every user-facing refusal uses.
Not here: torch, ranks, files other than YAML, any question to the machine.
Everyone may import this room; it imports no other.
"""
