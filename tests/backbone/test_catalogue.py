"""`polyclip backbones`: what it lists is there, and its facts are those of open_clip."""

import json

import open_clip
from typer.testing import CliRunner

from backbone.catalogue import choices
from service.cli.main import app


def test_every_choice_is_an_architecture_with_its_tags_and_sizes() -> None:
    for one in choices():
        config = open_clip.get_model_config(one.name)
        assert config is not None and set(one.tags) <= set(open_clip.list_pretrained_tags_by_model(one.name))
        assert one.image_size == config["vision_cfg"]["image_size"]
        assert one.context_length == config["text_cfg"]["context_length"]
        assert set(one.zero_shot) <= set(one.tags) and all(told["source"] for told in one.zero_shot.values())
        assert one.parameters > 1e7 and one.frame > 0 and one.text > 0


def test_costs_are_told_against_vit_b_32() -> None:
    costs = {one.name: (one.frame, one.text) for one in choices()}
    assert costs["ViT-B-32"] == (1.0, 1.0)
    assert [one.frame for one in choices()] == sorted(frame for frame, _ in costs.values())
    assert costs["ViT-L-14"][0] > costs["ViT-B-16"][0] > 2
    assert costs["PE-Core-B-16"][1] > costs["PE-Core-T-16-384"][1]


def test_the_command_prints_each_and_json() -> None:
    printed = CliRunner().invoke(app, ["backbones"]).output  # 80 columns, where there is no terminal
    assert all(name in printed.split() for one in choices() for name in (one.name, *one.tags)) and "47.6" in printed
    assert "…" not in printed, "nothing is cut off"
    told = json.loads(CliRunner().invoke(app, ["backbones", "--json"]).output)
    assert told == [one.to_json() | {"tags": list(one.tags)} for one in choices()]
