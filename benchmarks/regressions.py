"""What has become worse of a compiled kernel, for the tests that hold it to a committed table."""

from __future__ import annotations

# How much worse than the committed table a kernel may become: at most so many more, or so much of it, if that is more.
MARGINS = {"registers": (16, 0.1), "shared_memory": (1024, 0.05), "instructions": (100, 0.2)}


def worse(compiled: object, before: object) -> list[str]:
    """In what the row `compiled` is worse than `before`, by more than `MARGINS`; rows may lack some of these."""
    found = []
    for name, (absolute, relative) in MARGINS.items():
        if hasattr(compiled, name):
            old, new = getattr(before, name), getattr(compiled, name)
            if new > old + max(absolute, relative * old):
                found.append(f"{name} {old} -> {new}")
    return found
