"""Packages that only some sources and formats need."""


def missing_package(package: str, purpose: str) -> ValueError:
    """What to raise where a package of the extra `data` is not installed."""
    return ValueError(f"{purpose} needs the package {package}: pip install 'mup_jax[data]'")
