"""The packages that commands need besides torch and numpy, and the extras of this package that bring them."""

from __future__ import annotations

import importlib.util

# Name in an import statement -> name in pip's commands, and the extra that has it (None: none has).
PACKAGES: dict[str, tuple[str, str | None]] = {
    "PIL": ("pillow", "dcgan"),
    "matplotlib": ("matplotlib", "dcgan"),
    "rich": ("rich", "dcgan"),
    "safetensors": ("safetensors", "dcgan"),
    "scipy": ("scipy", "dcgan"),
    "mlxtend": ("mlxtend", "demo"),
    "sklearn": ("scikit-learn", "features"),
    "scikit-learn": ("scikit-learn", "features"),  # as importlib.metadata reports it
    "emoji": ("emoji", "emoji"),
    "webdataset": ("webdataset", "webdataset"),
    "tensorboard": ("tensorboard", None),
    "torch_fidelity": ("torch-fidelity", None),
}


def require(extra: str) -> None:
    """Raises ModuleNotFoundError for the first package of an extra that is not installed: a command says so before it
    has worked for hours."""
    for module, (_, home) in PACKAGES.items():
        if home == extra and importlib.util.find_spec(module) is None:
            raise ModuleNotFoundError(f"No module named {module!r}", name=module)


def what_to_install(error: BaseException, command: str) -> str | None:
    """One line for an import that failed because a package of the list above is not installed, else None."""
    if not isinstance(error, ModuleNotFoundError) or error.name is None:
        return None
    found = PACKAGES.get(error.name.partition(".")[0])
    if found is None:
        return None
    package, extra = found
    install = package if extra is None else f'"fastdcgan[{extra}]"'
    return f"fastdcgan {command} needs the package {package}: pip install {install}"
