"""Answers that are held to a JSON schema."""

import json
from pathlib import Path

import pytest
import torch
from conftest import Vlmslice, assert_user_error
from hypothesis import given, settings
from hypothesis import strategies as st
from PIL import Image
from transformers import PreTrainedTokenizerFast

from vlmslice.answer_schemas import RECEIPT_SCHEMA, SchemaError, fields_schema, read_answer_schema
from vlmslice.inference import Assistant
from vlmslice.json_decoding import JSONSchemaLogitsProcessor
from vlmslice.tokenization import build_byte_tokenizer

TOKENIZER = build_byte_tokenizer()
PROMPT = [72, 105]
SHORT = {"company": 3, "total": 9}


def write(
    schema: dict, generator: torch.Generator, num_rows: int = 1, num_steps: int = 400
) -> list[list[int]]:
    """What a model without any knowledge writes under a schema, its end token included."""
    processor = JSONSchemaLogitsProcessor(schema, TOKENIZER)
    ids = torch.tensor(num_rows * [PROMPT])
    for _ in range(num_steps):
        scores = processor(ids, torch.randn(num_rows, len(TOKENIZER), generator=generator))
        done = (ids == TOKENIZER.eos_token_id).any(dim=1)
        # As `generate` does: rows that have ended are padded.
        best = torch.where(done, TOKENIZER.pad_token_id, scores.argmax(dim=1))
        ids = torch.cat([ids, best[:, None]], dim=1)
        if done.all():
            break
    return ids[:, len(PROMPT) :].tolist()


@settings(max_examples=30)
@given(st.integers(0, 2**31), st.integers(1, 4))
def test_whatever_the_scores_the_answer_is_json_of_the_schema(seed: int, num_rows: int) -> None:
    rows = write(fields_schema(SHORT), torch.Generator().manual_seed(seed), num_rows)
    ends = {row.index(TOKENIZER.eos_token_id) for row in rows}
    assert num_rows < 4 or len(ends) > 1  # rows end at different steps
    for row in rows:
        text = TOKENIZER.decode(row[: row.index(TOKENIZER.eos_token_id)])
        answer = json.loads(text)
        assert list(answer) == list(SHORT)
        assert all(len(answer[name]) <= length for name, length in SHORT.items())


def test_nested_schemas_and_numbers() -> None:
    item = {
        "type": "array",
        "prefixItems": [{"type": "string", "maxLength": 2}, {"type": "integer", "minimum": 0, "maximum": 99}],
        "items": False,
        "minItems": 2,
    }
    schema = {
        "type": "object",
        "properties": {"items": {"type": "array", "items": item, "minItems": 1, "maxItems": 2}},
        "required": ["items"],
        "additionalProperties": False,
    }
    [row] = write(schema, torch.Generator().manual_seed(0))
    for name, number in json.loads(TOKENIZER.decode(row[: row.index(TOKENIZER.eos_token_id)]))["items"]:
        assert len(name) <= 2
        assert 0 <= number <= 99


def test_a_likely_answer_that_fits_is_not_changed() -> None:
    text = '{"company":"Café \\"Ü\\"","total":"8.60"}'
    wanted = [*TOKENIZER(text)["input_ids"], TOKENIZER.eos_token_id]
    processor = JSONSchemaLogitsProcessor(fields_schema({"company": 20, "total": 9}), TOKENIZER)
    ids = list(PROMPT)
    for token in wanted:
        scores = torch.zeros(1, len(TOKENIZER))
        scores[0, token] = 1
        assert processor(torch.tensor([ids]), scores).argmax() == token
        ids.append(token)


@pytest.mark.parametrize(
    ("schema", "words"), [({"type": "nonsense"}, "nonsense"), ({"type": "object", "not": {}}, "not")]
)
def test_schemas_that_cannot_be_followed(schema: dict, words: str) -> None:
    with pytest.raises(SchemaError, match=f"cannot be followed: .*{words}.*; expected one as on"):
        JSONSchemaLogitsProcessor(schema, TOKENIZER)


def test_slow_tokenizers_are_refused() -> None:
    with pytest.raises(SchemaError, match="need a fast tokenizer, got str"):
        JSONSchemaLogitsProcessor(RECEIPT_SCHEMA, "no tokenizer")  # type: ignore[arg-type]


class TestAssistant:
    QUESTION = "Give company and total as JSON."

    def test_random_weights_answer_in_json_alone_and_in_a_batch(self, saved_model: Path) -> None:
        assistant = Assistant.from_pretrained(saved_model, "cpu")
        assistant.model.generation_config.eos_token_id = TOKENIZER.eos_token_id
        images = [Image.new("RGB", size, "red") for size in ((64, 64), (200, 100))]
        schema = fields_schema(SHORT)
        alone = [assistant.ask([image], self.QUESTION, json_schema=schema) for image in images]
        batch = assistant.ask_batch([([image], self.QUESTION) for image in images], json_schema=schema)
        assert [answer.text for answer in alone] == [answer.text for answer in batch]
        for answer in alone:
            assert answer.finish_reason == "stop"
            assert set(json.loads(answer.text)) == set(SHORT)

    def test_command(self, vlmslice_command: Vlmslice, saved_model: Path, tmp_path: Path) -> None:
        Image.new("RGB", (64, 64)).save(tmp_path / "receipt.png")
        (tmp_path / "schema.json").write_text(json.dumps(fields_schema(SHORT)))
        ask = ("ask", tmp_path / "receipt.png", self.QUESTION, "--model", saved_model)
        by_file = vlmslice_command(*ask, "--json-schema", tmp_path / "schema.json")
        assert by_file.code == 0, by_file.err
        assert set(json.loads(by_file.out)) == set(SHORT)
        by_name = json.loads(vlmslice_command(*ask, "--fields", "company, total", "--json").out)
        assert by_name["answer"].replace(" ", "").startswith('{"company":"')

    @pytest.mark.parametrize(
        ("options", "words"),
        [
            (("--fields", "date,,total"), "expected names, such as date,total"),
            (("--fields", "date", "--json-schema", "x.json"), "leave one of them out"),
            (("--json-schema", "no-such.json"), "No such file"),
        ],
    )
    def test_wrong_options(
        self, vlmslice_command: Vlmslice, tmp_path: Path, options: tuple[str, ...], words: str
    ) -> None:
        Image.new("RGB", (64, 64)).save(tmp_path / "a.png")
        assert_user_error(vlmslice_command("ask", tmp_path / "a.png", "What?", *options), words)


@pytest.mark.parametrize("text", ["", "[1]", "{"])
def test_files_without_a_schema(tmp_path: Path, text: str) -> None:
    (tmp_path / "schema.json").write_text(text)
    with pytest.raises(SchemaError, match=r"schema\.json"):
        read_answer_schema(None, tmp_path / "schema.json")


def test_tokenizer_is_a_fast_one() -> None:
    assert isinstance(TOKENIZER, PreTrainedTokenizerFast)
