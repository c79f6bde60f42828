"""One batch of pictures, decoded token by token with static shapes.

On a GPU the step is recorded as a CUDA graph and replayed: 64 layers of about ten kernels would
else be launched one by one, which takes longer than they run.

Letters: B rows of a batch (twice the pictures with guidance), W pictures, T text positions, I image
positions, V image vocabulary.
"""

from collections.abc import Callable

import torch
from torch import Tensor

from kernels.attention.decode import Place
from pipeline.config import DalleConfig
from pipeline.generation.cache import BoundedCache
from pipeline.generation.draw import guide, require_numbers
from pipeline.generation.step import block_step
from pipeline.models.dalle import NO_TOKEN, Block, Dalle, layer_patterns

WARM_UP = 3  # steps before a recording, which compile kernels and reserve memory


class Decoder:
    """Image tokens of ``width`` pictures side by side.

    Args:
        model: to sample from.
        width: W.
        n_captions: the most captions that a batch can have.
        guidance: how far logits are moved away from those of no caption (``Settings``); None for
            not at all.
        draw: tokens int64 [W, 1] from logits float32 [W, V] and noise float64 [W, 1]; nothing in
            it may wait for the device.
        record: whether to replay steps as CUDA graphs, where the Triton kernel runs.
    """

    def __init__(
        self,
        model: Dalle,
        width: int,
        n_captions: int,
        guidance: float | None,
        draw: Callable[[Tensor, Tensor], Tensor],
        *,
        record: bool = True,
    ) -> None:
        self.model, self.width, self.guidance, self.draw = model, width, guidance, draw
        self.n_captions = n_captions
        device = model.image_head.weight.device
        self.is_guided = guidance is not None
        # the empty caption is one more
        n_rows = 2 * width if self.is_guided else width
        self.place = Place(n_rows, n_captions + self.is_guided, device)
        block = model.blocks[0]
        assert isinstance(block, Block)
        dtype = block.attention.qkv.compute_dtype
        self.caches = caches_of(model.config, self.place, dtype)
        self.steps = [
            block_step(block, cache.kept.attend)
            for block, cache in zip(model.blocks, self.caches, strict=True)
            if isinstance(block, Block)
        ]
        n_image = model.config.n_image
        self.codes_WI = torch.empty(width, n_image, dtype=torch.int64, device=device)
        self.noise_WI = torch.empty(width, n_image, dtype=torch.float64, device=device)
        self.token_B1 = torch.empty(n_rows, 1, dtype=torch.int64, device=device)
        self.logits_WV = torch.empty(0)
        self._captions: list[tuple[int, ...]] = []
        # plain PyTorch looks up its keys by the step that Python knows, which a graph would freeze
        is_triton = all(cache.kept.is_triton for cache in self.caches)
        self.records = record and is_triton
        self._graphs: dict[bool, torch.cuda.CUDAGraph] = {}

    @property
    def nbytes(self) -> int:
        """Bytes of keys and values that are kept."""
        return sum(cache.kept.nbytes for cache in self.caches)

    def decode(
        self,
        text_WT: Tensor,
        noise_WI: Tensor,
        given_WI: Tensor,
        after: Callable[[int, Tensor], None],
    ) -> Tensor:
        """Image tokens of one batch.

        Args:
            text_WT: a caption a row, int64.
            noise_WI: what ``draw`` is given at each step.
            given_WI: the first tokens of each picture, int64 [W, 0 to I].
            after: called with a number of tokens and the codes, after each step.

        Returns:
            codes int64 [W, I], overwritten by the next call.

        Raises:
            InputError: the weights give no number.
        """
        self._begin(text_WT)
        n_given = given_WI.shape[1]
        self.codes_WI[:, :n_given] = given_WI
        self.noise_WI.copy_(noise_WI)
        for i in range(self.model.config.n_image):
            self.step(i < n_given)
            if i == n_given:
                require_numbers(self.logits_WV)
            after(i + 1, self.codes_WI)
        return self.codes_WI

    def _begin(self, text_WT: Tensor) -> None:
        """Read the captions that have not been read, and stand before the first image token."""
        rows = [tuple(row) for row in text_WT.tolist()]
        captions = list(dict.fromkeys(rows))
        if self.is_guided:
            captions.append((NO_TOKEN,) * text_WT.shape[1])
        # one at a time: rows of a larger product could be rounded differently
        for i, caption in enumerate(captions):
            if self._captions[i : i + 1] != [caption]:
                self._read(i, caption)
        self._captions = captions
        numbers = [captions.index(row) for row in rows]
        self.place.restart(numbers + [len(captions) - 1] * self.width * self.is_guided)
        self.token_B1.fill_(NO_TOKEN)

    def _read(self, i: int, caption: tuple[int, ...]) -> None:
        text_1T = torch.tensor([caption], device=self.token_B1.device)
        for cache in self.caches:
            cache.reading = i
        x_1TC = self.model.text_embedding(text_1T)
        for block, cache in zip(self.model.blocks, self.caches, strict=True):
            x_1TC = block(x_1TC, cache)
        for cache in self.caches:
            cache.reading = None

    def step(self, is_given: bool) -> None:
        """On by the image token at ``place``: one that ``codes_WI`` has, or one that is drawn."""
        if not self.records:
            self._compute(is_given)
            self.place.advance()
            return
        if is_given not in self._graphs:
            self._record(is_given)
        self._graphs[is_given].replay()
        self.place.i += 1

    def _record(self, is_given: bool) -> None:
        """Record a step; what the warm-up changes is put back.

        The keys and values of the step itself are not: its first replay writes them again.
        """
        held = (self.token_B1, self.codes_WI)
        before = [x.clone() for x in held]
        with torch.cuda.device(self.token_B1.device):
            stream = torch.cuda.Stream()
            stream.wait_stream(torch.cuda.current_stream())
            with torch.cuda.stream(stream):
                for _ in range(WARM_UP):
                    self._compute(is_given)
                    # each time: weights that give no numbers draw tokens that are none
                    for x, old in zip(held, before, strict=True):
                        x.copy_(old)
            torch.cuda.current_stream().wait_stream(stream)
            graph = torch.cuda.CUDAGraph()
            with torch.cuda.graph(graph):
                self._compute(is_given)
                self.place.i_1.add_(1)
        self._graphs[is_given] = graph

    def _compute(self, is_given: bool) -> None:
        """The token at ``place`` of every row, into ``codes_WI`` and ``token_B1``."""
        at_1 = self.place.i_1
        x_BC = self.model.image_embedding(self.token_B1, at_1)[:, 0]
        for step in self.steps:
            x_BC = step(x_BC)
        if is_given:
            token_W1 = self.codes_WI.index_select(1, at_1)
        else:
            logits_BV = self.model.image_head(self.model.norm(x_BC))
            self.logits_WV = guide(logits_BV, self.guidance)
            token_W1 = self.draw(self.logits_WV, self.noise_WI.index_select(1, at_1))
            self.codes_WI.index_copy_(1, at_1, token_W1)
        self.token_B1.copy_(torch.cat([token_W1] * 2) if self.is_guided else token_W1)


def caches_of(config: DalleConfig, place: Place, dtype: torch.dtype) -> list[BoundedCache]:
    """One a layer, for a model's batch at ``place``."""
    d_head = config.d_model // config.n_head
    return [
        BoundedCache(pattern, place, config.n_head, d_head, dtype)
        for pattern in layer_patterns(config)
    ]
