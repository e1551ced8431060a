"""Text that only pretraining reads: conversations, recipes, almanacs, explanations, walks."""

from elm_jax.tasks.embedded.draw import Draw
from elm_jax.tasks.embedded.lexicon import KINDS, WORDS, words

_WORDS = WORDS | {
    "spice": words("pepper, cinnamon, garlic, ginger, basil, parsley, thyme, mustard, vanilla, salt"),
    "cook": words("boil, fry, bake, roast, steam, stir, chop, grate, peel, simmer"),
    "pan": words("kettle, frying pan, mixing bowl, baking tray, pot, whisk, ladle, cutting board"),
    "plantname": words("tomato, cabbage, lettuce, pumpkin, carrot, lavender, ivy, fern, willow, birch, "
                       "maple, chestnut, thistle, clover, barley, wheat"),
    "yardtool": words("watering can, rake, lawn mower, flower pot, hose, hedge trimmer, spade, "
                      "wheelbarrow"),
    "cloth": words("wool, cotton, linen, silk, leather, velvet, denim, canvas"),
    "wear": words("raincoat, blouse, cardigan, dress, shirt, hat, glove, sock, belt, boot"),
    "device": words("tablet, charger, speaker, monitor, router, webcam, phone, keyboard, headset, "
                    "printer, radio, battery, computer"),
    "mood": words("happy, sad, angry, afraid, proud, lonely, grateful, nervous, jealous, calm, "
                  "hopeful, ashamed, curious, tired, cheerful, furious, anxious, gloomy"),
    "feeling": words("joy, sadness, anger, fear, pride, hope, envy, shame, love, surprise"),
    "quality": words("narrow, ancient, rough, fragile, famous, ordinary, crooked, hollow, smooth, heavy, "
                     "bright, dusty, plain, broken, splendid, tiny, enormous, strange, wide, round"),
    "manner": words("gentle, noisy, polite, clever, stubborn, honest, lazy, brave, patient, generous, "
                    "curious, shy, greedy, cautious, friendly, fierce"),
    "noun": words("valley, harbor, ladder, curtain, pillow, barrel, anchor, feather, pebble, window, "
                  "chimney, staircase, fence, tunnel, engine, wheel, letter, stamp, coin, purse, "
                  "drawer, envelope, painting, puzzle, marble, cellar, attic, balcony, corridor, "
                  "meadow, island, cliff, cave, waterfall, desert, canyon, swamp, glacier"),
    "creature": words("whale, dolphin, eagle, sparrow, spider, ant, bee, butterfly, lizard, snake, "
                      "frog, wolf, bear, deer, squirrel, hedgehog, bat, crow, swan, salmon, trout"),
    "does": words("sleeps through the winter, hunts at night, builds a nest of twigs, "
                  "swims against the current, lives in large groups, hides from the sun, "
                  "feeds on seeds and berries, sheds its skin, travels south in autumn, "
                  "protects its young, digs deep holes, climbs trees with ease"),
    "part": words("knee, elbow, shoulder, ankle, finger, tooth, lung, stomach, heart, skin"),
    "remedy": words("rest, warm tea, fresh air, a bandage, an ointment, a short walk, more sleep"),
    "subject": words("history, geometry, grammar, chemistry, music, geography, spelling, drawing"),
    "clue": words("a name, a place, a time, a number, a reason, a person, a category, a title"),
    "genre": words("sports, business, science, politics, weather, travel, fashion, health"),
    "opinion": words("true, false, correct, wrong, positive, negative, good, bad, likely, possible"),
    "bird": words("eagle, sparrow, crow, swan, squirrel, bee, spider, lizard, frog, whale"),
    "minutes": words("5, 10, 12, 15, 20, 25, 30, 40, 45, 60, 90"),
    "count": tuple(str(number) for number in range(2, 1000, 7)),
}

_KINDS: tuple[tuple[str, ...], ...] = (
    ('"Where have you been?" asked {person}. "In the {building}," said {person2}, "with my '
     '{relative}." Nobody spoke for a while.',
     '{person} asked: "Why is the {noun} so {quality}?" {person2} answered: "Because it is '
     'very old; it was made in {year}." The {job} did not believe it.',
     '"Does this {noun} belong to you?" the {job} asked. "No," {person} replied, "it is my '
     '{relative}\'s." They both laughed.',
     '"How many {bird}s did you see?" - "{count}!" said {person}. "That is not possible," said '
     '{person2}. They counted again on {day}.',
     '"Which {thing} do you choose?" asked the {job}. {person} pointed at the {color} one. "Yes, '
     'that one, please."'),
    ("recipe: {food}. First {cook} the vegetables for {minutes} minutes; then take a {pan} and add {spice} "
     "and {spice2}. Serve it warm.",
     "to make {food}, {cook} everything slowly and taste it with {spice}. A {pan} and a {pan2} are "
     "all the tools you need.",
     "{person} put {spice} into the {food} by mistake. Instead of {spice2}, it tasted of {spice}; "
     "still, the family ate it."),
    ("almanac; town: {town}; year: {year}; houses: {count}; bridges: {small}. The records are kept "
     "in the {building}.",
     "list of the {job}: {count} nails; {small} ropes; a {color} {noun}. Everything lay ready in a "
     "{quality} box.",
     "timetable: {town} - {town2}, {day}, {clock}; {town3} - {town4}, {day2}, {clock2}. No trains "
     "run in {month}."),
    ("the {creature} {does}. Unlike the {creature2}, it is {manner} and rarely seen near "
     "{town}.",
     "a {creature} is an animal that {does}. In {country} people say that it is {manner}.",
     "the {plantname} and the {plantname2} grow well near the sea. Use a {yardtool} in {month}, and "
     "keep the soil moist."),
    ("a {thing} is a kind of {kind}. A good one costs {count} crowns in {country}.",
     "a {wear} of {cloth} is warmer than one of {cloth2}. The tailor {person} {surname} sews them in "
     "the {building} of {town}.",
     "{person} repairs every {device} and {device2} in {town}. A cable, a screen and a lot of "
     "patience are needed for this."),
    ("people who feel {feeling} often seem {mood}, but some hide it. The {job} {person} writes about "
     "{feeling} and {feeling2}.",
     "{person} was {mood} in the morning and {mood2} in the evening. Such days come and go.",
     "when your {part} hurts, {remedy} may help. The doctor {person} {surname} of {town} says so to "
     "everyone."),
    ("a question can ask for {clue} or {clue2}. The answer is a word, or a short sentence that follows "
     "from the text.",
     "in {subject} class the teacher reads a claim, and the pupils say whether it is {opinion} or "
     "{opinion2}. Then they explain why.",
     "the newspaper of {town} has a section for {genre} and one for {genre2}. Each report has a "
     "headline, and each review tells the writer's opinion.",
     "two sentences may have the same meaning although their words differ. A good summary says the "
     "main point of a {subject} book in {minutes} words.",
     "a story needs a beginning and an ending that fits. {person} collects the records, describes "
     "each {noun}, and puts the fields together."),
    ("behind the {noun} there is a {quality} {noun2}. {person} found a {color} {noun3} in it and "
     "showed it to the {job}.",
     "walk past the {building}, cross the {quality} {noun}, and turn left. After {count} steps you "
     "will see the {noun2} of {town}.",
     "the {manner} {job} of {town} owns a {noun} and a {noun2}. Nobody knows what happened to the "
     "{noun3}."),
)


def raw_text(draw: Draw) -> str:
    """One or more sentences of a kind that no data set has."""
    kind = draw.pick(tuple(KINDS))
    slots = {"kind": kind, "thing": draw.pick(KINDS[kind])}
    return draw.bind(draw.pick(draw.pick(_KINDS)), _WORDS, slots)
