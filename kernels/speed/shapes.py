"""The shapes at which kernels are compiled, tuned and timed: those of the presets."""

from dataclasses import dataclass

from kernels.patterns import Kind, Pattern


@dataclass(frozen=True)
class Shape:
    """A layer of a preset, as attention sees it.

    Args:
        n_text: text tokens in front of the image.
        grid: side of the image grid.
        kernel: side of the convolution window.
        heads: of one sample.
        width: of a head.
    """

    n_text: int
    grid: int
    kernel: int
    heads: int
    width: int

    def pattern(self, kind: Kind) -> Pattern:
        """A pattern of this size."""
        return Pattern(kind, self.n_text, self.grid, self.kernel)


# of dalle_12b
LAYER = Shape(n_text=256, grid=32, kernel=11, heads=62, width=64)
# samples that a GPU takes at a time: the micro-batch of ds_configs/zero3_12b.json
BATCH = 8

# of dalle_demo and dalle_own
DEMO = Shape(n_text=32, grid=8, kernel=5, heads=4, width=32)
OWN = Shape(n_text=48, grid=8, kernel=5, heads=3, width=64)
