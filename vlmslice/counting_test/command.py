"""From the options of `vlmslice count-test` to a test."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace

from vlmslice.counting_test.answerers import (
    Answerer,
    AnswererError,
    AssistantAnswerer,
    EndpointAnswerer,
    ScriptedAnswerer,
    TransformersAnswerer,
)
from vlmslice.counting_test.arms import Arm, build_arms
from vlmslice.counting_test.pictures import DEFAULT_SEED, all_pictures
from vlmslice.counting_test.run import CountingTest, build_questions
from vlmslice.errors import suggestion
from vlmslice.model_files import read_slicing_config
from vlmslice.slicing import SlicingConfig
from vlmslice.slicing_policies import POLICIES

_KINDS = ("vlmslice", "transformers")


def build_test(
    *,
    model: str | None = None,
    model_kind: str = "vlmslice",
    endpoint: str | None = None,
    endpoint_model: str | None = None,
    timeout: float = 120.0,
    script: str | None = None,
    policies: Sequence[str] = (),
    options: Sequence[str] = (),
    max_visual_tokens: int | None = None,
    limit: int | None = None,
    seed: int | None = None,
) -> CountingTest:
    """Who is to be asked what.

    Args:
        model: Folder of a saved model, by default the bundled one.
        model_kind: "vlmslice" or "transformers".
        endpoint: URL of an endpoint, instead of a model.
        endpoint_model: Name of the model there.
        timeout: Of the endpoint, in seconds.
        script: One of `answerers.SCRIPTS`, instead of a model.
        policies: Under test, by default that of the model, and all of them for the nine balls.
        options: Arms, see `arms.build_arms`.
        max_visual_tokens: Most of an image, instead of the model's own.
        limit: Most groups of matched pictures in each set.
        seed: Of the pictures.

    Raises:
        AnswererError: The options contradict one another.
        ArmError: There is no such arm.
        SlicingError: There is no such policy.
    """
    if model_kind not in _KINDS:
        raise AnswererError(
            f"--model-kind is {model_kind!r}{suggestion(model_kind, _KINDS)}; expected one of {', '.join(_KINDS)}"
        )
    if sum(given is not None for given in (model, endpoint, script)) > 1:
        raise AnswererError("got more than one of --model, --endpoint and --scripted; leave all but one out")
    if (endpoint is None) != (endpoint_model is None):
        raise AnswererError("got one of --endpoint and --endpoint-model without the other; give both")
    seed = DEFAULT_SEED if seed is None else seed
    slices_by_itself = endpoint is not None or model_kind == "transformers"
    # Pictures for models unknown are made for our default slicing; a script slices as the bundled model does.
    slicing = SlicingConfig() if slices_by_itself else read_slicing_config(model)
    if max_visual_tokens is not None:
        slicing = replace(slicing, max_visual_tokens=max_visual_tokens)
    tested = [replace(slicing, policy=name) for name in dict.fromkeys(policies or (slicing.policy,))]
    answerer: Answerer
    if endpoint is not None and endpoint_model is not None:
        answerer = EndpointAnswerer(endpoint, endpoint_model, slicing, timeout)
    elif script is not None:
        answerer = ScriptedAnswerer(script, slicing)
    elif model_kind == "transformers":
        if model is None:
            raise AnswererError("--model-kind transformers needs a model; give its folder with --model")
        answerer = TransformersAnswerer(model, slicing)
    else:
        answerer = AssistantAnswerer(model, max_visual_tokens)
    pictures = all_pictures(tested, seed, limit)
    names: list[str | None] = [None] if slices_by_itself else [config.policy for config in tested]
    others = [] if policies or slices_by_itself else [name for name in POLICIES if name != slicing.policy]
    questions = build_questions(pictures, build_arms(names, options), [Arm(name) for name in others])
    return CountingTest(answerer, questions, seed)
