"""The naive service that ours is measured against: FastAPI, open_clip's own `encode_text` at 77 tokens, the adapter read from
disk for each request and hooked into the blocks, one query at a time; the same search over the same vectors, held in memory.

`python -m bench.naive DATA PORT` serves the data folder that `bench.serving` has filled.
"""

from __future__ import annotations

import sys
import threading
from functools import partial
from pathlib import Path
from typing import Any

import faiss
import numpy as np
import open_clip
import torch
import uvicorn
from fastapi import FastAPI
from safetensors.torch import load_file

from backbone import rescore
from bench.serving import BACKBONE, Listing, listings

CANDIDATES = 200


def app_of(data: Path) -> FastAPI:
    """`POST /search` {collection, text} → {"data": [{video_id, score}]}."""
    torch.manual_seed(0)
    model = open_clip.create_model(BACKBONE).eval()
    tokenizer = open_clip.get_tokenizer(BACKBONE)
    known = {listing.collection: listing for listing in listings(data)}
    indexes = {name: index_of(listing) for name, listing in known.items()}
    lock = threading.Lock()
    app = FastAPI()

    @app.post("/search")
    def search(body: dict[str, Any]) -> dict[str, Any]:
        listing = known[body["collection"]]
        with lock, torch.inference_mode():
            hooks = hook(model, load_file(listing.adapter))
            query = model.encode_text(tokenizer([body["text"]]))[0].numpy()
            for handle in hooks:
                handle.remove()
        _, found = indexes[listing.collection].search((query / np.linalg.norm(query))[None], CANDIDATES)
        rows = [row for row in found[0] if row >= 0]
        scores = rescore(query, [listing.frames[row] for row in rows])
        best = np.argsort(-scores)[:10]
        return {"data": [{"video_id": listing.videos[rows[i]], "score": float(scores[i])} for i in best]}

    return app


def index_of(listing: Listing) -> faiss.IndexFlatIP:
    index = faiss.IndexFlatIP(listing.pooled.shape[1])
    index.add(listing.pooled)
    return index


def hook(model: Any, tensors: dict[str, torch.Tensor]) -> list[Any]:
    """The adapter of the text tower on each sub-layer's output: h + up(quick_gelu(down(h)))."""
    own, shared = tensors["text_adapter_up_unique_weight"], tensors["vt_adapter_up_share_weight"]
    up = torch.cat([own, shared], dim=1)
    up_bias = torch.cat([tensors["text_adapter_up_unique_bias"], tensors["vt_adapter_up_share_bias"]], dim=1)

    def adapt(place: int, _module: Any, _inputs: Any, output: Any) -> Any:
        h = output[0] if isinstance(output, tuple) else output
        z = h @ tensors["text_adapter_down_weight"][place].T + tensors["text_adapter_down_bias"][place]
        h = h + (z * torch.sigmoid(1.702 * z)) @ up[place].T + up_bias[place]
        return (h, *output[1:]) if isinstance(output, tuple) else h

    return [
        module.register_forward_hook(partial(adapt, 2 * layer + place))
        for layer, block in enumerate(model.transformer.resblocks)
        for place, module in enumerate((block.attn, block.mlp))
    ]


if __name__ == "__main__":
    torch.set_num_threads(2)
    uvicorn.run(app_of(Path(sys.argv[1])), host="127.0.0.1", port=int(sys.argv[2]), log_level="error", access_log=False)
