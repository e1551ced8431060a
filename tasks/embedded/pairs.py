"""Pairs of sentences: ``mini_entailment``, ``mini_paraphrase`` and ``mini_ending``."""

import dataclasses

from elm_jax.tasks.embedded.draw import Draw
from elm_jax.tasks.embedded.lexicon import KINDS, WORDS, words

_WORDS = WORDS | {
    "done": words("repaired, painted, cleaned, carried, wrapped, washed, borrowed, found"),
    "crowd": words("children, students, farmers, tourists, neighbors, sailors"),
    "plant": words("trees, roses, onions, beans, tulips, potatoes"),
    "kind": tuple(KINDS),
    "thing": tuple(thing for things in KINDS.values() for thing in things),
}


@dataclasses.dataclass(frozen=True)
class Pattern:
    """First sentences, and second ones that follow from them, or that do not."""

    first: tuple[str, ...]
    follows: tuple[str, ...]
    fails: tuple[str, ...]


_ENTAILMENT = (
    Pattern(
        ("{person} bought a {thing} in {town} on {day}.",
         "on {day} {person} bought a {color} {thing} for {number} crowns.",
         "{person} saved money for {small} months and then bought a {thing} in {town}."),
        ("{person} bought a {kind}.", "{person} has spent money on a {thing}.",
         "{person} now owns a {kind}.", "{person} did not keep all of the money.",
         "somebody bought a {thing}."),
        ("{person} bought a {kind2}.", "{person} never bought anything.",
         "{person2} bought a {kind} for {person3}.", "{person} did not buy a {thing}.",
         "{person} refused to spend any money.")),
    Pattern(
        ("{person}, a {job} from {town}, {done} the {color} {object} on {day}.",
         "the {color} {object} was {done} by {person}, a {job} from {town}.",
         "before lunch {person}, the {job} from {town}, {done} the {color} {object}."),
        ("a {job} {done} the {object}.", "the {object} was {done} by {person}.",
         "{person} {done} a {color} {object}.", "{person} is a {job}.",
         "{person} comes from {town}."),
        ("a {job2} {done} the {object}.", "the {object} was {done} by {person2}.",
         "nobody {done} the {object}.", "{person} is not a {job}.", "{person} comes from {town2}.",
         "the {object} was never {done}.", "{person} {done} a {color2} {object}.")),
    Pattern(
        ("{number} {crowd} from {town} planted {plant} by the river on {day}.",
         "last {month} {number} {crowd} planted {plant} all over {town}.",
         "although it was {weather}, {number} {crowd} planted {plant} near {town}."),
        ("{crowd} planted {plant}.", "more than ten {crowd} planted {plant}.",
         "{plant} were planted by {crowd}.", "some {crowd} planted something.",
         "{plant} were planted by a group of {number}."),
        ("{crowd2} planted {plant}.", "nobody planted {plant}.", "the {crowd} planted no {plant}.",
         "{plant} were never planted there.", "only one of the {crowd} planted {plant}.",
         "the {crowd} planted {plant2} only.")),
    Pattern(
        ("{person} sold the {object} to {person2} for {number} crowns in {town}.",
         "in {month} {person2} paid {person} {number} crowns for the {object}.",
         "{person} needed money and sold the {object} to {person2} on {day}."),
        ("{person2} bought the {object} from {person}.", "{person} received money from {person2}.",
         "{person2} paid for the {object}.", "{person} did not keep the {object}.",
         "the {object} was sold to {person2}."),
        ("{person} bought the {object} from {person2}.",
         "{person} received nothing from {person2}.",
         "{person2} never paid for the {object}.", "{person} kept the {object}.",
         "the {object} was sold to {person3}.", "nobody wanted to buy the {object}.")),
    Pattern(
        ("all {crowd} of {town} met at the {building} on {day} at {clock}.",
         "on {day} every one of the {number} {crowd} was waiting at the {building} of {town}.",
         "at {clock} the {crowd} of {town} stood in front of the {building}, and none was missing."),
        ("some {crowd} were at the {building}.", "the {crowd} of {town} were at the {building}.",
         "there were {crowd} at the {building}.", "not one of the {crowd} stayed away."),
        ("no {crowd} were at the {building}.", "the {crowd} of {town} were at the {building2}.",
         "nobody was at the {building}.", "half of the {crowd} never came to the {building}.",
         "the {crowd} did not come.", "one could only see {crowd2} in {town}.")),
    Pattern(
        ("{person} is older than {person2}, but both live in {town} with their {relative}.",
         "{person} was born {small} years before {person2}, in {month}.",
         "when {person2} was born on a {day}, {person} was already {small} years old."),
        ("{person2} is younger than {person}.", "{person} is older than {person2}.",
         "{person} and {person2} are not of the same age."),
        ("{person} is younger than {person2}.", "{person2} is older than {person}.",
         "{person} and {person2} are of the same age.", "{person2} was never born.",
         "nobody is older than {person2}.")),
)


def entailment_row(draw: Draw, turn: int) -> dict[str, str]:
    """A row of ``mini_entailment``: ``premise``, ``hypothesis``, ``follows`` (yes or no)."""
    pattern = draw.pick(_ENTAILMENT)
    kinds = draw.sample(tuple(KINDS), 2)
    slots = {"kind": kinds[0], "kind2": kinds[1], "thing": draw.pick(KINDS[kinds[0]])}
    first = draw.bind(draw.pick(pattern.first), _WORDS, slots)
    frames = pattern.follows if turn % 2 else pattern.fails
    known = [frame for frame in frames if _settled(frame, slots)]
    second = draw.bind(draw.pick(known), _WORDS, slots)
    return {"premise": first, "hypothesis": second, "follows": "yes" if turn % 2 else "no"}


def _settled(frame: str, slots: dict[str, str]) -> bool:
    """Whether the first sentence settled every slot that is not there to be another word."""
    return all(f"{{{name}}}" not in frame or name in slots
               for name in ("town", "color", "day", "number", "small", "job", "clock"))


_SAME = (
    Pattern(
        ("the {shop} opens at {clock} on {day}.",
         "on {day} you can enter the {shop} from {clock}."),
        ("on {day} the {shop} is open from {clock}.",
         "the doors of the {shop} open on {day} at {clock}."),
        ("on {day} the {shop} stays closed.",
         "the {shop} does not open before {clock2} on {day}.")),
    Pattern(
        ("{person} gave {person2} a {color} {object}.",
         "a {color} {object} was given to {person2} by {person}."),
        ("{person2} got a {color} {object} from {person}.",
         "{person} handed a {color} {object} to {person2} as a gift."),
        ("{person} refused to give {person2} a {object}.",
         "{person} got a {color} {object} from {person2}.",
         "{person2} got a {color2} {object} from {person}.")),
    Pattern(
        ("it was very {hot} in {town} last {month}.", "last {month} {town} had {hot} days."),
        ("in {month} the days in {town} were {hot}.", "{town} saw {hot} weather in {month}."),
        ("in {month} {town} had no {hot} days.", "it was never {hot} in {town} last {month}.",
         "it was very {hot} in {town2} last {month}.")),
    Pattern(
        ("{person} likes {food} better than {food2}.",
         "when it comes to meals, {person} ranks {food} above {food2}."),
        ("{person} prefers {food} to {food2}.", "{person} would rather eat {food} than {food2}."),
        ("{person} prefers {food2} to {food}.", "{person} would rather eat {food2} than {food}.",
         "{person} cannot stand {food}.")),
    Pattern(
        ("the {job} found the {animal} near the {building}.",
         "near the {building} the {animal} was found by the {job}."),
        ("it was the {job} who found the {animal} by the {building}.",
         "the {animal} was discovered close to the {building} by the {job}."),
        ("the {job} never found the {animal}.", "the {animal} found the {job} near the {building}.",
         "the {job} found the {animal} near the {building2}.")),
    Pattern(
        ("{person} arrived in {town} before {person2}.",
         "{person2} reached {town} later than {person}."),
        ("{person} got to {town} earlier than {person2}.",
         "{person2} came to {town} after {person}."),
        ("{person} got to {town} later than {person2}.",
         "{person2} came to {town} before {person}.",
         "{person} never came to {town}.")),
)
_SAME_WORDS = _WORDS | {
    "shop": WORDS["building"], "hot": words("hot, cold, rainy, windy, dry"),
}


def paraphrase_row(draw: Draw, turn: int) -> dict[str, str]:
    """A row of ``mini_paraphrase``: ``first``, ``second``, ``same`` (yes: same meaning, or no)."""
    pattern = draw.pick(_SAME)
    slots: dict[str, str] = {}
    first = draw.bind(draw.pick(pattern.first), _SAME_WORDS, slots)
    second = draw.bind(draw.pick(pattern.follows if turn % 2 else pattern.fails), _SAME_WORDS, slots)
    return {"first": first, "second": second, "same": "yes" if turn % 2 else "no"}


_STORIES = (
    Pattern(
        ("{person} had practiced the {music} every day for {small} months.",
         "{person} wanted to play the {music} better than anybody in {town}."),
        ("At the concert {person} played without a mistake and the audience clapped.",
         "the {music} teacher was proud of the progress."),
        ("{person} had never seen a {music} before.",
         "{person} put the fish back into the river.")),
    Pattern(
        ("{person} forgot to set the alarm and slept until {clock}.",
         "the alarm of {person} did not ring on {day}."),
        ("{person} missed the bus and came to work late.",
         "the boss asked why {person} was so late."),
        ("{person} came to work much too early.", "{person} harvested the apples in a basket.")),
    Pattern(
        ("{person} planted beans behind the house and watered them each morning.",
         "{person} dug a small garden in {month} and sowed carrots."),
        ("in summer the plants were tall and {person} had plenty of vegetables.",
         "{person} cooked the fresh harvest for the whole family."),
        ("nothing had ever been planted there.", "{person} parked the airplane beside the train.")),
    Pattern(
        ("it had rained for {small} days, and the river near {town} was rising.",
         "the water stood close to the door of the {building} in {town}."),
        ("people carried sandbags to keep the flood out.", "the families moved to higher ground."),
        ("people complained about the dust and the long drought.",
         "the families were glad that it had not rained at all.")),
    Pattern(
        ("{person} found a purse with {number} crowns at the {building}.",
         "a purse full of money lay in front of {person} on the street of {town}."),
        ("{person} took it to the police, and the owner was thankful.",
         "{person} looked for the owner and gave the money back."),
        ("{person} was sad that nobody had ever lost a purse.",
         "the tooth of {person} hurt less after that.")),
    Pattern(
        ("{person} had a bad toothache all {day}.", "{person} could not eat because a tooth hurt."),
        ("{person} went to the dentist, who took the tooth out.",
         "after a visit to the dentist the pain was gone."),
        ("{person} was glad never to have had a toothache.",
         "the bus arrived with the letters from {country}.")),
    Pattern(
        ("the {animal} of {person} ran away on {day}.",
         "{person} could not find the {animal} anywhere in {town}."),
        ("{person} put up posters, and a neighbor brought the {animal} home.",
         "at last the {animal} came back, hungry and tired."),
        ("{person} had never had any pet.", "the {animal} had never left the house.")),
    Pattern(
        ("{person} put the {food} into the oven and fell asleep.",
         "{person} left the {food} on the stove and went out."),
        ("when {person} came back to the kitchen, dinner was burned.",
         "smoke filled the kitchen, and {person} had to start dinner again."),
        ("thick ice still covered the {food}.",
         "{person} put stamps on the letter to {town2}.")),
    Pattern(
        ("{person} wrote a long letter to a friend in {country}.",
         "{person} missed an old friend who lives in {country}."),
        ("{small} weeks later an answer came by mail.",
         "the friend read the letter and wrote back at once."),
        ("{person} never wrote a letter to anybody.", "the dentist said that the tooth was fine.")),
    Pattern(
        ("{person} climbed the tree to fetch the kite, and a branch broke.",
         "{person} slipped on the icy steps of the {building}."),
        ("{person} fell and broke an arm.", "the doctor put the arm of {person} in plaster."),
        ("{person} got home without a scratch.", "the carrots were ready to be harvested.")),
)
_STORY_WORDS = WORDS | {"music": words("violin, guitar, trumpet, flute, piano")}
_ASIDE = ("{person5} was there and saw it all.", "it was a {weather} {day5} in {month5}.",
          "this happened near {town5} in {year5}.", "{person5} from {town5} tells the story.",
          "the {relative5} of {person5} remembers it well.")


def ending_row(draw: Draw, turn: int) -> dict[str, object]:
    """A row of ``mini_ending``: ``story``, ``endings`` (two), ``answer``.

    The wrong ending is one that does not fit, or one of another story.
    """
    pattern, other = draw.sample(_STORIES, 2)
    slots: dict[str, str] = {}
    frames = [draw.pick(pattern.first), draw.pick(_ASIDE)]
    story = " ".join(draw.bind(frame, _STORY_WORDS, slots) for frame in draw.shuffled(frames))
    right = draw.bind(draw.pick(pattern.follows), _STORY_WORDS, slots)
    wrong = draw.bind(draw.pick(pattern.fails if draw.chance(0.5) else other.follows),
                      _STORY_WORDS, slots)
    endings = [right, wrong] if turn % 2 else [wrong, right]
    return {"story": story, "endings": endings, "answer": right}
