"""The frozen CLIP backbone and the Cross-Modal Adapters that are its arguments."""

from backbone.adapter import Adapter, AdapterShape, Scope, Start, TowerDims
from backbone.graphs import Graphs
from backbone.images import Form, to_pixels
from backbone.load import BUILTIN, RANDOM, BackboneNotFound, load_backbone, pretrained_tags
from backbone.model import Adapters, Backbone, Prefix, Tokens
from backbone.similarity import TEMPERATURE, mean_pool, q_score, rescore, rescore_all
from backbone.stack import AdapterStack, FlatAdapter, Slots
from backbone.towers import UnsupportedBackbone
from backbone.vocabulary import VOCABULARY_ROWS

__all__ = [
    "BUILTIN",
    "RANDOM",
    "TEMPERATURE",
    "VOCABULARY_ROWS",
    "Adapter",
    "AdapterShape",
    "AdapterStack",
    "Adapters",
    "Backbone",
    "BackboneNotFound",
    "FlatAdapter",
    "Form",
    "Graphs",
    "Prefix",
    "Scope",
    "Slots",
    "Start",
    "Tokens",
    "TowerDims",
    "UnsupportedBackbone",
    "load_backbone",
    "mean_pool",
    "pretrained_tags",
    "q_score",
    "rescore",
    "rescore_all",
    "to_pixels",
]
