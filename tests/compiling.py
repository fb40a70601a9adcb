"""How the tests have XLA compile: soon, rather than well: most of their time goes there."""

from importlib.metadata import version


def xla_flags(devices: int) -> str:
    """`XLA_FLAGS` for a process with so many CPU devices."""
    words = [f"--xla_force_host_platform_device_count={devices}"]
    # Half of the time that is left without optimisations is spent on emitting fused loops by way
    # of MLIR. XLA ends a process that sets a flag it does not know, as newer ones do not this.
    if version("jaxlib").startswith("0.10."):
        words.append("--xla_cpu_use_fusion_emitters=false")
    return " ".join(words)
