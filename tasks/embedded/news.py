"""News-like passages: ``mini_topic`` and ``mini_headline``."""

from elm_jax.tasks.embedded.draw import Draw
from elm_jax.tasks.embedded.lexicon import WORDS, words

TOPICS = ("sports", "business", "science", "politics", "weather")

_WORDS = WORDS | {
    "team": words("Rovers, Falcons, Miners, Lions, Harriers, Comets, Anglers, Royals, Wolves, Hawks"),
    "game": words("football, hockey, basketball, volleyball, rugby, handball"),
    "player": words("captain, goalkeeper, striker, young forward, veteran defender, substitute"),
    "race": words("marathon, cycling race, swimming final, rowing regatta, ski race, long jump"),
    "score": words("three to one, two to nil, four to three, five to two, one to nil, six to four"),
    "firm": words("Brightway, Solaris, Northgate, Keystone, Halcyon, Redwood, Pinecrest, Vantage"),
    "trade": words("bank, shoe maker, airline, furniture company, grocery chain, steel company, "
                   "software firm, car maker, paper mill, shipping line"),
    "share": words("profit, sales, revenue, orders, exports"),
    "scientist": words("physicists, biologists, chemists, astronomers, geologists, researchers, "
                       "engineers"),
    "find": words("comet, beetle, fossil, mineral, protein, moss, frog, bacterium, planet, vaccine"),
    "lab": words("laboratory, observatory, institute, university"),
    "law": words("school budget, housing law, tax reform, road plan, water law, pension bill, "
                 "parking rule, voting reform"),
    "post": words("mayor, senator, minister, governor, prime minister, council leader"),
    "storm": words("heavy rain, hail, strong wind, freezing fog, frost, wet snow, sleet, black ice"),
    "region": words("coast, northern valley, southern hills, islands, plain, eastern border"),
}

EVENTS: dict[str, tuple[tuple[str, str], ...]] = {
    "sports": (
        ("the {town} {team} beat the {town2} {team2} {score} in {game} on {day}.",
         "{town} {team} beat {town2} {team2}"),
        ("{person} {surname} won the {race} in {town} on {day} by a few seconds.",
         "{person} {surname} wins {town} {race}"),
        ("{person} {surname}, {player} of the {town} {team}, will miss the rest of the {game} season "
         "with an injured knee.", "Injured {surname} to miss {game} season"),
        ("the {town} {team} have signed {person} {surname} from a club in {country}.",
         "{town} {team} sign {person} {surname}"),
        ("fans cheered on {day} as the {town} {team} lifted the {game} cup for the first time.",
         "{town} {team} lift {game} cup"),
        ("coach {person} {surname} left the {town} {team} on {day} after a run of {small} defeats.",
         "Coach {surname} leaves {town} {team}"),
    ),
    "business": (
        ("the {trade} {firm} said on {day} that its {share} rose by {number} percent.",
         "{firm} {share} up {number} percent"),
        ("{firm}, a {trade} based in {town}, will close {small} stores and cut {number} jobs.",
         "{firm} to cut {number} jobs"),
        ("the {trade} {firm} has bought its rival {firm2} for {number} million crowns.",
         "{firm} buys rival {firm2}"),
        ("{person} {surname} was named chief executive of {firm}, a {trade} in {town}, on {day}.",
         "{firm} names {surname} chief executive"),
        ("investors sold shares of {firm} on {day} after the {trade} warned of falling {share}.",
         "Shares of {firm} fall on {share} warning"),
        ("the {trade} {firm} plans to open a new factory near {town} in {month}.",
         "{firm} to open factory near {town}"),
    ),
    "science": (
        ("{scientist} at the {town} {lab} have discovered a {find} that nobody had described before.",
         "{town} {scientist} discover new {find}"),
        ("a study led by {person} {surname} explains how the {find} survives extreme heat.",
         "Study explains how {find} survives heat"),
        ("a telescope built in {town} took the first clear picture of a distant {color} star.",
         "{town} telescope pictures {color} star"),
        ("{scientist} in {country} tested a {find} in {number} experiments over {small} years.",
         "{country} {scientist} test {find}"),
        ("the {town} {lab} sent a small probe into orbit on {day} to measure the magnetic field.",
         "{town} {lab} sends probe into orbit"),
        ("{scientist} have read the genes of a {animal} that lived {number} thousand years ago.",
         "Genes of ancient {animal} read"),
    ),
    "politics": (
        ("the parliament of {country} passed the {law} on {day} with a majority of {small} votes.",
         "{country} parliament passes {law}"),
        ("{person} {surname} was elected {post} of {town} on {day} after a close campaign.",
         "{surname} elected {post} of {town}"),
        ("{post} {person} {surname} resigned on {day} in a dispute over the {law}.",
         "{post} {surname} resigns over {law}"),
        ("leaders of {country} and {country2} signed a peace treaty in {town} on {day}.",
         "{country} and {country2} sign treaty"),
        ("voters in {country} will choose a new government in {month}, the {post} announced.",
         "{country} to vote in {month}"),
        ("critics in {country} asked the {post} to withdraw the {law}.",
         "{country} critics attack {law}"),
    ),
    "weather": (
        ("a warning of {storm} was issued for the {region} of {country} on {day}.",
         "{storm} warning for {country} {region}"),
        ("{storm} hit {town} on {day} night and left {number} homes without power.",
         "{storm} hits {town}"),
        ("{town} had its driest {month} since {year}, forecasters said.",
         "{town} has driest {month} since {year}"),
        ("temperatures in {town} will fall below zero on {day}, with {storm} in the evening.",
         "Freezing {day} expected in {town}"),
        ("a heat wave is moving toward the {region} and will reach {town} by {day}.",
         "Heat wave to reach {town}"),
        ("after {small} weeks of clouds, clear skies are expected over the {region} from {day}.",
         "Clear skies expected over {region}"),
    ),
}
"""For each topic: the sentence that opens a report, and its headline."""

_MORE: dict[str, tuple[str, ...]] = {
    "sports": (
        "the crowd of {number} thousand stayed until the final whistle.",
        "it was the {player}'s best match of the season, the coach said.",
        "the next round of the league will be played in {town5}.",
        "the {player} scored twice before half time.",
        "training starts again on {day5}, and the squad is confident.",
        "the referee showed {small} yellow cards.",
        "tickets for the next game are sold out.",
        "supporters sang in the stadium for an hour.",
        "the players now prepare for the championship in {country5}."),
    "race": (
        "the crowd of {number} thousand stayed until the winner was on the podium.",
        "it was the athlete's best result of the season, the coach said.",
        "the record of {surname5} still stands.",
        "training starts again on {day5}.",
        "the medal ceremony was held in the stadium of {town5}.",
        "the athletes now prepare for the championship in {country5}.",
        "{person5} {surname5} took the silver medal."),
    "business": (
        "analysts had expected weaker {share} this quarter.",
        "the shares closed higher on the stock market.",
        "the company hopes to win customers in {country5}.",
        "higher prices for raw materials hurt the industry last year.",
        "the owners will receive a dividend in {month5}.",
        "its debt has fallen, and the bank offered a new loan.",
        "the finance director spoke of a difficult market.",
        "about {number5} employees work at the headquarters."),
    "science": (
        "the results appear in a journal this {day5}.",
        "the team measured the samples under a microscope.",
        "other {scientist5} now want to repeat the experiment.",
        "the theory had been debated for {small5} decades.",
        "the data may help to explain how planets form.",
        "they used a laser and a very sensitive detector.",
        "the cells were grown at low temperature in the {lab5}.",
        "the discovery could lead to a better treatment, the authors write."),
    "politics": (
        "the opposition called the decision a mistake.",
        "the debate in the assembly lasted {small5} hours.",
        "the ambassador of {country5} welcomed the news.",
        "a second ballot will be held in {month5}.",
        "the party has lost support among young voters.",
        "a spokesman for the cabinet declined to comment.",
        "deputies will discuss the {law5} again in {month5}.",
        "the coalition holds a narrow majority."),
    "weather": (
        "forecasters expect more {storm5} until {day5}.",
        "winds may reach {number5} miles an hour.",
        "drivers were told to stay off icy roads.",
        "the river rose quickly, but no dikes broke.",
        "the cold front comes from {country5}.",
        "temperatures could climb to {number5} degrees at the weekend.",
        "humid air from the sea keeps the nights mild.",
        "the barometer fell sharply in the afternoon."),
    "fair": (
        "forecasters expect more sunshine until {day5}.",
        "temperatures could climb to {number5} degrees at the weekend.",
        "warm air from {country5} keeps the nights mild.",
        "farmers were told to save water, as no rain is in sight.",
        "the dry wind may last until {month5}.",
        "the barometer rose steadily in the afternoon.",
        "the haze over {town5} will clear by noon."),
}
_COURSES = {"{race}": "race", "driest": "fair", "heat wave": "fair", "clear skies": "fair"}
"""Events after which a report goes on otherwise than its topic's others, by words of their frame."""
_ANY = (
    "{person6} {surname6} from {town6} said it came as a surprise.",
    "people in {town6} talked about it all {day6}.",
    "more details will follow on {day6}.",
    "the {town6} Herald reported it first.",
    "a similar event took place in {year6}.",
)


def report(draw: Draw, topic: str) -> tuple[str, str]:
    """A report on a topic, of two or three sentences, and its headline."""
    lead, headline = draw.pick(EVENTS[topic])
    slots: dict[str, str] = {}
    sentences = [draw.bind(lead, _WORDS, slots)]
    title = draw.bind(headline, _WORDS, slots)
    course = next((course for mark, course in _COURSES.items() if mark in lead), topic)
    for more in draw.sample(_MORE[course], draw.number(1, 2)):
        sentences.append(draw.bind(more, _WORDS, slots))
    if draw.chance(0.3):
        sentences.insert(1 + draw.number(0, 1), draw.bind(draw.pick(_ANY), _WORDS, slots))
    return " ".join(sentences), title


def topic_row(draw: Draw, turn: int) -> dict[str, str]:
    """A row of ``mini_topic``: ``text``, ``topic``."""
    topic = TOPICS[turn % len(TOPICS)]
    return {"text": report(draw, topic)[0], "topic": topic}


def headline_row(draw: Draw, turn: int) -> dict[str, str]:
    """A row of ``mini_headline``: ``text``, ``headline``."""
    text, headline = report(draw, TOPICS[turn % len(TOPICS)])
    return {"text": text, "headline": headline}
