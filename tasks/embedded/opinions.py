"""Opinions, questions, feelings and goods.

``mini_review``, ``mini_question``, ``mini_emotion`` and ``mini_product``.
"""

from elm_jax.tasks.embedded.draw import Draw
from elm_jax.tasks.embedded.lexicon import WORDS, words

SENTIMENTS = ("negative", "positive")
QUESTIONS = ("person", "place", "time", "number", "reason")
EMOTIONS = ("joy", "sadness", "anger", "fear")
PRODUCTS = ("cook", "gardener", "tailor", "clerk")
"""Trades for which products are made. The passages hold each: a base does not say words it never read."""

_THINGS: dict[str, tuple[str, ...]] = {
    "cafe": words("coffee, service, menu, breakfast, waiter, cake"),
    "hotel": words("bed, view, staff, breakfast, bathroom, location"),
    "movie": words("plot, acting, music, ending, dialogue, camera work"),
    "novel": words("plot, hero, language, ending, first chapter, dialogue"),
    "phone": words("screen, battery, camera, sound, case, keyboard"),
    "concert": words("singer, sound, band, choice of songs, stage, finale"),
    "tour": words("guide, bus, route, lunch, museum visit, schedule"),
}
_GOOD = words("excellent, wonderful, charming, superb, delightful, splendid, impressive, lovely, "
              "first-rate, brilliant, pleasant, outstanding, great, beautiful")
_BAD = words("terrible, awful, disappointing, dreadful, poor, annoying, shabby, dull, horrible, "
             "mediocre, unpleasant, hopeless, bad, sloppy")
_ADJECTIVES = {"positive": _GOOD, "negative": _BAD}
_OPINION = (
    "the {aspect} was {adjective}.", "I found the {aspect2} {adjective2}.",
    "everyone in our group called the {aspect} {adjective}.",
    "what a {adjective} {aspect2}!", "the {aspect} seemed {adjective} from the start.",
    "even my {relative} thought the {aspect2} was {adjective2}.")
_NEGATED = {  # a word of the other side, denied
    "positive": ("the {aspect3} was not {opposite} at all.", "nothing about it was {opposite}."),
    "negative": ("the {aspect3} was anything but {opposite}.", "nothing about it was {opposite}."),
}
_VERDICT = {
    "positive": (
        "I would choose it again any time.", "we recommend it to all our friends.",
        "it was worth every penny.", "I enjoyed every bit of it.", "it made my day.",
        "I will tell everybody in {town} about it.", "ten out of ten.",
        "I was happy with the whole thing."),
    "negative": (
        "I would never choose it again.", "we warn all our friends about it.",
        "it was a waste of money.", "I regretted every bit of it.", "it spoiled my day.",
        "I want my money back.", "one star is already too much.",
        "I was bored and let down by the whole thing."),
}
_SCENE = (
    "we chose this {thing} in {town} on a {weather} {day}.",
    "my {relative} told me about this {thing}.", "I tried this {thing} last {month}.",
    "this {thing} was recommended by my {relative}.",
    "{person} and I picked this {thing} because of an advertisement.",
    "it was my first {thing} of this kind.")


def review_row(draw: Draw, turn: int) -> dict[str, str]:
    """A row of ``mini_review``: ``review``, ``sentiment``. Some concede a point to the other side."""
    sentiment = SENTIMENTS[turn % 2]
    other = SENTIMENTS[1 - turn % 2]
    thing = draw.pick(tuple(_THINGS))
    lists = WORDS | {"aspect": _THINGS[thing], "adjective": _ADJECTIVES[sentiment],
                     "opposite": _ADJECTIVES[other]}
    slots = {"thing": thing}
    parts = [draw.pick(_OPINION), draw.pick(_VERDICT[sentiment])]
    if draw.chance(0.3):
        parts.insert(0, draw.pick(_NEGATED[sentiment]))
    elif draw.chance(0.4):
        parts[0] = "the {aspect4} may have been {opposite}, but " + parts[0]
        parts[0] = parts[0].replace("but what a {adjective} {aspect2}!",
                                    "but the {aspect2} was {adjective} and so was the rest.")
    else:
        parts.insert(0, draw.pick([frame for frame in _OPINION if frame != parts[0]]))
        parts[0] = parts[0].replace("{aspect", "{aspect5").replace("{adjective", "{adjective5")
    if draw.chance(0.75):
        parts.insert(0, draw.pick(_SCENE))
    return {"review": " ".join(draw.bind(part, lists, slots) for part in parts),
            "sentiment": sentiment}


_BUILT = WORDS | {
    "work": words("tower, mill, lighthouse, school, theater, chapel, castle, observatory, "
                  "market hall, water tower, railway station, gallery"),
    "made": words("built, designed, repaired, painted, planned"),
}
_ASK = {
    "person": (
        "who {made} the {work} of {town}?", "which {job} {made} the {work} first?",
        "what is the name of the {job} who {made} the {work}?",
        "whose idea was the {work} in {town}?",
        "do you know by whom the {work} was {made}?",
        "can you name the man or woman who {made} the {work}?"),
    "place": (
        "where was the {work} {made}?", "in which town can I see the {work} today?",
        "at what address does the {job} live who {made} the {work}?",
        "to which country was the {work} moved?",
        "where does the {job} keep the plans of the {work}?",
        "which village lies closest to the {work}?"),
    "time": (
        "when was the {work} {made}?", "in which year was the {work} {made}?",
        "on what day did the {job} open the {work}?",
        "at what hour does the {work} of {town} close?",
        "since when has the {work} stood there?", "in which century did they plan the {work}?"),
    "number": (
        "how many people {made} the {work}?", "how many steps does the {work} of {town} have?",
        "how tall is the {work} in feet?", "what did the {work} cost in crowns?",
        "how many visitors come to the {work} each {month}?",
        "what percentage of the {work} is made of stone?"),
    "reason": (
        "why was the {work} {made} so late?", "for what reason did the {job} leave the {work}?",
        "what was the motive of the {job} who {made} the {work}?",
        "how come nobody {made} a {work} before?", "what made people in {town} fear the {work}?",
        "what purpose did the {work} of {town} serve?"),
}
_BEFORE = (
    "our class visits {town} on {day}.", "I am reading a book about {town}.",
    "{person} wrote to me from {town}.", "my {relative} collects stories about old buildings.",
    "we stood in front of it last {month2} and wondered.",
    "the guide {person} {surname} told us a lot, but not this.",
    "{person2} and {person3} have been arguing about this since {day}.",
    "here is a question for the quiz on {day}.")


def question_row(draw: Draw, turn: int) -> dict[str, str]:
    """A row of ``mini_question``: ``question`` with what leads up to it, ``asks_for``."""
    kind = QUESTIONS[turn % len(QUESTIONS)]
    slots: dict[str, str] = {}
    frames = (draw.pick(_BEFORE), draw.pick(_ASK[kind]))
    return {"question": " ".join(draw.bind(frame, _BUILT, slots) for frame in frames),
            "asks_for": kind}


_FEEL = {
    "joy": (
        "I could dance through the whole {building}!", "this is the best {day} of the year.",
        "I cannot stop smiling.", "we laughed and sang all evening.",
        "I am so glad and grateful.", "my heart jumps with happiness.", "hooray, what luck!"),
    "sadness": (
        "I cried the whole way to {town}.", "the rooms feel so empty now.",
        "I miss them more than I can say.", "nothing can cheer me up this {day}.",
        "my heart is heavy.", "I have been in tears since {day}.", "I feel so alone."),
    "anger": (
        "I slammed the door of the {building}.", "how dare they treat me like that!",
        "I am furious and I told them so.", "this makes my blood boil.",
        "I have had enough of these lies.", "they had no right to do it!",
        "I want to shout at all of them."),
    "fear": (
        "my hands will not stop shaking.", "I dare not go near the {building} any more.",
        "I lay awake and listened to every noise.", "what if it happens again tonight?",
        "I am scared to death.", "I was too frightened to move.",
        "I keep looking over my shoulder."),
}
_CAUSE = {
    "joy": (
        "I won the first prize in {town}!", "{person} has come home after {small} years.",
        "our {animal} has been found alive.", "I passed the exam to become a {job}.",
        "we are getting married in {month}."),
    "sadness": (
        "our old {animal} died on {day}.", "{person} is moving to {country} for good.",
        "my {relative} is very ill.", "we had to sell the house in {town}.",
        "the {object} that my {relative} left me is lost."),
    "anger": (
        "{person} broke my {object} and blamed me.", "the {job} cheated us out of {number} crowns.",
        "somebody kicked our {animal}.", "they made us wait {small} hours and then closed.",
        "{person} read my letters behind my back."),
    "fear": (
        "a stranger with a {object} followed me home.", "something is scratching under the floor.",
        "the doctor wants to see me at once.", "a wild bull is loose in {town}.",
        "the ice on the lake cracked under {person}."),
}
_OPEN = ("dear {person5}, I must tell you this.", "hi {person5}!", "a short note from {town5}.",
         "you will not believe my {day5}.", "hello from the {building5}.")


def emotion_row(draw: Draw, turn: int) -> dict[str, str]:
    """A row of ``mini_emotion``: ``message``, ``emotion``."""
    emotion = EMOTIONS[turn % len(EMOTIONS)]
    frames = [draw.pick(_CAUSE[emotion]), *draw.sample(_FEEL[emotion], draw.number(1, 2))]
    if draw.chance(0.3):
        frames = draw.shuffled(frames)
    slots: dict[str, str] = {}
    frames.insert(0, draw.pick(_OPEN))
    return {"message": " ".join(draw.bind(frame, WORDS, slots) for frame in frames),
            "emotion": emotion}


_GOODS = {
    "cook": words("frying pan, kettle, bread knife, mixing bowl, baking tray, pepper mill, whisk, "
                  "soup ladle, cutting board, pot"),
    "gardener": words("watering can, rake, lawn mower, flower pot, hose, hedge trimmer, spade, "
                      "bird table, seed tray, wheelbarrow"),
    "tailor": words("sweater, raincoat, scarf, blouse, wool hat, skirt, shirt, jacket, "
                    "cardigan, dress"),
    "clerk": words("headset, keyboard, tablet, charger, speaker, monitor, router, webcam, "
                   "phone, camera"),
}
_USE = {
    "cook": ("easy to wash after dinner.", "perfect for soups, sauces and cakes.",
             "safe in the dishwasher.", "for cooks who love {food}.",
             "the handle stays cool on the stove."),
    "gardener": ("for everybody who grows roses and tomatoes.", "for lawns, hedges and flower beds.",
                 "does not rust in wet soil.", "can be left out in the rain all {month}.",
                 "helps against weeds between the plants."),
    "tailor": ("made to keep you warm in {month}.", "comes in sizes small to extra large.",
               "wash by hand, do not iron.", "the seams are sewn by hand.",
               "fits well and looks good with jeans."),
    "clerk": ("works with every computer.", "connects to your network without wires.",
              "has a small screen and {number} settings.", "charges through any cable.",
              "the software is updated each {month}."),
}
_SELL = ("buy this {color} {goods} from {firm}.", "new from {firm}: a {goods} in {color}.",
         "our {goods} now comes in {color} and {color2}.", "a {goods} made in {town} by {firm}.",
         "the famous {firm} {goods}, now at a low price.")
_PRAISE = ("made in {country}.", "with a guarantee of {small2} years.",
           "a fine present for your {relative}.",
           "only {number2} crowns until {day}.",
           "tested by {person} {surname} of the {town2} Herald.")


def product_row(draw: Draw, turn: int) -> dict[str, str]:
    """A row of ``mini_product``: ``description``, ``category``."""
    category = PRODUCTS[turn % len(PRODUCTS)]
    lists = WORDS | {"goods": _GOODS[category],
                     "firm": words("Alba, Nordwind, Casa, Tilda, Bruno, Meridian, Otto, Linnea")}
    frames = [draw.pick(_SELL), *draw.sample(_USE[category], draw.number(1, 2)), draw.pick(_PRAISE)]
    slots: dict[str, str] = {}
    return {"description": " ".join(draw.bind(frame, lists, slots) for frame in frames),
            "category": category}
