"""Scenes and questions about them: ``mini_reading`` (pick) and ``mini_extraction`` (find a span)."""

import dataclasses

from elm_jax.tasks.embedded.draw import Draw
from elm_jax.tasks.embedded.lexicon import WORDS

ASKS = ("who", "where", "when")


@dataclasses.dataclass(frozen=True)
class Question:
    """A question that one slot of its scene answers.

    Attributes:
        frames: ways to ask it.
        answer: the slot.
        rivals: slots of the scene that are of the same sort, and wrong.
    """

    frames: tuple[str, ...]
    answer: str
    rivals: tuple[str, ...] = ()

    @property
    def sort(self) -> str:
        """Name of the list that the answer is a word of."""
        return self.answer.rstrip("0123456789")


@dataclasses.dataclass(frozen=True)
class Scene:
    """Frames of a short passage, one alternative a sentence, and questions about it."""

    sentences: tuple[tuple[str, ...], ...]
    questions: tuple[Question, ...]


_WORDS = WORDS | {"outdoors": tuple(f"the {word}" for word in WORDS["outdoors"]),
                  "building": tuple(f"the {word}" for word in WORDS["building"])}

SCENES = (
    Scene(
        (("on {day} {person} and {person2} walked to {outdoors} near {town}.",
          "{person} and {person2} spent {day} at {outdoors} near {town}."),
         ("{person} carried the {object}, while {person2} brought the {food}.",
          "{person2} had packed the {food}, and {person} the {object}."),
         ("a {job} showed them a {animal}.", "it was {weather}, and they saw a {animal}.")),
        (Question(("what did {person} carry?", "which thing did {person} have along?"), "object",
                  ("food", "animal")),
         Question(("what did {person2} bring to eat?", "which food did they have?"), "food",
                  ("object",)),
         Question(("which animal did they see?", "what animal was there?"), "animal", ("food",)),
         Question(("where did the two go?", "where were {person} and {person2}?"), "outdoors"),
         Question(("on which day did they go there?", "when was the trip?"), "day"),
         Question(("who brought the {food}?", "who was in charge of the food?"), "person2",
                  ("person",)))),
    Scene(
        (("the {color} {object} of {person} {surname} was stolen from {building} on {day}.",
          "on {day} a thief took the {color} {object} of {person} {surname} from {building}."),
         ("a {job} found it behind {building2} at {clock}.",
          "at {clock} a {job} saw it near {building2}."),
         ("{person2} {surname2} of {town} brought it back.",
          "in the end {person2} {surname2} from {town} returned it.")),
        (Question(("what was stolen?", "what did the thief take?"), "object"),
         Question(("what color was the {object}?",
         "which color did the stolen thing have?"), "color"),
         Question(("where was it stolen?", "from where was it taken?"), "building", ("building2",)),
         Question(("where was it found?", "where did somebody see it again?"), "building2",
                  ("building",)),
         Question(("on which day did the theft happen?", "when was it stolen?"), "day"),
         Question(("who found it?", "what was the finder's job?"), "job"),
         Question(("who brought it back?", "who returned the {object}?"), "person2", ("person",)),
         Question(("whose {object} was it?", "who was the owner?"), "person", ("person2",)))),
    Scene(
        (("{person} {surname} was born in {town} in {year}.",
          "in {year} {person} {surname} was born in {town}."),
         ("the family moved to {town2}, where {surname} became a {job}.",
          "later {surname} worked as a {job} in {town2}."),
         ("a street by {building} is named after {person}.",
          "{person2} wrote a book about this life.")),
        (Question(("where was {person} born?",
         "which town is the birthplace of {surname}?"), "town",
                  ("town2",)),
         Question(("where did {surname} work?", "to which town did {surname} go later?"), "town2",
                  ("town",)),
         Question(("in which year was {surname} born?", "when was {person} born?"), "year"),
         Question(("what was the job of {surname}?", "which trade did {person} take up?"), "job"))),
    Scene(
        (("the new course in {building} of {town} starts on {day} at {clock}.",
          "on {day} at {clock} a new course starts in {building} of {town}."),
         ("{person} {surname}, a {job}, teaches {small} pupils how to make {food}.",
          "{small} pupils will learn from {person} {surname}, a {job}, how to make {food}."),
         ("{person2} cleans up afterward.", "{person2} sells the tickets.")),
        (Question(("who teaches the course?", "who is the teacher?"), "person", ("person2",)),
         Question(("where is the course held?", "where does it take place?"), "building"),
         Question(("on which day does it start?", "when does the course begin?"), "day"),
         Question(("how many pupils are there?", "how many people will learn it?"), "small"),
         Question(("what do the pupils make?", "which dish is taught?"), "food"))),
    Scene(
        (("{person} lost a {object} on the way from {town} to {town2}.",
          "on the way from {town} to {town2} {person} lost a {object}."),
         ("a {job} named {person2} picked it up on {day}.",
          "on {day} it was picked up by {person2}, a {job}."),
         ("now it lies in {building}.", "it can be fetched from {building} until {month}.")),
        (Question(("who lost the {object}?", "whose {object} was lost?"), "person", ("person2",)),
         Question(("who picked it up?", "who was the finder?"), "person2", ("person",)),
         Question(("what was lost?", "which thing did {person} lose?"), "object"),
         Question(("where is it now?", "where does it lie?"), "building"),
         Question(("when was it picked up?", "on which day was it found?"), "day"))),
    Scene(
        (("{person} prepared {food} for the feast in {town} on {day}.",
          "for the feast in {town} on {day} {person} made {food}."),
         ("{person2} played the {object2}, and {person3} told stories about a {animal}.",
          "{person3} told stories about a {animal}, and {person2} hung up a {color} {object2}."),
         ("at {clock} all guests danced in {building}.", "the guests left {building} at {clock}.")),
        (Question(("who made the {food}?", "who cooked for the guests?"), "person",
                  ("person2", "person3")),
         Question(("who told stories?", "who told the guests about a {animal}?"), "person3",
                  ("person", "person2")),
         Question(("in which building were the guests?",
         "where exactly did the guests meet?"), "building"),
         Question(("in which town was the feast?", "which town held a feast?"), "town"),
         Question(("when was the feast?", "on which day did they feast?"), "day"),
         Question(("what were the stories about?", "which animal was in the stories?"), "animal",
                  ("object2",)))),
)

_WHO = frozenset(("person", "person2", "person3"))
_WHERE = frozenset(("outdoors", "building", "building2", "town", "town2"))
_WHEN = frozenset(("day", "year"))
_SORTS = {
    "person": "who", "job": "who", "town": "where", "building": "where", "outdoors": "where",
    "day": "when", "year": "when", "object": "what", "food": "what",
    "animal": "what", "small": "how many", "color": "which color"}
"""What sort of question the words of a list answer."""
_SPANS = {"who": _WHO, "where": _WHERE, "when": _WHEN}


def passage(draw: Draw, scene: Scene, slots: dict[str, str]) -> str:
    """The scene's passage; fills `slots`."""
    if "object2" in "".join(scene.sentences[1]):
        slots["object2"] = draw.pick(("violin", "guitar", "drum", "lantern", "mirror"))
        music = slots["object2"] in ("violin", "guitar", "drum")
        second = scene.sentences[1][0 if music else 1]
    else:
        second = draw.pick(scene.sentences[1])
    frames = (draw.pick(scene.sentences[0]), second, draw.pick(scene.sentences[2]))
    return " ".join(draw.bind(frame, _WORDS, slots) for frame in frames)


def _answerable(questions: tuple[Question, ...], slots: dict[str, str]) -> list[Question]:
    """The questions that the passage as drawn answers."""
    return [question for question in questions if question.answer in slots]


def _full(slot: str, slots: dict[str, str], text: str) -> str:
    """The slot's word; of a person, first and last name where the passage gives both."""
    last = slots.get(slot.replace("person", "surname"), "")
    name = f"{slots[slot]} {last}"
    return name if slot.startswith("person") and last and name in text else slots[slot]


def reading_row(draw: Draw, turn: int) -> dict[str, object]:
    """A row of ``mini_reading``: ``passage``, ``question``, ``choices`` (three), ``answer``.

    In two rows of three the wrong choices are words of the passage that answer another sort of
    question, which a small model can learn; in the others they are of the answer's own sort.
    """
    del turn
    scene = draw.pick(SCENES)
    slots: dict[str, str] = {}
    text = passage(draw, scene, slots)
    question = draw.pick(_answerable(scene.questions, slots))
    right = slots[question.answer]
    alike, unlike = _same_sort(draw, question, slots, text), _other_sorts(draw, question, slots)
    asked = draw.bind(draw.pick(question.frames), _WORDS, slots)
    unlike = [word for word in unlike if word.removeprefix("the ") not in asked]
    wrong = unlike[:2] if draw.chance(0.67) and len(unlike) > 1 else alike
    return {"passage": text, "question": asked, "choices": draw.shuffled([right, *wrong]),
            "answer": right}


def _same_sort(draw: Draw, question: Question, slots: dict[str, str], text: str) -> list[str]:
    """Two wrong answers of the right one's sort; in every other row one stands in the passage."""
    taken = set(slots.values())
    strangers = [word for word in _WORDS[question.sort]
                 if word not in taken and word.removeprefix("the ") not in text]
    wrong = draw.sample(strangers, 2)
    rivals = [slots[rival] for rival in question.rivals if rival in slots]
    if rivals and draw.chance(0.5):
        wrong[0] = draw.pick(rivals)
    return wrong


def _other_sorts(draw: Draw, question: Question, slots: dict[str, str]) -> list[str]:
    """Words of the passage, one of each sort but the answer's, in random order."""
    found: dict[str, str] = {}
    for slot in draw.shuffled(tuple(slots)):
        sort = _SORTS.get(slot.rstrip("0123456789"))
        if sort and sort != _SORTS[question.sort]:
            found.setdefault(sort, slots[slot])
    return list(found.values())


def extraction_row(draw: Draw, turn: int) -> dict[str, str]:
    """A row of ``mini_extraction``: ``passage``, ``question``, ``answer`` (a span of the passage)."""
    asks = ASKS[turn % len(ASKS)]
    fitting = [scene for scene in SCENES if any(
        question.answer in _SPANS[asks] for question in scene.questions)]
    while True:
        scene = draw.pick(fitting)
        slots: dict[str, str] = {}
        text = passage(draw, scene, slots)
        questions = [question for question in _answerable(scene.questions, slots)
                     if question.answer in _SPANS[asks]]
        if questions:
            question = draw.pick(questions)
            asked = draw.bind(draw.pick(question.frames), _WORDS, slots)
            return {"passage": text, "question": asked, "answer": _full(question.answer, slots, text),
                    "asks": asks}
