"""A Recipe says what quantize.py is to do with a model."""

from dataclasses import dataclass

from nanoosp.options import option

METHODS = ("rtn", "had", "gptq", "quarot", "spinquant")  # each does what those before it do
FORMATS = ("int", "mxfp4", "nvfp4")  # the last two are in nanoosp/formats.py


@dataclass(frozen=True)
class Recipe:
    """What quantize() is to do. Raises ValueError for what cannot be done."""

    bits: str = "4-4-4"  # W-A-KV, each 2 to 8 or 16
    method: str = "rtn"  # one of METHODS
    format: str = "int"  # of weights and activations: int, mxfp4 or nvfp4
    clip: bool = True  # search for the scale of weights; without, their largest value decides
    group: int = 0  # weights of a row that share a scale; 0: all of them
    symmetric: bool = False  # round activations from -max to max, not from min to max
    center_embed: bool = False  # quarot, spinquant: subtract embedding means, as the official code
    seed: int = 0  # of the random rotations
    steps: int = 100  # of SpinQuant
    lr: float = 1.5  # of SpinQuant
    portable: bool = False  # for other programs: without R4, and integers' scales in the weights' dtype

    def __post_init__(self):
        parts = str(self.bits).split("-")
        if len(parts) != 3 or not all(part in "2 3 4 5 6 7 8 16".split() for part in parts):
            raise ValueError(f"bits {self.bits!r} must be W-A-KV, each 2 to 8 or 16, like 4-4-4")
        if self.method not in METHODS:
            raise ValueError(f"unknown method {self.method!r}: use one of {', '.join(METHODS)}")
        if self.format not in FORMATS:
            raise ValueError(f"unknown format {self.format!r}: use one of {', '.join(FORMATS)}")
        if self.format != "int":
            if not {self.w, self.a} <= {4, 16}:
                raise ValueError(f"{self.format} is a format of 4 bits: in {self.bits}, W and A must "
                                 "be 4 or 16")
            if self.group or self.symmetric or not self.clip:
                raise ValueError(f"{self.format} has scales of its own: leave out --w-group, "
                                 "--symmetric and --no-clip")
        if self.center_embed and not self.does("quarot"):
            raise ValueError(f"only quarot and spinquant can center embeddings, not {self.method}")
        for name in ("group", "steps", "lr", "seed"):
            if not 0 <= getattr(self, name) < 2**63:
                raise ValueError(f"{name} must be at least 0, not {getattr(self, name)}")

    def __str__(self) -> str:
        """"gptq 4-4-4", "rtn 4-4-4 mxfp4"."""
        return f"{self.method} {self.bits} {self.format}".removesuffix(" int")

    @property
    def w(self) -> int:  # bits of weights
        return int(self.bits.split("-")[0])

    @property
    def a(self) -> int:  # of activations
        return int(self.bits.split("-")[1])

    @property
    def kv(self) -> int:  # of keys and values
        return int(self.bits.split("-")[2])

    def does(self, method: str) -> bool:  # a method includes those before it
        return METHODS.index(self.method) >= METHODS.index(method)

    @property
    def has_r4(self) -> bool:  # the Hadamard matrix on the FFN's hidden state
        return self.does("had") and not self.portable

    @property
    def learns(self) -> bool:  # SpinQuant needs something other than weights to be rounded
        return self.method == "spinquant" and min(self.a, self.kv) < 16

    @property
    def calibrates(self) -> bool:
        return self.learns or self.does("gptq") and self.w < 16


@dataclass
class RecipeOptions:
    """What of a Recipe the command lines of quantize.py and eval.py share."""

    format: str = option("int", "of weights and activations: integers, or the 4-bit formats of "
                         "hardware (default: int)", choices=FORMATS,
                         group="variations of quantizing")
    no_clip: bool = option(False, "scale weights by their largest value, without search: the "
                           "plain RTN")
    w_group: int = option(0, "N weights of a row share a scale (default: the whole row)", low=0,
                          metavar="N")
    symmetric: bool = option(False, "round activations on a grid symmetric about 0, not on min "
                             "to max")
    center_embed: bool = option(False, "quarot, spinquant: subtract embedding means, as the "
                                "official code")

    def recipe(self, bits: str, method: str, **others) -> Recipe:
        """Raises ValueError. Embeddings are centred only by methods that rotate them."""
        rotates = Recipe(bits, method).does("quarot")
        return Recipe(bits, method, self.format, clip=not self.no_clip, group=self.w_group,
                      symmetric=self.symmetric, center_embed=self.center_embed and rotates,
                      **others)
