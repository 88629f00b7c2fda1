"""Quantisation schemes: a grid for weights, one for activations, and which checkpoint formats can say so."""

from dataclasses import dataclass, replace

from moe.quant.grids import Fp8Grid, Grid, IntGrid, Mxfp4Grid

COMPRESSED_TENSORS, GGUF, SIMULATED = "compressed-tensors", "gguf", "simulated"


@dataclass(frozen=True, kw_only=True)
class Scheme:
    """What is stored and what multiplies.

    Attributes:
        name: as servers call it, w<bits of weights>a<bits of activations>.
        weights: their grid.
        activations: grid of every quantised matrix's input, one group per token, found when it runs; ``None``: not quantised.
        containers: ways to store it; the first is the default.
        group_sizes: that ``--group-size`` may ask for; 0 is a scale per row.
    """

    name: str
    weights: Grid
    activations: Grid | None = None
    containers: tuple[str, ...] = (COMPRESSED_TENSORS,)
    group_sizes: tuple[int, ...] = ()

    @property
    def rounds_router(self) -> bool:
        """Whether routers are rounded too, to 8 bits (`moe.quant.router`): where no server keeps them as they are."""
        return self.containers == (SIMULATED,)

    def rotated(self) -> "Scheme":
        """The scheme with rotated grids.

        Raises:
            ValueError: servers, which do not rotate, are to run it.
        """
        if self.containers != (SIMULATED,):
            simulated = ", ".join(name for name, scheme in SCHEMES.items() if scheme.containers == (SIMULATED,))
            raise ValueError(
                f"--rotate needs rotated inputs as well, and no server of --scheme {self.name} makes them; use it with {simulated}"
            )
        assert self.activations is not None, "simulated schemes round activations"
        return replace(
            self, weights=replace(self.weights, rotated=True), activations=replace(self.activations, rotated=True)
        )

    def with_group_size(self, group_size: int) -> "Scheme":
        """The scheme with other groups of weights; 0 is a scale per row.

        Raises:
            ValueError: it has no such groups.
        """
        if group_size not in self.group_sizes:
            offered = ", ".join(map(str, self.group_sizes)) or "none: its groups are fixed"
            raise ValueError(f"--group-size {group_size} is not offered for --scheme {self.name}; offered: {offered}")
        return replace(self, weights=replace(self.weights, group_size=group_size or None))


_GROUPS = (0, 32, 64, 128)
_TOKEN8 = IntGrid(bits=8)
_TOKEN4 = IntGrid(bits=4, symmetric=False)

# No server has an MoE kernel with 4-bit activations, so the last two are simulated here (docs/quantization.md).
SCHEMES: dict[str, Scheme] = {
    scheme.name: scheme
    for scheme in (
        Scheme(
            name="w8a16",
            weights=IntGrid(bits=8),
            containers=(COMPRESSED_TENSORS, GGUF, SIMULATED),
            group_sizes=_GROUPS,
        ),
        Scheme(
            name="w4a16",
            weights=IntGrid(bits=4, group_size=128),
            containers=(COMPRESSED_TENSORS, GGUF, SIMULATED),
            group_sizes=_GROUPS,
        ),
        Scheme(
            name="w3a16",
            weights=IntGrid(bits=3, group_size=128),
            containers=(COMPRESSED_TENSORS, SIMULATED),
            group_sizes=_GROUPS,
        ),
        Scheme(
            name="w8a8",
            weights=IntGrid(bits=8),
            activations=_TOKEN8,
            containers=(COMPRESSED_TENSORS, SIMULATED),
        ),
        Scheme(
            name="w4a8",
            weights=IntGrid(bits=4, group_size=128),
            activations=_TOKEN8,
            containers=(COMPRESSED_TENSORS, SIMULATED),
            group_sizes=_GROUPS,
        ),
        Scheme(
            name="w4a4",
            weights=IntGrid(bits=4, symmetric=False),
            activations=_TOKEN4,
            containers=(SIMULATED,),
            group_sizes=_GROUPS,
        ),
        Scheme(
            name="w3a4",
            weights=IntGrid(bits=3, symmetric=False),
            activations=_TOKEN4,
            containers=(SIMULATED,),
            group_sizes=_GROUPS,
        ),
        Scheme(name="fp8", weights=Fp8Grid(), activations=Fp8Grid(), containers=(COMPRESSED_TENSORS, SIMULATED)),
        Scheme(name="mxfp4", weights=Mxfp4Grid(), containers=(COMPRESSED_TENSORS, SIMULATED)),
    )
}
