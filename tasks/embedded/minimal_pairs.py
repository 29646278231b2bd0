"""Grammatical minimal pairs in English, built from templates with a fixed seed.

Every phenomenon is a small function that draws words and returns pairs ``(prefix, good, bad)``:
``prefix + " " + good`` is a grammatical sentence, ``prefix + " " + bad`` is not, and the two differ
only in what the phenomenon tests. The pairs come as twins: two prefixes share both continuations,
each of which is right after one prefix and wrong after the other. The options alone (their length,
their wording, their position) therefore say nothing about the answer.

Run this file to rewrite ``minimal_pairs.jsonl`` beside it.
"""

import json
from collections.abc import Callable
from pathlib import Path
from random import Random
from typing import Any

Pair = tuple[str, str, str]  # prefix, good continuation, bad continuation

PAIRS_PER_FAMILY = 100

# Lexicons: alternatives are separated by "|", fields by " : ".
PEOPLE = (
    "plumber|librarian|senator|violinist|teacher|surgeon|tailor|gardener|pilot|banker|sailor|lawyer|"
    "farmer|painter|mechanic|dentist|architect|novelist|carpenter|detective"
)
MEN = "king|uncle|nephew|waiter|duke|father|grandfather|prince|groom|brother"
WOMEN = "queen|aunt|niece|waitress|duchess|mother|grandmother|princess|bride|sister"
MALE_NAMES = "Peter|David|Thomas|Martin|George|Henry|Paul|Daniel"
FEMALE_NAMES = "Anna|Maria|Sophie|Laura|Helen|Ruth|Emma|Alice"
ORIGINS = "from the village|with the long beard|at the front desk|in the old coat|next door"
ASIDES = "as far as we know|to our surprise|according to the report|without much fuss"
MOMENTS = "before dawn|during the storm|on Tuesday morning|after the funeral"

# Things : link : nouns it leads to : what may be said of the things.
SCENES = [
    "letter|parcel|invoice|receipt : from : client|supplier|lawyer|tenant"
    " : contain several errors|belong in the safe|look important|need a reply",
    "lamp|vase|mirror|clock : behind : sofa|cabinet|bookcase|piano"
    " : look older than the house|need a good cleaning|belong to the museum",
    "road|trail|footpath|track : around : lake|field|orchard|village"
    " : lead to the river|end at the old mill|look difficult in winter",
    "painter|dancer|singer|actor : near : window|statue|curtain|mirror"
    " : speak three languages|look tired after the show|live in Rome",
    "label|button|handle|switch : on : box|machine|jacket|drawer"
    " : come from Japan|look rather cheap|cost two dollars|need some glue",
]
# Things : people who deal with them : how : what may be said of the things.
WORKS = [
    "novel|poem|article|essay : editor|critic|teacher|student"
    " : praised|mentioned|quoted|ignored : deserve a prize|describe life in Rome|seem too long",
    "bridge|tower|chapel|cottage : architect|engineer|builder|visitor"
    " : inspected|admired|restored : attract many visitors|face the river|need new stairs",
    "jacket|blanket|carpet|coat : tailor|customer|weaver|merchant"
    " : repaired|washed|chose|sold : cost more than usual|look rather expensive|feel quite soft",
    "cake|pie|pudding|salad : baker|cook|guest|waiter"
    " : tasted|prepared|ordered : contain no sugar|smell of lemon|look quite fresh",
]
REFLEXIVE_VERBS = (
    "blamed _ for the accident|described _ in great detail|hurt _ during the game|"
    "introduced _ to the guests|defended _ against the charges|saw _ on television|"
    "taught _ to play chess|locked _ in the cellar"
)
# Subject, past tense, participle, rest.
IRREGULAR_VERBS = [
    ("poet", "wrote", "written", "a letter to the mayor"),
    ("guest", "drank", "drunk", "all the cider"),
    ("singer", "sang", "sung", "the anthem twice"),
    ("porter", "rang", "rung", "the bell at noon"),
    ("athlete", "swam", "swum", "across the bay"),
    ("thief", "stole", "stolen", "the silver spoons"),
    ("child", "tore", "torn", "the curtain in the hall"),
    ("actress", "wore", "worn", "the same dress"),
    ("pilot", "flew", "flown", "over the mountains"),
    ("waiter", "forgot", "forgotten", "the second course"),
    ("artist", "drew", "drawn", "a map of the island"),
    ("driver", "broke", "broken", "the lock on the gate"),
    ("judge", "chose", "chosen", "a different hotel"),
    ("soldier", "rode", "ridden", "through the valley"),
]
# Transitive verb, intransitive near synonym, its preposition, objects, rest.
PREPOSITION_VERBS = [
    ("reached", "arrived", "at", "the hotel|the border|the island", "before dark"),
    ("discussed", "talked", "about", "the budget|the accident|the strike", "at length"),
    ("mentioned", "referred", "to", "the scandal|the report|the fire", "only once"),
    ("awaited", "waited", "for", "the verdict|the results|the train", "in silence"),
    ("visited", "stayed", "at", "the inn|the castle|the cabin", "all summer"),
    ("demanded", "insisted", "on", "the refund|the apology|the receipt", "from the start"),
    ("heard", "listened", "to", "the speech|the sermon|the broadcast", "on Sunday"),
    ("considered", "thought", "about", "the offer|the proposal|the risks", "for weeks"),
    ("opposed", "objected", "to", "the plan|the new rules|the merger", "from the start"),
    ("trusted", "relied", "on", "the guide|the old map|the forecast", "for too long"),
    ("survived", "recovered", "from", "the operation|the flu|the crash", "last spring"),
    ("obeyed", "complied", "with", "the order|the law|the instructions", "at once"),
]
# Verbs that need an object, and verbs that take none.
TRANSITIVES = "repaired|devoured|obtained|destroyed|discovered|abandoned|removed|damaged"
INTRANSITIVES = "fainted|sneezed|arrived|vanished|yawned|hesitated|coughed|slept|trembled"


def pick(rng: Random, words: str) -> str:
    """Draw one of the alternatives in ``words``."""
    return rng.choice(words.split("|"))


def pick_two(rng: Random, words: str) -> list[str]:
    """Draw two different alternatives in ``words``."""
    return rng.sample(words.split("|"), 2)


def plural(noun: str) -> str:
    """Return the regular plural of ``noun``."""
    if noun.endswith("y") and noun[-2] not in "aeiou":
        return noun[:-1] + "ies"
    return noun + ("es" if noun.endswith(("s", "x", "ch", "sh")) else "s")


def twins(prefix_a: str, prefix_b: str, option_a: str, option_b: str) -> list[Pair]:
    """Return two pairs sharing both options; ``option_a`` is right after ``prefix_a`` only."""
    return [(prefix_a, option_a, option_b), (prefix_b, option_b, option_a)]


def agreement(rng: Random, one: str, many: str, predicates: str) -> list[Pair]:
    """Return twins whose verb agrees with the subject ``one`` or ``many``."""
    verb, rest = pick(rng, predicates).split(" ", 1)
    return twins(one, many, f"{verb}s {rest}.", f"{verb} {rest}.")


def agreement_distractor(rng: Random) -> list[Pair]:
    """The verb agrees with the head noun, not with the noun of the phrase in between."""
    heads, link, others, predicates = rng.choice(SCENES).split(" : ")
    head, other = pick(rng, heads), pick(rng, others)
    one, many = f"The {head} {link} the {plural(other)}", f"The {plural(head)} {link} the {other}"
    return agreement(rng, one, many, predicates)


def agreement_relative_clause(rng: Random) -> list[Pair]:
    """The verb agrees with the head noun across an object relative clause."""
    things, people, deeds, predicates = rng.choice(WORKS).split(" : ")
    head, other, deed = pick(rng, things), pick(rng, people), pick(rng, deeds)
    one, many = f"The {head} that the {plural(other)} {deed}", f"The {plural(head)} that the {other} {deed}"
    return agreement(rng, one, many, predicates)


def reflexive_distractor(rng: Random) -> list[Pair]:
    """A reflexive agrees with the subject, not with the owner or companion named in it."""
    man, woman = pick(rng, MEN), pick(rng, WOMEN)
    link = pick(rng, "in the photograph with the|who lived with the|on the bench beside the|'s")
    verb, rest = pick(rng, REFLEXIVE_VERBS).split(" _ ")
    if link == "'s":
        masculine, feminine = f"The {woman}'s {man}", f"The {man}'s {woman}"
    else:
        masculine, feminine = f"The {man} {link} {woman}", f"The {woman} {link} {man}"
    return twins(f"{masculine} {verb}", f"{feminine} {verb}", f"himself {rest}.", f"herself {rest}.")


def reflexive_locality(rng: Random) -> list[Pair]:
    """A reflexive refers to the subject of its own clause, not to anyone in the clause above."""
    man, woman = pick(rng, MALE_NAMES), pick(rng, FEMALE_NAMES)
    verb, rest = pick(rng, REFLEXIVE_VERBS).split(" _ ")
    claim = pick(rng, "said that|thought that|told _ that|reminded _ that")
    return twins(
        f"{woman} {claim.replace('_', 'her sister')} {man} {verb}",
        f"{man} {claim.replace('_', 'his brother')} {woman} {verb}",
        f"himself {rest}.",
        f"herself {rest}.",
    )


def determiner_noun(rng: Random) -> list[Pair]:
    """A noun agrees in number with its determiner across the adjectives between them."""
    one, many = rng.choice([("this", "these"), ("that", "those"), ("another", "several")])
    nouns = "chair|cabinet|violin|vase|carpet|clock|mirror|lamp|painting|desk"
    verb, noun = pick(rng, "bought|sold|described|photographed"), pick(rng, nouns)
    adjective, other = pick_two(rng, "old|large|plain|dusty|heavy|simple")
    view = pick(rng, "in the opinion of|at least according to|in the eyes of")
    judge, who = pick_two(rng, PEOPLE)
    quality = pick(rng, "ugly|charming|useful|valuable|worthless")
    rest = pick(rng, "for the museum|last autumn|on Friday")
    return twins(
        f"The {who} {verb} {one} {adjective}, {other} and, {view} most {plural(judge)}, {quality}",
        f"The {who} {verb} {many} {adjective}, {other} and, {view} the {judge}, {quality}",
        f"{noun} {rest}.",
        f"{plural(noun)} {rest}.",
    )


def past_participle(rng: Random) -> list[Pair]:
    """The simple past stands alone; "has" and "had" take the participle."""
    who, past, participle, rest = rng.choice(IRREGULAR_VERBS)
    aside, has = pick(rng, ASIDES), pick(rng, "has|had")
    return twins(
        f"The {who}, {aside},",
        f"The {who} {has}, {aside},",
        f"{past} {rest}.",
        f"{participle} {rest}.",
    )


def polarity(rng: Random) -> list[Pair]:
    """A negated main clause is taken up by "neither", an affirmative one by "so"."""
    first, second = pick_two(rng, PEOPLE)
    verb, rest = pick(rng, "call the office|sign the letter|join the party|enter the race").split(" ", 1)
    habit = pick(rng, "complains about money|travels alone|trusts the news|works on Sunday")
    when = pick(rng, "last week|in the end|at first|this time")
    return twins(
        f"The {first}, who never {habit}, {verb}ed {rest} {when}, and",
        f"The {first}, who always {habit}, did not {verb} {rest} {when}, and",
        f"so did the {second}.",
        f"neither did the {second}.",
    )


def preposition_argument(rng: Random) -> list[Pair]:
    """A transitive verb takes a bare object; its near synonym needs a preposition."""
    bare, with_prep, prep, objects, rest = rng.choice(PREPOSITION_VERBS)
    who, other = pick_two(rng, PEOPLE)
    subject = pick(rng, f"the {who} {pick(rng, ORIGINS)}|the {who} and the {other}")
    opening = pick(rng, "Nobody remembers|We all know|The book describes|Emma wrote about")
    opening += f" {pick(rng, objects)} that {subject}"
    return twins(f"{opening} {bare}", f"{opening} {with_prep}", f"{rest}.", f"{prep} {rest}.")


def verb_argument(rng: Random) -> list[Pair]:
    """After "what" the verb must lack its object; after "why" it must not lack one."""
    opening = pick(rng, "Nobody remembers|The police know|Everyone asked|The letter explains")
    subject, when = f"the {pick(rng, PEOPLE)}", pick(rng, MOMENTS)
    return twins(
        f"{opening} what {subject}",
        f"{opening} why {subject}",
        f"{pick(rng, TRANSITIVES)} {when}.",
        f"{pick(rng, INTRANSITIVES)} {when}.",
    )


def filler_gap(rng: Random) -> list[Pair]:
    """A clause with "what" must have a gap; a clause with "that" must not."""
    opening = pick(rng, "Nobody remembers|The police know|Everyone has heard|The letter explains")
    rest = f"the {pick(rng, PEOPLE)} {pick(rng, ORIGINS)} {pick(rng, TRANSITIVES)}"
    it, when = pick(rng, "it|them"), pick(rng, MOMENTS)
    return twins(f"{opening} that {rest}", f"{opening} what {rest}", f"{it} {when}.", f"{when}.")


def pronoun_case(rng: Random) -> list[Pair]:
    """The subject of a finite clause is nominative, that of a bare infinitive is not."""
    subjective, objective = rng.choice([("he", "him"), ("she", "her"), ("they", "them")])
    rest = pick(rng, "cut the rope|put it in the safe|set the table for six|quit the job in May")
    subject = f"The {pick(rng, PEOPLE)} {pick(rng, ORIGINS)}"
    return twins(
        f"{subject} {pick(rng, 'alleged|insisted|conceded|claimed|suspected')}",
        f"{subject} {pick(rng, 'made|let|had')}",
        f"{subjective} {rest}.",
        f"{objective} {rest}.",
    )


def countability(rng: Random) -> list[Pair]:
    """Plural nouns go with "many" and "a few", mass nouns with "much" and "a little"."""
    words = "too many/too much|so many/so much|a few/a little|far too many/far too much"
    many, much = pick(rng, words).split("/")
    verb, adjective, counts, masses = rng.choice(
        [
            ("used", "fresh", "eggs|lemons|tomatoes|onions", "flour|butter|milk|cheese"),
            ("bought", "cheap", "chairs|lamps|beds|tables", "furniture|soap|paper|fabric"),
            ("received", "useful", "letters|tips|hints|reports", "advice|information|news|help"),
            ("carried", "heavy", "suitcases|boxes|bags|tools", "luggage|equipment|gear|timber"),
        ]
    )
    extra = pick(rng, "|, slightly damaged|, otherwise ordinary") if adjective == "cheap" else ""
    rest = pick(rng, "that day|last week|in the end|at first")
    start = f"The {pick(rng, PEOPLE)} {verb}"
    return twins(
        f"{start} {many} {adjective}{extra}",
        f"{start} {much} {adjective}{extra}",
        f"{pick(rng, counts)} {rest}.",
        f"{pick(rng, masses)} {rest}.",
    )


def comparison(rng: Random) -> list[Pair]:
    """The word "more" is completed by "than", the first "as" by another "as"."""
    adjective = pick(rng, "patient|careful|reliable|cheerful|generous|famous|popular")
    first, second = pick_two(rng, PEOPLE)
    groups = (
        "to people as old as my parents|to families with less money than ours|"
        "to boys as young as six|to writers with more talent than luck"
    )
    group, role = pick(rng, groups), pick(rng, "friend|guide|host")
    return twins(
        f"The {first} was a more {adjective} {role} {group}",
        f"The {first} was as {adjective} a {role} {group}",
        f"than the {second}.",
        f"as the {second}.",
    )


def adjective_adverb(rng: Random) -> list[Pair]:
    """A linking verb takes an adjective, an action verb an adverb."""
    adjective = pick(rng, "cautious|careful|thorough|competent|prudent|meticulous")
    who = f"The {pick(rng, PEOPLE)} {pick(rng, ORIGINS)}"
    rest = pick(rng, "throughout the visit|that afternoon|during the meeting|at first")
    aside = pick(rng, "as far as we know|to our surprise|according to the report")
    action = pick(rng, "examined the evidence in the case|handled the new machines|answered our letters")
    return twins(
        f"{who} {pick(rng, 'seemed|became|sounded')}, {aside},",
        f"{who} {action}",
        f"{adjective} {rest}.",
        f"{adjective}ly {rest}.",
    )


FAMILIES = (
    agreement_distractor,
    agreement_relative_clause,
    reflexive_distractor,
    reflexive_locality,
    determiner_noun,
    past_participle,
    polarity,
    preposition_argument,
    verb_argument,
    filler_gap,
    pronoun_case,
    countability,
    comparison,
    adjective_adverb,
)


def pairs(family: Callable[[Random], list[Pair]], seed: int) -> list[dict[str, Any]]:
    """Return the items of one family, no pair drawn twice, each option first in half of its twins."""
    name = family.__name__
    rng = Random(f"{seed}:{name}")
    seen: set[Pair] = set()
    rows: list[tuple[str, list[str], int]] = []
    while len(rows) < PAIRS_PER_FAMILY:
        drawn = family(rng)
        if seen.intersection(drawn):
            continue
        seen.update(drawn)
        answer = rng.randrange(2)
        for prefix, good, bad in drawn:
            rows.append((prefix, [bad, good] if answer else [good, bad], answer))
            answer = 1 - answer
    rng.shuffle(rows)
    return [
        {"id": f"{name}-{number:03d}", "family": name, "prompt": prompt, "options": options, "answer": answer}
        for number, (prompt, options, answer) in enumerate(rows, 1)
    ]


def generate(seed: int = 0) -> list[dict[str, Any]]:
    """Return all items, one of each family in turn, so that any first N cover the families evenly."""
    rounds = zip(*(pairs(family, seed) for family in FAMILIES), strict=True)
    return [item for items in rounds for item in items]


def main() -> None:
    """Write the items beside this file."""
    path = Path(__file__).with_suffix(".jsonl")
    with path.open("w", encoding="utf-8", newline="\n") as file:
        for item in generate():
            file.write(json.dumps(item, ensure_ascii=False) + "\n")


if __name__ == "__main__":
    main()
