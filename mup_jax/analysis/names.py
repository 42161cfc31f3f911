"""What a ladder's parts are called."""


def series_name(optimizer: str, parametrization: str) -> str:
    """One optimizer in one parametrization: "muon" in µP, "muon, sp" otherwise."""
    return optimizer if parametrization == "mup" else f"{optimizer}, {parametrization}"
