"""The shard sets of a run: which are read, how they are mixed, and in what order."""

from collections.abc import Sequence
from typing import Any

from pipeline.data.commit import BATCH_BYTES, BATCH_ROWS
from pipeline.data.order import WINDOW
from pipeline.data.shards import ShardReader, Side
from pipeline.data.stream import cycle_of

Sets = Sequence[tuple[ShardReader, Side]]

# of the training commands
MIX_HELP = "weight of each set, whole numbers; without: the sets are read as if they were one"
BLOCK_HELP = "keep to blocks of neighbouring rows, for network disks; holds 0.6 GB of tokens a rank"

# a window of blocks touches two record batches a block, for its seams are not theirs; and the next
# window begins before this one has ended
HELD_BATCHES = 2 * (WINDOW + 2)


class Data:
    """The sets that a run reads, and how they are mixed and ordered.

    Args:
        kind: "pairs" or "tokens".
        folders: one set or several.
        mix: weight of each, see ``Stream``; as if they were joined when None.
        block_order: keep to blocks of neighbouring rows, and keep their record batches in memory.

    Attributes:
        readers: of the sets.
        train: what is trained on: readers and sides, for a loader.
        val: what is held out.
        order: what ``Stream`` takes of it for training: weights and block.
        val_weights: and for validation, which may see no more than its beginning: those of the
            mix, or about the shares that the sets have in training.

    Raises:
        InputError: a set cannot be read or has nothing on a side, or mix does not fit.
    """

    def __init__(
        self,
        kind: str,
        folders: str | Sequence[str],
        mix: Sequence[int] | None = None,
        block_order: bool = False,
    ) -> None:
        folders = [folders] if isinstance(folders, str) else folders
        held = HELD_BATCHES if block_order else 0
        self.readers = [ShardReader(folder, kind, held_batches=held) for folder in folders]
        if mix is not None:
            cycle_of(mix, len(self.readers))
        self.train: Sets = [(reader, reader.split("train")) for reader in self.readers]
        self.val: Sets = [(reader, reader.split("val")) for reader in self.readers]
        self.order: dict[str, Any] = {"weights": mix, "block": self._block() if block_order else 0}
        total = sum(len(side) for _, side in self.train)
        shares = [max(1, round(64 * len(side) / total)) for _, side in self.train]
        self.val_weights = shares if mix is None else mix

    def _block(self) -> int:
        """Rows of about one record batch, of the set with the largest rows."""
        rows = [sum(s["bytes"] for s in r.manifest["shards"]) / len(r) for r in self.readers]
        return max(1, min(BATCH_ROWS, int(BATCH_BYTES / max(rows))))

    def identity(self) -> dict[str, Any]:
        """What a position in the stream hangs on, besides seed and split."""
        prints = [reader.fingerprint for reader in self.readers]
        return {self.readers[0].kind: prints, **self.order}
