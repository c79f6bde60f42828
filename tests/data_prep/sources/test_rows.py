import json
from dataclasses import asdict

from data_prep.sources import Piece


def test_a_piece_survives_json():
    piece = Piece("a.tar", files=(("a", (("jpg", 3),)), ["b"]))
    assert Piece(**json.loads(json.dumps(asdict(piece)))) == piece
    assert hash(piece)
