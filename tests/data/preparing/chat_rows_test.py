"""Rows in a chat template: as `elm generate` asks, with BOS once, and cut within the template."""

import numpy as np
import pytest
import small_decoder

from elm_jax.data.arrays.joined import Joined
from elm_jax.data.arrays.prepared import PreparedSplit
from elm_jax.data.arrays.prompt_rows import count_cut, prompts_of, rendering_in
from elm_jax.data.preparing.chat_rows import ChatFrame, with_chat
from elm_jax.data.prompts.chat_templates import ChatTemplate
from elm_jax.errors import InputError
from elm_jax.types import SpecialIds
from elm_jax.vocabularies import tokenizer_json
from elm_jax.vocabularies.vocabulary import Vocabulary

BOS = 1  # the token of the letter t
TEMPLATE = ChatTemplate("t[{{ messages[0].content }}]{% if add_generation_prompt %}A:{% endif %}")
CHOICES = ["yes", "no"]


@pytest.fixture(scope="module")
def vocabulary():
    """One token a byte; a decoder's, so that plain targets begin with a space."""
    return Vocabulary.from_bytes(tokenizer_json.with_ids(small_decoder.tokenizer(), pad_id=2, eos_id=2))


@pytest.fixture(scope="module")
def plain(vocabulary):
    def row(index, text):
        said = [[*vocabulary.encode_target(choice), 2] for choice in CHOICES]
        return {"inputs": [*vocabulary.encode(text), 2], "targets": said[index % 2], "choices": said,
                "text": {"inputs": text, "targets": CHOICES[index % 2], "choices": CHOICES, "index": index}}

    return PreparedSplit.from_rows("toys", "train", {"kind": "rank"},
                                   [row(0, "is it"), row(1, "x" * 40), row(2, "")])


@pytest.mark.parametrize("bos", [None, BOS])
def test_prompts_are_the_template_and_answers_follow_at_once(vocabulary, plain, bos):
    made = with_chat(plain, vocabulary, ChatFrame(TEMPLATE, bos, 20))
    form = Joined(SpecialIds(pad=2, eos=2, start=None, bos=bos))
    prompts = [vocabulary.decode(form.prompt(made.inputs(number), 20)) for number in range(3)]
    room = 20 - 1 - len("t[]A:") + (bos is not None)
    assert prompts == ["t[is it]A:", f"t[{'x' * room}]A:", "t[]A:"] and made.info["chat_cut"] == 1
    assert vocabulary.decode(plain.targets(0)) == " yes" and vocabulary.decode(made.targets(0)) == "yes"
    assert [vocabulary.decode(choice) for choice in made.choices(1)] == CHOICES
    for number in range(3):
        assert made.text(number) == plain.text(number) and made.label(number) == plain.label(number)
        assert made.targets(number)[-1] == made.inputs(number)[-1] == 2
    batch = form.make([made.example(0)], {"inputs": 20, "targets": 8}, 1)
    predicted = batch["target_tokens"][0][batch["loss_weights"][0] == 1]
    np.testing.assert_array_equal(predicted, [*vocabulary.encode("yes"), 2])


def test_a_task_that_cuts_on_the_left_keeps_the_end_of_a_text(vocabulary):
    text = "".join(map(chr, range(65, 105)))
    row = {"inputs": [3, 2], "targets": [3, 2],
           "text": {"inputs": text, "targets": "a", "choices": [], "index": 0}}
    form = Joined(SpecialIds(pad=2, eos=2, start=None, bos=BOS))
    for side, kept in (("left", text[-15:]), ("right", text[:15])):
        split = PreparedSplit.from_rows("toys", "train", {"kind": "generation", "cut_prompt": side}, [row])
        made = with_chat(split, vocabulary, ChatFrame(TEMPLATE, BOS, 20))
        prompt, = prompts_of(made, form, 20)
        assert vocabulary.decode(prompt) == f"t[{kept}]A:" and len(prompt) == 20
        assert (count_cut(made, form, 20), rendering_in(made), rendering_in(split)) == (1, "chat", "plain")


def test_a_template_that_leaves_no_room_is_refused(vocabulary, plain):
    with pytest.raises(InputError, match=r"template alone is longer(.|\n)*toys train, row 0(.|\n)*at most 4"):
        with_chat(plain, vocabulary, ChatFrame(TEMPLATE, None, 4))
