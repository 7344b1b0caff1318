"""The words of the quickstart's reviews: five subjects, and opinions in three polarities.

Commas separate entries; an entry can have several words. Each opinion has only one polarity, so that the polarity of a
sentence follows from its words.
"""

from collections.abc import Mapping

POLARITIES = ("positive", "negative", "neutral")


def _list(text: str) -> tuple[str, ...]:
    return tuple(" ".join(entry.split()) for entry in text.split(","))


# Subjects with places and aspects; a `noun` is followed by "was".
SUBJECTS: Mapping[str, Mapping[str, tuple[str, ...]]] = {
    "film": {
        "took": _list("watched, saw, caught, streamed"),
        "item": _list("a western, a comedy, a thriller, a documentary, a musical, a cartoon, a romance, a mystery"),
        "place": _list("at the cinema, at the festival, on the train, on the couch, during the flight, downtown"),
        "noun": _list("acting, plot, cast, script, dialogue, lighting, editing, soundtrack, camera work, scenery"),
        "part": _list("scene, minute, shot, line"),
    },
    "book": {
        "took": _list("read, finished, borrowed, opened"),
        "item": _list("a novel, a biography, a memoir, a diary, a fable, a poem, a trilogy, an essay"),
        "place": _list("in the library, in the garden, on the bus, in bed, at the lake, under a tree"),
        "noun": _list("prose, preface, narrator, setting, translation, cover, vocabulary, structure, heroine, villain"),
        "part": _list("page, chapter, paragraph, sentence"),
    },
    "meal": {
        "took": _list("ordered, tried, shared, tasted"),
        "item": _list("a pizza, a curry, a stew, a salad, a burger, a soup, a pie, an omelet"),
        "place": _list("at the bistro, at the diner, in the tavern, at the market, near the station, on the terrace"),
        "noun": _list("sauce, crust, service, seasoning, texture, bread, dessert, menu, wine list, flavor"),
        "part": _list("bite, spoonful, morsel, mouthful"),
    },
    "stay": {
        "took": _list("booked, rented, chose, visited"),
        "item": _list("a suite, a cabin, a cottage, a hostel, a villa, a lodge, a motel, an apartment"),
        "place": _list("near the beach, by the airport, in the mountains, in the old town, beside the river, abroad"),
        "noun": _list("bed, breakfast, bathroom, view, lobby, staff, pool, balcony, kitchen, furniture"),
        "part": _list("night, hour, evening, room"),
    },
    "concert": {
        "took": _list("heard, attended, joined, recorded"),
        "item": _list("a symphony, a recital, a quartet, a choir, a band, a pianist, a ballet, an opera"),
        "place": _list("in the park, in the church, at the stadium, in the town hall, at the academy, on the square"),
        "noun": _list("melody, rhythm, singing, sound, stage, percussion, harmony, tempo, encore, violin solo"),
        "part": _list("song, note, verse, tune"),
    },
}

# Words without polarity that fit every subject.
PLAIN: Mapping[str, tuple[str, ...]] = {
    "when": _list("""last Monday, last Friday, last weekend, last summer, last winter, last month, two days ago,
        three weeks ago, in January, in April, in August, in October, at noon, at midnight, yesterday, recently"""),
    "who": _list("I, we, my brother and I, my sister and I, my aunt and I, my cousin and I"),
    "event": _list("work, school, lunch, practice, the meeting, the storm, the exam, the parade, a long walk, a nap"),
    "reason": _list("""it was raining, we had time, a friend mentioned it, the power was out, the shops were closed,
        the train was late, everyone talked about it, it was on the list"""),
    "we": _list("I, we, everyone, my family, most people, half of us, my friends, the others"),
    "whom": _list("me, us, everyone, the children, my parents, our guests, my partner, the crowd"),
    "audience": _list("students, families, tourists, beginners, experts, couples, neighbors, newcomers, travelers"),
    "speaker": _list("my uncle, my mother, my teacher, the critic, a stranger, the editor, my doctor, the mayor"),
    "degree": _list("really, truly, rather, quite, simply, frankly, clearly, very, surely, entirely"),
    "cost": _list("the money, the wait, the effort, the journey, the fuss, the price, the trouble, the detour"),
    "rival": _list("the last one, the first one, the usual choice, what came before, anything nearby, the famous ones"),
    "span": _list("for days, for hours, for weeks, all night, all week, until Sunday, on the way home, the whole time"),
    "modest": _list("modern, local, recent, brief, narrow, compact, foreign, formal"),
}

# Opinions by slot. Every slot has all three polarities, so any pattern can express any of them.
OPINIONS: Mapping[str, Mapping[str, tuple[str, ...]]] = {
    "quality": {
        "positive": _list("""superb, wonderful, brilliant, lovely, excellent, delightful, fantastic, terrific,
            splendid, impressive, charming, perfect, great, stunning, gorgeous, flawless"""),
        "negative": _list("""terrible, awful, dreadful, dull, boring, poor, horrible, weak, sloppy, disappointing,
            lousy, bland, clumsy, annoying, miserable, ugly"""),
        "neutral": _list("""ordinary, usual, typical, average, plain, familiar, standard, conventional,
            traditional, common, normal, routine, regular, similar, basic, generic"""),
    },
    "judged": {
        "positive": _list("loved, adored, enjoyed, treasured, cherished, praised"),
        "negative": _list("hated, loathed, regretted, detested, endured, despised"),
        "neutral": _list("noticed, followed, discussed, observed, described, counted"),
    },
    "readily": {
        "positive": _list("gladly, happily, warmly, eagerly, proudly, always"),
        "negative": _list("never, hardly, scarcely, rarely, barely, seldom"),
        "neutral": _list("perhaps, maybe, possibly, sometimes, probably, eventually"),
    },
    "feeling": {
        "positive": _list("happy, delighted, cheerful, thrilled, grateful, inspired, refreshed, smiling"),
        "negative": _list("sad, angry, bored, upset, weary, frustrated, gloomy, bitter"),
        "neutral": _list("silent, thoughtful, quiet, awake, curious, unmoved, undecided, busy"),
    },
    "answer": {
        "positive": _list("absolutely, certainly, definitely, yes, of course, indeed"),
        "negative": _list("no, not at all, not really, by no means, far from it, not once"),
        "neutral": _list("it depends, hard to say, nobody knows, time will tell, opinions differ, more or less"),
    },
    "better": {
        "positive": _list("better, brighter, richer, fresher, warmer, smarter, finer, nicer"),
        "negative": _list("worse, duller, poorer, flatter, weaker, sillier, uglier, sadder"),
        "neutral": _list("longer, shorter, newer, older, larger, smaller, wider, later"),
    },
    "count": {
        "positive": _list("five, four, a full five, at least four"),
        "negative": _list("zero, one, barely one, at most one"),
        "neutral": _list("three, about three, two or three, the middle three"),
    },
    "verdict": {
        "positive": _list("a triumph, a treasure, a delight, a joy, a gem, a masterpiece, a pleasure, a success"),
        "negative": _list("a failure, a mess, a disaster, a waste, a bore, a letdown, a chore, a mistake"),
        "neutral": _list("a habit, an experiment, a pastime, a formality, an exercise, a novelty, a topic, a surprise"),
    },
    "moved": {
        "positive": _list("charmed, impressed, amazed, pleased, amused, captivated, comforted, dazzled"),
        "negative": _list("annoyed, disappointed, irritated, offended, insulted, appalled, saddened, disgusted"),
        "neutral": _list("occupied, reached, surrounded, accompanied, detained, addressed, employed, concerned"),
    },
}
