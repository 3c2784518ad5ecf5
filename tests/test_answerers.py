"""Those who are asked: models in folders, an endpoint that runs in a thread, and scripts."""

from __future__ import annotations

import base64
import io
import json
import threading
from collections.abc import Callable, Iterator
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image
from tokenizers import Tokenizer
from tokenizers.decoders import ByteLevel as ByteLevelDecoder
from tokenizers.models import BPE
from tokenizers.pre_tokenizers import ByteLevel
from transformers import (
    CLIPVisionConfig,
    LlamaConfig,
    LlavaNextConfig,
    LlavaNextForConditionalGeneration,
    LlavaNextImageProcessor,
    LlavaNextProcessor,
    PreTrainedTokenizerFast,
    pipeline,
)

from vlmslice.counting_test.answerers import (
    ENDPOINT_KEY,
    SCRIPTS,
    AnswererError,
    AssistantAnswerer,
    EndpointAnswerer,
    ScriptedAnswerer,
    TransformersAnswerer,
    plan_arm,
)
from vlmslice.counting_test.arms import Arm, ArmError
from vlmslice.counting_test.pictures import Picture, nine_balls_pictures, seam_pictures, size_pictures
from vlmslice.inference import Assistant
from vlmslice.slicing import SlicingConfig

PICTURES = size_pictures(num=2, sides=(64, 200))
PLAIN = Arm("adaptive")
AS_IT_IS = Arm(None)


def test_ours_answers_as_the_assistant_does(saved_model: Path) -> None:
    answerer = AssistantAnswerer(saved_model)
    assistant = Assistant.from_pretrained(saved_model)
    texts = answerer.answer(PICTURES, PLAIN)
    one = assistant.ask([PICTURES[1].draw()], PICTURES[1].layout.question, max_new_tokens=128)
    assert texts[1] == one.text and len(texts) == 4
    assert answerer.answer(PICTURES, Arm("adaptive", overview=False))[0] == texts[0]  # one view
    assert answerer.answer(PICTURES, Arm("adaptive", overview=False))[1] != texts[1]
    assert AssistantAnswerer(assistant).answer(PICTURES, PLAIN) == texts
    assert answerer.describe()["sha256"] and answerer.name == saved_model.name
    assert answerer.plan(100, 200, Arm("uhd")) != answerer.plan(100, 200, PLAIN)


def test_a_model_of_transformers(saved_model: Path) -> None:
    """Asked through the Auto classes alone, ours says what it says to us."""
    answerer = TransformersAnswerer(saved_model)
    assistant = Assistant.from_pretrained(saved_model)
    expected = [
        assistant.ask(
            [picture.draw()], picture.layout.question + " Answer with a number only.", max_new_tokens=128
        )
        for picture in PICTURES[:2]
    ]
    assert answerer.answer(PICTURES[:2], AS_IT_IS) == [answer.text for answer in expected]
    assert answerer.plan(640, 640, AS_IT_IS) is None
    with pytest.raises(ArmError, match="needs a vlmslice model"):
        answerer.check(Arm("uhd"))


CHAT_TEMPLATE = (
    "{% for message in messages %}{% for part in message['content'] %}"
    "{% if part['type'] == 'image' %}<image>{% else %}{{ part['text'] }}{% endif %}"
    "{% endfor %}{% endfor %}{% if add_generation_prompt %} -> {% endif %}"
)


@pytest.fixture(scope="module")
def llava_next(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder of a tiny LLaVA-NeXT in bf16 with its processor, as its users save it."""
    pieces = {character: number for number, character in enumerate(sorted(ByteLevel.alphabet()))}
    backend = Tokenizer(BPE(vocab=pieces, merges=[]))
    backend.pre_tokenizer, backend.decoder = ByteLevel(add_prefix_space=False), ByteLevelDecoder()
    tokenizer = PreTrainedTokenizerFast(tokenizer_object=backend, eos_token="<end>", pad_token="<pad>")
    tokenizer.add_special_tokens({"additional_special_tokens": ["<image>"]})
    torch.manual_seed(0)
    config = LlavaNextConfig(
        vision_config=CLIPVisionConfig(
            hidden_size=32, intermediate_size=64, num_hidden_layers=2, num_attention_heads=2, image_size=56,
            patch_size=14,
        ),
        text_config=LlamaConfig(
            hidden_size=32, intermediate_size=64, num_hidden_layers=1, num_attention_heads=2, vocab_size=len(tokenizer),
            bos_token_id=None, eos_token_id=tokenizer.eos_token_id, pad_token_id=tokenizer.pad_token_id,
        ),
        image_token_index=tokenizer.convert_tokens_to_ids("<image>"),
        image_grid_pinpoints=[[112, 112], [56, 112], [112, 56]],
    )  # fmt: skip
    image_processor = LlavaNextImageProcessor(
        size={"shortest_edge": 56},
        crop_size={"height": 56, "width": 56},
        image_grid_pinpoints=config.image_grid_pinpoints,
    )
    processor = LlavaNextProcessor(
        image_processor,
        tokenizer,
        patch_size=14,
        vision_feature_select_strategy="default",
        chat_template=CHAT_TEMPLATE,
        num_additional_image_tokens=1,
    )
    folder = tmp_path_factory.mktemp("llava_next")
    LlavaNextForConditionalGeneration(config).to(torch.bfloat16).save_pretrained(folder)
    processor.save_pretrained(folder)
    return folder


def test_a_model_of_another_family(llava_next: Path) -> None:
    """It slices by itself and answers each picture as transformers' own pipeline does."""
    answerer = TransformersAnswerer(llava_next)
    ask = pipeline("image-text-to-text", model=str(llava_next))
    expected = []
    for picture in PICTURES[:2]:
        content = [
            {"type": "image", "image": picture.draw()},
            {"type": "text", "text": picture.layout.question + " Answer with a number only."},
        ]
        [answer] = ask(
            text=[{"role": "user", "content": content}],
            max_new_tokens=128,
            return_full_text=False,
            generate_kwargs={"do_sample": False},
        )
        expected.append(answer["generated_text"])
    assert answerer.answer(PICTURES[:2], AS_IT_IS) == expected
    assert answerer.describe()["sha256"]


def test_folders_without_a_model(tmp_path: Path) -> None:
    with pytest.raises(AnswererError, match="no config.json"):
        TransformersAnswerer(tmp_path)
    (tmp_path / "config.json").write_text("{}")
    with pytest.raises(AnswererError, match="cannot be loaded"):
        TransformersAnswerer(tmp_path).answer(PICTURES[:1], AS_IT_IS)


# An endpoint

Reply = Callable[[dict[str, Any], int], tuple[int, str]]


class Endpoint:
    """What a server was asked, and where it is."""

    def __init__(self, url: str):
        self.url = url
        self.reply: Reply = lambda body, number: (200, completion("9"))
        self.bodies: list[dict[str, Any]] = []
        self.headers: list[dict[str, str]] = []
        self.paths: list[str] = []


def completion(text: str) -> str:
    return json.dumps({"choices": [{"message": {"role": "assistant", "content": text}}]})


@pytest.fixture
def endpoint() -> Iterator[Endpoint]:
    class Handler(BaseHTTPRequestHandler):
        def do_POST(self) -> None:
            body = json.loads(self.rfile.read(int(self.headers["Content-Length"])))
            with lock:
                served.bodies.append(body)
                served.headers.append({name.lower(): value for name, value in self.headers.items()})
                served.paths.append(self.path)
                number = len(served.bodies)
            status, text = served.reply(body, number)
            self.send_response(status)
            self.end_headers()
            self.wfile.write(text.encode())

        def log_message(self, *arguments: object) -> None:
            pass

    lock = threading.Lock()
    server = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
    served = Endpoint(f"http://127.0.0.1:{server.server_port}/v1")
    thread = threading.Thread(target=server.serve_forever)
    thread.start()
    yield served
    server.shutdown()
    thread.join()
    server.server_close()


def sent_image(body: dict[str, Any]) -> np.ndarray:
    url = body["messages"][0]["content"][0]["image_url"]["url"]
    head, _, data = url.partition(",")
    assert head == "data:image/png;base64"
    return np.asarray(Image.open(io.BytesIO(base64.b64decode(data))))


def test_what_an_endpoint_is_sent(endpoint: Endpoint, monkeypatch: pytest.MonkeyPatch) -> None:
    def count_by_size(body: dict[str, Any], number: int) -> tuple[int, str]:
        return 200, completion(str(sent_image(body).shape[0]))

    monkeypatch.setenv(ENDPOINT_KEY, "secret")
    endpoint.reply = count_by_size
    answerer = EndpointAnswerer(endpoint.url + "/", "some-model")
    # Asked at the same time, answered in order.
    assert answerer.answer(PICTURES, AS_IT_IS) == ["64", "200", "64", "200"]
    assert set(endpoint.paths) == {"/v1/chat/completions"}
    assert endpoint.headers[0]["authorization"] == "Bearer secret"
    [body] = [body for body in endpoint.bodies if (sent_image(body).shape[0]) == 200][:1]
    assert (body["model"], body["temperature"]) == ("some-model", 0)
    assert body["messages"][0]["content"][1]["text"].endswith("are there? Answer with a number only.")
    drawn = [np.asarray(picture.draw()) for picture in PICTURES if picture.size == (200, 200)]
    assert any((sent_image(body) == pixels).all() for pixels in drawn)
    assert "secret" not in json.dumps(answerer.describe())


def test_no_key_is_sent_where_none_is_set(endpoint: Endpoint, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv(ENDPOINT_KEY, raising=False)
    assert EndpointAnswerer(endpoint.url, "m").answer(PICTURES[:1], AS_IT_IS) == ["9"]
    assert "authorization" not in endpoint.headers[0]


def test_a_busy_endpoint_is_asked_again(endpoint: Endpoint) -> None:
    endpoint.reply = lambda body, number: (429, "slow down") if number < 3 else (200, completion("four"))
    assert EndpointAnswerer(endpoint.url, "m", pause=0.01).answer(PICTURES[:1], AS_IT_IS) == ["four"]
    assert len(endpoint.bodies) == 3


@pytest.mark.parametrize(
    ("status", "text", "words"),
    [
        (401, "no such key", f"answered 401 Unauthorized: no such key; set {ENDPOINT_KEY}"),
        (503, "down", "answered 503 Service Unavailable: down"),
        (400, "no images here", "answered 400 Bad Request: no images here"),
        (200, "<html>", "expected JSON with choices"),
        (200, '{"choices": []}', "expected JSON with choices"),
    ],
)
def test_errors_of_an_endpoint(endpoint: Endpoint, status: int, text: str, words: str) -> None:
    endpoint.reply = lambda body, number: (status, text)
    with pytest.raises(AnswererError) as error:
        EndpointAnswerer(endpoint.url, "m", pause=0.01).answer(PICTURES[:1], AS_IT_IS)
    assert words in str(error.value)


def test_an_endpoint_that_is_slow_or_not_there(endpoint: Endpoint) -> None:
    release = threading.Event()

    def wait(body: dict[str, Any], number: int) -> tuple[int, str]:
        release.wait(20)
        return 200, completion("9")

    endpoint.reply = wait
    with pytest.raises(AnswererError, match=r"no answer within 0.2 s"):
        EndpointAnswerer(endpoint.url, "m", timeout=0.2).answer(PICTURES[:1], AS_IT_IS)
    release.set()
    with pytest.raises(AnswererError, match="cannot be reached"):
        EndpointAnswerer("http://127.0.0.1:9/v1", "m").answer(PICTURES[:1], AS_IT_IS)
    with pytest.raises(AnswererError, match="expected a URL"):
        EndpointAnswerer("localhost:8000", "m")


def test_an_empty_message_is_an_empty_answer(endpoint: Endpoint) -> None:
    endpoint.reply = lambda body, number: (200, json.dumps({"choices": [{"message": {"content": None}}]}))
    assert EndpointAnswerer(endpoint.url, "m").answer(PICTURES[:1], AS_IT_IS) == [""]


# Scripts


def counts(script: str, pictures: list[Picture], arm: Arm = PLAIN) -> list[int]:
    return [int(text) for text in ScriptedAnswerer(script).answer(pictures, arm)]


def test_scripts_count_as_they_say() -> None:
    pairs = seam_pictures(SlicingConfig())
    truths = [picture.layout.count for picture in pairs]
    on_seams = [picture.num_on_seams for picture in pairs]
    assert counts("perfect", pairs) == truths
    assert counts("double-counter", pairs) == [t + on for t, on in zip(truths, on_seams, strict=True)]
    assert counts("seam-misser", pairs) == [t - on for t, on in zip(truths, on_seams, strict=True)]
    assert set(counts("constant", pairs)) == {7}
    assert counts("size-failer", nine_balls_pictures((1024, 1025))) == [9, 4]


def test_a_script_slices_by_the_policy_of_the_arm() -> None:
    balls = nine_balls_pictures((1024,))
    slicing = SlicingConfig(max_visual_tokens=20_000)
    script = ScriptedAnswerer("double-counter", slicing)
    assert script.answer(balls, Arm("uniform")) == ["9"]
    assert script.answer(balls, Arm("adaptive")) != ["9"]
    assert plan_arm(slicing, 1024, 1024, Arm(None)).policy == "adaptive"
    with pytest.raises(ArmError, match="means nothing to a script"):
        script.check(Arm("adaptive", schema=False))
    with pytest.raises(AnswererError, match="did you mean 'double-counter'"):
        ScriptedAnswerer("doublecounter")
    assert set(SCRIPTS) > {"perfect"}
