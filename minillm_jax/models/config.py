"""The description of a decoder as data; no array and no model code is here."""

import dataclasses
from typing import Literal


@dataclasses.dataclass(frozen=True, kw_only=True)
class RopeScaling:
    """Rescaling of the rotary frequencies for contexts longer than those of pre-training.

    `linear` divides every frequency by `factor`; `llama3` divides those with a wavelength above
    `original_max_positions / low_freq_factor`, keeps those below
    `original_max_positions / high_freq_factor` and interpolates in between.
    """

    kind: Literal["linear", "llama3"]
    factor: float
    low_freq_factor: float = 1.0
    high_freq_factor: float = 4.0
    original_max_positions: int = 8192


@dataclasses.dataclass(frozen=True, kw_only=True)
class DecoderConfig:
    """One decoder of any of the supported families; hashable, so it can be a static argument.

    The defaults are the plain choice of each field, not those of a family: a family's table sets
    every field in which it differs.
    """

    vocab_size: int
    layers: int
    width: int
    heads: int
    mlp_width: int
    max_positions: int
    kv_heads: int = 0  # 0: as many as heads
    head_dim: int = 0  # 0: width // heads
    embed_width: int = 0  # 0: width; otherwise projections stand around the layers (OPT-350m)

    norm: Literal["rms", "layer"] = "rms"
    norm_eps: float = 1e-5
    norm_first: bool = True  # False: after the residual addition, and no final norm (OPT-350m)
    parallel_residual: bool = False  # attention and MLP read one shared norm and add up (GPT-J)

    activation: Literal["gelu", "gelu_new", "relu", "silu"] = "silu"
    gated: bool = False

    positions: Literal["rope", "learned"] = "rope"
    position_offset: int = 0  # learned rows before position 0 (OPT: 2)
    rope_theta: float = 10000.0
    rope_dim: int = 0  # 0: head_dim; smaller: only the first features turn (GPT-J)
    rope_interleaved: bool = False  # pairs (0, 1), (2, 3), ... instead of (i, i + rope_dim / 2)
    rope_scaling: RopeScaling | None = None

    attention_scale: float | None = None  # None: 1 / sqrt(head_dim)
    windows: tuple[int | None, ...] | None = None  # per layer: keys seen, itself included
    qk_norm: bool = False  # RMS norm of every query and key head before the rotation (Qwen3)

    qkv_bias: bool = False
    out_bias: bool = False
    mlp_bias: bool = False
    head_bias: bool = False
    tied_head: bool = True
    logit_scale: float = 1.0  # logits are logit_scale (h W^T + b): 1 / temperature
    dropout: float = 0.0  # of the output of both branches of every layer
    embed_dropout: float = 0.0  # of the input of the layers
    attention_dropout: float = 0.0  # of the attention weights

    # Not of the model: how a whole sequence is read. See `kernels.choose`.
    attention: Literal["auto", "xla", "cudnn", "splash"] = "auto"

    def __post_init__(self):
        """Fill in the derived widths and refuse a description that fits no decoder."""
        derived = (
            ("kv_heads", self.heads),
            ("head_dim", self.width // max(self.heads, 1)),
            ("embed_width", self.width),
        )
        for name, value in derived:
            object.__setattr__(self, name, getattr(self, name) or value)
        object.__setattr__(self, "rope_dim", self.rope_dim or self.head_dim)
        if self.windows is not None:
            # All None says the same as no windows: one spelling keeps one compiled program.
            windows = tuple(self.windows)
            if all(window is None for window in windows):
                windows = None
            object.__setattr__(self, "windows", windows)
        self._check()

    @property
    def axis_units(self) -> dict[str, int]:
        """Entries of a logical axis that stay on one device: the features of a head."""
        return {"heads": self.head_dim, "kv_heads": self.head_dim}

    @property
    def axis_sizes(self) -> dict[str, int]:
        """Entries of the logical axes that a mesh may leave whole (`axes.WHOLE_IF_UNEVEN`)."""
        return {"vocab": self.vocab_size, "kv_heads": self.kv_heads}

    def _check(self):
        sizes = ("vocab_size", "layers", "width", "heads", "mlp_width", "max_positions")
        for name in (*sizes, "kv_heads", "head_dim", "embed_width", "rope_dim"):
            if getattr(self, name) < 1:
                raise ValueError(f"{name} must be at least 1, not {getattr(self, name)}")
        if self.heads % self.kv_heads:
            raise ValueError(f"heads={self.heads} is not a multiple of kv_heads={self.kv_heads}")
        if self.positions == "rope" and (self.rope_dim % 2 or self.rope_dim > self.head_dim):
            raise ValueError(f"rope_dim={self.rope_dim} must be even and <= {self.head_dim}")
        if self.windows is not None and len(self.windows) != self.layers:
            raise ValueError(f"windows has {len(self.windows)} entries for {self.layers} layers")
        if any(window is not None and window < 1 for window in self.windows or ()):
            raise ValueError(f"windows must be None or at least 1, not {self.windows}")
        if self.parallel_residual and not self.norm_first:
            raise ValueError("parallel_residual needs norm_first")
        if not 0.0 < self.logit_scale < float("inf"):
            raise ValueError(f"logit_scale must be above 0, not {self.logit_scale}")
        for name in ("dropout", "embed_dropout", "attention_dropout"):
            if not 0.0 <= getattr(self, name) < 1.0:
                raise ValueError(f"{name} must be in [0, 1), not {getattr(self, name)}")
