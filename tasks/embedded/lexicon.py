"""Words that all embedded data sets share: the people, places, days and things of one small world."""


def words(text: str) -> tuple[str, ...]:
    """A list written as words between commas."""
    return tuple(part.strip() for part in text.split(","))


WORDS: dict[str, tuple[str, ...]] = {
    "person": words(
        "Anna, Ben, Clara, David, Elena, Felix, Grace, Hugo, Irene, Jacob, Karen, Leo, Maria, Nadia, "
        "Oscar, Paula, Quentin, Rosa, Samuel, Teresa, Umar, Vera, Walter, Yusuf, Zoe, Amir, Bella, "
        "Carlos, Diana, Emil, Fatima, George, Hannah, Ivan, Julia, Kofi, Lena, Marcus, Nora, Omar, "
        "Peter, Ruth, Simon, Tara, Victor, Wendy, Arthur, Helen"),
    "surname": words(
        "Abbott, Barnes, Castillo, Dalton, Ellis, Fischer, Greene, Harper, Ibarra, Jansen, Keller, "
        "Lindgren, Moreno, Novak, Okafor, Palmer, Quinn, Rossi, Sato, Turner, Ueda, Vance, Whitman, "
        "Young, Zimmer, Bennett, Carver, Dubois, Hale, Marsh"),
    "town": words(
        "Marden, Oakfield, Port Ellis, Weston, Riverton, Ashby, Linden, Harwick, Stonebridge, Calder, "
        "Millbrook, Fairhaven, Brunton, Eastmoor, Glenford, Kingsley, Norwood, Redhill, Silverton, "
        "Thornbury, Winslow, Bayside, Copperton, Dunmore, Elmsworth, Foxley, Greyford, Hollis"),
    "country": words(
        "Norland, Velia, Castria, Meridia, Tarvos, Ostania, Belmark, Sorana, Kelland, Ardenia"),
    "day": words("Monday, Tuesday, Wednesday, Thursday, Friday, Saturday, Sunday"),
    "month": words(
        "January, February, March, April, May, June, July, August, September, October, November, "
        "December"),
    "year": tuple(str(year) for year in range(1921, 2021, 3)),
    "small": words("two, three, four, five, six, seven, eight, nine"),
    "number": words(
        "twelve, fifteen, eighteen, twenty, twenty-five, thirty, forty, fifty, sixty, eighty, ninety"),
    "clock": words(
        "six o'clock, half past seven, eight o'clock, nine o'clock, a quarter past ten, noon, "
        "two o'clock, half past three, four o'clock, five o'clock, midnight, half past eleven"),
    "building": words(
        "library, town hall, museum, bakery, post office, theater, railway station, school, market, "
        "hospital, harbor office, chapel, bookshop, fire station, swimming pool, old mill"),
    "outdoors": words(
        "park, river bank, beach, hillside, forest, orchard, garden, lake shore, meadow, old bridge, "
        "village square, campsite, quarry, vineyard"),
    "job": words(
        "teacher, nurse, baker, carpenter, painter, farmer, driver, gardener, tailor, librarian, "
        "plumber, pilot, cook, photographer, musician, dentist, shepherd, sailor, clerk, blacksmith"),
    "animal": words(
        "dog, cat, horse, goat, rabbit, parrot, donkey, sheep, turtle, fox, owl, duck, pony, hen"),
    "food": words(
        "soup, bread, pancakes, rice, noodles, apple pie, salad, roast chicken, cheese, dumplings, "
        "mushroom stew, grilled fish, lentils, potato cakes, fruit salad, plum jam"),
    "object": words(
        "lantern, kite, blanket, violin, camera, compass, basket, umbrella, ladder, drum, map, "
        "suitcase, candle, hammer, telescope, rope, teapot, mirror, notebook, saddle, clock, guitar, "
        "whistle, bucket"),
    "color": words("red, blue, green, yellow, white, black, brown, silver, purple, orange"),
    "relative": words("brother, sister, uncle, aunt, cousin, grandmother, grandfather, neighbor"),
    "weather": words("sunny, rainy, windy, cold, foggy, warm, snowy, cloudy, quiet"),
}

KINDS: dict[str, tuple[str, ...]] = {
    "musical instrument": words("violin, guitar, trumpet, flute, drum, harp"),
    "animal": words("dog, horse, goat, rabbit, parrot, donkey"),
    "piece of furniture": words("table, wardrobe, bench, bookcase, sofa, desk"),
    "vehicle": words("truck, bicycle, motorbike, tractor, van, bus"),
    "flower": words("rose, tulip, lily, daisy, orchid, sunflower"),
    "tool": words("hammer, saw, drill, shovel, wrench, rake"),
    "fruit": words("pear, mango, peach, melon, plum, banana"),
    "garment": words("coat, scarf, sweater, jacket, skirt, vest"),
}
"""Things by their kind: a violin is a musical instrument, and no animal."""
