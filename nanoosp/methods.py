"""Names of what is compared: which parts of OSP a run has, from its options."""

OPTIMIZERS = {"adam": "Adam", "muon": "Muon", "muon-only": "Muon-only"}
PLAIN = {"optimizer": "adam", "norm": "rms", "embproj": False}
OSP = {"optimizer": "muon", "norm": "ss", "embproj": True}  # what --osp stands for


def label(options: dict) -> str:
    """The name of a configuration: "Adam", "Muon + SSNorm", "OSP"; "LLaMA" for a model from elsewhere."""
    if "imported" in options:
        return "LLaMA"
    parts = [OPTIMIZERS[options["optimizer"]]]
    parts += ["SSNorm"] * (options["norm"] == "ss") + ["EmbProj"] * bool(options["embproj"])
    return "OSP" if parts == ["Muon", "SSNorm", "EmbProj"] else " + ".join(parts)


def slug(options: dict) -> str:
    """The same for a directory's name: "adam", "muon-ssnorm", "osp"."""
    return label(options).lower().replace(" + ", "-")
