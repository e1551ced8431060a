"""Texts to be written: ``mini_data_to_text`` and ``mini_note``."""

from elm_jax.tasks.embedded.draw import Draw
from elm_jax.tasks.embedded.lexicon import WORDS, words

_WORDS = WORDS | {
    "color_name": words("Golden, Silver, Crimson, White, Blue, Green, Black, Copper"),
    "sign": words("Spoon, Door, Lantern, Crown, Anchor, Garden, Swan, Mill"),
    "place": words("cafe, restaurant, pub, tea room, snack bar"),
    "price": words("low, moderate, high"),
    "near": words("river, market, harbor, station, park, museum"),
    "rating": words("one, two, three, four, five"),
    "lines": words("steam train, ferry, night bus, tram, express train"),
    "fur": words("black, white, brown, gray, spotted"),
    "music": words("jazz, folk music, opera, choir songs, piano music"),
}

_RECORDS: tuple[tuple[str, tuple[str, ...]], ...] = (
    ("name: {name}; type: {place}; food: {food}; price: {price}; near: {near}",
     ("{name} is a {place} near the {near} that serves {food} at a {price} price.",
      "near the {near} there is a {place} called {name}, which offers {food} at {price} prices.")),
    ("name: {name}; type: {place}; town: {town}; opens: {clock}; rating: {rating} stars",
     ("{name} is a {place} in {town} with a rating of {rating} stars, and it opens at {clock}.",
      "the {place} {name} in {town} opens at {clock} and is rated {rating} stars.")),
    ("line: {lines}; from: {town}; to: {town2}; day: {day}; departs: {clock}",
     ("the {lines} from {town} to {town2} leaves on {day} at {clock}.",
      "on {day} at {clock} a {lines} departs from {town} to {town2}.")),
    ("person: {person} {surname}; born: {year}; town: {town}; job: {job}",
     ("{person} {surname}, born in {town} in {year}, is a {job}.",
      "{person} {surname} is a {job} who was born in {year} in {town}.")),
    ("event: concert; music: {music}; artist: {person} {surname}; hall: {building}; day: {day}",
     ("{person} {surname} will give a concert of {music} in the {building} on {day}.",
      "on {day} you can hear {person} {surname} perform {music} in the {building}.")),
    ("pet: {animal}; name: {person}; color: {fur}; age: {small} years; owner: {person2}",
     ("{person} is a {fur} {animal} of {small} years that belongs to {person2}.",
      "{person2} owns a {fur} {animal} called {person}, which is {small} years old.")),
    ("item: {object}; color: {color}; price: {number} crowns; seller: {person}; town: {town}",
     ("{person} from {town} sells a {color} {object} for {number} crowns.",
      "a {color} {object} is for sale by {person} in {town} for {number} crowns.")),
    ("town: {town}; country: {country}; founded: {year}; sight: {building}; market: {day}",
     ("{town} in {country} was founded in {year}, has a {building} and holds a market on {day}.",
      "founded in {year}, {town} is a town in {country} with a {building} and a market on {day}.")),
)


def _named(draw: Draw) -> dict[str, str]:
    return {"name": f"The {draw.pick(_WORDS['color_name'])} {draw.pick(_WORDS['sign'])}"}


def data_to_text_row(draw: Draw, turn: int) -> dict[str, str]:
    """A row of ``mini_data_to_text``: ``data`` (named fields), ``text`` that says the same."""
    record, texts = _RECORDS[turn % len(_RECORDS)]
    slots = _named(draw)
    fields = draw.shuffled(record.split("; ")[1:])
    frame = "; ".join([record.split("; ")[0], *fields])
    text = draw.pick(texts)
    for name in _slot_order(record):
        draw.bind(name, _WORDS, slots)
    return {"data": _plain(frame, slots), "text": draw.bind(text, _WORDS, slots)}


def _slot_order(record: str) -> list[str]:
    return [part[: part.index("}") + 1] for part in ("{" + rest for rest in record.split("{")[1:])]


def _plain(frame: str, slots: dict[str, str]) -> str:
    for name, word in slots.items():
        frame = frame.replace(f"{{{name}}}", word)
    return frame


_NOTES: tuple[tuple[tuple[tuple[str, ...], ...], tuple[str, ...]], ...] = (
    ((("the meeting in the {building} cannot take place on {day}.",
       "on {day} we cannot meet in the {building}."),
      ("{person} is ill, and the heating is broken.", "{person} has lost the key."),
      ("we will meet on {day2} at {clock} instead.", "the new date is {day2} at {clock}.")),
     ("the meeting is moved from {day} to {day2}.",)),
    ((("please buy some {food} and {small} candles when you are in {town}.",
       "if you go to {town}, get some {food} and {small} candles."),
      ("the guests come at {clock}.", "{person} and {person2} are coming for dinner."),
      ("I will be home late.", "the money is in the {object}.")),
     ("someone should buy {food} and candles.",)),
    ((("our {animal} has been missing since {day}.", "since {day} nobody has seen our {animal}."),
      ("it is {fur} and a bit shy.", "it is {fur} all over and very shy."),
      ("please call {person} {surname} in {town} if you see it.",
       "whoever finds it can call {person} {surname} in {town}.")),
     ("{person} {surname} is looking for a lost {animal}.",)),
    ((("the road from {town} to {town2} is closed until {day}.",
       "until {day} nobody can drive from {town} to {town2}."),
      ("workers are repairing the old bridge.", "a tree fell on the road."),
      ("buses will go by way of {town3}.", "drivers should take the road by {town3}.")),
     ("the road from {town} to {town2} stays closed until {day}.",)),
    ((("{person} will be {number} years old on {day}.", "on {day} {person} turns {number}."),
      ("we want to surprise {person} with a party in the {building}.",
       "there will be a secret party for {person} in the {building}."),
      ("bring {food}, and do not say a word.", "be there at {clock}, and be quiet.")),
     ("there will be a surprise party for {person} on {day}.",)),
    ((("I borrowed your {color} {object} on {day}.",
     "on {day} I took your {color} {object} along."),
      ("sorry, it fell down the stairs and broke.", "I am sorry that it got broken on the way."),
      ("I will buy you a new one in {town}.", "{person} will bring you another one from {town}.")),
     ("the writer broke a {object} and will replace it.",)),
    ((("the {job} {person} {surname} needs help in the {building}.",
       "{person} {surname}, the {job} at the {building}, is looking for a helper."),
      ("the work is easy and pays {number} crowns a day.", "you would earn {number} crowns a day."),
      ("ask there on {day} before {clock}.", "come by on {day} if you are free.")),
     ("{person} {surname} is looking for a helper in the {building}.",)),
)


def note_row(draw: Draw, turn: int) -> dict[str, str]:
    """A row of ``mini_note``: ``note``, ``summary`` in one sentence."""
    sentences, summaries = _NOTES[turn % len(_NOTES)]
    slots: dict[str, str] = {}
    note = " ".join(draw.bind(draw.pick(frames), _WORDS, slots) for frames in sentences)
    return {"note": note, "summary": draw.bind(draw.pick(summaries), _WORDS, slots)}
