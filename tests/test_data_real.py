"""Real sets as samples; the files here are drawn, in the form of the real ones."""

import json
from pathlib import Path

import pytest

from vlmslice.data.real_data import FILES, RealDataError, RealDataset, image_splits, split_of

COMPANIES = [f"SHOP {letter} SDN BHD" for letter in "ABCDEFGH"]


@pytest.fixture
def data_root(tmp_path, draw_image) -> Path:
    rows: dict[str, list[dict]] = {name: [] for name in FILES}
    for i, company in enumerate(COMPANIES):
        draw_image(100, 60).save(tmp_path / f"{i}.png")
        answer = {"company": company, "date": "1/2/2020", "address": "1, A ST", "total": f"{i}.50"}
        rows["receipt"].append({"image": f"{i}.png", "answer": answer})
        rows["receipt-line"].append({"image": f"{i}.png", "bbox": [10, 20, 50, 32], "answer": f"LINE {i}"})
        for j in range(2):
            name = f"doc{i}_t{j}.png"
            draw_image(80, 90).save(tmp_path / name)
            rows["table"].append({"image": name, "answer": "<table></table>"})
            nodes = [{"id": "a", "type": "task", "text": "Pay"}, {"id": "b", "type": "endEvent", "text": ""}]
            rows["flowchart"].append(
                {
                    "image": name,
                    "nodes": nodes,
                    "edges": [{"src": "a", "dst": "b"}, {"src": "b", "dst": "gone"}],
                }
            )
        draw_image(70, 70).save(tmp_path / f"cells{i}.png")
        for source in ("bccd", "coco128_lightly"):
            row = {"image": f"cells{i}.png", "question": "How many?", "answer": i, "source": source}
            rows["cells"].append(row)
    for name, file_name in FILES.items():
        if name in ("receipt-part", "receipt-page"):
            continue  # of the file of `receipt-line`
        (tmp_path / file_name).write_text("\n".join(map(json.dumps, rows[name])) + "\n")
    return tmp_path


def test_every_image_is_on_one_side(data_root):
    splits = image_splits(data_root)
    assert set(splits.values()) == {"train", "eval"}
    for i in range(len(COMPANIES)):
        assert splits[f"doc{i}_t0.png"] == splits[f"doc{i}_t1.png"]
        assert (
            splits[f"{i}.png"] == split_of(COMPANIES[i]) == split_of(COMPANIES[i].lower().replace(" ", "."))
        )
    for name in FILES:
        sides = [
            {row["image"] for _, row in RealDataset(data_root, [name], side)._entries}
            for side in ("train", "eval")
        ]
        assert not sides[0] & sides[1] and sides[0] | sides[1] <= set(splits)


@pytest.mark.parametrize("name", FILES)
def test_samples(data_root, name):
    dataset = RealDataset(data_root, [name])
    for index in range(len(dataset)):
        sample, again = dataset[index], dataset[index]
        assert (sample.question, sample.answer) == (again.question, again.answer)
        assert sample.scene.image.tobytes() == again.scene.image.tobytes()
        assert sample.messages()[0]["content"][0] == {"type": "image"}
    assert dataset[-1].answer == sample.answer
    with pytest.raises(IndexError):
        dataset[len(dataset)]


def test_answers(data_root):
    for sample in RealDataset(data_root, ["receipt"]):
        if sample.answer.startswith("{"):
            assert set(json.loads(sample.answer)) == {"company", "date", "address", "total"}
        else:
            assert sample.answer == "1, A ST" or sample.answer[0] in "S1234567890"
    for sample in RealDataset(data_root, ["flowchart"]):
        assert sample.answer == "Pay -> endEvent"
    assert len(RealDataset(data_root, ["cells"])) + len(RealDataset(data_root, ["cells"], "eval")) == len(
        COMPANIES
    )


def test_lines_are_cropped_with_a_margin(data_root):
    for sample in RealDataset(data_root, ["receipt-line"]):
        height, width = sample.scene.image.height, sample.scene.image.width
        assert 12 <= height <= 20 and 40 <= width <= 48
        [line] = [region for region in sample.scene.regions if region.kind == "line"]
        top, left, bottom, right = line.box
        assert (bottom - top, right - left) == (12, 40)
        assert top >= 0 and bottom <= height and left >= 0 and right <= width


def test_rows_of_a_receipt_in_the_order_of_reading(data_root):
    lines = [("NAME", 40, 10, 60, 18), ("PRICE", 70, 11, 95, 19), ("TOTAL", 40, 25, 60, 33)]
    image = next(row["image"] for _, row in RealDataset(data_root, ["receipt-line"])._entries)
    rows = [{"image": image, "bbox": box, "answer": text} for text, *box in reversed(lines)]
    (data_root / FILES["receipt-line"]).write_text("\n".join(map(json.dumps, rows)))
    total, price, name = RealDataset(data_root, ["receipt-part"])
    assert total.answer == "TOTAL"
    # The price starts lower than the name, which yet belongs to its row.
    assert price.answer == name.answer == "NAME PRICE\nTOTAL"
    assert name.scene.image.width < 100 and not name.scene.is_listed
    [page] = RealDataset(data_root, ["receipt-page"])
    assert page.answer == "NAME PRICE\nTOTAL" and page.scene.image.size == (60, 100)


def test_answers_are_shown_where_they_are_printed(data_root):
    """Characters lie evenly in the box of their line, and a field of the record in the line that says it."""
    image = next(row["image"] for _, row in RealDataset(data_root, ["receipt"])._entries)
    company = next(row["answer"]["company"] for _, row in RealDataset(data_root, ["receipt"])._entries)
    lines = [(company, 10, 0, 90, 10), ("DATE 1/2/2020", 20, 20, 85, 30)]
    rows = [{"image": image, "bbox": box, "answer": text} for text, *box in lines]
    (data_root / FILES["receipt-line"]).write_text("\n".join(map(json.dumps, rows)))
    [page] = RealDataset(data_root, ["receipt-page"])
    assert [place for [place] in page.places[-8:]] == [(25.0, 47.5 + 5 * i) for i in range(8)]
    assert page.places[len(company)] == [] and page.places[0] == [(5.0, 10 + 40 / len(company))]
    record = RealDataset(data_root, ["receipt"])[0]
    for field, left in ((company, 10), ("1/2/2020", 45)):
        if field in record.answer:
            [(_, x)] = record.places[record.answer.index(field)]
            assert left < x < left + 5


@pytest.mark.parametrize(
    "names, message",
    [
        (["chartqa"], "'chartqa' is for evaluation only"),
        (["recipt"], "no set 'recipt'; expected some of .*; did you mean 'receipt'"),
    ],
)
def test_sets_that_may_not_train(data_root, names, message):
    with pytest.raises(RealDataError, match=message):
        RealDataset(data_root, names)


def test_missing_folder(tmp_path):
    with pytest.raises(RealDataError, match=r"there is no receipts\.jsonl in .*; give another data_root"):
        RealDataset(tmp_path)
