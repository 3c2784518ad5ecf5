import dataclasses
import re
from pathlib import Path

import pytest
from tiny_models import noise_image, tiny_slicing

from vlmslice.page.price import NO_IMAGE, price_markup
from vlmslice.slicing import SlicingError, plan_slices
from vlmslice.slicing_policies import POLICIES


@pytest.fixture
def upload(tmp_path: Path) -> Path:
    path = tmp_path / "picture.png"
    noise_image(100, 200).save(path)
    return path


@pytest.mark.parametrize("policy", POLICIES)
@pytest.mark.parametrize("budget", [16, 64])
def test_price_is_that_of_the_plan(upload: Path, policy: str, budget: int) -> None:
    config = tiny_slicing()
    markup = price_markup(upload, policy, budget, config)
    changed = dataclasses.replace(config, policy=policy, max_visual_tokens=budget)
    try:
        plan = plan_slices(100, 200, changed)
    except SlicingError as error:
        assert 'role="alert"' in markup and f"max_visual_tokens is {budget}" in markup
        assert "max_visual_tokens" in str(error) and "<svg" not in markup
    else:
        assert f"<dt>visual tokens</dt><dd>{plan.num_visual_tokens}</dd>" in markup
        assert f"<dd>{plan.grid[0]} × {plan.grid[1]}</dd>" in markup
        assert markup.count('class="vs-slice"') == len(plan.slices)


def test_all_policies_stand_side_by_side(upload: Path) -> None:
    """Those over the budget, too, and the chosen one is marked."""
    config = tiny_slicing()
    markup = price_markup(upload, "uhd", 64, config)
    rows = dict(re.findall(r'<th scope="row">(\w+)</th>(.*?)</tr>', markup))
    assert list(rows) == list(POLICIES)
    for policy, row in rows.items():
        try:
            plan = plan_slices(100, 200, dataclasses.replace(config, policy=policy))
        except SlicingError:
            assert "over the budget" in row
        else:
            assert f"<td>{plan.num_visual_tokens}</td>" in row
    assert re.findall(r'class="vs-chosen"><th scope="row">(\w+)<', markup) == ["uhd"]


def test_no_image_and_a_bad_file(tmp_path: Path) -> None:
    assert price_markup(None, "adaptive", 64, tiny_slicing()) == NO_IMAGE
    path = tmp_path / "<b>note.png"
    path.write_text("no picture")
    markup = price_markup(path, "adaptive", 64, tiny_slicing())
    assert 'role="alert"' in markup and "&lt;b&gt;note" in markup
    assert "<b>" not in markup and str(tmp_path) not in markup
