"""Where pairs come from: folders, WebDataset archives, Parquet tables, COCO captions, TSV lists."""

from data_prep.sources.files import all_rows, survey
from data_prep.sources.rows import CAPTION_LIMIT, IMAGE_LIMIT, Piece, RawPair, Source

__all__ = ["CAPTION_LIMIT", "IMAGE_LIMIT", "Piece", "RawPair", "Source", "all_rows", "survey"]
