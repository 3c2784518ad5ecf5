import pytest
from hypothesis import example, given
from hypothesis import strategies as st
from tokenizers import Tokenizer, models, pre_tokenizers, processors
from transformers import AutoTokenizer, PreTrainedTokenizerFast

from vlmslice.slicing import SlicePlan, SlicingConfig, View, plan_slices
from vlmslice.spatial_schema import (
    CHAT_TEMPLATE,
    END,
    IMAGE_END,
    IMAGE_START,
    IMAGE_TOKEN,
    LOCATION_TOKENS,
    OVERVIEW_START,
    PAD,
    ROW_END,
    SLICE_START,
    SPECIAL_TOKENS,
    add_special_tokens,
    build_chat_template,
    spell_plan,
)
from vlmslice.tokenization import build_byte_tokenizer

BYTE_TOKENIZER = build_byte_tokenizer()


def view(num_visual_tokens: int) -> View:
    return View(box=(0, 0, 1, 1), size=(32, 32), patch_grid=(2, 2), num_visual_tokens=num_visual_tokens)


def plan(grid: tuple[int, int], overview: View | None, num_tokens_per_slice: int) -> SlicePlan:
    rows, cols = grid
    num_visual_tokens = rows * cols * num_tokens_per_slice + (overview.num_visual_tokens if overview else 0)
    return SlicePlan(
        policy="adaptive",
        image_size=(1, 1),
        grid=grid,
        overview=overview,
        slices=(view(num_tokens_per_slice),) * (rows * cols),
        num_visual_tokens=num_visual_tokens,
        reason="",
    )


def test_grid_is_spelled_row_by_row_after_the_overview():
    a_slice = SLICE_START + IMAGE_TOKEN
    expected = IMAGE_START + OVERVIEW_START + IMAGE_TOKEN * 2 + (a_slice * 3 + ROW_END) * 2 + IMAGE_END
    assert spell_plan(plan((2, 3), view(2), 1)) == expected


def test_transposed_grid_is_spelled_differently():
    assert spell_plan(plan((2, 3), view(2), 1)) != spell_plan(plan((3, 2), view(2), 1))


def test_single_slice_has_no_tags():
    assert spell_plan(plan((1, 1), None, 3)) == IMAGE_START + IMAGE_TOKEN * 3 + IMAGE_END


@given(
    height=st.integers(1, 5000),
    width=st.integers(1, 5000),
    tokens_per_view=st.sampled_from([None, 1, 16]),
    policy=st.sampled_from(["adaptive", "uhd"]),
)
def test_placeholders_equal_visual_tokens(height, width, tokens_per_view, policy):
    config = SlicingConfig(policy=policy, tokens_per_view=tokens_per_view, max_slice_nums=9)
    a_plan = plan_slices(height, width, config)
    spelled = spell_plan(a_plan)
    assert spelled.count(IMAGE_TOKEN) == a_plan.num_visual_tokens
    if a_plan.grid != (1, 1):
        assert (spelled.count(ROW_END), spelled.count(SLICE_START)) == (a_plan.grid[0], len(a_plan.slices))


def test_byte_ids_are_bytes_and_special_tokens_follow():
    text = "Größe 42 €, 漢字 🙂"
    assert BYTE_TOKENIZER(text)["input_ids"] == list(text.encode())
    assert BYTE_TOKENIZER.convert_tokens_to_ids(list(SPECIAL_TOKENS)) == list(
        range(256, 256 + len(SPECIAL_TOKENS))
    )
    first = 256 + len(SPECIAL_TOKENS)
    assert BYTE_TOKENIZER.convert_tokens_to_ids(list(LOCATION_TOKENS)) == list(range(first, first + 256))
    assert len(BYTE_TOKENIZER) == 256 + len(SPECIAL_TOKENS) + len(LOCATION_TOKENS)
    assert (BYTE_TOKENIZER.eos_token, BYTE_TOKENIZER.pad_token) == (END, PAD)
    for byte in range(256):
        assert (
            BYTE_TOKENIZER.backend_tokenizer.model.token_to_id(BYTE_TOKENIZER.convert_ids_to_tokens(byte))
            == byte
        )


@given(st.text())
@example(" a , b . n't 'm\r\n\t  ")
@example("\x00\u2028\ufeff")
@example("".join(SPECIAL_TOKENS))
def test_every_text_round_trips(text):
    ids = BYTE_TOKENIZER(text)["input_ids"]
    assert BYTE_TOKENIZER.decode(ids) == text
    plain = BYTE_TOKENIZER(text, split_special_tokens=True)["input_ids"]
    assert plain == list(text.encode())
    assert BYTE_TOKENIZER.decode(plain, skip_special_tokens=True) == text


def test_byte_tokenizer_survives_saving(tmp_path):
    BYTE_TOKENIZER.save_pretrained(tmp_path)
    loaded = AutoTokenizer.from_pretrained(tmp_path)
    text = f"  é , <|user|> {END}{IMAGE_TOKEN}"
    assert loaded(text)["input_ids"] == BYTE_TOKENIZER(text)["input_ids"]
    assert loaded.decode(loaded(text)["input_ids"]) == text
    assert (loaded.eos_token, loaded.pad_token, loaded.padding_side) == (END, PAD, "left")
    assert set(loaded.all_special_tokens) == set(SPECIAL_TOKENS)


def word_tokenizer(*, writes_bos: bool) -> PreTrainedTokenizerFast:
    backend = Tokenizer(models.WordLevel({"<s>": 0, "<unk>": 1, "hello": 2}, unk_token="<unk>"))
    backend.pre_tokenizer = pre_tokenizers.Whitespace()
    if writes_bos:
        backend.post_processor = processors.TemplateProcessing(single="<s> $A", special_tokens=[("<s>", 0)])
    return PreTrainedTokenizerFast(
        tokenizer_object=backend, bos_token="<s>", unk_token="<unk>", padding_side="right"
    )


def test_add_special_tokens_keeps_the_tokens_of_the_language_model():
    tokenizer = word_tokenizer(writes_bos=False)
    assert add_special_tokens(tokenizer) == len(SPECIAL_TOKENS)
    assert add_special_tokens(tokenizer) == 0
    assert tokenizer("hello" + END)["input_ids"] == [2, tokenizer.eos_token_id]
    assert tokenizer.bos_token == "<s>"
    assert (tokenizer.eos_token, tokenizer.pad_token) == (END, PAD)


@pytest.mark.parametrize("writes_bos", [False, True])
def test_chat_template_opens_with_the_start_token_if_the_tokenizer_writes_one(writes_bos):
    tokenizer = word_tokenizer(writes_bos=writes_bos)
    add_special_tokens(tokenizer)
    chat = [{"role": "user", "content": "hello"}]
    rendered = tokenizer.apply_chat_template(
        chat, chat_template=build_chat_template(tokenizer), tokenize=False
    )
    assert rendered == ("<s>" if writes_bos else "") + "<|user|>hello<|end|>"


def render(messages, **kwargs) -> str:
    return BYTE_TOKENIZER.apply_chat_template(messages, chat_template=CHAT_TEMPLATE, tokenize=False, **kwargs)


def test_chat_template_adds_nothing_but_control_tokens():
    messages = [
        {"role": "system", "content": " Be brief.\n"},
        {
            "role": "user",
            "content": [{"type": "image"}, {"type": "text", "text": "\n Sum? "}, {"type": "image"}],
        },
        {"role": "assistant", "content": "4\n"},
    ]
    expected = "<|system|> Be brief.\n<|end|><|user|><|image|>\n Sum? <|image|><|end|><|assistant|>4\n<|end|>"
    assert render(messages) == expected
    assert render(messages[:2], add_generation_prompt=True) == expected.removesuffix("4\n<|end|>")


@pytest.mark.parametrize(
    ("message", "complaint"),
    [
        ({"role": "image", "content": "x"}, "unknown role 'image'"),
        ({"role": "user", "content": [{"type": "video"}]}, "bad content block of type 'video'"),
        ({"role": "user", "content": [{"type": "text", "content": "x"}]}, "bad content block of type 'text'"),
    ],
)
def test_chat_template_refuses_what_it_cannot_spell(message, complaint):
    with pytest.raises(Exception, match=complaint):
        render([message])
