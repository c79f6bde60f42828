"""Image tokens from captions, one after another (section 2.6), each image from its own seed.

An image depends on model, caption, seed, sampling settings and batch width, and on nothing else of
a request: not on how many images it asks for, in which order, or which. Arithmetic may round
differently in batches of different widths and in different rows of one, so every batch is
``width`` wide, padded where needed, and an image always sits in row ``seed % width``.

Letters: B images, T text positions, I image positions, G given image tokens, Y X code grid.
"""

from collections.abc import Callable, Iterator, Sequence

import torch
from torch import Tensor

from kernels.attention.decode import Place
from pipeline.config import DalleConfig, require
from pipeline.console import InputError
from pipeline.generation.decoding import Decoder, caches_of
from pipeline.generation.draw import Settings, noise
from pipeline.generation.jacobi import JacobiDecoder
from pipeline.models.dalle import NO_TOKEN, Dalle, Dense, Head
from pipeline.models.dvae import DiscreteVAE

WIDTH = 16  # images that are decoded side by side, unless the caller says otherwise
MOST_FITTED = 256  # what ``fitting_width`` goes up to: 25 images/s of the 12B model, kernels' bench
MAX_WIDTH = 4096
# of the memory that is free: the rest is for what a step holds and for the decoder of the pictures
SHARE = 0.8

# called with the indices of the images of a batch, how many rows of the code grid they have, and
# their codes int64 [images, rows, X] on the CPU
OnRow = Callable[[list[int], int, Tensor], None]


class Sampler:
    """A model made ready to draw any number of images with the same settings.

    Args:
        model: any compute dtype, see ``prepare``.
        settings: how tokens are drawn.
        width: images decoded side by side; part of what decides an image's last bits.
        jacobi: several tokens of an image at a time (``JacobiDecoder``), for a width of 1: wider,
            an image would depend on its neighbours, for rows wait for each other.

    Raises:
        InputError: a setting out of its bounds.
    """

    def __init__(
        self,
        model: Dalle,
        settings: Settings | None = None,
        width: int = WIDTH,
        *,
        jacobi: bool = False,
    ) -> None:
        self.model, self.settings, self.width = model, settings or Settings(), width
        self.jacobi = jacobi
        self.settings.check(model.config)
        require(
            not jacobi or width == 1,
            f"width is {width}; Jacobi decoding draws one image at a time, take 1",
        )
        require(
            1 <= width <= MAX_WIDTH,
            f"width is {width}; take 1 to {MAX_WIDTH}, and more images come in waves",
        )
        self._decoder: Decoder | JacobiDecoder | None = None

    @torch.inference_mode()
    def draw(
        self,
        text_BT: Tensor,
        seeds: Sequence[int],
        given_BG: Tensor | None = None,
        *,
        on_row: OnRow | None = None,
        advance: Callable[[int], None] | None = None,
    ) -> Tensor:
        """One image's codes for every caption and seed.

        Args:
            text_BT: a caption a row, int64 in [0, n_text_vocab), ``NO_TOKEN`` after its end.
            seeds: one an image, 0 or more.
            given_BG: the first image tokens of each, in raster order, which are kept as they are.
            on_row: hears of every row of the code grid that is complete.
            advance: called with the number of image tokens that were made.

        Returns:
            codes_BI int64 on the CPU, image tokens in raster order.

        Raises:
            InputError: a seed, caption, token or shape outside these bounds, weights that give no
                number, or caches that do not fit into memory.
        """
        config = self.model.config
        if given_BG is None:
            given_BG = torch.empty(len(seeds), 0, dtype=torch.int64)
        _check_request(config, text_BT, seeds, given_BG)
        codes_BI = torch.empty(len(seeds), config.n_image, dtype=torch.int64)
        for wave in waves(seeds, self.width):
            rows = _rows(wave)
            places = {row: i for row, i in enumerate(wave) if i is not None}
            text_WT = text_BT[rows]
            noise_WI = torch.stack([noise(seeds[i], config.n_image) for i in rows])
            n_captions = len({tuple(row) for row in text_WT.tolist()})
            after = self._hearing(places, on_row, advance)
            # no name for the decoder, which would hold its memory while another one is made
            made_WI = self._ready(n_captions).decode(text_WT, noise_WI, given_BG[rows], after).cpu()
            codes_BI[list(places.values())] = made_WI[list(places)]
        return codes_BI

    def _hearing(
        self, places: dict[int, int], on_row: OnRow | None, advance: Callable[[int], None] | None
    ) -> Callable[[int, Tensor], None]:
        """What a batch calls after each token; ``places`` are its rows and the images in them."""
        grid = self.model.config.grid

        def after(n: int, codes_WI: Tensor) -> None:
            if advance is not None:
                advance(len(places))
            if on_row is not None and n % grid == 0:
                done = codes_WI[list(places), :n].cpu().unflatten(1, (-1, grid))
                on_row(list(places.values()), n // grid, done)

        return after

    def _ready(self, n_captions: int) -> Decoder | JacobiDecoder:
        """A decoder with room for so many captions: a power of two, lest each wave makes one."""
        if self._decoder is None or self._decoder.n_captions < n_captions:
            room = min(1 << (n_captions - 1).bit_length(), self.width)
            guidance = None if self.settings.guidance == 1 else self.settings.guidance
            if self.jacobi:
                self._decoder = JacobiDecoder(self.model, guidance, self.settings.draw)
                return self._decoder
            self._decoder = None  # its memory first
            try:
                self._decoder = Decoder(self.model, self.width, room, guidance, self.settings.draw)
            except torch.OutOfMemoryError as error:
                wanted = cache_bytes(self.model, self.width, room, self.settings) / 2**30
                raise InputError(
                    f"{self.width} images side by side keep {wanted:.1f} GiB of keys and values, "
                    "which do not fit beside the model: take a smaller width"
                ) from error
        return self._decoder


def generate(
    model: Dalle,
    text_BT: Tensor,
    seeds: Sequence[int],
    *,
    settings: Settings | None = None,
    width: int = WIDTH,
) -> Tensor:
    """``Sampler.draw`` of one request."""
    return Sampler(model, settings, width).draw(text_BT, seeds)


@torch.inference_mode()
def pictures(
    dvae: DiscreteVAE, codes_BI: Tensor, seeds: Sequence[int], width: int = WIDTH
) -> Tensor:
    """The pictures of ``Sampler.draw``'s codes, float32 [B, 3, 8 Y, 8 X] in [0, 1] on the CPU.

    With the seeds and the width that made the codes a picture's bits depend on nothing else. Codes
    of the first rows alone, [B, rows * X], give the upper part. Rows are decoded ``WIDTH`` at a
    time: 256 pictures of the paper's dVAE at once would take 90 GB.
    """
    grid = dvae.config.grid
    device = next(dvae.parameters()).device
    images: list[Tensor] = [torch.empty(0)] * len(seeds)
    for wave in waves(seeds, width):
        codes_BYX = codes_BI[_rows(wave)].view(width, -1, grid).to(device)
        made = torch.cat([dvae.decode(some_BYX).cpu() for some_BYX in codes_BYX.split(WIDTH)])
        for row, image in enumerate(wave):
            if image is not None:
                images[image] = made[row]
    return torch.stack(images)


def waves(seeds: Sequence[int], width: int) -> Iterator[list[int | None]]:
    """Batches of ``width`` rows: in each row an index into ``seeds`` or None.

    An index stands in row ``seed % width``: consecutive seeds fill a batch.
    """
    queues: list[list[int]] = [[] for _ in range(width)]
    for i, seed in enumerate(seeds):
        queues[seed % width].append(i)
    for k in range(max(map(len, queues))):
        yield [queue[k] if k < len(queue) else None for queue in queues]


def prepare(model: Dalle, dtype: torch.dtype) -> None:
    """Compute the matrices in ``dtype`` and keep them in it, so that no step casts a weight.

    They are laid out for products with few rows too: a step of one image reads them up to twice as
    fast. The model is then for sampling only: what the cast rounds away is gone.
    """
    model.set_compute_dtype(dtype)
    for module in model.modules():
        if isinstance(module, Dense):
            module.to(dtype)
        if isinstance(module, Dense | Head):
            module.weight.data = module.weight.data.t().contiguous().t()


def cache_bytes(model: Dalle, width: int, n_captions: int, settings: Settings) -> int:
    """Bytes of keys and values that a batch of so many images and captions keeps."""
    is_guided = settings.guidance != 1
    n_rows = width * (1 + is_guided)
    place = Place(n_rows, n_captions + is_guided, torch.device("meta"))
    dtype = next(m for m in model.modules() if isinstance(m, Dense)).compute_dtype
    return sum(cache.kept.nbytes for cache in caches_of(model.config, place, dtype))


def fitting_width(model: Dalle, settings: Settings, free: int) -> int:
    """The largest power of two that memory has room for, each image with a caption of its own.

    Args:
        model: as it will be sampled from.
        settings: likewise.
        free: bytes that can still be taken.
    """
    one = cache_bytes(model, 1, 1, settings)
    # logits, weights, their running sums and what makes them, a row
    one += 64 * model.config.n_image_vocab
    most = max(1, min(MOST_FITTED, int(SHARE * free / one)))
    return int(1 << (most.bit_length() - 1))


def _rows(wave: list[int | None]) -> list[int]:
    """The wave with its empty rows filled by an image that is in it anyway."""
    spare = next(i for i in wave if i is not None)
    return [spare if i is None else i for i in wave]


def _check_request(
    config: DalleConfig, text_BT: Tensor, seeds: Sequence[int], given_BG: Tensor
) -> None:
    require(len(seeds) >= 1, "no image was asked for; give at least one caption and seed")
    require(
        tuple(text_BT.shape) == (len(seeds), config.n_text),
        f"captions of shape {tuple(text_BT.shape)} for {len(seeds)} seeds; "
        f"the model takes [{len(seeds)}, {config.n_text}], one caption an image",
    )
    require(
        given_BG.ndim == 2 and len(given_BG) == len(seeds) and given_BG.shape[1] < config.n_image,
        f"given image tokens of shape {tuple(given_BG.shape)} for {len(seeds)} seeds; the model "
        f"takes [{len(seeds)}, 0 to {config.n_image - 1}], and draws what is left",
    )
    for what, tokens, least, n_vocab in (
        ("text", text_BT, NO_TOKEN, config.n_text_vocab),
        ("given image", given_BG, 0, config.n_image_vocab),
    ):
        if tokens.numel() == 0:
            continue
        low, high = int(tokens.min()), int(tokens.max())
        require(
            low >= least and high < n_vocab,
            f"{what} tokens from {low} to {high}; this model knows 0 to {n_vocab - 1}, "
            "take the tokenizer and the dVAE of its training",
        )
    for seed in (min(seeds), max(seeds)):
        require(0 <= seed < 2**63, f"seed {seed} is outside 0 to 2^63 - 1; take one inside")
